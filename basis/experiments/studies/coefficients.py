"""Chapter 6: can the coefficient matrix be made smaller?

The forms of :mod:`basis.layers.coefficients`, on every convolution at r = 1/2, trained from scratch by one recipe: with
the basis filters of a dense A, and without A but with as many more filters as make the network as large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import pandas as pd
import torch

from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import counts, facts, load_benches
from basis.experiments.studies.headline import HALF, NARROWER, variant
from basis.experiments.studies.study import MARGIN, Study, Verdict, difference, label_of, renamed, untested, verdict
from basis.layers.conv import basis_channels_for
from basis.models import build
from basis.plan import convolutions
from basis.statistics import mean_estimate

RATIO, NEEDED = 0.5, 8
DENSE, EQUAL, THIN = "dense A", "no A, equal size", "narrower dense"
FORMS = ("no A", "grouped A")
JUDGED = (*FORMS, EQUAL)
KINDS: Mapping[str, str] = {
    DENSE: "dense", "no A": "repeat", "grouped A": "grouped", "low-rank A": "low_rank", "sparse A": "sparse",
    "shared A": "shared", "frozen A": "frozen",
}  # fmt: skip
OTHERS = tuple(name for name in KINDS if name not in (DENSE, *FORMS))


def _runs(base: Run, *, divisor: int, seeds: int, few: int, others: Sequence[str] = OTHERS) -> tuple[Run, ...]:
    """``seeds`` rounds of dense A and all that is judged, then ``few`` rounds of the ``others``.

    ``divisor`` is the number of groups, and of what low rank and the sparse rows keep of k.
    """
    sizes = {"grouped": f":{divisor}", "low_rank": f":1/{divisor}", "sparse": f":1/{divisor}"}

    def one(name: str, seed: int) -> Run:
        if name == EQUAL:
            plan = equal_plan(base.model, base.width)
            return replace(base, variant=name, seed=seed, ratio=None, plan=plan, coefficients="repeat")
        return replace(base, variant=name, seed=seed, coefficients=KINDS[name] + sizes.get(KINDS[name], ""))

    rounds = (((DENSE, *JUDGED), seeds), (others, few))
    return tuple(one(name, seed) for names, n in rounds for seed in range(n) for name in names)


@lru_cache
def equal_plan(model: str, width: int | None) -> Mapping[str, int]:
    """Basis channels, at one ratio, that make the network without A as large as with a dense A at :data:`RATIO`."""
    with torch.device("meta"):
        layers = convolutions(build(model, width=width))
    weights = {names[0]: conv.weight for conv, names in layers.items()}

    def plan(step: int) -> dict[str, int]:
        return {name: basis_channels_for(RATIO + step / 256, len(weight)) for name, weight in weights.items()}

    def saved(step: int, *, dense: bool = False) -> int:
        """Numbers less than the dense network has: a row of A has k."""
        return sum((len(weights[n]) - k) * (weights[n][0].numel() - k * dense) for n, k in plan(step).items())

    return plan(max(step for step in range(128) if saved(step) >= saved(0, dense=True)))


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame`; archived variants have today's names, and those of another ratio are left out."""
    known = {*STUDY.shared.values(), *KINDS, EQUAL}
    found = [renamed(r, r.config["variant"].removesuffix(", r=1/2")) for r in records]
    found = [replace(r, result={"macs": math.nan, **r.result}) for r in found if r.config["variant"] in known]
    return STUDY.frame(found)


def step_times(profile: str, of: str = "coefficients") -> pd.DataFrame:
    """Measured steps of a profile's network at :data:`RATIO`, a row a ``device`` and ``variant`` or ``trained`` part.

    ``relative`` is the time over that of training everything with dense A, ``to_dense`` over the dense network's, by
    the kind of step that trainings take there; medians of ``n`` rounds. Of "smoke" those of "small".
    """
    run, found = STUDY.runs("paper" if profile == "paper" else "small")[0], []
    for report in load_benches(None, kind="bench-train"):
        about = {"step": "eager", **facts(report)}
        wanted = {"model": run.model, "width": run.width, "ratio": RATIO, "mode": "factorized"}
        wanted |= {"step": "graphed" if about["device_type"] == "cuda" else "eager"}
        rows = [row for one in report.rows if counts(one) and wanted.items() <= (row := {**about, **one}).items()]
        whole = [row["speedup"] for row in rows if (row["coefficients"], row["trained"]) == ("dense", "both")]
        if whole and len(about[of]) > 1:
            found += [{**r, "relative": whole[0] / r["speedup"], "to_dense": 1 / r["speedup"]} for r in rows]
    columns = ("coefficients", "trained", "device", "device_type", "n", "relative", "to_dense")
    times = pd.DataFrame(found, columns=columns)
    times["variant"] = times["coefficients"].str.split(":").str[0].map({kind: name for name, kind in KINDS.items()})
    return times.drop_duplicates([of, "device"], ignore_index=True)


def interval(points: Sequence[float]) -> tuple[float, float]:
    """The ends of the mean's interval by which the rule judges, for seaborn's ``errorbar``."""
    mean = mean_estimate(points, comparisons=len(JUDGED))
    return mean.low, mean.high


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C5."""
    runs, many = frame(records), len(JUDGED)
    lost = {name: difference(runs, name, DENSE, comparisons=many) for name in JUDGED}
    if (least := min(one.n for one in lost.values())) < NEEDED:
        return (untested("C5", profile, least, NEEDED),)
    within = [name for name in JUDGED if lost[name].low > -MARGIN[profile]]
    beyond = [name for name in JUDGED if lost[name].high < -MARGIN[profile]]
    best = max([name for name in FORMS if name in within] or FORMS, key=lambda name: lost[name].value)
    sizes = runs.groupby("variant")["parameters"].first()
    found = verdict(
        "C5", profile, label_of({best, EQUAL} <= {*within}, EQUAL in beyond or {*FORMS} <= {*beyond}), lost[best],
        scale=STUDY.scale(profile), form=best, size=sizes[best], whole=sizes[DENSE], thin=sizes.get(THIN, math.nan),
        filters=lost[EQUAL], narrower=difference(runs, best, THIN, comparisons=many),
    )  # fmt: skip
    both = ", ".join(f"{lost[name].text(signed=True)} ({name})" for name in (best, EQUAL))
    return (replace(found, difference=f"{both}, points"),)


SHARED = {"dense": "dense", variant(NARROWER, HALF): THIN}
FIXED = {"variant": DENSE, "ratio": RATIO}
STUDY = Study.named("coefficients", _runs, judge, FIXED, shared=SHARED, needed=NEEDED, **MARGIN)
