"""Skip-training: steps that update only the basis filters B, only the coefficients A, or neither.

Alekseev et al. 2024 (arXiv 2408.06024) name "a practical skip-training scheme" without saying which, so :class:`Skip`
expresses the plausible readings. What a step does not update gets no gradient, no decay and no momentum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from basis.costs import Cost, cost
from basis.layers.conv import BasisConv2d, ExplicitMode
from basis.numbers import plain_fields


class Trained(NamedTuple):
    """Which parts of the basis convolutions a step trains."""

    basis: bool
    coefficients: bool


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Which steps update the basis filters B and the coefficients A; all other parameters are updated at every step.

    Args:
        basis_every, coefficients_every: the part is updated at the steps 0, n, 2n, ... of the training.
        basis_until, coefficients_until: the fraction of all steps after which the part is frozen.
        alternate: by epochs, B and A in turns.
        rescale: give a part that is updated at every n-th step n times the learning rate.

    Raises:
        ValueError: for a value out of range, and settings that would train nothing or have no effect.
    """

    basis_every: int = 1
    coefficients_every: int = 1
    basis_until: float = 1.0
    coefficients_until: float = 1.0
    alternate: bool = False
    rescale: bool | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        for part in ("basis", "coefficients"):
            every, until = getattr(self, f"{part}_every"), getattr(self, f"{part}_until")
            if every < 1 or not 0 <= until <= 1:
                given = f"{part}_every is {every} and {part}_until is {until}"
                raise ValueError(f"{given}, but every must be at least 1, and until lie in [0, 1]")
        if self.basis_until == self.coefficients_until == 0:
            raise ValueError("basis_until and coefficients_until are both 0, which would never train anything")
        numbers = (self.basis_every, self.coefficients_every, self.basis_until, self.coefficients_until)
        if self.alternate and numbers != (1, 1, 1, 1):
            raise ValueError("alternate trains B and A by epochs in turns; it cannot be combined with every or until")
        if self.rescale and self.basis_every == self.coefficients_every == 1:
            raise ValueError("rescale has no effect, because no part is updated at every n-th step only")

    def rate(self, part: str) -> int:
        """The factor on the learning rate of "basis" or "coefficients"; 1 for all others."""
        return getattr(self, f"{part}_every", 1) if self.rescale else 1

    def touches(self, part: str) -> bool:
        """Whether this part is not trained at every step."""
        return self.alternate or (getattr(self, f"{part}_every"), getattr(self, f"{part}_until")) != (1, 1)

    def trains(self, step: int, *, steps_per_epoch: int, total_steps: int) -> Trained:
        """Which parts the step of this number (from 0) trains."""
        if self.alternate:
            turn = step // steps_per_epoch % 2
            return Trained(basis=turn == 0, coefficients=turn == 1)
        done = step / total_steps
        return Trained(
            basis=step % self.basis_every == 0 and done < self.basis_until,
            coefficients=step % self.coefficients_every == 0 and done < self.coefficients_until,
        )

    def shares(self, *, steps_per_epoch: int, total_steps: int) -> dict[Trained, float]:
        """The fraction of steps that train each combination of parts; ``ValueError`` where one's turn never comes."""
        if self.alternate and total_steps <= steps_per_epoch:
            raise ValueError("alternate trains the coefficients in every second epoch, but there is only one epoch")
        length = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        steps = Counter(self.trains(step, **length) for step in range(total_steps))
        return {trained: count / total_steps for trained, count in steps.items()}


class Parts:
    """The parameters that require a gradient, each once: B and A of all basis convolutions, and ``others``."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, BasisConv2d)]
        basis = [layer.basis for layer in layers]
        coefficients = [p for layer in layers for p in layer.coefficients.parameters()]
        self.basis = [p for p in dict.fromkeys(basis) if p.requires_grad]
        self.coefficients = [p for p in dict.fromkeys(coefficients) if p.requires_grad]
        inside = {id(p) for p in (*self.basis, *self.coefficients)}
        self.others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]

    def train(self, trained: Trained) -> None:
        """Let B and A require a gradient where they are trained, and only there."""
        for parameters, flag in ((self.basis, trained.basis), (self.coefficients, trained.coefficients)):
            for parameter in parameters:
                parameter.requires_grad_(flag)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards B and A require a gradient again, whatever happens."""
        try:
            yield
        finally:
            self.train(Trained(basis=True, coefficients=True))


def check_skip(model: nn.Module, skip: Skip, *, steps_per_epoch: int, total_steps: int) -> None:
    """Raise ``ValueError`` where ``skip`` has no effect on ``model``, or the turn of a part never comes."""
    parts = Parts(model)
    for part, parameters in (("basis", parts.basis), ("coefficients", parts.coefficients)):
        if not parameters and skip.touches(part):
            raise ValueError(f"skip says when to train the {part}, but the model has no {part} that are trained at all")
    skip.shares(steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def step_cost(
    model: nn.Module, trained: Trained, *, input_size: Sequence[int], batch_size: int = 1,
    mode: ExplicitMode | None = "factorized",
) -> Cost:  # fmt: skip
    """What one step costs that trains these parts, as :func:`basis.costs.cost` counts; input_size is (C, H, W)."""
    parts = Parts(model)
    with parts.restored():
        parts.train(trained)
        return cost(model, input_size, batch_size=batch_size, mode=mode).total


def predicted_step(
    model: nn.Module, skip: Skip, *, input_size: Sequence[int], batch_size: int, steps_per_epoch: int,
    total_steps: int,
) -> float:  # fmt: skip
    """Mean MACs (forward and backward) of a step under ``skip``, as a fraction of those of a step that trains all."""

    def macs(trained: Trained) -> int:
        total = step_cost(model, trained, input_size=input_size, batch_size=batch_size)
        return total.forward_macs + total.backward_macs

    shares = skip.shares(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    return sum(share * macs(trained) for trained, share in shares.items()) / macs(Trained(True, True))
