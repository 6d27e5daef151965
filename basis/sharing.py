"""How many runs side by side? By cores on a CPU; on a GPU by a short trial of the run that is next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch

from basis.data import Data, Images
from basis.executors import Task, cores, receive, send
from basis.models import build
from basis.runs import Run, device_for
from basis.substitution import Plan, substitute
from basis.training import TrainingError, TrainingPaused, train

GAIN = 0.05  # more processes must be at least this much faster together
STEPS = 10  # of one epoch of the trial


def choose_jobs(tasks: Sequence[Task], device: str | None = None, *, seconds: float = 3.0) -> tuple[int, str]:
    """How many processes to do ``tasks`` with, and why, in words.

    Raises:
        ValueError: for a device of another kind than the profile's.
        TrainingError: where the trial fails.
    """
    if not tasks:
        return 1, "nothing is missing"
    run, most = tasks[0].run, min(cores(), len(tasks))
    if device_for(run.profile, device).type == "cpu":
        return most, f"{cores()} cores, {len(tasks)} runs"
    rates = measure(run, device, sizes=[n for n in (1, 2, 4, 8) if n <= max(1, most)], seconds=seconds)
    jobs = best(rates)
    said = ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items())
    gpus = torch.cuda.device_count() if device is None else 1
    return jobs * gpus, f"images per second together on one GPU, by processes: {said}"


def best(rates: Mapping[int, float]) -> int:
    """The fewest processes that are as fast together as any number, but for :data:`GAIN`."""
    return min(n for n, rate in rates.items() if rate * (1 + GAIN) >= max(rates.values()))


def measure(run: Run, device: str | None, *, sizes: Sequence[int], seconds: float) -> dict[int, float]:
    """Images per second of training ``run`` in so many processes at once, all of them together.

    Stops where more processes bring nothing, or do not fit into the memory.

    Raises:
        TrainingError: where not even one process can train it.
    """
    rates: dict[int, float] = {}
    command = [sys.executable, "-m", "basis.sharing"]
    with ExitStack() as stack:
        children = []
        for _ in range(max(sizes)):
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(_end, child)
            with suppress(BrokenPipeError):  # of one that has ended already, which is not ready then
                send(child.stdin, (run, device))
            children.append(child)
        ready = [child for child in children if child.stdout is not None and child.stdout.readline()]
        for size in sizes:
            if size > len(ready):
                break
            for child in ready[:size]:
                send(child.stdin, seconds)
            answers = [child.stdout.readline() if child.stdout else b"" for child in ready[:size]]
            if not all(answers):
                break
            rates[size] = sum(map(receive, answers))
            if best(rates) != size:
                break
    if not rates:
        raise TrainingError(f"the trial of {run.arm} failed, whose reason stands above; give --jobs a number")
    return rates


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()


def _train(run: Run, device: str | None) -> None:
    """What a child of :func:`measure` does: train for as long as each line says, and answer how fast it was."""
    place = device_for(run.profile, device)
    model: torch.nn.Module = build(run.model, width=run.width)
    if run.plan or run.ratio:
        model = substitute(model, Plan(run.plan) if run.plan else None, ratio=run.ratio, mode=run.mode, init="random")
    count = STEPS * run.recipe.batch_size
    images = Images(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (count,)))
    data = Data("noise", images, images)
    recipe = replace(run.recipe, epochs=10**6, skip=None)  # the learning rate stays small

    def rate(seconds: float) -> float:
        times = [time.monotonic()]

        def late() -> bool:
            times.append(time.monotonic())
            return times[-1] - times[0] >= seconds

        with suppress(TrainingPaused):
            train(model, data, recipe, device=place, should_stop=late, test=False)
        return count * (len(times) - 1) / (times[-1] - times[0])

    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        rate(1)
        send(answers, "ready")
        for line in sys.stdin.buffer:
            send(answers, rate(receive(line)))


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        _train(*receive(sys.stdin.buffer.readline()))
