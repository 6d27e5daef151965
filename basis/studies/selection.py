"""Chapter 5: does a selection by sensitivity keep the accuracy under a budget?

One dense network is trained and its sensitivities are measured on held-out images. Plans are selected from
that table by several rules at several budgets, and every plan is trained from scratch by the dense recipe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.runs import Choice, Ladder, Record, Run
from basis.statistics import Estimate, difference_estimate
from basis.studies.study import SCALES, Label, Study, Verdict, too_few
from basis.table import SensitivityTable
from basis.training import Recipe

MEASURE = "oneshot_bn"
CANDIDATES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8, 1 / 16)
BUDGETS = (0.75, 0.5, 0.35, 0.25)
DRAWS = 3
RULES: Mapping[str, str] = {
    "optimal": "selected",
    "uniform": "uniform",
    "random": "random",
    "largest_first": "largest first",
    "reverse": "reverse",
}
JUDGED_UNIT, JUDGED_BUDGET, POINTS = "params", 0.5, 0.2

RULE = (
    f"C4 is judged at {JUDGED_BUDGET:.0%} of the parameters. The plan is the one of least summed sensitivity "
    f"({MEASURE} on held-out images of one dense network) under that budget, trained from scratch by the dense recipe. "
    "Its drop is the difference in test accuracy (without test-time augmentation) to the dense network, with Welch's "
    f"95 % interval. Reproduced if the interval lies below {POINTS} percentage points; partly if it does not, but the "
    "plan is better than the uniform ratio at the same budget, the interval of that difference lying above 0; else not "
    "reproduced. It needs at least 2 runs per arm, else it is not tested."
)


def arm(rule: str, unit: str, budget: float, draw: int | None = None) -> str:
    """The name of an arm, such as ``selected, 50 % of params`` or ``random 2, 25 % of macs``."""
    number = "" if draw is None else f" {draw + 1}"
    return f"{RULES[rule]}{number}, {budget:.0%} of {unit}".replace("%", " %")


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: the measured dense network, the judged comparison, then the other budgets and units."""
    if profile == "paper":
        base = _run(profile, validation=5000)
        return _runs(base, multiple=8, dense=8, judged=8, seeds=3, baselines=BUDGETS, units=("params", "macs"))
    if profile == "colab":
        base = _run(profile, width=16, validation=5000, recipe=Recipe(epochs=4))
        return _runs(base, multiple=1, dense=3, judged=3, seeds=2, baselines=(0.5,), units=("params",))
    if profile == "cpu":
        recipe = Recipe(epochs=4, batch_size=125, lr=0.1)
        base = _run(profile, width=8, mode="factorized", images=20000, validation=4000, recipe=recipe)
        return _runs(base, multiple=1, dense=8, judged=4, seeds=2, baselines=(0.5, 0.25), units=("params", "macs"))
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, model="resnet20", width=4, data="synthetic", validation=200, recipe=recipe)
        return _runs(
            base, multiple=1, dense=2, judged=2, seeds=2, baselines=(), units=("params",), budgets=(0.5,), images=100
        )
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="selection", profile=profile, arm="dense", seed=0, **settings)


def _runs(
    base: Run, *, multiple: int, dense: int, judged: int, seeds: int, baselines: Sequence[float],
    units: Sequence[str], budgets: Sequence[float] = BUDGETS, images: int = 2000,
) -> tuple[Run, ...]:  # fmt: skip
    ladder = Ladder(
        measures={MEASURE: CANDIDATES}, multiple=multiple, images=images, calibration=images,
        joint={unit: tuple(budgets) for unit in units},
    )  # fmt: skip
    # Its seed is not used again: what the table knows of one network's noise helps no arm.
    table = replace(base, arm="table", seed=100, test=False, ladder=ladder)

    def runs(rules: Sequence[str], unit: str, budget: float, those: range) -> list[Run]:
        found = []
        for seed in those:
            for rule in rules:
                # Rules that take layer after layer give each half the budget's ratio, so that some stay dense.
                fixed = None if rule in ("optimal", "uniform") else max(r for r in CANDIDATES if r <= budget / 2)
                for draw in range(DRAWS) if rule == "random" else (None,):
                    choice = Choice(
                        rule=rule, unit=unit, budget=budget, table=table.id, measure=MEASURE, ratio=fixed, draw=draw
                    )
                    name = arm(rule, unit, budget, draw)
                    found.append(replace(base, arm=name, seed=seed, choice=choice))
        return found

    listed = [table, *(replace(base, seed=seed) for seed in range(dense))]
    two, others = ("optimal", "uniform"), tuple(rule for rule in RULES if rule not in ("optimal", "uniform"))
    listed += runs(two, JUDGED_UNIT, JUDGED_BUDGET, range(judged))
    for unit in units:
        order = sorted(budgets, key=lambda b: (b not in baselines, abs(b - JUDGED_BUDGET)))
        for budget in order:
            if (unit, budget) != (JUDGED_UNIT, JUDGED_BUDGET):
                listed += runs(two, unit, budget, range(seeds))
            if budget in baselines and (unit == JUDGED_UNIT or base.profile == "paper"):
                listed += runs(others, unit, budget, range(seeds))
    return tuple(listed)


# -- from records to a comparison -----------------------------------------------------------------------


def of_arm(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one arm; "random, ..." without a number is all draws together."""
    rule, _, rest = name.partition(", ")
    names = {f"random {draw + 1}, {rest}" for draw in range(DRAWS)} if rule == "random" else {name}
    return [r for r in records if r.config["arm"] in names]


def arms(records: Sequence[Record]) -> list[str]:
    """The arms that were tested, dense first, the draws of a random choice as one."""
    names = [r.config["arm"] for r in records if r.config["arm"] != "table"]
    joined = dict.fromkeys(re.sub(r"^random \d+", "random", name) for name in names)
    return sorted(joined, key=lambda name: (name != "dense", name.partition(" of ")[2], -_budget(name), name))


def _budget(name: str) -> float:
    found = re.search(r"(\d+) %", name)
    return float(found[1]) if found else 100.0


def table_of(record: Record) -> SensitivityTable:
    """The table that the plans were selected from."""
    return SensitivityTable.from_lines(record.result["tables"][MEASURE])


def accuracies(records: Sequence[Record], name: str) -> list[float]:
    """Test accuracies (fractions, no test-time augmentation) of an arm's runs."""
    return [r.result["test"]["accuracy"] for r in of_arm(records, name)]


def difference(records: Sequence[Record], first: str, second: str) -> Estimate:
    """Test accuracy of ``first`` minus ``second`` (a fraction), with Welch's 95 % interval."""
    return difference_estimate(accuracies(records, first), accuracies(records, second))


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C4 by :data:`RULE`."""
    chosen, uniform = (arm(rule, JUDGED_UNIT, JUDGED_BUDGET) for rule in ("optimal", "uniform"))
    n = min(len(accuracies(records, name)) for name in ("dense", chosen, uniform))
    if n < 2:
        finding = too_few(n)
        return (Verdict("C4", profile, "not tested", finding),)
    lost, gained = difference(records, "dense", chosen), difference(records, chosen, uniform)
    label: Label = "partly" if gained.low > 0 else "not reproduced"
    if 100 * lost.high < POINTS:
        label = "reproduced"
    finding = (
        f"with half of the parameters selected by sensitivity {SCALES[profile]} loses {lost.text(scale=100)} "
        f"percentage points of test accuracy against dense ({lost.support} per arm), and is "
        f"{gained.text(scale=100, signed=True)} "
        "points better than at one ratio for all layers"
    )
    return (Verdict("C4", profile, label, finding),)


STUDY = Study(
    name="selection",
    title="How to choose layers under a budget?",
    chapter="05_choosing_layers",
    claims=("C4",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
