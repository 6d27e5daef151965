"""Chapter 4: does a cheap sensitivity predict what full training loses?

The truth: every 3x3 convolution alone made basis at two small ratios, the network trained from scratch, its final
held-out loss against the dense network's. The candidates: every measure of :func:`basis.sensitivity`, taken of other
dense networks, and the paper's own short training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import nn

from basis.experiments.runs import Ladder, Record, Run
from basis.experiments.studies.study import SCALES, Study, Verdict, label_of, verdict
from basis.layers.conv import basis_channels_for
from basis.models import build
from basis.search.table import SensitivityTable
from basis.statistics import Estimate, Spread

Truth = Literal["scratch", "tuned"]
Values = Mapping[str, float]  # layer -> value

RATIOS = (1 / 8, 1 / 32)
NAMES = {1 / 2: "r=1/2", 1 / 4: "r=1/4", 1 / 8: "r=1/8", 1 / 32: "r=1/32"}
MEASURES = ("spectrum", "activation", "taylor", "fisher", "oneshot", "oneshot_bn")
TRAINED = ("fine_tuning", "short_training")
ONE_PASS = ("activation", "taylor", "fisher")  # these score all layers and ranks in one pass
RECOMMENDED = "oneshot_bn"
SPEARMAN, COST = 0.8, 0.05
UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"), 0)


def _runs(
    base: Run, *, dense: int, networks: int, seeds: int, short: int, layers: int | None = None, images: int = 2000
) -> tuple[Run, ...]:
    """The noise first, then the sensitivities, then the truth, seed after seed."""
    brief = replace(base.recipe, epochs=short)
    ladder = Ladder(measures=dict.fromkeys(MEASURES, tuple(NAMES)), multiple=1, images=images, calibration=images // 2)
    # Sensitivities come from networks of their own: no run is on both sides of a correlation.
    # All but the first are fine-tuned too, layer by layer: a second truth, of the very network that was measured.
    tuning = replace(brief, lr=brief.lr / 5)
    tuned = replace(ladder, measures={**ladder.measures, "fine_tuning": RATIOS}, tuning=tuning)
    first = replace(base, variant="ladder", seed=dense, ladder=ladder)
    others = [replace(base, variant="tuned", seed=dense + i, ladder=tuned) for i in range(1, networks)]
    shapes = convolutions(base.model, base.width)
    names = list(shapes)[:: max(1, len(shapes) // layers)][:layers] if layers else list(shapes)
    alone = {f"{name} k={k}": {name: k} for name in names for k in ranks(shapes[name])}
    truths = [
        replace(base, variant=name, seed=seed, plan=plan) for seed in range(seeds) for name, plan in alone.items()
    ]
    shorts = [
        replace(base, variant=f"short {name}", seed=seed, plan=plan, recipe=brief)
        for seed in (20, 21)[: 2 * bool(seeds)]  # other seeds than the truth's, whose first epochs would be the same
        for name, plan in {"dense": None, **alone}.items()
    ]
    noise, early = [replace(base, seed=seed) for seed in range(dense)], 2 * len(alone)
    return (*noise, first, *truths[:early], *others, *shorts, *truths[early:])


def ranks(out_channels: int) -> tuple[int, ...]:
    """The numbers of basis channels of the truth, without repetition."""
    return tuple(dict.fromkeys(basis_channels_for(ratio, out_channels) for ratio in RATIOS))


@lru_cache(maxsize=16)
def convolutions(model: str, width: int | None) -> Mapping[str, int]:
    """Name -> C_out of every 3x3 convolution."""
    with torch.device("meta"):
        modules = dict(build(model, width=width).named_modules())
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    return {name: conv.out_channels for name, conv in convs.items() if conv.kernel_size == (3, 3)}


def _noise(runs: np.ndarray) -> tuple[float, int]:
    """Mean square of (variants, seeds) without what either does (two-way analysis of variance); degrees of freedom."""
    rest = runs - runs.mean(1, keepdims=True) - runs.mean(0) + runs.mean()
    freedom = (runs.shape[0] - 1) * (runs.shape[1] - 1)
    return float((rest**2).sum()) / freedom if freedom > 0 else float("nan"), max(0, freedom)


@dataclass(frozen=True)
class Losses:
    """Final losses on held-out images by seed: of the dense runs, and of every layer alone at one ratio.

    A seed moves all variants together (initial weights, order of the images), so layers are compared at the seeds
    that all of them have, and with the dense runs of those seeds.
    """

    dense: Mapping[int, float]
    layers: Mapping[str, Mapping[int, float]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every layer has."""
        return sorted(set.intersection(*map(set, self.layers.values()))) if self.layers else []

    def runs(self, names: Sequence[str]) -> np.ndarray:
        """(layers, seeds)."""
        return np.array([[self.layers[name][seed] for seed in self.seeds] for name in names])

    def truth(self) -> dict[str, float]:
        """Layer -> what it loses on average."""
        return {name: self.estimate(name).value for name in self.layers}

    @property
    def spread(self) -> Spread:
        """The standard deviation of a run, without what its seed does to all variants."""
        seeds = [seed for seed in self.seeds if seed in self.dense]
        variance, freedom = _noise(np.array([[runs[s] for s in seeds] for runs in (self.dense, *self.layers.values())]))
        return Spread(float(np.sqrt(variance)), freedom)

    def estimate(self, layer: str) -> Estimate:
        """What ``layer`` loses against the dense runs of the same seeds, with an interval from :attr:`spread`."""
        seeds = [seed for seed in self.seeds if seed in self.dense]
        both = ([runs[seed] for seed in seeds] for runs in (self.layers[layer], self.dense))
        return self.spread.difference(*both) if seeds else UNKNOWN


def losses(records: Sequence[Record], ratio: float, *, short: bool = False) -> Losses:
    """The losses at one ratio of the layers that have at least 2 runs; ``short``: of the short trainings."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        found.setdefault(record.config["variant"], {})[record.config["seed"]] = record.result["validation"]["loss"]
    prefix = "short " if short else ""
    names = {name: f"{prefix}{name} k={basis_channels_for(ratio, c)}" for name, c in _shapes(records).items()}
    layers = {name: found[variant] for name, variant in names.items() if len(found.get(variant, ())) >= 2}
    return Losses(found.get(f"{prefix}dense", {}), layers)


def _shapes(records: Sequence[Record]) -> Mapping[str, int]:
    return convolutions(records[0].config["model"], records[0].config["width"]) if records else {}


def tables(records: Sequence[Record], measure: str, truth: Truth = "scratch") -> list[SensitivityTable]:
    """One table for each network that was measured and is compared with a truth: all of them, or those fine-tuned."""
    kinds = ("tuned",) if truth == "tuned" else ("ladder", "tuned")
    found = [r.result["tables"] for r in records if r.config["variant"] in kinds]
    return [SensitivityTable.from_lines(t[measure]) for t in found if measure in t]


def values(table: SensitivityTable, ratio: float, score: str = "value") -> dict[str, float]:
    """Layer -> sensitivity at one ratio; ``score`` may be "kl"."""
    wanted = {layer.name: basis_channels_for(ratio, layer.out_channels) for layer in table.layers}
    return {cell.layer: getattr(cell, score) for cell in table.cells if cell.basis_channels == wanted[cell.layer]}


def mean_values(found: Sequence[Values]) -> dict[str, float]:
    """The mean over networks, layer by layer."""
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]} if found else {}


@dataclass(frozen=True)
class Agreement:
    """The rank correlation of a measure with the truth, mean of both ratios, with a bootstrap interval.

    ``cost`` is in forward passes of one image (a backward pass counts as two), both ratios together.
    """

    measure: str
    spearman: Estimate
    cost: float = 0
    seconds: float = 0


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the rows of ``a`` and ``b``, (..., n); 0 where one side does not vary."""
    a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def bootstrap(truths: Sequence[Losses], predictions: Sequence[Values], *, draws: int = 2000) -> Estimate:
    """The mean rank correlation over truths, with a 95 % percentile bootstrap over layers and over seeds.

    One draw takes the same layers and seeds of all truths. ``n`` is the number of layers; those that are not finite
    are left out, and NaN is the answer where fewer than 4 remain. What varies in the predictions is not in it.
    """
    names = [
        name
        for name in (truths[0].layers if truths else ())
        if all(name in t.layers and np.isfinite(t.runs([name])).all() for t in truths)
        and all(np.isfinite(p.get(name, np.nan)) for p in predictions)
    ]
    if len(names) < 4 or not all(t.seeds for t in truths):
        return UNKNOWN
    rng = np.random.default_rng(0)
    layers = rng.integers(len(names), size=(draws, len(names)))
    fractions = rng.random((draws, max(len(t.seeds) for t in truths)))
    points, drawn = [], []
    for truth, prediction in zip(truths, predictions, strict=True):
        runs, predicted = truth.runs(names), np.array([prediction[name] for name in names])
        seeds = (fractions[:, : runs.shape[1]] * runs.shape[1]).astype(int)
        points.append(correlation(runs.mean(1), predicted))
        means = runs[layers[:, :, None], seeds[:, None, :]].mean(-1)
        drawn.append(correlation(means, predicted[layers]))
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return Estimate(float(np.mean(points)), float(low), float(high), len(names))


def reliability(truth: Losses) -> float:
    """The share of the variance between layers' mean losses that is not noise; NaN without two seeds and layers.

    Its square root bounds the correlation that a perfect measure could be expected to reach.
    """
    runs = truth.runs(list(truth.layers))
    if runs.ndim < 2 or min(runs.shape) < 2:
        return float("nan")
    between = float(runs.mean(1).var(ddof=1))
    return max(0.0, 1 - _noise(runs)[0] / runs.shape[1] / between) if between else 0.0


def training_cost(config: Mapping[str, Any]) -> float:
    """Forward passes of one image that a training takes; a backward pass counts as two."""
    images = config["images"] or {"cifar10": 50000, "synthetic": 2000}[config["data"]] - config["validation"]
    return 3.0 * images * config["recipe"]["epochs"]


def truths_of(records: Sequence[Record], truth: Truth) -> list[Losses]:
    """What every layer loses, by ratio: trained from scratch, or fine-tuned (then of one network after another)."""
    if truth == "scratch":
        return [losses(records, ratio) for ratio in RATIOS]
    tuned = [values(table, ratio) for table in tables(records, "fine_tuning", truth) for ratio in RATIOS]
    square = _shapes(records)
    return [Losses({0: 0.0}, {name: {0: x} for name, x in one.items() if name in square}) for one in tuned]


def agreements(
    records: Sequence[Record], measures: Sequence[str] = (*MEASURES, *TRAINED), *, truth: Truth = "scratch"
) -> list[Agreement]:
    """The measures against a truth, the cheapest first; those that no record holds are left out.

    From scratch, measures are means over the measured networks; else correlations are, each with its own truth.
    """
    truths = truths_of(records, truth)
    square = {name: ranks(channels) for name, channels in _shapes(records).items()}
    rows = []
    for measure in measures:
        found = tables(records, measure, truth)
        if not found or (measure, truth) == ("fine_tuning", "tuned"):
            continue
        cells = [cell for table in found for cell in table.cells]
        cells = [c for c in cells if measure in ONE_PASS or c.basis_channels in square.get(c.layer, ())]
        cost = sum(c.forward + 2 * c.backward for c in cells) / len(found)
        seconds = sum(c.seconds for c in cells) / len(found)
        for score in ("value", "kl") if measure.startswith("oneshot") else ("value",):
            predictions = [values(table, ratio, score) for table in found for ratio in RATIOS]
            if truth == "scratch":
                predictions = [mean_values(predictions[i :: len(RATIOS)]) for i in range(len(RATIOS))]
            name = measure + " (KL)" * (score == "kl")
            rows.append(Agreement(name, bootstrap(truths, predictions), cost, seconds))
    brief = [losses(records, ratio, short=True) for ratio in RATIOS]
    if "short_training" in measures and all(b.dense and b.layers for b in brief) and truths:
        trained = [r for r in records if r.config["variant"].startswith("short ")]
        cost, seconds = sum(training_cost(r.config) for r in trained), sum(r.result["train_seconds"] for r in trained)
        predictions = [b.truth() for b in brief] * (len(truths) // len(brief))
        rows.append(Agreement("short_training", bootstrap(truths, predictions), cost, seconds))
    return sorted(rows, key=lambda row: row.cost)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H1; not before every layer has 2 runs at both ratios."""
    truths = truths_of(records, "scratch")
    listed = {run.variant.split()[0] for run in STUDY.runs(profile) if run.plan} - {"short"}
    complete = all(set(t.layers) >= listed and len(t.seeds) >= 2 and len(t.dense) >= 4 for t in truths)
    row = next((row for row in agreements(records, (RECOMMENDED,)) if row.measure == RECOMMENDED), None)
    if not complete or row is None or row.spearman.n == 0:
        finding = "there are too few runs to compare a sensitivity with full training"
        return (Verdict("H1", profile, "not tested", finding),)
    share = row.cost / training_cost(next(r.config for r in records if r.config["variant"] == "dense"))
    return (verdict(
        "H1", profile, label_of(row.spearman.value >= SPEARMAN and share < COST, row.spearman.low <= 0),
        spearman=row.spearman.text(), layers=row.spearman.n, networks=len(tables(records, RECOMMENDED)), share=share,
        seeds=min(len(t.seeds) for t in truths), scale=SCALES[profile], measure=RECOMMENDED,
        ceiling=np.mean([np.sqrt(reliability(t)) for t in truths]),
    ),)  # fmt: skip


FIXED: Mapping[str, Any] = {"variant": "dense", "test": False}
STUDY = Study.named("sensitivity", _runs, judge, FIXED, recommended=RECOMMENDED, spearman=SPEARMAN, cost=COST)
