"""Chapter 6: can the coefficient matrix be made smaller?

Every form of :mod:`basis.layers.coefficients` on every convolution, trained from scratch by one recipe: with the same
basis filters as a dense A, and with as many more as make the network as large. Beside them, with a dense A, recipe
terms that treat the factors otherwise than plain weight decay does.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from basis.costs import count_parameters
from basis.experiments.runs import Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.cost import find_training_bench
from basis.experiments.studies.study import SCALES, TEXTS, Study, Verdict, accuracies, matched, result_of
from basis.experiments.studies.study import difference_of as difference_of
from basis.experiments.studies.study import spread as spread
from basis.layers.coefficients import Form
from basis.models import build
from basis.statistics import difference_estimate
from basis.substitution import Plan

DENSE = "dense"  # the form that the others are compared with
RATIOS = {"r=1/2": 0.5, "r=1/4": 0.25}
NAMES: Mapping[str, str] = dict(TEXTS["coefficients.names"])
TERMS: Mapping[str, Mapping[str, Any]] = {name: json.loads(text) for name, text in TEXTS["coefficients.terms"].items()}
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
    forms = dict(zip(NAMES, NAMES, strict=True))
    forms |= {"low_rank": f"low_rank:1/{divisor}", "grouped": f"grouped:{divisor}", "sparse": f"sparse:1/{divisor}"}

    def one(kind: str, at: str, seed: int, **changes: Any) -> Run:
        plain = {"variant": variant(kind, at), "ratio": RATIOS[at], "coefficients": forms[kind]}
        return replace(base, seed=seed, **{**plain, **changes})

    def equal(ratio: str, seed: int, kind: str) -> Run:
        layers = matched_plan(base.model, base.width, RATIOS[ratio], forms[kind])
        return one(kind, ratio, seed, variant=variant(kind, ratio, matched=True), ratio=None, plan=layers)

    listed: list[Run] = []
    for seed in range(seeds):
        listed += [replace(base, seed=seed), *(one(k, ratio, seed) for ratio in (JUDGED, *ratios) for k in forms)]
        recipes = {f"{name}, {TERMS_AT}": replace(base.recipe, **TERMS[name]) for name in terms}
        listed += [one(DENSE, TERMS_AT, seed, variant=name, recipe=recipe) for name, recipe in recipes.items()]
    listed += [one(kind, JUDGED, seed) for seed in range(seeds, judged) for kind in forms]
    others = [kind for kind in forms if kind != DENSE]
    return (*listed, *(equal(ratio, seed, kind) for seed in range(seeds) for ratio in sizes for kind in others))


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

    weights: dict[str, Any] = {n: network.get_submodule(n).weight for n in Plan.uniform(network, ratio=1 / 256).layers}
    base = count_parameters(network)

    def size(layers: Mapping[str, int], form: str) -> int:
        """Parameters of the network with these basis layers; in the form "shared" layers of equal shape share A."""
        saved = sum(weights[name].numel() - k * weights[name][0].numel() for name, k in layers.items())
        shapes = [(len(weights[name]), k) for name, k in layers.items()]
        shapes = list(dict.fromkeys(shapes)) if form == "shared" else shapes
        return base - saved + sum(count_parameters(Form.parse(form).make(*shape, device="meta")) for shape in shapes)

    target = size(layers(0), DENSE)
    found = dict(layers(bisect_right(range(1, 33), target, key=lambda step: size(layers(step), form))))
    for name in reversed(found) if multiple > 1 else ():
        larger = {**found, name: found[name] + multiple}
        found = larger if size(larger, form) <= target else found
    return found


def saved(records: Sequence[Record], name: str, ratio: str, key: str = "parameters") -> float:
    """The fraction of the ``parameters`` or ``macs`` with dense A at ``ratio`` that a variant's network saves."""
    return 1 - result_of(records, name)[key] / result_of(records, variant(DENSE, ratio))[key]


def step_times(profile: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The measured training step (its time is ``ms``) by form (a key of :data:`NAMES`) and ratio, where one is stored.

    ``relative`` is its time over that with dense A at the same ratio.
    """
    runs = [run for run in STUDY.runs(profile) if run.coefficients]
    forms = {run.coefficients: Form.parse(run.coefficients).kind for run in runs if run.coefficients}
    report = find_training_bench(profile, runs[0], coefficients=tuple(forms))
    names = {value: name for name, value in RATIOS.items()}
    rows = [row for row in report.rows if row["mode"] == "factorized" and row["trained"] == "both"] if report else []
    rows = [row for row in rows if row["coefficients"] in forms and row["ratio"] in names]
    found = {(str(forms[row["coefficients"]]), names[row["ratio"]]): row for row in rows}
    relative = {key: found[DENSE, key[1]]["speedup"] / row["speedup"] for key, row in found.items()}
    return {key: {**row, "relative": relative[key]} for key, row in found.items()}


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C5."""
    names = {kind: variant(kind, JUDGED) for kind in NAMES}
    n = min(len(accuracies(records, name)) for name in names.values())
    if n < 2:
        return (study.untested("C5", profile, n),)
    saves = {
        kind: [saved(records, name, JUDGED, key) for key in ("parameters", "macs")] for kind, name in names.items()
    }
    smaller = [kind for kind in NAMES if max(saves[kind]) >= SAVED]
    if not smaller:
        return (Verdict("C5", profile, "not tested", f"no form saves {SAVED:.0%} of the network at {JUDGED}"),)
    pairs = {kind: matched(records, (names[DENSE], names[kind])) for kind in smaller}
    drops = {kind: difference_estimate(*pair, comparisons=len(smaller)) for kind, pair in pairs.items()}
    best = min(drops, key=lambda kind: drops[kind].high)
    return (study.verdict(
        "C5", profile, study.label_of(100 * drops[best].high < POINTS, all(d.low > 0 for d in drops.values())),
        -100 * drops[best].value, form=NAMES[best], parameters=saves[best][0], macs=saves[best][1], n=drops[best].n,
        ratio=JUDGED, scale=SCALES[profile], lost=drops[best].text(scale=100), forms=len(smaller),
        names=", ".join(NAMES[kind] for kind in smaller),
    ),)  # fmt: skip


STUDY = Study.named("coefficients", _runs, judge, dict(variant=DENSE), judged=JUDGED, saved=SAVED, points=POINTS)
