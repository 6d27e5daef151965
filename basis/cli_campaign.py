"""The commands of ``basis`` that do runs and carry their records: run, campaign, import, table, status."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from basis.bench.timing import check_place
from basis.data import load_cifar10
from basis.environment import environment, results_folder
from basis.experiments.archives import Filed, pack, packed_records, take_in
from basis.experiments.campaign import in_order, missing
from basis.experiments.cluster import RayCluster
from basis.experiments.executors import Executor, Order, Processes, Task, jobs_for
from basis.experiments.runs import PROFILES, device_for, parse_duration, record_path
from basis.experiments.studies import STUDIES, find_study, status
from basis.experiments.studies.hours import Pace, in_hours
from basis.experiments.tidy import sound_records, write_tables
from basis.saving import RecordError, Unwritable


def add_commands(commands: Any) -> None:
    """Add these commands to the parser of ``basis``."""
    run = commands.add_parser("run", help="do the missing runs of a study", description=do_study.__doc__)
    run.add_argument("study", help=f"one of: {', '.join(STUDIES)}")
    run.set_defaults(command=do_study)
    all_of_them = commands.add_parser("campaign", help="do all studies by value", description=do_campaign.__doc__)
    all_of_them.add_argument("--studies", nargs="+", default=(), metavar="STUDY", help="only these")
    archive = "added to, if it is an archive already (default: basis-PROFILE-TIME.tar.gz, here)"
    all_of_them.add_argument("--archive", type=Path, metavar="FILE", help=archive)
    run.add_argument("--archive", type=Path, metavar="FILE", help="pack what is done into it, or add it to it")
    all_of_them.set_defaults(command=do_campaign)
    for kind in (run, all_of_them):
        kind.add_argument("--profile", default="smoke", choices=PROFILES, help="how large (default: smoke)")
        kind.add_argument("--time-limit", type=duration, metavar="TIME", help="stop cleanly after 90s, 9m, 1h30m")
        kind.add_argument("--jobs", default="auto", metavar="N", help="processes (default: what the device can take)")
        kind.add_argument(
            "--executor", default="local", choices=("local", "ray"), help="ray: on $RAY_ADDRESS's cluster"
        )
        kind.add_argument("--results", type=Path, metavar="DIR", help="where records go (default: results)")
        kind.add_argument("--device", type=device, metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: profile's)")
        kind.add_argument("--quiet", action="store_true", help="no progress bars")

    taking = commands.add_parser("import", help="check and file records of others", description=import_archives.__doc__)
    taking.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="of basis campaign")
    taking.add_argument("--results", type=Path, metavar="DIR")
    taking.set_defaults(command=import_archives)

    tidy = commands.add_parser("table", help="all records as two tidy tables", description=write_table.__doc__)
    tidy.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: the working directory")
    tidy.add_argument("--results", type=Path, metavar="DIR")
    tidy.set_defaults(command=write_table)

    state = commands.add_parser("status", help="which runs are done and which are missing")
    state.add_argument("--results", type=Path, metavar="DIR")
    state.set_defaults(command=show_status)


def duration(text: str) -> float:
    """Seconds of an argument such as 9m."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """An argument that names a device of this machine."""
    gpus = torch.cuda.device_count()
    try:
        place = torch.device(text)
        here = place.type != "cuda" or (place.index or 0) < gpus
    except RuntimeError:
        here = False
    if not here:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device of this machine, which has a CPU (cpu) and {gpus} GPUs"
        )
    return text


# -- doing runs -------------------------------------------------------------------------------------


def do_study(options: argparse.Namespace) -> int:
    """Do the missing runs of a study, the most valuable first. May be stopped and repeated at will.

    With a time limit no run is begun that would not end in time; the last line says what is next. With an archive,
    what is done is packed into it, to be filed elsewhere by `basis import`.
    """
    study = find_study(options.study)
    tasks = [Task(run, study.definition) for run in study.runs(options.profile)]
    if not tasks:
        raise ValueError(f"the study {study.name!r} has no runs in the profile {options.profile!r}")
    return _work(tasks, options, options.archive)


def do_campaign(options: argparse.Namespace) -> int:
    """Do the missing runs of all studies, the most valuable first, and pack the new records into one archive.

    An archive that is there is added to: it keeps what it holds, but of the runs of this campaign it takes the records
    that are in the results folder now.

    May be stopped and repeated at will. `basis import` files the records of an archive elsewhere.
    """
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    archive = options.archive or Path(f"basis-{options.profile}-{stamp}.tar.gz")
    return _work(in_order(options.profile, options.studies), options, archive)


def _work(tasks: Sequence[Task], options: argparse.Namespace, archive: Path | None) -> int:
    """Do what is missing, pack it, and say how far it came; the exit status."""
    began, folder = time.monotonic(), options.results or results_folder()
    held = set() if archive is None else _held_by(archive)
    check_place(folder / "record.json")
    todo, failed = missing(tasks, folder), 0
    print(f"{len(todo)} of {len(tasks)} runs are missing", flush=True)
    former = signal.signal(signal.SIGTERM, _interrupt)
    try:
        failed = _do(todo, options, folder, began)
    finally:
        signal.signal(signal.SIGTERM, former)
        left = missing(todo, folder)
        still = {task.run.id for task in left}
        new = {record_path(folder, task.run) for task in todo if task.run.id not in still}
        packed = ""
        if archive is not None and new:
            done = {record_path(folder, task.run) for task in tasks if task.run.id not in still}
            renewed = {path for path in done if path.relative_to(folder).as_posix() in held}
            total = pack(new | renewed, folder, archive)
            packed = f", packed into {archive}" + (f" beside {total - len(new)} others" if total > len(new) else "")
        first = f"; next is {left[0].run.variant}, seed {left[0].run.seed}: the same command goes on" if left else ""
        print(f"{len(new)} new records{packed}, {len(left)} are missing{first}")
    return 1 if failed else 0


def _held_by(archive: Path) -> set[str]:
    """The names of the records that are in the archive already; ``ValueError`` where no archive can be written."""
    check_place(archive)
    try:
        return set(packed_records(archive))
    except RecordError as error:
        raise ValueError(f"{error}; give --archive another name, since no other file is replaced") from error


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _do(todo: Sequence[Task], options: argparse.Namespace, folder: Path, began: float) -> int:
    """Do the tasks where and with as many processes as the options say; how many failed."""
    if not todo:
        return 0
    jobs = _jobs(todo, options)
    place = environment(device_for(options.profile, options.device))["device"] if options.executor == "local" else ""
    executor: Executor = RayCluster(jobs) if options.executor == "ray" else Processes(jobs or 1)
    order = Order(
        tasks=todo, folder=folder, device=options.device, progress=not options.quiet,
        deadline=None if options.time_limit is None else began + options.time_limit,
        pace=Pace.of(sound_records(folder), place, jobs or 1),
    )  # fmt: skip
    outcomes: Counter[str] = Counter()
    steps = executor(order)
    try:
        for step in steps:
            outcomes[step.outcome] += 1
            what = f"{step.run.study}, {step.run.variant}, seed {step.run.seed}"
            print(f"{what}: {step.outcome} in {step.seconds:.0f} s, {step.message}", flush=True)
    finally:
        with suppress(AttributeError):
            steps.close()  # type: ignore[attr-defined]  # a generator: its workers end now
    return outcomes["failed"]


def _jobs(todo: Sequence[Task], options: argparse.Namespace) -> int | None:
    """How many processes; None where Ray is to choose. What cannot work is refused here, before any run."""
    if options.jobs != "auto" and not (options.jobs.isdecimal() and int(options.jobs) > 0):
        raise ValueError(f"--jobs is {options.jobs}, but it must be at least 1, or auto")
    given = None if options.jobs == "auto" else int(options.jobs)
    if options.executor == "ray":
        return given
    device = device_for(options.profile, options.device)
    if todo[0].run.data == "cifar10":
        load_cifar10(progress=not options.quiet)  # says what is wrong with it, once for all processes
    jobs = given or jobs_for([task.run for task in todo], device)
    print(f"{jobs} at a time on {device}", flush=True)
    return jobs


# -- records ----------------------------------------------------------------------------------------


def import_archives(options: argparse.Namespace) -> int:
    """Check every record of the archives and file the sound ones; records that are there already stay.

    Of an archive that is cut short, what comes before the cut is filed; the other archives are read all the same.
    """
    folder, refused, unread = options.results or results_folder(), 0, 0
    titles = {
        "taken": "taken", "renewed": "taken instead of an outdated one", "known": "there already, the same",
        "other": "left out, since the run is there already", "refused": "refused",
    }  # fmt: skip
    for archive in options.archives:
        found, problem = _taken_in(archive, folder)
        counts: Counter[str] = Counter(one.outcome for one in found)
        refused += counts["refused"]
        said = ", ".join(f"{counts[outcome]} {title}" for outcome, title in titles.items() if counts[outcome])
        if problem:
            unread += 1
            print(f"{archive}: {said or 'nothing taken'}, and was not read to its end", flush=True)
        else:
            print(f"{archive}: {said or 'holds nothing'}")
        for one in found:
            if one.reason:
                print(f"  {one.name}: {titles[one.outcome]}: {one.reason}")
        if isinstance(problem, Unwritable):
            raise problem  # the others could not be filed either
        if problem:
            print(f"basis: {problem}", file=sys.stderr)
    return 2 if unread else 1 if refused else 0


def _taken_in(archive: Path, folder: Path) -> tuple[list[Filed], RecordError | None]:
    """What became of the members of an archive, and why there were no more."""
    found: list[Filed] = []
    try:
        for one in take_in(archive, folder):
            found.append(one)
    except RecordError as error:
        return found, error
    return found, None


def write_table(options: argparse.Namespace) -> int:
    """Write every run, and every measured sensitivity, as one tidy table each (CSV; Parquet where pyarrow is)."""
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out is {options.out}, which is a file, but it must be a folder for the tables")
    check_place(options.out / "runs.csv.gz")
    for path in write_tables(options.out, sound_records(options.results)):
        print(f"saved {path}")
    return 0


def show_status(options: argparse.Namespace) -> int:
    """Per study and profile: runs planned, done, missing and started, device hours spent and expected."""
    table = status(options.results)
    table["spent"] = table["seconds"].map(in_hours)
    foreseen = zip(table["expected"], table["unknown"], strict=True)
    table["expected"] = [
        ", ".join(filter(None, (in_hours(known), f"unknown for {unknown}" if unknown else "")))
        for known, unknown in foreseen
    ]
    shown = table.rename(columns={"runs": "planned"})
    columns = ["study", "profile", "planned", "done", "missing", "started", "spent", "expected", "device"]
    print(shown[columns].to_string(index=False))
    return 0
