"""Chapter 4: does a cheap sensitivity predict what full training loses?

The truth: every 3x3 convolution alone made basis at two small ratios, the network trained from scratch,
its final loss on held-out images against the dense network's. The candidates: every measure of
:func:`basis.sensitivity`, taken of other dense networks, and the paper's own short training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import stats
from torch import nn

from basis.experiments.runs import Ladder, Record, Run
from basis.experiments.studies.study import SCALES, Label, Study, Verdict
from basis.layers.conv import basis_channels_for
from basis.models import build
from basis.search.table import SensitivityTable
from basis.statistics import Estimate, Spread
from basis.training.loop import Recipe

Kind = Literal["spearman", "kendall"]
Truth = Literal["scratch", "tuned"]

RATIOS = (1 / 8, 1 / 32)
NAMES = {1 / 2: "r=1/2", 1 / 4: "r=1/4", 1 / 8: "r=1/8", 1 / 32: "r=1/32"}
MEASURES = ("spectrum", "activation", "taylor", "fisher", "oneshot", "oneshot_bn")
TRAINED = ("fine_tuning", "short_training")
RECOMMENDED = "oneshot_bn"
SPEARMAN, COST = 0.8, 0.05

RULE = (
    "The truth of a layer and ratio is the mean final loss on held-out images over runs in which that layer alone "
    "is basis, minus the mean of the dense runs; it needs at least 2 runs per layer and 4 dense ones. A measure is "
    "compared with it by Spearman's rank correlation over the 3x3 layers, at each of the two ratios, and the mean of "
    "both counts. The 95 % interval is a percentile bootstrap that draws layers, and runs within each layer, with "
    f"replacement. H1 is judged by the measure {RECOMMENDED}, named here before any run was looked at, averaged over "
    f"the measured networks: reproduced if the correlation is at least {SPEARMAN} and both ratios together take under "
    f"{COST:.0%} of the passes of one full training (a backward pass counts as two forward ones); partly if the "
    "interval of the correlation lies above 0; else not reproduced."
)


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: the noise first, then the sensitivities, then the truth, seed after seed."""
    measured = tuple(NAMES)
    if profile == "paper":
        base = _run(profile, validation=5000)
        return _runs(base, dense=8, networks=3, seeds=3, short=replace(base.recipe, epochs=2), ratios=measured)
    if profile == "colab":
        base = _run(profile, width=16, validation=5000, recipe=Recipe(epochs=4))
        return _runs(base, dense=4, networks=1, seeds=2, short=replace(base.recipe, epochs=1), ratios=measured)
    if profile == "cpu":
        recipe = Recipe(epochs=4, batch_size=125, lr=0.1)
        base = _run(profile, width=8, mode="factorized", images=20000, validation=4000, recipe=recipe)
        return _runs(base, dense=8, networks=3, seeds=3, short=replace(recipe, epochs=1), ratios=measured)
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, model="resnet20", width=4, data="synthetic", validation=200, recipe=recipe)
        short = replace(recipe, epochs=1)
        return _runs(base, dense=4, networks=1, seeds=2, short=short, ratios=measured, layers=4, images=100)
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="sensitivity", profile=profile, variant="dense", seed=0, test=False, **settings)


def _runs(
    base: Run, *, dense: int, networks: int, seeds: int, short: Recipe, ratios: tuple[float, ...],
    layers: int | None = None, images: int = 2000,
) -> tuple[Run, ...]:  # fmt: skip
    ladder = Ladder(measures=dict.fromkeys(MEASURES, ratios), multiple=1, images=images, calibration=images // 2)
    # Sensitivities come from networks of their own: no run is on both sides of a correlation.
    # All but the first are fine-tuned too, layer by layer: a second truth, of the very network that was measured.
    tuning = replace(short, lr=short.lr / 5)
    tuned = replace(ladder, measures={**ladder.measures, "fine_tuning": RATIOS}, tuning=tuning)
    climbs = [replace(base, variant="ladder", seed=dense, ladder=ladder)]
    climbs += [replace(base, variant="tuned", seed=dense + i, ladder=tuned) for i in range(1, networks)]
    cells = list(alone(base, layers))
    truths = [[replace(base, variant=variant, seed=seed, plan=p) for variant, p in cells] for seed in range(seeds)]
    brief = replace(base, recipe=short)
    shorts = [
        replace(brief, variant=f"short {variant}", seed=seed, plan=p)
        for seed in range(20, 22)  # other seeds than the truth's, whose first epochs would be the same
        for variant, p in [("dense", None), *cells]
    ]
    noise = [replace(base, seed=seed) for seed in range(dense)]
    return (*noise, *climbs[:1], *(r for t in truths[:2] for r in t), *climbs[1:], *shorts,
            *(r for t in truths[2:] for r in t))  # fmt: skip


def alone(base: Run, layers: int | None = None) -> Mapping[str, Mapping[str, int]] | Any:
    """Variants and plans with one 3x3 convolution made basis; equal plans at both ratios are one variant."""
    shapes = convolutions(base.model, base.width)
    names = list(shapes)[:: max(1, len(shapes) // layers)][:layers] if layers else list(shapes)
    return [(f"{name} k={k}", {name: k}) for name in names for k in ranks(shapes[name])]


def ranks(out_channels: int) -> tuple[int, ...]:
    """The numbers of basis channels of the truth, without repetition; none for a layer that is not in it."""
    if not out_channels:
        return ()
    return tuple(dict.fromkeys(basis_channels_for(ratio, out_channels) for ratio in RATIOS))


@lru_cache(maxsize=16)
def convolutions(model: str, width: int | None) -> Mapping[str, int]:
    """Name -> C_out of every 3x3 convolution."""
    with torch.device("meta"):
        network = build(model, width=width)
    return {
        name: module.out_channels
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }


# -- from records to a comparison -----------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Final losses on held-out images by seed: of the dense runs, and of every layer alone at one ratio.

    A seed moves all variants together (they share initial weights and the order of the images), so layers are
    compared at the seeds that all of them have, and with the dense runs of those seeds.
    """

    dense: Mapping[int, float]
    layers: Mapping[str, Mapping[int, float]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every layer has."""
        every = [set(runs) for runs in self.layers.values()]
        return sorted(set.intersection(*every)) if every else []

    def runs(self, names: Sequence[str]) -> np.ndarray:
        """(layers, seeds)."""
        return np.array([[self.layers[name][seed] for seed in self.seeds] for name in names])

    def truth(self) -> dict[str, float]:
        """Layer -> what it loses on average."""
        return {name: self.estimate(name).value for name in self.layers}

    @property
    def spread(self) -> Spread:
        """The standard deviation of a run, without what its seed does to all variants (two-way analysis of variance)."""
        seeds = [seed for seed in self.seeds if seed in self.dense]
        variants = [self.dense, *self.layers.values()]
        runs = np.array([[variant[seed] for seed in seeds] for variant in variants])
        freedom = (len(variants) - 1) * (len(seeds) - 1)
        if freedom < 1:
            return Spread(float("nan"), 0)
        rest = runs - runs.mean(1, keepdims=True) - runs.mean(0) + runs.mean()
        return Spread(float(np.sqrt((rest**2).sum() / freedom)), freedom)

    def estimate(self, layer: str) -> Estimate:
        """What ``layer`` loses against the dense runs of the same seeds, with an interval from :attr:`spread`."""
        seeds = [seed for seed in self.seeds if seed in self.dense]
        if not seeds:
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        return self.spread.difference([self.layers[layer][s] for s in seeds], [self.dense[s] for s in seeds])


def losses(records: Sequence[Record], ratio: float, *, short: bool = False) -> Losses:
    """The losses at one ratio of the layers that have at least 2 runs; ``short``: of the short trainings."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        variant = found.setdefault(record.config["variant"], {})
        variant[record.config["seed"]] = record.result["validation"]["loss"]
    prefix = "short " if short else ""
    layers = {}
    for name, out_channels in _shapes(records).items():
        runs = found.get(f"{prefix}{name} k={basis_channels_for(ratio, out_channels)}", {})
        if len(runs) >= 2:
            layers[name] = runs
    return Losses(found.get(f"{prefix}dense", {}), layers)


def _shapes(records: Sequence[Record]) -> Mapping[str, int]:
    return convolutions(records[0].config["model"], records[0].config["width"]) if records else {}


def tuned_losses(record: Record, ratio: float) -> Losses:
    """What each 3x3 layer costs after fine-tuning one network, against the dense network tuned as long."""
    table = SensitivityTable.from_lines(record.result["tables"]["fine_tuning"])
    square = _shapes([record])
    return Losses({0: 0.0}, {name: {0: value} for name, value in values(table, ratio).items() if name in square})


def tables(records: Sequence[Record], measure: str) -> list[SensitivityTable]:
    """One table for each measured network."""
    found = [r.result["tables"] for r in records if r.config["variant"] in ("ladder", "tuned")]
    return [SensitivityTable.from_lines(t[measure]) for t in found if measure in t]


def values(table: SensitivityTable, ratio: float, score: str = "value") -> dict[str, float]:
    """Layer -> sensitivity at one ratio; ``score`` may be "kl"."""
    channels = {layer.name: layer.out_channels for layer in table.layers}
    return {
        cell.layer: getattr(cell, score)
        for cell in table.cells
        if cell.basis_channels == basis_channels_for(ratio, channels[cell.layer])
    }


def mean_values(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over networks, layer by layer."""
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]} if found else {}


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of a measure with the truth, mean of both ratios, with bootstrap intervals.

    ``cost`` is in forward passes of one image (a backward pass counts as two), both ratios together.
    """

    measure: str
    spearman: Estimate
    kendall: Estimate
    cost: float
    seconds: float


def correlation(kind: Kind, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho or Kendall's tau-b of the rows of ``a`` and ``b``, (..., n); 0 where one side does not vary."""
    if kind == "spearman":
        a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    else:
        a, b = (np.sign(x[..., :, None] - x[..., None, :]).reshape(*x.shape[:-1], -1) for x in (a, b))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def bootstrap(
    truths: Sequence[Losses], predictions: Sequence[Mapping[str, float]], *, kind: Kind = "spearman",
    draws: int = 2000, seed: int = 0,
) -> Estimate:  # fmt: skip
    """The mean rank correlation over truths, with a percentile bootstrap over layers and over seeds.

    One draw takes the same layers and the same seeds of all truths, since these are the same layers at
    another ratio, trained with the same seeds. ``n`` is the number of layers; those whose prediction or truth
    is not finite are left out, and NaN is the answer where fewer than 4 remain. What varies in the prediction
    itself (another network, other images) is not in the interval.
    """
    names = [
        name
        for name in (truths[0].layers if truths else ())
        if all(name in t.layers and np.isfinite(t.runs([name])).all() for t in truths)
        and all(np.isfinite(p.get(name, np.nan)) for p in predictions)
    ]
    if len(names) < 4 or not all(t.seeds for t in truths):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    layers = rng.integers(len(names), size=(draws, len(names)))
    fractions = rng.random((draws, max(len(t.seeds) for t in truths)))
    points, drawn = [], []
    for truth, prediction in zip(truths, predictions, strict=True):
        runs, predicted = truth.runs(names), np.array([prediction[name] for name in names])
        points.append(correlation(kind, runs.mean(1), predicted))
        count = runs.shape[1]
        seeds = (fractions[:, :count] * count).astype(int)
        means = runs[layers[:, :, None], seeds[:, None, :]].mean(-1)
        drawn.append(correlation(kind, means, predicted[layers]))
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return Estimate(float(np.mean(points)), float(low), float(high), len(names))


def reliability(truth: Losses) -> float:
    """The share of the variance between layers' mean losses that is not noise of the runs, in [0, 1].

    From the two-way analysis of variance of layers and seeds; what a seed does to all layers moves no rank.
    Its square root bounds the correlation that a perfect measure could be expected to reach. NaN where there
    are fewer than two seeds or layers.
    """
    runs = truth.runs(list(truth.layers))
    if runs.ndim < 2 or min(runs.shape) < 2:
        return float("nan")
    layers, seeds = runs.shape
    means = runs.mean(1)
    rest = runs - means[:, None] - runs.mean(0) + runs.mean()
    noise = (rest**2).sum() / ((layers - 1) * (seeds - 1)) / seeds
    between = float(means.var(ddof=1))
    return max(0.0, 1 - float(noise) / between) if between else 0.0


def training_cost(config: Mapping[str, Any]) -> float:
    """Forward passes of one image that a training takes; a backward pass counts as two."""
    images = config["images"] or {"cifar10": 50000, "synthetic": 2000}[config["data"]] - config["validation"]
    return 3.0 * images * config["recipe"]["epochs"]


def measured(records: Sequence[Record], truth: Truth) -> list[Record]:
    """The runs whose networks were measured and are compared with a truth: all, or those fine-tuned."""
    return [r for r in records if r.config["variant"] in (("tuned",) if truth == "tuned" else ("ladder", "tuned"))]


def truths_of(records: Sequence[Record], truth: Truth) -> list[Losses]:
    """What every layer loses, by ratio: trained from scratch, or fine-tuned (then of one network after another)."""
    if truth == "tuned":
        return [tuned_losses(r, ratio) for r in measured(records, truth) for ratio in RATIOS]
    return [losses(records, ratio) for ratio in RATIOS]


def agreements(
    records: Sequence[Record], measures: Sequence[str] = (*MEASURES, *TRAINED), *, truth: Truth = "scratch"
) -> list[Agreement]:
    """The measures against a truth, the cheapest first; those that no record holds are left out.

    The truth is what a layer costs after training from scratch (measures are then means over the measured
    networks), or after fine-tuning of the very network that was measured (correlations are then means over those).
    """
    climbs, truths = measured(records, truth), truths_of(records, truth)

    def agreement(name: str, predictions: Sequence[Mapping[str, float]], cost: float, seconds: float) -> Agreement:
        rho, tau = (bootstrap(truths, predictions, kind=kind) for kind in get_args(Kind))
        return Agreement(name, rho, tau, cost, seconds)

    rows = []
    for measure in measures:
        found = tables(climbs, measure)
        if not found or (measure, truth) == ("fine_tuning", "tuned"):
            continue
        cells = [c for t in found for c in t.cells]
        if measure not in ("activation", "taylor", "fisher"):  # these score all layers and ranks in one pass
            shapes = _shapes(climbs)
            cells = [c for c in cells if c.basis_channels in ranks(shapes.get(c.layer, 0))]
        cost = sum(c.forward + 2 * c.backward for c in cells) / len(found)
        seconds = sum(c.seconds for c in cells) / len(found)
        for score in ("value", "kl")[: 1 + measure.startswith("oneshot")]:
            by_ratio = [[values(t, ratio, score) for t in found] for ratio in RATIOS]
            predictions = [mean_values(every) for every in by_ratio]
            if truth == "tuned":
                predictions = [every[i] for i in range(len(found)) for every in by_ratio]
            rows.append(agreement(measure if score == "value" else f"{measure} (KL)", predictions, cost, seconds))
    brief = [losses(records, ratio, short=True) for ratio in RATIOS]
    if "short_training" in measures and all(b.dense and b.layers for b in brief) and truths:
        trained = [r for r in records if r.config["variant"].startswith("short ")]
        cost, seconds = (sum(x) for x in zip(*((training_cost(r.config), r.result["train_seconds"]) for r in trained),
                                             strict=True))  # fmt: skip
        predictions = [b.truth() for b in brief] * (len(truths) // len(RATIOS))
        rows.append(agreement("short_training", predictions, cost, seconds))
    return sorted(rows, key=lambda row: row.cost)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H1 by :data:`RULE`; not before every layer has 2 runs at both ratios."""
    truths = [losses(records, ratio) for ratio in RATIOS]
    listed = {variant.split()[0] for variant in (run.variant for run in plan(profile) if run.plan)} - {"short"}
    complete = all(set(t.layers) >= listed and len(t.seeds) >= 2 and len(t.dense) >= 4 for t in truths)
    row = next((row for row in agreements(records, (RECOMMENDED,)) if row.measure == RECOMMENDED), None)
    if not complete or row is None or row.spearman.n == 0:
        finding = "there are too few runs to compare a sensitivity with full training"
        return (Verdict("H1", profile, "not tested", finding),)
    full = next(r for r in records if r.config["variant"] == "dense")
    share = row.cost / training_cost(full.config)
    label: Label = "partly" if row.spearman.low > 0 else "not reproduced"
    if row.spearman.value >= SPEARMAN and share < COST:
        label = "reproduced"
    networks, seeds = len(tables(records, RECOMMENDED)), min(len(t.seeds) for t in truths)
    ceiling = np.mean([np.sqrt(reliability(t)) for t in truths])
    finding = (
        f"for {SCALES[profile]} {RECOMMENDED} ({networks} measured) correlates with the loss after full training "
        f"({seeds} runs per layer) at Spearman {row.spearman.text()} (95 % interval, {row.spearman.n} layers), where "
        f"the noise of the runs would let a perfect measure reach about {ceiling:.2f}, and takes {share:.1%} of the "
        "passes of one such training"
    )
    return (Verdict("H1", profile, label, finding),)


STUDY = Study(
    name="sensitivity",
    title="Which layers can take it?",
    chapter="04_which_layers",
    claims=("H1",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
