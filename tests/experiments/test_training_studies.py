"""The studies of chapters 6 and 7: their runs, what they compute from records, and their verdicts."""

import dataclasses
from collections import Counter

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
FEW = [0.1, -0.1] * 4  # points that eight seeds lose in the mean 0, with a narrow interval
WIDE = [3.0, -3.0] * 4


def outcomes(study, lost):
    """Records of made-up accuracies: variant -> what each seed loses, in points."""
    about = {"parameters": 100, "macs": 100, "curves": []}
    runs = [run for run in (*STUDIES["headline"].runs("small"), *study.runs("small")) if run.seed < 8]
    return [
        record(run, accuracy=0.9 + 0.001 * run.seed - lost[run.variant][run.seed] / 100, **about)
        for run in runs
        if run.seed < len(lost.get(run.variant, ()))
    ]


def plus(points, by=1.0):
    return [one + by for one in points]


@pytest.mark.parametrize("width", [16, None])
def test_without_a_the_freed_numbers_are_spent_on_basis_filters(width):
    dense = build("resnet18", width=width)
    target = count_parameters(substitute(dense, ratio=0.5, init="random"))
    layers = coefficients.equal_plan("resnet18", width)
    assert 0.99 * target < count_parameters(substitute(dense, layers, init="random", coefficients="repeat")) <= target


@pytest.mark.parametrize("study", [COEFFICIENTS, SKIP], ids=lambda study: study.name)
@pytest.mark.parametrize(("profile", "most"), [("smoke", 60), ("small", 60), ("paper", 40)])
def test_rounds_of_seeds_compare_all_that_is_judged(study, profile, most):
    runs, headline = study.runs(profile), STUDIES["headline"].runs(profile)
    assert len({run.id for run in runs}) == len(runs) <= most
    names, rounds = [run.variant for run in runs], max(run.seed for run in runs) + 1
    often = [name for name, n in Counter(names).items() if n == rounds]
    shorter = {name for name in names if name.startswith("everything")}
    assert {*often} == ({*skip.CANDIDATES, *shorter} if study is SKIP else {"dense A", *coefficients.JUDGED})
    assert names[: len(often) * rounds] == often * rounds  # what is not judged comes last
    dense = {run.id for run in headline if run.variant == "dense" and run.seed == 0}
    alike = dict(study="headline", variant="dense", ratio=None, mode="auto", coefficients=None)
    assert dense == {dataclasses.replace(runs[0], **alike).id}  # what is shared was trained as these are


@pytest.mark.parametrize(
    ("none", "grouped", "equal", "label"),
    [
        (FEW, plus(FEW), FEW, "reproduced"),
        (plus(FEW), plus(FEW, -1), FEW, "reproduced"),
        (plus(FEW), plus(FEW), FEW, "not reproduced"),
        (FEW, FEW, plus(FEW), "not reproduced"),  # any as few numbers less would cost as little
        (plus(FEW), WIDE, FEW, "inconclusive"),
        (plus(FEW, 0.5), plus(FEW), FEW, "inconclusive"),  # at the margin
        (FEW, FEW, plus(FEW, 0.5), "inconclusive"),
        (FEW[:7], FEW, FEW, "not tested"),
        (FEW, FEW, FEW[:7], "not tested"),
    ],
)
def test_the_rule_for_c5(none, grouped, equal, label):
    lost = {"dense": FEW, "dense A": [0.0] * 8, "no A": none, "grouped A": grouped, coefficients.EQUAL: equal}
    (verdict,) = COEFFICIENTS.verdicts(outcomes(COEFFICIENTS, lost), "small")
    assert (verdict.claim, verdict.label) == ("C5", label)
    assert ("(no A, equal size), points" in verdict.difference) == (label != "not tested")


def test_archived_variants_have_the_names_of_today():
    run = COEFFICIENTS.runs("small")[0]
    names = ["dense", "dense A, r=1/2", "no A, r=1/2", "no A, r=1/4"]
    old = [record(dataclasses.replace(run, variant=name, profile="cpu"), curves=[]) for name in names]
    assert list(coefficients.frame(old)["variant"]) == ["dense", "dense A", "no A"]
    full = [dataclasses.replace(run, variant=name) for name in (skip.FULL, "B fixed", "A every 4th step")]
    assert list(skip.frame([record(run, curves=[]) for run in full])["variant"]) == [skip.FULL, "B fixed"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Stores a benchmark of the steps of a network, with the speed-ups of its parts, or of its forms of A."""
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))

    def store(speedups, forms=("dense",), device="cpu", step="eager", width=16):
        cells = [("dense", part) for part in TRAINED] if len(forms) == 1 else [(form, "both") for form in forms]
        rows = [
            {"ratio": 0.5, "mode": "factorized", "coefficients": form, "trained": part, "speedup": 0.8 * speed,
             "n": 9, "step": step}
            for (form, part), speed in zip(cells, speedups, strict=True)
        ]  # fmt: skip
        config = {"model": "resnet18", "width": width, "trained": list(dict.fromkeys(part for _, part in cells))}
        config |= {"coefficients": list(forms), "memory_format": "channels_last", "precision": "bf16"}
        machine = {"device_type": device, "device": f"a {device}"}
        report = BenchReport(kind="bench-train", config=config, environment=machine, rows=rows)
        report.save(tmp_path / "bench" / f"{device} {len(forms)} {width}.json")

    return store


def test_step_times_are_relative_to_dense_coefficients_in_the_same_benchmark(bench):
    assert coefficients.step_times("small").empty
    bench([1.0, 2.0], forms=("dense", "repeat"))
    bench([3.0] * 4)  # of parts: another benchmark
    bench([5.0, 5.0], forms=("dense", "repeat"), width=None)
    bench([5.0, 5.0], forms=("dense", "repeat"), device="cuda")  # trainings on a GPU are graphed, this is not
    times = coefficients.step_times("small").set_index("coefficients")
    assert times["relative"].to_dict() == {"dense": 1, "repeat": 0.5}
    assert times["to_dense"]["repeat"] == pytest.approx(1 / 1.6)
    assert set(coefficients.step_times("paper")["relative"]) == {1}


def test_the_time_of_a_schedule_is_the_mean_of_its_steps(bench):
    assert skip.judged_times("small").empty
    bench((1.0, 1.0, 1.3, 1.4))
    bench((1.0, 1.0, 1.1, 1.4), device="cuda", step="graphed")
    times = skip.times("small").set_index(["device", "variant"])["relative"]
    told, took = skip.predicted("small"), times["a cpu"]
    assert (took["B fixed"], took["A fixed"], took[skip.FULL]) == (pytest.approx(1 / 1.3), pytest.approx(1), 1)
    assert took["B every 8th step"] == pytest.approx(1 / 8 + 7 / 8 / 1.3)
    assert took["by epochs in turns"] == pytest.approx(0.5 + 0.5 / 1.3)
    assert 0.66 < told["B fixed"] < 0.72 < told["B every 8th step"] < told["by epochs in turns"] < told["A fixed"] < 1
    assert times["a cuda"]["B fixed"] == pytest.approx(1 / 1.1)
    assert skip.judged_times("small")["to_dense"]["B fixed"] == pytest.approx(1 / 1.3 / 0.8)
    assert skip.judged_times("paper").empty  # of that network none is measured


def test_the_steps_of_a_run_are_those_of_its_training():
    run = next(run for run in SKIP.runs("smoke") if run.recipe.epochs == 1)
    run = dataclasses.replace(run, images=900, validation=700)
    assert execute(run, device=torch.device("cpu"))["steps"] == skip.steps_of(run)["total_steps"]


def schedules(fixed, eighth, shorter):
    """Records in which training everything loses 0, and ``shorter`` in 12 of 16 epochs."""
    lost = {skip.FULL: [0.0] * 8, "everything, 12 of 16 epochs": shorter, "dense": [0.0] * 8}
    lost |= {f"dense, {n} of 16 epochs": [16.0 - n] * 4 for n in (12, 8)}
    return outcomes(SKIP, {**lost, "B fixed": fixed, "B every 8th step": eighth})


@pytest.mark.parametrize(
    ("fixed", "eighth", "shorter", "label"),
    [
        (FEW, plus(FEW, 9), plus(FEW), "reproduced"),
        (plus(FEW, 9), plus(FEW, 9), plus(FEW), "not reproduced"),
        (FEW, FEW, plus(FEW, -3), "not reproduced"),  # as good after equally many epochs, but shorter is better
        (WIDE, plus(FEW, 9), plus(FEW), "inconclusive"),
        (plus(FEW, 0.5), plus(FEW, 0.5), plus(FEW), "inconclusive"),  # better than shorter, but at the margin
        (FEW[:7], FEW, plus(FEW), "not tested"),
    ],
)
def test_the_rule_for_c6(fixed, eighth, shorter, label, bench):
    records = schedules(fixed, eighth, shorter)
    assert SKIP.verdicts(records, "small")[0].label == "not tested"
    bench((1.0, 1.0, 1.35, 1.4))
    (verdict,) = SKIP.verdicts(records, "small")
    assert verdict.label == label
    assert ("] over equal time, " in verdict.difference) == (label != "not tested")


def test_a_schedule_that_saves_too_little_time_does_not_reproduce_c6(bench):
    bench((1.0, 1.0, 1.2, 1.3))
    (verdict,) = SKIP.verdicts(schedules(FEW, FEW, plus(FEW)), "small")
    assert (verdict.label, "takes 83.3% of the time" in verdict.finding) == ("not reproduced", True)


@pytest.mark.parametrize(
    ("what", "share", "rival", "n"),
    [
        ("everything", 1.2, 0, 8), ("everything", 7 / 8, 0.5, 8), ("everything", 0.75, 1, 8),
        ("everything", 0.7, 1, 8), ("dense", 0.625, 6, 4), ("dense", 0.9, 1.6, 4),
    ],
)  # fmt: skip
def test_equal_time_is_interpolated_between_shorter_trainings(what, share, rival, n):
    runs = skip.frame(schedules([0.5] * 8, FEW, [1.0] * 8))
    found = skip.gain(runs, "B fixed", share, what)
    assert (found.value, found.n) == (pytest.approx(rival - 0.5), n)


@pytest.mark.weekly
@pytest.mark.parametrize("study", [COEFFICIENTS, SKIP], ids=lambda study: study.name)
def test_one_seed_of_the_smoke_profile_runs(study, tmp_path):
    tasks = [Task(run, study.definition) for run in study.runs("smoke") if run.seed != 1]
    steps = list(in_processes(Order(tasks=tasks, folder=tmp_path, device="cpu"), 1))
    assert {step.outcome for step in steps} == {"done"}, [step.message for step in steps]
    assert {record.config["variant"] for record in load_records(tmp_path)} == {task.run.variant for task in tasks}
