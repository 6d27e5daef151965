"""The folder that a long piece of work fills: one run in it, stage after stage, never overwriting another's.

    DIR/run.json           the settings, written once all input was found good
    DIR/stages/NAME.json   what a finished stage found, and how long it took
    DIR/...                files that stages write

A stage whose file is there is not done again, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from basis.bench.timing import check_place
from basis.saving import replacing
from basis.text import few

RUN_FILE, STAGES, LOCK = "run.json", "stages", ".lock"
RUN_VERSION = 1


@dataclass(frozen=True)
class Workplace:
    """A folder that holds a run of these settings, or none yet; ``versions`` of the software stand in every stage."""

    folder: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def check(self, *, resume: bool = True) -> None:
        """Refuse a folder that holds anything but a run of these settings; nothing is written.

        Raises:
            ValueError: for a file in its place, a folder of other things, a damaged ``run.json``, a run of other
                settings (names them), and, unless ``resume``, for any run at all.
        """
        run = self.folder / RUN_FILE
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, but must be a folder to write to")
        if not run.exists():
            there = (
                sorted(p.name for p in self.folder.iterdir() if not _is_ours(p.name)) if self.folder.is_dir() else []
            )
            if there:
                raise ValueError(
                    f"{self.folder} holds other things ({few(there)}) and nothing is overwritten; name another folder"
                )
            return
        try:
            held = json.loads(run.read_text(encoding="utf-8"))
            known = held["settings"] if held["basis_run"] == RUN_VERSION else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} is damaged ({error!r}); name another folder") from error
        if known is None:
            raise ValueError(
                f"{run} has version {held['basis_run']!r}, but {RUN_VERSION} is read here; name another folder"
            )
        keys = dict.fromkeys((*known, *self.settings))
        found = (_difference(key, known.get(key), _plain(self.settings.get(key))) for key in keys)
        differing = [text for text in found if text]
        if differing:
            raise ValueError(
                f"{self.folder} holds another run, which is kept ({few(differing, '; ')}); name another folder"
            )
        if not resume:
            raise ValueError(f"{self.folder} holds a run of the same settings, which only goes on if it may resume")

    def check_room(self, needed: int) -> None:
        """Refuse a folder that cannot be written to, or whose disk has less than ``needed`` bytes left."""
        new = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        check_place(new / RUN_FILE if new == self.folder else new / "x")
        free = shutil.disk_usage(new).free
        if free < needed:
            raise ValueError(
                f"the disk of {self.folder} has {free / 1e6:,.0f} MB left, but about {needed / 1e6:,.0f} MB are needed"
            )

    def begin(self) -> None:
        """Write the settings, where they are not there yet; raises what :meth:`check` does."""
        self.check()  # once more: another process may have been faster
        if not (self.folder / RUN_FILE).exists():
            _write(self.folder / RUN_FILE, {"basis_run": RUN_VERSION, "settings": _plain(self.settings)})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works in the folder within this block; ``ValueError`` where somebody does already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                yield
        except Timeout as error:
            raise ValueError(
                f"another process is working in {self.folder}; wait for it, or name another folder"
            ) from error

    def done(self, name: str) -> dict[str, Any] | None:
        """What the stage found, None where it is not finished."""
        path = self.folder / STAGES / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and the stage is done again") from error

    def stage(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What the stage found, doing its work only where it is not finished; with its ``seconds``."""
        known = self.done(name)
        if known is None:
            began = time.perf_counter()
            found = dict(work())
            found |= {"versions": dict(self.versions), "seconds": time.perf_counter() - began}
            _write(self.folder / STAGES / f"{name}.json", found)
            known = self.done(name)
        return known or {}


def _is_ours(name: str) -> bool:
    """Whether a file may be left by a run that was killed before it had begun."""
    return name == LOCK or (name.startswith(f"{RUN_FILE}.") and name.endswith(".tmp"))


def _difference(key: str, there: object, here: object) -> str | None:
    """How a setting differs, in words; None where it does not."""
    if there == here:
        return None
    if str(there).startswith("sha256 "):
        return f"the contents of {key} are others"
    return f"{key} is {there!r} there and {here!r} here"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _write(path: Path, value: object) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
