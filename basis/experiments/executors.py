"""Where runs are done: in this process or in several, and by :mod:`basis.experiments.cluster` on other machines.

Records and resuming are the same everywhere, and so is the loop, :func:`dispatch`: a worker gets one run at a time,
the most valuable one that is ready. A worker that dies loses only the run that it had in hand, whose checkpoint
stays, and that is begun again.
"""

from __future__ import annotations

import base64
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch

from basis.experiments.runs import DEVICES, Progress, Run, attempt, checkpoint_path, device_for, measured_seconds
from basis.experiments.studies.hours import Pace
from basis.training.reuse import Reuse

MARGIN = 1.1  # times what a run took before it has to have time for
THIN = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
TRIES = 3  # how often a run is begun that kills its worker, or loses it


class Task(NamedTuple):
    """A run, and the definition of its study that it is made under."""

    run: Run
    definition: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an executor is asked to do.

    Args:
        tasks: the runs in order of value; those that have a record are passed over.
        folder: where the records go; all workers must see it.
        device: of :func:`basis.experiments.runs.device_for`.
        deadline: a ``time.monotonic()`` after which nothing is begun.
        progress: whether to draw bars, in this process.
        pace: how long runs take here; one that would not end before the deadline is not begun.
    """

    tasks: Sequence[Task]
    folder: Path
    device: str | None = None
    deadline: float | None = None
    progress: bool = False
    pace: Pace = field(default_factory=Pace)

    def begins(self, run: Run) -> bool:
        """Whether there is time to do ``run``, as far as that is known; one with a checkpoint has begun already."""
        if self.deadline is None:
            return True
        left, seconds = self.deadline - time.monotonic(), self.pace.seconds(run.config)
        if left <= 0 or seconds is None or MARGIN * seconds <= left:
            return left > 0
        return checkpoint_path(self.folder, run, device_for(run.profile, self.device)).exists()

    def check(self, run: Run) -> None:
        """Raise ``ValueError`` where there is no time even for ``run``, the first."""
        if not self.late and not self.begins(run):
            seconds = MARGIN * (self.pace.seconds(run.config) or 0)
            raise ValueError(
                f"the time limit leaves {(self.deadline or 0) - time.monotonic():.0f} s, but one run ({run.variant}) takes "
                f"about {seconds:.0f} s here; give at least --time-limit {math.ceil(seconds) + 10}s"
            )

    @property
    def until(self) -> float | None:
        """The deadline as a ``time.time()``, which other processes know too."""
        return None if self.deadline is None else self.deadline - time.monotonic() + time.time()

    @property
    def late(self) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and time.monotonic() >= self.deadline


class Executor(Protocol):
    """Does the runs of an order, and tells of each that it has dealt with."""

    def __call__(self, order: Order) -> Iterator[Progress]:
        """Raise Unwritable or DataError for what would stop every run."""


def in_this_process(order: Order) -> Iterator[Progress]:
    """One run after the other, here."""
    reuse = Reuse()
    if order.tasks and order.deadline is not None:
        first = order.tasks[0].run
        if order.pace.seconds(first.config) is None:
            seconds = measured_seconds(first, device_for(first.profile, order.device), reuse)
            if seconds is not None:
                for one in (first, replace(first, ladder=None)):
                    order.pace.learn(one.config, seconds)
        order.check(first)
    for task in order.tasks:
        if not order.begins(task.run):
            return
        step = attempt(
            task.run, task.definition, folder=order.folder, device=order.device,
            should_stop=lambda: order.late, progress=order.progress, reuse=reuse,
        )  # fmt: skip
        if step is not None:
            _learn(order, step)
            yield step


def _learn(order: Order, step: Progress) -> None:
    if step.outcome == "done":
        order.pace.learn(step.run.config, step.seconds)


# -- several workers --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a worker says: what became of its task (None: there was nothing to do), or how the worker died."""

    worker: int
    step: Progress | None = None
    died: str | None = None


class Pool(Protocol):
    """Workers that take one task at a time."""

    size: int

    def give(self, worker: int, task: Task, order: Order) -> None:
        """Have an idle worker begin a task."""

    def answer(self) -> Answer:
        """Wait for the next answer of any worker; raise what would stop every run."""

    def close(self) -> None:
        """End all workers; what they have in hand stays in its checkpoint."""


def dispatch(order: Order, pool: Pool) -> Iterator[Progress]:
    """Keep the workers of ``pool`` busy until all is done or the deadline has come.

    A run whose plan is selected from another run's sensitivities waits for that run, and no worker waits with it.
    """
    waiting = list(order.tasks)
    hands: dict[int, Task] = {}
    deaths: Counter[str] = Counter()
    if waiting:
        order.check(waiting[0].run)
    try:
        while True:
            for worker in range(pool.size):
                place = None if worker in hands else _first_ready(waiting, hands.values())
                if place is not None and order.begins(waiting[place].run):
                    hands[worker] = waiting.pop(place)
                    pool.give(worker, hands[worker], order)
            if not hands:
                return
            answer = pool.answer()
            if answer.worker not in hands:  # it died while it had nothing to do
                continue
            task, step = hands.pop(answer.worker), answer.step
            if answer.died is not None:
                deaths[task.run.id] += 1
                if deaths[task.run.id] < TRIES:
                    waiting.insert(0, task)
                else:
                    step = Progress(task.run, "failed", f"{TRIES} workers died of it, the last by {answer.died}", 0.0)
            if step is not None:
                _learn(order, step)
                yield step
    finally:
        pool.close()


def _first_ready(waiting: Sequence[Task], in_hand: Iterable[Task]) -> int | None:
    """The place of the first task that needs no table which is being measured, or is about to be."""
    coming = {task.run.id for task in (*waiting, *in_hand)}
    ready = (i for i, (run, _) in enumerate(waiting) if run.choice is None or run.choice.table not in coming)
    return next(ready, None)


def do_task(
    task: Task, folder: str, device: str | None, until: float | None, jobs: int, reuse: Reuse | None = None
) -> Progress | Exception | None:
    """A worker's part: do the task, until then; what would stop every run is returned, not raised."""

    def late() -> bool:
        return until is not None and time.time() >= until

    try:
        return attempt(
            task.run, task.definition, folder=Path(folder), device=device, should_stop=late, jobs=jobs, reuse=reuse
        )
    except Exception as error:
        return error


def checked(step: Progress | Exception | None) -> Progress | None:
    """What :func:`do_task` has returned, without what would stop every run: that is raised."""
    if isinstance(step, Exception):
        raise step
    return step


# -- processes --------------------------------------------------------------------------------------


class Processes:
    """``jobs`` processes on this machine, sharing its cores and its GPUs.

    Raises:
        ValueError: for fewer than one.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}, but it must be at least 1")
        self.jobs = jobs

    def __call__(self, order: Order) -> Iterator[Progress]:
        """See :class:`Executor`."""
        return in_this_process(order) if self.jobs == 1 else dispatch(order, _ProcessPool(self.jobs))


class _ProcessPool:
    """Child processes that read tasks from their standard input and write answers to their standard output."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.answers: queue.Queue[tuple[int, subprocess.Popen[bytes], bytes]] = queue.Queue()

    def give(self, worker: int, task: Task, order: Order) -> None:
        child = self.children.get(worker)
        if child is None or child.poll() is not None:
            child = self.children[worker] = self._start(worker)
        device, gpus = order.device, max(1, torch.cuda.device_count())
        if device is None and gpus > 1 and DEVICES.get(task.run.profile) != "cpu":
            device = f"cuda:{worker % gpus}"
        sharing = -(-self.size // (gpus if order.device is None else 1))
        with suppress(OSError):  # that a child has died is an answer, too
            send(child.stdin, (task, str(order.folder), device, order.until, sharing))

    def _start(self, worker: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // self.size))}
        command = [sys.executable, "-m", "basis.experiments.executors"]
        child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self._listen, args=(worker, child), daemon=True).start()
        return child

    def _listen(self, worker: int, child: subprocess.Popen[bytes]) -> None:
        for line in child.stdout or ():
            self.answers.put((worker, child, line))
        child.wait()
        self.answers.put((worker, child, b""))

    def answer(self) -> Answer:
        while True:
            worker, child, line = self.answers.get()
            if self.children.get(worker) is not child:
                continue  # of a predecessor
            if line.endswith(b"\n"):
                return Answer(worker, checked(receive(line)))
            if not line:
                del self.children[worker]
                code = child.returncode
                return Answer(worker, died=f"signal {-code}" if code < 0 else f"exit status {code}")

    def close(self) -> None:
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            child.wait()


def jobs_for(runs: Sequence[Run], device: torch.device) -> int:
    """How many runs side by side: on a CPU as many as there are cores, on a GPU one, or up to 8 of a narrow network.

    The first run speaks for all. That narrow networks gain by it is an estimate, not a measurement.
    """
    most = cores()
    if device.type == "cuda" and runs:
        first = runs[0]
        narrow = (isinstance(first.width, int) and first.width <= 32) or first.model in THIN
        most = min(8, most // 2) if narrow else 1
    return max(1, min(most, len(runs)))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def send(pipe: IO[bytes] | None, value: Any) -> None:
    """One value as one line."""
    if pipe is not None:
        pipe.write(base64.b64encode(pickle.dumps(value)) + b"\n")
        pipe.flush()


def receive(line: bytes) -> Any:
    """The value of a line of :func:`send`."""
    return pickle.loads(base64.b64decode(line))


def main() -> None:
    """What a child process does: a task for every line, until the parent closes the pipe or dies."""
    reuse = Reuse()
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        for line in sys.stdin.buffer:
            task, folder, device, until, jobs = receive(line)
            send(answers, do_task(task, folder, device, until, jobs, reuse))


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        main()
