"""Chapter 6: can the coefficient matrix be made smaller?

Every form of :mod:`basis.layers.coefficients` on every convolution, trained from scratch by one recipe: with the same
basis filters as a dense A, and with as many more as make the network as large. Beside them, with a dense A, the
recipe terms that treat the factors otherwise than plain weight decay does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from basis.costs import count_parameters
from basis.experiments.runs import Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.cost import find_training_bench
from basis.experiments.studies.study import SCALES, Study, Verdict, accuracies, matched
from basis.experiments.studies.study import spread as spread
from basis.layers.coefficients import Form
from basis.models import build
from basis.statistics import Estimate, difference_estimate
from basis.substitution import Plan, substitute

DENSE = "dense"  # the form that the others are compared with
RATIOS = {"r=1/2": 0.5, "r=1/4": 0.25}
NAMES: Mapping[str, str] = {
    "dense": "dense A", "low_rank": "low-rank A", "grouped": "grouped A", "sparse": "sparse A", "shared": "shared A",
    "frozen": "frozen A", "repeat": "no A",
}  # fmt: skip
TERMS: Mapping[str, Mapping[str, Any]] = {
    "decay of the product": {"decay": "product"},
    "scaled decay": {"decay": "scaled"},
    "decorrelation": {"decorrelation": 0.01},
}
JUDGED, TERMS_AT = "r=1/2", "r=1/4"
SAVED, POINTS = 0.05, 0.2


def variant(kind: str, ratio: str, *, matched: bool = False) -> str:
    """The name of a variant, such as ``low-rank A, r=1/2`` or ``no A, size of r=1/4``."""
    return f"{NAMES[kind]}, {'size of ' * matched}{ratio}"


def _runs(
    base: Run, *, divisor: int, seeds: int, judged: int = 0, ratios: Sequence[str] = ("r=1/4",),
    terms: Sequence[str] = tuple(TERMS), sizes: Sequence[str] = (),
) -> tuple[Run, ...]:  # fmt: skip
    """All forms at the judged ratio (``judged`` seeds of them), other ratios and terms, then equal ``sizes``.

    ``divisor`` is the number of groups, and of what low rank and the sparse rows keep of k.
    """
    suffix = {"low_rank": f":1/{divisor}", "grouped": f":{divisor}", "sparse": f":1/{divisor}"}
    forms = {kind: kind + suffix.get(kind, "") for kind in NAMES}

    def alike(ratio: str, seed: int) -> list[Run]:
        of_ratio = replace(base, seed=seed, ratio=RATIOS[ratio])
        return [replace(of_ratio, variant=variant(kind, ratio), coefficients=form) for kind, form in forms.items()]

    def equal(ratio: str, seed: int, kind: str) -> Run:
        layers = matched_plan(base.model, base.width, RATIOS[ratio], forms[kind])
        name = variant(kind, ratio, matched=True)
        return replace(base, variant=name, seed=seed, plan=layers, coefficients=forms[kind])

    def term(name: str, seed: int) -> Run:
        recipe = replace(base.recipe, **TERMS[name])
        fixed: dict[str, Any] = {"ratio": RATIOS[TERMS_AT], "coefficients": DENSE, "recipe": recipe}
        return replace(base, variant=f"{name}, {TERMS_AT}", seed=seed, **fixed)

    listed: list[Run] = []
    for seed in range(seeds):
        listed += [replace(base, seed=seed), *(run for ratio in (JUDGED, *ratios) for run in alike(ratio, seed))]
        listed += [term(name, seed) for name in terms]
    listed += [run for seed in range(seeds, judged) for run in alike(JUDGED, seed)]
    others = [kind for kind in forms if kind != DENSE]
    return (*listed, *(equal(ratio, seed, kind) for seed in range(seeds) for ratio in sizes for kind in others))


plan = study.planner("coefficients", _runs, variant=DENSE)


@lru_cache
def matched_plan(model: str, width: int | None, ratio: float, form: str) -> Mapping[str, int]:
    """Basis channels with which a network of this form is just no larger than with dense A at ``ratio``.

    One ratio for all layers, in steps of 1/256; for grouped A, whose k goes in multiples of the groups, single
    layers take one multiple more, the last ones first, as far as they fit.
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
    found = dict(layers(bisect_right(range(1, 33), target, key=lambda step: size(layers(step), form))))
    for name in reversed(found) if multiple > 1 else ():
        larger = {**found, name: found[name] + multiple}
        found = larger if size(larger, form) <= target else found
    return found


def of_variant(records: Sequence[Record], name: str, key: str) -> float:
    """``parameters`` or ``macs`` (forward, per image) of a variant's network."""
    return next(float(r.result[key]) for r in records if r.config["variant"] == name)


def saved(records: Sequence[Record], kind: str, ratio: str, key: str) -> float:
    """The fraction of the parameters or MACs with dense A that a form saves at equal k."""
    return 1 - of_variant(records, variant(kind, ratio), key) / of_variant(records, variant(DENSE, ratio), key)


def pooled_drop(records: Sequence[Record], name: str, ratio: str, *, comparisons: int = 1) -> Estimate:
    """Dense A at ``ratio`` minus the variant ``name`` in test accuracy (a fraction)."""
    return study.difference_of(records, (variant(DENSE, ratio), name), comparisons=comparisons)


class StepTime(NamedTuple):
    """Median milliseconds of a training step, and its time relative to dense A at the same ratio."""

    ms: float
    relative: float


def step_times(profile: str) -> dict[tuple[str, str], StepTime]:
    """Measured time of a training step, by form (a key of :data:`NAMES`) and ratio; empty where none is stored."""
    runs = [run for run in plan(profile) if run.coefficients is not None]
    forms = {run.coefficients: str(Form.parse(run.coefficients or "").kind) for run in runs}
    report = find_training_bench(profile, runs[0], coefficients=[form for form in forms if form])
    names = {value: name for name, value in RATIOS.items()}
    rows = [row for row in report.rows if row["mode"] == "factorized" and row["trained"] == "both"] if report else []
    rows = [row for row in rows if row["coefficients"] in forms and row["ratio"] in names]
    found = {(forms[row["coefficients"]], names[row["ratio"]]): row for row in rows}
    return {key: StepTime(row["ms"], found[DENSE, key[1]]["speedup"] / row["speedup"]) for key, row in found.items()}


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C5."""
    names = {kind: variant(kind, JUDGED) for kind in NAMES}
    n = min(len(accuracies(records, name)) for name in names.values())
    if n < 2:
        return (study.untested("C5", profile, n),)
    saves = {kind: [saved(records, kind, JUDGED, key) for key in ("parameters", "macs")] for kind in NAMES}
    smaller = [kind for kind in NAMES if max(saves[kind]) >= SAVED]
    if not smaller:
        return (Verdict("C5", profile, "not tested", f"no form saves {SAVED:.0%} of the network at {JUDGED}"),)
    pairs = {kind: matched(records, (names[DENSE], names[kind])) for kind in smaller}
    drops = {kind: difference_estimate(*pair, comparisons=len(smaller)) for kind, pair in pairs.items()}
    best = min(drops, key=lambda kind: drops[kind].high)
    label = study.label_of(100 * drops[best].high < POINTS, all(d.low > 0 for d in drops.values()))
    texts = {
        "form": NAMES[best], "parameters": saves[best][0], "macs": saves[best][1], "n": drops[best].n,
        "ratio": JUDGED, "scale": SCALES[profile], "lost": drops[best].text(scale=100), "forms": len(smaller),
        "names": ", ".join(NAMES[kind] for kind in smaller),
    }  # fmt: skip
    return (study.verdict("C5", profile, label, texts, -100 * drops[best].value),)


STUDY = Study.named("coefficients", plan, judge, judged=JUDGED, saved=SAVED, points=POINTS)
