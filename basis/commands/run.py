"""``basis run``, ``status``, ``import`` and ``export``: do runs, count them, and bring their records elsewhere."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from basis.bench.report import check_place
from basis.commands import device
from basis.data import load_cifar10
from basis.environment import is_published, repository_root, results_folder, stored_results
from basis.experiments.archives import pack, packed, take_in
from basis.experiments.campaign import in_order, missing
from basis.experiments.estimates import estimate, minutes, name_of, timed_runs
from basis.experiments.records import in_hours
from basis.experiments.runner import Order, Task, cores, idle_cores, in_processes, jobs_for, on_ray
from basis.experiments.runs import PROFILES, device_for, duration, record_path
from basis.experiments.studies import STUDIES, status
from basis.training.loop import choose_device


def add_run(command: argparse.ArgumentParser) -> None:
    """Which runs, and where."""
    option = command.add_argument
    option("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)} (default: all of them)")
    scales = f"scale of the runs: {', '.join(PROFILES)} (default: smoke, a trial on synthetic images)"
    option("--profile", default="smoke", choices=PROFILES, metavar="SCALE", help=scales)
    option("--fresh", action="store_true", help="train what is published anew, into my-results or DIR")
    option("--time-limit", type=duration, default=math.inf, metavar="TIME", help="stop after 90s, 9m, 1h30m ...")
    option("--jobs", type=int, metavar="N", help="runs side by side (default: as many as the device can take)")
    option("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: the kind SCALE is for)")
    option("--executor", default="local", choices=("local", "ray"), help="ray: on the cluster that $RAY_ADDRESS names")
    option("--archive", type=Path, metavar="FILE", help="pack new records into FILE too, as basis export does")
    option("--quiet", action="store_true", help="no progress bars")


def do_run(options: argparse.Namespace) -> int:
    """Train the runs of studies that have no record yet, the most valuable first. May be stopped and repeated: the
    same command goes on. A run under way at the time limit stops, and goes on next time after its last whole epoch.
    """
    own = options.fresh or (repository_root() is None and "BASIS_RESULTS" not in os.environ)
    folder = options.results or (Path("my-results") if own else results_folder())
    tasks, failed = in_order(options.profile, options.studies), 0
    check_place(folder / "record.json")
    if options.archive:
        check_place(options.archive)
        if options.archive.exists():
            packed(options.archive)  # refuses what is no archive of records
    todo, again = missing(tasks, folder), shlex.join(["basis", *options.typed])
    if not todo and is_published(folder):
        print(f"all {len(tasks)} runs are published in {folder.name}; to train them yourself: {again} --fresh")
        return 0
    ours = ", which holds the published ones; --fresh trains into my-results" if is_published(folder) else ""
    print(f"{len(todo)} of {len(tasks)} runs are missing in {folder}{ours}", flush=True)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = _do(todo, options, folder) if todo else 0
    finally:
        signal.signal(signal.SIGTERM, former)
        left = missing(todo, folder)
        new = {record_path(folder, one.run) for one in todo} - {record_path(folder, one.run) for one in left}
        said = f"{len(new)} new records"
        if options.archive and new:
            said += f", {pack(new, folder, options.archive)} packed into {options.archive}"
        first = f"; next is {left[0].run.variant}, seed {left[0].run.seed}; to go on: {again}" if left else ""
        print(f"{said}, {len(left)} are missing{first}")
        if (new or not todo) and repository_root():
            there = shlex.quote(str(folder))
            print(f"to draw figures from them: basis figures --results {there} --profile {options.profile}")
    return 1 if failed else 0


def _do(todo: Sequence[Task], options: argparse.Namespace, folder: Path) -> int:
    """Do the tasks where and with as many processes as the options say; how many failed."""
    failed, end = 0, (began := time.time()) + options.time_limit
    order = Order(tasks=todo, folder=folder, device=options.device, progress=not options.quiet, deadline=end)
    if options.executor == "ray":
        steps = on_ray(order, options.jobs)
    else:
        place = device_for(options.profile, options.device)
        if todo[0].run.data == "cifar10":
            load_cifar10()  # says what is wrong with it, once for all processes
        number = options.jobs or jobs_for([task.run for task in todo], place)
        long = minutes(estimate([task.run for task in todo], name_of(place), timed_runs(folder, options.profile)))
        said, idle, most = f"{len(todo)} runs, {long}; {number} at a time on {place}", idle_cores(), cores()
        if number == 1 and place.type == "cpu":  # a thread that waits for a busy core makes all others wait
            torch.set_num_threads(threads := min(torch.get_num_threads(), idle))
            said += f", with {threads} of {most} threads, since the machine is busy" if idle < most else ""
        print(said, flush=True)
        steps = in_processes(order, number)
    with closing(steps):
        for i, (run, outcome, message, seconds) in enumerate(steps, 1):
            failed += outcome == "failed"
            rest = (time.time() - began) / i * (len(todo) - i) if outcome == "done" else 0
            about = f"; about {rest / 60:.0f} min left" if rest >= 60 else f"; about {rest:.0f} s left" if rest else ""
            said = f"run {i} of {len(todo)}: {run.study}, {run.variant}, seed {run.seed}"
            print(f"{said}: {outcome} in {seconds:.0f} s, {message}{about}", flush=True)
    return failed


def add_import(command: argparse.ArgumentParser) -> None:
    """Which archives."""
    command.add_argument("archives", nargs="+", type=Path, metavar="FILE", help="an archive that basis export made")


def do_import(options: argparse.Namespace) -> int:
    """Check every record of the archives and file the sound ones; records that are there already stay."""
    refused = 0
    for archive in options.archives:
        found = list(take_in(archive, options.results or results_folder()))
        counts = Counter(outcome for _, outcome, _ in found)
        refused += counts["refused"]
        print(f"{archive}: {', '.join(f'{number} {outcome}' for outcome, number in counts.items()) or 'nothing'}")
        print(*(f"  {name}: {outcome}: {reason}\n" for name, outcome, reason in found if reason), sep="", end="")
    return 1 if refused else 0


def add_export(command: argparse.ArgumentParser) -> None:
    """Which archive."""
    command.add_argument("file", type=Path, metavar="FILE", help="archive to write or add to, such as mine.tar.gz")


def do_export(options: argparse.Namespace) -> int:
    """Pack all records of a folder into one archive; `basis import` files them elsewhere."""
    folder = stored_results(options.results)
    if not (paths := [path for path in folder.glob("*/*/*.json") if path.parts[-3] in STUDIES]):
        raise ValueError(f"there is no record of a study in {folder}; `basis run` makes them")
    print(f"{pack(paths, folder, options.file)} records are in {options.file}; elsewhere: basis import {options.file}")
    return 0


def do_status(options: argparse.Namespace) -> int:
    """Per study and profile: runs planned, done, missing and started, and device hours spent and left."""
    table = status(folder := stored_results(options.results))
    table = table if is_published(folder) else table[table["done"] + table["started"] > 0]
    here = name_of(choose_device())
    known = {profile: timed_runs(folder, profile) for profile in set(table["profile"])}

    def left(row: Any) -> str:
        """About how long the missing runs of a study and profile take on this machine."""
        todo = missing(in_order(row.profile, [row.study]), folder) if row.missing else []
        seconds = estimate([task.run for task in todo], here, known[row.profile]) if todo else 0.0
        return "unknown" if seconds is None else f"{seconds / 3600:.2f} h"

    table = table.assign(planned=table["runs"], spent=table["seconds"].map(in_hours))
    table["left"] = [left(row) for row in table.itertuples()]
    columns = ["study", "profile", "planned", "done", "missing", "started", "left", "spent", "device"]
    print(table[columns].to_string(index=False), f"\nleft: about, on {here}")
    return 0
