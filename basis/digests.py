"""Digests of networks, data and losses, which tell whether a file belongs to what it is used with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from basis.inputs import samples_in, tensors_in

ENTRIES = 10_000  # of a list that are looked at


def digest(text: str | bytes) -> str:
    """Thirty-two hexadecimal digits of the SHA-256."""
    return hashlib.sha256(text.encode(errors="backslashreplace") if isinstance(text, str) else text).hexdigest()[:32]


def length_of(data: Any) -> int | None:
    """How many batches or samples one pass gives; None where they do not tell."""
    try:
        return len(data)
    except TypeError:  # no length, or one of an IterableDataset, which has none either
        return None


def samples(batches: Iterable[tuple[Any, Any]]) -> str:
    """The number of samples (inputs, targets) and a digest of them that does not depend on their order or batches.

    Tensors that have another length than their batch count as a whole; None for absent targets.
    """
    total = n = 0
    for batch in batches:
        n += (size := samples_in(batch[0]))
        rows = [(tensor.dim() and len(tensor) == size, _bytes(tensor)) for tensor in tensors_in(batch)]
        wholes = [part.tobytes() for split, part in rows if not split]
        for sample in zip(*(part for split, part in rows if split), strict=True):
            total += int(digest(b"".join(row.tobytes() for row in sample)), 16)
        total += sum(int(digest(whole), 16) for whole in wholes)
    return f"{n} samples {total % 2**128:032x}"


def structure(model: nn.Module) -> str:
    """A digest of the modules and the shapes of the parameters."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return digest(_text(model) + repr(shapes))


def weights(state: Mapping[str, Any]) -> str:
    """A digest of a whole state dictionary."""
    parts = []
    for name, held in state.items():
        content = _bytes(held).tobytes() if isinstance(held, Tensor) else repr(held).encode()
        parts.append(hashlib.sha256(name.encode() + content).digest())
    return digest(b"".join(parts))


def contents(data: Any) -> str:
    """A digest of data, as far as they can be told without drawing a sample.

    Of tensors and arrays all numbers; of lists the length and at most 10,000 entries; of dataclasses and of a
    ``Dataset`` the length and the public fields that hold such; of a ``DataLoader`` the dataset and the batch size; of
    anything else the kind and the length.
    """
    data = data.tolist() if isinstance(data, np.ndarray) and data.dtype == object else data
    if isinstance(data, (Tensor, np.ndarray)):
        content = _bytes(data) if isinstance(data, Tensor) else data.tobytes()
        return digest(f"{tuple(data.shape)} {data.dtype} {digest(content)}")
    if data is None or isinstance(data, (str, bytes, int, float)):
        return repr(data)
    held: Any = ()
    if isinstance(data, Mapping):
        held = [item for pair in data.items() for item in pair]
    elif isinstance(data, (list, tuple)):
        held = data[:: max(1, len(data) // ENTRIES)]
    elif isinstance(data, DataLoader):
        held = (data.dataset, data.batch_size)
    elif is_dataclass(data):
        held = [getattr(data, field.name) for field in fields(data)]
    elif isinstance(data, Dataset):
        public = [item for name, item in vars(data).items() if not name.startswith("_")]
        held = [item for item in public if isinstance(item, (Tensor, np.ndarray, list, tuple, Dataset))]
    return digest(f"{type(data).__qualname__} {length_of(data)} {[contents(item) for item in held]}")


def function(of: Any) -> str:
    """A digest of what tells a function: its name, code, defaults and closure, of a partial or object what it holds."""
    if isinstance(of, partial):
        return digest(f"{function(of.func)} {_text((of.args, of.keywords))}")
    code = getattr(of, "__code__", None)
    closed = [cell.cell_contents for cell in getattr(of, "__closure__", None) or ()]
    inside = (
        (code.co_code, code.co_names, code.co_consts, of.__defaults__, closed) if code else getattr(of, "__dict__", "")
    )
    return digest(f"{type(of).__qualname__} {getattr(of, '__qualname__', '')} {_text(inside)}")


def _text(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _bytes(tensor: Tensor) -> Any:
    """The tensor as rows of bytes, one for each entry of its first dimension."""
    rows = len(tensor) if tensor.dim() else 1
    flat = tensor.detach().reshape(rows, tensor.numel() // rows if rows else 0)
    return flat.contiguous().view(torch.uint8).cpu().numpy()
