import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, milp

import basis
from basis.bench.report import BenchReport
from basis.models import build
from basis.search.selection import RULES, InfeasibleBudget, predicted, select
from basis.search.sensitivity import sensitivity
from basis.search.table import Cell, Layer, SensitivityTable
from basis.substitution import Plan, substitute

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("resnet20", width=8)


@pytest.fixture(scope="module")
def table(network):
    data = [(torch.randn(8, *SIZE), torch.arange(8))]
    return sensitivity(network, data, measure="activation", multiple=1)


def random_table(seed, layers=5, most=4, lowest=-0.2):
    """Made-up layers and sensitivities, some of them negative."""
    draw = np.random.default_rng(seed)
    made, cells = [], []
    for i in range(layers):
        width = int(draw.choice([8, 16, 24]))
        ks = sorted(draw.choice(np.arange(1, width), size=int(draw.integers(0, most)), replace=False), reverse=True)
        made.append(
            Layer(
                name=f"conv{i}", out_channels=width, groups=1, fan_in=9 * int(draw.integers(3, 20)), bias=0,
                positions=int(draw.choice([4, 16, 64])), input_gradient=i > 0, candidates=tuple(map(int, ks)),
            )
        )  # fmt: skip
        cells += [Cell(layer=f"conv{i}", basis_channels=int(k), value=float(draw.uniform(lowest, 1))) for k in ks]
    rest = {"params": 500, "macs": 10_000, "backward_macs": 20_000}
    total = {unit: rest[unit] + sum(layer.cost(layer.out_channels)[unit] for layer in made) for unit in rest}
    return SensitivityTable(
        measure="taylor", layers=tuple(made), cells=tuple(cells), skipped={"odd": "depthwise: one filter per group"},
        total=total, fingerprint={}, baseline={},
    )  # fmt: skip


def used(table, chosen, unit):
    saved = (
        at.cost(at.out_channels)[unit] - at.cost(chosen[at.name])[unit] for at in table.layers if at.name in chosen
    )
    return table.total[unit] - sum(saved)


def best_of_all(table, limits):
    """The smallest sum of sensitivities within absolute limits, by trying everything; None where there is none."""
    values = {(cell.layer, cell.basis_channels): cell.value for cell in table.cells}
    sums = []
    for ks in itertools.product(*((at.out_channels, *at.candidates) for at in table.layers)):
        chosen = {at.name: k for at, k in zip(table.layers, ks, strict=True) if k < at.out_channels}
        if all(used(table, chosen, unit) <= limit for unit, limit in limits.items()):
            sums.append(sum(values[at] for at in chosen.items()))
    return min(sums, default=None)


def latency_of(table, ms, passes=("forward", "forward+backward"), candidates=None):
    """A latency report with the times that ``ms`` gives; forward takes a third."""
    rows = []
    for at, one in itertools.product(table.layers, passes):
        part = 1 if one == "forward+backward" else 1 / 3
        shared = {"layer": at.name, "pass": one, "dense_ms": ms(at, at.out_channels) * part}
        rows.append({**shared, "mode": "control", "basis_channels": at.out_channels, "ms": 77.0})
        for k in candidates(at) if candidates else at.candidates:
            rows.append({**shared, "mode": "auto", "basis_channels": k, "ms": ms(at, k) * part})
    return BenchReport(kind="bench-latency", config={}, environment={}, rows=rows)


def with_cells(table, cells):
    return SensitivityTable(**{**vars(table), "cells": tuple(cells)})


def test_the_largest_come_first(table):
    for unit in ("params", "macs"):
        size = {at.name: at.cost(at.out_channels)[unit] for at in table.layers}
        found = set(select(table, budget={unit: 0.8}, rule="largest_first").layers)
        assert 0 < len(found) < len(size)
        assert found == set(sorted(size, key=lambda name: -size[name])[: len(found)])


def test_what_saves_nothing_is_passed_over():
    table = random_table(0, layers=3)
    wide = Layer(  # k above the fan-in costs more than the dense layer
        name="wide", out_channels=64, groups=1, fan_in=27, bias=0, positions=4, input_gradient=False, candidates=(32,)
    )
    more = {unit: table.total[unit] + wide.cost(64)[unit] for unit in table.total}
    cells = (Cell(layer="wide", basis_channels=32, value=-9.0), *table.cells)
    table = SensitivityTable(**{**vars(table), "layers": (wide, *table.layers), "cells": cells, "total": more})
    for rule in ("optimal", "largest_first"):
        assert "wide" not in select(table, budget={"params": 0.9}, rule=rule).layers
    assert "wide" not in select(table, budget={"params": 1.0}).layers  # though it is said to gain


@pytest.mark.parametrize("rule", RULES)
def test_an_infeasible_budget_names_the_smallest(rule, table):
    with pytest.raises(InfeasibleBudget, match="the smallest that can be met is") as caught:
        select(table, budget={"params": 0.01}, rule=rule)
    fraction = caught.value.fractions["params"]
    number = round(fraction * table.total["params"])
    assert fraction == number / table.total["params"]
    assert f"({number:,})" in str(caught.value)
    assert f"rule {rule!r} meets a budget of 0.01 of the params" in str(caught.value)
    plan = select(table, budget=caught.value.fractions, rule=rule)
    assert used(table, plan.layers, "params") == number
    printed = float(str(caught.value).split("met is ")[1].split()[0])
    assert select(table, budget={"params": printed}, rule=rule).layers
    with pytest.raises(InfeasibleBudget):
        select(table, budget={"params": (number - 1) / table.total["params"]}, rule=rule)


def test_nothing_to_choose_from(table):
    bare = with_cells(
        table, [Cell(layer=c.layer, basis_channels=c.basis_channels, value=math.nan) for c in table.cells]
    )
    for rule in RULES:
        plan = select(bare, budget={"params": 1.0}, rule=rule, exclude="layer2*")
        assert not plan.layers
    assert plan.skipped["conv1"] == "kept dense by the selection; not finite at 4, 2"
    assert plan.skipped["layer2.0.conv1"] == "excluded by 'layer2*'"
    with pytest.raises(InfeasibleBudget, match=r"met is 1 of the params"):
        select(bare, budget={"params": 0.9})


def linear_ms(at, k):
    return at.cost(at.out_channels)["macs"] * 1e-6 * (k + 2) / (at.out_channels + 1)


def test_a_budget_in_milliseconds(table):
    report = latency_of(table, linear_ms)
    total = sum(linear_ms(at, at.out_channels) for at in table.layers)
    for rule in ("optimal", "uniform", "largest_first"):
        plan = select(table, budget={"milliseconds": 0.6}, rule=rule, latency=report)
        spent = sum(linear_ms(at, plan.layers.get(at.name, at.out_channels)) for at in table.layers)
        assert spent <= 0.6 * total
        assert predicted(table, plan, report)["milliseconds"] == pytest.approx(spent / total)
        both = select(table, budget={"milliseconds": 0.6, "params": 0.5}, rule=rule, latency=report)
        assert max(predicted(table, both, report)[u] / b for u, b in (("milliseconds", 0.6), ("params", 0.5))) <= 1


def test_only_what_was_timed_is_chosen(table):
    report = latency_of(table, linear_ms, candidates=lambda at: {*at.candidates, at.out_channels - 1})
    plan = select(table, budget={"milliseconds": 0.99}, rule="largest_first", latency=report)
    assert plan.layers == {"layer1.0.conv1": 4}  # the dense layer would be too slow, and 7 too
    timed = {(row["layer"], row["basis_channels"]) for row in report.rows}
    for budget in np.linspace(0.5, 0.95, 10):
        for rule in ("uniform", "largest_first"):
            plan = select(table, budget={"milliseconds": budget}, rule=rule, latency=report)
            assert set(plan.layers.items()) <= timed
    assert math.isnan(predicted(table, Plan({"conv1": 3}), report)["milliseconds"])


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_trying_everything(seed):
    table = random_table(seed)
    draw = np.random.default_rng(seed)
    units = [("params",), ("macs",), ("backward_macs",), ("params", "macs"), ("params", "macs", "backward_macs")]
    budget = {unit: float(draw.uniform(0.4, 1)) for unit in units[seed % 5]}
    best = best_of_all(table, {unit: part * table.total[unit] for unit, part in budget.items()})
    if best is None:
        with pytest.raises(InfeasibleBudget) as caught:
            select(table, budget=budget)
        limits = {unit: part * (1 + 1e-9) * table.total[unit] for unit, part in caught.value.fractions.items()}
        assert best_of_all(table, limits) is not None
        assert select(table, budget=caught.value.fractions).layers
    else:
        plan = select(table, budget=budget)
        assert predicted(table, plan)["sensitivity"] == pytest.approx(best, abs=1e-12)
        assert all(predicted(table, plan)[unit] <= part + 1e-12 for unit, part in budget.items())


@pytest.mark.parametrize("seed", [1, 4])
def test_an_optimiser_that_is_not_exact_is_put_right(seed, monkeypatch):
    asked = []

    def sloppy(values, *, constraints, **options):
        asked.append(len(constraints))
        loose = [LinearConstraint(c.A, lb=c.lb - 300 * (np.max(c.lb) > 1), ub=c.ub) for c in constraints]
        return milp(values, constraints=loose, **options)

    table = random_table(seed, layers=6)
    budget = {"params": 0.85, "macs": 0.85}
    limits = {unit: part * table.total[unit] for unit, part in budget.items()}
    best = best_of_all(table, limits)
    monkeypatch.setattr("scipy.optimize.milp", sloppy)
    plan = select(table, budget=budget)
    assert predicted(table, plan)["sensitivity"] == pytest.approx(best, abs=1e-12)
    assert all(used(table, plan.layers, unit) <= limit for unit, limit in limits.items())
    assert asked == list(range(2, 2 + len(asked)))  # each time one constraint more


@pytest.mark.parametrize("rule", RULES)
def test_plans_apply_and_meet_the_budget(rule, network, table):
    for unit in ("params", "backward_macs"):
        plan = select(table, budget={unit: 0.55}, rule=rule, exclude="conv1")
        report = basis.cost(substitute(network, plan, init="random"), SIZE).total
        sizes = {"params": report.parameters, "backward_macs": report.backward_macs}
        assert sizes[unit] <= 0.55 * table.total[unit]
        assert predicted(table, plan)[unit] == pytest.approx(sizes[unit] / table.total[unit])
        assert plan.skipped["conv1"] == "excluded by 'conv1'"
        assert list(plan.layers) == [at.name for at in table.layers if at.name in plan.layers]


def test_largest_first_ends_at_the_last_candidate_that_meets_the_budget(table):
    plan = select(table, budget={"params": 0.7}, rule="largest_first")
    limit, width = 0.7 * table.total["params"], {at.name: at.out_channels for at in table.layers}
    raised = [at.name for at in table.layers if plan.layers.get(at.name, 0) > min(at.candidates)]
    assert len(raised) <= 1
    for name in raised:  # one multiple more would be too much; all candidates are multiples of 2
        k = plan.layers[name] + 2
        assert k == width[name] or used(table, {**plan.layers, name: k}, "params") > limit
    # Without the last one the budget would not be met.
    assert any(used(table, {n: k for n, k in plan.layers.items() if n != out}, "params") > limit for out in plan.layers)


@pytest.mark.parametrize("budget", [0.3, 0.75])
def test_uniform_is_the_largest_common_ratio(budget, network, table):
    plan = select(table, budget={"params": budget}, rule="uniform")
    # Widths are 8, 16 and 32: every k changes at a multiple of 1/32 only.
    for ratio in (np.arange(32)[::-1] + 0.5) / 32:
        found = Plan.uniform(network, ratio=float(ratio), multiple=2).layers
        if used(table, found, "params") <= budget * table.total["params"]:
            break
    assert plan.layers == found


def test_the_threshold_takes_all_that_lose_less_than_the_smallest_epsilon(table):
    values = table.values

    def under(epsilon):
        allowed = {at.name: [k for k in at.candidates if values[at.name, k] <= epsilon] for at in table.layers}
        return {name: min(ks) for name, ks in allowed.items() if ks}

    plans = [under(epsilon) for epsilon in sorted(values.values())]
    expected = next(plan for plan in plans if used(table, plan, "macs") <= 0.6 * table.total["macs"])
    assert select(table, budget={"macs": 0.6}, rule="threshold").layers == expected


def test_a_ratio_leaves_one_candidate_to_each_layer(table):
    plan = select(table, budget={"params": 0.7}, ratio=0.5)
    widths = {at.name: at.out_channels for at in table.layers}
    assert {k / widths[name] for name, k in plan.layers.items()} == {0.5}


def test_a_latency_report_that_does_not_fit_is_refused(table):
    report = latency_of(table, linear_ms)
    name, budget = table.layers[3].name, {"milliseconds": 0.7}
    without = [r for r in report.rows if r["layer"] != name]
    some = [r for r in report.rows if (r["layer"], r["basis_channels"]) != (name, 4)]
    stem = [*report.rows, *({**r, "layer": "stem"} for r in report.rows[:6])]
    twice = [{**r, "basis_channels": 2 * r["basis_channels"]} for r in report.rows]
    cases = [(some, {}, f"lacks {name} with k = 4"), (stem, {}, "another network.*stem")]
    cases += [(twice, {}, "another network"), (report.rows, {"macs": table.total["macs"] + 1}, "other MACs")]
    for rows, config, says in cases:
        changed = dataclasses.replace(report, rows=rows, config=config)
        with pytest.raises(ValueError, match=says):
            select(table, budget=budget, latency=changed)
    assert select(table, budget=budget, latency=dataclasses.replace(report, rows=without), exclude=name).layers


def test_predictions_interpolate_between_measured_candidates():
    at = Layer(
        name="a", out_channels=16, groups=1, fan_in=36, bias=0, positions=None, input_gradient=True, candidates=(8, 4)
    )
    cells = (Cell(layer="a", basis_channels=8, value=1.0), Cell(layer="a", basis_channels=4, value=3.0))
    table = SensitivityTable(
        measure="spectrum", layers=(at,), cells=cells, skipped={}, baseline={}, fingerprint={},
        total={"params": 1000, "macs": None, "backward_macs": None},
    )  # fmt: skip
    found = {k: predicted(table, Plan({"a": k}))["sensitivity"] for k in (4, 6, 8, 12, 16)}
    assert found == {4: 3, 6: 2, 8: 1, 12: 0.5, 16: 0}
    assert math.isnan(predicted(table, Plan({"a": 3}))["sensitivity"])
    whole = predicted(table, Plan({"a": 8}))
    assert whole["params"] == 1 - (16 * 36 - 8 * 36 - 64) / 1000
    assert math.isnan(whole["macs"])
    for plan, says in (({"b": 4}, "names 'b'"), ({"a": 17}, "basis_channels is 17")):
        with pytest.raises(ValueError, match=says):
            predicted(table, Plan(plan))
    with pytest.raises(ValueError, match="knows no macs"):
        select(table, budget={"macs": 0.5})


@pytest.mark.parametrize("rule", RULES)
def test_numbers_of_numpy_are_numbers(rule, table, tmp_path):
    plan = select(table, budget={"params": np.float32(0.5)}, rule=rule)
    assert plan == select(table, budget={"params": 0.5}, rule=rule)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_belongs_to_the_network_that_was_measured(table):
    plan = select(table, budget={"params": 0.5})
    with pytest.raises(ValueError, match="another model: C_out of"):
        substitute(build("resnet20", width=16), plan)
    with pytest.raises(ValueError, match="no convolution of the model"):
        substitute(build("resnet18", width=8), plan)
    name = next(iter(plan.layers))
    with pytest.raises(ValueError, match=f"{name}.* has C_out = 99"):
        predicted(table, Plan(plan.layers, out_channels={name: 99}))


REPORT = BenchReport(kind="", config={}, environment={}, rows=[])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": {}}, "budget is {}"), ({"budget": 0.5}, "budget is 0.5"), ({"budget": {"size": 0.5}}, "budget is"),
        ({"budget": {"params": 0}}, "budget of params is 0"), ({"budget": {"params": 1.5}}, "budget of params is 1.5"),
        ({"budget": {"params": math.nan}}, "budget of params is nan"),
        ({"budget": {"milliseconds": 0.5}}, "go together"), ({"latency": REPORT}, "go together"),
        ({"rule": "best"}, "rule is 'best'"), ({"rule": "uniform", "ratio": 0.5}, "leave out ratio"),
        ({"ratio": 1.5}, "ratio is 1.5"), ({"exclude": ["conv1", "fc"]}, "exclude has 'fc'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, says, table):
    with pytest.raises(ValueError, match=says):
        select(table, **{"budget": {"params": 0.5}, **options})
