"""Chapter 7: which skip-training schedule saves time, and what does it cost?

The basis network is trained with every reading of "skip-training" that :class:`basis.training.skipping.Skip` can
express, against training everything at every step for as many epochs, and for as long.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from basis.bench.networks import TRAINED
from basis.bench.report import BenchReport
from basis.experiments.runs import Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.cost import find_training_bench
from basis.experiments.studies.study import SCALES, TEXTS, Study, Verdict, accuracies, matched, spread
from basis.models import build
from basis.statistics import Estimate
from basis.substitution import substitute
from basis.training.skipping import Skip, predicted_step

RATIO, RATIO_NAME = 0.5, "r=1/2"
FULL = "everything, always"
SCHEDULES: Mapping[str, Skip] = {name: Skip(**json.loads(text)) for name, text in TEXTS["skip.schedules"].items()}
SAVED, POINTS = 0.2, 0.2


def _runs(
    base: Run, *, seeds: int, shorter: Sequence[int], schedules: Sequence[str] = tuple(SCHEDULES)
) -> tuple[Run, ...]:
    """Seed after seed, so that an unfinished study compares all schedules, and full trainings of fewer epochs."""
    of = base.recipe.epochs
    recipes = {FULL: base.recipe}
    recipes |= {f"everything, {n} of {of} epochs": replace(base.recipe, epochs=n) for n in shorter}
    recipes |= {name: replace(base.recipe, skip=SCHEDULES[name]) for name in schedules}
    return tuple(replace(base, variant=v, seed=seed, recipe=r) for seed in range(seeds) for v, r in recipes.items())


def steps_of(run: Run) -> dict[str, int]:
    """``steps_per_epoch`` and ``total_steps`` of a run."""
    left = {"cifar10": 50000, "synthetic": 2000}[run.data] - run.validation
    steps = min(left, run.images or left) // run.recipe.batch_size
    return {"steps_per_epoch": steps, "total_steps": steps * run.recipe.epochs}


def _skipping(profile: str) -> dict[str, tuple[Skip, dict[str, Any]]]:
    """Variant -> its schedule and :func:`steps_of`."""
    return {run.variant: (run.recipe.skip, steps_of(run)) for run in STUDY.runs(profile) if run.recipe.skip}


def predicted(profile: str) -> dict[str, float]:
    """What the cost model says of each schedule: MACs of its mean step relative to training everything."""
    base = STUDY.runs(profile)[0]
    model = substitute(build(base.model, width=base.width), ratio=RATIO, init="random", mode="factorized")
    size: dict[str, Any] = {"input_size": (3, 32, 32), "batch_size": base.recipe.batch_size}
    return {name: predicted_step(model, skip, **size, **steps) for name, (skip, steps) in _skipping(profile).items()}


def find_bench(profile: str) -> BenchReport | None:
    """The stored benchmark of the steps of this profile's network, on its kind of device."""
    return find_training_bench(profile, STUDY.runs(profile)[0], trained=tuple(TRAINED))


def measured(profile: str, report: BenchReport) -> dict[str, float]:
    """Time of each schedule's mean step, relative to a step that trains everything."""
    rows = [row for row in report.rows if row["ratio"] == RATIO and row["mode"] == "factorized"]
    speedups = {row["trained"]: row["speedup"] for row in rows if row["coefficients"] == "dense"}
    relative = {trained: speedups["both"] / speedups[part] for part, trained in TRAINED.items()}
    shares = {name: skip.shares(**steps) for name, (skip, steps) in _skipping(profile).items()}
    return {name: sum(share * relative[part] for part, share in parts.items()) for name, parts in shares.items()}


def drop(records: Sequence[Record], name: str, *, comparisons: int = 1) -> Estimate:
    """Training everything minus the variant ``name`` in test accuracy (a fraction), after equally many epochs."""
    return study.difference_of(records, (FULL, name), comparisons=comparisons)


def full_by_time(records: Sequence[Record]) -> dict[float, str]:
    """Fraction of the epochs -> the variant that trains everything for so long, ascending."""
    epochs = {r.config["recipe"]["epochs"]: r.config["variant"] for r in records if not r.config["recipe"].get("skip")}
    return {n / max(epochs): epochs[n] for n in sorted(epochs)}


def gain(records: Sequence[Record], name: str, time: float, *, comparisons: int = 1) -> Estimate:
    """The variant ``name`` minus training everything for the fraction ``time`` of the epochs, interpolated.

    Below the shortest such training, that one stands for it.
    """
    lengths = full_by_time(records)
    place = float(np.interp(time, list(lengths), range(len(lengths))))
    weights = {name: 1.0}
    weights |= {rival: abs(i - place) - 1 for i, rival in enumerate(lengths.values()) if abs(i - place) < 1}
    values = matched(records, tuple(weights))
    return spread(records).contrast(list(zip(weights.values(), values, strict=True)), comparisons=comparisons)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C6."""
    n = min((len(accuracies(records, name)) for name in {run.variant for run in STUDY.runs(profile)}), default=0)
    if n < 2:
        return (study.untested("C6", profile, n),)
    report = find_bench(profile)
    if report is None:
        return (Verdict("C6", profile, "not tested", "the time of the steps has not been measured on such a device"),)
    times = measured(profile, report)
    candidates = [name for name, time in times.items() if 1 - time >= SAVED]
    if not candidates:
        most = min(times, key=lambda name: times[name])
        finding = f"in {SCALES[profile]} the schedule that saves most ({most}) saves {1 - times[most]:.1%} of the time"
        return (Verdict("C6", profile, "not reproduced", finding),)
    many = 2 * len(candidates)  # a drop and a gain of each
    drops = {name: drop(records, name, comparisons=many) for name in candidates}
    gains = {name: gain(records, name, times[name], comparisons=many) for name in candidates}
    kept = [name for name in candidates if 100 * drops[name].high < POINTS and gains[name].low > 0]
    best = min(kept or candidates, key=lambda name: drops[name].value)
    return (study.verdict(
        "C6", profile, study.label_of(bool(kept), all(100 * d.low > POINTS for d in drops.values())),
        -100 * drops[best].value, best=best, saved=1 - times[best], candidates=len(candidates), least=SAVED,
        lost=drops[best].text(scale=100), gained=gains[best].text(scale=100, signed=True), n=drops[best].n,
        scale=SCALES[profile], ratio=RATIO_NAME,
    ),)  # fmt: skip


FIXED: Mapping[str, Any] = {"variant": FULL, "ratio": RATIO, "mode": "factorized"}
STUDY = Study.named("skip", _runs, judge, FIXED, ratio_name=RATIO_NAME, saved=SAVED, points=POINTS)
