"""Several workers: order, deaths, deadlines, and processes killed for real; the command and its order of value."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from basis.cli import main
from basis.data import DataError
from basis.experiments import runner
from basis.experiments.campaign import ORDER, in_order
from basis.experiments.estimates import estimate
from basis.experiments.runner import Order, Progress, Task, dispatch, in_processes, jobs_for
from basis.experiments.runs import PROFILES, Choice, Ladder, Run, load_records
from basis.experiments.studies import STUDIES, status
from basis.training.loop import Recipe
from tests.experiments.test_runs import DENSE, SMOKE, STUDY, fake_result, instant, put_record  # noqa: F401

TASKS = [Task(run, STUDY.definition) for run in SMOKE]


def order_of(tasks, folder, **options):
    return Order(tasks=tasks, folder=folder, device="cpu", **options)


def tiny_runs(count=2):
    """Runs of a second each: one that measures sensitivities, one that selects from them, some dense."""
    recipe = Recipe(epochs=3, batch_size=20, translate=1, cutout=0, precision="fp32")
    base = Run(study="headline", profile="smoke", variant="dense", seed=0, model="wrn-10-1", width=4, data="synthetic",
               images=40, validation=40, recipe=recipe)  # fmt: skip
    ladder = Ladder(measures={"oneshot_bn": (0.5,)}, multiple=1, images=40, calibration=40)
    table = dataclasses.replace(base, variant="table", test=False, ladder=ladder)
    choice = Choice(rule="optimal", unit="params", budget=0.75, table=table.id, measure="oneshot_bn")
    chosen = dataclasses.replace(base, variant="selected", choice=choice)
    dense = [dataclasses.replace(base, seed=n) for n in range(count)]
    return [Task(run, STUDY.definition) for run in (chosen, table, *dense)]


# -- one loop for all workers -------------------------------------------------------------------------


def scripted(answers=()):
    """A ``submit`` whose workers do what ``answers`` says of a variant, and the list of what they were given."""
    given, answers = [], dict(answers)

    def submit(worker, task):
        given.append(task.run)
        answer = answers.get(task.run.variant, "done")
        answer = answer.pop(0) if isinstance(answer, list) else answer
        future = Future()
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(None if answer == "held" else Progress(task.run, answer, "", 1.0))
        return future

    return submit, given


@pytest.mark.parametrize("outcome", ["done", "failed"])
def test_every_run_is_given_once_and_in_order_but_for_those_that_wait_for_a_table(tmp_path, outcome):
    submit, given = scripted({"table": outcome})
    steps = list(dispatch(order_of(TASKS, tmp_path), submit, 2))
    assert sorted(step.run.id for step in steps) == sorted(run.id for run in SMOKE)
    assert given[:2] == [SMOKE[0], SMOKE[1]]
    table = next(i for i, run in enumerate(given) if run.variant == "table")
    assert all(given.index(run) > table for run in given if run.choice)


def test_a_worker_that_dies_loses_only_its_run_and_that_is_begun_again_but_not_forever(tmp_path):
    died = BrokenProcessPool("signal 9")
    submit, given = scripted({"table": [died, "done"]})
    assert {step.outcome for step in dispatch(order_of(TASKS, tmp_path), submit, 2)} == {"done"}
    assert len(given) == len(TASKS) + 1
    submit, given = scripted({"table": died})
    steps = list(dispatch(order_of(TASKS, tmp_path), submit, 1))
    assert [step.run.variant for step in steps if step.outcome == "failed"] == ["table"]
    assert len(given) == len(TASKS) + runner.TRIES - 1


def test_what_would_stop_every_run_is_raised(tmp_path):
    submit, _ = scripted({"dense": DataError("no data")})
    with pytest.raises(DataError, match="no data"):
        list(dispatch(order_of(TASKS, tmp_path), submit, 2))


@pytest.mark.parametrize(
    ("device", "width", "cores", "jobs"),
    [("cuda", 16, 16, 8), ("cuda", 16, 2, 1), ("cuda", None, 16, 1), ("cpu", None, 4, 4)],
)
def test_small_networks_share_a_gpu_and_full_ones_do_not(device, width, cores, jobs, monkeypatch):
    monkeypatch.setattr(runner, "cores", lambda: cores)
    run = dataclasses.replace(STUDY.runs("paper")[1], width=width)
    assert jobs_for([run] * 20, torch.device(device)) == jobs
    assert jobs_for([], torch.device(device)) == 1


@pytest.mark.parametrize(
    ("quota", "number"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("-1 100000", 8), ("", 8)]
)
@pytest.mark.parametrize("names", [["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]])
def test_a_container_has_the_cores_of_its_quota(names, quota, number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(runner, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, text in zip(names, [quota] if len(names) == 1 else quota.split(), strict=False):
        (tmp_path / name).write_text(text + "\n")
    assert runner.cores() == number


# -- really -------------------------------------------------------------------------------------------


def timeless(value):
    """A record's content without its seconds, its machine, its date, and how many passes measuring took."""
    if isinstance(value, dict):
        left = ("environment", "forward", "backward")
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k not in left}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    return {path.stem: path.read_bytes() for path in Path(folder).glob("*/*/*.json")}


def check_equal(disturbed, undisturbed):
    """The same runs with the same results, and nothing left over."""
    one, other = contents(disturbed), contents(undisturbed)
    assert set(one) == set(other)
    for name in other:
        assert timeless(json.loads(one[name])) == timeless(json.loads(other[name]))
    for pattern in ("*.tmp", "*.pt", "*.jsonl"):
        assert not list(Path(disturbed).rglob(pattern))


def test_a_run_that_is_stopped_again_and_again_ends_as_if_nothing_had_happened(tmp_path):
    """Stopped after every epoch and every measured layer."""
    chosen, table, dense = tiny_runs(1)
    steps = list(in_processes(order_of([chosen, table, dense], tmp_path / "undisturbed"), 1))
    assert [step.outcome for step in steps] == ["done"] * 3
    for task in (table, chosen, dense):
        outcomes = []
        for deadline in (0.0, 0.0, 0.0, 0.0, math.inf):
            step = runner.attempt(*task, folder=tmp_path / "disturbed", device="cpu", deadline=deadline)
            outcomes.append(step and step.outcome)
        assert outcomes[0] == outcomes[1] == "paused"
        assert "done" in outcomes
    check_equal(tmp_path / "disturbed", tmp_path / "undisturbed")


def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    task = tiny_runs()[2]
    killed = []

    def kill():
        while not killed:
            if list(tmp_path.rglob("*.lock")):
                killed.append(multiprocessing.active_children()[0])
                killed[0].kill()
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    steps = list(in_processes(order_of([task], tmp_path), 2))
    assert [step.outcome for step in steps] == ["done"]
    assert killed
    assert [record.id for record in load_records(tmp_path)] == [task.run.id]
    assert not multiprocessing.active_children()
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json"}


@pytest.mark.weekly
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_killed_at_random_moments_nothing_is_lost_or_done_twice(tmp_path):
    """The command is killed ten times; its workers end with it, and a record that was there once never changes."""
    command = [sys.executable, "-m", "basis.cli", "run", "headline", "--device", "cpu", "--jobs", "2", "--quiet"]
    command += ["--results", str(tmp_path / "disturbed")]
    rng, known, kills, process = random.Random(0), {}, 0, None
    while kills < 10 or process.wait() != 0:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(5, 20))
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if kills < 10 and workers:
            kills += 1
            process.kill()
            process.wait()
            until = time.monotonic() + 10
            while any(Path(f"/proc/{pid}").exists() for pid in workers):
                assert time.monotonic() < until, "workers outlive their parent"
                time.sleep(0.1)
        now = contents(tmp_path / "disturbed")
        assert known.items() <= now.items()
        known = now
    list(in_processes(order_of(TASKS, tmp_path / "undisturbed"), 1))
    check_equal(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.weekly
def test_ray_does_the_same_runs(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(runner.__file__).resolve().parents[2]))
    steps = list(runner.on_ray(order_of(tiny_runs(), tmp_path / "ray"), 2))
    ray.shutdown()
    assert [step.outcome for step in steps] == ["done"] * 4
    list(in_processes(order_of(tiny_runs(), tmp_path / "here"), 1))
    check_equal(tmp_path / "ray", tmp_path / "here")


# -- the command --------------------------------------------------------------------------------------


def test_every_run_of_all_studies_is_done_once_and_measures_before_it_selects():
    for profile in PROFILES:
        tasks = in_order(profile)
        listed = [(study.name, run.id) for study in STUDIES.values() for run in study.runs(profile)]
        assert sorted((run.study, run.id) for run, _ in tasks) == sorted(set(listed))
        place = {run.id: i for i, (run, _) in enumerate(tasks)}
        assert all(place[run.choice.table] < i for i, (run, _) in enumerate(tasks) if run.choice)


def test_studies_come_one_after_the_other_each_in_its_own_order():
    listed = [run for name in ORDER for run in STUDIES[name].runs("paper")]
    assert ORDER[:2] == ("headline", "sensitivity")
    assert [run for run, _ in in_order("paper")] == listed


def command(tmp_path, *more):
    options = ["--device", "cpu", "--jobs", "1", "--quiet", "--archive", str(tmp_path / "new.tar.gz")]
    return main(["run", "headline", *options, "--results", str(tmp_path / "here"), *more])


def test_the_command_skips_what_is_recorded_and_says_how_far_it_came(tmp_path, instant, capsys):  # noqa: F811
    for run in SMOKE[:3]:
        put_record(tmp_path / "here", run)
    assert command(tmp_path) == 0
    said = capsys.readouterr().out
    assert f"{len(SMOKE) - 3} of {len(SMOKE)} runs are missing" in said
    assert f"{len(SMOKE) - 3} new records" in said
    assert instant == list(SMOKE[3:])
    assert command(tmp_path) == 0
    assert "0 new records, 0 are missing" in capsys.readouterr().out


def test_an_interrupted_command_packs_what_it_has_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    done = []

    def execute(run, **options):
        if len(done) == 1:
            signal.raise_signal(signal.SIGTERM)
        done.append(run)
        return fake_result(run)

    monkeypatch.setattr(runner, "execute", execute)
    assert command(tmp_path) == 130
    said = capsys.readouterr()
    assert "1 new records, 1 packed into" in said.out
    next_one = f"next is {SMOKE[1].variant}, seed {SMOKE[1].seed}; to go on: basis run headline --device cpu"
    assert f"{len(SMOKE) - 1} are missing; {next_one}" in said.out
    done[:] = done * 2
    assert command(tmp_path) == 0
    assert f"{len(SMOKE) - 1} new records, {len(SMOKE)} packed into" in capsys.readouterr().out


def test_published_runs_are_trained_anew_into_a_folder_of_ones_own(tmp_path, instant, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("basis.environment.repository_root", lambda: tmp_path)
    for run in SMOKE:
        put_record(tmp_path / "results", run)
    words = "run headline --device cpu --jobs 1 --quiet"
    assert main(words.split()) == 0
    said = f"all {len(SMOKE)} runs are published in results; to train them yourself: basis {words} --fresh"
    assert (said in capsys.readouterr().out, instant) == (True, [])
    assert main([*words.split(), "--fresh"]) == 0
    said = capsys.readouterr().out
    assert len(instant) == len(load_records(tmp_path / "my-results")) == len(SMOKE)
    assert f"run 3 of {len(SMOKE)}: headline, {SMOKE[2].variant}, seed {SMOKE[2].seed}: done in" in said
    assert "basis figures --results my-results --profile smoke" in said


@pytest.mark.parametrize(("load", "threads", "said"), [(0.2, 4, "on cpu\n"), (2.9, 1, "1 of 4"), (9, 1, "busy")])
def test_one_run_on_a_cpu_leaves_busy_cores_alone(load, threads, said, tmp_path, instant, capsys, monkeypatch):  # noqa: F811
    torch.set_num_threads(4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    assert command(tmp_path) == 0
    assert said in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "there is no study 'nothing'"),
        (["cost", "--profile", "paper"], "has no runs"),
        (["headline", "--profile", "huge"], "huge"),
        (["headline", "--time-limit", "soon"], "invalid duration value: 'soon'"),
        (["headline", "--device", "cuda:99"], "no device of this machine"),
        (["headline", "--profile", "paper", "--device", "cpu"], "'paper' is for cuda"),
        (["headline", "--archive", "{tmp}/mine"], "no whole archive"),
        (["headline", "--archive", "{tmp}/mine/new.tar.gz"], "nothing can be written"),
        (["headline", "--executor", "ray"], "ray is not installed"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_run(arguments, says, tmp_path, instant, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "mine").write_text("precious")
    arguments = [text.format(tmp=tmp_path) for text in arguments]
    try:
        code = main(["run", "--results", str(tmp_path / "here"), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert instant == []
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_deeper_network_is_told_to_take_longer(tmp_path):
    put_record(tmp_path, DENSE[0])
    known, deep = load_records(tmp_path), dataclasses.replace(DENSE[0], model="resnet56")
    seconds = [estimate([run], "cpu", known) for run in (DENSE[0], deep)]
    assert seconds == [pytest.approx(2.0), pytest.approx(2.0 * 55 / 19)]


def test_status_counts_and_never_adds_up_times_of_cpus_and_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("basis.commands.run.choose_device", lambda: torch.device("cpu"))
    first, second = DENSE[:2]
    put_record(tmp_path, first, result=fake_result(first) | {"train_seconds": 3600.0})
    fast = fake_result(second) | {"train_seconds": 0.5, "setup_seconds": 0.25}
    put_record(tmp_path, second, result=fast, environment={"device": "x", "device_type": "cuda", "jobs": 3})
    row = status(tmp_path).set_index(["study", "profile"]).loc[("headline", "smoke")]
    assert (row["done"], row["missing"], row["seconds"]) == (2, len(SMOKE) - 2, {"cpu": 3600.0, "cuda": 0.25})
    assert main(["status", "--results", str(tmp_path)]) == 0
    line = next(one for one in capsys.readouterr().out.splitlines() if one.split()[:2] == ["headline", "smoke"])
    assert "1.00 h CPU, 0.00 h GPU" in line
    assert float(line.split()[6]) == len(SMOKE) - 2  # an hour for each that is missing
