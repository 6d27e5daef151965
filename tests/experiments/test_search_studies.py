"""The study of chapter 4: its runs, what it computes from records, and its verdict; how a choice finds its table."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from basis.experiments import execution
from basis.experiments.records import Record, write_record
from basis.experiments.runs import record_path
from basis.experiments.studies import STUDIES, sensitivity
from basis.search.table import Cell, Layer, SensitivityTable

SENSITIVITY, HEADLINE = STUDIES["sensitivity"], STUDIES["headline"]
SHAPES = sensitivity.convolutions("resnet18", 8)
RANK = {name: i for i, name in enumerate(SHAPES)}


def by_seed(*values):
    return dict(enumerate(values))


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


def measured(run, predict, passes=10.0):
    """The record of a ladder whose measures all say ``predict(i)`` of layer i."""
    said = {(name, k): predict(i) for name, i in RANK.items() for k in sensitivity.ranks(SHAPES[name])}
    return record(run, tables={m: sensitivities(said, m, passes) for m in run.ladder.measures})


def comparison(predict, *, passes=10.0, seeds=2):
    """Records in which layer i loses i hundredths, and every measure says ``predict(i)``."""
    records = []
    for run in SENSITIVITY.runs("cpu"):
        variant = run.variant.removeprefix("short ")
        if run.variant == "ladder":
            records.append(measured(run, predict, passes))
        elif run.ladder is None and (run.seed < seeds or variant == "dense" or run.seed >= 20):
            extra = 0 if variant == "dense" else 0.01 * (1 + RANK[variant.split()[0]])
            records.append(record(run, loss=1 + extra))
    return records


def test_the_truth_has_every_3x3_layer_at_two_ratios_and_no_seed_on_both_sides():
    listed = SENSITIVITY.runs("paper")
    alone = [run for run in listed if run.plan and not run.variant.startswith("short")]
    assert len({run.variant for run in alone}) == 17 * 2
    assert {len(run.plan) for run in alone} == {1}
    assert {run.test for run in listed} == {False}
    assert not {run.seed for run in listed if run.ladder} & {run.seed for run in listed if not run.ladder}
    assert not {run.seed for run in listed if run.variant.startswith("short")} & {run.seed for run in alone}
    assert [run.variant for run in listed[:9]] == ["dense"] * 8 + ["ladder"]


def test_layers_are_compared_with_the_dense_runs_of_the_seeds_that_all_have():
    truth = sensitivity.Losses(by_seed(1.0, 3.0, 100.0), {"a": by_seed(1.5, 3.5), "b": by_seed(2.0, 4.0)})
    assert truth.truth() == pytest.approx({"a": 0.5, "b": 1.0})
    assert truth.estimate("a").low == pytest.approx(0.5)  # seeds differ, the layers' losses do not
    noisy = sensitivity.Losses(by_seed(0.0, 2.0), {"a": by_seed(4.0, 4.0), "b": by_seed(7.0, 7.0)})
    spread = (np.square([[-2 / 3, 2 / 3], [1 / 3, -1 / 3], [1 / 3, -1 / 3]]).sum() / 2) ** 0.5
    one = noisy.estimate("a")
    assert one.high - one.value == pytest.approx(stats.t.ppf(0.975, 2) * spread)


def test_a_perfect_measure_correlates_perfectly_and_a_reversed_one_the_other_way():
    perfect = {row.measure: row for row in sensitivity.agreements(comparison(float))}
    assert perfect["oneshot_bn"].spearman.value == pytest.approx(1)
    assert perfect["oneshot_bn (KL)"].spearman.value == pytest.approx(1)
    assert perfect["short_training"].spearman.value == pytest.approx(1)
    assert perfect["oneshot_bn"].cost == 29 * 10  # 17 layers at two ratios, 5 of them with equal k
    reverse = {row.measure: row for row in sensitivity.agreements(comparison(lambda i: -float(i)))}
    assert reverse["oneshot_bn"].spearman.value == pytest.approx(-1)


def test_the_bootstrap_covers_what_noise_does():
    layers, rank = {str(i): by_seed(i + 0.0, i + 0.1) for i in range(12)}, {str(i): float(i) for i in range(12)}
    truth = sensitivity.Losses({}, layers)
    exact = sensitivity.bootstrap([truth], [rank], draws=200)
    assert (exact.value, exact.low > 0.95) == (pytest.approx(1), True)
    shifted = sensitivity.Losses({}, {name: by_seed(one[0], one[1] + 100) for name, one in layers.items()})
    assert sensitivity.bootstrap([shifted], [rank], draws=200).low > 0.95  # a seed moves all layers alike
    noise = np.random.default_rng(0).normal(0, 6, (12, 2))
    noisy = sensitivity.Losses({}, {str(i): by_seed(*(i + noise[i])) for i in range(12)})
    wide, twice = (sensitivity.bootstrap([noisy] * n, [rank] * n, draws=500) for n in (1, 2))
    assert wide.high - wide.low > 4 * (exact.high - exact.low)
    assert (twice.low, twice.high) == pytest.approx((wide.low, wide.high))  # the same layers are no new evidence
    assert sensitivity.bootstrap([truth], [{}]).n == 0
    diverged = sensitivity.Losses({}, layers | {"3": by_seed(float("nan"), 3.0)})
    assert sensitivity.bootstrap([diverged], [rank], draws=50).n == 11


def test_rank_correlations_are_those_of_scipy_also_with_ties():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, (20, 9)), random.normal(size=(20, 9))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert sensitivity.correlation(a, b) == pytest.approx(expected)
    assert sensitivity.correlation(np.ones(4), np.arange(4.0)) == 0


def test_reliability_is_the_share_that_is_not_noise():
    layers = {str(i): by_seed(i, i + 5.0, i + 9.0) for i in range(5)}
    del layers["3"][0]  # the others are compared without this seed, too
    assert sensitivity.reliability(sensitivity.Losses({}, layers)) == pytest.approx(1)


def test_the_second_truth_is_of_the_very_network_that_was_measured():
    tuned = [run for run in SENSITIVITY.runs("cpu") if run.variant == "tuned"]
    first, second = tuned  # what is sensitive in one is not in the other
    records = [measured(first, float), measured(second, lambda i: -float(i))]
    rows = {row.measure: row for row in sensitivity.agreements(records, truth="tuned")}
    assert (rows["oneshot"].spearman.value, rows["oneshot"].spearman.n) == (pytest.approx(1), 17)
    assert "fine_tuning" not in rows


@pytest.mark.parametrize(
    ("predict", "options", "label"),
    [
        (float, {}, "reproduced"),
        (float, {"passes": 1000.0}, "partly"),  # faithful, but too dear
        (lambda i: -float(i), {}, "not reproduced"),
        (float, {"seeds": 1}, "not tested"),
    ],
)
def test_the_verdict_on_h1(predict, options, label):
    records = comparison(predict, **options)
    (verdict,) = SENSITIVITY.verdicts(records, "cpu")
    assert (verdict.claim, verdict.label) == ("H1", label)


def test_a_choice_keeps_its_budget_by_the_table_that_a_record_holds(tmp_path):
    table, *others = HEADLINE.runs("small")
    choice = dataclasses.replace(next(run.choice for run in others if run.choice), budget=0.9)
    values = {(name, k): 0.1 for name, c in SHAPES.items() for k in (c // 2, c // 4)}
    write_record(record_path(tmp_path, table), record(table, tables={"oneshot_bn": sensitivities(values)}))
    plan, told = execution.choose(choice, tmp_path)
    assert plan.layers
    assert told["params"] <= 0.9
