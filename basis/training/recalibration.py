"""Repair without training: statistics of batch normalisation, measured anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

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
        batches: inputs, or pairs (inputs, targets), see :func:`basis.batches.stream_batches`;
            :class:`basis.data.Images`; or :class:`basis.data.Data`, whose training images are used.

    Raises:
        ValueError: for batches that are empty or that the model cannot run on, and statistics that are not finite;
            the old ones are put back.
    """
    began, images, count = time.perf_counter(), 0, 0
    norms = tracking_norms(model)
    names = {module: name for name, module in model.named_modules() if hasattr(module, "running_mean")}
    skipped = {
        name: "it has no running statistics" if module.running_mean is None else "its statistics stay as they are"
        for module, name in names.items()
        if module not in norms
    }
    if not norms:
        return Recalibration(norms=(), skipped=skipped, batches=0, images=0, seconds=0.0)
    with evaluating(model), training_norms(norms) as measured:
        trained = list(measured)
        for x in balanced(calibration_inputs(batches, model)):
            outputs_of(model, x)
            count, images = count + 1, images + samples_in(x)
        strange = [shown_name(names[norm]) for norm in measured if not all(b.isfinite().all() for b in norm.buffers())]
        if strange:
            raise ValueError(f"on these batches the statistics of {few(strange)} are not finite")
    for norm in norms:
        if norm not in measured:
            skipped[names[norm]] = "it was never called" if norm in trained else "it stays in evaluation mode"
    seconds = time.perf_counter() - began
    found = tuple(names[norm] for norm in measured)
    return Recalibration(norms=found, skipped=skipped, batches=count, images=images, seconds=seconds)
