"""The ``basis`` command: compress a network, run studies, see their state, measure speed, build the book."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from basis.bench.cases import (
    NORMS,
    PASSES,
    RATIOS,
    RESNET18_SHAPES,
    STEPS,
    TRAINED,
    BenchReport,
    Setting,
    bench_blocks,
    bench_latency,
    bench_layers,
    bench_training,
)
from basis.bench.rivals import CANDIDATES, USUAL, bench_rivals
from basis.bench.roofline import measure_machine, with_machine
from basis.bench.structured import SHAPES, bench_structured, bench_structured_training, study_layers
from basis.bench.timing import check_options, check_place
from basis.bench.tuning import tune
from basis.cli_campaign import add_commands, device, duration
from basis.compression.cli_compress import add_command
from basis.data import DataError
from basis.environment import repository_root, results_folder
from basis.experiments.budget_bench import CANDIDATE_RATIOS, SHARES, bench_budget
from basis.experiments.runner import TooLittleMemory
from basis.experiments.runs import PROFILES
from basis.experiments.sweep import bench_gpu, file_name
from basis.inference import bench_inference
from basis.layers.conv import MODES
from basis.models import build
from basis.saving import RecordError
from basis.substitution import few, substitute
from basis.training.loop import DTYPES, TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status is 0, 1 (failed) or 2 (misused)."""
    parser = _parser()
    options = parser.parse_args(arguments)
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

    add_command(commands)
    add_commands(commands)

    bench = commands.add_parser("bench", help="measure speed against dense layers and networks")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    layer = kinds.add_parser("layer", help="single layers of ResNet-18", description=bench_layers.__doc__)
    block = kinds.add_parser("block", help="layers with batch normalisation and ReLU", description=bench_blocks.__doc__)
    rivals = kinds.add_parser("rivals", help="what one would take instead", description=bench_rivals.__doc__)
    structured = kinds.add_parser("structured", help="other structured layers", description=bench_structured.__doc__)
    for kind in (layer, block, rivals, structured):
        shapes = SHAPES if kind is structured else RESNET18_SHAPES
        kind.add_argument("--shapes", nargs="+", default=shapes, metavar="SHAPE", help="such as 64-128@32/2")
    for kind in (layer, block):
        kind.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    for kind in (layer, rivals, structured):
        usual_passes = PASSES[1:] if kind is structured else PASSES
        kind.add_argument("--passes", nargs="+", default=usual_passes, choices=PASSES)
    block.add_argument("--residual", action="store_true", help="a shortcut is added before the ReLU")
    names = ", ".join(CANDIDATES)
    rivals.add_argument("--candidates", nargs="+", default=USUAL, choices=CANDIDATES, metavar="NAME", help=names)
    latency = kinds.add_parser("latency", help="every layer of a network", description=bench_latency.__doc__)
    latency.add_argument("--input-size", nargs=3, type=int, default=(3, 32, 32), metavar=("C", "H", "W"))
    latency.add_argument("--multiple", type=int, default=8, metavar="N", help="what every k is a multiple of")
    latency.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    training = kinds.add_parser("train", help="whole training steps", description=bench_training.__doc__)
    modes = kinds.add_parser("modes", help="every basis layer of a network, in every mode", description=tune.__doc__)
    modes.add_argument("--ratio", type=float, default=0.5, metavar="R", help="of all its layers (default: 0.5)")
    inference = kinds.add_parser("inference", help="whole networks, folded", description=bench_inference.__doc__)
    budget = kinds.add_parser("budget", help="networks chosen for milliseconds", description=bench_budget.__doc__)
    budget.add_argument(
        "--shares", nargs="+", type=float, default=SHARES, metavar="X", help="of the dense layers' time"
    )
    trainings = kinds.add_parser(
        "structured-train", help="networks of structured layers", description=bench_structured_training.__doc__
    )
    for kind in (structured, trainings):
        kind.add_argument("--layers", nargs="+", metavar="LAYER", help="such as tucker:0.41 (default: chapter 9's)")
        kind.add_argument("--profile", default="cpu", choices=PROFILES, help="whose layers (default: cpu)")
    trainings.epilog = "A layer may have a stem of its own width, such as shuffle:1@8 or dense@8."
    for kind in (latency, training, modes, inference, budget, trainings):
        usual_model = "wrn-10-1" if kind is trainings else "resnet18"
        kind.add_argument("--model", default=usual_model, help="a network of basis.models")
        kind.add_argument("--width", type=int, help="its width (default: the published one)")
    training.add_argument("--modes", nargs="+", default=["auto"], choices=MODES)
    training.add_argument("--coefficients", nargs="+", default=["dense"], metavar="FORM", help="such as low_rank:1/8")
    training.add_argument("--trained", nargs="+", default=["both"], choices=TRAINED, help="parts of the basis layers")
    training.add_argument("--steps", nargs="+", default=["eager"], choices=STEPS, help="how a step is run")
    for kind, usual in ((block, NORMS), (training, ["ordinary"])):
        kind.add_argument("--norms", nargs="+", default=usual, choices=NORMS, help="batch normalisation")
    gpu = kinds.add_parser("gpu", help="all of it on a GPU, in one go", description=bench_gpu.__doc__)
    gpu.add_argument("--time-limit", type=duration, default=240, metavar="TIME", help="default: 4m")
    gpu.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs (also on a CPU)")
    gpu.add_argument("--folder", type=Path, metavar="DIR", help="default: results/bench, with --tiny in it tiny")
    gpu.add_argument("--device", type=device, metavar="DEVICE", help="default: the GPU if there is one")
    gpu.set_defaults(command=_bench_gpu)
    named = {"layer": layer, "block": block, "rivals": rivals, "latency": latency, "train": training}
    for kind in (*named.values(), inference, budget):
        usual_ratios = CANDIDATE_RATIOS if kind is budget else RATIOS
        kind.add_argument("--ratios", nargs="+", type=float, default=usual_ratios, metavar="R")
    named |= {
        "modes": modes,
        "inference": inference,
        "budget": budget,
        "structured": structured,
        "structured-train": trainings,
    }
    for name, kind in named.items():
        kind.add_argument("--device", type=device, metavar="DEVICE", help="default: the GPU if there is one")
        kind.add_argument("--precision", default="auto", choices=("auto", *DTYPES))
        kind.add_argument("--memory-format", default="auto", choices=("auto", "channels_last", "contiguous"))
        kind.add_argument("--batch-size", type=int, default=64, metavar="N")
        kind.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each candidate")
        kind.add_argument("--seconds", type=float, metavar="S", help="no new round of a cell after this time")
        kind.add_argument("--out", type=Path, metavar="FILE", help="default: results/bench/KIND-DEVICE-....json")
        kind.set_defaults(command=_bench, kind=name)

    zoo = commands.add_parser("zoo", help="try networks of torchvision and timm", description=_zoo.__doc__)
    zoo.add_argument("--only", nargs="+", metavar="NAME", help="networks, such as timm/resnet10t (default: all)")
    zoo.add_argument("--out", type=Path, metavar="FILE", help="default: results/bench/zoo.json")
    zoo.set_defaults(command=_zoo)

    book = commands.add_parser("book", help="execute the notebooks and build the HTML book")
    book.add_argument("--profile", choices=PROFILES, help="records to show (default: each study's published one)")
    book.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute only these, such as 03")
    book.set_defaults(command=_book)

    derived = commands.add_parser("sync", help="renew the README, citation and notebook cells made from elsewhere")
    derived.set_defaults(command=_sync)
    return parser


def _bench(options: argparse.Namespace) -> int:
    setting = Setting(
        device=options.device, precision=options.precision, memory_format=options.memory_format,
        batch_size=options.batch_size, rounds=options.rounds, seconds=options.seconds,
    )  # fmt: skip
    check_place(options.out or results_folder() / "bench" / "report.json")
    report, name = _measure(options, {"setting": setting, "progress": print})
    print(report)  # first, and saved without the machine too: minutes of measurement are not lost by what follows
    path = options.out or results_folder() / "bench" / f"{file_name(name, report)}.json"
    report.save(path)
    if options.kind not in ("latency", "modes"):
        settled = replace(setting, precision=report.config["precision"])
        with_machine(report, measure_machine(settled)).save(path)
    print(f"saved in {path}")
    return 0


def _measure(options: argparse.Namespace, shared: dict[str, Any]) -> tuple[BenchReport, str]:
    """The report of one kind, and what the name of its file begins with."""

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names} | shared

    model = f"{options.model}-w{options.width}" if getattr(options, "width", None) else getattr(options, "model", "")
    if options.kind == "modes":
        network = substitute(build(options.model, width=options.width), ratio=options.ratio, init="random")
        return tune(network, name=model, **shared), f"modes-{model}-r{options.ratio:g}"
    if options.kind == "structured":
        layers = options.layers or [text for text, width in study_layers(options.profile) if width is None]
        return bench_structured(layers=layers, **given("shapes", "passes")), "structured"
    if options.kind == "structured-train":
        variants = [_with_width(text) for text in options.layers or ()] or study_layers(options.profile, options.model)
        if not variants:
            raise ValueError(f"chapter 9 has no {options.model} in the profile {options.profile}; give --layers")
        return bench_structured_training(layers=variants, **given("model", "width")), f"structured-train-{model}"
    check_options(options.ratios, (), ())
    shared = shared | {"ratios": options.ratios}
    if options.kind == "layer":
        return bench_layers(**given("shapes", "passes", "modes")), "layer"
    if options.kind == "block":
        report = bench_blocks(**given("shapes", "modes", "norms", "residual"))
        return report, "block-residual" if options.residual else "block"
    if options.kind == "rivals":
        return bench_rivals(**given("shapes", "passes", "candidates")), "rivals"
    if options.kind == "inference":
        return bench_inference(**given("model", "width")), f"inference-{model}"
    if options.kind == "budget":
        return bench_budget(**given("model", "width", "shares")), f"budget-{model}"
    if options.kind == "latency":
        size = "x".join(map(str, options.input_size))
        report = bench_latency(
            build(options.model, width=options.width), name=model, **given("input_size", "multiple", "passes")
        )
        return report, "-".join(["latency", model] if size == "3x32x32" else ["latency", model, size])
    report = bench_training(**given("model", "width", "modes", "coefficients", "trained", "norms", "steps"))
    usual = {"forms": ("coefficients", ["dense"]), "parts": ("trained", ["both"]), "norms": ("norms", ["ordinary"])}
    usual |= {"steps": ("steps", ["eager"])}
    marks = [mark for mark, (name, value) in usual.items() if getattr(options, name) != value]
    return report, "-".join(["train", *marks, model])


def _with_width(text: str) -> tuple[str, int | None]:
    """``shuffle:1@8`` as the layer and the stem's width."""
    layer, at, width = text.partition("@")
    if at and not width.isdecimal():
        raise ValueError(f"the layer is {text!r}, but after @ stands the width of the stem, as in shuffle:1@8")
    return layer, int(width) if at else None


def _bench_gpu(options: argparse.Namespace) -> int:
    folder = options.folder or results_folder() / "bench" / ("tiny" if options.tiny else "")
    images = 4 if options.tiny else 1024
    setting = Setting(device=options.device, batch_size=images, memory_format="channels_last", rounds=11)
    say = partial(print, flush=True)  # into a file, too
    paths = bench_gpu(folder, setting=setting, time_limit=options.time_limit, tiny=options.tiny, progress=say)
    return 0 if paths else 1


def _zoo(options: argparse.Namespace) -> int:
    """Substitute, train a step, merge, fold, save and export networks that nobody here wrote, and compare.

    May be stopped and repeated at will: networks that are in the file, with the same versions, are not done again.
    """
    from basis.compression.zoo import NETWORKS, check_networks
    from basis.vision import import_timm

    try:
        import_timm()
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    known = {str(network): network for network in NETWORKS}
    for name in options.only or ():
        if name not in known:
            near = few(difflib.get_close_matches(name, known, n=3) or known)
            raise ValueError(f"--only has {name!r}, but the networks are {near}")
    path = options.out or results_folder() / "bench" / "zoo.json"
    check_place(path)
    report = check_networks([known[name] for name in options.only or known], path=path, progress=print)
    print(report)
    print(f"saved in {path}")
    return 1 if report.failures() else 0


def _book(options: argparse.Namespace) -> int:
    from book.tools.build import BookError, build  # needs the extra "book"

    try:
        page = build(profile=options.profile, only=options.only, progress=print)
    except BookError as error:
        print(f"basis: {error}", file=sys.stderr)
        return 1
    print(f"The book is at {page.as_uri()}")
    return 0


def _sync(options: argparse.Namespace) -> int:
    from book.tools.derived import sync
    from book.tools.pages import readme_claims, verdicts

    root = repository_root()
    if root is None:
        raise ValueError("there is no checkout here whose files could be renewed")
    for changed in sync(root, claims=readme_claims(verdicts())):
        print(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
