"""The studies of chapters 4 and 5: their runs, what they compute from records, and their verdicts."""

import dataclasses

import filelock
import numpy as np
import pytest
from scipy import stats

from basis.experiments import runs
from basis.experiments.runs import Record
from basis.experiments.studies import STUDIES, headline, sensitivity
from basis.search.table import Cell, Layer, SensitivityTable
from basis.training.loop import TrainingPaused

SENSITIVITY, HEADLINE = STUDIES["sensitivity"], STUDIES["headline"]


def record(run, *, loss=1.0, accuracy=0.6, **result):
    """A finished run of the given outcome."""
    metrics = {"loss": loss, "accuracy": accuracy, "accuracy_flip": accuracy}
    content = {"test": metrics, "validation": metrics, "train_seconds": 1.0, "parameters": 10, **result}
    return Record(run.id, run.config, content, {"device": "test"}, "")


def sensitivities(values, measure="oneshot_bn", passes=10.0):
    """A table's lines with the given values, (layer, k) -> sensitivity."""
    shapes = sensitivity.convolutions("resnet18", 8)
    names = dict.fromkeys(name for name, _ in values)
    layers = tuple(
        Layer(
            name=name, out_channels=shapes[name], groups=1, fan_in=72, bias=0, positions=64, input_gradient=True,
            candidates=tuple(sorted((k for at, k in values if at == name), reverse=True)),
        )
        for name in names
    )  # fmt: skip
    cells = tuple(
        Cell(layer=name, basis_channels=k, value=value, kl=value, forward=passes) for (name, k), value in values.items()
    )
    table = SensitivityTable(
        measure=measure, layers=layers, cells=cells, skipped={}, fingerprint={"measure": measure}, baseline={},
        total={"params": 10000, "macs": 10000, "backward_macs": 20000},
    )  # fmt: skip
    return table.to_lines()


def comparison(predict, *, passes=10.0, noise=0.0, seeds=2):
    """Records in which layer i loses i hundredths, and every measure says ``predict(i)``."""
    runs = SENSITIVITY.runs("cpu")
    rank = {name: i for i, name in enumerate(sensitivity.convolutions("resnet18", 8))}
    random = np.random.default_rng(0)
    records = []
    for run in runs:
        variant = run.variant.removeprefix("short ")
        if run.variant == "ladder":
            values = {
                (name, k): predict(i)
                for name, i in rank.items()
                for k in sensitivity.ranks(sensitivity.convolutions("resnet18", 8)[name])
            }
            tables = {m: sensitivities(values, m, passes) for m in sensitivity.MEASURES}
            records.append(record(run, tables=tables))
        elif run.seed < seeds or variant == "dense" or run.seed >= 20:
            extra = 0 if variant == "dense" else 0.01 * (1 + rank[variant.split()[0]])
            records.append(record(run, loss=1 + extra + noise * random.normal()))
    return records


def test_the_truth_has_every_3x3_layer_at_two_ratios_and_no_seed_on_both_sides():
    runs = SENSITIVITY.runs("paper")
    cells = [run for run in runs if run.plan and not run.variant.startswith("short")]
    assert len({run.variant for run in cells}) == 17 * 2
    assert {len(run.plan) for run in cells} == {1}
    assert {run.test for run in runs} == {False}
    measured = {run.seed for run in runs if run.ladder}
    short = {run.seed for run in runs if run.variant.startswith("short")}
    assert not measured & {run.seed for run in runs if not run.ladder}
    assert not short & {run.seed for run in cells}
    first = [run.variant for run in runs[:9]]
    assert first == ["dense"] * 8 + ["ladder"]


def test_equal_plans_at_both_ratios_are_one_run():
    runs = SENSITIVITY.runs("cpu")
    narrow = [run for run in runs if run.variant.startswith("layer1.0.conv1") and run.seed == 0]
    assert [run.plan for run in narrow] == [{"layer1.0.conv1": 1}]
    records = comparison(float)
    both = [sensitivity.losses(records, ratio).layers["layer1.0.conv1"] for ratio in sensitivity.RATIOS]
    assert both[0] == both[1]
    assert len(both[0]) == 2


def test_losses_are_differences_to_dense_and_short_ones_stand_apart():
    records = comparison(float)
    truth = sensitivity.losses(records, 1 / 8)
    assert truth.truth()["conv1"] == pytest.approx(0.01)
    assert truth.truth()["layer4.1.conv2"] == pytest.approx(0.17)
    assert len(truth.dense) == 8
    assert len(sensitivity.losses(records, 1 / 8, short=True).dense) == 2


def by_seed(*values):
    return dict(enumerate(values))


def test_layers_are_compared_with_the_dense_runs_of_their_seeds():
    truth = sensitivity.Losses(by_seed(1.0, 3.0, 100.0), {"a": by_seed(1.5, 3.5), "b": by_seed(2.0, 4.0)})
    assert truth.truth() == pytest.approx({"a": 0.5, "b": 1.0})
    assert truth.estimate("a").low == pytest.approx(0.5)  # seeds differ, the layers' losses do not
    noisy = sensitivity.Losses(by_seed(0.0, 2.0), {"a": by_seed(4.0, 4.0), "b": by_seed(7.0, 7.0)})
    rest = np.array([[-2 / 3, 2 / 3], [1 / 3, -1 / 3], [1 / 3, -1 / 3]])
    spread = (np.square(rest).sum() / 2) ** 0.5
    one = noisy.estimate("a")
    assert one.value == 3
    assert one.high - one.value == pytest.approx(stats.t.ppf(0.975, 2) * spread)


def test_only_seeds_that_all_layers_have_count():
    layers = {str(i): by_seed(i, i + 5.0, i + 9.0) for i in range(5)}
    del layers["3"][0]
    truth = sensitivity.Losses(by_seed(0.0, 0.0, 0.0), layers)
    assert truth.seeds == [1, 2]
    assert sensitivity.reliability(truth) == pytest.approx(1)


def test_a_perfect_measure_correlates_perfectly_and_a_reversed_one_the_other_way():
    perfect = {row.measure: row for row in sensitivity.agreements(comparison(float))}
    assert perfect["oneshot_bn"].spearman.value == pytest.approx(1)
    assert perfect["oneshot_bn (KL)"].kendall.value == pytest.approx(1)
    assert perfect["short_training"].spearman.value == pytest.approx(1)
    reverse = {row.measure: row for row in sensitivity.agreements(comparison(lambda i: -float(i)))}
    assert reverse["oneshot_bn"].spearman.value == pytest.approx(-1)
    assert perfect["oneshot_bn"].cost == 29 * 10  # 17 layers at two ratios, 5 of them with equal k


def test_the_bootstrap_covers_what_noise_does():
    layers = {str(i): by_seed(i + 0.0, i + 0.1) for i in range(12)}
    rank = {str(i): float(i) for i in range(12)}
    truth = sensitivity.Losses({}, layers)
    exact = sensitivity.bootstrap([truth], [rank], draws=200)
    assert exact.value == pytest.approx(1)
    assert exact.low > 0.95
    shifted = sensitivity.Losses({}, {name: by_seed(one[0], one[1] + 100) for name, one in layers.items()})
    assert sensitivity.bootstrap([shifted], [rank], draws=200).low > 0.95  # a seed moves all layers alike
    random = np.random.default_rng(0)
    noise = random.normal(0, 6, (12, 2))
    noisy = sensitivity.Losses({}, {str(i): by_seed(*(i + noise[i])) for i in range(12)})
    wide = sensitivity.bootstrap([noisy], [rank], draws=500)
    assert wide.high - wide.low > 4 * (exact.high - exact.low)
    twice = sensitivity.bootstrap([noisy, noisy], [rank, rank], draws=500)
    assert (twice.low, twice.high) == pytest.approx((wide.low, wide.high))  # the same layers are no new evidence
    unrelated = sensitivity.bootstrap([truth], [{str(i): float(i * 7 % 12) for i in range(12)}], draws=200)
    assert unrelated.low < 0 < unrelated.high
    assert sensitivity.bootstrap([truth], [{}]).n == 0
    diverged = sensitivity.Losses({}, layers | {"3": by_seed(float("nan"), 3.0)})
    assert sensitivity.bootstrap([diverged], [rank], draws=50).n == 11


def test_rank_correlations_are_those_of_scipy_also_with_ties():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, (20, 9)), random.normal(size=(20, 9))
    for kind, other in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        expected = [other(x, y).statistic for x, y in zip(a, b, strict=True)]
        assert sensitivity.correlation(kind, a, b) == pytest.approx(expected)
        assert sensitivity.correlation(kind, np.ones(4), np.arange(4.0)) == 0


def test_reliability_is_the_share_that_is_not_noise():
    seeds_differ = sensitivity.Losses({}, {str(i): by_seed(i + 0.0, i + 5.0) for i in range(5)})
    assert sensitivity.reliability(seeds_differ) == pytest.approx(1)
    same = sensitivity.Losses({}, {"a": by_seed(0.0, 1.0), "b": by_seed(1.0, 0.0), "c": by_seed(0.1, 0.9)})
    assert sensitivity.reliability(same) == 0
    random = np.random.default_rng(0)
    layers = random.normal(size=400)
    runs = layers[:, None] + random.normal(size=(400, 2))
    half = sensitivity.Losses({}, {str(i): by_seed(*row) for i, row in enumerate(runs)})
    assert sensitivity.reliability(half) == pytest.approx(2 / 3, abs=0.07)


def test_the_second_truth_is_of_the_very_network_that_was_measured():
    rank = {name: i for i, name in enumerate(sensitivity.convolutions("resnet18", 8))}
    shapes = sensitivity.convolutions("resnet18", 8)
    runs = [run for run in SENSITIVITY.runs("cpu") if run.variant == "tuned"]
    assert len(runs) == 2
    assert set(runs[0].ladder.measures) == {*sensitivity.MEASURES, "fine_tuning"}
    records = []
    for run, sign in zip(runs, (1, -1), strict=True):  # what is sensitive in one is not in the other
        values = {(name, k): sign * float(i) for name, i in rank.items() for k in sensitivity.ranks(shapes[name])}
        tables = {m: sensitivities(values, m) for m in (*sensitivity.MEASURES, "fine_tuning")}
        records.append(record(run, tables=tables))
    rows = {row.measure: row for row in sensitivity.agreements(records, truth="tuned")}
    assert rows["oneshot"].spearman.value == pytest.approx(1)
    assert rows["oneshot"].spearman.n == 17
    assert "fine_tuning" not in rows


@pytest.mark.parametrize(
    ("predict", "passes", "label"),
    [
        (float, 10.0, "reproduced"),
        (float, 1000.0, "partly"),  # faithful, but too dear
        (lambda i: -float(i), 10.0, "not reproduced"),
    ],
)
def test_the_verdict_on_h1(predict, passes, label):
    (verdict,) = SENSITIVITY.verdicts(comparison(predict, passes=passes), "cpu")
    assert (verdict.claim, verdict.label) == ("H1", label)


def test_h1_is_not_tested_without_enough_runs():
    (verdict,) = SENSITIVITY.verdicts(comparison(float, seeds=1), "cpu")
    assert verdict.label == "not tested"
    lacking = [r for r in comparison(float) if not r.config["variant"].startswith("layer4")]
    (verdict,) = SENSITIVITY.verdicts(lacking, "cpu")
    assert verdict.label == "not tested"


# -- the selection --------------------------------------------------------------------------------


def trained(**accuracy):
    """Records of variants with half of the parameters: test accuracies by rule."""
    names = {rule: headline.variant(what, headline.HALF) for rule, what in headline.RULES.items()} | {"dense": "dense"}
    records = []
    for rule, values in accuracy.items():
        runs = [run for run in HEADLINE.runs("small") if run.variant == names[rule]]
        records += [record(run, accuracy=a, macs=10, curves=[]) for run, a in zip(runs, values, strict=False)]
    return records


def verdict_on_c4(**accuracy):
    (verdict,) = (v for v in HEADLINE.verdicts(trained(**accuracy), "small") if v.claim == "C4")
    return verdict


@pytest.mark.parametrize(
    ("optimal", "uniform", "label"),
    [
        ((0.7, 0.7005, 0.701), (0.6, 0.61, 0.6), "reproduced"),
        ((0.7, 0.7005, 0.701), (0.7, 0.7005, 0.701), "inconclusive"),  # as good as dense, but so is one ratio for all
        ((0.701, 0.7, 0.69), (0.6, 0.61, 0.6), "inconclusive"),  # the interval of its loss reaches beyond
        ((0.65, 0.651, 0.65), (0.6, 0.61, 0.6), "not reproduced"),  # it loses too much, but gains
        ((0.7, 0.7005, 0.701), (0.72, 0.721, 0.72), "not reproduced"),  # one ratio for all is better
    ],
)
def test_the_verdict_on_c4(optimal, uniform, label):
    verdict = verdict_on_c4(dense=(0.7, 0.7, 0.701), optimal=optimal, uniform=uniform)
    assert verdict.label == label


def test_the_finding_on_c4_names_what_else_has_as_many_parameters():
    three = {"dense": (0.7, 0.7, 0.701), "optimal": (0.701, 0.701, 0.702), "uniform": (0.6, 0.61, 0.6)}
    assert "largest" not in verdict_on_c4(**three).finding
    verdict = verdict_on_c4(**three, largest_first=(0.69, 0.69, 0.691))
    assert "+1.10 [+1.10, +1.10] over the largest layers first" in verdict.finding
    assert verdict.difference == "+0.10 points"


def test_c4_needs_three_seeds_of_each_variant():
    verdict = verdict_on_c4(dense=(0.7, 0.7, 0.7), optimal=(0.7, 0.7), uniform=(0.6, 0.6, 0.6))
    assert (verdict.label, verdict.finding) == ("not tested", "there are 2 seeds, and at least 3 are needed")
    assert verdict_on_c4(optimal=(0.7, 0.7, 0.7), uniform=(0.6, 0.6, 0.6)).finding == "no run has been made yet"


def test_the_table_comes_first_and_every_choice_refers_to_it():
    for profile in ("smoke", "small", "paper"):
        table, *others = HEADLINE.runs(profile)
        assert table.variant == "table"
        assert table.test is False
        assert {run.choice.table for run in others if run.choice} == {table.id}
        assert table.seed not in {run.seed for run in others}


def test_variants_are_listed_in_the_order_of_the_plan_and_the_table_is_none_of_them():
    planned = HEADLINE.runs("small")
    records = [record(run, macs=10, curves=[]) for run in reversed(planned) if run.test is not False]
    names = list(dict.fromkeys(headline.frame(records)["variant"]))
    assert names == list(dict.fromkeys(run.variant for run in planned[1:]))
    untested = record(planned[0], macs=10, curves=[], test=None)
    assert len(headline.frame([untested, *records])) == len(records)


def test_a_choice_without_its_table_waits(tmp_path):
    run = next(run for run in HEADLINE.runs("smoke") if run.choice)
    with pytest.raises(runs.TableMissing, match="has to measure the sensitivities first"):
        runs.choose(run.choice, tmp_path)


def put_table(folder, definition):
    table_run, *others = HEADLINE.runs("small")
    values = {(name, k): 0.1 for name, c in sensitivity.convolutions("resnet18", 8).items() for k in (c // 2, c // 4)}
    made = record(table_run, tables={"oneshot_bn": sensitivities(values)})
    path = runs.record_path(folder, table_run)
    runs.write_json(path, {"version": runs.VERSION, **dataclasses.asdict(made), "definition": definition})
    return next(run.choice for run in others if run.choice)


def test_a_choice_reads_the_table_of_its_own_definition(tmp_path):
    choice = dataclasses.replace(put_table(tmp_path, "old"), budget=0.9)
    plan, told = runs.choose(choice, tmp_path, "old")
    assert plan.layers
    assert told["params"] <= 0.9
    with pytest.raises(runs.TableMissing):
        runs.choose(choice, tmp_path, "new")


def test_a_choice_waits_for_its_table_but_not_beyond_the_deadline(tmp_path):
    choice = put_table(tmp_path, "new")
    path = runs.record_path(tmp_path, HEADLINE.runs("small")[0])
    path.unlink()
    lock = filelock.FileLock(path.with_suffix(".lock"), thread_local=False)
    with lock, pytest.raises(TrainingPaused, match="while waiting"):
        runs.choose(choice, tmp_path, "new", should_stop=lambda: True)
