"""Which runs a command means, the most valuable first, and which of them are missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from basis.experiments.runner import Task
from basis.experiments.runs import record_path
from basis.experiments.studies import find_study, is_done

# The order of all studies with runs: first those that share their runs or tables, then by what a reader wants to know.
ORDER = ("headline", "sensitivity", "own", "coefficients", "skip", "substitutes", "family", "switch")


def in_order(profile: str, studies: Sequence[str] = ()) -> list[Task]:
    """Every run of a profile, of the studies named or of all in :data:`ORDER`, each study in its own order.

    Raises ``ValueError`` for an unknown study, or where there is nothing to do.
    """
    chosen = [find_study(name) for name in studies or ORDER]
    tasks = [Task(run, study.definition) for study in chosen for run in study.runs(profile)]
    if not tasks:
        raise ValueError(f"{', '.join(study.name for study in chosen)} has no runs in the profile {profile!r}")
    return tasks


def missing(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks that have no record of their study's present definition."""
    return [task for task in tasks if not is_done(record_path(folder, task.run), task.definition)]
