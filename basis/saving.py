"""Files written whole or not at all, and results kept as JSON: frozen dataclasses of plain values."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

VERSION = 1

Own = TypeVar("Own", bound="Saved")


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


class Saved:
    """What a frozen dataclass inherits to be saved and loaded."""

    kind: ClassVar[str]  # what the file says it is
    parts: ClassVar[Mapping[str, type]] = {}  # the fields that hold another dataclass, or a tuple of them

    def to_json(self) -> str:
        """The result as JSON text, for :meth:`from_json`. NaN and infinity become null."""
        content: Any = asdict(self)  # type: ignore[call-overload]
        return json.dumps({f"basis_{self.kind}": VERSION} | plain(content), indent=2) + "\n"

    @classmethod
    def from_json(cls: type[Own], text: str) -> Own:
        """The result that :meth:`to_json` wrote. Raises ``ValueError`` where ``text`` is not one."""
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.pop(f"basis_{cls.kind}", None) != VERSION:
                raise ValueError(f"this JSON is no {cls.kind} of version {VERSION}")
            return _made(cls, content)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the {cls.kind} is damaged: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the result as JSON to ``path``, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls: type[Own], path: str | os.PathLike) -> Own:
        """Read a result. Raises ``FileNotFoundError``, or ``ValueError`` for what is not one."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no {cls.kind} at {os.fspath(path)}") from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _made(kind: Any, content: Mapping[str, Any]) -> Any:
    parts: Mapping[str, type] = getattr(kind, "parts", {})
    types = {field.name: str(field.type) for field in fields(kind)}

    def value(name: str, given: Any) -> Any:
        if isinstance(given, list):
            return tuple(value(name, one) for one in given) if name in parts else tuple(given)
        if name in parts and given is not None:
            return _made(parts[name], given)
        return number(given) if types.get(name) == "float" else given

    return kind(**{name: value(name, given) for name, given in content.items()})


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
