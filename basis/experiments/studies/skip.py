"""Chapter 7: which skip-training schedule saves time, and what does it cost?

The basis network is trained with every reading of "skip-training" that :class:`basis.training.skipping.Skip` can
express, against training everything at every step for as many epochs, and for as long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from basis.bench.networks import TRAINED
from basis.bench.report import BenchReport
from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import find_training_bench
from basis.experiments.studies.study import SCALES, Label, Study, Verdict, accuracies, matched, spread, too_few
from basis.models import build
from basis.statistics import Estimate
from basis.substitution import substitute
from basis.training.loop import Recipe
from basis.training.skipping import Skip, predicted_step

RATIO, RATIO_NAME = 0.5, "r=1/2"
FULL = "everything, always"
SCHEDULES: Mapping[str, Skip] = {
    "B every 2nd step": Skip(basis_every=2),
    "B every 4th step": Skip(basis_every=4),
    "B frozen at half": Skip(basis_until=0.5),
    "B fixed": Skip(basis_until=0.0),
    "A fixed": Skip(coefficients_until=0.0),
    "A every 4th step": Skip(coefficients_every=4),
    "A frozen at half": Skip(coefficients_until=0.5),
    "by epochs in turns": Skip(alternate=True),
    "B every 8th step": Skip(basis_every=8),
    "B every 2nd step, twice the rate": Skip(basis_every=2, rescale=True),
    "B every 4th step, four times the rate": Skip(basis_every=4, rescale=True),
}
SAVED, POINTS = 0.2, 0.2

RULE = (
    f"C6 is judged on the basis network with {RATIO_NAME} on every convolution, in factorized mode. A schedule's time "
    "is that of its mean training step relative to a step that trains everything, as measured by an interleaved "
    "benchmark on the same kind of device; its drop is the difference in test accuracy (without test-time "
    f"augmentation) after equally many epochs. Candidates are the schedules that save at least {SAVED:.0%} of the "
    "time. Intervals use the spread pooled over all variants and hold for all candidates together with 95 % (Bonferroni). "
    f"Reproduced if, for some candidate, the drop's interval lies below {POINTS} percentage points and its accuracy is "
    "above that of training everything for equal time (interpolated between trainings of fewer epochs), that interval "
    "lying above 0. Not reproduced if there is no candidate, or every candidate's drop lies above "
    f"{POINTS} points with its whole interval; else partly. It needs at least 2 runs per variant and the benchmark, "
    "else it is not tested."
)


def full(epochs: int, of: int) -> str:
    """The name of the variant that trains everything for that many epochs."""
    return FULL if epochs == of else f"everything, {epochs} of {of} epochs"


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile, seed after seed, so that an unfinished study compares all schedules."""
    if profile == "paper":
        return _runs(_run(profile, validation=5000), seeds=8, shorter=(22, 18))
    if profile == "colab":
        base = _run(profile, width=16, validation=5000, recipe=Recipe(epochs=4))
        return _runs(base, seeds=2, shorter=(3,))
    if profile == "cpu":
        recipe = Recipe(epochs=6, batch_size=125, lr=0.1, precision="bf16")
        return _runs(_run(profile, width=16, images=8500, validation=500, recipe=recipe), seeds=3, shorter=(5, 4))
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, model="resnet20", width=4, data="synthetic", recipe=recipe)
        return _runs(base, seeds=2, shorter=(1,), schedules=("B every 4th step", "B fixed", "by epochs in turns"))
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="skip", profile=profile, variant=FULL, seed=0, ratio=RATIO, mode="factorized", **settings)


def _runs(
    base: Run, *, seeds: int, shorter: Sequence[int], schedules: Sequence[str] = tuple(SCHEDULES)
) -> tuple[Run, ...]:
    epochs = base.recipe.epochs
    recipes = {full(e, epochs): replace(base.recipe, epochs=e) for e in (epochs, *shorter)}
    recipes |= {name: replace(base.recipe, skip=SCHEDULES[name]) for name in schedules}
    return tuple(
        replace(base, variant=name, seed=seed, recipe=recipe)
        for seed in range(seeds)
        for name, recipe in recipes.items()
    )


# -- time: predicted and measured -----------------------------------------------------------------------


def steps_of(run: Run) -> dict[str, int]:
    """``steps_per_epoch`` and ``total_steps`` of a run."""
    left = {"cifar10": 50000, "synthetic": 2000}[run.data] - run.validation
    steps = min(left, run.images or left) // run.recipe.batch_size
    return {"steps_per_epoch": steps, "total_steps": steps * run.recipe.epochs}


def predicted(profile: str) -> dict[str, float]:
    """What the cost model says of each schedule: MACs of its mean step relative to training everything."""
    runs = {run.variant: run for run in plan(profile)}
    base = runs[FULL]
    model = substitute(build(base.model, width=base.width), ratio=RATIO, init="random", mode="factorized")
    size: dict[str, Any] = {"input_size": (3, 32, 32), "batch_size": base.recipe.batch_size, **steps_of(base)}
    return {
        name: predicted_step(model, run.recipe.skip, **size)
        for name, run in runs.items()
        if run.recipe.skip is not None
    }


def find_bench(profile: str) -> BenchReport | None:
    """The stored benchmark of the steps of this profile's network, on its kind of device."""
    base = plan(profile)[0]
    return find_training_bench(profile, base, trained=tuple(TRAINED))


def step_times(report: BenchReport) -> dict[str, float]:
    """Measured time of a step that trains these parts (of :data:`basis.bench.cases.TRAINED`), relative to both."""
    rows = [row for row in report.rows if row["ratio"] == RATIO and row["mode"] == "factorized"]
    speedups = {row["trained"]: row["speedup"] for row in rows if row["coefficients"] == "dense"}
    return {part: speedups["both"] / speedup for part, speedup in speedups.items()}


def measured(profile: str, report: BenchReport) -> dict[str, float]:
    """Time of each schedule's mean step, relative to a step that trains everything."""
    times = step_times(report)
    relative = {trained: times[part] for part, trained in TRAINED.items()}
    found = {}
    for run in plan(profile):
        if run.recipe.skip is not None:
            shares = run.recipe.skip.shares(**steps_of(run))
            found[run.variant] = sum(share * relative[trained] for trained, share in shares.items())
    return found


# -- accuracy --------------------------------------------------------------------------------------------


def drop(records: Sequence[Record], name: str, *, comparisons: int = 1) -> Estimate:
    """Training everything minus the variant ``name`` in test accuracy (a fraction), after equally many epochs."""
    return spread(records).difference(*matched(records, (FULL, name)), comparisons=comparisons)


def full_by_time(records: Sequence[Record]) -> dict[float, str]:
    """Fraction of the epochs -> the variant that trains everything for so long, ascending."""
    epochs = {r.config["recipe"]["epochs"]: r.config["variant"] for r in records if not r.config["recipe"].get("skip")}
    return {n / max(epochs): epochs[n] for n in sorted(epochs)}


def gain(records: Sequence[Record], name: str, time: float, *, comparisons: int = 1) -> Estimate:
    """The variant ``name`` minus training everything for the fraction ``time`` of the epochs, interpolated.

    Below the shortest such training, that one stands for it (which flatters the schedule's rival).
    """
    lengths = full_by_time(records)
    place = float(np.interp(time, list(lengths), range(len(lengths))))
    weights = {name: 1.0}
    for i, rival in enumerate(lengths.values()):
        if abs(i - place) < 1:
            weights[rival] = abs(i - place) - 1
    values = matched(records, tuple(weights))
    return spread(records).contrast(list(zip(weights.values(), values, strict=True)), comparisons=comparisons)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C6 by :data:`RULE`."""

    def untested(finding: str) -> tuple[Verdict, ...]:
        return (Verdict("C6", profile, "not tested", finding),)

    names = [name for name in dict.fromkeys(run.variant for run in plan(profile))]
    n = min((len(accuracies(records, name)) for name in names), default=0)
    if n < 2:
        return untested(too_few(n))
    report = find_bench(profile)
    if report is None:
        return untested("the time of the steps has not been measured on such a device")
    times = measured(profile, report)
    candidates = [name for name, time in times.items() if 1 - time >= SAVED]
    if not candidates:
        most = min(times, key=lambda name: times[name])
        finding = f"in {SCALES[profile]} the schedule that saves most ({most}) saves {1 - times[most]:.1%} of the time"
        return (Verdict("C6", profile, "not reproduced", finding),)
    many = {"comparisons": 2 * len(candidates)}  # a drop and a gain of each
    drops = {name: drop(records, name, **many) for name in candidates}
    gains = {name: gain(records, name, times[name], **many) for name in candidates}
    kept = [name for name in candidates if 100 * drops[name].high < POINTS and gains[name].low > 0]
    best = min(kept or candidates, key=lambda name: drops[name].value)
    label: Label = "reproduced" if kept else "partly"
    if all(100 * d.low > POINTS for d in drops.values()):
        label = "not reproduced"
    finding = (
        f"in {SCALES[profile]} with {RATIO_NAME} the best of {len(candidates)} schedules that save at least "
        f"{SAVED:.0%} ({best}) saves {1 - times[best]:.1%} of the time of a step, loses "
        f"{drops[best].text(scale=100)} percentage points of test accuracy after equally many epochs, and against "
        f"training everything for equal time it gains {gains[best].text(scale=100, signed=True)} "
        f"(n = {drops[best].n} or more per variant; the intervals hold together with 95 %)"
    )
    return (Verdict("C6", profile, label, finding, f"{-100 * drops[best].value:+.2f} points"),)


STUDY = Study(
    name="skip",
    title="Which steps can skip which weights?",
    chapter="07_skip_training",
    claims=("C6",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
