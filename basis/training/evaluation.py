"""How good a model is, on images or on a user's own batches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import nn

from basis.batches import Loss, first_weight, logits_of, losses_of, outputs_of, stream_batches, targets_of
from basis.data import Data, Images
from basis.inputs import samples_in
from basis.modules import evaluating
from basis.statistics import Estimate, proportion_estimate
from basis.training.recipe import Precision, autocast_in, choose_precision

TOP = 5
BATCH = 1000  # images at a time


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What :func:`evaluate` finds on batches.

    Attributes:
        loss: mean cross-entropy in nats, or mean of a loss of one's own.
        accuracy, top5: the share of samples whose label is the largest logit, or among the five largest (None for five
            classes or fewer), with Wilson's 95 % interval; None with a loss of one's own.
        n, classes, seconds: samples, classes (None with a loss of one's own), wall-clock time.
    """

    loss: float
    accuracy: Estimate | None
    top5: Estimate | None
    n: int
    classes: int | None
    seconds: float

    def __str__(self) -> str:
        if self.accuracy is None:
            return f"loss {self.loss:.4g} (n = {self.n}), {self.seconds:.1f} s"
        top5 = "" if self.top5 is None else f", top-5 {self.top5.text(scale=100)} %"
        accuracy = f"accuracy {self.accuracy.text(scale=100)} %{top5} ({self.accuracy.support})"
        return f"{accuracy}, loss {self.loss:.4g}; {self.classes} classes, {self.seconds:.1f} s"


@overload
def evaluate(
    model: nn.Module, data: Images, *, loss: Loss | None = ..., precision: Precision = ..., flip: bool = ...
) -> dict[str, float]: ...
@overload
def evaluate(
    model: nn.Module, data: Iterable[Any], *, loss: Loss | None = ..., precision: Precision = ...
) -> Evaluation: ...
@torch.no_grad()
def evaluate(
    model: nn.Module, data: Images | Iterable[Any], *, loss: Loss | None = None, precision: Precision = "fp32",
    flip: bool = False,
) -> dict[str, float] | Evaluation:  # fmt: skip
    """Mean loss and accuracy (a fraction) of ``model`` in evaluation mode; every module's flag is put back.

    Args:
        data: :class:`basis.data.Images`, or any iterable of batches (inputs, labels), such as a ``DataLoader``; see
            :func:`basis.batches.stream_batches`.
        loss: in place of cross-entropy, from outputs and targets, whatever they are, to the loss of each sample, (N,),
            or their mean; there is no accuracy then.
        precision: of activations, see :class:`Recipe`.
        flip: for ``Images``: adds ``accuracy_flip``, the logits averaged over each image and its mirror image.

    Returns:
        A dictionary for ``Images``; an :class:`Evaluation` for batches.

    Raises:
        ValueError: for batches that are empty, that the model cannot run on, or whose labels do not fit.
    """
    if isinstance(data, Data):
        raise ValueError("data are training, validation and test images; give one of them, such as data.test")
    images = isinstance(data, Images)
    if flip and (loss is not None or not images):
        raise ValueError("flip averages logits of basis.data.Images and their mirror images, without a loss")
    began, device, n, classes = time.perf_counter(), first_weight(model).device, 0, 0
    autocast = autocast_in(device, choose_precision(device) if precision == "auto" else precision)
    total = torch.zeros((), dtype=torch.float32 if images else torch.float64)
    right = right_flip = among = 0
    with evaluating(model):
        for x, y in stream_batches(data, model, "data", batch_size=BATCH):
            n += samples_in(x)
            with autocast:
                outputs = outputs_of(model, x)
                if loss is not None:
                    mean = losses_of(loss, outputs, y, samples=samples_in(x), mean=True).mean()
                    total += mean.to(total) * samples_in(x)
                    continue
                logits = logits_of(outputs).float()
                mirrored = logits_of(outputs_of(model, x.flip(3))).float() if flip else logits
            y = targets_of(y, logits, samples=samples_in(x))
            classes = logits.shape[1]
            total += F.cross_entropy(logits, y, reduction="sum").to(total)
            hard = y if y.dim() == 1 else y.argmax(1)
            ranked = logits.topk(min(TOP, classes)).indices == hard[:, None]
            right, among = right + int(ranked[:, 0].sum()), among + int(ranked.any(1).sum())
            right_flip += int(((logits + mirrored).argmax(1) == hard).sum())
    if images:
        metrics = {"loss": total.item() / n} | ({"accuracy": right / n} if loss is None else {})
        return metrics | ({"accuracy_flip": right_flip / n} if flip else {})
    return Evaluation(
        loss=total.item() / n, accuracy=proportion_estimate(right, n) if loss is None else None, n=n,
        classes=classes or None,
        top5=proportion_estimate(among, n) if classes > TOP else None, seconds=time.perf_counter() - began,
    )  # fmt: skip
