"""Chapters 3 and 5: basis convolutions on all layers, and on the layers that a sensitivity analysis chooses.

Every plan comes from one trained network's table; each variant is trained from scratch, with shared seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from basis.experiments.runs import Choice, Ladder, Record, Run
from basis.experiments.studies.study import Study, Verdict, difference, label_of, training_cost, untested, verdict
from basis.search.table import SensitivityTable

MEASURE, CANDIDATES = "oneshot_bn", (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
POINTS, NEEDED, SEEDS = 0.2, 3, 8
FIRST_STAGE = ("conv1", "layer1.*")  # with the stem
RULES: Mapping[str, str] = {
    "optimal": "selected", "uniform": "uniform", "largest_first": "largest first", "threshold": "threshold"
}  # fmt: skip
NARROWER, UNIFORM_LATE = "narrower dense", "uniform, stem and first stage dense"
RIVALS: Mapping[str, str] = {"uniform": "uniform", "largest": "largest first", "narrower": NARROWER}
UNITS: Mapping[str, str] = {"params": "parameters", "macs": "MACs"}
HALF, QUARTER, HALF_MACS = ("params", 0.5), ("params", 0.25), ("macs", 0.5)
# Channels of each stage of a dense network with that share of the parameters or multiply-accumulates, to 0.7 %.
STAGES: Mapping[str, Mapping[tuple[str, float], tuple[int, ...]]] = {
    "small": {HALF: (11, 22, 46, 90), QUARTER: (8, 16, 32, 64), HALF_MACS: (11, 23, 46, 90)},
    "paper": {HALF: (48, 88, 184, 360), QUARTER: (32, 64, 128, 256), HALF_MACS: (48, 88, 176, 352)},
    "smoke": {HALF: (3, 6, 11), QUARTER: (2, 4, 8), HALF_MACS: (3, 6, 11)},
}


def variant(what: str, budget: tuple[str, float]) -> str:
    """The name of a variant, such as ``selected, 1/2 of parameters``."""
    unit, share = budget
    return f"{what}, 1/{1 / share:.0f} of {UNITS[unit]}"


def _runs(
    base: Run, *, multiple: int, images: int = 2000, seeds: int = SEEDS, quarter: int = 0, few: int = 0
) -> tuple[Run, ...]:  # fmt: skip
    """The measured dense network; then round after round of seeds, so that any prefix compares all variants.

    At half of the parameters there are ``seeds`` runs of each, at a quarter ``quarter``, of all others ``few``.
    """
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

    def late(seed: int) -> Run:
        run = one("uniform", HALF, seed)
        choice = run.choice and replace(run.choice, exclude=FIRST_STAGE)
        return replace(run, variant=variant(UNIFORM_LATE, HALF), choice=choice)

    rules = ("optimal", "uniform", "largest_first", NARROWER)
    found = [table]
    for seed in range(seeds):
        found += [replace(base, seed=seed), *(one(rule, HALF, seed) for rule in rules)]
    found += [one(rule, QUARTER, seed) for seed in range(quarter) for rule in rules]
    for seed in range(few):
        found += [*(one(rule, HALF_MACS, seed) for rule in rules), late(seed), one("threshold", HALF, seed)]
    return tuple(found)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """Verdicts on C1, C3 and C4."""
    runs, scale = STUDY.frame(records), STUDY.scale(profile)
    chosen, uniform = variant("selected", HALF), variant("uniform", HALF)
    size = runs.loc[runs["variant"] == uniform, "parameters"]
    lost, kept = (difference(runs, name, "dense") for name in (uniform, chosen))
    least = min(lost.n, kept.n)
    c1, c3 = untested("C1", profile, 0), untested("C3", profile, lost.n, NEEDED)
    c4 = untested("C4", profile, least, NEEDED)
    if len(size):
        small = "by construction" if size.iloc[0] <= 0.52 else "not reproduced"
        c1 = verdict("C1", profile, small, scale=scale, size=size.iloc[0])
    if lost.n >= NEEDED:
        thin = difference(runs, uniform, variant(NARROWER, HALF))
        c3 = verdict("C3", profile, label_of(lost.high < 0, lost.low > -POINTS), lost, scale=scale, narrower=thin)
    if least >= NEEDED:
        gains = {name: difference(runs, chosen, variant(rule, HALF)) for name, rule in RIVALS.items()}
        good = kept.low > -POINTS and gains["uniform"].low > 0
        label = label_of(good, kept.high < -POINTS or gains["uniform"].high < 0)
        work = macs(runs, chosen, variant(NARROWER, HALF))
        c4 = verdict("C4", profile, label, kept, scale=scale, macs=work, search=_search(records), **gains)
    return c1, c3, c4


def macs(runs: pd.DataFrame, ours: str, rival: str) -> str:
    """Their shares of the dense network's MACs, such as ``79% of the MACs against its 49%``."""
    shares = runs.groupby("variant")["MACs"].mean()
    return (
        f"{shares[ours]:.0%} of the MACs against its {shares[rival]:.0%}" if rival in shares else "its MACs not known"
    )


def _search(records: Sequence[Record]) -> str:
    """The passes that the search took, as a share of those of one training."""
    for record in (r for r in records if r.config["variant"] == "table" and r.result.get("tables")):
        cells = SensitivityTable.from_lines(record.result["tables"][MEASURE]).cells
        passes = sum(cell.forward + 2 * cell.backward for cell in cells)
        return f"{passes / training_cost(record.config):.0%}"
    return "an unknown share"


STUDY = Study.named("headline", _runs, judge, dict(variant="dense"), points=POINTS)
