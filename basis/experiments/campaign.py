"""All studies in order of value: which run is the next one worth doing?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from basis.experiments.executors import Task
from basis.experiments.runs import Run, record_path
from basis.experiments.studies import STUDIES, find_study, is_done
from basis.experiments.studies.substitutes import SEPARABLE


@dataclass(frozen=True)
class Leg:
    """Some runs of a study, done one after the other.

    Args:
        study: its name.
        variants: a pattern that the whole name of a variant matches.
        seeds: how many runs of each variant, the first ones of the study's list; None for all.
    """

    study: str
    variants: str = ".*"
    seeds: int | None = None


JUDGED_FORMS = "dense|[^,]* A, r=1/2"
JUDGED_LAYERS = rf"wrn-1\S* (dense|basis|{'|'.join(SEPARABLE)})\b(?!.*(fitted|attention)).*"

# The order of a campaign. First whether the trainer is right, then two runs of all that a claim is judged by, so that
# every claim is judged early; then the judged comparisons with all their seeds. What no leg names comes last, study
# by study, in the order of each study's own list.
LEGS = (
    Leg("headline"),
    Leg("sensitivity", "dense", seeds=4),
    Leg("sensitivity", "ladder"),
    Leg("sensitivity", r"\S+ k=\d+", seeds=2),
    Leg("coefficients", JUDGED_FORMS, seeds=2),
    Leg("skip", seeds=2),
    Leg("family", "(resnet18|resnet20|resnet56), (table|dense|all layers|selected)", seeds=2),
    Leg("substitutes", JUDGED_LAYERS, seeds=2),
    Leg("own", "dense|(selected|svd) at 50 %", seeds=3),
    Leg("coefficients", JUDGED_FORMS),
    Leg("skip"),
)
LAST = ("sensitivity", "coefficients", "family", "substitutes", "own")


def in_order(profile: str, studies: Sequence[str] = ()) -> list[Task]:
    """Every run of a profile, the most valuable first; of the studies named, or of all.

    Raises:
        ValueError: for an unknown study, or where there is nothing to do.
    """
    chosen = [find_study(name).name for name in studies] or list(STUDIES)
    tasks = [task for _, found in by_leg(profile, chosen) for task in found]
    if not tasks:
        raise ValueError(f"no study of {', '.join(chosen)} has runs in the profile {profile!r}")
    return tasks


def by_leg(profile: str, studies: Sequence[str]) -> Iterator[tuple[Leg, list[Task]]]:
    """The legs with their runs, each run in the first leg that it belongs to."""
    left = {name: _counted(STUDIES[name].runs(profile)) for name in studies}
    tails = [Leg(name) for name in (*LAST, *(name for name in STUDIES if name not in LAST))]
    for leg in (*LEGS, *tails):
        runs = left.get(leg.study, [])
        left[leg.study] = [(run, place) for run, place in runs if not _belongs(run, place, leg)]
        yield leg, [Task(run, STUDIES[leg.study].definition) for run, place in runs if _belongs(run, place, leg)]


def _counted(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """Each run with how many of its variant stand before it."""
    seen: Counter[str] = Counter()
    counted = []
    for run in runs:
        counted.append((run, seen[run.variant]))
        seen[run.variant] += 1
    return counted


def _belongs(run: Run, place: int, leg: Leg) -> bool:
    return re.fullmatch(leg.variants, run.variant) is not None and (leg.seeds is None or place < leg.seeds)


def missing(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The tasks that have no record of their study's present definition."""
    return [task for task in tasks if not is_done(record_path(folder, task.run), task.definition)]
