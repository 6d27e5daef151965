"""Chapters 3 and 5: basis convolutions on all layers, and on the layers that a sensitivity analysis chooses.

One dense network is trained and its sensitivities are measured on held-out images; every plan comes from that
table. Each variant is trained from scratch by the dense recipe, with seeds that all variants share. At equal size
stand: the plan of least summed sensitivity, one ratio for all layers, the largest layers first, and a dense network
of narrower stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from basis.experiments.runs import Choice, Ladder, Record, Run
from basis.experiments.studies.study import Label, Study, Verdict, too_few
from basis.statistics import Estimate, paired_difference
from basis.training.loop import Recipe

MEASURE = "oneshot_bn"
CANDIDATES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
POINTS = 0.2
SEEDS, FEWER_SEEDS = 8, 4
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
SCALES: Mapping[str, str] = {
    "smoke": "a tiny ResNet-20 on synthetic images",
    "small": "ResNet-18 of width 16, 16 epochs",
    "paper": "ResNet-18, 26 epochs",
}

RULE = (
    "Accuracies are on the test images, without test-time augmentation. Differences are paired by seed; their 95 % "
    "intervals are Student's. "
    "C1 holds by construction: at one ratio for all layers and half of the parameters the network must have at most "
    "52 % of the dense one's. "
    "C3 is judged by what that network loses against the dense one: reproduced if the interval lies above 0; not "
    f"reproduced if it lies below {POINTS} points and reaches 0; else inconclusive. "
    "C4 is judged by the plan of least summed sensitivity at half of the parameters: reproduced if its loss against "
    f"the dense network is below {POINTS} points and its gain over one ratio for all layers above 0, with the whole "
    f"interval; not reproduced if the whole interval of the loss is above {POINTS} points or that of the gain below 0; "
    "else inconclusive. Both need 3 seeds or more, else they are not tested. What the plan gains over the largest "
    "layers first and over a narrower dense network is stated beside it, at equal parameters and at equal MACs."
)


def variant(what: str, budget: tuple[str, float]) -> str:
    """The name of a variant, such as ``selected, 1/2 of parameters``."""
    unit, share = budget
    return f"{what}, 1/{1 / share:.0f} of {UNITS[unit]}"


def plan(profile: str) -> tuple[Run, ...]:
    """The measured dense network; then round after round of seeds, so that any prefix compares all variants."""
    if profile == "paper":
        return _runs(_base(profile, validation=5000), multiple=8)
    if profile == "small":
        return _runs(_base(profile, width=16, validation=5000, recipe=Recipe(epochs=16)), multiple=1)
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _base(profile, model="resnet20", width=4, data="synthetic", validation=200, recipe=recipe)
        return _runs(base, multiple=1, images=100, seeds=2)
    return ()


def _base(profile: str, **settings: Any) -> Run:
    return Run(study="headline", profile=profile, variant="dense", seed=0, **settings)


def _runs(base: Run, *, multiple: int, images: int = 2000, seeds: int = SEEDS) -> tuple[Run, ...]:
    ladder = Ladder(measures={MEASURE: CANDIDATES}, multiple=multiple, images=images, calibration=images)
    # Its seed is not used again: what the table knows of one network's noise helps no variant.
    table = replace(base, variant="table", seed=100, test=False, ladder=ladder)

    def one(rule: str, budget: tuple[str, float], seed: int) -> Run:
        unit, share = budget
        # Layer after layer gets half the budget's ratio, so that about as many stay dense.
        fixed = max(r for r in CANDIDATES if r <= share / 2) if rule == "largest_first" else None
        choice = Choice(rule=rule, unit=unit, budget=share, table=table.id, measure=MEASURE, ratio=fixed)
        return replace(base, variant=variant(RULES[rule], budget), seed=seed, choice=choice)

    def narrower(budget: tuple[str, float], seed: int) -> Run:
        return replace(base, variant=variant(NARROWER, budget), seed=seed, width=STAGES[base.profile][budget])

    found = [table]
    for budget, rules, count in (
        (HALF, ("optimal", "uniform", "largest_first"), seeds),
        (QUARTER, ("optimal", "uniform", "largest_first"), seeds),
        (HALF_MACS, ("optimal", "uniform"), min(FEWER_SEEDS, seeds)),
    ):
        for seed in range(count):
            found += [replace(base, seed=seed)] if budget == HALF else []
            found += [one(rule, budget, seed) for rule in rules] + [narrower(budget, seed)]
    found += [one("threshold", HALF, seed) for seed in range(min(FEWER_SEEDS, seeds))]
    return tuple(found)


# -- from records to a comparison -----------------------------------------------------------------------


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row a tested run: variant, seed, accuracy and accuracy_flip (%), shares of the dense parameters and MACs.

    Also epochs, training seconds, the device and the curve of the validation accuracy.
    """
    tested = [r for r in records if r.result["test"] is not None]
    whole = next((r.result for r in records if r.config["variant"] in ("dense", "table")), None)
    rows = [
        {
            "variant": r.config["variant"], "seed": r.config["seed"],
            "accuracy": 100 * r.result["test"]["accuracy"], "accuracy_flip": 100 * r.result["test"]["accuracy_flip"],
            "parameters": r.result["parameters"] / whole["parameters"], "MACs": r.result["macs"] / whole["macs"],
            "seconds": r.result["train_seconds"], "device": r.environment["device"],
            "validation": [100 * row["validation_accuracy"] for row in r.result["curves"]],
        }
        for r in tested if whole is not None
    ]  # fmt: skip
    columns = ["variant", "seed", "accuracy", "accuracy_flip", "parameters", "MACs", "seconds", "device", "validation"]
    order = {run.variant: i for i, run in enumerate(plan("paper"))}
    found = pd.DataFrame(rows, columns=columns)
    return found.sort_values("variant", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def difference(runs: pd.DataFrame, first: str, second: str) -> Estimate:
    """Test accuracy of variant ``first`` minus ``second`` in percentage points, paired by seed, with its interval."""
    a, b = (runs[runs["variant"] == name].set_index("seed")["accuracy"] for name in (first, second))
    return paired_difference(a, b)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """Verdicts on C1, C3 and C4 by :data:`RULE`."""
    runs = frame(records)
    chosen, uniform = variant("selected", HALF), variant("uniform", HALF)
    n = {name: difference(runs, "dense", name).n for name in (chosen, uniform)}
    least, name = min(n.values()), SCALES.get(profile, profile)
    size = runs.loc[runs["variant"] == uniform, "parameters"]
    smaller = Verdict("C1", profile, "not tested", too_few(0))
    if len(size):
        fits: Label = "by construction" if size.iloc[0] <= 0.52 else "not reproduced"
        smaller = Verdict("C1", profile, fits, f"{name} keeps {size.iloc[0]:.1%} of its parameters")
    return (
        smaller,
        _costs(runs, uniform, name, profile) if n[uniform] >= 3 else _untested("C3", profile, n[uniform]),
        _keeps(runs, chosen, uniform, name, profile) if least >= 3 else _untested("C4", profile, least),
    )


def _untested(claim: str, profile: str, n: int) -> Verdict:
    return Verdict(claim, profile, "not tested", f"there are {n} seeds, and at least 3 are needed" if n else too_few(0))


def _costs(runs: pd.DataFrame, uniform: str, name: str, profile: str) -> Verdict:
    lost = difference(runs, "dense", uniform)
    label: Label = "inconclusive"
    if lost.low > 0:
        label = "reproduced"
    elif lost.high < POINTS:
        label = "not reproduced"
    finding = f"one ratio for all layers, at half of the parameters, costs {name} {lost.text()} points ({lost.support})"
    return Verdict("C3", profile, label, finding, f"{-lost.value:+.2f} points")


def _keeps(runs: pd.DataFrame, chosen: str, uniform: str, name: str, profile: str) -> Verdict:
    lost, gained = difference(runs, "dense", chosen), difference(runs, chosen, uniform)
    label: Label = "inconclusive"
    if lost.high < POINTS and gained.low > 0:
        label = "reproduced"
    elif lost.low > POINTS or gained.high < 0:
        label = "not reproduced"
    others = {"the largest layers first": "largest first", "a narrower dense network": NARROWER}
    beside = [
        f"{gain.text(signed=True)} over {words}"
        for words, short in others.items()
        if (gain := difference(runs, chosen, variant(short, HALF))).n
    ]
    finding = (
        f"the selected half of the parameters costs {name} {lost.text()} points ({lost.support}); it gains "
        + ", ".join([f"{gained.text(signed=True)} points over one ratio for all", *beside])
    )
    return Verdict("C4", profile, label, finding, f"{-lost.value:+.2f} points")


STUDY = Study(
    name="headline",
    title="Does a selection by sensitivity keep the accuracy?",
    chapter="05_choosing_layers",
    claims=("C1", "C3", "C4"),
    rule=RULE,
    published="small",
    plan=plan,
    judge=judge,
)
