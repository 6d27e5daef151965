"""Runs on a Ray cluster, an optional extra: the same records, the same resuming."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from typing import Any

from basis.environment import repository_root
from basis.experiments.executors import Answer, Order, Task, checked, dispatch, do_task
from basis.experiments.runs import Progress


class RayCluster:
    """``jobs`` tasks at a time on the Ray cluster of ``$RAY_ADDRESS``, or on one started here.

    All of its machines must see the folder of the records, and the data. On a cluster with GPUs a task gets one,
    or its share where there are more jobs than GPUs; else it gets a core.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError: for fewer than one job.
    """

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs is {jobs}, but it must be at least 1")
        importlib.import_module("ray")
        self.jobs = jobs

    def __call__(self, order: Order) -> Iterator[Progress]:
        """See :class:`Executor`."""
        return dispatch(order, _RayPool(self.jobs))


class _RayPool:
    """Ray tasks; a worker is a place in the cluster."""

    def __init__(self, size: int | None) -> None:
        self.ray = ray = importlib.import_module("ray")
        if not ray.is_initialized():
            root = repository_root()
            passed = {name: os.environ[name] for name in ("BASIS_DATA",) if name in os.environ}
            passed |= {"PYTHONPATH": str(root)} if root else {}
            options = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": size, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="error", runtime_env={"env_vars": passed}, **options)
        there = ray.cluster_resources()
        gpus, processors = there.get("GPU", 0), int(there.get("CPU", 1))
        self.size = size or int(gpus or processors)
        self.sharing = max(1, math.ceil(self.size / gpus)) if gpus else 1
        # A worker that dies is dealt with by `dispatch`, as elsewhere.
        needs = {"num_cpus": 1, "num_gpus": 1 / self.sharing if gpus else 0, "max_retries": 0}
        self.task = ray.remote(**needs)(do_task)
        self.hands: dict[Any, int] = {}

    def give(self, worker: int, task: Task, order: Order) -> None:
        place = str(order.folder.resolve())
        self.hands[self.task.remote(task, place, order.device, order.until, self.sharing)] = worker

    def answer(self) -> Answer:
        (done, *_), _ = self.ray.wait(list(self.hands), num_returns=1)
        worker = self.hands.pop(done)
        try:
            return Answer(worker, checked(self.ray.get(done)))
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as error:
            return Answer(worker, died=type(error).__name__)

    def close(self) -> None:
        for task in self.hands:
            self.ray.cancel(task, force=True)
