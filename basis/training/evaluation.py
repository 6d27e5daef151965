"""How good a model is on a user's own batches, with intervals."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from basis.batches import described, length_of, outputs_of, stream_batches, with_labels
from basis.data import Images
from basis.modules import evaluating
from basis.saving import Saved
from basis.statistics import Estimate, proportion_estimate

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Evaluation(Saved, Mapping[str, float]):
    """What :func:`basis.evaluate` finds on batches. As a mapping it holds ``loss``, ``accuracy`` and ``top5``.

    Attributes:
        loss: mean cross-entropy in nats.
        accuracy: the share of samples that are classified rightly, with Wilson's 95 % interval over samples.
        top5: the share whose label is among the five largest logits; None for five classes or fewer.
        n, classes: the number of samples and of classes.
        seconds: wall-clock time.
    """

    kind: ClassVar[str] = "evaluation"
    parts: ClassVar[Mapping[str, type]] = {"accuracy": Estimate, "top5": Estimate}

    loss: float
    accuracy: Estimate
    top5: Estimate | None
    n: int
    classes: int
    seconds: float

    def _numbers(self) -> dict[str, float]:
        top5 = {} if self.top5 is None else {"top5": self.top5.value}
        return {"loss": self.loss, "accuracy": self.accuracy.value, **top5}

    def __getitem__(self, key: str) -> float:
        return self._numbers()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers())

    def __len__(self) -> int:
        return len(self._numbers())

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5.text(scale=100)} %"
        accuracy = f"accuracy {self.accuracy.text(scale=100)} %{top5}"
        return (
            f"{accuracy} ({self.accuracy.support}), loss {self.loss:.4g}; {self.classes} classes, {self.seconds:.1f} s"
        )


def logits_of(outputs: Any) -> Tensor:
    """The outputs, where they are logits (N, classes); else a ``ValueError``."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or not outputs.is_floating_point():
        raise ValueError(f"the model returns {described(outputs)}, but it must return logits (N, classes)")
    return outputs


@torch.no_grad()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Any] | Images,
    *,
    autocast: AbstractContextManager,
    progress: bool | str = False,
) -> Evaluation:
    """See :func:`basis.evaluate`."""
    began, n, classes = time.perf_counter(), 0, 0
    loss = right = among = torch.zeros((), dtype=torch.float64)
    bar = tqdm(
        stream_batches(batches, model, "data"),
        total=None if isinstance(batches, Images) else length_of(batches),
        disable=not progress,
        desc=progress if isinstance(progress, str) else "evaluate",
        dynamic_ncols=True,
    )
    with evaluating(model), bar:
        for x, y in bar:
            with autocast:
                logits = logits_of(outputs_of(model, x)).float()
            [(_, labels)] = with_labels([(x, y)], logits)
            n, classes = n + len(x), logits.shape[1]
            loss = loss + F.cross_entropy(logits, labels, reduction="sum").double().cpu()
            hard = labels if labels.dim() == 1 else labels.argmax(1)
            ranked = logits.topk(min(TOP, classes)).indices == hard[:, None]
            right, among = right + ranked[:, 0].sum().cpu(), among + ranked.any(1).sum().cpu()
    top5 = proportion_estimate(among.item(), n) if classes > TOP else None
    return Evaluation(
        loss=loss.item() / n,
        accuracy=proportion_estimate(right.item(), n),
        top5=top5,
        n=n,
        classes=classes,
        seconds=time.perf_counter() - began,
    )
