"""The runner, tried for real: processes killed at random moments, a full disk, and workers that die."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from basis.experiments.executors import Order, Processes, Task
from basis.experiments.runs import Choice, Ladder, Run
from basis.experiments.studies import STUDIES
from basis.training.loop import Recipe

DEFINITION = STUDIES["headline"].definition
DRIVER = """
import pickle, sys
from basis.experiments.executors import Processes
steps = list(Processes(2)(pickle.load(open(sys.argv[1], "rb"))))
sys.exit(any(step.outcome == "failed" for step in steps))
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")


def tiny_runs(count=4):
    """Runs of a second each: one that measures sensitivities, some that select from them, some dense."""
    recipe = Recipe(epochs=3, batch_size=25, translate=1, cutout=0, precision="fp32")
    base = Run(study="headline", profile="smoke", variant="dense", seed=0, model="resnet20", width=2, data="synthetic",
               images=100, validation=50, recipe=recipe)  # fmt: skip
    ladder = Ladder(measures={"oneshot_bn": (0.5,)}, multiple=1, images=50, calibration=50)
    table = Run(**{**vars(base), "variant": "table", "test": False, "ladder": ladder})
    choice = Choice(rule="optimal", unit="params", budget=0.75, table=table.id, measure="oneshot_bn")
    chosen = Run(**{**vars(base), "variant": "selected", "choice": choice})
    return [Task(run, DEFINITION) for run in (table, chosen, *(Run(**{**vars(base), "seed": n}) for n in range(count)))]


def timeless(value):
    """A record's content without its seconds, its machine and its date."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k != "environment"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    return {path.stem: path.read_bytes() for path in Path(folder).glob("*/*/*.json")}


def descendants(pid):
    """The processes that ``pid`` has started, and theirs."""
    try:
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in descendants(child)]


def kill_at_random(command, folder, finished, *, kills, pause, seed, limit):
    """Run ``command`` again and again, killing it, or a worker of it, after random times; then let it finish.

    Times count from when there are workers, so that there is work to disturb. The workers of a parent that was killed
    go on for a while beside those of the next one. A record that was there once never changes. When all is done,
    ``finished(folder)`` looks at it, and while kills are left it is all begun anew. Returns the numbers of parents and
    of workers that were killed.
    """
    rng, known, counts = random.Random(seed), {}, {"parent": 0, "worker": 0}
    until = time.monotonic() + limit
    orphans: set[int] = set()
    process = None
    while time.monotonic() < until:
        if process is None:
            with open(f"{folder}.log", "ab") as log:
                process = subprocess.Popen(command, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        left = kills - sum(counts.values())
        while left and process.poll() is None and not descendants(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        try:
            code = process.wait(timeout=rng.uniform(*pause) if left else max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        now = contents(folder)
        assert {name: now.get(name) for name in known} == known, "a finished record was lost or made again"
        known = now
        for content in now.values():
            json.loads(content)
        if code is not None:
            process = None
            if code == 1:  # a run was given up whose workers died too often; it is begun again
                continue
            assert code == 0
            if any(Path(f"/proc/{pid}").exists() for pid in orphans):  # one may be at a run that was left to it
                time.sleep(1)
                continue
            finished(folder)
            if not left:
                return counts
            shutil.rmtree(folder)
            known = {}
        elif left:
            workers = descendants(process.pid)
            victim = rng.choice([process.pid, *workers])
            counts["parent" if victim == process.pid else "worker"] += 1
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim == process.pid:
                process.wait()
                process = None
                orphans |= set(workers)
    if process is not None:
        process.kill()
    pytest.fail(f"not finished within {limit} s, after {counts}")


def check_equal(disturbed, undisturbed):
    """The same runs with the same results, and nothing left over."""
    one, other = contents(disturbed), contents(undisturbed)
    assert set(one) == set(other)
    for name in other:
        assert timeless(json.loads(one[name])) == timeless(json.loads(other[name]))
    for pattern in ("*.tmp", "*.pt", "*.jsonl"):
        assert not list(Path(disturbed).rglob(pattern))


@needs_proc
@pytest.mark.weekly
def test_killed_at_random_moments_nothing_is_lost_or_done_twice(tmp_path):
    tasks = tiny_runs()
    undisturbed = Order(tasks=tasks, folder=tmp_path / "undisturbed")
    steps = list(Processes(2)(undisturbed))
    assert {step.outcome for step in steps} == {"done"}
    assert steps[0].run.variant != "selected"
    order = tmp_path / "order"
    order.write_bytes(pickle.dumps(Order(tasks=tasks, folder=tmp_path / "disturbed")))
    command = [sys.executable, "-c", DRIVER, str(order)]
    finished = partial(check_equal, undisturbed=tmp_path / "undisturbed")
    counts = kill_at_random(command, tmp_path / "disturbed", finished, kills=5, pause=(0, 3), seed=0, limit=300)
    assert counts["parent"] + counts["worker"] == 5
