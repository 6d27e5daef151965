"""Records: what finished runs leave, one JSON file each, ``results/STUDY/PROFILE/ID.json``."""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from basis.environment import results_folder
from basis.saving import RecordError, write_json
from basis.search.table import SensitivityTable
from basis.text import first_line

VERSION = 1
LOCKLESS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # of file systems without locks
KINDS = {"cpu": "CPU", "cuda": "GPU"}  # of devices
PLACE = ("study", "profile")  # entries of a configuration that say where it belongs, not what was done


@dataclass(frozen=True)
class Record:
    """A finished run: its configuration, result, environment, and the study's definition then."""

    id: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    definition: str


def digest(value: object) -> str:
    """Sixteen hexadecimal digits that identify any value made of plain JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identity(config: Mapping[str, Any]) -> str:
    """The digest of what was done: of a configuration without study, profile and entries that are None.

    A field added later must default to None, meaning "as before"; it then changes no older identity.
    """

    def given(value: Any) -> Any:
        return {k: given(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value

    return digest(given({key: value for key, value in config.items() if key not in PLACE}))


def parse_record(text: bytes, name: Path | str) -> Record:
    """The record that a file called ``name`` holds; :class:`RecordError` says what is wrong with it."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("version", None) != VERSION:
            raise RecordError(f"{name} is not a record of version {VERSION}, which this package reads")
        record = Record(**content)
        if record.id != identity(record.config):
            raise RecordError(f"{name} was changed after it was written: its id does not fit its configuration")
    except (ValueError, TypeError, AttributeError) as error:
        raise RecordError(f"{name} is not a JSON record ({error}); delete it to have its run done again") from error
    return record


def read_record(path: Path) -> Record:
    """One record. Raises :class:`RecordError`."""
    try:
        return parse_record(path.read_bytes(), path)
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({first_line(error)})") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all. Raises :class:`basis.saving.Unwritable`."""
    write_json(path, {"version": VERSION, **asdict(record)})


def take_lock(lock: filelock.BaseFileLock, *, wait: bool) -> None:
    """Acquire ``lock``; ``filelock.Timeout`` where another process holds it and this one is not to ``wait``.

    Where the file system has no locks, work goes on without, and a warning says so.
    """
    try:
        lock.acquire(blocking=wait)
    except (OSError, NotImplementedError) as error:  # the latter by filelock, of a call that is missing
        if isinstance(error, OSError) and error.errno not in LOCKLESS:
            raise
        warnings.warn(f"{lock.lock_file} cannot be locked, so two processes may do the same work", stacklevel=2)


def load_records(folder: Path | None = None, *, study: str = "*", profile: str = "*") -> list[Record]:
    """All records below ``folder``, or those of one study or profile, ordered by variant and seed.

    Raises :class:`RecordError` for the first one that cannot be read.
    """
    files = (folder or results_folder()).glob(f"{study}/{profile}/*.json")
    records = [read_record(path) for path in sorted(files) if path.parts[-3] != "bench"]
    return sorted(records, key=lambda r: tuple(r.config[key] for key in ("study", "profile", "variant", "seed")))


def device_seconds(record: Record) -> float:
    """Seconds of training, its preparation and the sensitivities; shared out where runs stood side by side.

    Reading data, evaluation and a teacher's training are not timed.
    """
    tables = record.result.get("tables") or {}
    measuring = sum(cell.seconds for lines in tables.values() for cell in SensitivityTable.from_lines(lines).cells)
    training = record.result["train_seconds"] + record.result.get("setup_seconds", 0.0)
    return float(training + measuring) / record.environment.get("jobs", 1)


def spent(records: Iterable[Record]) -> dict[str, float]:
    """Device seconds by kind of device ("cpu", "cuda"), which are never added up."""
    total: dict[str, float] = defaultdict(float)
    for record in records:
        total[record.environment.get("device_type", "cpu")] += device_seconds(record)
    return dict(total)


def in_hours(seconds: Mapping[str, float]) -> str:
    """Such as ``0.25 h CPU, 1.50 h GPU``; empty for nothing."""
    return ", ".join(f"{value / 3600:.2f} h {KINDS.get(device, device)}" for device, value in sorted(seconds.items()))
