"""The file to which the measurements of a sensitivity are appended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from basis.saving import plain, replacing, sync
from basis.search.table import Cell, SensitivityTable


class Journal:
    """The table so far, and the file to which each measurement is appended, if there is one.

    Raises ``ValueError`` for a file that is no table, or one of another measurement.
    """

    def __init__(self, path: str | os.PathLike | None, table: SensitivityTable) -> None:
        self.path, self.table = None if path is None else Path(path), table
        self.begun = self.path is not None and self.path.exists() and self.path.stat().st_size > 0
        if self.path is None or not self.begun:
            return
        known = SensitivityTable.load(self.path)
        before, now = known.fingerprint, table.fingerprint
        differing = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
        if differing:
            what = f"{'another' if len(differing) == 1 else 'other'} {', '.join(differing)}"
            raise ValueError(f"{path} was measured with {what}; name another file, or delete this one to measure again")
        self.table = replace(table, cells=known.cells, baseline=known.baseline)
        with self.path.open("rb+") as file:  # a last line that was cut short goes
            file.truncate(file.read().rfind(b"\n") + 1)

    def begin(self, baseline: Mapping[str, float]) -> None:
        """Write the first line, where the file is new."""
        self.table = replace(self.table, baseline=self.table.baseline or baseline)
        if self.path is not None and not self.begun:
            with replacing(self.path) as file:
                file.write(json.dumps(self.table.to_lines()[0]).encode() + b"\n")

    def append(self, cell: Cell) -> None:
        """Keep one measurement, on the disk before this returns."""
        self.table = replace(self.table, cells=(*self.table.cells, cell))
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(plain(asdict(cell))).encode() + b"\n")
                sync(file)
