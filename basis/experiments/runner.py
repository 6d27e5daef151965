"""Doing runs: one at a time here, or side by side in several processes or on a Ray cluster.

A record appears whole or not at all, and only when its run is finished; a lock that dies with its process keeps two
from doing one run twice. So everything may be killed at any moment and started again, by any number of processes on
one folder. A worker that dies loses only the run that it had in hand; its checkpoint stays, and it is begun again.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch

from basis.data import DataError
from basis.environment import environment
from basis.experiments.execution import TableMissing, execute, prepare_data
from basis.experiments.records import Record, read_record, take_lock, write_record
from basis.experiments.runs import Run, checkpoint_path, device_for, record_path
from basis.saving import Unwritable, unwritable
from basis.text import first_line
from basis.training.loop import TrainingPaused

TRIES = 3  # how often a run is begun whose worker dies
CGROUP = Path("/sys/fs/cgroup")
THIN = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


class TooLittleMemory(RuntimeError):
    """The device cannot hold the network's training, so no run like it could be done."""


class Task(NamedTuple):
    """A run, and the definition of its study that it is made under."""

    run: Run
    definition: str


class Progress(NamedTuple):
    """What became of a run that was begun: ``outcome`` is "done", "paused" or "failed"."""

    run: Run
    outcome: str
    message: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be done."""

    tasks: Sequence[Task]  # the most valuable first; those that have a record are passed over
    folder: Path  # of the records; all workers must see it
    device: str | None = None  # of basis.experiments.runs.device_for
    deadline: float = math.inf  # a time.time(), after which nothing is begun
    progress: bool = False  # whether to draw bars, in this process

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`attempt` is given beside the task."""
        return {"folder": self.folder.resolve(), "deadline": self.deadline, "device": self.device}


def attempt(
    run: Run, definition: str, *, folder: Path, device: str | None = None, deadline: float = math.inf,
    progress: bool = False, jobs: int = 1,
) -> Progress | None:  # fmt: skip
    """Do ``run``, unless it has its record or another process holds it: then None.

    A run under way stops at the end of its epoch at the deadline, leaving a checkpoint. One that fails is reported, as
    is one whose record cannot be read. A record made under another ``definition`` is replaced. ``jobs``, how many
    processes share the device, is noted in the record.

    Raises:
        Unwritable, DataError, TooLittleMemory: what would stop every other run, too.
    """
    place, path = device_for(run.profile, device), record_path(folder, run)
    checkpoint, began = checkpoint_path(folder, run, place), time.monotonic()
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take_lock(lock, wait=False)
        if path.exists() and read_record(path).definition == definition:
            return None
        result = execute(
            run, device=place, folder=folder, checkpoint=checkpoint,
            should_stop=lambda: time.time() >= deadline, progress=progress and f"{run.variant}, seed {run.seed}",
        )  # fmt: skip
        write_record(path, Record(run.id, run.config, result, environment(place) | {"jobs": jobs}, definition))
        for left in [*checkpoint.parent.glob(f"{checkpoint.stem}*"), *path.parent.glob(f"{path.name}.*.tmp")]:
            left.unlink(missing_ok=True)
        images = "validation" if result["test"] is None else "test"
        outcome, message = "done", f"{images} accuracy {result[images]['accuracy']:.2%}"
    except filelock.Timeout:
        return None
    except (TrainingPaused, TableMissing, ModuleNotFoundError) as pause:
        outcome, message = "paused", str(pause)
    except (DataError, Unwritable):
        raise
    except OSError as error:
        raise unwritable(path.parent, error) from error
    except torch.cuda.OutOfMemoryError as error:
        raise TooLittleMemory(f"{place} has too little free memory for {run.model}; give fewer --jobs") from error
    except (RuntimeError, ValueError) as error:
        outcome, message = "failed", f"{type(error).__name__}: {first_line(error)}"
    finally:
        if lock.is_locked and path.exists():
            path.with_suffix(".lock").unlink(missing_ok=True)  # while it is held: nobody else can hold it then
        lock.release()
    return Progress(run, outcome, message, time.monotonic() - began)


def dispatch(
    order: Order, submit: Callable[[int, Task], Future[Progress | None]], size: int, *,
    died: tuple[type[BaseException], ...] = (BrokenProcessPool,),
) -> Iterator[Progress]:  # fmt: skip
    """Keep ``size`` workers busy until all is done or the deadline has come.

    A run whose plan is selected from another run's sensitivities waits for that run, and no worker waits with it.
    ``submit`` has an idle worker, by its number, begin a task; ``died`` is what its future raises when the worker died.
    What else it raises would stop every run, and is raised.
    """
    waiting, deaths = list(order.tasks), Counter[str]()
    busy: dict[Future[Progress | None], tuple[int, Task]] = {}
    while True:
        for worker in set(range(size)) - {worker for worker, _ in busy.values()}:
            coming = {task.run.id for task in [*waiting, *(task for _, task in busy.values())]}
            ready = (task for task in waiting if task.run.choice is None or task.run.choice.table not in coming)
            first = next(ready, None)
            if first is None or time.time() >= order.deadline:
                break
            waiting.remove(first)
            busy[submit(worker, first)] = (worker, first)
        if not busy:
            return
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            _, task = busy.pop(future)
            try:
                step = future.result()
            except died as error:
                deaths[task.run.id] += 1
                if deaths[task.run.id] < TRIES:
                    waiting.insert(0, task)
                    continue
                step = Progress(task.run, "failed", f"{TRIES} workers died of it ({type(error).__name__})", 0.0)
            if step is not None:
                yield step


def in_processes(order: Order, jobs: int) -> Generator[Progress, None, None]:
    """``jobs`` runs side by side on this machine, in processes that share its cores and its GPU; 1: in this one.

    The processes end with the iteration, and with this process, however that ends. Raises what :func:`attempt` does.
    """
    if jobs == 1:

        def here(_: int, task: Task) -> Future[Progress | None]:
            future: Future[Progress | None] = Future()
            future.set_result(attempt(*task, progress=order.progress, **order.options))
            return future

        try:
            yield from dispatch(order, here, 1)
        finally:
            prepare_data.cache_clear()
        return
    context = multiprocessing.get_context("spawn")
    alive, ours = context.Pipe(duplex=False)  # ends when `ours` is closed or this process dies
    options = order.options | {"jobs": jobs}

    def pool() -> ProcessPoolExecutor:  # of one, since a process that dies breaks its pool
        given = (alive, max(1, cores() // jobs))
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker, initargs=given)

    pools = [pool() for _ in range(jobs)]

    def submit(worker: int, task: Task) -> Future[Progress | None]:
        try:
            return pools[worker].submit(attempt, *task, **options)
        except BrokenProcessPool:
            pools[worker] = pool()
            return pools[worker].submit(attempt, *task, **options)

    try:
        yield from dispatch(order, submit, jobs)
        for one in pools:
            one.shutdown()
    finally:
        ours.close()
        for one in pools:
            one.shutdown(cancel_futures=True)


def _begin_worker(alive: Any, threads: int) -> None:
    def end_with_parent() -> None:
        with suppress(EOFError, OSError):
            alive.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def on_ray(order: Order, jobs: int | None = None) -> Generator[Progress, None, None]:
    """``jobs`` tasks at a time on the Ray cluster of ``$RAY_ADDRESS``, or on one started here.

    All of its machines must see the folder of the records, and the data. On a cluster with GPUs a task gets one,
    or its share where there are more jobs than GPUs; else it gets a core. Raises ``ModuleNotFoundError`` without Ray.
    """
    ray: Any = importlib.import_module("ray")
    if not ray.is_initialized():
        passed = {name: os.environ[name] for name in ("BASIS_DATA", "PYTHONPATH") if name in os.environ}
        started: dict[str, Any] = (
            {} if "RAY_ADDRESS" in os.environ else {"num_cpus": jobs or None, "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level=40, runtime_env={"env_vars": passed}, **started)
    there = ray.cluster_resources()
    gpus, size = there.get("GPU", 0), jobs or int(there.get("GPU", 0) or there.get("CPU", 1))
    sharing = max(1, math.ceil(size / gpus)) if gpus else 1
    remote = ray.remote(num_cpus=1, num_gpus=1 / sharing if gpus else 0, max_retries=0)(attempt)
    begun = []

    def submit(_: int, task: Task) -> Future[Progress | None]:
        begun.append(remote.remote(*task, **order.options, jobs=sharing))
        return begun[-1].future()

    try:
        yield from dispatch(order, submit, size, died=(ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError))
    finally:
        for task in begun:
            ray.cancel(task, force=True)


def jobs_for(runs: Sequence[Run], device: torch.device) -> int:
    """How many runs side by side: on a CPU as many as there are cores, on a GPU one, or up to 8 of a narrow network.

    The first run speaks for all. That narrow networks gain by it is an estimate, not a measurement.
    """
    most = cores()
    if device.type == "cuda" and runs:
        narrow = (isinstance(runs[0].width, int) and runs[0].width <= 32) or runs[0].model in THIN
        most = min(8, most // 2) if narrow else 1
    return max(1, min(most, len(runs)))


def cores() -> int:
    """The cores that this process may use, by its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # not there, or "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            allowed = min(allowed, quota // period) if quota > 0 else allowed
    return max(1, allowed)


def idle_cores() -> int:
    """Those of :func:`cores` that other processes leave, by the load average of the last minute; at least 1."""
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, min(cores(), (os.cpu_count() or 1) - busy))
