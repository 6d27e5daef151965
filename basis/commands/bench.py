"""``basis bench``: measure speed against dense layers and networks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from basis.bench.cases import bench_layers
from basis.bench.networks import NORMS, STEPS, TRAINED, bench_structured_training, bench_training
from basis.bench.parts import bench_parts
from basis.bench.report import BenchReport, check_place
from basis.bench.roofline import measure_machine, with_machine
from basis.bench.timing import PASSES, Setting
from basis.bench.tuning import bench_latency
from basis.commands import device
from basis.environment import results_folder
from basis.experiments.budget_bench import bench_budget
from basis.experiments.runs import PROFILES, duration
from basis.experiments.studies import substitutes
from basis.experiments.sweep import bench_gpu, file_name
from basis.experiments.switch_bench import bench_switch
from basis.experiments.trained import bench_trained
from basis.inference import bench_inference
from basis.layers.conv import MODES
from basis.models import build
from basis.training.loop import DTYPES


def time_layers(*, model: str = "resnet18", width: int | None = None, **options: Any) -> BenchReport:
    """Measure every convolution of a network that can be substituted, alone, dense and with each k."""
    return bench_latency(build(model, width=width), name=f"{model}-w{width}" if width else model, **options)


def time_structured(*, profile: str, candidates: Sequence[str] = (), **options: Any) -> BenchReport:
    """Measure structured layers, those of chapter 9 unless given, against dense ones."""
    found = candidates or dict.fromkeys(run.layer for run in substitutes.STUDY.runs(profile) if run.layer)
    return bench_layers("structured", candidates=list(found), **options)


def time_structured_steps(*, profile: str, **options: Any) -> BenchReport:
    """Measure training steps of the networks of chapter 9."""
    runs = substitutes.STUDY.runs(profile)
    pairs = [(run.layer or "dense", run.width) for run in runs]
    about: Any = {"model": runs[0].model, "width": runs[0].width, "include": substitutes.BLOCKS, "layers": pairs}
    return bench_structured_training(**about, **options)


# KIND -> the benchmark, what it measures, and its options beside those of the setting; defaults are its own.
BENCHES: Mapping[str, tuple[Callable[..., BenchReport], str, str]] = {
    "layer": (partial(bench_layers, "layer"), "single layers of ResNet-18", "shapes ratios passes candidates"),
    "block": (partial(bench_layers, "block"), "layers with normalisation and ReLU", "shapes ratios passes candidates"),
    "rivals": (partial(bench_layers, "rivals"), "other ways to a cheaper layer", "shapes ratios passes candidates"),
    "structured": (time_structured, "other structured layers", "shapes passes candidates profile"),
    "latency": (time_layers, "every layer of a network", "model width ratios passes"),
    "train": (bench_training, "whole training steps", "model width ratios modes coefficients trained norms steps"),
    "structured-train": (time_structured_steps, "networks of structured layers", "profile"),
    "inference": (bench_inference, "whole networks, folded", "model width ratios"),
    "parts": (bench_parts, "where the time of a training step goes", "model width ratios"),
    "switch": (bench_switch, "a training that switches on its way (chapter 12)", ""),
    "trained": (bench_trained, "the filters of trained networks, and plans of every budget", "profile"),
    "budget": (bench_budget, "networks chosen for milliseconds", "model width shares ratios"),
}  # fmt: skip
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "shapes": {"nargs": "+", "metavar": "SHAPE", "help": "IN-OUT@SIZE/STRIDE of 3x3 convolutions, such as 64-128@32/2"},
    "ratios": {"nargs": "+", "type": float, "metavar": "R", "help": "k / C_out, the share of filters that train"},
    "modes": {"nargs": "+", "choices": MODES, "help": "how a basis layer computes"},
    "passes": {"nargs": "+", "choices": PASSES, "help": "inference, or with all gradients"},
    "norms": {"nargs": "+", "choices": NORMS, "help": "kinds of batch normalisation"},
    "candidates": {"nargs": "+", "metavar": "NAME", "help": "a mode, a baseline, or a layer such as tucker:0.41"},
    "profile": {"default": "small", "choices": PROFILES, "help": "whose networks"},
    "model": {"help": "a network of basis.models"},
    "width": {"type": int, "help": "its width (default: the published one)"},
    "coefficients": {"nargs": "+", "metavar": "FORM", "help": "forms of the mixing matrix, such as low_rank:1/8"},
    "trained": {"nargs": "+", "choices": tuple(TRAINED), "help": "parts of the basis layers that train"},
    "steps": {"nargs": "+", "choices": STEPS, "help": "how a step is run"},
    "shares": {"nargs": "+", "type": float, "metavar": "X", "help": "budgets, as shares of the dense layers' time"},
    # Of the setting.
    "device": {"type": device, "metavar": "DEVICE", "help": "cpu, cuda, cuda:1 ... (default: the GPU if there is one)"},
    "precision": {"choices": ("auto", *DTYPES), "help": "of activations (default: the device's best)"},
    "memory_format": {"choices": ("auto", "channels_last", "contiguous"), "help": "of images (default: the faster)"},
    "batch_size": {"type": int, "metavar": "N", "help": "images at a time (default: 64)"},
    "rounds": {"type": int, "metavar": "N", "help": "measurements of each candidate (default: 15)"},
    "seconds": {"type": float, "metavar": "S", "help": "no new round of a cell after this time"},
}
SETTING = ("device", "precision", "memory_format", "batch_size", "rounds", "seconds")
# What marks the file of a training benchmark that measures others than the usual.
MARKS = {"coefficients": ("dense", "forms"), "trained": ("both", "parts"), "norms": ("ordinary", "norms"),
         "steps": ("eager", "steps")}  # fmt: skip


def add_bench(bench: argparse.ArgumentParser) -> None:
    """The options of ``basis bench``: those of each kind are its own."""
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    for name, (_, about, options) in BENCHES.items():
        kind = kinds.add_parser(name, help=about, description=f"Compares with dense ones: {about}. Saves a report.")
        for option in (*options.split(), *SETTING):
            kind.add_argument(f"--{option.replace('_', '-')}", **{"default": argparse.SUPPRESS, **OPTIONS[option]})
        kind.add_argument("--out", type=Path, metavar="FILE", help="report to write (default: named in results/bench)")
        kind.set_defaults(command=_bench, kind=name)
    gpu = kinds.add_parser("gpu", help="all of it on a GPU", description="Measures all of it, the most valuable first.")
    gpu.add_argument(
        "--time-limit", type=duration, default=170, metavar="TIME", help="begin nothing then (default: 170s)"
    )
    gpu.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs (also on a CPU)")
    gpu.add_argument("--folder", type=Path, metavar="DIR", help="for the reports (default: results/bench)")
    gpu.add_argument("--device", **OPTIONS["device"])
    gpu.set_defaults(command=_bench_gpu)


def _bench(options: argparse.Namespace) -> int:
    setting = Setting(**_given(options, SETTING))
    folder = results_folder() / "bench"
    check_place(options.out or folder / "report.json")
    function, _, names = BENCHES[options.kind]
    report = function(**_given(options, names.split()), setting=setting, progress=print)
    print(report)  # first, and saved without the machine too: minutes of measurement are not lost by what follows
    path = options.out or folder / f"{file_name(file_stem(options.kind, report.config), report)}.json"
    report.save(path)
    with_machine(report, measure_machine(replace(setting, precision=report.config["precision"]))).save(path)
    print(f"saved in {path}")
    return 0


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def file_stem(kind: str, config: Mapping[str, Any]) -> str:
    """What the name of the report's file begins with: the kind, and what else than usual was measured."""
    unmarked = (["fused"], *([usual] for usual, _ in MARKS.values()))
    stem = [kind, *(mark for option, (usual, mark) in MARKS.items() if config.get(option, [usual]) not in unmarked)]
    stem += [config["model"]] if "model" in config else []
    stem += [f"w{config['width']}"] if config.get("width") else []
    return "-".join(stem)


def _bench_gpu(options: argparse.Namespace) -> int:
    folder = options.folder or results_folder() / "bench" / ("tiny" if options.tiny else "")
    images = 4 if options.tiny else 1024
    setting = Setting(**_given(options, ["device"]), batch_size=images, memory_format="channels_last", rounds=11)
    say = partial(print, flush=True)  # into a file, too
    paths = bench_gpu(folder, setting=setting, time_limit=options.time_limit, tiny=options.tiny, progress=say)
    return 0 if paths else 1
