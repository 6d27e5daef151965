"""The study of chapters 3 and 5: its variants, its verdicts, and how its runs are done without waste."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from basis.cli import main
from basis.costs import cost, count_parameters
from basis.experiments import executors, runs
from basis.experiments.executors import Order, Task, in_this_process, jobs_for
from basis.experiments.runs import Record, execute
from basis.experiments.studies import STUDIES, headline
from basis.experiments.studies.headline import HALF, STAGES, variant
from basis.experiments.studies.hours import Pace
from basis.models import build
from basis.statistics import paired_difference
from basis.training.loop import Recipe
from basis.training.reuse import Reuse

STUDY = STUDIES["headline"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_narrower_networks_have_the_size_that_they_are_compared_at(profile):
    width = 16 if profile == "small" else 64
    with torch.device("meta"):
        dense = build("resnet18", width=width)
        for (unit, share), stages in STAGES[profile].items():
            thin = build("resnet18", width=stages)
            sizes = [count_parameters(net) for net in (thin, dense)]
            if unit == "macs":
                sizes = [cost(net, (3, 32, 32)).total.forward_macs for net in (thin, dense)]
            assert sizes[0] / sizes[1] == pytest.approx(share, rel=0.007)


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
def test_any_prefix_of_the_runs_compares_all_variants(profile):
    table, *rest = STUDY.runs(profile)
    assert table.variant == "table"
    half = [run.variant for run in rest if run.variant == "dense" or run.variant.endswith(variant("", HALF)[1:])]
    assert half[:5] == half[5:10]
    assert {run.choice.table for run in rest if run.choice} == {table.id}


def records(**drops):
    """Records of made-up accuracies: variant -> what each seed loses against dense, in points."""
    found = []
    for name, lost in {"dense": [0.0] * 4, **drops}.items():
        variant = name if name == "dense" else variant(name.replace("_", " "), HALF)
        for seed, points in enumerate(lost):
            accuracy = 0.9 + 0.001 * seed - points / 100
            result = {
                "test": {"accuracy": accuracy, "accuracy_flip": accuracy}, "parameters": 100 if variant == "dense" else 50,
                "macs": 100, "train_seconds": 1.0, "curves": [{"validation_accuracy": accuracy}],
            }  # fmt: skip
            config = {"profile": "small", "variant": variant, "seed": seed}
            found.append(Record("", config, result, {"device": "a"}, STUDY.definition))
    return found


@pytest.mark.parametrize(
    ("uniform", "selected", "c3", "c4"),
    [
        ([1.0, 1.1, 0.9, 1.0], [0.1, 0.0, 0.1, 0.0], "reproduced", "reproduced"),
        ([0.1, -0.1, 0.1, -0.1], [1.0, 1.1, 0.9, 1.0], "not reproduced", "not reproduced"),
        ([2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.5], "inconclusive", "inconclusive"),
        ([1.0, 1.1], [0.1, 0.0, 0.1, 0.0], "not tested", "not tested"),
    ],
)
def test_every_label_can_come_out(uniform, selected, c3, c4):
    labels = {v.claim: v.label for v in STUDY.verdicts(records(uniform=uniform, selected=selected), "small")}
    assert labels == {"C1": "by construction", "C3": c3, "C4": c4}


def test_differences_are_paired_by_seed():
    estimate = paired_difference({0: 5.0, 1: 7.0, 2: 9.0}, {1: 6.0, 2: 8.0, 3: 0.0})
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (1.0, 1.0, 1.0, 2)
    runs_ = headline.frame(records(uniform=[1.0, 2.0, 3.0]))
    assert headline.difference(runs_, "dense", variant("uniform", HALF)).value == pytest.approx(2)


# -- nothing wasted -------------------------------------------------------------------------------------


def test_a_network_that_is_reused_learns_the_same_to_the_bit():
    base = next(run for run in STUDY.runs("smoke") if run.variant == "dense")
    several = [dataclasses.replace(base, seed=seed, ratio=ratio) for seed in (0, 1) for ratio in (None, 0.5)]
    reuse = Reuse()
    again = [execute(run, device=CPU, reuse=reuse) for run in several]
    fresh = [execute(run, device=CPU) for run in several]
    for one, other in zip(again, fresh, strict=True):
        assert [one["test"], one["validation"]] == [other["test"], other["validation"]]
    assert len({id(step.model) for step in reuse._steps.values()}) == 2


def test_what_is_not_told_apart_by_its_weights_alone_is_not_reused():
    base = STUDY.runs("smoke")[1]
    assert runs.reusable(base)
    assert not runs.reusable(dataclasses.replace(base, coefficients="sparse:1/8"))
    assert not runs.reusable(dataclasses.replace(base, layer="sep"))


def test_no_run_is_begun_that_would_not_end_in_time(tmp_path, monkeypatch):
    first, second = STUDY.runs("smoke")[1], STUDY.runs("smoke")[1 + 5]
    tasks = [Task(run, STUDY.definition) for run in (first, second)]
    pace = Pace()
    pace.learn(first.config, 100.0)
    order = Order(tasks=tasks, folder=tmp_path, device="cpu", deadline=time.monotonic() + 60, pace=pace)
    with pytest.raises(
        ValueError, match=r"leaves (60|59) s, but one run \(dense\) takes about 110 s .* --time-limit 12[01]s"
    ):
        list(in_this_process(order))
    assert not list(tmp_path.rglob("*.json"))
    done = SimpleNamespace(run=first, outcome="done", seconds=100.0)
    monkeypatch.setattr(executors, "attempt", lambda run, definition, **_: done)
    order = dataclasses.replace(order, deadline=time.monotonic() + 60, pace=Pace())
    assert list(in_this_process(order)) == [done]  # measured to be short; after the first, known to be long


def test_the_command_says_what_is_next_and_packs_what_is_done(tmp_path, capsys):
    command = ["run", "headline", "--results", str(tmp_path), "--device", "cpu", "--jobs", "1", "--quiet"]
    assert main([*command, "--time-limit", "1s", "--archive", str(tmp_path / "a.tar.gz")]) in (0, 2)
    text = capsys.readouterr().out
    assert "27 of 27 runs are missing" in text
    assert "27 are missing; next is table, seed 100: the same command goes on" in text
    (tmp_path / "b.tar.gz").write_text("mine")
    assert main([*command, "--archive", str(tmp_path / "b.tar.gz")]) == 2
    assert main(["run", "headline", "--profile", "paper", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("device", "width", "cores", "jobs"),
    [("cuda", 16, 16, 8), ("cuda", 16, 2, 1), ("cuda", None, 16, 1), ("cpu", None, 4, 4)],
)
def test_small_networks_share_a_gpu_and_full_ones_do_not(device, width, cores, jobs, monkeypatch):
    monkeypatch.setattr(executors, "cores", lambda: cores)
    run = dataclasses.replace(STUDY.runs("paper")[1], width=width, recipe=Recipe())
    assert jobs_for([run] * 20, torch.device(device)) == jobs
