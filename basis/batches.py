"""A user's data: batches brought to the model's device and checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from basis.data import Data, Images, normalise
from basis.modules import is_channels_last
from basis.text import few

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Any] | Images | Data
BATCH = 250  # images in a batch, where the data come as one piece


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, (N,): logits (N, classes, ...) and labels, or class probabilities."""
    losses = F.cross_entropy(outputs.float(), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def held_out(data: Data) -> Images:
    """The validation images; ``ValueError`` where there are none."""
    if data.validation is None:
        raise ValueError("the data have no validation images to measure on; basis.data.hold_out splits them off")
    return data.validation


def stream_batches(
    data: Iterable[Any] | Images, model: nn.Module, what: str, *, bare: bool = False, batch_size: int = BATCH
) -> Iterator[Batch]:
    """The batches (inputs, targets) that are not empty, one by one on the model's device.

    With ``bare``, targets may be absent; the inputs stand for them. Images come normalised, in the model's dtype and
    memory format. Raises ``ValueError`` for a batch of another kind, and at the end where there was no sample.
    """
    if not isinstance(data, Iterable) and not isinstance(data, Images):
        raise ValueError(f"{what} is {described(data)}, but it must be an iterable of batches, or basis.data.Images")
    weight, found = first_weight(model), False
    for x, y in _images(data, weight, batch_size) if isinstance(data, Images) else _pairs(data, what, bare):
        if len(x):
            found = True
            yield x.to(weight.device), y.to(weight.device)
    if not found:
        raise ValueError(f"{what} holds no samples, so there is nothing to measure on")


def length_of(data: Any) -> int | None:
    """How many batches one pass gives; None where they do not tell."""
    try:
        return len(data)
    except TypeError:  # no length, or one of an IterableDataset, which has none either
        return None


def first_weight(model: nn.Module) -> Tensor:
    """The first filters of the model, whose device, dtype and memory format inputs are brought to."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        raise ValueError("the model has no parameters, so there is nothing to work on")
    return next((p for p in parameters if p.dim() == 4), parameters[0])


def _images(images: Images, weight: Tensor, size: int) -> Iterator[Batch]:
    last, images = is_channels_last(weight), images.to(weight.device)
    for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
        image = normalise(x).to(weight.dtype) if len(x) else x
        yield image if last else image.contiguous(), y


def _pairs(data: Iterable[Any], what: str, bare: bool) -> Iterator[Batch]:
    for i, batch in enumerate(data):
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        pair = (inputs, inputs) if bare else batch
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not (good and all(isinstance(t, Tensor) and t.dim() for t in pair) and len(pair[0]) == len(pair[1])):
            raise ValueError(
                f"batch {i} of {what} is {described(batch)}, but it must be a pair (inputs, targets) of equal length"
            )
        yield pair[0], pair[1]


def calibration_inputs(data: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The inputs of :func:`stream_batches`; of :class:`basis.data.Data` those of the training images."""
    given = data.train if isinstance(data, Data) else data
    return (x for x, _ in stream_batches(given, model, "calibration", bare=True))


def described(value: Any) -> str:
    """What kind of value this is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {few(map(described, value)) or 'nothing'}"
    return f"a {type(value).__name__}"


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Any:
    """The outputs for one batch, or a ``ValueError`` that says what the model cannot run on."""
    try:
        return model(x.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the model cannot run on inputs of shape {tuple(x.shape)}, {x.dtype}: {error}") from error


def logits_of(outputs: Any) -> Tensor:
    """The outputs, where they are logits (N, classes); else a ``ValueError``."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or not outputs.is_floating_point():
        raise ValueError(f"the model returns {described(outputs)}, but it must return logits (N, classes)")
    return outputs


def with_labels(batches: list[Batch], outputs: Any) -> list[Batch]:
    """The batches with targets as cross-entropy takes them, or a ``ValueError`` that says what does not fit."""
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or not outputs.is_floating_point():
        raise ValueError(f"the model returns {described(outputs)}, but it must return logits (N, classes)")
    classes, rest, result = outputs.shape[1], tuple(outputs.shape[2:]), []
    for x, y in batches:
        probabilities = y.is_floating_point()
        if tuple(y.shape) != ((len(x), classes, *rest) if probabilities else (len(x), *rest)):
            raise ValueError(
                f"the labels are {y.dtype} of shape {tuple(y.shape)}, but to logits of shape {tuple(outputs.shape)} "
                f"belong whole numbers of shape {('N', *rest)}, or probabilities"
            )
        if not probabilities and (y.min() < 0 or y.max() >= classes):
            raise ValueError(
                f"the labels run from {y.min()} to {y.max()}, but {classes} logits take 0 to {classes - 1}"
            )
        result.append((x, y.float() if probabilities else y.long()))
    return result


def balanced(inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same inputs; a last batch that is smaller than that before it shares both evenly."""
    last: list[Tensor] = []
    for x in inputs:
        if len(last) == 2:
            yield last.pop(0)
        last.append(x)
    if len(last) == 2 and len(last[1]) < len(last[0]) and last[0].shape[1:] == last[1].shape[1:]:
        last = list(torch.cat(last).tensor_split(2))
    yield from last
