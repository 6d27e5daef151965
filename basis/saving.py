"""Files written whole or not at all, and results as JSON and as lines of text."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class RecordError(RuntimeError):
    """A record that cannot be read, written or trusted; the message says why and what would be right."""


class Unwritable(RecordError):
    """The folder of the records cannot be written, as on a full disk, so that no run could be kept."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that takes the place of ``path`` where the block ends well: readers see the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp", delete=False)  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all. Raises :class:`Unwritable` when that fails, as on a full disk."""
    try:
        with replacing(path) as file:
            file.write(json.dumps(value, indent=1).encode() + b"\n")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> Unwritable:
    """What to raise where ``path`` could not be written."""
    then = "make room there and run the command again, which goes on where it stopped"
    return Unwritable(f"{path} could not be written ({error.strerror}); {then}")


def plain(value: Any) -> Any:
    """Nested mappings and sequences as JSON takes them; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
