"""Chapter 11: how much smaller does a trained network get, and what does that cost?

One dense network is trained for each seed, and made smaller to one number of parameters by several methods: ours,
and what one would take instead. Each is tested as it is, after batch normalisation is recalibrated, and after one
epoch of fine-tuning, all on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.experiments.comparison import Compression
from basis.experiments.runs import Record, Run
from basis.experiments.studies.study import SCALES, Study, Verdict, label_of, planner, untested, verdict
from basis.statistics import Estimate, mean_estimate

# Method of basis.experiments.comparison -> what figures call it; the first three are needed for the verdict.
METHODS: Mapping[str, str] = {
    "dense": "dense, itself",
    "selected": "basis, selected",
    "svd": "SVD pairs",
    "selected by both": "basis, selected, MACs too",
    "uniform": "basis, uniform",
    "tensorly": "Tucker (tltorch)",
    "fasterai tucker": "Tucker (fasterai)",
    "uniform, fitted to weights": "basis, uniform, by weights",
    "fasterai svd": "SVD (fasterai)",
}
DENSE, FIRST = "dense", tuple(METHODS)[:3]
OURS = ("selected", "selected by both", "uniform", "uniform, fitted to weights")
JUDGED, PART, POINTS, SEEDS = 0.5, 0.5, 0.3, 3


def variant(method: str, budget: float = JUDGED) -> str:
    """The name of a variant, such as ``selected at 50 %``; ``dense`` has no budget."""
    return DENSE if method == DENSE else f"{method} at {100 * budget:g} %"


def _runs(
    base: Run, *, seeds: int, judged: int = 0, methods: int = len(METHODS), budgets: Sequence[float] = (JUDGED,),
    task: Mapping[str, Any] | None = None,
) -> tuple[Run, ...]:  # fmt: skip
    """What the verdict needs, then what else is compared; at last further ``judged`` seeds of the former."""

    def one(seed: int, method: str, budget: float = JUDGED) -> Run:
        asked = Compression(method=method, budget=1.0 if method == DENSE else budget, **(task or {}))
        return replace(base, variant=variant(method, budget), seed=seed, compression=asked)

    pairs = [(method, budget) for budget in budgets for method in tuple(METHODS)[len(FIRST) : methods]]
    pairs += [(method, budget) for budget in budgets[1:] for method in FIRST if method != DENSE]
    first, more = ([one(seed, m) for seed in those for m in FIRST] for those in (range(seeds), range(seeds, judged)))
    return (*first, *(one(seed, *pair) for seed in range(seeds) for pair in pairs), *more)


plan = planner("own", _runs)


def of_variant(records: Sequence[Record], name: str) -> dict[int, Record]:
    """Seed -> the record of that variant."""
    return {r.config["seed"]: r for r in records if r.config["variant"] == name}


def variants(records: Sequence[Record], budget: float = JUDGED) -> dict[str, str]:
    """Name of a variant with records -> what figures call it: ours first, the dense network last."""
    mine = [m for m in METHODS if m in OURS]
    order = [*mine, *(m for m in METHODS if m not in (*OURS, DENSE)), DENSE]
    return {variant(m, budget): METHODS[m] for m in order if of_variant(records, variant(m, budget))}


def changes(records: Sequence[Record], name: str, stage: str, key: str) -> dict[int, float]:
    """Seed -> loss or accuracy of a variant at a stage, less that of the dense network that was given."""
    given = {seed: r.result["stages"]["made"][key] for seed, r in of_variant(records, DENSE).items()}
    there = {seed: r.result["stages"][stage][key] for seed, r in of_variant(records, name).items()}
    return {seed: there[seed] - given[seed] for seed in sorted(set(there) & set(given))}


def mean_change(records: Sequence[Record], name: str, stage: str, key: str) -> Estimate:
    """The mean of :func:`changes`, with its interval over seeds."""
    return mean_estimate(list(changes(records, name, stage, key).values()))


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H4."""
    mine, svd = variant("selected"), variant("svd")
    n = len(set(changes(records, mine, "tuned", "loss")) & set(changes(records, svd, "tuned", "loss")))
    if n < SEEDS:
        return (untested("H4", profile, n, f"seeds with all three networks, and {SEEDS}"),)
    grown, grown_svd = (changes(records, name, "made", "loss") for name in (mine, svd))
    excess = mean_estimate([grown[seed] - PART * grown_svd[seed] for seed in sorted(set(grown) & set(grown_svd))])
    tuned = mean_change(records, mine, "tuned", "accuracy")
    holds = (excess.high < 0, -100 * tuned.low < POINTS)
    lost, lost_svd = (mean_change(records, name, "made", "loss").text(digits=3) for name in (mine, svd))
    dense = mean_change(records, DENSE, "tuned", "accuracy")
    texts = {
        "lost": lost, "svd": lost_svd, "gained": tuned.text(scale=100, signed=True), "support": tuned.support,
        "budget": JUDGED, "scale": SCALES[profile], "dense": 100 * dense.value,
    }  # fmt: skip
    return (verdict("H4", profile, label_of(all(holds), not any(holds)), texts, 100 * tuned.value),)


STUDY = Study.named("own", plan, judge, judged=JUDGED, part=PART, points=POINTS, seeds=SEEDS)
