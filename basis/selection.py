"""Choose layers under a budget: from sensitivities to a plan.

The exact optimiser is the rule "optimal"; the others are the paper's own rule and the baselines that a
selection has to beat. Each adds up what single layers lose: whether the sum holds for the layers together
is to be measured, and :func:`predicted` gives the number to hold against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from scipy.optimize import LinearConstraint, milp

from basis.conv import basis_channels_for, check_basis_channels
from basis.substitution import Plan, _left_out, _patterns, few
from basis.table import Layer, SensitivityTable

if TYPE_CHECKING:
    from basis.bench import BenchReport

Rule = Literal[
    "optimal", "threshold", "uniform", "random", "largest_first", "ranking", "reverse", "first", "last"
]  # fmt: skip
RULES: tuple[str, ...] = get_args(Rule)
UNITS = ("params", "macs", "backward_macs", "milliseconds")
DENSE = "kept dense by the selection"
ROUNDING = 1 + 1e-12  # a budget is met up to the rounding of floating-point numbers

Scores = Mapping[str, Mapping[int, float]]  # layer -> k -> sensitivity
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
    """Choose which layers become basis convolutions, and with how many basis channels k, under a budget.

    The rules, of which all but "uniform" choose among the candidates in the table that have a finite
    sensitivity, and the dense layer:

    - "optimal": the smallest sum of sensitivities, by mixed-integer optimisation (HiGHS), exactly;
    - "threshold": :func:`threshold` at the smallest epsilon that meets the budget;
    - "uniform": all layers at the largest common ratio that meets it, whatever their sensitivity;
    - "random", "largest_first" (most of the budget's unit first), "ranking" (least sensitive first),
      "reverse" (most sensitive first), "first" and "last" (from the front or the back of the network): one
      layer after another gets its smallest candidate (the one nearest to ``ratio``, if that is given) until
      the budget is met. The last of them gets the largest k that still meets it, so that rules are compared
      at nearly equal size. Layers whose candidate saves nothing are passed over.

    Args:
        table: of :func:`basis.sensitivity`.
        budget: unit -> what the network may still have, as a fraction in (0, 1] of the dense network's.
            Units are "params", "macs" and "backward_macs" (factorized mode, as :func:`basis.cost` counts
            them) and "milliseconds" (of all convolutions in ``latency``). Several are all met.
        rule: one of those above.
        ratio: r in (0, 1]; only the candidate nearest to r C_out is used of each layer.
        latency: a report of :func:`basis.bench.bench_latency`, for a budget in milliseconds. Only
            what it has measured is chosen then.
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
    times = {} if latency is None else _times(latency, step, table, scores)
    totals = {**table.total, "milliseconds": sum(ms[max(ms)] for ms in times.values())}
    total = np.array([totals[unit] for unit in budget], float)
    limit = np.array(list(budget.values()), float) * (1 if absolute else total)
    common = multiple or math.gcd(*(k for layer in table.layers for k in layer.candidates)) or 1
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
    that loses at most ``epsilon``; with ``ratio``, only the candidate nearest to it is considered.

    Args:
        epsilon: in the unit of the table's measure.
        ratio, include, exclude: as in :func:`select`.

    Raises:
        ValueError: for an epsilon that is no number, an incomplete table, and as :func:`select`.
    """
    if not isinstance(epsilon, (int, float)) or math.isnan(epsilon):
        raise ValueError(f"epsilon is {epsilon!r}, but it must be a number in the unit of the table's measure")
    dense = _dense(table, include, exclude)
    return _plan(table, dense, _under(_scores(table, dense, ratio), epsilon))


def predicted(
    table: SensitivityTable, plan: Plan, latency: BenchReport | None = None, *, step: str = "forward+backward"
) -> dict[str, float]:
    """What the single layers of ``plan`` add up to.

    Returns:
        "sensitivity", the sum over layers, and the fractions of the dense network's "params", "macs" and
        "backward_macs", and with ``latency`` "milliseconds". The sensitivity of a k between two measured
        ones is interpolated linearly in k, the dense layer counting as 0. NaN stands for what the table
        does not know: a k below the smallest or beside one that was not finite, MACs without images, and
        a k that was not timed.

    Raises:
        ValueError: for a plan that names a layer that is not in the table, or with a k that makes no sense.
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
        check_basis_channels(k, layer.out_channels, layer.groups)
        known = {layer.out_channels: 0.0} | {j: value for (at, j), value in values.items() if at == name}
        ks = sorted(known)
        loss += float(np.interp(k, ks, [known[j] for j in ks], left=math.nan))
        whole, thin = layer.cost(layer.out_channels), layer.cost(k)
        for unit in UNITS[:3]:
            saved[unit] += math.nan if thin[unit] is None else whole[unit] - thin[unit]  # type: ignore[operator]
        if times is not None:
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
    patterns = {"include": _patterns(include), "exclude": _patterns(exclude)}
    names = [layer.name for layer in table.layers]
    for what, given in patterns.items():
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in (*names, *table.skipped)):
                raise ValueError(f"{what} has {pattern!r}, but no layer of the table has such a name")
    reasons = {name: _left_out([name], patterns["include"], patterns["exclude"]) for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _values(table: SensitivityTable) -> dict[tuple[str, int], float]:
    return {(cell.layer, cell.basis_channels): cell.value for cell in table.cells}


def _scores(table: SensitivityTable, dense: Mapping[str, str], ratio: float | None) -> Scores:
    """The finite sensitivities of all layers that need not stay dense; with ``ratio`` at most one of each."""
    if ratio is not None:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense
    values = _values(table)
    layers = [layer for layer in table.layers if layer.name not in dense]
    lacking = [f"{at.name} with k = {k}" for at in layers for k in at.candidates if (at.name, k) not in values]
    if lacking:
        raise ValueError(
            f"the table is not complete: it lacks {len(lacking)} of its candidates ({few(lacking)}); "
            "call sensitivity with the same resume file again, and it measures the rest"
        )
    scores = {}
    for at in layers:
        finite = [k for k in at.candidates if math.isfinite(values[at.name, k])]
        if ratio is not None:
            finite = sorted(finite, key=lambda k, aim=ratio * at.out_channels: (abs(k - aim), k))[:1]  # type: ignore[misc]
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


def _plan(table: SensitivityTable, dense: Mapping[str, str], chosen: Mapping[str, int]) -> Plan:
    values = _values(table)
    reasons = {}
    for at in table.layers:
        bad = [str(k) for k in at.candidates if not math.isfinite(values.get((at.name, k), 0))]
        note = f"; not finite at k = {few(bad)}" if bad else "" if at.candidates else "; it has no candidate"
        reasons[at.name] = dense.get(at.name, DENSE + note)
    layers = {at.name: chosen[at.name] for at in table.layers if at.name in chosen}
    return Plan(layers, {name: why for name, why in reasons.items() if name not in layers} | dict(table.skipped))


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

    def price(self, layer: Layer, k: int) -> np.ndarray:
        """What the layer costs with k basis channels."""
        cost = layer.cost(k)
        return np.array([self.times[layer.name][k] if u == "milliseconds" else cost[u] for u in self.units], float)

    def saving(self, layer: Layer, k: int) -> np.ndarray:
        """What k basis channels save of the dense layer."""
        return self.price(layer, layer.out_channels) - self.price(layer, k)

    def used(self, chosen: Mapping[str, int]) -> np.ndarray:
        """What the network costs."""
        savings = [self.saving(at, chosen[at.name]) for at in self.layers if at.name in chosen]
        return self.total - np.sum(savings, axis=0) if savings else self.total

    def grid(self, layer: Layer) -> list[int]:
        """Every k that the layer may get, from the dense one down."""
        if self.times:
            return sorted(self.times[layer.name], reverse=True)
        c, step = layer.out_channels, math.lcm(layer.groups, self.multiple)
        return [c, *range((c - 1) // step * step, 0, -step)]

    def excess(self, used: np.ndarray) -> float:
        """By what factor a cost of the network is above the budget, in the worst unit."""
        return float((used / self.limit).max())

    def first_met(self, choices: Iterable[dict[str, int]]) -> dict[str, int]:
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


def _optimal(problem: _Problem) -> dict[str, int]:
    options = [(layer, k) for layer in problem.layers for k in problem.scores[layer.name]]
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


def _under(scores: Scores, epsilon: float) -> dict[str, int]:
    """The smallest k of each layer whose sensitivity is at most epsilon."""
    ks = {name: [k for k, value in own.items() if value <= epsilon] for name, own in scores.items()}
    return {name: min(own) for name, own in ks.items() if own}


def _threshold(problem: _Problem) -> dict[str, int]:
    epsilons = sorted({value for own in problem.scores.values() for value in own.values()})
    return problem.first_met(_under(problem.scores, epsilon) for epsilon in (-math.inf, *epsilons))


def _uniform(problem: _Problem) -> dict[str, int]:
    # The common ratio falls, and at each of these boundaries the k of some layers falls with it.
    steps = [
        ((high + low) / (2 * at.out_channels), at.name, low)
        for at in problem.layers
        for high, low in pairwise(problem.grid(at))
    ]

    def choices() -> Iterator[dict[str, int]]:
        chosen: dict[str, int] = {}
        yield chosen
        for _, group in groupby(sorted(steps, reverse=True), key=lambda one: one[0]):
            chosen = chosen | {name: low for _, name, low in group}
            yield chosen

    return problem.first_met(choices())


def _one_by_one(problem: _Problem) -> dict[str, int]:
    goals = {at.name: min(problem.scores[at.name]) for at in problem.layers if problem.scores[at.name]}
    useful = [at for at in problem.layers if at.name in goals and (problem.saving(at, goals[at.name]) > 0).any()]
    order = _ORDERS[problem.rule](problem, useful)
    chosen = problem.first_met({at.name: goals[at.name] for at in order[:n]} for n in range(len(order) + 1))
    if not chosen:
        return chosen
    last = order[len(chosen) - 1]
    larger = ({**chosen, last.name: k} for k in problem.grid(last) if k > goals[last.name])
    return problem.first_met([*larger, chosen])


def _sensitivity(problem: _Problem, layer: Layer) -> float:
    """That of the smallest candidate."""
    return min(problem.scores[layer.name].items())[1]


def _size(problem: _Problem, layer: Layer) -> float:
    """Its share of the dense network, in the units of the budget."""
    return float((problem.price(layer, layer.out_channels) / problem.total).sum())


# Ties are in the order of the network.
_ORDERS: Mapping[str, Callable[[_Problem, list[Layer]], list[Layer]]] = {
    "random": lambda problem, layers: random.Random(problem.seed).sample(layers, len(layers)),
    "largest_first": lambda problem, layers: sorted(layers, key=lambda at: -_size(problem, at)),
    "ranking": lambda problem, layers: sorted(layers, key=lambda at: _sensitivity(problem, at)),
    "reverse": lambda problem, layers: sorted(layers, key=lambda at: -_sensitivity(problem, at)),
    "first": lambda problem, layers: layers,
    "last": lambda problem, layers: layers[::-1],
}
_SOLVERS: Mapping[str, Callable[[_Problem], dict[str, int]]] = {
    "optimal": _optimal, "threshold": _threshold, "uniform": _uniform, **dict.fromkeys(_ORDERS, _one_by_one)
}  # fmt: skip
