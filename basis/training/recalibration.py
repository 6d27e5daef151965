"""Repair without training: statistics of batch normalisation, measured anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from basis.batches import Batches, balanced, calibration_inputs, outputs_of
from basis.inputs import samples_in
from basis.modules import evaluating, tracking_norms, training_norms
from basis.text import few, shown_name


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What :func:`recalibrate` did: the names of the norms measured anew, and of the others (``skipped``) why not."""

    norms: tuple[str, ...]
    skipped: Mapping[str, str]
    batches: int
    images: int
    seconds: float

    def __str__(self) -> str:
        head = f"statistics of {len(self.norms)} batch normalisations from {self.images:,} images, {self.seconds:.1f} s"
        left = [f"left alone: {shown_name(name)} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join([head, *left])


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Batches) -> Recalibration:
    """Measure the running statistics of all batch normalisation of ``model`` anew, in place.

    They become the plain average over the batches, each normalised by its own statistics (EagleEye: Li et al. 2020,
    arXiv 2007.02491, section 3.2), whatever the momentum. A last batch that is smaller than the one before shares both
    evenly. What has no running statistics, or is in evaluation mode even after ``train()``, is left alone.

    Args:
        batches: as ``calibration`` of :func:`basis.substitute`; or batches of any inputs that the model takes.

    Raises:
        ValueError: for batches that are empty or that the model cannot run on, and statistics that are not finite;
            the old ones are put back.
    """
    began, images, count = time.perf_counter(), 0, 0
    norms = tracking_norms(model)
    names: dict[Any, str] = {m: name for name, m in model.named_modules() if hasattr(m, "running_mean")}
    with evaluating(model), training_norms(norms) as measured:
        trained = list(measured)
        for x in balanced(calibration_inputs(batches, model)) if norms else ():
            outputs_of(model, x)
            count, images = count + 1, images + samples_in(x)
        strange = [shown_name(names[norm]) for norm in measured if not all(b.isfinite().all() for b in norm.buffers())]
        if strange:
            raise ValueError(f"on these batches the statistics of {few(strange)} are not finite")
    skipped = dict.fromkeys(
        (name for m, name in names.items() if m not in measured), "its statistics stay as they are after train()"
    )
    skipped |= {names[norm]: "it was never called" for norm in trained if norm not in measured}
    skipped |= {name: "it has no running statistics" for m, name in names.items() if m.running_mean is None}
    return Recalibration(
        norms=tuple(names[norm] for norm in measured), skipped=skipped, batches=count, images=images,
        seconds=time.perf_counter() - began,
    )  # fmt: skip
