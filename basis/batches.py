"""A user's data: batches brought to the model's device and checked, outputs and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from basis.data import Data, Images, normalise
from basis.inputs import Inputs, mapped, picked, run, samples_in, shapes_of, tensors_in
from basis.modules import is_channels_last
from basis.text import few, first_line

Batch = tuple[Any, Any]  # inputs as a network takes them (basis.inputs), and targets
Batches = Iterable[Any] | Images | Data
Loss = Callable[[Any, Any], Tensor]  # of outputs and targets
BATCH = 250  # images in a batch, where the data come as one piece
ROUNDING = 1e-3  # by which the sum of probabilities may differ from 1


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, (N,): logits (N, classes, ...) and labels, or class probabilities."""
    losses = F.cross_entropy(outputs.float(), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def losses_of(loss: Loss | None, outputs: Any, targets: Any, *, samples: int, mean: bool = False) -> Tensor:
    """What a loss gives for ``outputs`` and a copy of ``targets``: (N,) or, where allowed, their ``mean``.

    None is :func:`cross_entropy`. Raises ``ValueError`` for a loss that cannot be computed, or gives anything else.
    """
    if loss is None:
        return cross_entropy(outputs, targets)
    try:
        found = loss(outputs, mapped(Tensor.clone, targets))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        given = f"outputs, {described(outputs)}, and targets, {described(targets)}"
        raise ValueError(f"the loss cannot be computed from {given}: {first_line(error)}") from error
    if not isinstance(found, Tensor) or tuple(found.shape) not in ((samples,), () if mean else (samples,)):
        right = f"a tensor ({samples},), the loss of each sample{', or their mean' if mean else ''}"
        raise ValueError(f"the loss gives {described(found)}, but it must give {right}")
    return found if found.dtype == torch.float64 else found.float()


def held_out(data: Data) -> Images:
    """The validation images; ``ValueError`` where there are none."""
    if data.validation is None:
        raise ValueError("the data have no validation images to measure on; basis.data.hold_out splits them off")
    return data.validation


def stream_batches(
    data: Iterable[Any] | Images, model: nn.Module, what: str, *, bare: bool = False, batch_size: int = BATCH
) -> Iterator[Batch]:
    """The batches (inputs, targets) that are not empty, one by one on the model's device.

    Inputs are a tensor, a tuple or list of positional arguments, or a dictionary of keyword arguments. With ``bare`` a
    tuple or list is a batch whose first entry are the inputs, so that ((a, b),) holds two positional arguments, and
    anything else is inputs alone. Images come normalised, in the model's dtype and memory format. Raises ``ValueError``
    for a batch of another kind, and at the end where there was no sample.
    """
    if not isinstance(data, (Iterable, Images)) or isinstance(data, (Tensor, str, Mapping)):
        raise ValueError(f"{what} is {described(data)}, but it must be an iterable of batches, or basis.data.Images")
    weight, found = first_weight(model), False
    for x, y in _images(data, weight, batch_size) if isinstance(data, Images) else _pairs(data, what, bare):
        if samples_in(x):
            found = True
            yield mapped(lambda tensor: tensor.to(weight.device), (x, y))
    if not found:
        raise ValueError(f"{what} holds no samples, so there is nothing to measure on")


def first_weight(model: nn.Module) -> Tensor:
    """The first filters of the model, whose device, dtype and memory format inputs are brought to."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if not parameters:
        raise ValueError("the model has no parameters of real numbers, so there is nothing to work on")
    return next((p for p in parameters if p.dim() == 4), parameters[0])


def _images(images: Images, weight: Tensor, size: int) -> Iterator[Batch]:
    last, images = is_channels_last(weight), images.to(weight.device)
    for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
        image = normalise(x).to(weight.dtype) if len(x) else x
        yield image if last else image.contiguous(), y


def _pairs(data: Iterable[Any], what: str, bare: bool) -> Iterator[Batch]:
    for i, batch in enumerate(data):
        several = isinstance(batch, (tuple, list)) and len(batch) > 0
        pair = (batch[0] if several else batch, None) if bare else batch
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not any(t.dim() for t in tensors_in(pair[0])):
            right = "inputs, or a pair (inputs, targets)" if bare else "a pair (inputs, targets)"
            raise ValueError(f"batch {i} of {what} is {described(batch)}, but it must be {right}")
        yield pair[0], pair[1]


def calibration_inputs(data: Batches, model: nn.Module) -> Iterator[Inputs]:
    """The inputs of :func:`stream_batches`, ``bare``, or of one tensor (N, ...); of ``Data`` the training images."""
    given: Any = data.train if isinstance(data, Data) else data
    given = given.split(BATCH) if isinstance(given, Tensor) and given.dim() > 1 else given
    return (x for x, _ in stream_batches(given, model, "calibration", bare=True))


def described(value: Any) -> str:
    """What kind of value this is, in words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {few(map(described, value)) or 'nothing'}"
    return f"a {type(value).__name__}" + (f" with {few(map(str, value))}" if isinstance(value, Mapping) else "")


@torch.no_grad()
def outputs_of(model: nn.Module, x: Inputs) -> Any:
    """The outputs for a copy of one batch, or a ``ValueError`` that says what the model cannot run on."""
    try:
        return run(model, x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the model cannot run on inputs of shape {shapes_of(x)}: {first_line(error)}") from error


def logits_of(outputs: Any, *, dense: bool = False) -> Tensor:
    """The outputs, where they are logits (N, classes), or ``dense`` (N, classes, ...); else a ``ValueError``."""
    good = isinstance(outputs, Tensor) and (outputs.dim() == 2 or (dense and outputs.dim() > 2))
    if not good or not outputs.is_floating_point():
        right = "but it must return logits (N, classes): wrap it so that it does, or give loss="
        raise ValueError(f"the model returns {described(outputs)}, {right}")
    return outputs


def targets_of(y: Any, outputs: Any, *, samples: int) -> Tensor:
    """The targets as cross-entropy takes them to these logits, or a ``ValueError`` that says what does not fit."""
    _, classes, *rest = logits_of(outputs, dense=True).shape
    soft = isinstance(y, Tensor) and y.is_floating_point()
    if classes < 2:
        wrong = f"the model returns {described(outputs)}, whose cross-entropy is always 0"
    elif not isinstance(y, Tensor) or y.is_complex() or list(y.shape) != [samples, *[classes][:soft], *rest]:
        right = f"whole numbers of shape {(samples, *rest)}, or probabilities of shape {(samples, classes, *rest)}"
        wrong = f"the labels are {described(y)}, but they must be {right}"
    elif soft and not (y.min() >= 0 and (y.double().sum(1) - 1).abs().max() <= max(ROUNDING, torch.finfo(y.dtype).eps)):
        wrong = "the targets are no probabilities: some are negative, or their sum over the classes is not 1"
    elif not soft and (y.min() < 0 or y.max() >= classes):
        wrong = f"the labels run from {y.min()} to {y.max()}, but {classes} logits take 0 to {classes - 1}"
    else:
        return y.float() if soft else y.long()
    raise ValueError(f"{wrong}; for other targets give loss=")


def balanced(inputs: Iterable[Inputs]) -> Iterator[Inputs]:
    """The same inputs; a last batch that is smaller than that before it shares both evenly."""
    last: list[Inputs] = []
    for x in inputs:
        if len(last) == 2:
            yield last.pop(0)
        last.append(x)
    if len(last) == 2 and samples_in(last[1]) < samples_in(last[0]) and "" != _form(last[0]) == _form(last[1]):
        others = iter(tensors_in(last[1]))
        both = mapped(lambda tensor: torch.cat([tensor, next(others)]), last[0])
        middle = (samples_in(both) + 1) // 2
        last = [picked(both, slice(middle)), picked(both, slice(middle, None))]
    yield from last


def _form(inputs: Inputs) -> str:
    """What batches that can be joined have in common; nothing where a tensor has not one entry for each sample."""
    whole = all(t.dim() and len(t) == samples_in(inputs) for t in tensors_in(inputs))
    return repr(mapped(lambda tensor: tensor[:0], inputs)) if whole else ""
