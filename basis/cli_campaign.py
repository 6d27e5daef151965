"""The commands of ``basis`` that do runs and carry their records: run, import, table, status."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from basis.bench.timing import check_place
from basis.data import load_cifar10
from basis.environment import environment, results_folder
from basis.experiments.archives import pack, packed, take_in
from basis.experiments.campaign import in_order, missing
from basis.experiments.pace import Pace, in_hours
from basis.experiments.runner import Order, Task, in_processes, jobs_for, on_ray
from basis.experiments.runs import PROFILES, device_for, parse_duration, record_path
from basis.experiments.studies import STUDIES, status
from basis.experiments.tidy import csv, runs_frame, sound_records, write_tables
from basis.saving import RecordError, Unwritable, replacing


def add_commands(commands: Any) -> None:
    """Add these commands to the parser of ``basis``."""

    def add(name: str, does: Any, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, description=does.__doc__, **options)
        command.add_argument("--results", type=Path, metavar="DIR", help="where records are (default: results)")
        command.set_defaults(command=does)
        return command

    run = add("run", do_runs, help="do the missing runs of studies", aliases=["campaign"])
    run.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all, by value)")
    run.add_argument("--archive", type=Path, metavar="FILE", help="pack what is done into it, or add it to it")
    run.add_argument("--profile", default="smoke", choices=PROFILES, help="how large (default: smoke)")
    run.add_argument("--time-limit", type=duration, default=math.inf, metavar="TIME", help="stop after 90s, 9m, 1h30m")
    run.add_argument("--jobs", type=jobs, metavar="N", help="processes (default: what the device can take)")
    run.add_argument("--executor", default="local", choices=("local", "ray"), help="ray: on $RAY_ADDRESS's cluster")
    run.add_argument("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: profile's)")
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    taking = add("import", import_archives, help="check and file records of others")
    taking.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="of basis run --archive")
    table = add("table", write_table, help="all records as tidy tables")
    table.add_argument("--out", type=Path, metavar="DIR", help="write both tables there, packed")
    add("status", show_status, help="which runs are done and which are missing")


def duration(text: str) -> float:
    """Seconds of an argument such as 9m."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def jobs(text: str) -> int | None:
    """An argument that is a number of processes, or auto."""
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"jobs is {text}, but it must be at least 1, or auto")
    return None if text == "auto" else int(text)


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


def do_runs(options: argparse.Namespace) -> int:
    """Do the missing runs of the studies named, or of all, the most valuable first; may be stopped and repeated.

    With a time limit no run is begun that would not end in time; the last line says what is next. With an archive,
    new records are packed into it, to be filed elsewhere by `basis import`.
    """
    deadline, folder = time.time() + options.time_limit, options.results or results_folder()
    tasks, failed = in_order(options.profile, options.studies), 0
    for file in (folder / "record.json", options.archive):
        if file is not None:
            check_place(file)
    if options.archive and options.archive.exists():
        packed(options.archive)
    todo = missing(tasks, folder)
    print(f"{len(todo)} of {len(tasks)} runs are missing", flush=True)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = _do(todo, options, folder, deadline)
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
    if not todo:
        return 0
    pace, number, ray = Pace(), options.jobs, options.executor == "ray"
    if not ray:
        place = device_for(options.profile, options.device)
        if todo[0].run.data == "cifar10":
            load_cifar10()  # says what is wrong with it, once for all processes
        number = number or jobs_for([task.run for task in todo], place)
        pace = Pace.of(sound_records(folder), environment(place)["device"], number)
        print(f"{number} at a time on {place}", flush=True)
    order = Order(
        tasks=todo, folder=folder, device=options.device, progress=not options.quiet, deadline=deadline, pace=pace
    )
    outcomes: Counter[str] = Counter()
    steps = on_ray(order, number) if ray else in_processes(order, number or 1)
    with closing(steps):
        for run, outcome, message, seconds in steps:
            outcomes[outcome] += 1
            print(f"{run.study}, {run.variant}, seed {run.seed}: {outcome} in {seconds:.0f} s, {message}", flush=True)
    return outcomes["failed"]


def import_archives(options: argparse.Namespace) -> int:
    """Check every record of the archives and file the sound ones; records that are there already stay."""
    outcomes: Counter[str] = Counter()
    for archive in options.archives:
        try:
            found = list(take_in(archive, options.results or results_folder()))
        except Unwritable:
            raise  # the others could not be filed either
        except RecordError as error:
            outcomes["unread"] += 1
            print(f"basis: {error}", file=sys.stderr)
            continue
        counts = Counter(one.outcome for one in found)
        outcomes += counts
        print(f"{archive}: " + (", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "nothing"))
        for one in found:
            if one.reason:
                print(f"  {one.name}: {one.outcome}: {one.reason}")
    return 2 if outcomes["unread"] else 1 if outcomes["refused"] else 0


def write_table(options: argparse.Namespace) -> int:
    """Write all runs as one tidy table, runs.csv beside the records; with --out that and every measured sensitivity."""
    path, records = (options.results or results_folder()) / "runs.csv", sound_records(options.results)
    check_place(options.out / "runs.csv.gz" if options.out else path)
    if not options.out:
        with replacing(path) as file:
            file.write(csv(runs_frame(records)))
    for written in write_tables(options.out, records) if options.out else [path]:
        print(f"saved {written}")
    return 0


def show_status(options: argparse.Namespace) -> int:
    """Per study and profile: runs planned, done, missing and started, and device hours spent."""
    table = status(options.results).rename(columns={"runs": "planned"})
    table["spent"] = table["seconds"].map(in_hours)
    columns = ["study", "profile", "planned", "done", "missing", "started", "spent", "device"]
    print(table[columns].to_string(index=False))
    return 0
