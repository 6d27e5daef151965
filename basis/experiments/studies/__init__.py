"""The studies of the book, and the state of their records."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from basis.environment import results_folder
from basis.experiments.records import spent
from basis.experiments.runs import ARCHIVED, PROFILES, Record, read_record, record_path
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
from basis.experiments.studies.study import Study, listed, renamed, valid_records
from basis.experiments.studies.study import Verdict as Verdict
from basis.numbers import one_of
from basis.saving import RecordError

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
    if profile == ARCHIVED:
        return "" if stem == record.id else "is not called by its id"
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
    for one in STUDIES.values() if study is None else [STUDIES[study]]:
        for profile in (*PROFILES, ARCHIVED):
            runs, records = listed(one, profile), valid_records(one, profile, folder)
            checkpoints = [record_path(folder, run).parent.glob(f"checkpoints/{run.id}-*.pt") for run in runs.values()]
            row = {
                "study": one.name, "profile": profile, "runs": len(runs) or len(records), "done": len(records),
                "missing": max(0, len(runs) - len(records)), "started": sum(any(found) for found in checkpoints),
                "seconds": spent(records), "device": ", ".join(sorted({r.environment["device"] for r in records})),
            }  # fmt: skip
            rows += [row] if row["runs"] else []
    columns = ("study", "profile", "runs", "done", "missing", "started", "seconds", "device")
    return pd.DataFrame(rows, columns=columns)


def records_of(study: Study, profile: str, folder: Path | None = None) -> list[Record]:
    """The valid records of a study, and those of ``headline`` that it shares, by the names that they have here."""
    found, others = valid_records(study, profile, folder), []
    if study.shared and profile != ARCHIVED:
        others = [r for r in valid_records(headline.STUDY, profile, folder) if r.config["variant"] in study.shared]
    return found + [renamed(r, study.shared[r.config["variant"]]) for r in others]


def shown_profile(study: Study, folder: Path | None = None) -> str:
    """The profile that the book shows: the one that the study publishes; "auto": the largest that decides its claims.

    Until one does, the archived records are shown, if there are any, else what there is of ``small``.
    """
    if study.published != "auto":
        return study.published
    for profile in ("paper", "small"):
        found = study.verdicts(records_of(study, profile, folder), profile)
        if found and all(one.label != "not tested" for one in found):
            return profile
    return ARCHIVED if valid_records(study, ARCHIVED, folder) else "small"


@dataclass(frozen=True)
class Gathered:
    """The records of one study and profile, with those it shares, and what is shown in words.

    ``wanted`` is the number of all runs, ``scale`` what they train.
    """

    profile: str
    scale: str
    records: list[Record]
    wanted: int

    @property
    def complete(self) -> bool:
        """Whether every run has its record."""
        return len(self.records) == self.wanted

    @property
    def note(self) -> str:
        """A Markdown sentence on how many there are."""
        if self.profile == ARCHIVED:
            return (
                f"Shown are {len(self.records)} runs of an older, smaller scale ({self.scale}): too small and too "
                "short to decide anything. They stay until the runs that the verdict needs are made."
            )
        return f"Shown are {len(self.records)} of {self.wanted} runs of the profile `{self.profile}` ({self.scale})."


def gather(name: str, profile: str = "auto", *, folder: Path | None = None) -> Gathered:
    """The records of a study for a notebook; "auto" is :func:`shown_profile`.

    Raises ``ValueError`` for an unknown study or profile.
    """
    one_of("profile", profile, ("auto", *PROFILES, ARCHIVED))
    study = find_study(name)
    profile = shown_profile(study, folder) if profile == "auto" else profile
    records = records_of(study, profile, folder)
    shared = [run for run in headline.STUDY.runs(profile) if run.variant in study.shared]
    wanted = len(records) if profile == ARCHIVED else len(study.runs(profile)) + len(shared)
    return Gathered(profile, study.scale(profile, records), records, wanted)
