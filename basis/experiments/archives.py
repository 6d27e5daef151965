"""Records on their way from one machine to another: packed into one archive, checked, and filed."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from basis.experiments.records import parse_record, read_record, write_record
from basis.experiments.runs import PROFILES
from basis.experiments.studies import misplaced
from basis.saving import RecordError, Unwritable, replacing


class Filed(NamedTuple):
    """What became of one file of an archive, see :func:`take_in`."""

    name: str
    outcome: str
    reason: str = ""


def pack(paths: Iterable[Path], folder: Path, archive: Path) -> int:
    """Pack records of ``folder`` into a ``.tar.gz``, whole or not at all; equal records make equal bytes.

    An archive that is there is added to. Returns how many records it holds then.

    Raises:
        RecordError: where a file is there that is no archive of records, or the archive cannot be written.
    """
    contents = packed(archive) if archive.exists() else {}
    contents |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    content = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=content, mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, text in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    try:
        with replacing(archive) as file:
            file.write(content.getvalue())
    except OSError as error:
        raise Unwritable(f"{archive} could not be written ({error.strerror}); the records are in {folder}") from error
    return len(contents)


def packed(archive: Path) -> dict[str, bytes]:
    """The records in an archive by their names STUDY/PROFILE/ID.json, unchecked. Nothing is unpacked.

    Raises ``RecordError`` where it is no whole archive, or holds anything else.
    """
    found = {}
    try:
        with tarfile.open(archive, mode="r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and member.name.endswith(".json") else None
                if file is None:
                    raise RecordError(f"{archive} holds {member.name!r}, so it is no archive of records")
                found[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RecordError(f"{archive} is no whole archive of records ({error})") from error
    return found


def take_in(archive: Path, folder: Path) -> Iterator[Filed]:
    """File the records of an archive below ``folder``, where their configuration says and nowhere else.

    Each is "taken", "renewed" (instead of a record made under an older definition of its study), "known" (the same one
    is there), "other" (the run is there, done elsewhere: that one stays) or "refused": it cannot be read, no study
    lists it, or it was made under another definition.

    Raises:
        RecordError: where the archive cannot be read.
        Unwritable: where ``folder`` cannot be written.
    """
    for name, text in packed(archive).items():
        try:
            yield Filed(name, *_file(text, name, folder))
        except Unwritable:
            raise
        except RecordError as error:
            yield Filed(name, "refused", str(error))


def _file(text: bytes, name: str, folder: Path) -> tuple[str, str]:
    record = parse_record(text, name)
    study, profile = (str(record.config.get(key)) for key in ("study", "profile"))
    reason = misplaced(record, study, profile, record.id) if profile in PROFILES else f"has no profile {profile!r}"
    if reason:
        return "refused", reason
    path, outcome = folder / study / profile / f"{record.id}.json", "taken"
    if path.exists():
        there = read_record(path)
        if there == record:
            return "known", ""
        if there.definition == record.definition:
            where = ", ".join(str(there.environment.get(key, "?")) for key in ("device", "date"))
            return "other", f"the run has a record here ({where}), which stays"
        outcome = "renewed"
    write_record(path, record)
    return outcome, ""
