"""The studies of chapters 6 and 7: their runs, what they compute from records, and their verdicts."""

import dataclasses

import pytest
import torch

from basis import substitute
from basis.bench.networks import TRAINED
from basis.bench.report import BenchReport
from basis.costs import count_parameters
from basis.experiments.execution import execute
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import load_records
from basis.experiments.studies import STUDIES, coefficients, skip
from basis.models import build
from tests.experiments.test_search_studies import record

COEFFICIENTS, SKIP = (STUDIES[name] for name in ("coefficients", "skip"))
NOISE = (-0.001, 0.001, 0.0005)  # what the seeds 0, 1, 2 add to an accuracy


def outcomes(study, accuracy, **result):
    """Records of all runs of the CPU profile; ``accuracy`` and what else the result holds are functions of a run."""
    return [
        record(run, accuracy=accuracy(run) + NOISE[run.seed % 3], **{k: f(run) for k, f in result.items()})
        for run in study.runs("cpu")
    ]


@pytest.mark.parametrize("form", ["low_rank:1/8", "grouped:4"])
def test_at_equal_size_the_freed_parameters_are_spent_on_basis_filters(form):
    dense = build("resnet18", width=16)
    target = count_parameters(substitute(dense, ratio=0.25, init="random"))
    layers = coefficients.matched_plan("resnet18", 16, 0.25, form)
    after = count_parameters(substitute(dense, layers, init="random", coefficients=form))
    assert 0.97 * target < after <= target


@pytest.mark.parametrize(
    ("accuracy", "label"),
    [
        ({"dense": 0.60, "low_rank": 0.61}, "reproduced"),
        ({}, "partly"),
        ({"dense": 0.65, "grouped": 0.65, "shared": 0.65}, "not reproduced"),  # all forms that are smaller lose
    ],
)
def test_the_rule_for_c5(accuracy, label):
    sizes = {"dense": 1000, "low_rank": 940, "grouped": 990, "sparse": 945, "shared": 960, "frozen": 900, "repeat": 900}
    kind = lambda run: (run.coefficients or "dense").partition(":")[0]  # noqa: E731
    records = outcomes(
        COEFFICIENTS, lambda run: accuracy.get(kind(run), 0.6), parameters=lambda run: sizes[kind(run)],
        macs=lambda run: 5000,
    )  # fmt: skip
    (verdict,) = COEFFICIENTS.verdicts(records, "cpu")
    assert verdict.label == label
    assert "of 4 forms that save enough to be judged: low-rank A, sparse A, frozen A, no A" in verdict.finding
    alone = [r for r in records if r.config["seed"] == 0]
    assert COEFFICIENTS.verdicts(alone, "cpu")[0].label == "not tested"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Stores a benchmark of training steps, with the speed-ups of its parts or forms."""
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))

    def store(speedups=(1.0, 1.0, 1.3, 1.4), forms=("dense",), mode="factorized", **options):
        cells = [("dense", part) for part in TRAINED] if len(forms) == 1 else [(form, "both") for form in forms]
        rows = [
            {"ratio": 0.5, "mode": mode, "coefficients": form, "trained": part, "speedup": 0.8 * speed, "ms": 1.0}
            for (form, part), speed in zip(cells, speedups, strict=True)
        ]
        config = {
            "model": "resnet18", "width": 16, "trained": list(TRAINED), "coefficients": list(forms), "modes": [mode],
            "batch_size": 125, "precision": "bf16", **options,
        }  # fmt: skip
        machine = {"device_type": "cpu", "device": "x"}
        report = BenchReport(kind="bench-train", config=config, environment=machine, rows=rows)
        report.save(tmp_path / "bench" / "a.json")

    return store


def test_step_times_are_relative_to_dense_coefficients(bench):
    assert coefficients.step_times("cpu") == {}
    texts = list(dict.fromkeys(r.coefficients for r in COEFFICIENTS.runs("cpu") if r.coefficients))
    bench(forms=texts, speedups=[1.0 + i for i in range(len(texts))])
    times = coefficients.step_times("cpu")
    assert (times["dense", "r=1/2"]["ms"], times["dense", "r=1/2"]["relative"]) == (1.0, 1)
    assert times["repeat", "r=1/2"]["relative"] == pytest.approx(1 / len(texts))


def test_the_time_of_a_schedule_is_the_mean_of_its_steps(bench):
    bench(batch_size=64)
    assert skip.find_bench("cpu") is None
    bench()
    assert skip.find_bench("paper") is None  # a CPU's time says nothing of a GPU
    times, told = skip.measured("cpu", skip.find_bench("cpu")), skip.predicted("cpu")
    assert (times["B fixed"], times["A fixed"]) == (pytest.approx(1 / 1.3), pytest.approx(1))
    assert times["B every 4th step"] == pytest.approx(0.25 + 0.75 / 1.3)
    assert times["by epochs in turns"] == pytest.approx(0.5 + 0.5 / 1.3)
    assert 0.66 < told["B fixed"] < 0.72 < told["B every 8th step"] < told["B every 2nd step"] < told["A fixed"] < 1


def test_the_steps_of_a_run_are_those_of_its_training():
    run = next(run for run in SKIP.runs("smoke") if run.recipe.epochs == 1)
    run = dataclasses.replace(run, images=900, validation=700)
    assert execute(run, device=torch.device("cpu"))["steps"] == skip.steps_of(run)["total_steps"]


def schedules(accuracy, full=(0.56, 0.58, 0.60)):
    return outcomes(SKIP, lambda run: accuracy if run.recipe.skip else full[run.recipe.epochs - 4])


@pytest.mark.parametrize(
    ("accuracy", "full", "label"),
    [
        (0.61, (0.56, 0.58, 0.60), "reproduced"),
        (0.5985, (0.56, 0.58, 0.60), "partly"),
        (0.58, (0.56, 0.58, 0.60), "not reproduced"),
    ],
)
def test_the_rule_for_c6(accuracy, full, label, bench):
    records = schedules(accuracy, full)
    assert SKIP.verdicts(records, "cpu")[0].label == "not tested"
    bench(speedups=(1.0, 1.0, 1.1, 1.1))
    assert "saves 9.1% of the time" in SKIP.verdicts(records, "cpu")[0].finding
    bench()
    assert SKIP.verdicts(records, "cpu")[0].label == label


@pytest.mark.parametrize(("time", "rival"), [(1.2, 0.60), (5 / 6, 0.58), (0.75, 0.57), (0.1, 0.56)])
def test_equal_time_is_interpolated_between_shorter_trainings(time, rival):
    assert skip.gain(schedules(0.7), "B fixed", time).value == pytest.approx(0.7 - rival)


def test_variants_are_compared_on_the_seeds_that_they_share():
    lucky = [r for r in schedules(0.7) if r.config["seed"] != 1 or r.config["variant"] == skip.FULL]
    for r in lucky:
        r.result["test"]["accuracy"] += 0.3 * (r.config["seed"] == 1)
    assert (skip.drop(lucky, "B fixed").value, skip.drop(lucky, "B fixed").n) == (pytest.approx(0.60 - 0.7), 2)


@pytest.mark.weekly
@pytest.mark.parametrize("study", [COEFFICIENTS, SKIP], ids=lambda study: study.name)
def test_one_seed_of_the_smoke_profile_runs(study, tmp_path):
    tasks = [Task(run, study.definition) for run in study.runs("smoke") if run.seed != 1]
    steps = list(in_processes(Order(tasks=tasks, folder=tmp_path, device="cpu"), 1))
    assert {step.outcome for step in steps} == {"done"}, [step.message for step in steps]
    assert {record.config["variant"] for record in load_records(tmp_path)} == {task.run.variant for task in tasks}
