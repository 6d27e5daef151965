"""Choose layers under a budget: from sensitivities to a plan, by an exact optimiser, the paper's rule or baselines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from basis.layers.conv import basis_channels_for, check_basis_channels
from basis.numbers import one_of
from basis.plan import check_patterns
from basis.search.table import Layer, SensitivityTable
from basis.substitution import Plan, Size, as_patterns, left_out, size_text
from basis.text import few

if TYPE_CHECKING:
    from basis.bench.report import BenchReport

Rule = Literal["optimal", "threshold", "uniform", "largest_first"]
RULES: tuple[str, ...] = get_args(Rule)
UNITS = ("params", "macs", "backward_macs", "milliseconds")
ROUNDING = 1 + 1e-12  # a budget is met up to the rounding of floating-point numbers

Choice = Mapping[str, Size]  # layer -> k, or the text of a structured layer
Numbers = Mapping[str, Mapping[Any, float]]  # layer -> k or text -> sensitivity or milliseconds


class InfeasibleBudget(ValueError):
    """No plan of the rule meets the budget.

    ``fractions`` gives for each unit the smallest budget that can be met, as a fraction of the dense network's; of
    several units, budgets that can be met together, none smaller than was asked for.
    """

    def __init__(self, message: str, fractions: Mapping[str, float]) -> None:
        super().__init__(message)
        self.fractions = fractions


def select(
    table: SensitivityTable, *, budget: Mapping[str, float], rule: Rule = "optimal", ratio: float | None = None,
    latency: BenchReport | None = None, step: str = "forward+backward", exclude: str | Iterable[str] = (),
) -> Plan:  # fmt: skip
    """Choose on a budget which layers are substituted, with how many basis channels or as which structured layer.

    The rules choose among the candidates of the table that have a finite sensitivity:

    - "optimal": the exact smallest sum of sensitivities, the one rule that chooses among structured layers, too;
    - "threshold": every layer's smallest candidate that loses at most epsilon, for the smallest epsilon that meets
      the budget (Alekseev et al. 2024, arXiv 2408.06024);
    - "uniform": all layers at the largest common ratio that meets it;
    - "largest_first": one layer after another, from the dearest in the units of the budget on, gets its smallest
      candidate until the budget is met, and the last of them the largest k that still does.

    Args:
        budget: unit of ``UNITS`` -> what the network may still have, as a fraction in (0, 1] of the dense network's.
            Several are all met.
        ratio: only the candidate nearest to ratio x C_out is used of each layer.
        latency: a report of :func:`basis.bench.tuning.bench_latency`, for a budget in milliseconds. Only what it has
            measured is chosen then. Its pass ``step`` counts, "forward" or "forward+backward".
        exclude: shell patterns of layers that stay dense.

    Raises:
        InfeasibleBudget: when the rule has no plan that meets the budget; it gives the smallest that one does.
        ValueError: for arguments that make no sense, an incomplete table, or a latency report of another network.
    """
    one_of("rule", rule, RULES)
    if rule == "uniform" and ratio is not None:
        raise ValueError("the rule 'uniform' finds the ratio itself; leave out ratio")
    _check_budget(budget, table, latency)
    names, patterns = [layer.name for layer in table.layers], as_patterns(exclude)
    check_patterns("exclude", patterns, [*names, *table.skipped])
    dense = {name: reason for name in names if (reason := left_out([name], (), patterns))}
    scores = _scores(table, dense, ratio)
    texts = dict.fromkeys(k for own in scores.values() for k in own if isinstance(k, str))
    if texts and (rule != "optimal" or ratio is not None or latency is not None):
        raise ValueError(f"structured layers ({few(texts)}) are chosen by 'optimal', without ratio and latency, alone")
    times, totals = _times(latency, step, table, scores)
    total = np.array([totals[unit] for unit in budget], float)
    limit = np.array(list(budget.values()), float) * total
    multiple = math.gcd(*(k for _, k in table.candidates if not isinstance(k, str))) or 1
    layers = tuple(layer for layer in table.layers if layer.name in scores)
    problem = _Problem(rule, layers, scores, times, tuple(budget), total, limit, multiple)
    chosen = _SOLVERS[rule](problem)
    skipped, values = {}, table.values
    for at in (at for at in table.layers if at.name not in chosen):
        strange = [str(k) for k in at.candidates if not math.isfinite(values.get((at.name, k), 0))]
        why = "kept dense by the selection" + (f"; not finite at {few(strange)}" if strange else "")
        skipped[at.name] = dense.get(at.name, why)
    ordered = {at.name: chosen[at.name] for at in table.layers if at.name in chosen}
    return Plan(ordered, skipped | dict(table.skipped), {at.name: at.out_channels for at in table.layers})


def predicted(
    table: SensitivityTable, plan: Plan, latency: BenchReport | None = None, *, step: str = "forward+backward"
) -> dict[str, float]:
    """What the single layers of ``plan`` add up to: their "sensitivity", and what they leave of the dense network.

    The latter as fractions of each unit. The sensitivity of a k between two measured ones is interpolated linearly, the
    dense layer counting as 0. NaN is what the table does not know. Raises ``ValueError`` for layers not in the table.
    """
    layer_of, values = {layer.name: layer for layer in table.layers}, table.values
    times, totals = _times(latency, step, table, {})
    saved, loss = dict.fromkeys(totals, 0.0), 0.0
    for name, k in plan.layers.items():
        layer = layer_of.get(name)
        if layer is None or (isinstance(k, str) and k not in layer.candidates):
            raise ValueError(f"the plan names {name!r} with {size_text(k)}, which is not in the table")
        if (there := plan.out_channels.get(name, layer.out_channels)) != layer.out_channels:
            raise ValueError(f"{name!r} has C_out = {there} in the plan, but {layer.out_channels} in the table")
        if isinstance(k, str):
            loss += values.get((name, k), math.nan)
        else:
            check_basis_channels(k, layer.out_channels, layer.groups)
            known = {j: values[name, j] for j in layer.candidates if not isinstance(j, str) and (name, j) in values}
            ks, losses = zip(*sorted((known | {layer.out_channels: 0.0}).items()), strict=True)
            loss += float(np.interp(k, ks, losses, left=math.nan))
        for unit in saved:
            saved[unit] += _cost(layer, layer.out_channels, unit, times) - _cost(layer, k, unit, times)
    return {"sensitivity": loss} | {unit: 1 - saved[unit] / (totals[unit] or math.nan) for unit in totals}


def _cost(layer: Layer, k: Size, unit: str, times: Numbers) -> float:
    """What the layer costs with k basis channels, or as the structured layer k; NaN where it is not known."""
    known = times.get(layer.name, {}).get(k) if unit == "milliseconds" else layer.cost(k)[unit]
    return math.nan if known is None else known


def _check_budget(budget: Mapping[str, float], table: SensitivityTable, latency: Any) -> None:
    if not isinstance(budget, Mapping) or not budget or not set(budget) <= set(UNITS):
        raise ValueError(f"budget is {budget!r}, but it must map at least one of {', '.join(UNITS)} to a number")
    for unit, value in budget.items():
        if not 0 < value <= 1:
            raise ValueError(f"the budget of {unit} is {value!r}, but it must be a fraction in (0, 1] of the dense one")
        if unit != "milliseconds" and table.total[unit] is None:
            raise ValueError(f"the table was made without images and knows no {unit}; give a budget in params")
    if ("milliseconds" in budget) != (latency is not None):
        raise ValueError("a budget in milliseconds and a latency report go together: give both or neither")


def _scores(table: SensitivityTable, dense: Mapping[str, str], ratio: float | None) -> Numbers:
    """The finite sensitivities of all layers that need not stay dense; with ``ratio`` at most one of each."""
    lacking = [f"{name} {k}" for name, k in table.missing if name not in dense]
    if lacking:
        raise ValueError(f"the table lacks {len(lacking)} of its candidates ({few(lacking)}); resume its measurement")
    if ratio is not None:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense
    values, scores = table.values, {}
    for at in (layer for layer in table.layers if layer.name not in dense):
        own: list[Any] = [k for k in at.candidates if math.isfinite(values[at.name, k])]
        if ratio is not None and not any(isinstance(k, str) for k in own):
            own = sorted(own, key=lambda k: (abs(k - ratio * at.out_channels), k))[:1]
        scores[at.name] = {k: values[at.name, k] for k in own}
    return scores


def _times(
    latency: BenchReport | None, step: str, table: SensitivityTable, scores: Numbers
) -> tuple[Numbers, dict[str, Any]]:
    """The milliseconds of every layer of the report, after checking that it covers ``scores``; the dense totals."""
    if latency is None:
        return {}, dict(table.total)
    times = latency.latencies(step)
    known = {layer.name: layer.out_channels for layer in table.layers}
    strange = [n for n, ms in times.items() if max(ms) != known.get(n, max(ms) if n in table.skipped else 0)]
    macs = latency.config.get("macs"), table.total["macs"]
    if strange or (all(macs) and macs[0] != macs[1]):
        raise ValueError(f"the latency report is of another network or image size ({few(strange) or 'other MACs'})")
    for name, ks in scores.items():
        lacking = [str(k) for k in ks if k not in times.get(name, {})]
        if lacking or name not in times:
            raise ValueError(f"the latency report lacks {name} with k = {few(lacking)}; measure or exclude it")
    return times, {**table.total, "milliseconds": sum(own[max(own)] for own in times.values())}


@dataclass(frozen=True)
class _Problem:
    """What a rule works on; costs are arrays with one number for each unit of the budget."""

    rule: str
    layers: tuple[Layer, ...]
    scores: Numbers
    times: Numbers
    units: tuple[str, ...]
    total: np.ndarray
    limit: np.ndarray
    multiple: int

    def price(self, layer: Layer, k: Size) -> np.ndarray:
        return np.array([_cost(layer, k, unit, self.times) for unit in self.units], float)

    def saving(self, layer: Layer, k: Size) -> np.ndarray:
        return self.price(layer, layer.out_channels) - self.price(layer, k)

    def used(self, chosen: Choice) -> np.ndarray:
        """What the network costs."""
        return self.total - sum(self.saving(at, chosen[at.name]) for at in self.layers if at.name in chosen)

    def grid(self, layer: Layer) -> list[int]:
        """Every k that the layer may get, from the dense one down."""
        if self.times:
            return sorted(self.times[layer.name], reverse=True)
        c, step = layer.out_channels, math.lcm(layer.groups, self.multiple)
        return [c, *range((c - 1) // step * step, 0, -step)]

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
        fractions = dict(zip(self.units, (least / self.total).tolist(), strict=True))

        def text(budget: np.ndarray) -> str:  # rounded up, so that it can be met as it is printed
            shares = np.ceil(budget / self.total * 1e4 / ROUNDING) / 1e4
            parts = zip(shares, self.units, budget, strict=True)
            return " and ".join(f"{share:g} of the {unit} ({number:,.10g})" for share, unit, number in parts)

        says = f"meets a budget of {text(self.limit)}; the smallest that can be met is {text(least)}"
        return InfeasibleBudget(f"no plan of the rule {self.rule!r} {says}", fractions)


def _optimal(problem: _Problem) -> Choice:
    from scipy.optimize import LinearConstraint

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


def _minimise(values: np.ndarray, constraints: list[Any], whole: Any = 1) -> np.ndarray | None:
    """The x that minimises values . x, each 0 or 1 (where not ``whole``: at least 0); None where there is none."""
    from scipy.optimize import milp

    bounds = (0, np.where(whole, 1, np.inf))
    result = milp(values, integrality=whole, bounds=bounds, constraints=constraints, options={"mip_rel_gap": 0})
    if result.x is None and result.status != 2:
        raise RuntimeError(f"the optimiser gave up: {result.message}")
    return None if result.x is None else np.where(whole, np.round(result.x), result.x)


def _threshold(problem: _Problem) -> Choice:
    epsilons = {value for own in problem.scores.values() for value in own.values()}
    allowed = (
        {name: [k for k, value in own.items() if value <= epsilon] for name, own in problem.scores.items()}
        for epsilon in (-math.inf, *sorted(epsilons))
    )
    return problem.first_met({name: min(ks) for name, ks in one.items() if ks} for one in allowed)


def _uniform(problem: _Problem) -> Choice:
    # The common ratio falls, and at each of these boundaries the k of some layers falls with it.
    pairs = [(at, *pair) for at in problem.layers for pair in pairwise(problem.grid(at))]
    steps = [((high + low) / (2 * at.out_channels), at.name, low) for at, high, low in pairs]
    choices: list[Choice] = [{}]
    for _, group in groupby(sorted(steps, reverse=True), key=lambda one: one[0]):
        choices.append({**choices[-1], **{name: low for _, name, low in group}})
    return problem.first_met(choices)


def _largest_first(problem: _Problem) -> Choice:
    scores = problem.scores
    goals = {at.name: min(scores[at.name]) for at in problem.layers if scores[at.name]}
    useful = [at for at in problem.layers if at.name in goals and (problem.saving(at, goals[at.name]) > 0).any()]
    order = sorted(useful, key=lambda at: -(problem.price(at, at.out_channels) / problem.total).sum())
    chosen = problem.first_met({at.name: goals[at.name] for at in order[:n]} for n in range(len(order) + 1))
    if not chosen:
        return chosen
    last = order[len(chosen) - 1]
    larger = ({**chosen, last.name: k} for k in problem.grid(last) if k > goals[last.name])
    return problem.first_met([*larger, chosen])


_SOLVERS = {"optimal": _optimal, "threshold": _threshold, "uniform": _uniform, "largest_first": _largest_first}
