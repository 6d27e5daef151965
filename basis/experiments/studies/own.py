"""Chapter 11: how much smaller does a trained network get, and what does that cost?

Each seed's dense network is made smaller to one number of parameters by several methods, and tested as it is, after
recalibration, and after one epoch of fine-tuning. The dense network itself, fine-tuned as long, is the control.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from basis.experiments.comparison import METHODS, Compression
from basis.experiments.runs import Record, Run
from basis.experiments.studies import headline
from basis.experiments.studies.headline import HALF, NARROWER
from basis.experiments.studies.study import (
    MARGIN,
    Study,
    Verdict,
    by_seed,
    difference,
    label_of,
    renamed,
    untested,
    verdict,
)
from basis.statistics import mean_estimate, paired_difference

BUDGET, PART, NEEDED = 0.5, 0.5, 8
DENSE, OURS, SVD = tuple(METHODS)[:3]
ORDER = (*METHODS, NARROWER)
STAGES = {"grown": ("made", "loss"), "given": ("made", "accuracy"), "recalibrated": ("recalibrated", "accuracy")}
OLD = {"svd": SVD, "selected by both": "selected, MACs too", "tensorly": "Tucker"}  # names in archived records


def _runs(
    base: Run, *, seeds: int, methods: int | None = None, task: Mapping[str, Any] | None = None
) -> tuple[Run, ...]:  # fmt: skip
    """Method after method, the dense one first: trainings side by side then begin with networks of different seeds."""
    budgets = {method: 1.0 if method == DENSE else BUDGET for method in tuple(METHODS)[:methods]}
    asked = [Compression(method=method, budget=budget, **(task or {})) for method, budget in budgets.items()]
    return tuple(replace(base, variant=c.method, seed=seed, compression=c) for c in asked for seed in range(seeds))


def _at(record: Record, *, where: tuple[str, str]) -> float:
    """Loss or accuracy (a fraction) at a stage; NaN where there are none, as in a network trained from scratch."""
    return float(record.result["stages"][where[0]][where[1]]) if "stages" in record.result else math.nan


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame`, whose ``accuracy`` is that after fine-tuning, with what was before it.

    ``given``: the accuracy (%) of its trained network, from which the loss has ``grown`` and the ``recalibrated``
    accuracy differs (points). Runs made of another network than their seed's dense one are left out.
    """
    named = [(r, r.config["variant"].removesuffix(" at 50 %")) for r in records]
    known = [renamed(r, OLD.get(name, name)) for r, name in named if OLD.get(name, name) in ORDER]
    columns: dict[str, Any] = {"accuracy_flip": lambda _: math.nan, "validation": lambda _: []}
    columns |= {"origin": lambda r: r.result.get("given", {}).get("loss", math.nan)}
    runs = STUDY.frame(known, columns | {name: partial(_at, where=where) for name, where in STAGES.items()})
    given = runs[runs["variant"] == DENSE].set_index("seed")[["grown", "given", "origin"]].astype(float)
    loss, accuracy, origin = (runs["seed"].map(given[name]) for name in given)
    changes = {"grown": runs["grown"] - loss, "recalibrated": 100 * (runs["recalibrated"] - accuracy)}
    again = (runs.pop("origin").astype(float) / origin - 1).abs() > 1e-4  # beyond rounding; archived runs have none
    return runs[~again].assign(given=100 * accuracy, **changes)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H4."""
    runs, margin = frame(records), MARGIN[profile]
    grown, by_svd = (by_seed(runs, name, "grown") for name in (OURS, SVD))
    excess = paired_difference(grown, PART * by_svd)
    kept = difference(runs, OURS, DENSE)
    if (least := min(excess.n, kept.n)) < NEEDED:
        return (untested("H4", profile, least, NEEDED),)
    label = label_of(excess.high < 0 and kept.low > -margin, excess.low > 0 or kept.high < -margin)
    about: dict[str, Any] = {"scale": STUDY.scale(profile), "narrower": difference(runs, OURS, NARROWER)}
    losses = {"lost": grown, "svd": by_svd, "uniform": by_seed(runs, "uniform", "grown")}
    about |= {key: mean_estimate(list(of)).text(digits=3) if len(of) else "(no runs)" for key, of in losses.items()}
    about |= {"macs": runs.groupby("variant")["MACs"].mean().reindex([OURS, NARROWER]).tolist()}
    both = f"{kept.text(signed=True)} points; {excess.text(signed=True, digits=3)} nats over half of SVD's growth"
    return (replace(verdict("H4", profile, label, kept, **about), difference=both),)


STUDY = Study.named(
    "own", _runs, judge, shared={headline.variant(NARROWER, HALF): NARROWER},
    budget=BUDGET, part=PART, needed=NEEDED, margin=MARGIN["small"], paper=MARGIN["paper"],
)  # fmt: skip
