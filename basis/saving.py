"""Files written whole or not at all, and results as JSON and as lines of text."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from basis.text import first_line

FULL = (errno.ENOSPC, errno.EDQUOT)
LOST = (*FULL, errno.EIO, errno.EFBIG)  # what says that a write failed, not that a file system lacks a call
# What helps where something cannot be written.
HELP = dict.fromkeys(FULL, "make room there") | {errno.ENAMETOOLONG: "name a shorter one"}
HELP |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there, or name another folder")


class RecordError(RuntimeError):
    """A record that cannot be read, written or trusted; the message says why and what would be right."""


class Unwritable(RecordError):
    """The folder of the records cannot be written, as on a full disk, so that no run could be kept."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that takes the place of ``path`` where the block ends well: readers see the old or the new.

    Its mode is that of the file that was there, where the file system can set one, else what the umask leaves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.tmp")  # also where the name is of full length
    try:
        with temporary.open("xb") as file:
            yield file
            sync(file)
        with suppress(OSError):
            temporary.chmod(path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(file: IO[bytes]) -> None:
    """Bring to the disk what was written, as far as the file system can; ``OSError`` where writing failed."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in LOST:
            raise


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all. Raises :class:`Unwritable` when that fails, as on a full disk."""
    try:
        with replacing(path) as file:
            file.write(json.dumps(plain(value, finite=False), indent=1).encode() + b"\n")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> Unwritable:
    """What to raise where ``path`` could not be written."""
    then = f"{HELP.get(error.errno or 0, 'mend that')} and run the command again, which goes on where it stopped"
    return Unwritable(f"{path} could not be written ({error.strerror or first_line(error)}); {then}")


def plain(value: Any, *, finite: bool = True) -> Any:
    """Nested mappings and sequences, numbers of numpy and paths as JSON takes them.

    Numbers that are not finite become None, if ``finite``.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, finite=finite) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> float:
    """NaN for None."""
    return math.nan if value is None else value


def columns(rows: Sequence[tuple[str, ...]], *, left: int = 1) -> list[str]:
    """Rows as lines of aligned text: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines
