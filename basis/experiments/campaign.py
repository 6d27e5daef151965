"""Which runs a command means, the most valuable first, and which of them are missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from basis.experiments.runner import Task
from basis.experiments.runs import record_path
from basis.experiments.studies import STUDIES, find_study, is_done

FORMS = "dense|[^,]* A, r=1/2"
# The order of all studies: study, pattern of its variants, and how many runs of each variant (None: all). First whether
# the trainer is right, then two runs of all that a claim is judged by, so that every claim is judged early; then the
# judged comparisons with all their seeds. What no stage names comes last, study by study.
STAGES: Sequence[tuple[str, str, int | None]] = (
    ("headline", ".*", None),
    ("switch", ".*", None),
    ("sensitivity", "dense", 4),
    ("sensitivity", "ladder", None),
    ("sensitivity", r"\S+ k=\d+", 2),
    ("coefficients", FORMS, 2),
    ("skip", ".*", 2),
    ("family", "(resnet18|resnet20|resnet56), (table|dense|all layers|selected)", 2),
    ("substitutes", ".*", None),
    ("own", r"dense|(selected|svd) at 50 %", 3),
    ("coefficients", FORMS, None),
    ("skip", ".*", None),
)


def in_order(profile: str, studies: Sequence[str] = ()) -> list[Task]:
    """Every run of a profile: of the studies named, each in its own order, or of all, by :data:`STAGES`.

    Raises ``ValueError`` for an unknown study, or where there is nothing to do.
    """
    chosen = [find_study(name) for name in studies] or list(STUDIES.values())
    tasks = [Task(run, study.definition) for study in chosen for run in study.runs(profile)]
    if not tasks:
        raise ValueError(f"{', '.join(study.name for study in chosen)} has no runs in the profile {profile!r}")
    if studies:
        return tasks
    seen = Counter[tuple[str, str]]()

    def stage(task: Task) -> int:
        """The first stage that the next run of this variant belongs to, else the last."""
        study, variant = task.run.study, task.run.variant
        seen[study, variant] += 1
        fits = (
            study == one and re.fullmatch(pattern, variant) and (most is None or seen[study, variant] <= most)
            for one, pattern, most in STAGES
        )  # fmt: skip
        return next((i for i, fit in enumerate(fits) if fit), len(STAGES))

    return sorted(tasks, key=stage)  # which asks for each key once, in the tasks' order


def missing(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks that have no record of their study's present definition."""
    return [task for task in tasks if not is_done(record_path(folder, task.run), task.definition)]
