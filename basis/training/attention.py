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

from basis.batches import described
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
        ValueError: for a network without these stages, and a teacher that training would change.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, weight: float, autocast: Autocast = nullcontext
    ) -> None:
        stages: Any = getattr(student, "stages", ())
        if not stages:
            raise ValueError(f"{type(student).__name__} names no stages to compare")
        for who, network in (("model", student), ("teacher", teacher)):
            missing = set(stages) - {name for name, _ in network.named_modules()}
            if missing:
                raise ValueError(f"the {who} has no module {', '.join(sorted(missing))} to compare")
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("the teacher shares parameters with the model, so training would change it; give a copy")
        self.student, self.teacher, self.taps, self.weight = student, teacher, tuple(stages), weight
        self._autocast = autocast

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the student for x, (N, C, H, W), and the weighted term, a scalar."""
        with torch.no_grad(), evaluating(self.teacher):
            _, theirs = self._watched(self.teacher, x)
        logits, ours = self._watched(self.student, x)
        differences = [(ours[tap] - theirs[tap]).square().mean() for tap in self.taps]
        return logits, self.weight * torch.stack(differences).sum()

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` for a stage that is not called once on images x, or whose maps differ in size."""
        with torch.no_grad(), evaluating(self.student), evaluating(self.teacher):
            ours, theirs = (self._watched(network, x)[1] for network in (self.student, self.teacher))
        for tap in self.taps:
            if ours[tap].shape != theirs[tap].shape:
                pixels = f"{ours[tap].shape[1]} pixels in the model and {theirs[tap].shape[1]} in the teacher"
                raise ValueError(f"the attention maps of {tap!r} have {pixels}, but must have equally many")

    def _watched(self, network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``network`` gives, and the attention map of each stage."""
        found: dict[str, Tensor] = {}

        def keep(tap: str, module: nn.Module, args: tuple, output: Any) -> None:
            if tap in found or not isinstance(output, Tensor) or output.dim() != 4:
                raise ValueError(f"{tap!r} gives {described(output)}, but must give (N, C, H, W), and once")
            found[tap] = attention_map(output)

        with hooked(network, {tap: partial(keep, tap) for tap in self.taps}), self._autocast():
            output = network(x)
        if missing := set(self.taps) - set(found):
            raise ValueError(f"{', '.join(missing)} must be called once, but is never")
        return output, found
