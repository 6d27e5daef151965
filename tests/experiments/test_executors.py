"""Executors: one loop for processes and for Ray, workers that die, what stops every run."""

import importlib.util
import json
import os
import pickle
import queue
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from basis.cli import main
from basis.data import DataError
from basis.experiments import executors
from basis.experiments.executors import TRIES, Answer, Order, Processes, Task, dispatch, do_task, in_this_process
from basis.experiments.runs import Progress, load_records, record_path
from basis.experiments.studies import STUDIES
from basis.saving import Unwritable
from tests.compression.test_robustness import contents, descendants, needs_proc, timeless, tiny_runs

SMOKE = [Task(run, STUDIES["headline"].definition) for run in STUDIES["headline"].runs("smoke")]


class Scripted:
    """A pool whose workers do what ``answers`` says of a variant: a list of outcomes, or "dies"."""

    def __init__(self, size, answers=()):
        self.size, self.answers, self.given, self.closed = size, dict(answers), [], False
        self.hands = queue.Queue()

    def give(self, worker, task, order):
        self.given.append(task.run)
        self.hands.put((worker, task.run))

    def answer(self):
        worker, run = self.hands.get_nowait()
        outcome = self.answers.get(run.variant, "done")
        if isinstance(outcome, list):
            outcome = outcome.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "dies":
            return Answer(worker, died="signal 9")
        return Answer(worker, None if outcome == "held" else Progress(run, outcome, "", 1.0))

    def close(self):
        self.closed = True


def order_of(tasks, folder, **options):
    return Order(tasks=tasks, folder=folder, device="cpu", **options)


def test_every_run_is_given_once_and_in_order_but_for_those_that_wait_for_a_table(tmp_path):
    pool = Scripted(2)
    steps = list(dispatch(order_of(SMOKE, tmp_path), pool))
    assert {step.run.id for step in steps} == {task.run.id for task in SMOKE}
    assert len(pool.given) == len(SMOKE)
    assert pool.given[:2] == [SMOKE[0].run, SMOKE[1].run]
    table = next(i for i, step in enumerate(steps) if step.run.variant == "table")
    assert all(pool.given.index(run) > table for run in pool.given if run.choice)
    assert pool.closed


def test_what_waits_for_a_table_goes_on_when_the_table_has_failed(tmp_path):
    pool = Scripted(3, {"table": "failed"})
    assert len(list(dispatch(order_of(SMOKE, tmp_path), pool))) == len(SMOKE)


def test_a_worker_that_dies_loses_only_its_run_and_that_is_begun_again(tmp_path):
    pool = Scripted(2, {"table": ["dies", "done"]})
    steps = list(dispatch(order_of(SMOKE, tmp_path), pool))
    assert [step.outcome for step in steps] == ["done"] * len(SMOKE)
    assert len(pool.given) == len(SMOKE) + 1


def test_a_run_that_kills_its_workers_is_given_up(tmp_path):
    pool = Scripted(1, {"table": "dies"})
    steps = list(dispatch(order_of(SMOKE, tmp_path), pool))
    (failed,) = [step for step in steps if step.outcome == "failed"]
    assert failed.message == f"{TRIES} workers died of it, the last by signal 9"
    assert len(pool.given) == len(SMOKE) + TRIES - 1


def test_what_would_stop_every_run_ends_the_workers(tmp_path):
    pool = Scripted(2, {"dense": DataError("no data")})
    with pytest.raises(DataError, match="no data"):
        list(dispatch(order_of(SMOKE, tmp_path), pool))
    assert pool.closed


def test_nothing_is_given_after_the_deadline(tmp_path):
    pool = Scripted(2)
    assert list(dispatch(order_of(SMOKE, tmp_path, deadline=time.monotonic() - 1), pool)) == []
    assert pool.given == []
    assert list(in_this_process(order_of(SMOKE, tmp_path, deadline=time.monotonic() - 1))) == []


def test_a_worker_returns_what_it_must_not_raise(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    task = tiny_runs()[1]
    assert isinstance(do_task(task, str(place), "cpu", None, 1), Unwritable)
    step = do_task(task, str(tmp_path), "cpu", time.time() - 1, 1)
    assert (step.outcome, step.run) == ("paused", task.run)  # its table is not there
    assert pickle.loads(pickle.dumps(step)) == step


@pytest.mark.slow
def test_a_full_disk_stops_processes_with_a_clear_sentence_and_leaves_what_was_there(tmp_path, monkeypatch):
    """Files of the workers may not exceed 4 kB here, so that a checkpoint fails as on a full disk."""
    before = record_path(tmp_path, SMOKE[1].run)
    before.parent.mkdir(parents=True)
    before.write_text("old")
    start = executors.subprocess.Popen
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "limited"]
    monkeypatch.setattr(
        executors.subprocess, "Popen", lambda command, **options: start([*limited, *command], **options)
    )
    with pytest.raises(Unwritable, match=r"could not be written \(File too large\); make room there"):
        list(Processes(2)(order_of(tiny_runs(1)[2:] * 2, tmp_path)))
    assert before.read_text() == "old"
    assert not list(tmp_path.rglob("*.tmp"))
    assert load_records(tmp_path / "nothing") == []


def test_the_command_says_how_to_get_ray(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["run", "headline", "--executor", "ray"]) == 2
    assert "ray is not installed; `pip install -e '.[ray]'` adds it" in capsys.readouterr().err


# -- Ray, really --------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """A local cluster of two workers."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")
    root = str(Path(executors.__file__).resolve().parents[1])
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
                 object_store_memory=80 * 2**20, runtime_env={"env_vars": {"PYTHONPATH": root}})  # fmt: skip
    except Exception as error:
        pytest.skip(f"ray cannot start here: {error}")
    yield ray
    ray.shutdown()


def workers_at_work():
    """Workers of the cluster that was started here which have a task in hand."""
    found = []
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::do_task"):
                found.append(pid)
    return found


@needs_proc
@pytest.mark.slow
def test_ray_does_the_same_runs_and_retries_what_a_killed_worker_had(cluster, tmp_path):
    from basis.experiments.cluster import RayCluster

    tasks = tiny_runs(2)
    killed = threading.Event()

    def kill_one():
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed.is_set():
            at_work = workers_at_work() if list(tmp_path.rglob("*.lock")) else []
            if at_work:
                os.kill(at_work[0], signal.SIGKILL)
                killed.set()
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    steps = list(RayCluster(2)(order_of(tasks, tmp_path)))
    killed_in_time = killed.is_set()
    killed.set()
    thread.join()
    assert killed_in_time
    assert sorted(step.outcome for step in steps) == ["done"] * len(tasks)
    assert {record.id for record in load_records(tmp_path)} == {task.run.id for task in tasks}
    assert not list(tmp_path.rglob("*.pt"))
    # What was cut off was begun again, and came out as if nothing had happened.
    list(in_this_process(order_of([tasks[0], tasks[2]], tmp_path / "alone")))
    there = contents(tmp_path)
    for name, content in contents(tmp_path / "alone").items():
        assert timeless(json.loads(content)) == timeless(json.loads(there[name]))
