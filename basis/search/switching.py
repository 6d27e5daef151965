"""The sensitivity search as a part of one training: when to switch to basis convolutions, and which layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import mean
from typing import Any, Literal, get_args

import torch
from torch import nn

from basis.data import Data, Images
from basis.decompositions import pair_of
from basis.modules import recalibrates
from basis.numbers import one_of, plain_fields, plain_number
from basis.search.measures import singular_energies
from basis.search.selection import predicted, select
from basis.search.sensitivity import FITTING, Fit, sensitivity
from basis.search.table import SEARCHES, SensitivityTable
from basis.substitution import Plan, left_out, replace_modules, substitute_in_place
from basis.training.switching import Momentum

STILL = 0.05  # the change per epoch below which stable ranks count as settled
STEPS = 40  # of bisection


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Train dense first, then search, replace layers by basis convolutions on the spot, and go on (``Recipe.switch``).

    The search measures on the validation images where there are some, else on training images, and layers are fitted
    to training images, none of them augmented; it is a part of the training's time.

    Args:
        after: the fraction of the epochs before the switch, in [0, 1), rounded to whole epochs.
        until: "ranks": switch earlier, once for ``patience`` epochs in a row the stable ranks ||W||_F^2 / ||W||_2^2 of
            the layers, as in Cuttlefish, change by at most 5 % in the mean. None: at ``after``.
        budget, rule, ratio, exclude: as of :func:`basis.select`, but without milliseconds. The rule "stable_rank" gives
            each layer a ratio in proportion to its stable rank, relative to that at the start (Cuttlefish), as large as
            the budget allows.
        measure, ratios, multiple, fit: as of :func:`basis.sensitivity`; "uniform" and "stable_rank" need no measure.
        images: how many the search measures on, and how many layers and normalisations are fitted to.
        momentum: "projected" onto the new factors (:func:`basis.training.switching.carry_momentum`), or "restarted".
        pairs: each layer becomes two convolutions by SVD of as many parameters, instead of a basis convolution.
        teach: the share of the loss that comes from the dense network at the switch, by distillation; None: none.

    Raises ``ValueError`` for a value out of range.
    """

    after: float = 0.3
    until: Literal["ranks"] | None = None
    patience: int = 2
    budget: Mapping[str, float] = field(default_factory=lambda: {"params": 0.5})
    rule: str = "optimal"
    ratio: float | None = None
    exclude: tuple[str, ...] = ()
    measure: str = "oneshot_bn"
    ratios: tuple[float, ...] = (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
    multiple: int = 1
    fit: Fit = "activation"
    images: int = 1000
    momentum: Momentum = "restarted"
    pairs: bool = False
    teach: float | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        object.__setattr__(self, "ratios", tuple(plain_number("each of ratios", ratio) for ratio in self.ratios))
        budget = {unit: plain_number(f"budget {unit}", share) for unit, share in self.budget.items()}
        object.__setattr__(self, "budget", budget)
        one_of("until", self.until, (None, "ranks"))
        one_of("momentum", self.momentum, get_args(Momentum))
        one_of("fit", self.fit, get_args(Fit))
        if not 0 <= self.after < 1 or (self.teach is not None and not 0 < self.teach < 1):
            raise ValueError(f"after is {self.after} and teach is {self.teach}, but they must lie in [0, 1) and (0, 1)")
        if min(self.patience, self.images) < 1:
            raise ValueError(f"patience is {self.patience} and images is {self.images}, but both must be at least 1")

    def check(self, model: nn.Module, data: Data) -> None:
        """Raise ``ValueError`` before any training where the switch could not be carried out."""
        if self.measure not in SEARCHES or (self.measure == "oneshot_bn" and not recalibrates(model)):
            known = f"{', '.join(SEARCHES)}; oneshot_bn for networks with batch normalisation"
            raise ValueError(f"measure is {self.measure!r}, but it must be one of {known}")
        replace(self, measure="spectrum")._plan(model, data, [self.observe(model, data)])

    def observe(self, model: nn.Module, data: Data) -> dict[str, float]:
        """The stable rank of each layer's weight, where it is asked for."""
        if self.until == "ranks" or self.rule == "stable_rank":
            return {name: stable_rank(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return {}

    def due(self, epoch: int, epochs: int, seen: Sequence[Mapping[str, float]]) -> bool:
        """Whether the network is switched after ``epoch`` of ``epochs``, by what was seen before each."""
        if epoch >= min(round(self.after * epochs), epochs - 1):
            return True
        last = list(pairwise(seen))[-self.patience :]
        changes = (mean(abs(now[name] - before[name]) / before[name] for name in now) for before, now in last)
        return bool(self.until) and len(last) == self.patience and all(change <= STILL for change in changes)

    def replace(self, model: nn.Module, data: Data, seen: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Search, choose and replace in place; ``layers`` (name -> k, or rank of a pair) and what was ``predicted``."""
        table, plan = self._plan(model, data, seen)
        layers = {name: int(k) for name, k in plan.layers.items()}
        if self.pairs:
            layers = {name: pair_rank(model.get_submodule(name), k) for name, k in layers.items()}
        self.rebuild(model, layers, data.train.first(self.images) if self.fit == "activation" else None)
        kept = {key: value for key, value in predicted(table, plan).items() if math.isfinite(value)}
        return {"layers": layers, "predicted": kept}

    def rebuild(self, model: nn.Module, layers: Mapping[str, int], calibration: Images | None = None) -> None:
        """Replace these layers in place, fitted to their weights, or to the outputs on ``calibration``."""
        if self.pairs:
            convs: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
            replace_modules(model, {conv: pair_of(conv, layers[name]) for name, conv in convs.items()})
        else:
            substitute_in_place(model, layers, calibration=calibration)

    def _plan(self, model: nn.Module, data: Data, seen: Sequence[Mapping[str, float]]) -> tuple[SensitivityTable, Plan]:
        """What was measured, and the plan."""
        grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        exclude = (*self.exclude, *grouped) if self.pairs else self.exclude
        if self.rule in ("uniform", "stable_rank") or self.measure == "spectrum":
            table = self._spectrum(model, data)
        else:
            fitted: Any = {"fit": self.fit} if self.measure in FITTING else {}
            table = sensitivity(
                model, (data.validation or data.train).first(self.images), measure=self.measure, ratios=self.ratios,
                multiple=self.multiple, calibration=data.train.first(self.images), **fitted,
            )  # fmt: skip
        if self.rule == "stable_rank":
            return table, self._by_stable_rank(table, seen, exclude)
        rule: Any = self.rule
        return table, select(table, budget=self.budget, rule=rule, ratio=self.ratio, exclude=exclude)

    def _spectrum(self, model: nn.Module, data: Data) -> SensitivityTable:
        shape = data.train.first(1)  # whose size tells the multiply-accumulates
        return sensitivity(model, shape, measure="spectrum", ratios=self.ratios, multiple=self.multiple)

    def _by_stable_rank(
        self, table: SensitivityTable, seen: Sequence[Mapping[str, float]], exclude: tuple[str, ...]
    ) -> Plan:
        """k / C_out = s x (stable rank now / at the start), at most 1, with the largest s within the budget."""
        open_layers = [at for at in table.layers if not left_out([at.name], (), exclude)]

        def plan(scale: float) -> Plan:
            layers = {}
            for at in open_layers:
                share = scale * seen[-1][at.name] / seen[0][at.name]
                step = math.lcm(at.groups, self.multiple)
                k = step * max(1, round(share * at.out_channels / step))
                if k < at.out_channels:
                    layers[at.name] = k
            return Plan(layers, {}, {at.name: at.out_channels for at in table.layers})

        def fits(scale: float) -> bool:
            left = predicted(table, plan(scale))
            return all(left[unit] <= share for unit, share in self.budget.items())

        low, high = 0.0, max(seen[0][name] / seen[-1][name] for name in seen[-1])
        if not fits(low):
            raise ValueError(f"no plan of the rule 'stable_rank' meets a budget of {dict(self.budget)}")
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return plan(low)


def stable_rank(weight: torch.Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 of a weight as a matrix of C_out rows; at most its rank."""
    energies = singular_energies(weight)
    return float(energies.sum() / energies[0]) if energies[0] > 0 else 1.0


def pair_rank(conv: Any, k: int) -> int:
    """The largest rank q of two convolutions C_in -> q -> C_out with at most the parameters of k basis channels."""
    rows, columns = conv.weight.flatten(1).shape
    return max(1, (k * columns + (rows - k) * k) // (rows + columns))
