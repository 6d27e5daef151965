"""Attention transfer: a network learns where the activations of a teacher are large.

Zagoruyko and Komodakis (ICLR 2017, arXiv 1612.03928), as Gray, Crowley and Storkey 2019 (arXiv 1906.00859) train
structured networks: to the loss is added a weight times the sum over the stages of the mean squared difference of the
two networks' attention maps.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.inputs import Inputs, run
from basis.layers.batchnorm import accumulated
from basis.modules import evaluating, hooked
from basis.training.stepping import Autocast


def attention_map(features: Tensor) -> Tensor:
    """The mean over channels of squared features (N, C, H, W), of unit norm for each image: (N, H W), at least fp32."""
    return F.normalize(features.to(accumulated(features.dtype)).square().mean(1).flatten(1))


class Attention:
    """Runs a network beside its teacher, in evaluation mode and without gradients, and compares attention maps.

    Args:
        student, teacher: networks from the same images. The student's ``stages`` name modules that both have, each
            called once, with outputs of (N, C, H, W), as those of a :class:`basis.models.ResNet`.
        weight: of the sum over the stages; Gray et al.: 1000.
        autocast: makes the context of a forward pass.

    Raises:
        ValueError: for a student that names no stages.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, weight: float, autocast: Autocast = nullcontext
    ) -> None:
        stages: Any = getattr(student, "stages", ())
        if not stages:
            raise ValueError(f"{type(student).__name__} names no stages to compare")
        self.student, self.teacher, self.taps, self.weight = student, teacher, tuple(stages), weight
        self._autocast = autocast

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """The logits of the student for x, as both networks take it, and the weighted term, a scalar."""
        with torch.no_grad(), evaluating(self.teacher):
            _, theirs = self._watched(self.teacher, x)
        logits, ours = self._watched(self.student, x)
        differences = [(ours[tap] - theirs[tap]).square().mean() for tap in self.taps]
        return logits, self.weight * torch.stack(differences).sum()

    def _watched(self, network: nn.Module, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``network`` gives, and the attention map of each stage."""
        found: dict[str, Tensor] = {}

        def keep(tap: str, module: nn.Module, args: tuple, output: Any) -> None:
            found[tap] = attention_map(output)

        with hooked(network, {tap: partial(keep, tap) for tap in self.taps}), self._autocast():
            output = run(network, x)
        return output, found
