"""The studies of the book, and the state of their records."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from basis.environment import results_folder
from basis.experiments.records import spent
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import PROFILES, Record, duration, read_record, record_path
from basis.experiments.studies import (
    coefficients,
    cost,
    family,
    headline,
    own,
    sensitivity,
    skip,
    speed,
    substitutes,
    switch,
)
from basis.experiments.studies.study import CLAIMS as CLAIMS
from basis.experiments.studies.study import Study, listed, valid_records
from basis.experiments.studies.study import Verdict as Verdict
from basis.numbers import one_of
from basis.saving import RecordError
from basis.training.loop import choose_device

_MODULES = (cost, headline, switch, sensitivity, coefficients, skip, family, substitutes, speed, own)
STUDIES: Mapping[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}


def find_study(name: str) -> Study:
    """The study of that name; ``ValueError`` lists the known ones."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; there are: {', '.join(STUDIES)}")
    return STUDIES[name]


def check_records(folder: Path | None = None) -> list[str]:
    """One sentence for every record that no book may show: it is damaged, or its study does not list it as it is."""
    problems = []
    for path in sorted((folder or results_folder()).glob("*/*/*.json")):
        study, profile = path.parts[-3:-1]
        try:
            reason = study != "bench" and misplaced(read_record(path), study, profile, path.stem)
            problems += [f"{path} {reason}"] if reason else []
        except RecordError as error:
            problems.append(str(error))
    return problems


def misplaced(record: Record, study: str, profile: str, stem: str) -> str:
    """Why a record must not stand in ``STUDY/PROFILE/STEM.json``; empty where it may."""
    if study not in STUDIES:
        return f"belongs to no study; there are: {', '.join(STUDIES)}"
    if record.definition != STUDIES[study].definition:
        return f"was made before the study {study!r} changed its claims or rule; `basis run` does its run again"
    if record.id not in listed(STUDIES[study], profile) or stem != record.id:
        return f"holds a run that the study {study!r} does not list (any more) for {profile!r}"
    return ""


def is_done(path: Path, definition: str) -> bool:
    """Whether there is a sound record that was made under that definition of its study."""
    try:
        return path.exists() and read_record(path).definition == definition
    except RecordError:
        return False


def status(folder: Path | None = None, *, study: str | None = None) -> pd.DataFrame:
    """One row per study (all, unless one is named) and profile: runs planned, done, missing and started.

    Device ``seconds`` that were spent are by kind of device ("cpu", "cuda"); ``device`` names the devices.
    """
    folder = folder or results_folder()
    rows = []
    for one, profile in itertools.product(STUDIES.values() if study is None else [STUDIES[study]], PROFILES):
        runs, records = listed(one, profile), valid_records(one, profile, folder)
        checkpoints = [record_path(folder, run).parent.glob(f"checkpoints/{run.id}-*.pt") for run in runs.values()]
        row = {
            "study": one.name, "profile": profile, "runs": len(runs), "done": len(records),
            "missing": len(runs) - len(records), "started": sum(any(found) for found in checkpoints),
            "seconds": spent(records), "device": ", ".join(sorted({r.environment["device"] for r in records})),
        }  # fmt: skip
        rows += [row] if runs else []
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Gathered:
    """The records of one study and profile, and a Markdown sentence on what is missing and why."""

    records: list[Record]
    wanted: int
    note: str

    @property
    def complete(self) -> bool:
        """Whether every run has its record."""
        return len(self.records) == self.wanted


def gather(
    name: str, profile: str, *, run_missing: bool = False, time_limit: str = "9m", folder: Path | None = None
) -> Gathered:
    """The records of a study for a notebook, after training what is missing if that is asked for.

    Without a GPU nothing is trained for ``colab`` and ``paper``. Raises ``ValueError`` for an unknown study, profile or
    duration.
    """
    study, seconds = find_study(name), duration(time_limit)
    one_of("profile", profile, PROFILES)
    runs, folder = study.runs(profile), folder or results_folder()
    hopeless = profile in ("colab", "paper") and choose_device().type != "cuda"
    failures: list[str] = []
    late = False
    if run_missing and not hopeless:
        deadline, tasks = time.time() + seconds, [Task(run, study.definition) for run in runs]
        steps = list(in_processes(Order(tasks=tasks, folder=folder, deadline=deadline, progress=True), 1))
        failures = [f"{s.run.variant}, seed {s.run.seed}: {s.message}" for s in steps if s.outcome == "failed"]
        late = time.time() >= deadline
    records = valid_records(study, profile, folder)
    reasons = {
        "The others need a GPU, and there is none here.": hopeless,
        "The time was up for the others; run this cell again to go on where it stopped.": late,
        "Set `run_missing = True` to train the others.": not run_missing,
        "Another process is at work on the others.": not failures,
    }
    note = [f"{len(records)} of {len(runs)} runs of the profile `{profile}` have a record."]
    note += [reason for reason, holds in reasons.items() if holds][: len(records) < len(runs)]
    note += [f"Failed: {'; '.join(failures)}."] if failures else []
    return Gathered(records, len(runs), " ".join(note))
