"""The ``basis`` command: compress a network, run studies, see their state, measure speed, build the book."""

from __future__ import annotations

import argparse
import inspect
import io
import math
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from basis.bench.cases import bench_layers
from basis.bench.networks import NORMS, STEPS, TRAINED, bench_structured_training, bench_training
from basis.bench.parts import bench_parts
from basis.bench.report import BenchReport, check_place
from basis.bench.roofline import measure_machine, with_machine
from basis.bench.timing import PASSES, Setting
from basis.bench.tuning import bench_latency
from basis.compression.compress import Settings, compress
from basis.data import DataError, load_cifar10
from basis.environment import repository_root, results_folder
from basis.experiments.archives import pack, packed, take_in
from basis.experiments.budget_bench import bench_budget
from basis.experiments.campaign import in_order, missing
from basis.experiments.records import in_hours
from basis.experiments.runner import Order, Task, TooLittleMemory, in_processes, jobs_for, on_ray
from basis.experiments.runs import PROFILES, device_for, duration, record_path
from basis.experiments.studies import STUDIES, status
from basis.experiments.studies.substitutes import BLOCKS, bench_variants
from basis.experiments.sweep import bench_gpu, file_name
from basis.experiments.switch_bench import bench_switch
from basis.experiments.tidy import csv, runs_frame, sound_records
from basis.inference import bench_inference
from basis.layers.conv import MODES
from basis.models import build
from basis.saving import RecordError, replacing
from basis.text import first_line
from basis.training.loop import DTYPES, TrainingError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status is 0, 1 (failed) or 2 (misused)."""
    options = _parser().parse_args(arguments)
    options.typed = list(sys.argv[1:] if arguments is None else arguments)  # for reports
    for stream in (sys.stdout, sys.stderr):  # whose encoding may lack what is in a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return options.command(options)
    except (ValueError, DataError, RecordError, TooLittleMemory, TrainingError) as error:
        said, status = str(error), 2
    except OSError as error:
        said, status = f"a file could not be read or written ({first_line(error)}); what is finished is kept", 2
    except ModuleNotFoundError as error:  # the book's tools and Ray are extras
        extra = "ray" if error.name == "ray" else "book"
        said, status = f"{error.name} is not installed; `pip install -e '.[{extra}]'` adds it", 2
    except KeyboardInterrupt:
        said, status = "interrupted; what is finished is kept, and the same command goes on", 130
    print(f"basis: {said}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="basis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compress(commands.add_parser("compress", help="make a trained network smaller", description=_about(_compress)))
    _add_runs(commands)
    _add_bench(commands.add_parser("bench", help="measure speed against dense layers and networks"))

    book = commands.add_parser("book", help="execute the notebooks and build the HTML book")
    book.add_argument("--profile", choices=PROFILES, help="records to show (default: each study's published one)")
    book.add_argument("--only", nargs="+", metavar="CHAPTER", help="execute only these, such as 03")
    book.set_defaults(command=_build)
    figures = commands.add_parser("figures", help="draw figures of the book anew: SVG, light and dark, and PDF")
    figures.add_argument("names", nargs="*", metavar="NAME", help="such as headline (default: all)")
    figures.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    figures.set_defaults(command=_build)
    derived = commands.add_parser("sync", help="renew the README, citation and notebook cells made from elsewhere")
    derived.set_defaults(command=_sync)
    return parser


def device(text: str) -> str:
    """An argument that names a device of this machine."""
    gpus = torch.cuda.device_count()
    try:
        place = torch.device(text)
        here = place.type != "cuda" or (place.index or 0) < gpus
    except RuntimeError:
        here = False
    if not here:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, which has a CPU and {gpus} GPUs")
    return text


# -- basis run, import, table, status --


def _add_runs(commands: Any) -> None:
    """Add these commands to the parser of ``basis``."""

    def add(name: str, does: Any, about: str) -> Any:
        command = commands.add_parser(name, description=does.__doc__, help=about)
        command.add_argument("--results", type=Path, metavar="DIR", help="where records are (default: results)")
        command.set_defaults(command=does)
        return command.add_argument

    option = add("run", do_runs, "do the missing runs of studies")
    option("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all, by value)")
    option("--archive", type=Path, metavar="FILE", help="pack what is done into it, or add it to it")
    option("--profile", default="smoke", choices=PROFILES, help="how large (default: smoke)")
    option("--time-limit", type=duration, default=math.inf, metavar="TIME", help="stop after 90s, 9m, 1h30m")
    option("--jobs", type=int, metavar="N", help="processes (default: what the device can take)")
    option("--executor", default="local", choices=("local", "ray"), help="ray: on $RAY_ADDRESS's cluster")
    option("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: profile's)")
    option("--quiet", action="store_true", help="no progress bars")
    option = add("import", import_archives, "check and file records of others")
    option("archives", nargs="+", type=Path, metavar="ARCHIVE", help="of basis run --archive")
    add("table", write_table, "all records as one tidy table")
    add("status", show_status, "which runs are done and which are missing")


def do_runs(options: argparse.Namespace) -> int:
    """Do the missing runs of the studies named, or of all, the most valuable first; may be stopped and repeated.

    A run under way at the time limit stops after its epoch and goes on next time. With an archive, new records are
    packed into it, to be filed elsewhere by `basis import`.
    """
    deadline, folder = time.time() + options.time_limit, options.results or results_folder()
    tasks, failed = in_order(options.profile, options.studies), 0
    check_place(folder / "record.json")
    if options.archive:
        check_place(options.archive)
        if options.archive.exists():
            packed(options.archive)  # refuses what is no archive of records
    todo = missing(tasks, folder)
    print(f"{len(todo)} of {len(tasks)} runs are missing", flush=True)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = _do(todo, options, folder, deadline) if todo else 0
    finally:
        signal.signal(signal.SIGTERM, former)
        left = missing(todo, folder)
        new = {record_path(folder, one.run) for one in todo} - {record_path(folder, one.run) for one in left}
        said = f"{len(new)} new records"
        if options.archive and new:
            said += f", {pack(new, folder, options.archive)} packed into {options.archive}"
        first = f"; next is {left[0].run.variant}, seed {left[0].run.seed}: the same command goes on" if left else ""
        print(f"{said}, {len(left)} are missing{first}")
    return 1 if failed else 0


def _do(todo: Sequence[Task], options: argparse.Namespace, folder: Path, deadline: float) -> int:
    """Do the tasks where and with as many processes as the options say; how many failed."""
    order = Order(tasks=todo, folder=folder, device=options.device, progress=not options.quiet, deadline=deadline)
    if options.executor == "ray":
        steps = on_ray(order, options.jobs)
    else:
        place = device_for(options.profile, options.device)
        if todo[0].run.data == "cifar10":
            load_cifar10()  # says what is wrong with it, once for all processes
        number = options.jobs or jobs_for([task.run for task in todo], place)
        print(f"{number} at a time on {place}", flush=True)
        steps = in_processes(order, number)
    failed = 0
    with closing(steps):
        for run, outcome, message, seconds in steps:
            failed += outcome == "failed"
            print(f"{run.study}, {run.variant}, seed {run.seed}: {outcome} in {seconds:.0f} s, {message}", flush=True)
    return failed


def import_archives(options: argparse.Namespace) -> int:
    """Check every record of the archives and file the sound ones; records that are there already stay."""
    refused = 0
    for archive in options.archives:
        found = list(take_in(archive, options.results or results_folder()))
        counts = Counter(outcome for _, outcome, _ in found)
        refused += counts["refused"]
        print(f"{archive}: {', '.join(f'{number} {outcome}' for outcome, number in counts.items()) or 'nothing'}")
        print(*(f"  {name}: {outcome}: {reason}\n" for name, outcome, reason in found if reason), sep="", end="")
    return 1 if refused else 0


def write_table(options: argparse.Namespace) -> int:
    """Write all runs as one tidy table, runs.csv beside the records."""
    path = (options.results or results_folder()) / "runs.csv"
    check_place(path)
    with replacing(path) as file:
        file.write(csv(runs_frame(sound_records(options.results))))
    print(f"saved {path}")
    return 0


def show_status(options: argparse.Namespace) -> int:
    """Per study and profile: runs planned, done, missing and started, and device hours spent."""
    table = status(options.results).rename(columns={"runs": "planned"})
    table["spent"] = table["seconds"].map(in_hours)
    columns = ["study", "profile", "planned", "done", "missing", "started", "spent", "device"]
    print(table[columns].to_string(index=False))
    return 0


# -- basis compress --


def _add_compress(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=_compress)
    command.add_argument("model", metavar="MODEL", help="a network of torchvision or timm, or package.module:factory")
    command.add_argument("--weights", required=True, metavar="FILE", help="safetensors, or a state_dict of torch.save")
    data = "folder with train/CLASS/* and val/CLASS/*; rotations in EXIF are ignored, as in torchvision's training"
    command.add_argument("--data", required=True, help=data)
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
    compress(Settings(**given), say=print, command=shlex.join(["basis", *options.typed]))
    return 0


# -- basis bench --


def time_layers(*, model: str = "resnet18", width: int | None = None, **options: Any) -> BenchReport:
    """Measure every convolution of a network that can be substituted, alone, dense and with each k."""
    return bench_latency(build(model, width=width), name=f"{model}-w{width}" if width else model, **options)


def time_structured(*, profile: str, candidates: Sequence[str] = (), **options: Any) -> BenchReport:
    """Measure structured layers, those of chapter 9 unless given, against dense ones."""
    found = candidates or [text for text, width in bench_variants(profile) if width is None]
    return bench_layers("structured", candidates=found, **options)


def time_structured_steps(*, profile: str, model: str = "wrn-10-1", **options: Any) -> BenchReport:
    """Measure training steps of networks of the structured layers of chapter 9."""
    pairs = bench_variants(profile, model)
    if not pairs:
        raise ValueError(f"chapter 9 has no {model} in the profile {profile}")
    return bench_structured_training(layers=pairs, include=BLOCKS, model=model, **options)


# KIND -> the benchmark, what it measures, and its options beside those of the setting; defaults are its own.
BENCHES: Mapping[str, tuple[Callable[..., BenchReport], str, str]] = {
    "layer": (partial(bench_layers, "layer"), "single layers of ResNet-18", "shapes ratios passes candidates"),
    "block": (partial(bench_layers, "block"), "with normalisation and ReLU", "shapes ratios passes candidates"),
    "rivals": (partial(bench_layers, "rivals"), "what one would take instead", "shapes ratios passes candidates"),
    "structured": (time_structured, "other structured layers", "shapes passes candidates profile"),
    "latency": (time_layers, "every layer of a network", "model width ratios passes"),
    "train": (
        bench_training, "whole training steps", "model width ratios modes coefficients trained norms steps",
    ),
    "structured-train": (time_structured_steps, "networks of structured layers", "profile model width"),
    "inference": (bench_inference, "whole networks, folded", "model width ratios"),
    "parts": (bench_parts, "where the time of a training step goes", "model width ratios"),
    "switch": (bench_switch, "a training that switches on its way (chapter 12)", ""),
    "budget": (bench_budget, "networks chosen for milliseconds", "model width shares ratios"),
}  # fmt: skip
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "shapes": {"nargs": "+", "metavar": "SHAPE", "help": "such as 64-128@32/2"},
    "ratios": {"nargs": "+", "type": float, "metavar": "R"},
    "modes": {"nargs": "+", "choices": MODES},
    "passes": {"nargs": "+", "choices": PASSES},
    "norms": {"nargs": "+", "choices": NORMS, "help": "batch normalisation"},
    "candidates": {"nargs": "+", "metavar": "NAME", "help": "a mode, a baseline, or a layer such as tucker:0.41"},
    "profile": {"default": "cpu", "choices": PROFILES, "help": "whose layers of chapter 9"},
    "model": {"help": "a network of basis.models"},
    "width": {"type": int, "help": "its width (default: the published one)"},
    "coefficients": {"nargs": "+", "metavar": "FORM", "help": "such as low_rank:1/8"},
    "trained": {"nargs": "+", "choices": tuple(TRAINED), "help": "parts of the basis layers"},
    "steps": {"nargs": "+", "choices": STEPS, "help": "how a step is run"},
    "shares": {"nargs": "+", "type": float, "metavar": "X", "help": "of the dense layers' time"},
    # Of the setting.
    "device": {"type": device, "metavar": "DEVICE", "help": "default: the GPU if there is one"},
    "precision": {"choices": ("auto", *DTYPES)},
    "memory_format": {"choices": ("auto", "channels_last", "contiguous")},
    "batch_size": {"type": int, "metavar": "N", "help": "images (default: 64)"},
    "rounds": {"type": int, "metavar": "N", "help": "measurements of each candidate (default: 15)"},
    "seconds": {"type": float, "metavar": "S", "help": "no new round of a cell after this time"},
}
SETTING = ("device", "precision", "memory_format", "batch_size", "rounds", "seconds")
# What marks the file of a training benchmark that measures others than the usual.
MARKS = {"coefficients": ("dense", "forms"), "trained": ("both", "parts"), "norms": ("ordinary", "norms"),
         "steps": ("eager", "steps")}  # fmt: skip


def _add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    for name, (function, about, options) in BENCHES.items():
        kind = kinds.add_parser(name, help=about, description=_about(function))
        for option in (*options.split(), *SETTING):
            kind.add_argument(f"--{option.replace('_', '-')}", **{"default": argparse.SUPPRESS, **OPTIONS[option]})
        kind.add_argument("--out", type=Path, metavar="FILE", help="default: results/bench/KIND-DEVICE-....json")
        kind.set_defaults(command=_bench, kind=name)
    gpu = kinds.add_parser("gpu", help="all of it on a GPU, in one go", description=inspect.getdoc(bench_gpu))
    gpu.add_argument("--time-limit", type=duration, default=170, metavar="TIME", help="default: 170s")
    gpu.add_argument("--tiny", action="store_true", help="tiny shapes, to see that it runs (also on a CPU)")
    gpu.add_argument("--folder", type=Path, metavar="DIR", help="default: results/bench, with --tiny in it tiny")
    gpu.add_argument("--device", **OPTIONS["device"])
    gpu.set_defaults(command=_bench_gpu)


def _about(function: Any) -> str | None:
    return inspect.getdoc(getattr(function, "func", function))


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


# -- the book --


def _root() -> Path:
    """The checkout, whose book/tools can be imported from now on."""
    root = repository_root()
    if root is None:
        raise ValueError("there is no checkout here, with notebooks and pages; clone the repository and run it there")
    sys.path.insert(0, str(root))
    return root


def _build(options: argparse.Namespace) -> int:
    """Build the book, or, given a folder for them, its figures alone."""
    _root()
    from book.tools import build  # needs the extra "book"

    try:
        if "out" in options:
            print(*build.export_figures(options.names, options.out, progress=print), sep="\n")
        else:
            made = build.build(profile=options.profile, only=options.only, progress=print)
            print(f"The book is at {made.as_uri()}")
    except build.BookError as error:
        print(f"basis: {error}", file=sys.stderr)
        return 1
    return 0


def _sync(options: argparse.Namespace) -> int:
    root = _root()
    from book.tools.derived import sync
    from book.tools.pages import readme_claims, verdicts

    for changed in sync(root, claims=readme_claims(verdicts())):
        print(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
