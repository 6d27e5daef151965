"""Chapter 11: how much smaller does a trained network get, and what does that cost?

One dense network is trained for each seed, and made smaller to one number of parameters by several methods. Each is
tested as it is, after batch normalisation is recalibrated, and after one epoch of fine-tuning, all on the same images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.experiments.comparison import Compression
from basis.experiments.runs import Record, Run
from basis.experiments.studies.study import SCALES, TEXTS, Study, Verdict, label_of, untested, verdict
from basis.statistics import Estimate, mean_estimate, paired_difference

# Method of basis.experiments.comparison -> what figures call it; the first three are needed for the verdict.
METHODS: Mapping[str, str] = dict(TEXTS["own.methods"])
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


def of_variant(records: Sequence[Record], name: str) -> dict[int, Record]:
    """Seed -> the record of that variant."""
    return {r.config["seed"]: r for r in records if r.config["variant"] == name}


def variants(records: Sequence[Record]) -> dict[str, str]:
    """Name of a variant with records -> what figures call it: ours first, the dense network last."""
    order = sorted(METHODS, key=lambda m: (m == DENSE, m not in OURS))
    return {variant(m): METHODS[m] for m in order if of_variant(records, variant(m))}


def changes(records: Sequence[Record], name: str, stage: str, key: str) -> dict[int, float]:
    """Seed -> loss or accuracy of a variant at a stage, less that of the dense network that was given."""
    given, there = of_variant(records, DENSE), of_variant(records, name)
    values = {seed: there[seed].result["stages"][stage][key] for seed in sorted(set(there) & set(given))}
    return {seed: value - given[seed].result["stages"]["made"][key] for seed, value in values.items()}


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
    excess = paired_difference(grown, {seed: PART * x for seed, x in grown_svd.items()})
    tuned = mean_change(records, mine, "tuned", "accuracy")
    holds = (excess.high < 0, -100 * tuned.low < POINTS)
    lost, lost_svd = (mean_change(records, name, "made", "loss").text(digits=3) for name in (mine, svd))
    return (verdict(
        "H4", profile, label_of(all(holds), not any(holds)), 100 * tuned.value, lost=lost, svd=lost_svd, budget=JUDGED,
        gained=tuned.text(scale=100, signed=True), support=tuned.support, scale=SCALES[profile],
        dense=100 * mean_change(records, DENSE, "tuned", "accuracy").value,
    ),)  # fmt: skip


STUDY = Study.named("own", _runs, judge, judged=JUDGED, part=PART, points=POINTS, seeds=SEEDS)
