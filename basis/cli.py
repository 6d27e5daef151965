"""The ``basis`` command: compress a network, run studies, see their state, measure speed, build the book."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from basis.bench.cases import bench_layers
from basis.bench.networks import NORMS, STEPS, TRAINED, bench_structured_training, bench_training
from basis.bench.report import BenchReport, check_place
from basis.bench.roofline import measure_machine, with_machine
from basis.bench.timing import PASSES, Setting
from basis.bench.tuning import bench_latency, tune
from basis.cli_campaign import add_commands, device, duration
from basis.compression.compress import Settings, compress
from basis.data import DataError
from basis.environment import repository_root, results_folder
from basis.experiments.budget_bench import bench_budget
from basis.experiments.runner import TooLittleMemory
from basis.experiments.runs import PROFILES
from basis.experiments.studies.substitutes import BLOCKS, bench_variants
from basis.experiments.sweep import bench_gpu, file_name
from basis.inference import bench_inference
from basis.layers.conv import MODES
from basis.models import build
from basis.saving import RecordError
from basis.substitution import substitute
from basis.training.loop import DTYPES, TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status is 0, 1 (failed) or 2 (misused)."""
    options = _parser().parse_args(arguments)
    options.typed = list(sys.argv[1:] if arguments is None else arguments)  # for reports
    try:
        return options.command(options)
    except (ValueError, DataError, RecordError, TooLittleMemory, TrainingError) as error:
        print(f"basis: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # the book's tools and Ray are extras
        extra = "ray" if error.name == "ray" else "book"
        print(f"basis: {error.name} is not installed; `pip install -e '.[{extra}]'` adds it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("basis: interrupted; what is finished is kept, and the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="basis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands.add_parser("compress", help="make a trained network smaller", description=_about(_compress)))
    add_commands(commands)
    _add_bench(commands.add_parser("bench", help="measure speed against dense layers and networks"))

    book = commands.add_parser("book", help="execute the notebooks and build the HTML book")
    book.add_argument("--profile", choices=PROFILES, help="records to show (default: each study's published one)")
    book.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute only these, such as 03")
    book.set_defaults(command=_book)
    derived = commands.add_parser("sync", help="renew the README, citation and notebook cells made from elsewhere")
    derived.set_defaults(command=_sync)
    return parser


# -- basis compress --


def _add_compress(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=_compress)
    command.add_argument("model", metavar="MODEL", help="a network of torchvision or timm, or package.module:factory")
    command.add_argument("--weights", required=True, metavar="FILE", help="safetensors, or a state_dict of torch.save")
    command.add_argument("--data", required=True, help="folder with train/CLASS/* and val/CLASS/*, or an npz")
    budget = "share of params, macs, backward_macs or milliseconds that may stay, as params=0.5; repeatable"
    command.add_argument("--budget", required=True, action="append", type=_share, metavar="UNIT=SHARE", help=budget)
    command.add_argument("--out", required=True, help="folder to fill; a run of the same settings there goes on")
    for one in (field for field in fields(Settings) if field.metadata):
        command.add_argument(f"--{one.name.replace('_', '-')}", default=one.default, **one.metadata)


def _share(text: str) -> tuple[str, float]:
    unit, _, share = text.partition("=")
    return unit, float(share)


def _compress(options: argparse.Namespace) -> int:
    """Find the layers of a trained network that can take it, replace them by basis convolutions, repair, measure and
    export. May be stopped and repeated at will: the same command goes on where it was.
    """
    given = {field.name: getattr(options, field.name) for field in fields(Settings)} | {"budget": dict(options.budget)}
    try:
        compress(Settings(**given), say=print, command=shlex.join(["basis", *options.typed]))
    except OSError as error:
        raise ValueError(f"a file could not be read or written ({error}); finished stages are kept") from error
    return 0


# -- basis bench --

SHAPES = ("shapes", "ratios", "passes", "candidates")
# KIND -> the benchmark and what else it takes than a setting; defaults are those of the functions.
BENCHES: Mapping[str, tuple[Callable[..., BenchReport], str, Sequence[str]]] = {
    "layer": (partial(bench_layers, "layer"), "single layers of ResNet-18", SHAPES),
    "block": (partial(bench_layers, "block"), "with batch normalisation and ReLU", SHAPES),
    "rivals": (partial(bench_layers, "rivals"), "what one would take instead", SHAPES),
    "structured": (partial(bench_layers, "structured"), "other structured layers", (*SHAPES, "profile")),
    "latency": (
        bench_latency, "every layer of a network", ("model", "width", "input_size", "ratios", "multiple", "passes"),
    ),
    "train": (
        bench_training, "whole training steps",
        ("model", "width", "ratios", "modes", "coefficients", "trained", "norms", "steps"),
    ),
    "structured-train": (
        bench_structured_training, "networks of structured layers", ("layers", "profile", "model", "width"),
    ),
    "modes": (tune, "every basis layer of a network, in every mode", ("model", "width", "ratio")),
    "inference": (bench_inference, "whole networks, folded", ("model", "width", "ratios")),
    "budget": (bench_budget, "networks chosen for milliseconds", ("model", "width", "shares", "ratios")),
}  # fmt: skip
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "shapes": {"nargs": "+", "metavar": "SHAPE", "help": "such as 64-128@32/2"},
    "ratios": {"nargs": "+", "type": float, "metavar": "R"},
    "modes": {"nargs": "+", "choices": MODES},
    "passes": {"nargs": "+", "choices": PASSES},
    "norms": {"nargs": "+", "choices": NORMS, "help": "batch normalisation"},
    "candidates": {"nargs": "+", "metavar": "NAME", "help": "a mode, a baseline, or a layer such as tucker:0.41"},
    "layers": {"nargs": "+", "metavar": "LAYER", "help": "such as tucker:0.41, or shuffle:1@8 with a stem of width 8"},
    "profile": {"default": "cpu", "choices": PROFILES, "help": "whose layers of chapter 9, unless some are given"},
    "model": {"help": "a network of basis.models"},
    "width": {"type": int, "help": "its width (default: the published one)"},
    "input_size": {"nargs": 3, "type": int, "metavar": ("C", "H", "W")},
    "multiple": {"type": int, "metavar": "N", "help": "what every k is a multiple of"},
    "coefficients": {"nargs": "+", "metavar": "FORM", "help": "such as low_rank:1/8"},
    "trained": {"nargs": "+", "choices": tuple(TRAINED), "help": "parts of the basis layers"},
    "steps": {"nargs": "+", "choices": STEPS, "help": "how a step is run"},
    "ratio": {"type": float, "default": 0.5, "metavar": "R", "help": "of all its layers (default: 0.5)"},
    "shares": {"nargs": "+", "type": float, "metavar": "X", "help": "of the dense layers' time"},
}
# What marks the file of a training benchmark that measures these.
MARKS = {"coefficients": "forms", "trained": "parts", "norms": "norms", "steps": "steps"}


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    for name, (function, about, options) in BENCHES.items():
        kind = kinds.add_parser(name, help=about, description=_about(function))
        for option in options:
            kind.add_argument(f"--{option.replace('_', '-')}", **{"default": argparse.SUPPRESS, **OPTIONS[option]})
        kind.add_argument("--device", type=device, metavar="DEVICE", help="default: the GPU if there is one")
        kind.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
        kind.add_argument("--memory-format", default="auto", choices=("auto", "channels_last", "contiguous"))
        kind.add_argument("--batch-size", type=int, default=64, metavar="N")
        kind.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each candidate")
        kind.add_argument("--seconds", type=float, metavar="S", help="no new round of a cell after this time")
        kind.add_argument("--out", type=Path, metavar="FILE", help="default: results/bench/KIND-DEVICE-....json")
        kind.set_defaults(command=_bench, kind=name)
    gpu = kinds.add_parser("gpu", help="all of it on a GPU, in one go", description=inspect.getdoc(bench_gpu))
    gpu.add_argument("--time-limit", type=duration, default=240, metavar="TIME", help="default: 4m")
    gpu.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs (also on a CPU)")
    gpu.add_argument("--folder", type=Path, metavar="DIR", help="default: results/bench, with --tiny in it tiny")
    gpu.add_argument("--device", type=device, metavar="DEVICE", help="default: the GPU if there is one")
    gpu.set_defaults(command=_bench_gpu)


def _about(function: Any) -> str | None:
    return inspect.getdoc(getattr(function, "func", function))


def _bench(options: argparse.Namespace) -> int:
    setting = Setting(
        device=options.device, precision=options.precision, memory_format=options.memory_format,
        batch_size=options.batch_size, rounds=options.rounds, seconds=options.seconds,
    )  # fmt: skip
    folder = results_folder() / "bench"
    check_place(options.out or folder / "report.json")
    function, _, names = BENCHES[options.kind]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    what = _file_stem(options.kind, given)
    report = function(**_arguments(options.kind, given), setting=setting, progress=print)
    print(report)  # first, and saved without the machine too: minutes of measurement are not lost by what follows
    path = options.out or folder / f"{file_name(what, report)}.json"
    report.save(path)
    if options.kind not in ("latency", "modes"):
        settled = replace(setting, precision=report.config["precision"])
        with_machine(report, measure_machine(settled)).save(path)
    print(f"saved in {path}")
    return 0


def _arguments(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the benchmark is called with: networks are built, and layers are those of chapter 9 unless given."""
    rest = dict(given)
    if kind in ("latency", "modes"):
        rest["name"] = _model(given)
        network = build(rest.pop("model", "resnet18"), width=rest.pop("width", None))
        ratio = rest.pop("ratio", None)
        rest["model"] = substitute(network, ratio=ratio, init="random") if ratio else network
    if kind == "structured" and "candidates" not in rest:
        rest["candidates"] = [text for text, width in bench_variants(rest.pop("profile")) if width is None]
    if kind == "structured-train":
        profile, model = rest.pop("profile"), rest.get("model", "wrn-10-1")
        rest["layers"] = [_with_width(text) for text in rest.get("layers", ())] or bench_variants(profile, model)
        if not rest["layers"]:
            raise ValueError(f"chapter 9 has no {model} in the profile {profile}; give --layers")
        rest["include"] = BLOCKS
    rest.pop("profile", None)
    return rest


def _with_width(text: str) -> tuple[str, int | None]:
    """``shuffle:1@8`` as the layer and the stem's width."""
    layer, at, width = text.partition("@")
    if at and not width.isdecimal():
        raise ValueError(f"the layer is {text!r}, but after @ stands the width of the stem, as in shuffle:1@8")
    return layer, int(width) if at else None


def _model(given: Mapping[str, Any]) -> str:
    name, width = given.get("model", "resnet18"), given.get("width")
    return f"{name}-w{width}" if width else name


def _file_stem(kind: str, given: Mapping[str, Any]) -> str:
    """What the name of the report's file begins with."""
    stem = [kind]
    if kind == "train":
        stem += [mark for option, mark in MARKS.items() if option in given] + [_model(given)]
    elif kind == "structured-train":
        stem += [_model({"model": "wrn-10-1", **given})]
    elif "model" in BENCHES[kind][2]:
        stem += [_model(given)]
    size = given.get("input_size", (3, 32, 32))
    stem += ["x".join(map(str, size))] if tuple(size) != (3, 32, 32) else []
    stem += [f"r{given['ratio']:g}"] if "ratio" in given else []
    return "-".join(stem)


def _bench_gpu(options: argparse.Namespace) -> int:
    folder = options.folder or results_folder() / "bench" / ("tiny" if options.tiny else "")
    images = 4 if options.tiny else 1024
    setting = Setting(device=options.device, batch_size=images, memory_format="channels_last", rounds=11)
    say = partial(print, flush=True)  # into a file, too
    paths = bench_gpu(folder, setting=setting, time_limit=options.time_limit, tiny=options.tiny, progress=say)
    return 0 if paths else 1


# -- the book --


def _tools() -> Path:
    """The checkout, whose book/tools can be imported from now on."""
    root = repository_root()
    if root is None:
        raise ValueError("there is no checkout here, with notebooks and pages; clone the repository and run it there")
    sys.path.insert(0, str(root))
    return root


def _book(options: argparse.Namespace) -> int:
    _tools()
    from book.tools.build import BookError
    from book.tools.build import build as build_book  # needs the extra "book"

    try:
        page = build_book(profile=options.profile, only=options.only, progress=print)
    except BookError as error:
        print(f"basis: {error}", file=sys.stderr)
        return 1
    print(f"The book is at {page.as_uri()}")
    return 0


def _sync(options: argparse.Namespace) -> int:
    root = _tools()
    from book.tools.derived import sync
    from book.tools.pages import readme_claims, verdicts

    for changed in sync(root, claims=readme_claims(verdicts())):
        print(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
