"""The study of chapter 4: its runs, what it computes from records, and its verdict; how a choice finds its table."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from torch import nn

from basis.experiments import execution
from basis.experiments.records import Record, write_record
from basis.experiments.runs import record_path
from basis.experiments.studies import STUDIES, sensitivity
from basis.models import build
from basis.plan import Plan
from basis.search.table import Cell, Layer, SensitivityTable

SENSITIVITY, HEADLINE = STUDIES["sensitivity"], STUDIES["headline"]
SHAPES = {n: m.out_channels for n, m in build("resnet18", width=16).named_modules() if isinstance(m, nn.Conv2d)}
RANK = {name: i for i, name in enumerate(SHAPES)}


def record(run, *, loss=1.0, accuracy=0.6, **result):
    """A finished run of the given outcome."""
    metrics = {"loss": loss, "accuracy": accuracy, "accuracy_flip": accuracy}
    content = {"test": metrics, "validation": metrics, "train_seconds": 1.0, "parameters": 10, **result}
    return Record(run.id, run.config, content, {"device": "test"}, "")


def sensitivities(values, measure="oneshot_bn", passes=10.0):
    """A table's lines with the given values, (layer, k) -> sensitivity."""
    layers = tuple(
        Layer(
            name=name, out_channels=SHAPES[name], groups=1, fan_in=72, bias=0, positions=64, input_gradient=True,
            candidates=tuple(sorted((k for at, k in values if at == name), reverse=True)),
        )
        for name in dict.fromkeys(name for name, _ in values)
    )  # fmt: skip
    cells = tuple(
        Cell(layer=name, basis_channels=k, value=value, kl=value, forward=passes) for (name, k), value in values.items()
    )
    table = SensitivityTable(
        measure=measure, layers=layers, cells=cells, skipped={}, fingerprint={"measure": measure}, baseline={},
        total={"params": 10000, "macs": 10000, "backward_macs": 20000},
    )  # fmt: skip
    return table.to_lines()


def networks(said, lost=float, *, profile="small", count=None, passes=2050.0):
    """Records in which fine-tuning leaves ``lost(i)`` of layer i, and every measure says ``said(i)``."""
    records = []
    for run in SENSITIVITY.runs(profile)[:count]:
        tables = {}
        for measure in run.ladder.measures:
            of = lost if measure == "fine_tuning" else said
            values = {(name, round(r * c)): of(RANK[name]) for name, c in SHAPES.items() for r in sensitivity.RATIOS}
            tables[measure] = sensitivities(values, measure, passes)
        records.append(record(run, tables=tables))
    return records


def frame(values):
    """Means as agreement takes them: rows of ratios, columns of layers."""
    return pd.DataFrame(np.atleast_2d(values))


def truths(values):
    """Cells of the truth alone, from (networks, ratios, layers)."""
    rows = [
        (network, "fine_tuning", ratio, i, values[network, ratio, i]) for network, ratio, i in np.ndindex(values.shape)
    ]
    return pd.DataFrame(rows, columns=sensitivity.COLUMNS[:-1])


@pytest.mark.parametrize(("profile", "count"), [("small", 5), ("paper", 4)])
def test_networks_of_their_own_are_cut_to_two_sizes_in_every_layer(profile, count):
    runs = SENSITIVITY.runs(profile)
    assert len(runs) == count
    assert not {run.seed for run in runs} & {run.seed for run in HEADLINE.runs(profile)}
    assert {run.test for run in runs} == {False}
    assert {run.ladder.tuning.epochs for run in runs} == {1}
    network = build(runs[0].model, width=runs[0].width)
    first, second = (Plan.uniform(network, ratio=r, multiple=1).layers for r in runs[0].ladder.measures["fine_tuning"])
    assert len(first) == len(second) == 20
    assert all(first[name] > second[name] for name in first)


def test_measures_are_means_over_the_networks_and_pay_for_their_passes():
    rows = sensitivity.agreements(sensitivity.cells(networks(float))).set_index("measure")
    assert list(rows.index[:2]) == ["size", "spectrum"]
    assert rows.loc["oneshot_bn", "spearman"].value == pytest.approx(1)
    assert rows.loc["oneshot_bn", "cost"] == pytest.approx(2 * len(SHAPES) * 2050 / (3 * 45000 * 16))
    records = networks(float, count=1) + networks(lambda i: -3.0 * i)[1:2]
    one, both = (sensitivity.cells(records[:n]) for n in (1, 2))
    assert list(sensitivity.means(both, "oneshot").iloc[0, :2]) == [0.0, -1.0]
    assert sensitivity.agreement(*(sensitivity.means(one, m) for m in ("fine_tuning", "oneshot"))).value == 1


def test_what_diverged_in_one_network_is_left_out():
    records = networks(float, count=1) + networks(float, lambda i: np.nan if i == 3 else i)[1:2]
    found = sensitivity.cells(records)
    assert sensitivity.agreements(found)["spearman"].iloc[1].n == len(SHAPES) - 1
    assert sensitivity.ceiling(found) == pytest.approx(1)


def test_rank_correlations_are_those_of_scipy_also_with_ties():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, (20, 9)), random.normal(size=(20, 9))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert sensitivity.correlation(a, b) == pytest.approx(expected)
    assert sensitivity.correlation(np.ones(4), np.arange(4.0)) == 0


def test_the_interval_is_wide_where_layers_disagree_and_a_difference_is_paired_by_layer():
    random = np.random.default_rng(0)
    truth = np.arange(20.0)
    near, far = (frame(truth + spread * random.normal(size=20)) for spread in (1, 12))
    close, wide = (sensitivity.agreement(frame(truth), one) for one in (near, far))
    assert close.low > 0.9
    assert wide.high - wide.low > 4 * (close.high - close.low)
    assert sensitivity.agreement(frame(truth), near, far).value == pytest.approx(close.value - wide.value)
    same = sensitivity.agreement(frame(truth), far, far + 1)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    assert sensitivity.agreement(frame(truth[:3]), near).n == 0


def simulated(true, seed):
    """(5 networks, 2 ratios, 20 layers) of a truth with noise, and of a measure that correlates by about ``true``."""
    random = np.random.default_rng(seed)
    lost, off = random.normal(size=(2, 20))
    own = 0.4 * random.normal(size=(5, 1, 20))  # a network's own, which the measure sees, too
    noise = 0.3 * random.normal(size=(2, 5, 2, 20))
    return lost + own + noise[0], lost + (1 / true**2 - 1) ** 0.5 * off + own + noise[1]


@pytest.mark.parametrize(("true", "label"), [(0.97, "above"), (0.15, "below")])
def test_twenty_layers_and_five_networks_can_tell(true, label):
    told = []
    for truth, said in (simulated(true, seed) for seed in range(12)):
        goal = sensitivity.FACTOR * sensitivity.ceiling(truths(truth))
        found = sensitivity.agreement(frame(truth.mean(0)), frame(said.mean(0)))
        told.append("above" if found.low > goal else "below" if found.high < goal else "open")
    assert told.count(label) >= 9


def test_the_ceiling_is_what_a_perfect_measure_reaches():
    reached, bound = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        lost = random.normal(size=20)
        truth = lost + random.normal(size=(5, 1, 20))
        bound.append(sensitivity.ceiling(truths(truth)))
        reached.append(stats.spearmanr(lost, truth.mean((0, 1))).statistic)
    assert np.mean(bound) == pytest.approx(np.mean(reached), abs=0.03)


@pytest.mark.parametrize(
    ("said", "options", "label"),
    [
        (float, {}, "reproduced"),
        (float, {"passes": 5000.0}, "not reproduced"),  # faithful, but too dear
        (lambda i: -float(i), {}, "not reproduced"),
        (lambda i: float((i * 5) % 17 if i > 7 else i), {}, "inconclusive"),
        (float, {"count": 3}, "not tested"),
    ],
)
def test_the_verdict_on_h1(said, options, label):
    (verdict,) = SENSITIVITY.verdicts(networks(said, **options), "small")
    assert (verdict.claim, verdict.label, verdict.n) == ("H1", label, options.get("count", 5))
    assert verdict.change


def test_a_choice_keeps_its_budget_by_the_table_that_a_record_holds(tmp_path):
    table, *others = HEADLINE.runs("small")
    choice = dataclasses.replace(next(run.choice for run in others if run.choice), budget=0.9)
    values = {(name, k): 0.1 for name, c in SHAPES.items() for k in (c // 2, c // 4)}
    write_record(record_path(tmp_path, table), record(table, tables={"oneshot_bn": sensitivities(values)}))
    plan, told = execution.choose(choice, tmp_path)
    assert plan.layers
    assert told["params"] <= 0.9
