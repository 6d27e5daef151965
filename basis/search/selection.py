"""Choose layers under a budget: from sensitivities to a plan, by an exact optimiser, the paper's rule or baselines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from basis.layers.conv import basis_channels_for, check_basis_channels
from basis.search.table import Layer, SensitivityTable
from basis.substitution import Plan, Size, as_patterns, left_out, size_text
from basis.text import few

if TYPE_CHECKING:
    from basis.bench.report import BenchReport

Rule = Literal["optimal", "threshold", "uniform", "random", "largest_first", "ranking", "reverse", "first", "last"]
RULES: tuple[str, ...] = get_args(Rule)
UNITS = ("params", "macs", "backward_macs", "milliseconds")
ROUNDING = 1 + 1e-12  # a budget is met up to the rounding of floating-point numbers

Choice = dict[str, Size]  # layer -> k, or the text of a structured layer
Scores = Mapping[str, Mapping[Size, float]]  # layer -> k or text -> sensitivity
Times = Mapping[str, Mapping[int, float]]  # layer -> k -> milliseconds; its largest k is the dense layer


class InfeasibleBudget(ValueError):
    """No plan of the rule meets the budget.

    Attributes:
        fractions: unit -> the smallest budget that can be met, as a fraction of the dense network's; of several units,
            budgets that can be met together, of which none is smaller than the one asked for.
        numbers: the same as absolute numbers.
    """

    def __init__(self, message: str, fractions: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        super().__init__(message, fractions, numbers)
        self.fractions, self.numbers = fractions, numbers

    def __str__(self) -> str:
        return str(self.args[0])


def select(
    table: SensitivityTable, *, budget: Mapping[str, float], rule: Rule = "optimal", ratio: float | None = None,
    latency: BenchReport | None = None, step: str = "forward+backward", exclude: str | Iterable[str] = (),
    absolute: bool = False, seed: int = 0,
) -> Plan:  # fmt: skip
    """Choose on a budget which layers are substituted, with how many basis channels or as which structured layer.

    The rules choose among the candidates of the table that have a finite sensitivity:

    - "optimal": the smallest sum of sensitivities, exactly, by mixed-integer optimisation (HiGHS), without what saves
      nothing in any unit of the budget;
    - "threshold": every layer's smallest candidate that loses at most epsilon, for the smallest epsilon that meets
      the budget (Alekseev et al. 2024, arXiv 2408.06024);
    - "uniform": all layers at the largest common ratio, or by the largest common structured layer, that meets it;
    - "random", "largest_first", "ranking" (least sensitive first), "reverse", "first" and "last" (from the front or
      the back of the network): one layer after another gets its smallest candidate until the budget is met, and the
      last of them the largest k that still meets it. Layers whose candidate saves nothing are passed over.

    Args:
        budget: unit ("params", "macs", "backward_macs", "milliseconds") -> what the network may still have, as a
            fraction in (0, 1] of the dense network's, or ``absolute``. Several are all met.
        ratio: only the candidate nearest to ratio x C_out is used of each layer.
        latency: a report of :func:`basis.bench.cases.bench_latency`, for a budget in milliseconds. Only what it has
            measured is chosen then. Its pass ``step`` counts, "forward" or "forward+backward".
        exclude: shell patterns (``fnmatch``) of layers that stay dense.
        seed: of the order of "random".

    Raises:
        InfeasibleBudget: when the rule has no plan that meets the budget; it gives the smallest that one does.
        ValueError: for arguments that make no sense, an incomplete table, or a latency report of another network.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, but it must be one of {', '.join(RULES)}")
    if rule == "uniform" and ratio is not None:
        raise ValueError("the rule 'uniform' finds the ratio itself; leave out ratio")
    _check_budget(budget, table, absolute, latency)
    dense = _excluded(table, exclude)
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
    multiple = math.gcd(*(k for _, k in table.candidates if not isinstance(k, str))) or 1
    layers = tuple(layer for layer in table.layers if layer.name in scores)
    problem = _Problem(rule, layers, scores, times, tuple(budget), total, limit, multiple, seed)
    chosen = _SOLVERS.get(rule, _one_by_one)(problem)
    skipped = {at.name: dense.get(at.name) or _why_dense(table, at) for at in table.layers if at.name not in chosen}
    ordered = {at.name: chosen[at.name] for at in table.layers if at.name in chosen}
    return Plan(ordered, skipped | dict(table.skipped), {at.name: at.out_channels for at in table.layers})


def predicted(
    table: SensitivityTable, plan: Plan, latency: BenchReport | None = None, *, step: str = "forward+backward"
) -> dict[str, float]:
    """What the single layers of ``plan`` add up to: their "sensitivity", and what they leave of the dense network.

    The latter as fractions of "params", "macs", "backward_macs" and, with ``latency``, "milliseconds". The sensitivity
    of a k between two measured ones is interpolated linearly, the dense layer counting as 0. NaN stands for what the
    table does not know.

    Raises:
        ValueError: for a plan with a layer or a structured layer that is not in the table, or a k that makes no sense.
    """
    layer_of, values = {layer.name: layer for layer in table.layers}, table.values
    times: Times = {}
    totals: dict[str, Any] = dict(table.total)
    if latency is not None:
        times = _times(latency, step, table, {})
        totals["milliseconds"] = sum(ms[max(ms)] for ms in times.values())
    saved, loss = dict.fromkeys(totals, 0.0), 0.0
    for name, k in plan.layers.items():
        layer = layer_of.get(name)
        if layer is None or (isinstance(k, str) and k not in layer.candidates):
            raise ValueError(f"the plan names {name!r} with {size_text(k)}, which is not in the table")
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


def _cost(layer: Layer, k: Size, unit: str, times: Times) -> float:
    """What the layer costs with k basis channels, or as the structured layer k; NaN where it is not known."""
    own: Mapping[Any, float] = times.get(layer.name, {})
    known = own.get(k) if unit == "milliseconds" else layer.cost(k)[unit]
    return math.nan if known is None else known


# -- what there is to choose from -----------------------------------------------------------------


def _check_budget(
    budget: Mapping[str, float], table: SensitivityTable, absolute: bool, latency: BenchReport | None
) -> None:
    if not isinstance(budget, Mapping) or not budget or not set(budget) <= set(UNITS):
        raise ValueError(f"budget is {budget!r}, but it must map at least one of {', '.join(UNITS)} to a number")
    for unit, value in budget.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (value > 1 and not absolute):
            right = "a number above 0" if absolute else "a fraction of the dense network's, in (0, 1]"
            raise ValueError(f"the budget of {unit} is {value!r}, but it must be {right}")
        if unit != "milliseconds" and table.total[unit] is None:
            raise ValueError(f"the table was made without images and knows no {unit}; give a budget in params")
    if ("milliseconds" in budget) != (latency is not None):
        raise ValueError("a budget in milliseconds and a latency report go together: give both or neither")


def _excluded(table: SensitivityTable, exclude: str | Iterable[str]) -> dict[str, str]:
    """The layers that stay dense, each with the reason."""
    names, patterns = [layer.name for layer in table.layers], as_patterns(exclude)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in (*names, *table.skipped)):
            raise ValueError(f"exclude has {pattern!r}, but no layer of the table has such a name")
    return {name: reason for name in names if (reason := left_out([name], (), patterns))}


def _scores(table: SensitivityTable, dense: Mapping[str, str], ratio: float | None) -> Scores:
    """The finite sensitivities of all layers that need not stay dense; with ``ratio`` at most one of each."""
    lacking = [f"{name} {k}" for name, k in table.missing if name not in dense]
    if lacking:
        raise ValueError(f"the table lacks {len(lacking)} of its candidates ({few(lacking)}); resume its measurement")
    values, scores = table.values, {}
    for at in (layer for layer in table.layers if layer.name not in dense):
        own = {k: values[at.name, k] for k in at.candidates if math.isfinite(values[at.name, k])}
        if ratio is not None:
            basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense
            if any(isinstance(k, str) for k in own):
                raise ValueError(f"ratio chooses among basis channels, but {at.name} has structured layers")
            nearest = sorted(own, key=lambda k: (abs(k - ratio * at.out_channels), k))[:1]  # type: ignore[operator]
            own = {k: own[k] for k in nearest}
        scores[at.name] = own
    return scores


def _times(latency: BenchReport, step: str, table: SensitivityTable, scores: Scores) -> Times:
    """The milliseconds of every layer of the report, after checking that it covers all of ``scores``."""
    times = latency.latencies(step)
    known = {layer.name: layer.out_channels for layer in table.layers}
    strange = [name for name in times if name not in known and name not in table.skipped]
    strange += [name for name, own in times.items() if max(own) != known.get(name, max(own))]
    macs = latency.config.get("macs"), table.total["macs"]
    if strange or (all(macs) and macs[0] != macs[1]):
        raise ValueError(f"the latency report is of another network or image size ({few(strange) or 'other MACs'})")
    for name, ks in scores.items():
        lacking = [str(k) for k in ks if k not in times.get(name, {})]
        if lacking or name not in times:
            raise ValueError(f"the latency report lacks {name} with k = {few(lacking)}; measure or exclude it")
    return times


def _why_dense(table: SensitivityTable, layer: Layer) -> str:
    values = table.values
    strange = [str(k) for k in layer.candidates if not math.isfinite(values.get((layer.name, k), 0))]
    return "kept dense by the selection" + (f"; not finite at {few(strange)}" if strange else "")


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
        return np.array([_cost(layer, k, unit, self.times) for unit in self.units], float)

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

    def smallest(self, layer: Layer, candidates: Iterable[Size]) -> Size:
        """The smallest k; where there are texts, too, the candidate of the least cost."""
        candidates = list(candidates)
        ks = [k for k in candidates if not isinstance(k, str)]
        return min(ks) if len(ks) == len(candidates) else min(candidates, key=lambda k: self.share(layer, k))

    def larger(self, layer: Layer, k: Size) -> list[Size]:
        """What the layer may get instead of its candidate k that costs more, the most expensive first."""
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
        fractions, numbers = (dict(zip(self.units, x.tolist(), strict=True)) for x in (least / self.total, least))

        def text(budget: np.ndarray) -> str:  # rounded up, so that it can be met as it is printed
            shares = np.ceil(budget / self.total * 1e4 / ROUNDING) / 1e4
            parts = zip(shares, self.units, budget, strict=True)
            return " and ".join(f"{share:g} of the {unit} ({number:,.10g})" for share, unit, number in parts)

        says = f"meets a budget of {text(self.limit)}; the smallest that can be met is {text(least)}"
        return InfeasibleBudget(f"no plan of the rule {self.rule!r} {says}", fractions, numbers)


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


def _minimise(values: np.ndarray, constraints: list[Any], whole: np.ndarray | None = None) -> np.ndarray | None:
    """The x that minimises values . x, each 0 or 1 (where not ``whole``: at least 0); None where there is none."""
    from scipy.optimize import milp

    whole = np.ones(len(values)) if whole is None else whole
    upper = np.where(whole, 1, np.inf)
    result = milp(values, integrality=whole, bounds=(0, upper), constraints=constraints, options={"mip_rel_gap": 0})
    if result.x is None and result.status != 2:
        raise RuntimeError(f"the optimiser gave up: {result.message}")
    return None if result.x is None else np.where(whole, np.round(result.x), result.x)


def _threshold(problem: _Problem) -> Choice:
    epsilons = sorted({value for own in problem.scores.values() for value in own.values()})

    def choices() -> Iterator[Choice]:
        for epsilon in (-math.inf, *epsilons):
            small = {
                at: [k for k, value in problem.scores[at.name].items() if value <= epsilon] for at in problem.layers
            }
            yield {at.name: problem.smallest(at, own) for at, own in small.items() if own}

    return problem.first_met(choices())


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
    order = _in_order(problem, useful, {name: scores[name][k] for name, k in goals.items()})
    chosen = problem.first_met({at.name: goals[at.name] for at in order[:n]} for n in range(len(order) + 1))
    if not chosen:
        return chosen
    last = order[len(chosen) - 1]
    larger = ({**chosen, last.name: k} for k in problem.larger(last, goals[last.name]))
    return problem.first_met([*larger, chosen])


def _in_order(problem: _Problem, layers: list[Layer], values: Mapping[str, float]) -> list[Layer]:
    """The layers in the order of the rule; ``values`` are the sensitivities of their smallest candidates."""
    if problem.rule == "random":
        return random.Random(problem.seed).sample(layers, len(layers))
    keys: dict[str, Callable[[Layer], float]] = {
        "largest_first": lambda at: -problem.share(at, at.out_channels),
        "ranking": lambda at: values[at.name],
        "reverse": lambda at: -values[at.name],
        "first": lambda at: layers.index(at),
        "last": lambda at: -layers.index(at),
    }
    return sorted(layers, key=keys[problem.rule])


_SOLVERS = {"optimal": _optimal, "threshold": _threshold, "uniform": _uniform}
