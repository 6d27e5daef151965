"""The studies of chapters 6, 7 and 8: their runs, what they compute from records, and their verdicts."""

import dataclasses
import itertools
import math

import pytest
import torch

from basis import substitute
from basis.bench.networks import TRAINED
from basis.bench.report import BenchReport
from basis.costs import count_parameters
from basis.experiments.runs import execute, load_records, work
from basis.experiments.studies import STUDIES, coefficients, family, skip
from basis.models import build
from basis.statistics import difference_estimate, pooled_spread
from basis.training.skipping import Trained
from tests.experiments.test_search_studies import record

COEFFICIENTS, SKIP, FAMILY = STUDIES["coefficients"], STUDIES["skip"], STUDIES["family"]
NOISE = (-0.001, 0.001, 0.0005)  # what the seeds 0, 1, 2 add to an accuracy


def outcomes(study, accuracy, *, profile="cpu", **result):
    """Records of all runs of a profile; ``accuracy`` and what else the result holds are functions of a run."""
    return [
        record(run, accuracy=accuracy(run) + NOISE[run.seed % 3], **{k: f(run) for k, f in result.items()})
        for run in study.runs(profile)
    ]


@pytest.mark.parametrize("study", [COEFFICIENTS, SKIP, FAMILY], ids=lambda study: study.name)
@pytest.mark.parametrize("profile", ["smoke", "cpu", "colab", "paper"])
def test_no_run_is_listed_twice_and_seeds_are_alike_in_all_arms(study, profile):
    runs = study.runs(profile)
    assert len({run.id for run in runs}) == len(runs) == len({(run.variant, run.seed) for run in runs})
    dense = {run.seed for run in runs if run.seed < 100}
    assert dense == set(range(max(dense) + 1))


# -- coefficients ------------------------------------------------------------------------------------------


def test_every_form_is_trained_at_both_ratios_with_equal_numbers_of_basis_filters():
    runs = [run for run in COEFFICIENTS.runs("paper") if run.ratio and run.recipe.decay is None]
    kinds = {(run.coefficients.partition(":")[0], run.ratio) for run in runs}
    assert kinds == set(itertools.product(coefficients.NAMES, (0.5, 0.25)))


@pytest.mark.parametrize("form", ["low_rank:1/8", "grouped:4", "sparse:1/8", "shared", "frozen", "repeat"])
def test_at_equal_size_the_freed_parameters_are_spent_on_basis_filters(form):
    dense = build("resnet18", width=16)
    target = count_parameters(substitute(dense, ratio=0.25, init="random"))
    before = count_parameters(substitute(dense, ratio=0.25, init="random", coefficients=form))
    layers = coefficients.matched_plan("resnet18", 16, 0.25, form)
    after = count_parameters(substitute(dense, layers, init="random", coefficients=form))
    assert before < after <= target
    assert after > 0.97 * target


def forms(accuracy, **changes):
    size = {"dense": 1000, "low_rank": 940, "grouped": 990, "sparse": 945, "shared": 960, "frozen": 900, "repeat": 900}

    def kind(run):
        return run.coefficients.partition(":")[0] if run.coefficients else "dense"

    sizes = {**size, **changes}
    return outcomes(
        COEFFICIENTS, lambda run: accuracy.get(kind(run), 0.6), parameters=lambda run: sizes[kind(run)],
        macs=lambda run: 5000,
    )  # fmt: skip


def test_c5_is_reproduced_when_a_smaller_form_loses_nothing():
    (verdict,) = COEFFICIENTS.verdicts(forms({"dense": 0.60, "low_rank": 0.61}), "cpu")
    assert verdict.label == "reproduced"
    assert "low-rank A saves 6.0% of the trained parameters and 0.0% of the MACs" in verdict.finding
    assert verdict.difference == "+1.00 points"
    assert "of 4 forms that save enough to be judged: low-rank A, sparse A, frozen A, no A" in verdict.finding


def test_c5_is_not_reproduced_when_all_smaller_forms_lose():
    (verdict,) = COEFFICIENTS.verdicts(forms({"dense": 0.65, "grouped": 0.65, "shared": 0.65}), "cpu")
    assert verdict.label == "not reproduced"


def test_c5_is_open_when_the_intervals_are_wide():
    records = forms({})
    (verdict,) = COEFFICIENTS.verdicts(records, "cpu")
    assert verdict.label == "partly"
    two = [r for r in records if r.config["seed"] == 0]
    assert COEFFICIENTS.verdicts(two, "cpu")[0].label == "not tested"


def test_several_comparisons_widen_the_interval():
    one = difference_estimate([0.6, 0.61, 0.62], [0.5, 0.51, 0.52])
    many = difference_estimate([0.6, 0.61, 0.62], [0.5, 0.51, 0.52], comparisons=4)
    assert many.value == one.value
    assert many.low < one.low < one.high < many.high


def bench(*, width=16, speedups=(1.0, 1.0, 1.3, 1.4), forms=("dense",), mode="factorized", **options):
    rows = [
        {"ratio": 0.5, "mode": mode, "coefficients": form, "trained": part, "speedup": 0.8 * s, "ms": 1.0, "n": 15}
        for form in forms
        for part, s in zip(TRAINED, speedups, strict=True)
    ]
    config = {
        "model": "resnet18", "width": width, "trained": list(TRAINED), "coefficients": list(forms), "modes": [mode],
        "batch_size": 125, "precision": "bf16", **options,
    }  # fmt: skip
    return BenchReport(kind="bench-train", config=config, environment={"device_type": "cpu", "device": "x"}, rows=rows)


def test_step_times_are_relative_to_dense_coefficients(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    assert coefficients.step_times("cpu") == {}
    texts = list(dict.fromkeys(r.coefficients for r in COEFFICIENTS.runs("cpu") if r.coefficients))
    rows = [
        {
            "ratio": 0.5,
            "mode": "factorized",
            "coefficients": form,
            "trained": "both",
            "speedup": 1.0 + i,
            "ms": 2.0,
            "n": 15,
        }
        for i, form in enumerate(texts)
    ]
    others = [
        {**rows[0], "trained": "neither", "speedup": 9.0},
        {**rows[1], "mode": "composed", "speedup": 9.0},
        {**rows[2], "ratio": 0.75, "speedup": 9.0},
        {"ratio": 0.5, "mode": "control", "coefficients": "", "trained": "both", "speedup": 9.0},
    ]
    rows += others
    dataclasses.replace(bench(forms=texts), rows=rows).save(tmp_path / "bench" / "a.json")
    times = coefficients.step_times("cpu")
    assert times["dense", "r=1/2"] == (2.0, 1)
    assert times["repeat", "r=1/2"].relative == pytest.approx(1 / len(texts))


# -- skip-training -----------------------------------------------------------------------------------------


def test_the_time_of_a_schedule_is_the_mean_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    assert skip.find_bench("cpu") is None
    for other in ({"width": 8}, {"mode": "auto"}, {"batch_size": 64}, {"precision": "fp32"}):
        bench(**other).save(tmp_path / "bench" / "other.json")
        assert skip.find_bench("cpu") is None
    bench().save(tmp_path / "bench" / "a.json")
    times = skip.measured("cpu", skip.find_bench("cpu"))
    assert times["B fixed"] == pytest.approx(1 / 1.3)
    assert times["A fixed"] == pytest.approx(1)
    assert times["B every 4th step"] == pytest.approx(0.25 + 0.75 / 1.3)
    assert times["by epochs in turns"] == pytest.approx(0.5 + 0.5 / 1.3)
    assert skip.find_bench("paper") is None  # a CPU's time says nothing of a GPU


def test_the_model_predicts_that_only_the_gradient_of_the_basis_is_worth_skipping():
    told = skip.predicted("cpu")
    assert 0.95 < told["A fixed"] < 1
    assert 0.66 < told["B fixed"] < 0.72
    assert told["B fixed"] < told["B every 8th step"] < told["B every 4th step"] < told["B every 2nd step"] < 1


@pytest.mark.parametrize("held", [{}, {"images": 900}, {"validation": 300}, {"images": 900, "validation": 700}])
def test_the_steps_of_a_run_are_those_of_its_training(held):
    run = next(run for run in SKIP.runs("smoke") if run.recipe.epochs == 1)
    run = dataclasses.replace(run, **held)
    done = execute(run, device=torch.device("cpu"))
    assert done["steps"] == skip.steps_of(run)["total_steps"]


def schedules(accuracy, full=(0.56, 0.58, 0.60)):
    lengths = dict(zip((4, 5, 6), full, strict=True))
    return outcomes(SKIP, lambda run: accuracy if run.recipe.skip else lengths[run.recipe.epochs])


@pytest.fixture
def timed(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    bench().save(tmp_path / "bench" / "a.json")


@pytest.mark.parametrize(("accuracy", "label"), [(0.61, "reproduced"), (0.5985, "partly"), (0.58, "not reproduced")])
def test_the_rule_for_c6(accuracy, label, timed):
    (verdict,) = SKIP.verdicts(schedules(accuracy), "cpu")
    assert verdict.label == label


def test_a_schedule_no_better_than_a_shorter_training_is_not_enough(timed):
    (verdict,) = SKIP.verdicts(schedules(0.61, full=(0.61, 0.61, 0.61)), "cpu")
    assert verdict.label == "partly"


def test_c6_needs_a_measured_time_and_a_saving(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    records = schedules(0.61)
    assert SKIP.verdicts(records, "cpu")[0].label == "not tested"
    bench(speedups=(1.0, 1.0, 1.1, 1.1)).save(tmp_path / "bench" / "a.json")
    (verdict,) = SKIP.verdicts(records, "cpu")
    assert verdict.label == "not reproduced"
    assert "saves 9.1% of the time" in verdict.finding


@pytest.mark.parametrize(
    ("time", "rival"), [(1.0, 0.60), (5 / 6, 0.58), (0.75, 0.57), (2 / 3, 0.56), (0.1, 0.56), (1.2, 0.60)]
)
def test_equal_time_is_interpolated_between_shorter_trainings(time, rival):
    records = outcomes(SKIP, lambda run: {4: 0.56, 5: 0.58, 6: 0.60}[run.recipe.epochs] if not run.recipe.skip else 0.7)
    assert skip.gain(records, "B fixed", time).value == pytest.approx(0.7 - rival)


def test_arms_are_compared_on_the_seeds_that_they_share():
    lucky = [r for r in schedules(0.7) if r.config["seed"] != 1 or r.config["variant"] == skip.FULL]
    for r in lucky:
        r.result["test"]["accuracy"] += 0.3 * (r.config["seed"] == 1)
    assert skip.drop(lucky, "B fixed").value == pytest.approx(0.60 - 0.7)
    assert skip.drop(lucky, "B fixed").n == 2


def test_a_contrast_is_the_weighted_sum_of_means():
    spread = pooled_spread([[1.0, 3.0], [2.0, 6.0]])
    one = spread.contrast([(1, [1.0, 3.0]), (-0.5, [2.0, 6.0]), (-0.5, [0.0])])
    assert one.value == pytest.approx(2 - 2)
    assert one.n == 1
    half = (one.high - one.low) / 2
    assert half == pytest.approx(4.302653 * math.sqrt(5.0) * math.sqrt(1 / 2 + 0.25 / 2 + 0.25))


# -- the family --------------------------------------------------------------------------------------------


def networks(dense=0.6, selected=lambda name: 0.6, uniform=0.55):
    records = []
    for run in FAMILY.runs("cpu"):
        name, _, kind = run.variant.partition(", ")
        if kind == "table":
            records.append(dataclasses.replace(record(run), result={"test": None}))
            continue
        value = {"dense": dense, "selected": selected(name), "all layers": uniform}[kind]
        records.append(record(run, accuracy=value + NOISE[run.seed % 2]))
    return records


@pytest.mark.parametrize(
    ("selected", "label"),
    [
        (lambda name: 0.601, "reproduced"),
        (lambda name: 0.601 if name != "resnet50" else 0.58, "partly"),
        (lambda name: 0.57, "not reproduced"),
    ],
)
def test_the_rule_for_c7(selected, label):
    (verdict,) = FAMILY.verdicts(networks(selected=selected), "cpu")
    assert verdict.label == label


def test_c7_needs_three_networks():
    records = [r for r in networks() if r.config["model"] in ("resnet18", "resnet20")]
    (verdict,) = FAMILY.verdicts(records, "cpu")
    assert verdict.label == "not tested"
    assert "2 networks" in verdict.finding


def test_the_mean_drop_is_narrower_than_a_single_one():
    records = networks(selected=lambda name: 0.59)
    tests = [r for r in records if r.result["test"]]
    names = family.complete(tests)
    assert names[:4] == ["resnet20", "resnet32", "resnet44", "resnet56"]
    mean, one = family.mean_drop(tests, names), family.drop(tests, "resnet18")
    assert mean.value == pytest.approx(0.01)
    assert mean.high - mean.low == pytest.approx((one.high - one.low) / math.sqrt(len(names)))


def test_plans_are_made_from_the_table_of_their_own_network():
    runs = FAMILY.runs("paper")
    tables = {run.id: run.model for run in runs if run.ladder}
    chosen = [run for run in runs if run.choice]
    assert all(tables[run.choice.table] == run.model for run in chosen)
    assert {run.model for run in chosen} == set(family.NETWORKS)
    assert not {run.seed for run in runs if run.ladder} & {run.seed for run in chosen}


# -- all of them, for real ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("study", [COEFFICIENTS, SKIP, FAMILY], ids=lambda study: study.name)
def test_one_seed_of_the_smoke_profile_runs(study, tmp_path):
    runs = [run for run in study.runs("smoke") if run.seed != 1]
    steps = list(work(runs, study.definition, folder=tmp_path, device="cpu"))
    assert {step.outcome for step in steps} == {"done"}, [step.message for step in steps]
    assert {record.config["variant"] for record in load_records(tmp_path)} == {run.variant for run in runs}


def test_trained_parts_have_names():
    assert set(TRAINED.values()) == {Trained(a, b) for a in (True, False) for b in (True, False)}
