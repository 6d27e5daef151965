"""Chapter 7: which skip-training schedule saves time, and what does it cost?

Our own experiment. A basis network is trained by several schedules of :class:`basis.training.skipping.Skip`, against
training everything for as many epochs and for as long, and against the dense network trained for as long.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from basis.bench.networks import TRAINED
from basis.experiments.runs import Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.coefficients import RATIO, SHARED, step_times
from basis.experiments.studies.study import MARGIN, Study, Verdict, difference, label_of, untested, verdict
from basis.models import build
from basis.statistics import Estimate, paired_difference
from basis.substitution import substitute
from basis.training.skipping import Skip, predicted_step

WHOLE = "everything"  # what is trained for an equal time; so is "dense"
FULL, CANDIDATES = f"{WHOLE}, always", ("B fixed", "B every 8th step")
SCHEDULES: Mapping[str, Skip] = {
    "B fixed": Skip(basis_until=0.0), "B every 8th step": Skip(basis_every=8), "A fixed": Skip(coefficients_until=0.0),
    "by epochs in turns": Skip(alternate=True),
}  # fmt: skip
SAVED, NEEDED = 0.2, 8


def _runs(
    base: Run, *, seeds: int, few: int, shorter: int, dense: Sequence[int] = (), others: Sequence[str] = ()
) -> tuple[Run, ...]:
    """``seeds`` rounds of all that is judged, then ``few`` of the ``others`` and of ``dense`` for fewer epochs."""
    of = base.recipe.epochs

    def one(name: str, seed: int, **changes: Any) -> Run:
        return replace(base, variant=name, seed=seed, recipe=replace(base.recipe, **changes))

    found: list[Run] = []
    for seed in range(seeds):
        found += [one(FULL, seed), one(f"{WHOLE}, {shorter} of {of} epochs", seed, epochs=shorter)]
        found += [one(name, seed, skip=SCHEDULES[name]) for name in CANDIDATES]
    for seed in range(few):
        found += [one(name, seed, skip=SCHEDULES[name]) for name in others]
        found += [replace(one(f"dense, {n} of {of} epochs", seed, epochs=n), ratio=None, mode="auto") for n in dense]
    return tuple(found)


def steps_of(run: Run) -> dict[str, int]:
    """``steps_per_epoch`` and ``total_steps`` of a run."""
    steps = study.images_of(run.config) // run.recipe.batch_size
    return {"steps_per_epoch": steps, "total_steps": steps * run.recipe.epochs}


def predicted(profile: str) -> dict[str, float]:
    """What the cost model says of each schedule: multiplications of its mean step over those of training everything."""
    base = STUDY.runs("paper" if profile == "paper" else "small")[0]
    model = substitute(build(base.model, width=base.width), ratio=RATIO, init="random", mode="factorized")
    about: dict[str, Any] = {"batch_size": base.recipe.batch_size, "input_size": (3, 32, 32), **steps_of(base)}
    return {name: predicted_step(model, skip, **about) for name, skip in SCHEDULES.items()}


def times(profile: str) -> pd.DataFrame:
    """What a mean step takes, a row a ``device`` and ``variant``: a schedule, or :data:`FULL`.

    ``relative`` to training everything and ``to_dense`` network's, from the ``n`` rounds of :func:`step_times`.
    """
    steps, rows = steps_of(STUDY.runs("paper" if profile == "paper" else "small")[0]), []
    for device, own in step_times(profile, "trained").groupby("device", sort=False):
        parts = own.set_index("trained")
        about = {"device": device, "device_type": parts["device_type"].iloc[0], "n": parts["n"].min()}
        for name, skip in {FULL: Skip(), **SCHEDULES}.items():
            shares = skip.shares(**steps)
            relative = sum(shares.get(trained, 0) * parts["relative"][part] for part, trained in TRAINED.items())
            about |= {"variant": name, "relative": relative, "to_dense": relative * parts["to_dense"]["both"]}
            rows.append(dict(about))
    return pd.DataFrame(rows, columns=["variant", "device", "device_type", "n", "relative", "to_dense"])


def judged_times(profile: str) -> pd.DataFrame:
    """The :func:`times` that the rule names, by variant: a GPU's at paper scale, else a CPU's; empty without."""
    found = times(profile)
    found = found[found["device_type"] == ("cuda" if profile == "paper" else "cpu")]
    return found[found["device"] == found["device"].min()].set_index("variant")


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame` with ``what`` is trained for what ``share`` of the epochs; archived ones are left out."""
    # Archived records tell no MACs, and none is of the dense network.
    unknown = {"test": None, "parameters": math.nan, "macs": math.nan}
    found = [replace(study.renamed(r, "dense"), result=unknown) for r in records[:1]]
    found += [replace(r, result={"macs": math.nan, **r.result}) for r in records]
    runs = STUDY.frame(found, {"epochs": lambda r: r.config["recipe"]["epochs"]})
    runs["what"] = runs["variant"].str.split(",").str[0]
    runs["share"] = runs["epochs"] / runs["epochs"].max()
    return runs[runs["variant"].isin([*SHARED.values(), *SCHEDULES]) | runs["what"].isin([WHOLE, "dense"])]


def gain(runs: pd.DataFrame, name: str, share: float, what: str = WHOLE, *, comparisons: int = 1) -> Estimate:
    """Test accuracy of ``name`` minus that of ``what`` ("dense", or training everything) after a share of the epochs.

    In points, paired by seed as :func:`difference`. Between two lengths that were trained, ``what`` is interpolated;
    the shortest stands for shorter ones, the full training for longer ones.
    """
    lengths = runs[runs["what"] == what].pivot(index="seed", columns="share", values="accuracy").dropna()
    rivals = {seed: np.interp(share, lengths.columns, row) for seed, row in lengths.iterrows()}
    return paired_difference(study.by_seed(runs, name), pd.Series(rivals, dtype=float), comparisons=comparisons)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C6."""
    runs, took, many = frame(records), judged_times(profile), len(CANDIDATES)
    kept = {name: difference(runs, name, FULL, comparisons=many) for name in CANDIDATES}
    timed = () if took.empty else CANDIDATES
    gained = {name: gain(runs, name, took["relative"][name], comparisons=many) for name in timed}
    if (least := min(one.n for one in (*kept.values(), *gained.values()))) < NEEDED:
        return (untested("C6", profile, least, NEEDED),)
    if not timed:
        finding = "the time of the steps has not been measured on such a device"
        return (Verdict("C6", profile, "not tested", finding, n=least),)
    saving = [name for name in CANDIDATES if took["relative"][name] <= 1 - SAVED]
    good = [name for name in saving if gained[name].low > 0 and kept[name].low > -MARGIN[profile]]
    bad = [name for name in saving if gained[name].high < 0 or kept[name].high < -MARGIN[profile]]
    best = max(good or saving or CANDIDATES, key=lambda name: gained[name].value)
    found = verdict(
        "C6", profile, label_of(bool(good), bad == saving), gained[best], scale=STUDY.scale(profile), best=best,
        share=took["relative"][best], device=took["device"][best], kept=kept[best],
        dense=(rival := gain(runs, best, took["to_dense"][best], "dense", comparisons=many)), pairs=rival.n,
    )  # fmt: skip
    both = f"{gained[best].text(signed=True)} over equal time, {kept[best].text(signed=True)} against as many epochs"
    return (replace(found, difference=f"{both}, points"),)


FIXED: Mapping[str, Any] = {"variant": FULL, "ratio": RATIO, "mode": "factorized"}
STUDY = Study.named("skip", _runs, judge, FIXED, shared=SHARED, saved=SAVED, needed=NEEDED, **MARGIN)
