"""Chapter 6: can the coefficient matrix be made smaller?

Every form of :mod:`basis.layers.coefficients` on every convolution, trained from scratch by one recipe: with the same
basis filters as a dense A, and with as many more as make the network as large as with a dense A. Beside
them, with a dense A, the recipe terms that treat the factors otherwise than plain weight decay does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from basis.costs import count_parameters
from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import find_training_bench
from basis.experiments.studies.study import SCALES, Label, Study, Verdict, accuracies, matched, spread, too_few
from basis.layers.coefficients import Form
from basis.models import build
from basis.statistics import Estimate, difference_estimate
from basis.substitution import Plan, substitute
from basis.training.loop import Recipe

DENSE = "dense"  # the form that the others are compared with
RATIOS = {"r=1/2": 0.5, "r=1/4": 0.25}
NAMES: Mapping[str, str] = {
    "dense": "dense A",
    "low_rank": "low-rank A",
    "grouped": "grouped A",
    "sparse": "sparse A",
    "shared": "shared A",
    "frozen": "frozen A",
    "repeat": "no A",
}
TERMS: Mapping[str, Mapping[str, Any]] = {
    "decay of the product": {"decay": "product"},
    "scaled decay": {"decay": "scaled"},
    "decorrelation": {"decorrelation": 0.01},
}
JUDGED, TERMS_AT = "r=1/2", "r=1/4"
SAVED, POINTS = 0.05, 0.2

RULE = (
    f"C5 is judged at {JUDGED} on every convolution, with equal numbers of basis filters. Of each form whose network "
    f"has at least {SAVED:.0%} fewer parameters or forward MACs than with a dense coefficient matrix, the drop is the "
    "difference in test accuracy (without test-time augmentation) from dense A to it, with Welch's intervals that hold "
    f"for all of these forms together with 95 % (Bonferroni). Reproduced if some form's interval lies below {POINTS} "
    "percentage points; not reproduced if every form's interval lies above 0; else partly. It needs at least 2 runs "
    "per variant, else it is not tested."
)


def variant(kind: str, ratio: str, *, matched: bool = False) -> str:
    """The name of a variant, such as ``low-rank A, r=1/2`` or ``no A, size of r=1/4``."""
    return f"{NAMES[kind]}, {'size of ' * matched}{ratio}"


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: all forms at the judged ratio, then the other ratio and terms, then equal sizes."""
    if profile == "paper":
        base = _run(profile, validation=5000)
        return _runs(base, divisor=8, seeds=range(3), judged=range(8), matched=tuple(RATIOS))
    if profile == "colab":
        base = _run(profile, width=16, validation=5000, recipe=Recipe(epochs=4))
        return _runs(base, divisor=4, seeds=range(2), judged=range(2), ratios=(JUDGED,))
    if profile == "cpu":
        recipe = Recipe(epochs=6, batch_size=125, lr=0.1, precision="bf16")
        base = _run(profile, width=16, mode="factorized", images=8500, validation=500, recipe=recipe)
        return _runs(base, divisor=4, seeds=range(2), judged=range(3), matched=("r=1/4",))
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, model="resnet20", width=4, data="synthetic", recipe=recipe)
        return _runs(base, divisor=2, seeds=range(2), judged=range(2), ratios=(JUDGED,), terms=(), matched=())
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="coefficients", profile=profile, variant="dense", seed=0, **settings)


def _runs(
    base: Run, *, divisor: int, seeds: range, judged: range, ratios: Sequence[str] = tuple(RATIOS),
    terms: Sequence[str] = tuple(TERMS), matched: Sequence[str] = (),
) -> tuple[Run, ...]:  # fmt: skip
    """``divisor`` is the number of groups, and of what low rank and the sparse rows keep of k."""
    sizes = {"low_rank": f":1/{divisor}", "grouped": f":{divisor}", "sparse": f":1/{divisor}"}
    forms = {kind: kind + sizes.get(kind, "") for kind in NAMES}

    def alike(ratio: str, seed: int) -> list[Run]:
        return [
            replace(base, variant=variant(kind, ratio), seed=seed, ratio=RATIOS[ratio], coefficients=form)
            for kind, form in forms.items()
        ]

    def equal(ratio: str, seed: int) -> list[Run]:
        found = []
        for kind, form in forms.items():
            if kind != DENSE:
                layers = matched_plan(base.model, base.width, RATIOS[ratio], form)
                found.append(
                    replace(base, variant=variant(kind, ratio, matched=True), seed=seed, plan=layers, coefficients=form)
                )
        return found

    def term(name: str, seed: int) -> Run:
        recipe = replace(base.recipe, **TERMS[name])
        fixed: dict[str, Any] = {"ratio": RATIOS[TERMS_AT], "coefficients": DENSE, "recipe": recipe}
        return replace(base, variant=f"{name}, {TERMS_AT}", seed=seed, **fixed)

    listed: list[Run] = []
    for seed in seeds:
        listed += [replace(base, seed=seed), *alike(JUDGED, seed)]
        listed += [run for ratio in ratios if ratio != JUDGED for run in alike(ratio, seed)]
        listed += [term(name, seed) for name in terms]
    for seed in judged:
        listed += alike(JUDGED, seed) if seed not in seeds else []
    return tuple(listed + [run for seed in seeds for ratio in matched for run in equal(ratio, seed)])


@lru_cache
def matched_plan(model: str, width: int | None, ratio: float, form: str) -> Mapping[str, int]:
    """Basis channels with which a network of this form is just no larger than with dense A at ``ratio``.

    One ratio for all layers, in steps of 1/256; for grouped A, whose k goes in multiples of the groups, single
    layers take one multiple more, the last ones first, as far as they fit. ``model`` and ``width`` name the
    network as :func:`basis.models.build` does.
    """
    with torch.device("meta"):
        network = build(model, width=width)
    of = Form.parse(form)
    multiple = int(of.size or 1) if of.kind == "grouped" else 1

    def layers(step: int) -> Mapping[str, Any]:
        return Plan.uniform(network, ratio=ratio + step / 256, coefficients=form, multiple=multiple).layers

    def size(layers: Mapping[str, int], form: str) -> int:
        return count_parameters(substitute(network, layers, init="random", coefficients=form))

    target = size(layers(0), DENSE)
    low, high = 0, 32
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(layers(middle), form) <= target else (low, middle - 1)
    found = dict(layers(low))
    for name in reversed(found) if multiple > 1 else ():
        larger = {**found, name: found[name] + multiple}
        found = larger if size(larger, form) <= target else found
    return found


# -- from records to a comparison -----------------------------------------------------------------------


def of_variant(records: Sequence[Record], name: str, key: str) -> float:
    """``parameters`` or ``macs`` (forward, per image) of a variant's network."""
    return next(float(r.result[key]) for r in records if r.config["variant"] == name)


def saved(records: Sequence[Record], kind: str, ratio: str, key: str) -> float:
    """The fraction of the parameters or MACs with dense A that a form saves at equal k."""
    return 1 - of_variant(records, variant(kind, ratio), key) / of_variant(records, variant(DENSE, ratio), key)


def drop(records: Sequence[Record], name: str, ratio: str, *, comparisons: int = 1) -> Estimate:
    """Dense A at ``ratio`` minus the variant ``name`` in test accuracy (a fraction), with Welch's interval."""
    return difference_estimate(*matched(records, (variant(DENSE, ratio), name)), comparisons=comparisons)


def pooled_drop(records: Sequence[Record], name: str, ratio: str, *, comparisons: int = 1) -> Estimate:
    """:func:`drop` with the interval that the pooled spread gives."""
    return spread(records).difference(*matched(records, (variant(DENSE, ratio), name)), comparisons=comparisons)


class StepTime(NamedTuple):
    """Median milliseconds of a training step, and its time relative to dense A at the same ratio."""

    ms: float
    relative: float


def step_times(profile: str) -> dict[tuple[str, str], StepTime]:
    """Measured time of a training step, by form (a key of :data:`NAMES`) and ratio.

    From the stored benchmark of this profile's network on its kind of device; empty where there is none.
    """
    runs = [run for run in plan(profile) if run.coefficients is not None]
    forms = {run.coefficients: Form.parse(run.coefficients).kind for run in runs if run.coefficients is not None}
    report = find_training_bench(profile, runs[0], coefficients=tuple(forms))
    rows = report.rows if report else ()
    names = {value: name for name, value in RATIOS.items()}
    wanted = {"mode": "factorized", "trained": "both"}
    found = {
        (str(forms[row["coefficients"]]), names[row["ratio"]]): row
        for row in rows
        if row["coefficients"] in forms and row["ratio"] in names and all(row[k] == v for k, v in wanted.items())
    }
    return {
        (kind, ratio): StepTime(row["ms"], found[DENSE, ratio]["speedup"] / row["speedup"])
        for (kind, ratio), row in found.items()
    }


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C5 by :data:`RULE`."""
    n = min(len(accuracies(records, variant(kind, JUDGED))) for kind in NAMES)
    if n < 2:
        finding = too_few(n)
        return (Verdict("C5", profile, "not tested", finding),)
    smaller = [
        kind for kind in NAMES if max(saved(records, kind, JUDGED, key) for key in ("parameters", "macs")) >= SAVED
    ]
    if not smaller:
        return (Verdict("C5", profile, "not tested", f"no form saves {SAVED:.0%} of the network at {JUDGED}"),)
    drops = {kind: drop(records, variant(kind, JUDGED), JUDGED, comparisons=len(smaller)) for kind in smaller}
    best = min(drops, key=lambda kind: drops[kind].high)
    label: Label = "not reproduced" if all(d.low > 0 for d in drops.values()) else "partly"
    if 100 * drops[best].high < POINTS:
        label = "reproduced"
    finding = (
        f"at {JUDGED} in {SCALES[profile]} {NAMES[best]} saves {saved(records, best, JUDGED, 'parameters'):.1%} of the "
        f"trained parameters and {saved(records, best, JUDGED, 'macs'):.1%} of the MACs and loses "
        f"{drops[best].text(scale=100)} percentage points of test accuracy against dense A "
        f"(n = {drops[best].n} per variant; of {len(smaller)} forms that save enough to be judged: "
        f"{', '.join(NAMES[kind] for kind in smaller)}; the intervals hold together with 95 %)"
    )
    return (Verdict("C5", profile, label, finding, f"{-100 * drops[best].value:+.2f} points"),)


STUDY = Study(
    name="coefficients",
    title="Can the coefficient matrix be made smaller?",
    chapter="06_smaller_coefficients",
    claims=("C5",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
