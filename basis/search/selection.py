"""Choose layers under a budget: from sensitivities to a plan.

The exact optimiser is the rule "optimal"; the others are the paper's own rule and the baselines that a
selection has to beat. Each adds up what single layers lose: whether the sum holds for the layers together
is to be measured, and :func:`predicted` gives the number to hold against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy.optimize import LinearConstraint, milp

from basis.layers.conv import basis_channels_for, check_basis_channels
from basis.search.table import Layer, SensitivityTable
from basis.substitution import Plan, Size, as_patterns, left_out, size_text
from basis.text import few

if TYPE_CHECKING:
    from basis.bench.report import BenchReport

Rule = Literal[
    "optimal", "threshold", "uniform", "random", "largest_first", "ranking", "reverse", "first", "last"
]  # fmt: skip
RULES: tuple[str, ...] = get_args(Rule)
UNITS = ("params", "macs", "backward_macs", "milliseconds")
DENSE = "kept dense by the selection"
ROUNDING = 1 + 1e-12  # a budget is met up to the rounding of floating-point numbers

Choice = dict[str, Size]  # layer -> k, or the text of a structured layer
Scores = Mapping[str, Mapping[Size, float]]  # layer -> k or text -> sensitivity
Times = Mapping[str, Mapping[int, float]]  # layer -> k -> milliseconds; its largest k is the dense layer


class InfeasibleBudget(ValueError):
    """No plan of the rule meets the budget.

    Attributes:
        fractions: unit -> the smallest budget that can be met, as a fraction of the dense network's. With
            several units: budgets that can be met together, of which none is smaller than the one asked for.
        numbers: the same as absolute numbers.
    """

    def __init__(self, message: str, fractions: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        super().__init__(message, fractions, numbers)
        self.fractions, self.numbers = fractions, numbers

    def __str__(self) -> str:
        return str(self.args[0])


def select(
    table: SensitivityTable,
    *,
    budget: Mapping[str, float],
    rule: Rule = "optimal",
    ratio: float | None = None,
    latency: BenchReport | None = None,
    step: str = "forward+backward",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    absolute: bool = False,
    multiple: int | None = None,
    seed: int = 0,
) -> Plan:
    """Choose which layers are substituted, with how many basis channels k or as which structured layer, on a budget.

    The rules, of which all but "uniform" choose among the candidates in the table that have a finite
    sensitivity, and the dense layer:

    - "optimal": the smallest sum of sensitivities, by mixed-integer optimisation (HiGHS), exactly. What saves nothing
      in any unit of the budget is not chosen, however good it looks: that would be chance;
    - "threshold": :func:`threshold` at the smallest epsilon that meets the budget;
    - "uniform": all layers at the largest common ratio that meets it, whatever their sensitivity; in a table of
      structured layers alone, all by the one text that keeps most of the network and meets it;
    - "random", "largest_first" (most of the budget's unit first), "ranking" (least sensitive first),
      "reverse" (most sensitive first), "first" and "last" (from the front or the back of the network): one
      layer after another gets its smallest candidate (the one nearest to ``ratio``, if that is given) until
      the budget is met. The last of them gets the largest k that still meets it, so that rules are compared
      at nearly equal size. Layers whose candidate saves nothing are passed over.

    Where a layer has structured layers among its candidates, the smallest one is that of the least cost in the
    units of the budget, and larger ones are its other candidates.

    Args:
        table: of :func:`basis.sensitivity`.
        budget: unit -> what the network may still have, as a fraction in (0, 1] of the dense network's.
            Units are "params", "macs" and "backward_macs" (factorized mode, as :func:`basis.cost` counts
            them) and "milliseconds" (of all convolutions in ``latency``). Several are all met.
        rule: one of those above.
        ratio: r in (0, 1]; only the candidate nearest to r C_out is used of each layer. Not with structured layers.
        latency: a report of :func:`basis.bench.cases.bench_latency`, for a budget in milliseconds. Only
            what it has measured is chosen then. Not with structured layers.
        step: the pass in ``latency`` that counts, "forward" or "forward+backward".
        include: shell patterns (``fnmatch``) of layer names; none means all layers.
        exclude: patterns of layers that stay dense.
        absolute: the budget is in parameters, MACs per image and milliseconds instead of fractions.
        multiple: what every k that is not a candidate is a multiple of; unless given, the greatest common
            divisor of all candidates.
        seed: of the order of "random".

    Returns:
        The plan; ``skipped`` says of each other layer why it stays dense.

    Raises:
        InfeasibleBudget: when the rule has no plan that meets the budget; it gives the smallest that one does.
        ValueError: for arguments that make no sense, an incomplete table, or a latency report that does
            not fit the table.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, but it must be one of {', '.join(RULES)}")
    if rule == "uniform" and ratio is not None:
        raise ValueError("the rule 'uniform' finds the ratio itself; leave out ratio")
    if multiple is not None and (isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"multiple is {multiple!r}, but it must be a whole number of at least 1")
    _check_budget(budget, table, absolute, latency)
    dense = _dense(table, include, exclude)
    scores = _scores(table, dense, ratio)
    texts = {k: None for own in scores.values() for k in own if isinstance(k, str)}
    if texts and latency is not None:
        raise ValueError(f"latency reports know basis channels alone, but the table has {few(texts)} to choose from")
    if rule == "uniform" and texts and any(not isinstance(k, str) for own in scores.values() for k in own):
        raise ValueError(f"the rule 'uniform' takes ratios or structured layers, but the table has both ({few(texts)})")
    times = {} if latency is None else _times(latency, step, table, scores)
    totals = {**table.total, "milliseconds": sum(ms[max(ms)] for ms in times.values())}
    total = np.array([totals[unit] for unit in budget], float)
    limit = np.array(list(budget.values()), float) * (1 if absolute else total)
    common = multiple or math.gcd(*(k for _, k in table.candidates if not isinstance(k, str))) or 1
    layers = tuple(layer for layer in table.layers if layer.name in scores)
    problem = _Problem(rule, layers, scores, times, tuple(budget), total, limit, common, seed)
    return _plan(table, dense, _SOLVERS[rule](problem))


def threshold(
    table: SensitivityTable,
    *,
    epsilon: float,
    ratio: float | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> Plan:
    """The largest set of layers of which each alone loses at most ``epsilon``.

    So Alekseev et al. 2024 (arXiv 2408.06024) choose. Each such layer gets the smallest of its candidates
    that loses at most ``epsilon``, of structured layers and k the one of the fewest parameters; with ``ratio``,
    only the candidate nearest to it is considered.

    Args:
        epsilon: in the unit of the table's measure.
        ratio, include, exclude: as in :func:`select`.

    Raises:
        ValueError: for an epsilon that is no number, an incomplete table, and as :func:`select`.
    """
    if not isinstance(epsilon, (int, float)) or math.isnan(epsilon):
        raise ValueError(f"epsilon is {epsilon!r}, but it must be a number in the unit of the table's measure")
    dense = _dense(table, include, exclude)
    scores = _scores(table, dense, ratio)
    return _plan(table, dense, _under(table.layers, scores, epsilon, _fewest_parameters))


def predicted(
    table: SensitivityTable, plan: Plan, latency: BenchReport | None = None, *, step: str = "forward+backward"
) -> dict[str, float]:
    """What the single layers of ``plan`` add up to.

    Returns:
        "sensitivity", the sum over layers, and the fractions of the dense network's "params", "macs" and
        "backward_macs", and with ``latency`` "milliseconds". The sensitivity of a k between two measured
        ones is interpolated linearly in k, the dense layer counting as 0; a structured layer must be a
        candidate. NaN stands for what the table
        does not know: a k below the smallest or beside one that was not finite, MACs without images, and
        a k that was not timed.

    Raises:
        ValueError: for a plan that names a layer or a structured layer that is not in the table, or with a k
            that makes no sense.
    """
    layer_of = {layer.name: layer for layer in table.layers}
    values = _values(table)
    times = None if latency is None else _times(latency, step, table, {})
    saved = {unit: 0.0 for unit in UNITS}
    loss = 0.0
    for name, k in plan.layers.items():
        if name not in layer_of:
            raise ValueError(f"the plan names {name!r}, but the table has no such layer")
        layer = layer_of[name]
        if isinstance(k, str):
            if k not in layer.candidates:
                raise ValueError(f"the plan makes {name} {k}, which is not among its candidates in the table")
            loss += values.get((name, k), math.nan)
        else:
            check_basis_channels(k, layer.out_channels, layer.groups)
            known = {j: value for (at, j), value in values.items() if at == name and not isinstance(j, str)}
            ks, losses = zip(*sorted((known | {layer.out_channels: 0.0}).items()), strict=True)
            loss += float(np.interp(k, ks, losses, left=math.nan))
        whole, thin = layer.cost(layer.out_channels), layer.cost(k)
        for unit in UNITS[:3]:
            saved[unit] += math.nan if thin[unit] is None else whole[unit] - thin[unit]  # type: ignore[operator]
        if times is not None:
            if isinstance(k, str):
                raise ValueError(f"latency reports know basis channels alone, but the plan makes {name} {k}")
            own = times.get(name, {})
            saved["milliseconds"] += own.get(layer.out_channels, math.nan) - own.get(k, math.nan)
    totals = {unit: math.nan if value is None else value for unit, value in table.total.items()}
    if times is not None:
        totals["milliseconds"] = sum(ms[max(ms)] for ms in times.values())
    return {"sensitivity": loss} | {unit: 1 - saved[unit] / totals[unit] for unit in UNITS if unit in totals}


# -- what there is to choose from -----------------------------------------------------------------


def _check_budget(
    budget: Mapping[str, float], table: SensitivityTable, absolute: bool, latency: BenchReport | None
) -> None:
    if not isinstance(budget, Mapping) or not budget:
        raise ValueError(f"budget is {budget!r}, but it must map at least one of {', '.join(UNITS)} to a number")
    for unit, value in budget.items():
        if unit not in UNITS:
            raise ValueError(f"budget has the unit {unit!r}, but it must be one of {', '.join(UNITS)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (value > 1 and not absolute):
            right = "a number above 0" if absolute else "a fraction of the dense network's, in (0, 1]"
            raise ValueError(f"the budget of {unit} is {value!r}, but it must be {right}")
        if unit != "milliseconds" and table.total[unit] is None:
            raise ValueError(f"the table was made without images and knows no {unit}; give a budget in params")
    if ("milliseconds" in budget) != (latency is not None):
        raise ValueError("a budget in milliseconds and a latency report go together: give both or neither")


def _dense(table: SensitivityTable, include: str | Iterable[str], exclude: str | Iterable[str]) -> dict[str, str]:
    """The layers that the patterns leave out, each with the reason."""
    patterns = {"include": as_patterns(include), "exclude": as_patterns(exclude)}
    names = [layer.name for layer in table.layers]
    for what, given in patterns.items():
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in (*names, *table.skipped)):
                raise ValueError(f"{what} has {pattern!r}, but no layer of the table has such a name")
    reasons = {name: left_out([name], patterns["include"], patterns["exclude"]) for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _values(table: SensitivityTable) -> dict[tuple[str, Size], float]:
    return {(cell.layer, cell.basis_channels): cell.value for cell in table.cells}


def _scores(table: SensitivityTable, dense: Mapping[str, str], ratio: float | None) -> Scores:
    """The finite sensitivities of all layers that need not stay dense; with ``ratio`` at most one of each."""
    if ratio is not None:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense
    values = _values(table)
    layers = [layer for layer in table.layers if layer.name not in dense]
    lacking = [f"{at.name} with {size_text(k)}" for at in layers for k in at.candidates if (at.name, k) not in values]
    if lacking:
        raise ValueError(
            f"the table is not complete: it lacks {len(lacking)} of its candidates ({few(lacking)}); "
            "call sensitivity with the same resume file again, and it measures the rest"
        )
    scores = {}
    for at in layers:
        finite: Sequence[Size] = [k for k in at.candidates if math.isfinite(values[at.name, k])]
        if ratio is not None:
            ks = [k for k in finite if not isinstance(k, str)]
            if len(ks) < len(finite):
                raise ValueError(
                    f"ratio chooses among basis channels, but {at.name} has structured layers; leave out ratio"
                )
            aim = ratio * at.out_channels
            finite = sorted(ks, key=lambda k: (abs(k - aim), k))[:1]
        scores[at.name] = {k: values[at.name, k] for k in finite}
    return scores


def _times(latency: BenchReport, step: str, table: SensitivityTable, scores: Scores) -> Times:
    """The milliseconds of every layer of the report, after checking that it covers all of ``scores``."""
    times = latency.latencies(step)
    there, here = latency.config.get("macs"), table.total["macs"]
    if there and here and there != here:
        raise ValueError(
            f"the latency report is of another network or image size: {there:,} MACs per image there, {here:,} in the "
            "table; measure it with the input_size of the table's images"
        )
    known = {layer.name: layer.out_channels for layer in table.layers}
    for name, own in times.items():
        if name not in known and name not in table.skipped:
            raise ValueError(f"the latency report is of another network: the table has no layer {name}")
        if max(own) != known.get(name, max(own)):
            sizes = f"{max(own)} channels there, {known[name]} in the table"
            raise ValueError(f"the latency report is of another network: {name} has {sizes}")
    for name, ks in scores.items():
        lacking = [str(k) for k in ks if k not in times.get(name, {})]
        if lacking or name not in times:
            what = f" with k = {few(lacking)}" if name in times else ""
            raise ValueError(f"the latency report lacks {name}{what}; measure it, or exclude the layer")
    return times


def _plan(table: SensitivityTable, dense: Mapping[str, str], chosen: Mapping[str, Size]) -> Plan:
    values = _values(table)
    reasons = {}
    for at in table.layers:
        bad = [k for k in at.candidates if not math.isfinite(values.get((at.name, k), 0))]
        ks = "k = " if bad and not isinstance(bad[0], str) else ""
        note = f"; not finite at {ks}{few(map(str, bad))}" if bad else "" if at.candidates else "; it has no candidate"
        reasons[at.name] = dense.get(at.name, DENSE + note)
    layers = {at.name: chosen[at.name] for at in table.layers if at.name in chosen}
    skipped = {name: why for name, why in reasons.items() if name not in layers} | dict(table.skipped)
    return Plan(layers, skipped, {at.name: at.out_channels for at in table.layers})


# -- the rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """What a rule works on; costs are arrays with one number for each unit of the budget."""

    rule: str
    layers: tuple[Layer, ...]
    scores: Scores
    times: Times
    units: tuple[str, ...]
    total: np.ndarray
    limit: np.ndarray
    multiple: int
    seed: int

    def price(self, layer: Layer, k: Size) -> np.ndarray:
        """What the layer costs with k basis channels, or as the structured layer k."""
        times: Mapping[Any, float] = self.times.get(layer.name, {})
        cost = {**layer.cost(k), "milliseconds": times.get(k)}
        return np.array([cost[unit] for unit in self.units], float)

    def share(self, layer: Layer, k: Size) -> float:
        """The same as one number: of the dense network's cost, in all units together."""
        return float((self.price(layer, k) / self.total).sum())

    def saving(self, layer: Layer, k: Size) -> np.ndarray:
        """What k saves of the dense layer."""
        return self.price(layer, layer.out_channels) - self.price(layer, k)

    def used(self, chosen: Mapping[str, Size]) -> np.ndarray:
        """What the network costs."""
        savings = [self.saving(at, chosen[at.name]) for at in self.layers if at.name in chosen]
        return self.total - np.sum(savings, axis=0) if savings else self.total

    def grid(self, layer: Layer) -> list[int]:
        """Every k that the layer may get, from the dense one down."""
        if self.times:
            return sorted(self.times[layer.name], reverse=True)
        c, step = layer.out_channels, math.lcm(layer.groups, self.multiple)
        return [c, *range((c - 1) // step * step, 0, -step)]

    def smallest(self, layer: Layer, ks: Iterable[Size]) -> Size:
        """Of these candidates of the layer that of the least cost."""
        return _smallest(ks, lambda k: self.share(layer, k))

    def larger(self, layer: Layer, k: Size) -> list[Size]:
        """What the layer may get instead of its candidate k that costs more, the dearest first."""
        if not any(isinstance(other, str) for other in layer.candidates):
            return [other for other in self.grid(layer) if other > k]  # type: ignore[operator]
        price = {other: self.share(layer, other) for other in self.scores[layer.name]}
        return sorted((other for other in price if price[other] > price[k]), key=price.__getitem__, reverse=True)

    def excess(self, used: np.ndarray) -> float:
        """By what factor a cost of the network is above the budget, in the worst unit."""
        return float((used / self.limit).max())

    def first_met(self, choices: Iterable[Choice]) -> Choice:
        """The first choice within the budget."""
        best = self.total
        for chosen in choices:
            used = self.used(chosen)
            if self.excess(used) <= ROUNDING:
                return chosen
            best = min(best, used, key=self.excess)
        raise self.infeasible(best)

    def infeasible(self, used: np.ndarray) -> InfeasibleBudget:
        """The error to raise, where ``used`` is the least that the rule can reach."""
        least = np.maximum(used, self.limit)
        wish, answer = self._text(self.limit), self._text(least)
        return InfeasibleBudget(
            f"no plan of the rule {self.rule!r} meets a budget of {wish}; the smallest that can be met is {answer}",
            dict(zip(self.units, (least / self.total).tolist(), strict=True)),
            dict(zip(self.units, least.tolist(), strict=True)),
        )

    def _text(self, budget: np.ndarray) -> str:
        """A budget in words, rounded up, so that it can be met as it is printed."""
        parts = []
        for unit, number, fraction in zip(self.units, budget, budget / self.total, strict=True):
            shown = f"{_up(number, 4):g}" if unit == "milliseconds" else f"{_up(number, 0):,.0f}"
            parts.append(f"{_up(fraction, 4):g} of the {unit} ({shown})")
        return " and ".join(parts)


def _up(number: float, digits: int) -> float:
    return math.ceil(number * 10**digits / ROUNDING) / 10**digits


def _optimal(problem: _Problem) -> Choice:
    options = [(at, k) for at in problem.layers for k in problem.scores[at.name] if (problem.saving(at, k) > 0).any()]
    if not options:
        return problem.first_met([{}])
    values = np.array([problem.scores[layer.name][k] for layer, k in options])
    savings = np.array([problem.saving(layer, k) for layer, k in options])
    of = np.array([[layer is other for other, _ in options] for layer in problem.layers], float)
    need = problem.total - problem.limit * ROUNDING
    # HiGHS decides to within 1e-6, in the objective and in each constraint; scaled up, that is little enough.
    scale = 1e4 / problem.total
    constraints = [LinearConstraint(of, ub=1), LinearConstraint((savings * scale).T, lb=need * scale)]
    while (x := _minimise(1e3 * values / (np.abs(values).max() or 1), constraints)) is not None:
        short = need - savings.T @ x
        if (short <= 0).all():
            return {layer.name: k for (layer, k), taken in zip(options, x, strict=True) if taken}
        # Still over the budget, within the solver's tolerance: at least one layer has to save more.
        column = savings[:, short.argmax()]
        constraints.append(LinearConstraint((column > of.T @ (of @ (column * x)))[None].astype(float), lb=1))
    # The least t with (total - saving) / limit <= t in every unit; t is one variable more.
    ratios = np.column_stack([(savings / problem.limit).T, np.ones(len(need))])
    once = LinearConstraint(np.column_stack([of, np.zeros(len(of))]), ub=1)
    objective = np.r_[np.zeros(len(values)), 1]
    x = _minimise(objective, [once, LinearConstraint(ratios, lb=problem.total / problem.limit)], 1 - objective)
    raise problem.infeasible(problem.total if x is None else problem.total - savings.T @ x[:-1])


def _minimise(
    values: np.ndarray, constraints: list[LinearConstraint], whole: np.ndarray | None = None
) -> np.ndarray | None:
    """The x that minimises values . x, each 0 or 1 (where not ``whole``: at least 0); None where there is none."""
    whole = np.ones(len(values)) if whole is None else whole
    upper = np.where(whole, 1, np.inf)
    result = milp(values, integrality=whole, bounds=(0, upper), constraints=constraints, options={"mip_rel_gap": 0})
    if result.x is None and result.status != 2:
        raise RuntimeError(f"the optimiser gave up: {result.message}")
    return None if result.x is None else np.where(whole, np.round(result.x), result.x)


def _smallest(candidates: Iterable[Size], price: Callable[[Size], float]) -> Size:
    """The smallest k; where there are texts, too, what has the lowest price."""
    candidates = list(candidates)
    ks = [k for k in candidates if not isinstance(k, str)]
    return min(ks) if len(ks) == len(candidates) else min(candidates, key=price)


def _fewest_parameters(layer: Layer, candidates: Iterable[Size]) -> Size:
    return _smallest(candidates, lambda k: layer.cost(k)["params"] or 0)


def _under(
    layers: Iterable[Layer], scores: Scores, epsilon: float, smallest: Callable[[Layer, list[Size]], Size]
) -> Choice:
    """The smallest candidate of each layer whose sensitivity is at most epsilon."""
    small = ((at, [k for k, value in scores.get(at.name, {}).items() if value <= epsilon]) for at in layers)
    return {at.name: smallest(at, own) for at, own in small if own}


def _threshold(problem: _Problem) -> Choice:
    epsilons = sorted({value for own in problem.scores.values() for value in own.values()})
    of = partial(_under, problem.layers, problem.scores, smallest=problem.smallest)
    return problem.first_met(of(epsilon) for epsilon in (-math.inf, *epsilons))


def _uniform(problem: _Problem) -> Choice:
    texts = dict.fromkeys(k for at in problem.layers for k in problem.scores[at.name] if isinstance(k, str))
    if texts:
        alike: list[Choice] = [{at.name: t for at in problem.layers if t in problem.scores[at.name]} for t in texts]
        return problem.first_met(sorted([{}, *alike], key=lambda one: problem.excess(problem.used(one)), reverse=True))
    # The common ratio falls, and at each of these boundaries the k of some layers falls with it.
    steps = [
        ((high + low) / (2 * at.out_channels), at.name, low)
        for at in problem.layers
        for high, low in pairwise(problem.grid(at))
    ]

    def choices() -> Iterator[Choice]:
        chosen: Choice = {}
        yield chosen
        for _, group in groupby(sorted(steps, reverse=True), key=lambda one: one[0]):
            chosen = chosen | {name: low for _, name, low in group}
            yield chosen

    return problem.first_met(choices())


def _one_by_one(problem: _Problem) -> Choice:
    scores = problem.scores
    goals = {at.name: problem.smallest(at, scores[at.name]) for at in problem.layers if scores[at.name]}
    useful = [at for at in problem.layers if at.name in goals and (problem.saving(at, goals[at.name]) > 0).any()]
    order = _ORDERS[problem.rule](problem, useful)
    chosen = problem.first_met({at.name: goals[at.name] for at in order[:n]} for n in range(len(order) + 1))
    if not chosen:
        return chosen
    last = order[len(chosen) - 1]
    larger = ({**chosen, last.name: k} for k in problem.larger(last, goals[last.name]))
    return problem.first_met([*larger, chosen])


def _sensitivity(problem: _Problem, layer: Layer) -> float:
    """That of the smallest candidate."""
    own = problem.scores[layer.name]
    return own[problem.smallest(layer, own)]


# Ties are in the order of the network.
_ORDERS: Mapping[str, Callable[[_Problem, list[Layer]], list[Layer]]] = {
    "random": lambda problem, layers: random.Random(problem.seed).sample(layers, len(layers)),
    "largest_first": lambda problem, layers: sorted(layers, key=lambda at: -problem.share(at, at.out_channels)),
    "ranking": lambda problem, layers: sorted(layers, key=lambda at: _sensitivity(problem, at)),
    "reverse": lambda problem, layers: sorted(layers, key=lambda at: -_sensitivity(problem, at)),
    "first": lambda problem, layers: layers,
    "last": lambda problem, layers: layers[::-1],
}
_SOLVERS: Mapping[str, Callable[[_Problem], Choice]] = {
    "optimal": _optimal, "threshold": _threshold, "uniform": _uniform, **dict.fromkeys(_ORDERS, _one_by_one)
}  # fmt: skip
