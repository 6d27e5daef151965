"""What a sensitivity was measured on, as digests, and the file to which its measurements are appended."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basis.saving import plain, replacing, sync
from basis.search.table import Cell, SensitivityTable


def digest(text: str | bytes) -> str:
    """Thirty-two hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode(errors="backslashreplace") if isinstance(text, str) else text).hexdigest()[:32]


def samples(batches: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """The number of samples and a digest of them that does not depend on their order or batches."""
    total = n = 0
    for x, y in batches:
        n += len(x)
        for sample in zip(*(_bytes(t) for t in (x, y) if t is not None), strict=True):
            total += int(digest(b"".join(row.tobytes() for row in sample)), 16)
    return f"{n} samples {total % 2**128:032x}"


def structure(model: nn.Module) -> str:
    """A digest of the modules and the shapes of the parameters."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return digest(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)) + repr(shapes))


def weights(model: nn.Module) -> str:
    """A digest of the whole state."""
    parts = []
    for name, held in model.state_dict().items():
        content = _bytes(held).tobytes() if isinstance(held, Tensor) else repr(held).encode()
        parts.append(hashlib.sha256(name.encode() + content).digest())
    return digest(b"".join(parts))


def _bytes(tensor: Tensor) -> Any:
    """The tensor as rows of bytes, one for each entry of its first dimension."""
    rows = len(tensor) if tensor.dim() else 1
    flat = tensor.detach().reshape(rows, tensor.numel() // rows if rows else 0)
    return flat.contiguous().view(torch.uint8).cpu().numpy()


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
