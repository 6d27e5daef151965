"""The studies of the book, and the state of their records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from basis.runs import PROFILES, RecordError, load_records, read_record, record_path, results_folder
from basis.studies import naive
from basis.studies.study import CLAIMS, Study, Verdict

__all__ = ["CLAIMS", "STUDIES", "Study", "Verdict", "check_records", "find_study", "status"]

STUDIES: Mapping[str, Study] = {study.name: study for study in (naive.STUDY,)}


def find_study(name: str) -> Study:
    """The study of that name; ``ValueError`` lists the known ones."""
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; there are: {', '.join(STUDIES)}")
    return STUDIES[name]


def check_records(folder: Path | None = None) -> list[str]:
    """One sentence for every record that no book may show.

    Refused are records that cannot be read, that no study lists, or whose study has changed its
    claims or its rule since they were made.
    """
    problems = []
    for path in sorted((folder or results_folder()).glob("*/*/*.json")):
        study, profile = path.parts[-3:-1]
        if study == "bench":
            continue
        try:
            record = read_record(path)
        except RecordError as error:
            problems.append(str(error))
            continue
        if study not in STUDIES:
            problems.append(f"{path} belongs to no study; there are: {', '.join(STUDIES)}")
        elif record.definition != STUDIES[study].definition:
            problems.append(f"{path} was made before the study {study!r} changed its claims or rule; do its run again")
        elif record.id not in {run.id for run in STUDIES[study].runs(profile)} or path.stem != record.id:
            problems.append(f"{path} holds a run that the study {study!r} does not list (any more) for {profile!r}")
    return problems


def status(folder: Path | None = None) -> pd.DataFrame:
    """One row per study and profile: runs, done, missing, started, seconds of training, devices."""
    folder = folder or results_folder()
    rows = []
    for study in STUDIES.values():
        for profile in PROFILES:
            runs = study.runs(profile)
            if not runs:
                continue
            wanted = {run.id for run in runs}
            records = [r for r in load_records(folder, study=study.name, profile=profile) if r.id in wanted]
            checkpoints = (record_path(folder, run).parent / "checkpoints" / f"{run.id}.pt" for run in runs)
            rows.append(
                {
                    "study": study.name,
                    "profile": profile,
                    "runs": len(runs),
                    "done": len(records),
                    "missing": len(runs) - len(records),
                    "started": sum(path.exists() for path in checkpoints),
                    "seconds": sum(r.result["train_seconds"] for r in records),
                    "device": ", ".join(sorted({r.environment["device"] for r in records})),
                }
            )
    return pd.DataFrame(rows)
