"""Records on their way from one machine to another: packed into one archive, checked, and filed."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from basis.experiments.records import parse_record, read_record, write_record
from basis.experiments.runs import PROFILES
from basis.experiments.studies import misplaced
from basis.saving import RecordError, Unwritable, replacing
from basis.text import first_line


def pack(paths: Iterable[Path], folder: Path, archive: Path) -> int:
    """Pack records of ``folder`` into a ``.tar.gz``, or add them to it; equal records make equal bytes.

    Returns how many records it holds then. Raises ``RecordError`` where it is no archive of records, or cannot be
    written.
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
        raise Unwritable(f"{archive} could not be written ({first_line(error)}); records are in {folder}") from error
    return len(contents)


def packed(archive: Path) -> dict[str, bytes]:
    """The records in an archive by their names STUDY/PROFILE/ID.json, unchecked. Nothing is unpacked.

    Raises ``RecordError`` where it is no whole archive, or holds anything else.
    """
    found = {}
    try:
        content = gzip.decompress(archive.read_bytes())  # all of it, which checks its sum
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and member.name.endswith(".json") else None
                if file is None:
                    raise RecordError(f"{archive} holds {member.name!r}, so it is no archive of records")
                found[member.name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise RecordError(f"{archive} is no whole archive of records ({first_line(error)})") from error
    return found


def take_in(archive: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """File the records of an archive below ``folder``, where their configuration says and nowhere else.

    Gives the name of each, its outcome and the reason. Outcomes: "taken", "renewed" (instead of a record made under
    an older definition of its study), "known" (the same one is there), "other" (the run is there, done elsewhere: that
    one stays) or "refused": it cannot be read, no study lists it, or it was made under another definition.

    Raises ``RecordError`` where the archive cannot be read, its kind ``Unwritable`` where ``folder`` cannot be written.
    """
    for name, text in packed(archive).items():
        try:
            yield name, *_file(text, name, folder)
        except Unwritable:
            raise
        except RecordError as error:
            yield name, "refused", str(error)


def _file(text: bytes, name: str, folder: Path) -> tuple[str, str]:
    record = parse_record(text, name)
    study, profile = (str(record.config.get(key)) for key in ("study", "profile"))
    reason = misplaced(record, study, profile, record.id) if profile in PROFILES else f"has no profile {profile!r}"
    if reason:
        return "refused", reason
    path = folder / study / profile / f"{record.id}.json"
    there = read_record(path) if path.exists() else None
    if there is not None and there.definition == record.definition:
        about = ", ".join(str(there.environment.get(key, "?")) for key in ("device", "date"))
        return ("known", "") if there == record else ("other", f"the run has a record here ({about}), which stays")
    write_record(path, record)
    return "taken" if there is None else "renewed", ""
