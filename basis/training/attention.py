"""Attention transfer: a network learns where the activations of a teacher are large.

Zagoruyko and Komodakis (ICLR 2017, arXiv 1612.03928), as Gray, Crowley and Storkey 2019 (arXiv 1906.00859) train
structured networks: to the loss is added a weight times the sum over some modules, the taps, of the mean squared
difference of the two networks' attention maps.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.batches import described
from basis.layers.batchnorm import accumulated
from basis.modules import evaluating


def attention_map(features: Tensor) -> Tensor:
    """The mean over channels of squared features (N, C, H, W), of unit norm for each image: (N, H W), at least fp32."""
    return F.normalize(features.to(accumulated(features.dtype)).square().mean(1).flatten(1))


class Attention:
    """Runs a network beside its teacher, in evaluation mode and without gradients, and compares attention maps.

    Args:
        student, teacher: networks from the same images, without common parameters.
        taps: names of modules that both have, each called once, with outputs of (N, C, H, W); None: the
            ``stages`` of the student, such as those of a :class:`basis.models.ResNet`.
        weight: of the sum over the taps; Gray et al.: 1000.
        autocast: makes the context of a forward pass.

    Raises:
        ValueError: for taps that one of the networks lacks, and a teacher that training would change.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, taps: Sequence[str] | None = None, *, weight: float,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:  # fmt: skip
        if taps is None and not hasattr(student, "stages"):
            raise ValueError(f"{type(student).__name__} has no stages to compare; name modules by taps=[...]")
        taps = (taps,) if isinstance(taps, str) else tuple(student.stages if taps is None else taps)  # type: ignore[arg-type]
        if not taps:
            raise ValueError("taps is empty, but attention transfer needs at least one")
        for who, network in (("model", student), ("teacher", teacher)):
            modules = [name for name, _ in network.named_modules(remove_duplicate=False)][1:]
            for tap in taps:
                if tap not in modules:
                    near = ", ".join(map(repr, difflib.get_close_matches(tap, modules, n=3) or modules[:3]))
                    raise ValueError(f"the {who} has no module {tap!r} to compare, but {near or 'none'}")
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("the teacher shares parameters with the model, so training would change it; give a copy")
        self.student, self.teacher, self.taps, self.weight = student, teacher, taps, weight
        self._autocast = autocast

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the student for x, (N, C, H, W), and the weighted term, a scalar."""
        theirs = self._of_teacher(x)
        logits, ours = self._watched(self.student, x)
        differences = [(ours[tap] - theirs[tap]).square().mean() for tap in self.taps]
        return logits, self.weight * torch.stack(differences).sum()

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` for a tap that is not called once on images x, or whose maps differ in size."""
        with torch.no_grad(), evaluating(self.student):
            _, ours = self._watched(self.student, x)
        theirs = self._of_teacher(x)
        for tap in self.taps:
            if ours[tap].shape != theirs[tap].shape:
                sizes = f"{ours[tap].shape[1]} pixels in the model and {theirs[tap].shape[1]} in the teacher"
                raise ValueError(f"the attention maps of {tap!r} have {sizes}, but must have equally many")

    def _of_teacher(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), evaluating(self.teacher):
            return self._watched(self.teacher, x)[1]

    def _watched(self, network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``network`` gives, and the attention map of each tap."""
        found: list[tuple[str, Tensor]] = []

        def keep(tap: str, module: nn.Module, args: tuple, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise ValueError(f"the output of {tap!r} is {described(output)}, but must be images (N, C, H, W)")
            found.append((tap, attention_map(output)))

        handles = [network.get_submodule(tap).register_forward_hook(partial(keep, tap)) for tap in self.taps]
        try:
            with self._autocast():
                output = network(x)
        finally:
            for handle in handles:
                handle.remove()
        calls = Counter(tap for tap, _ in found)
        for tap in self.taps:
            if calls[tap] != 1:
                who = "teacher" if network is self.teacher else "model"
                raise ValueError(f"the {who} calls {tap!r} {calls[tap]} times, but a tap must be called once")
        return output, dict(found)
