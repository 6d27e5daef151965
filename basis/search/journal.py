"""What a sensitivity was measured on, as digests, and the file to which its measurements are appended."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from basis.saving import replacing
from basis.search.table import Cell, SensitivityTable, Trial, different, line_of


def digest(text: str | bytes) -> str:
    """Thirty-two hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:32]


def _bytes(tensor: Tensor) -> Any:
    """The tensor as rows of bytes, one for each entry of its first dimension."""
    rows = len(tensor) if tensor.dim() else 1
    width = tensor.numel() // rows if rows else 0
    return tensor.detach().reshape(rows, width).contiguous().view(torch.uint8).cpu().numpy()


def samples(batches: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """The number of samples and a digest of them that does not depend on their order or batches."""
    total = n = 0
    for x, y in batches:
        rows = [_bytes(t) for t in (x, y) if t is not None]
        n += len(x)
        for sample in zip(*rows, strict=True):
            total += int(digest(b"".join(row.tobytes() for row in sample)), 16)
    return f"{n} samples {total % 2**128:032x}"


def structure(model: nn.Module) -> str:
    """A digest of the modules and the shapes of the parameters."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return digest(_plain_name(repr(model)) + repr(shapes))


def weights(model: nn.Module) -> str:
    """A digest of the whole state."""
    state = model.state_dict()
    parts = (
        name.encode() + (_bytes(v).tobytes() if isinstance(v, Tensor) else repr(v).encode())
        for name, v in state.items()
    )
    return digest(b"".join(hashlib.sha256(part).digest() for part in parts))


def _plain_name(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def name_of(function: Any) -> str:
    """What a loss or trainer is: its name with its settings, or its code, the same in every process.

    Of a module the numbers and strings among its attributes count, of a partial its arguments; of a function its
    bytecode, constants and defaults, and the numbers and strings it has closed over. What else it refers to
    cannot be told.
    """
    if isinstance(function, nn.Module):
        return _plain_name(f"{function!r} {sorted((k, repr(v)) for k, v in vars(function).items() if _is_plain(v))}")
    code = getattr(function, "__code__", None)
    if code is None:
        return _plain_name(repr(function))
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    closed = [repr(value) if _is_plain(value) else type(value).__name__ for value in held]
    parts = repr((code.co_code, code.co_consts, code.co_names, function.__defaults__, closed))
    return f"{function.__module__}.{function.__qualname__} {digest(_plain_name(parts))}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


class Journal:
    """The table so far, and the file to which each measurement is appended, if there is one.

    Raises:
        ValueError: for a file that is no table, or one of another measurement.
    """

    def __init__(self, path: Path | None, table: SensitivityTable) -> None:
        self.path, self.table = path, table
        self.exists = path is not None and path.exists() and path.stat().st_size > 0
        if path is None or not self.exists:
            return
        known = SensitivityTable.load(path)
        differing = different(known.fingerprint, table.fingerprint)
        if differing:
            raise ValueError(
                f"{path} was measured with {'another' if len(differing) == 1 else 'other'} {', '.join(differing)}; "
                "name another file, or delete this one to measure again"
            )
        self.table = replace(table, cells=known.cells, trials=known.trials, baseline=known.baseline)
        with path.open("rb+") as file:  # a last line that was cut short goes
            file.truncate(file.read().rfind(b"\n") + 1)

    def begin(self, baseline: Mapping[str, float]) -> None:
        """Write the first line, where the file is new."""
        self.table = replace(self.table, baseline=self.table.baseline or baseline)
        if self.path is not None and not self.exists:
            head = replace(self.table, cells=(), trials=()).to_lines()[0]
            with replacing(self.path) as file:
                file.write(json.dumps(head).encode() + b"\n")

    def append(self, item: Cell | Trial) -> None:
        """Keep one measurement, on the disk before this returns."""
        if isinstance(item, Trial):
            self.table = replace(self.table, trials=(*self.table.trials, item))
        else:
            self.table = replace(self.table, cells=(*self.table.cells, item))
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(line_of(item)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
