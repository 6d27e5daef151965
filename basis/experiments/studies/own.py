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
from basis.experiments.studies.study import SCALES, Label, Study, Verdict, too_few
from basis.statistics import Estimate, mean_estimate
from basis.training.loop import Recipe

# Method of basis.comparison -> what figures call it, the most telling first.
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
FIRST = 3  # of them are needed for the verdict
DENSE = "dense"
OURS = ("selected", "selected by both", "uniform", "uniform, fitted to weights")
STAGES: Mapping[str, str] = {
    "made": "before repair",
    "recalibrated": "batch normalisation recalibrated",
    "tuned": "after one epoch",
}
JUDGED, PART, POINTS, SEEDS = 0.5, 0.5, 0.3, 3

RULE = (
    "The smaller networks of one seed are made of the same trained dense network, so every difference is taken within "
    f"a seed, and intervals are Student's 95 % over seeds. H4 is judged at {JUDGED:.0%} of the dense network's "
    "parameters, on the test images, without test-time augmentation. (a) Before any repair: the growth of the loss of "
    f"the selected plan less {PART:g} of the growth of uniform truncated SVD's has an interval below 0. (b) After "
    "recalibration and one epoch of fine-tuning: the accuracy that the selected plan loses against the dense network "
    f"that it was made of has an interval below {POINTS} percentage points. Reproduced if both hold; partly if one "
    f"does; else not reproduced. It needs at least {SEEDS} seeds, else it is not tested."
)


def variant(method: str, budget: float = JUDGED) -> str:
    """The name of a variant, such as ``selected at 50 %``."""
    return f"{method} at {100 * budget:g} %"


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: those that are judged, then all others of a seed and those of the next one."""
    if profile == "paper":
        task = Compression(method="dense", budget=1, held=2000, multiple=8)
        return _runs(_run(profile, validation=5000), task, seeds=8, budgets=(JUDGED, 0.25))
    if profile == "colab":
        base = _run(profile, width=16, validation=5000, recipe=Recipe(epochs=8))
        return _runs(base, Compression(method="dense", budget=1), seeds=3)
    if profile == "cpu":
        recipe = Recipe(epochs=6, batch_size=125, lr=0.1)
        base = _run(profile, width=16, images=6000, validation=2000, recipe=recipe)
        return _runs(base, Compression(method="dense", budget=1), seeds=3, judged=5, methods=tuple(METHODS)[:-1])
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, model="resnet20", width=8, data="synthetic", validation=200, recipe=recipe)
        task = Compression(method="dense", budget=1, calibration=200, held=100, batch_size=100)
        return _runs(base, task, seeds=3, methods=tuple(METHODS)[:FIRST])
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="own", profile=profile, variant="", seed=0, **settings)


def _runs(
    base: Run, task: Compression, *, seeds: int, judged: int | None = None, methods: Sequence[str] = tuple(METHODS),
    budgets: Sequence[float] = (JUDGED,),
) -> tuple[Run, ...]:  # fmt: skip
    """``judged`` seeds of what the verdict needs (as many as of the others, unless given)."""

    def one(method: str, seed: int, budget: float) -> Run:
        asked = replace(task, method=method, budget=1.0 if method == DENSE else budget)
        return replace(
            base, variant=DENSE if method == DENSE else variant(method, budget), seed=seed, compression=asked
        )

    first, others = methods[:FIRST], methods[FIRST:]
    pairs = [(method, budget) for budget in budgets for method in others]
    pairs += [(method, budget) for budget in budgets[1:] for method in first if method != DENSE]

    def needed(those: range) -> list[Run]:
        return [one(method, seed, budgets[0]) for seed in those for method in first]

    compared = [one(method, seed, budget) for seed in range(seeds) for method, budget in pairs]
    return (*needed(range(seeds)), *compared, *needed(range(seeds, judged or seeds)))


# -- from records to a comparison -----------------------------------------------------------------------


def of_variant(records: Sequence[Record], name: str) -> dict[int, Record]:
    """Seed -> the record of that variant."""
    return {r.config["seed"]: r for r in records if r.config["variant"] == name}


def variants(records: Sequence[Record], budget: float = JUDGED) -> dict[str, str]:
    """Name of a variant with records -> what figures call it: ours first, the dense network last."""
    names = {DENSE if m == DENSE else variant(m, budget): title for m, title in METHODS.items()}
    mine = {variant(m, budget) for m in OURS}
    there = {name: title for name, title in names.items() if of_variant(records, name)}
    return dict(sorted(there.items(), key=lambda one: (one[0] == DENSE, one[0] not in mine)))


def changes(records: Sequence[Record], name: str, stage: str, key: str) -> dict[int, float]:
    """Seed -> loss or accuracy of a variant at a stage, less that of the dense network that was given.

    Of the seeds whose dense network was tested.
    """
    given = {seed: r.result["stages"]["made"][key] for seed, r in of_variant(records, DENSE).items()}
    there = {seed: r.result["stages"][stage][key] for seed, r in of_variant(records, name).items()}
    return {seed: there[seed] - given[seed] for seed in sorted(set(there) & set(given))}


def mean_change(records: Sequence[Record], name: str, stage: str, key: str) -> Estimate:
    """The mean of :func:`changes`, with its interval over seeds."""
    return mean_estimate(list(changes(records, name, stage, key).values()))


def excess(records: Sequence[Record], name: str, other: str, part: float = PART) -> Estimate:
    """Growth of the loss of ``name`` before repair, less ``part`` of that of ``other``, over the seeds of both."""
    mine, theirs = (changes(records, one, "made", "loss") for one in (name, other))
    return mean_estimate([mine[seed] - part * theirs[seed] for seed in sorted(set(mine) & set(theirs))])


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H4 by :data:`RULE`."""
    mine, svd = variant("selected"), variant("svd")
    n = len(set(changes(records, mine, "tuned", "loss")) & set(changes(records, svd, "tuned", "loss")))
    if n < SEEDS:
        reason = f"there are {n} seeds with all three networks, and {SEEDS} are needed" if n else too_few(0)
        return (Verdict("H4", profile, "not tested", reason),)
    grown = [mean_change(records, name, "made", "loss") for name in (mine, svd)]
    tuned = mean_change(records, mine, "tuned", "accuracy")
    held = (excess(records, mine, svd).high < 0, -100 * tuned.low < POINTS)
    label: Label = "reproduced" if all(held) else "partly" if any(held) else "not reproduced"
    more = mean_change(records, DENSE, "tuned", "accuracy")
    mine_lost, svd_lost = (one.text(digits=3) for one in grown)
    finding = (
        f"at {JUDGED:.0%} of the parameters {SCALES[profile]} loses {mine_lost} in loss before any repair by the "
        f"selected plan, and {svd_lost} by uniform truncated SVD; after one epoch of fine-tuning its accuracy is "
        f"{tuned.text(scale=100, signed=True)} points from the given network's ({tuned.support}), which itself changes "
        f"by {100 * more.value:+.2f} points in that epoch"
    )
    return (Verdict("H4", profile, label, finding, f"{100 * tuned.value:+.2f} points"),)


STUDY = Study(
    name="own",
    title="How small does your own network get, and what does it cost?",
    chapter="11_your_own_network",
    claims=("H4",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
