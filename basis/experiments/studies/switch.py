"""Chapter 12: can the search be a part of the training?

Each training is dense at first; then layers are chosen and replaced on the spot, and it goes on. What is compared with,
dense and from scratch, are the runs of the study ``headline``, of equal seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from basis.experiments.runs import Record, Run
from basis.experiments.studies import headline
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.headline import HALF, HALF_MACS, NARROWER, QUARTER, variant
from basis.experiments.studies.study import Study, Verdict, by_seed, difference, label_of, untested, verdict
from basis.search.switching import Switch

POINTS, NEEDED, AFTER = 0.2, 3, 0.3
OURS, SCRATCH = "switched", "selected, decay of the product"
FIRST_STAGE = ("conv1", "layer1.*")  # which Cuttlefish and Pufferfish leave dense
_RANKS: Mapping[str, Any] = {"rule": "stable_rank", "fit": "weight", "exclude": FIRST_STAGE}
# The rules of one size that are compared, in words; all but the first are trained from scratch.
NAMES: Mapping[str, str] = {
    OURS: "switched on the way", SCRATCH: "selected, same decay", "selected": "selected",
    "largest first": "largest first", NARROWER: NARROWER, "uniform": "one ratio",
}  # fmt: skip
# What is changed of the switched training, one thing at a time: the state of the optimizer, a teacher, the moment, ...
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "momentum projected": {"momentum": "projected"},
    "by Fisher scores": {"measure": "fisher"},
    "largest first": {"rule": "largest_first", "ratio": 0.25},
    "taught by the dense network": {"teach": 0.5},
    "after 15 %": {"after": 0.15},
    "after 50 %": {"after": 0.5},
}
# ... and what others do, in our own small versions.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "Cuttlefish's rule": {**_RANKS, "after": 0.6, "until": "ranks", "pairs": True},
    "Pufferfish's rule": {"rule": "uniform", "fit": "weight", "pairs": True, "exclude": FIRST_STAGE},
    "spectral start": {"rule": "uniform", "fit": "weight", "after": 0.0},
}


def _runs(base: Run, *, multiple: int, seeds: int, fewer: int, images: int = 1000) -> tuple[Run, ...]:
    """Three seeds of the judged comparison; then round after round of all others; at last further seeds of it."""
    scratch = [run for run in headline.STUDY.runs(base.profile) if run.variant == variant("selected", HALF)]

    def one(what: str, seed: int, budget: tuple[str, float] = HALF, **changes: Any) -> Run:
        unit, share = budget
        settings = {"after": AFTER, "budget": {unit: share}, "multiple": multiple, "images": images, **changes}
        recipe = replace(base.recipe, decay="product", switch=Switch(**settings))
        return replace(base, variant=variant(what, budget), seed=seed, recipe=recipe)

    first = min(NEEDED, seeds)
    found = [one(OURS, seed) for seed in range(first)]
    for seed in range(min(fewer, seeds)):
        found += [one(f"{OURS}, {name}", seed, **changes) for name, changes in ABLATIONS.items()]
        found += [one(name, seed, **changes) for name, changes in OTHERS.items()]
        found += [one(OURS, seed, budget) for budget in (QUARTER, HALF_MACS)]
    found += [one(OURS, seed) for seed in range(first, seeds)]
    # The switched training decays the product; so must the control that begins with the selected layers.
    control: dict[str, Any] = {
        "study": base.study,
        "variant": variant(SCRATCH, HALF),
        "recipe": replace(base.recipe, decay="product"),
    }
    return (*found, *(replace(run, **control) for run in scratch[:seeds]))


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame`, with what the switch did.

    ``search``: seconds of search and replacement, which are among the ``seconds``; ``rule`` and ``budget``: the variant
    without its budget, and that.
    """
    search = {"search": lambda r: float((r.result.get("switched") or {}).get("seconds", math.nan))}
    runs = STUDY.frame(records, search)
    named = runs["variant"].astype(str).str.extract(r"^(.*?)(?:, (1/\d+ of \w+))?$")
    return runs.assign(rule=named[0], budget=named[1])


def lost(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of :data:`NAMES`, in that order by ``name``: their ``gap`` to dense ones of equal seed, in points."""
    found = runs.assign(name=runs["rule"].map(NAMES), gap=runs["accuracy"] - runs["seed"].map(by_seed(runs, "dense")))
    found = found.dropna(subset=["name", "gap"])
    return found.sort_values("name", key=lambda names: names.map([*NAMES.values()].index), kind="stable")


def choices(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs at half of the parameters that change one ``choice``: their ``gap`` to the plain ones, in points."""
    names = {f"{OURS}, {name}": name for name in ABLATIONS} | {name: name for name in OTHERS}
    plain = by_seed(runs, variant(OURS, HALF))
    found = runs.assign(choice=runs["rule"].map(names), gap=runs["accuracy"] - runs["seed"].map(plain))
    found["whose"] = found["choice"].isin(OTHERS).map({True: "another method's rule", False: "one change"})
    return found.dropna(subset=["choice", "gap"])


def training_times(folder: Path | None = None) -> pd.DataFrame:
    """What whole trainings take by the steps of ``basis bench switch``, one row a variant and device; empty without.

    ``ms`` of a step with quartiles, ``seconds`` of all steps and the search, ``relative`` to dense, ``search`` seconds.
    """
    rows = []
    for report in load_benches(None, kind="bench-switch", folder=folder):
        c = report.config
        steps, before = c["steps_per_epoch"] * c["epochs"], c["steps_per_epoch"] * c["epoch"]
        for row in report.rows:
            ours = row["mode"] == variant(OURS, HALF)
            dense, ms = row["dense_ms"] / 1000, row["ms"] / 1000
            seconds = before * dense + (steps - before) * ms + c["search_seconds"] if ours else steps * ms
            about = {"variant": row["mode"], "device": report.environment["device"], "n": row["n"]}
            about |= {key: row[key] for key in ("ms", "ms_q1", "ms_q3")}
            search = c["search_seconds"] if ours else math.nan
            rows.append({**about, "seconds": seconds, "relative": seconds / (steps * dense), "search": search})
    return pd.DataFrame(rows)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H5."""
    runs, ours, scale = frame(records), variant(OURS, HALF), STUDY.scale(profile)
    kept, gained = difference(runs, ours, "dense"), difference(runs, ours, variant(NARROWER, HALF))
    if (least := min(kept.n, gained.n)) < NEEDED:
        return (untested("H5", profile, least, NEEDED),)
    label = label_of(kept.low > -POINTS and gained.low > 0, kept.high < -POINTS or gained.high < 0)
    same = difference(runs, ours, variant(SCRATCH, HALF))
    fair = same.n >= NEEDED  # else the control that decays the factors
    scratch, decay = (
        (same, "the same decay") if fair else (difference(runs, ours, variant("selected", HALF)), "plain decay")
    )
    work = headline.macs(runs, ours, variant(NARROWER, HALF))
    return (verdict("H5", profile, label, kept, scale=scale, narrower=gained, scratch=scratch, decay=decay, macs=work),)


SHARED = [run.variant for run in headline.STUDY.runs("small") if run.variant != "table"]
STUDY = Study.named("switch", _runs, judge, shared={v: v for v in SHARED}, points=POINTS, needed=NEEDED, after=AFTER)
