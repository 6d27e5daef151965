"""All measurements of the speed chapter by one command, within a time limit, the most valuable first.

Each benchmark is made in parts (a shape, or a ratio) and its report is written after every part, so that a
machine that is taken away leaves all but the part in hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from basis.bench import NORMS, bench_baseline, bench_blocks, bench_layers, bench_training
from basis.data import synthetic
from basis.rivals import USUAL, bench_rivals
from basis.roofline import measure_machine, with_machine
from basis.runs import RecordError
from basis.timing import RATIOS, RESNET18_SHAPES, BenchReport, Progress, Setting, check_place
from basis.training import Recipe

Part = Callable[..., BenchReport]  # of setting and progress


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One report: the name of its file, its part of the time, and its parts, of ``cells`` cells each."""

    name: str
    share: float
    parts: Sequence[Part]
    cells: int = 1


def measurements(*, tiny: bool = False) -> tuple[Measurement, ...]:
    """What :func:`bench_gpu` measures, in order; ``tiny`` shapes show that all of it runs."""
    shapes = ("16@6", "16-32@6/2") if tiny else RESNET18_SHAPES
    ratios = (0.5,) if tiny else RATIOS
    network: dict[str, Any] = {"model": "resnet20", "width": 8} if tiny else {"model": "resnet18"}
    # Compiling takes minutes, so what needs none comes first, for all ratios.
    steps: Any = (("eager", "graphed"),) if tiny else (("eager", "graphed"), ("fast",))
    some = (0.5,) if tiny else (1 / 4, 1 / 2)
    eager = tuple(name for name in USUAL if not name.endswith("compiled"))

    def by_shape(bench: Callable[..., BenchReport], shapes: Sequence[str] = shapes, **options: Any) -> list[Part]:
        return [partial(bench, shapes=(shape,), **options) for shape in shapes]

    trainings = [
        partial(bench_training, **network, ratios=(r,), norms=NORMS, steps=kinds) for kinds in steps for r in some
    ]
    whole: dict[str, Any] = {"steps": ("graphed",)}
    if tiny:
        short = Recipe(epochs=1, batch_size=50)
        whole = {**network, "steps": ("graphed",), "data": synthetic(train=100, test=100), "recipe": short}
    layers = by_shape(bench_layers, ratios=ratios, passes=("forward+backward",))
    rivals = by_shape(bench_rivals, ratios=some, passes=("forward+backward",), candidates=eager)
    residual = by_shape(bench_blocks, ratios=ratios, residual=True)
    found = [
        Measurement(name=f"train-norms-steps-{network['model']}", share=0.45, parts=trainings),
        Measurement(name=f"baseline-{network['model']}", share=0.05, parts=[partial(bench_baseline, **whole)]),
        Measurement(name="layer", share=0.15, parts=layers, cells=len(ratios)),
        Measurement(name="block", share=0.15, parts=by_shape(bench_blocks, ratios=ratios), cells=len(ratios)),
        Measurement(name="rivals", share=0.1, parts=rivals, cells=len(some)),
        Measurement(name="block-residual", share=0.05, parts=residual, cells=len(ratios)),
    ]
    if not tiny:  # compiling takes longest, and one layer gains least by it
        compiled = by_shape(bench_rivals, ("128@16", "512@4"), ratios=(1 / 4,), passes=("forward+backward",))
        found.append(Measurement(name="rivals-compiled", share=0.05, parts=compiled))
    return tuple(found)


def bench_gpu(
    folder: Path,
    *,
    setting: Setting | None = None,
    time_limit: float = 480,
    tiny: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Measure the machine, whole training steps, layers, blocks and rivals; the files that were written.

    The time that is left is shared out among the measurements that are left. A part that has begun is
    finished, whatever it takes (compiling a network does), and none begins when its time is up; ``progress``
    is told how many parts of each were made, which failed and why, and what could not be saved.

    Args:
        folder: where the reports go; of equal names, those of another time are replaced by this one's first part.
        setting: 1024 images, channels-last, unless given.
        time_limit: seconds for all of it.
        tiny: tiny shapes and networks, to see that it runs; needs no GPU.

    Raises:
        ValueError: for a setting on a CPU without ``tiny``, a time limit that is not positive, or a folder that
            cannot be written to.
    """
    setting = setting or Setting(batch_size=1024, memory_format="channels_last")
    if setting.where.type != "cuda" and not tiny:
        raise ValueError(f"the device is {setting.where}, but this measures a GPU; tiny shapes run anywhere")
    if time_limit <= 0:
        raise ValueError(f"time_limit is {time_limit}, but must be positive")
    check_place(folder / "report.json")
    began = time.monotonic()
    say = progress or (lambda line: None)
    machine = measure_machine(setting, **({"side": 256, "copied": 2**20} if tiny else {}))
    tera, giga = machine.macs_per_second / 1e12, machine.bytes_per_second / 1e9
    say(f"machine: {tera:.4g} T multiply-accumulates/s in {machine.precision}, {giga:.4g} GB/s")
    left = list(measurements(tiny=tiny))
    paths = []
    while left:
        one, shares = left[0], sum(each.share for each in left)
        now = time.monotonic()
        until = now + (began + time_limit - now) * one.share / shares
        report, done, saved = None, 0, None
        for number, measure in enumerate(one.parts):
            if (seconds := until - time.monotonic()) <= 0:
                break
            # Half of the time for the rounds; the rest goes into warming up, compiling and choosing algorithms.
            each = seconds / (len(one.parts) - number) / one.cells / 2
            try:
                part = measure(setting=replace(setting, seconds=each), progress=progress)
            except Exception as error:  # no memory, no compiler: the other parts may well run
                say(f"{one.name}: part {number + 1} failed, {type(error).__name__}: {error}")
                continue
            report, done = with_machine(join(report, part), machine), done + 1
            path = folder / f"{file_name(one.name, report)}.json"
            try:
                report.save(path)
                saved = path
            except RecordError as error:
                say(f"{error}\n{part}")
        say(f"{one.name}: {done} of {len(one.parts)} parts after {time.monotonic() - began:.0f} s")
        paths += [saved] if saved else []
        left.pop(0)
    return paths


def file_name(what: str, report: BenchReport) -> str:
    """The name of a report's file, without ".json": what was measured, device, precision and memory format."""
    config = report.config
    return "-".join([what, config["device"].split(":")[0], config["precision"], config["memory_format"]])


def join(first: BenchReport | None, second: BenchReport) -> BenchReport:
    """One report of two by the same command, whose options differ in lists (of shapes or ratios) only."""
    if first is None:
        return second
    config: Mapping[str, Any] = {
        key: [*value, *(one for one in second.config[key] if one not in value)] if isinstance(value, list) else value
        for key, value in first.config.items()
    }
    return replace(second, config=config, rows=[*first.rows, *second.rows])
