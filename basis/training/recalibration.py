"""Repair without training: statistics of batch normalisation, measured anew."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from basis.batches import Batches, calibration_inputs, outputs_of
from basis.modules import evaluating, tracking_norms, training_norms
from basis.saving import Saved, columns
from basis.text import few, shown_name


@dataclass(frozen=True, kw_only=True)
class NormShift:
    """How far the statistics of the batch normalisation ``name`` moved.

    Attributes:
        mean: root mean square over channels of the change of the mean, in units of the old deviation.
        deviation: geometric mean over channels of the new deviation / the old one.
    """

    name: str
    channels: int
    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Recalibration(Saved):
    """What :func:`recalibrate` did.

    Attributes:
        norms: the batch normalisations that were measured anew, in the order of the model.
        skipped: names of the others -> why.
        batches, images, seconds: how much went through the model; wall-clock time.
    """

    kind: ClassVar[str] = "recalibration"
    parts: ClassVar[Mapping[str, type]] = {"norms": NormShift}

    norms: tuple[NormShift, ...]
    skipped: Mapping[str, str]
    batches: int
    images: int
    seconds: float

    def __str__(self) -> str:
        rows = [("batch normalisation", "channels", "mean moved by (old deviations)", "deviation times")]
        rows += [(shown_name(n.name), str(n.channels), f"{n.mean:.3g}", f"{n.deviation:.3g}") for n in self.norms]
        head = f"statistics of {len(self.norms)} batch normalisations from {self.images:,} images, {self.seconds:.1f} s"
        left = [f"left alone: {shown_name(name)} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join([head, *(columns(rows) if self.norms else ()), *left])


def recalibrate(model: nn.Module, batches: Batches, *, progress: bool | str = False) -> Recalibration:
    """Measure the running statistics of all batch normalisation of ``model`` anew, in place.

    They become the plain average over the batches, each normalised by its own statistics (EagleEye: Li et al. 2020,
    arXiv 2007.02491, section 3.2), whatever the momentum. A last batch that is smaller than the one before shares both
    evenly. All else stays as it is. A model without running statistics is left alone.

    Args:
        batches: inputs, or (inputs, targets); :class:`basis.data.Images`; or :class:`basis.data.Data`, whose training
            images are used.
        progress: whether to draw a bar, or what to write beside it.

    Raises:
        ValueError: for batches that are empty or that the model cannot run on, and statistics that are not finite;
            the old ones are put back.
    """
    began, images, count = time.perf_counter(), 0, 0
    norms = tracking_norms(model)
    names = {module: name for name, module in model.named_modules()}
    skipped = {
        name: "it has no running statistics"
        for module, name in names.items()
        if isinstance(module, _BatchNorm) and module not in norms
    }
    if not norms:
        return Recalibration(norms=(), skipped=skipped, batches=0, images=0, seconds=0.0)
    before = [{name: b.detach().clone() for name, b in norm.named_buffers()} for norm in norms]
    title, shifts = progress if isinstance(progress, str) else "recalibrate", []
    try:
        with torch.no_grad(), evaluating(model), training_norms(norms, afresh=True):
            inputs = _balanced(calibration_inputs(batches, model))
            for x in tqdm(inputs, disable=not progress, desc=title, dynamic_ncols=True):
                outputs_of(model, x)
                count, images = count + 1, images + len(x)
        for norm, old in zip(norms, before, strict=True):
            if norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 0:
                _put_back(norm, old)
                skipped[names[norm]] = "it was never called"
            else:
                shifts.append(_shift(names[norm], norm, old))
        strange = [shown_name(shift.name) for shift in shifts if not math.isfinite(shift.mean + shift.deviation)]
        if strange:
            raise ValueError(f"on these batches the statistics of {few(strange)} are not finite")
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            _put_back(norm, old)
        raise
    seconds = time.perf_counter() - began
    return Recalibration(norms=tuple(shifts), skipped=skipped, batches=count, images=images, seconds=seconds)


@torch.no_grad()
def _put_back(norm: _BatchNorm, statistics: Mapping[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers():
        buffer.copy_(statistics[name])


def _shift(name: str, norm: _BatchNorm, old: Mapping[str, Tensor]) -> NormShift:
    mean, variance = (
        torch.stack([values[key].double().cpu() for values in (old, dict(norm.named_buffers()))])
        for key in ("running_mean", "running_var")
    )
    deviation = (variance + norm.eps).sqrt()
    return NormShift(
        name=name,
        channels=mean.shape[1],
        mean=((mean[1] - mean[0]) / deviation[0]).square().mean().sqrt().item(),
        deviation=(deviation[1] / deviation[0]).log().mean().exp().item(),
    )


def _balanced(inputs: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same inputs; a last batch that is smaller than that before it shares both evenly."""
    last: list[Tensor] = []
    for x in inputs:
        if len(last) == 2:
            yield last.pop(0)
        last.append(x)
    if len(last) == 2 and len(last[1]) < len(last[0]) and last[0].shape[1:] == last[1].shape[1:]:
        last = list(torch.cat(last).tensor_split(2))
    yield from last
