"""Records on their way from one machine to another: packed into one archive, checked, and filed."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import filelock

from basis.experiments.runs import PROFILES, VERSION, Record, parse_record, read_record
from basis.experiments.studies import STUDIES, listed, misplaced
from basis.experiments.studies.plausible import doubts, wrong_size
from basis.saving import RecordError, Unwritable, replacing, write_json

MEMBER = re.compile(rf"[a-z0-9_]+/({'|'.join(PROFILES)})/[0-9a-f]{{16}}\.json")
LARGEST, MOST = 8 * 2**20, 20_000  # bytes of a record, members of an archive: more is no archive of ours

Outcome = Literal["taken", "renewed", "known", "other", "refused"]


@dataclass(frozen=True)
class Filed:
    """What became of one member of an archive.

    ``outcome`` is "taken", "renewed" (instead of a record made under an older definition of its study), "known" (the
    same record is there), "other" (the run is there, done elsewhere: that one stays) or "refused".
    """

    name: str
    outcome: Outcome
    reason: str = ""


def pack(paths: Iterable[Path], folder: Path, archive: Path) -> int:
    """Pack records of ``folder`` into a ``.tar.gz``, whole or not at all; equal records make equal bytes.

    An archive that is there is added to: its other records stay, and those of the same names are replaced.

    Returns:
        How many records the archive holds then.

    Raises:
        RecordError: where a file is there that is no archive of records.
        Unwritable: where the archive cannot be written.
    """
    new = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    contents = packed_records(archive) | new
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    try:
        with replacing(archive) as file:
            file.write(packed.getvalue())
    except OSError as error:
        raise Unwritable(f"{archive} could not be written ({error.strerror}); the records are in {folder}") from error
    return len(contents)


def packed_records(archive: Path) -> dict[str, bytes]:
    """The files in an archive by their names STUDY/PROFILE/ID.json, unchecked; none where there is no archive yet.

    Raises:
        RecordError: where a file is there that is no whole archive, or holds something else than files of such names.
    """
    if not archive.exists():
        return {}
    found: dict[str, bytes] = {}
    for name, content in _members(archive):
        if content is None:
            raise RecordError(f"{archive} holds {name!r}, so it is no archive of records that others could be added to")
        found[name] = content
    return found


def take_in(archive: Path, folder: Path) -> Iterator[Filed]:
    """Check every record of an archive, and file the sound ones below ``folder``.

    Nothing is unpacked: members are read one by one, and written as records are. Refused are members that are
    no plain file, bear another name than a record's, or are too large; and records that cannot be read, that no study
    lists, that were made under another definition of their study, or that cannot be what their run left.

    Raises:
        RecordError: where the archive cannot be read, or holds what no campaign packs in such numbers.
        Unwritable: where ``folder`` cannot be written.
    """
    for name, content in _members(archive):
        if content is None:
            yield Filed(name, "refused", "it is no record: those are files STUDY/PROFILE/ID.json")
        else:
            yield _file(name, content, folder)


def _members(archive: Path) -> Iterator[tuple[str, bytes | None]]:
    """The name of every member, and its content; None where it is no plain file or not named as records are.

    Raises:
        RecordError: where the archive cannot be read, or holds what no campaign packs in such numbers.
    """
    try:
        with tarfile.open(archive, mode="r|gz") as tar:
            for count, member in enumerate(tar):
                if count >= MOST or member.size > LARGEST:
                    raise RecordError(f"{archive} holds {member.name!r} of {member.size} bytes, after {count} others; "
                                      "no campaign packs so much, and the rest of it was not read")  # fmt: skip
                file = tar.extractfile(member) if member.isreg() else None
                sound = file is not None and MEMBER.fullmatch(member.name)
                yield member.name, file.read() if file and sound else None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise RecordError(f"{archive} is no whole archive of records ({error})") from error


def _file(name: str, content: bytes, folder: Path) -> Filed:
    path = folder / name
    try:
        record = parse_record(content, f"{name} in the archive", remedy="pack it anew where its run was done")
    except RecordError as error:
        return Filed(name, "refused", str(error))
    reason = refusal(name, record)
    if reason:
        return Filed(name, "refused", reason)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return Filed(name, "other", "another process is doing this run right now")
    except OSError as error:
        raise Unwritable(f"{path.parent} could not be written ({error.strerror})") from error
    try:
        found = _compare(path, record)
        if found.outcome in ("taken", "renewed"):
            write_json(path, {"version": VERSION, **asdict(record)})
        return Filed(name, found.outcome, found.reason)
    finally:
        path.with_suffix(".lock").unlink(missing_ok=True)
        lock.release()


def _compare(path: Path, record: Record) -> Filed:
    """Whether the record is new beside what is there."""
    if not path.exists():
        return Filed(path.name, "taken")
    try:
        there = read_record(path)
    except RecordError as error:
        return Filed(path.name, "refused", str(error))
    if there == record:
        return Filed(path.name, "known")
    if there.definition != record.definition:
        return Filed(path.name, "renewed", "the one here was made before its study changed its claims or rule")
    where = ", ".join(str(there.environment.get(key, "?")) for key in ("device", "date"))
    return Filed(path.name, "other", f"the run has a record here ({where}), which stays")


def refusal(name: str, record: Record) -> str:
    """Why a record that can be read must not be filed under ``name``; empty where it may."""
    study, profile, file = name.split("/")
    reason = misplaced(record, study, profile, Path(file).stem)
    if reason:
        return reason
    run = listed(STUDIES[study], profile)[record.id]
    found = doubts(run, record) or filter(None, [wrong_size(run, record)])
    return "; ".join(found)
