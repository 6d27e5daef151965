"""Chapters 3 and 5: basis convolutions on all layers, and on the layers that a sensitivity analysis chooses.

Every plan comes from one trained network's table; each variant is trained from scratch, with shared seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from basis.experiments.runs import Choice, Ladder, Record, Run
from basis.experiments.studies.study import TEXTS, Study, Verdict, label_of, untested, verdict
from basis.statistics import Estimate, paired_difference

MEASURE, CANDIDATES = "oneshot_bn", (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
POINTS, NEEDED, SEEDS, FEWER_SEEDS = 0.2, 3, 8, 4
RULES: Mapping[str, str] = {
    "optimal": "selected", "uniform": "uniform", "largest_first": "largest first", "threshold": "threshold"
}  # fmt: skip
NARROWER = "narrower dense"
UNITS: Mapping[str, str] = {"params": "parameters", "macs": "MACs"}
HALF, QUARTER, HALF_MACS = ("params", 0.5), ("params", 0.25), ("macs", 0.5)
# Channels of each stage of a dense network with that share of the parameters or multiply-accumulates, to 0.7 %.
STAGES: Mapping[str, Mapping[tuple[str, float], tuple[int, ...]]] = {
    "small": {HALF: (11, 22, 46, 90), QUARTER: (8, 16, 32, 64), HALF_MACS: (11, 23, 46, 90)},
    "paper": {HALF: (48, 88, 184, 360), QUARTER: (32, 64, 128, 256), HALF_MACS: (48, 88, 176, 352)},
    "smoke": {HALF: (3, 6, 11), QUARTER: (2, 4, 8), HALF_MACS: (3, 6, 11)},
}
SCALES: Mapping[str, str] = dict(TEXTS["headline.scales"])


def variant(what: str, budget: tuple[str, float]) -> str:
    """The name of a variant, such as ``selected, 1/2 of parameters``."""
    unit, share = budget
    return f"{what}, 1/{1 / share:.0f} of {UNITS[unit]}"


def _runs(base: Run, *, multiple: int, images: int = 2000, seeds: int = SEEDS) -> tuple[Run, ...]:
    """The measured dense network; then round after round of seeds, so that any prefix compares all variants."""
    ladder = Ladder(measures={MEASURE: CANDIDATES}, multiple=multiple, images=images, calibration=images)
    # Its seed is not used again: what the table knows of one network's noise helps no variant.
    table = replace(base, variant="table", seed=100, test=False, ladder=ladder)

    def one(rule: str, budget: tuple[str, float], seed: int) -> Run:
        if rule == NARROWER:
            return replace(base, variant=variant(NARROWER, budget), seed=seed, width=STAGES[base.profile][budget])
        unit, share = budget
        # Layer after layer gets half the budget's ratio, so that about as many stay dense.
        fixed = max(r for r in CANDIDATES if r <= share / 2) if rule == "largest_first" else None
        choice = Choice(rule=rule, unit=unit, budget=share, table=table.id, measure=MEASURE, ratio=fixed)
        return replace(base, variant=variant(RULES[rule], budget), seed=seed, choice=choice)

    few, rules = min(FEWER_SEEDS, seeds), ("optimal", "uniform", "largest_first", NARROWER)
    found = [table]
    for seed in range(seeds):
        found += [replace(base, seed=seed), *(one(rule, HALF, seed) for rule in rules)]
    found += [one(rule, QUARTER, seed) for seed in range(seeds) for rule in rules]
    found += [one(rule, HALF_MACS, seed) for seed in range(few) for rule in rules if rule != "largest_first"]
    return (*found, *(one("threshold", HALF, seed) for seed in range(few)))


def frame(records: Sequence[Record], more: Mapping[str, Callable[[Record], Any]] | None = None) -> pd.DataFrame:
    """A row a tested run: variant, seed, accuracy and accuracy_flip (%), shares of the dense parameters and MACs.

    Also the training's seconds, the device and the curve of the validation accuracy; and ``more`` columns.
    """
    whole = next((r.result for r in records if r.config["variant"] in ("dense", "table")), {})
    order = {run.variant: i for i, run in enumerate(STUDY.runs("paper"))}
    tested = [r for r in records if whole and r.result["test"]]
    tested.sort(key=lambda r: order.get(r.config["variant"], len(order)))
    columns: dict[str, Callable[[Record], Any]] = {
        "variant": lambda r: r.config["variant"],
        "seed": lambda r: r.config["seed"],
        "accuracy": lambda r: 100 * r.result["test"]["accuracy"],
        "accuracy_flip": lambda r: 100 * r.result["test"]["accuracy_flip"],
        "parameters": lambda r: r.result["parameters"] / whole["parameters"],
        "MACs": lambda r: r.result["macs"] / whole["macs"],
        "seconds": lambda r: r.result["train_seconds"],
        "device": lambda r: r.environment["device"],
        "validation": lambda r: [100 * row["validation_accuracy"] for row in r.result["curves"]],
    }
    columns |= more or {}
    kind = None if tested else object  # an empty column of texts is one, too
    return pd.DataFrame({name: [of(r) for r in tested] for name, of in columns.items()}, dtype=kind)


def difference(runs: pd.DataFrame, first: str, second: str) -> Estimate:
    """Test accuracy of variant ``first`` minus ``second`` in percentage points, paired by seed, with its interval."""
    a, b = (runs[runs["variant"] == name].set_index("seed")["accuracy"] for name in (first, second))
    return paired_difference(a, b)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """Verdicts on C1, C3 and C4."""
    runs, scale = frame(records), SCALES.get(profile, profile)
    chosen, uniform = variant("selected", HALF), variant("uniform", HALF)
    size = runs.loc[runs["variant"] == uniform, "parameters"]
    lost, kept = (difference(runs, "dense", name) for name in (uniform, chosen))
    least, needed = min(lost.n, kept.n), f"seeds, and at least {NEEDED}"
    c1, c3 = untested("C1", profile, 0), untested("C3", profile, lost.n, needed)
    c4 = untested("C4", profile, least, needed)
    if len(size):
        small = "by construction" if size.iloc[0] <= 0.52 else "not reproduced"
        c1 = verdict("C1", profile, small, scale=scale, size=size.iloc[0])
    if lost.n >= NEEDED:
        label = label_of(lost.low > 0, lost.high < POINTS, "inconclusive")
        c3 = verdict("C3", profile, label, -lost.value, scale=scale, lost=lost.text(), support=lost.support)
    if least >= NEEDED:
        gained = difference(runs, chosen, uniform)
        label = label_of(kept.high < POINTS and gained.low > 0, kept.low > POINTS or gained.high < 0, "inconclusive")
        texts = {"lost": kept.text(), "support": kept.support, "gained": gained.text(signed=True)}
        c4 = verdict("C4", profile, label, -kept.value, scale=scale, **texts)
        for words, short in {"the largest layers first": "largest first", "a narrower dense network": NARROWER}.items():
            if (gain := difference(runs, chosen, variant(short, HALF))).n:
                c4 = replace(c4, finding=f"{c4.finding}, {gain.text(signed=True)} over {words}")
    return c1, c3, c4


STUDY = Study.named("headline", _runs, judge, dict(variant="dense"), points=POINTS)
