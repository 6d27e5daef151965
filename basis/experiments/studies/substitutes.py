"""Chapter 9: how do basis convolutions compare with other structured layers?

Each layer in all convolutions of the residual blocks, trained from scratch by one recipe. What it is compared with is a
curve: the accuracy of narrower dense networks, those of the study ``headline`` and two thinner ones, over their cost.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.headline import HALF, NARROWER, QUARTER, variant
from basis.experiments.studies.study import MARGIN, Study, Verdict, label_of, renamed, untested, verdict
from basis.statistics import Estimate, paired_difference

BLOCKS = "layer?.*.conv?"  # the convolutions of the residual blocks: not the stem, nor the shortcuts
NEEDED, SEEDS = 4, 4
PLAIN = ", plain decay"
# The separable layers whose map of channels is structured, and of which Gray et al. say that they need scaled decay.
SEPARABLE = ("low rank", "tensor train", "Tucker", "shuffle", "ACDC")
COSTS = ("parameters", "MACs")
# What a figure may show side by side, and the kinds of layers that are of each.
SERIES: Mapping[str, tuple[str, ...]] = {
    "basis, selected": ("selected basis",), "basis, one ratio": ("basis",), NARROWER: ("dense", NARROWER),
    "separable": (*SEPARABLE, "separable"), "hashed": ("hashed",), "learned filter basis": ("learned filter basis",),
}  # fmt: skip
SHARED: Mapping[str, str] = {"dense": "dense"} | {
    variant(theirs, budget): f"{ours}, {size}"
    for theirs, ours in {NARROWER: NARROWER, "uniform": "basis", "selected": "selected basis"}.items()
    for budget, size in {HALF: "1/2", QUARTER: "1/4"}.items()
}
# The archived runs by their variants then, of WRN-10-1 of width 16; those of an eighth of its parameters.
_ARCHIVED_LAYERS: Mapping[str, str] = {
    "generic:0.25": "low rank", "tensor_train:0.44": "tensor train", "tucker:0.41": "Tucker", "shuffle:2": "shuffle",
    "acdc:15": "ACDC", "sep": "separable", "hashed:0.06": "hashed", "lfb:0.5,4": "learned filter basis",
}  # fmt: skip
ARCHIVED: Mapping[str, str] = {
    "dense": "dense", "dense, width 8": f"{NARROWER}, 1/4", "dense, width 6": f"{NARROWER}, 1/7",
    "dense, width 4": f"{NARROWER}, 1/16", f"basis:1/16{PLAIN}": "basis, 1/8",
    **_ARCHIVED_LAYERS, **{text + PLAIN: name + PLAIN for text, name in _ARCHIVED_LAYERS.items()},
}  # fmt: skip


def _runs(
    base: Run, *, layers: Mapping[str, str], plain: Sequence[str], thin: Mapping[str, int], seeds: int = SEEDS,
) -> tuple[Run, ...]:  # fmt: skip
    """Rounds of seeds of all that is judged, with the ``plain`` and ``thin`` ones; then those of the other layers."""

    def of(name: str, seed: int) -> list[Run]:
        one = replace(base, variant=name, seed=seed, layer=layers[name], include=BLOCKS)
        scaled = replace(one, recipe=replace(base.recipe, decay="scaled")) if name in SEPARABLE else one
        return [scaled, replace(one, variant=name + PLAIN)][: 1 + (name in plain)]

    found: list[Run] = []
    for seed in range(seeds):
        found += [run for name in layers if name in SEPARABLE for run in of(name, seed)]
        found += [replace(base, variant=f"{NARROWER}, {size}", seed=seed, width=width) for size, width in thin.items()]
    found += [run for seed in range(seeds) for name in layers if name not in SEPARABLE for run in of(name, seed)]
    return tuple(found)


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """:meth:`Study.frame`, where archived runs have the names of today, with the rivals of each run.

    ``kind`` is the variant without its size and decay, and its sizes stand together; ``series`` is that of
    :data:`SERIES`, of the runs with the decay that S1 is judged by. ``same parameters`` and ``same MACs``: the accuracy
    of a narrower dense network of that cost and seed (%), interpolated linearly in the logarithm of the cost; NaN where
    no dense network is as cheap, or a seed lacks one.
    """
    columns: dict[str, Callable[[Record], Any]] = {"kind": lambda r: r.config["variant"].partition(",")[0]}
    runs = STUDY.frame([_renamed(record) for record in records], columns)
    series = {kind: name for name, kinds in SERIES.items() for kind in kinds}
    runs["series"] = runs["kind"].map(series).where(~runs["variant"].str.endswith(PLAIN).astype(bool))
    for cost in COSTS:
        runs[f"same {cost}"] = _narrower(runs, cost)
    place = {kind: i for i, kind in enumerate(runs["kind"].unique())}
    return runs.sort_values("kind", key=lambda kinds: kinds.map(place), kind="stable", ignore_index=True)


def _renamed(record: Record) -> Record:
    name = record.config["variant"].removeprefix(f"{record.config['model']} ")
    return renamed(record, ARCHIVED.get(name, name))


def _narrower(runs: pd.DataFrame, cost: str) -> list[float]:
    dense = runs[runs["kind"].isin(["dense", NARROWER])].sort_values(cost)
    by_seed = dense.pivot(index="seed", columns="variant", values="accuracy").dropna()[dense["variant"].unique()]
    costs, at = np.log(dense.groupby("variant", sort=False)[cost].first().to_numpy()), np.log(runs[cost])
    return [
        float(np.interp(x, costs, by_seed.loc[seed], left=np.nan)) if seed in by_seed.index else np.nan
        for x, seed in zip(at, runs["seed"], strict=True)
    ]


def _by_seed(runs: pd.DataFrame, variants: Iterable[str], column: str = "accuracy") -> dict[int, float]:
    """The mean of a column over variants, for each seed that all of them have."""
    found = runs[runs["variant"].isin(variants)].pivot(index="seed", columns="variant", values=column)
    return found.reindex(columns=list(variants)).dropna().mean(axis=1).to_dict()


def gap(runs: pd.DataFrame, variants: Sequence[str], cost: str, *, comparisons: int = 1) -> Estimate:
    """Accuracy of variants, in their mean, minus that of narrower dense networks of the same ``cost``, in points.

    ``cost`` is one of :data:`COSTS`, ``runs`` a :func:`frame`; paired by seed, with Student's 95 % interval.
    """
    own, rivals = _by_seed(runs, variants), _by_seed(runs, variants, f"same {cost}")
    return paired_difference(own, rivals, comparisons=comparisons)


def gain(runs: pd.DataFrame, variants: Sequence[str]) -> Estimate:
    """What scaled decay gains over plain decay in the mean of variants, in points; paired by seed."""
    return paired_difference(_by_seed(runs, variants), _by_seed(runs, [name + PLAIN for name in variants]))


def gaps(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each run of a layer and each of :data:`COSTS`: its ``gap`` to ``rival`` networks, in points."""
    own = runs[~runs["series"].isin([NARROWER]) & runs["series"].notna()]
    long = own.melt(["variant", "seed", "accuracy"], [f"same {cost}" for cost in COSTS], "rival", "other").dropna()
    return long.assign(gap=long["accuracy"] - long["other"], rival=long["rival"].str.replace("same", "equal"))


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """What scaled decay gains over plain decay, in points, by ``layer`` and seed, and in their mean (``what``)."""
    wide = runs.pivot(index="seed", columns="variant", values="accuracy")
    both = [name for name in SEPARABLE if {name, name + PLAIN} <= {*wide}]
    found = pd.DataFrame({name: wide[name] - wide[name + PLAIN] for name in both})
    if both:
        found[f"mean of {len(both)}"] = found.mean(axis=1, skipna=False)
    long = found.melt(var_name="layer", value_name="gain", ignore_index=False).dropna().reset_index()
    return long.assign(what=np.where(long["layer"].isin(both), "one kind of layer", "all of them"))


def judged(profile: str, *, decay: str = "") -> list[str]:
    """The separable structured layers that a profile trains with scaled decay, or those that it trains with both."""
    listed = {run.variant for run in STUDY.runs(profile)}
    return [name for name in SEPARABLE if name + decay in listed]


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on S1 and S2."""
    runs, scale, margin = frame(records), STUDY.scale(profile), MARGIN[profile]
    by_cost = {cost: gap(runs, judged(profile), cost, comparisons=len(COSTS)) for cost in COSTS}
    gained = gain(runs, judged(profile, decay=PLAIN))
    least = min(found.n for found in by_cost.values())
    s1, s2 = untested("S1", profile, least, NEEDED), untested("S2", profile, gained.n, NEEDED)
    if least >= NEEDED:
        good, bad = all(e.low > 0 for e in by_cost.values()), any(e.high < 0 for e in by_cost.values())
        own = {cost: {name: gap(runs, [name], cost) for name in judged(profile)} for cost in COSTS}
        sides = "; ".join(
            f"above at equal {cost}: {', '.join(k for k, e in found.items() if e.low > 0) or 'none'}, "
            f"below: {', '.join(k for k, e in found.items() if e.high < 0) or 'none'}" for cost, found in own.items()
        )  # fmt: skip
        texts = {"macs": by_cost["MACs"], "members": sides}
        s1 = verdict("S1", profile, label_of(good, bad), by_cost["parameters"], scale=scale, **texts)
        both = ", ".join(f"{found.text(signed=True)} at equal {cost}" for cost, found in by_cost.items())
        s1 = replace(s1, difference=f"{both}, points")
    if gained.n >= NEEDED:
        s2 = verdict("S2", profile, label_of(gained.low > margin, gained.high < margin), gained, scale=scale)
    return s1, s2


def layer_times(shape: str, layers: Mapping[str, str]) -> pd.DataFrame:
    """The time of layers, texts by name, as a ``share`` of the dense layer's of that ``shape``: three rows each.

    These are the median over ``n`` rounds and both quartiles; none of layers that no benchmark has.
    """
    reports, names = load_benches(None, kind="bench-structured"), {text: name for name, text in layers.items()}
    rows = [row for report in reports for row in report.rows if row["shape"] == shape and row["mode"] == "layer"]
    found = [
        {"layer": names[row["layer"]], "what": "time", "share": 1 / row[key], "n": row["n"]}
        for row in rows for key in ("speedup", "speedup_q1", "speedup_q3") if row["layer"] in names and key in row
    ]  # fmt: skip
    return pd.DataFrame(found, columns=["layer", "what", "share", "n"])


STUDY = Study.named(
    "substitutes", _runs, judge, shared=SHARED, needed=NEEDED, margin=MARGIN["small"], paper=MARGIN["paper"]
)
