"""Digests of networks, data and losses, which tell whether a file belongs to what it is used with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType
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
    except (TypeError, NotImplementedError):  # no length, or one of an IterableDataset, which has none either
        return None


def samples(batches: Iterable[tuple[Any, Any]]) -> str:
    """The number of samples (inputs, targets or None) and a digest that does not depend on their order or batches."""
    total = n = 0
    for batch in batches:
        n += (size := samples_in(batch[0]))
        rows = [(tensor.dim() and len(tensor) == size, _bytes(tensor)) for tensor in tensors_in(batch)]
        parts = [part.tobytes() for split, part in rows if not split]  # of another length than the batch
        parts += [b"".join(sample) for sample in zip(*(part for split, part in rows if split), strict=True)]
        total += sum(int(digest(part), 16) for part in parts)
    return f"{n} samples {total % 2**128:032x}"


def structure(model: nn.Module) -> str:
    """A digest of the modules and the shapes of the parameters."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return digest(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)) + repr(shapes))


def weights(state: Mapping[str, Any]) -> str:
    """A digest of a whole state dictionary."""
    parts = []
    for name, held in state.items():
        content = _bytes(held).tobytes() if isinstance(held, Tensor) else repr(held).encode()
        parts.append(hashlib.sha256(name.encode() + content).digest())
    return digest(b"".join(parts))


def contents(value: Any, inside: tuple[Any, ...] = ()) -> str:
    """A digest of data or of a loss, as far as they can be told without drawing a sample or calling anything.

    Of tensors and arrays all numbers; of lists the length and at most 10,000 entries; of dataclasses and of a
    ``Dataset`` the length and the public fields that hold such; of a ``DataLoader`` the dataset and the batch size; of
    functions the code, defaults and closure, of an object that is called what it holds, of networks the structure; of
    anything else the kind and the length. ``inside`` are the values that this one is a part of.
    """
    value = getattr(value, "_torchdynamo_orig_callable", getattr(value, "_orig_mod", value))  # before torch.compile
    value = value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
    if isinstance(value, (Tensor, np.ndarray)):
        content = _bytes(value) if isinstance(value, Tensor) else value.tobytes()
        return digest(f"{tuple(value.shape)} {value.dtype} {digest(content)}")
    if value is None or isinstance(value, (str, bytes, int, float, type)):
        return repr(value)
    held = [] if any(value is one for one in inside) else [contents(item, (*inside, value)) for item in _held(value)]
    return digest(f"{type(value).__qualname__} {getattr(value, '__qualname__', '')} {length_of(value)} {held}")


def _held(value: Any) -> Iterable[Any]:
    """What tells ``value`` from others of its kind and length."""
    if isinstance(value, Mapping):
        return [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        return value[:: max(1, len(value) // ENTRIES)]
    if isinstance(value, DataLoader):
        return value.dataset, value.batch_size
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Dataset):
        public = [item for name, item in vars(value).items() if not name.startswith("_")]
        return [item for item in public if isinstance(item, (Tensor, np.ndarray, list, tuple, Dataset))]
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_consts
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, nn.Module):
        shown = {name: one for name, one in vars(value).items() if not name.startswith("_")}
        trains = next(value.parameters(), None) is not None  # numbers that change
        return [structure(value)] if trains else [structure(value), shown, value.state_dict()]
    if callable(value):
        names = ("__code__", "__defaults__", "__kwdefaults__", "__self__", "__dict__")
        cells = getattr(value, "__closure__", None) or ()
        return [*(getattr(value, name, None) for name in names), *(cell.cell_contents for cell in cells)]
    return ()


def _bytes(tensor: Tensor) -> Any:
    """The tensor as rows of bytes, one for each entry of its first dimension."""
    rows = len(tensor) if tensor.dim() else 1
    flat = tensor.detach().reshape(rows, tensor.numel() // rows if rows else 0)
    return flat.contiguous().view(torch.uint8).cpu().numpy()
