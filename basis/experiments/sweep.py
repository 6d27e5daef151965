"""All measurements of the speed chapters by one command, within a time limit, the most valuable first."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from basis.bench.cases import Kind, bench_layers
from basis.bench.networks import NORMS, Norms, bench_training
from basis.bench.parts import bench_parts
from basis.bench.report import BenchReport, check_place
from basis.bench.roofline import measure_machine, with_machine
from basis.bench.shapes import RESNET18_SHAPES, RESNET50_SHAPES, WRN28_SHAPES
from basis.bench.timing import PASSES, Pass, Progress, Setting
from basis.bench.tuning import bench_latency
from basis.experiments.budget_bench import bench_budget
from basis.inference import bench_inference
from basis.models import build
from basis.saving import RecordError
from basis.text import first_line

Part = Callable[..., BenchReport]  # of setting and progress


@dataclass(frozen=True)
class Measurement:
    """One report: the name of its file, its share of the time, and its parts (a shape or a ratio), of ``cells`` each.

    ``batch_size`` is that of the setting unless given; the parts are given the earlier report named ``latency`` as
    ``latency``; no part begins with fewer seconds left than it ``needs``.
    """

    name: str
    share: float
    parts: Sequence[Part]
    cells: int = 1
    batch_size: int | None = None
    latency: str | None = None
    needs: float = 0


def measurements(*, tiny: bool = False) -> tuple[Measurement, ...]:
    """What :func:`bench_gpu` measures, in order; ``tiny`` shapes show that all of it runs."""
    shapes = ("16@6", "16-32@6/2") if tiny else RESNET18_SHAPES
    larger = ("16@8",) if tiny else (*RESNET50_SHAPES, *WRN28_SHAPES)
    network: dict[str, Any] = {"model": "resnet20", "width": 8} if tiny else {"model": "resnet18"}
    name, wide = network["model"], "wrn-10-1" if tiny else "wrn-28-10"
    ratios, candidates, (forward, both) = (1 / 4, 1 / 2), (1 / 8, 1 / 4, 1 / 2), PASSES
    shares = (1.0, 0.9) if tiny else (0.8, 0.65, 0.5)
    half, wide_batch, batches = (2, 2, (3, 1)) if tiny else (512, 256, (64, 1))

    def by_shape(kind: Kind, some: Sequence[str] = shapes, **options: Any) -> list[Part]:
        return [partial(bench_layers, kind, shapes=(shape,), ratios=ratios, **options) for shape in some]

    def latency(which: Pass, **given: Any) -> BenchReport:
        model = build(name, width=network.get("width"))
        return bench_latency(model, name=name, ratios=candidates, passes=(which,), **given)

    def steps(norms: Sequence[Norms], **options: Any) -> list[Part]:
        make = partial(bench_training, **{**network, **options}, norms=norms, steps=("graphed",))
        return [partial(make, ratios=(ratio,)) for ratio in ratios]

    plans = partial(bench_budget, **network, ratios=candidates, one=both, shares=shares, smallest=True)
    # Compiling takes 40 to 90 seconds, so it is done once, for the dense network, and not where it cannot end.
    compiling = partial(steps(("fused",), dense_steps=("fast",))[0], ratios=(1 / 2,))
    served = [partial(bench_inference, **network, ratios=(r,)) for r in (1 / 2, 1 / 4)]
    folded = partial(plans, one=forward)
    # Equal batches where possible: cuDNN chooses its algorithms anew for each other, which takes longer than timing.
    told = f"latency-{name}", f"latency-forward-{name}"
    return (
        Measurement(f"train-norms-steps-{name}", 0.5, steps(NORMS)),
        Measurement(f"train-compiled-{name}", 0.2, [compiling], needs=0 if tiny else 70),
        Measurement(f"train-batch{half}-{name}", 0.2, steps(NORMS[:3]), batch_size=half),
        Measurement("block", 0.2, by_shape("block", candidates=("auto", "through_basis", "ordinary")), cells=2),
        Measurement(told[0], 0.2, [partial(latency, both)], cells=12),
        Measurement(f"plans-{name}", 0.15, [plans], cells=4, latency=told[0]),
        Measurement("layer", 0.15, by_shape("layer", passes=(both,)), cells=2),
        Measurement("layer-larger", 0.12, by_shape("layer", larger, passes=(both,)), cells=2, batch_size=wide_batch),
        Measurement(
            f"train-steps-{wide}", 0.15, steps(("fused", "tuned"), model=wide, width=None), batch_size=wide_batch
        ),
        Measurement(f"inference-{name}", 0.05, served),
        *(Measurement(f"inference-batch{n}-{name}", 0.05, served, batch_size=n) for n in batches),
        Measurement(told[1], 0.04, [partial(latency, forward)], cells=12),
        Measurement(f"budget-{name}", 0.03, [folded], cells=4, latency=told[1]),
        *(Measurement(f"budget-batch{n}-{name}", 0.03, [folded], 4, n, latency=told[1]) for n in batches),
        Measurement("rivals", 0.05, by_shape("rivals", passes=(both,)), cells=2),
        Measurement(f"parts-{name}", 0.05, [partial(bench_parts, **network)]),
    )


def bench_gpu(
    folder: Path, *, setting: Setting | None = None, time_limit: float = 170, tiny: bool = False,
    progress: Progress | None = None,
) -> list[Path]:  # fmt: skip
    """Measure training steps, blocks, plans, parts of a step, layers and inference; returns the files written.

    The time left is shared out among the measurements left; reports are saved after each part. A part that has begun
    is finished, none begins when its time is up; ``progress`` is told how many were made, which failed and why.

    Args:
        folder: where the reports go; reports of equal names are replaced.
        setting: 1024 images, channels-last, 11 rounds, unless given; wide networks have batches of their own.
        time_limit: seconds for all of it.
        tiny: tiny shapes and networks, to see that it runs; needs no GPU.

    Raises ``ValueError`` for a setting on a CPU without ``tiny``, a time limit that is not positive, or a folder that
    cannot be written to.
    """
    setting = setting or Setting(batch_size=1024, memory_format="channels_last", rounds=11)
    if setting.where.type != "cuda" and not tiny:
        raise ValueError(f"the device is {setting.where}, but this measures a GPU; tiny shapes run anywhere")
    if time_limit <= 0:
        raise ValueError(f"time_limit is {time_limit}, but must be positive")
    check_place(folder / "report.json")
    began = time.monotonic()

    def say(line: str) -> None:
        if progress:
            progress(f"{time.monotonic() - began:5.1f} s  {line}")

    machine = measure_machine(setting, **({"side": 256, "copied": 2**20} if tiny else {}))
    tera, giga = machine.macs_per_second / 1e12, machine.bytes_per_second / 1e9
    say(f"machine: {tera:.4g} T multiply-accumulates/s in {machine.precision}, {giga:.4g} GB/s")
    plan, end = measurements(tiny=tiny), began + time_limit
    reports: dict[str, BenchReport] = {}
    paths: dict[Path, None] = {}
    for i, one in enumerate(plan):
        now, done = time.monotonic(), 0
        until = now + (end - now) * one.share / sum(each.share for each in plan[i:])
        for number, measure in enumerate(one.parts):
            now = time.monotonic()
            if now >= until or end - now < one.needs:
                break
            # Half of the time for the rounds; the rest goes into warming up, compiling and choosing algorithms.
            seconds = (until - now) / (len(one.parts) - number) / one.cells / 2
            each = replace(setting, seconds=seconds, batch_size=one.batch_size or setting.batch_size)
            try:
                given = {"latency": reports[one.latency]} if one.latency else {}
                part = measure(setting=each, progress=say, **given)
                report = reports[one.name] = with_machine(join(reports.get(one.name), part), machine)
                done += 1
                path = folder / f"{file_name(one.name, report)}.json"
                report.save(path)
                paths[path] = None
            except RecordError as error:
                say(f"{error}\n{report}")
            except Exception as error:  # no memory, no compiler, no plan: the other parts may well run
                say(f"{one.name}: part {number + 1} failed, {type(error).__name__}: {first_line(error)}")
            finally:
                gc.collect()  # networks and graphs, whose memory the next part needs
                if setting.where.type == "cuda":
                    torch.cuda.empty_cache()
        say(f"{one.name}: {done} of {len(one.parts)} parts")
    return list(paths)


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
