"""What a network takes: one tensor, a tuple or list of positional arguments, or a dictionary of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from basis.numbers import plain_number

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in it, in whatever tuples, lists, dictionaries and dataclasses, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [mapped(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        own = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: mapped(change, getattr(value, name)) for name in own})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in ``value``, in order."""
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments of a call with ``inputs``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def run(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` gives for copies of ``inputs``, which it may change."""
    args, kwargs = arguments(mapped(Tensor.clone, inputs))
    return model(*args, **kwargs)


def samples_in(inputs: Inputs) -> int:
    """The size of the batch: of the first dimension of the first tensor that has one; 0 where there is none."""
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 0)


def picked(inputs: Inputs, index: Any) -> Inputs:
    """The samples of a batch at ``index``, a slice or tensor; tensors that have another length are left whole."""
    total = samples_in(inputs)
    return mapped(lambda t: t[index] if t.dim() and len(t) == total else t, inputs)


def first_samples(inputs: Inputs, n: int) -> Inputs:
    """The first ``n`` samples of a batch."""
    return picked(inputs, slice(n))


def with_samples(inputs: Inputs, n: int) -> Inputs:
    """A batch of ``n`` samples, which come round again."""
    return picked(inputs, torch.arange(n) % samples_in(inputs))


def shapes_of(inputs: Inputs) -> str:
    """Shapes and dtypes in words."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(inputs))


def example_inputs(
    model: nn.Module, input_size: Iterable[int] | None, inputs: Inputs | None, *, batch_size: int = 1
) -> Inputs:
    """``inputs`` on the model's device; or zeros (batch_size, \\*input_size), in its dtype too.

    Raises ``ValueError`` unless exactly one of the two is given, for sizes that are no whole numbers of at least 1, for
    inputs without a sample, and for a ``batch_size`` that they have not.
    """
    like = next((p for p in model.parameters() if p.is_floating_point() or p.is_complex()), torch.empty(0))
    if (input_size is None) == (inputs is None):
        raise ValueError("give one of input_size, such as (3, 32, 32), and inputs, a batch as the model takes it")
    n = plain_number("batch_size", batch_size, whole=True, least=1)
    if inputs is not None:
        if not (samples := samples_in(inputs)):
            raise ValueError("inputs hold no tensor with a sample; give a batch as the model takes it")
        if n not in (1, samples):
            raise ValueError(f"batch_size is {n}, but the inputs are {samples} samples; it goes with input_size")
        return mapped(lambda t: t.detach() if t.is_meta else t.detach().to(like.device), inputs)
    if not isinstance(input_size, Iterable):
        raise ValueError(f"input_size is {input_size!r}, but it must be a list of numbers, such as (3, 32, 32)")
    size = [plain_number("each number of input_size", number, whole=True, least=1) for number in input_size]
    return torch.zeros([n, *size], dtype=like.dtype, device=like.device)
