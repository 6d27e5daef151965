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

from basis.conv import basis_channels_for
from basis.models import build
from basis.runs import Ladder, Record, Run
from basis.statistics import Estimate, Spread, pooled_spread
from basis.studies.study import Label, Study, Verdict
from basis.table import SensitivityTable
from basis.training import Recipe

Kind = Literal["spearman", "kendall"]
Truth = Literal["scratch", "tuned"]

RATIOS = (1 / 8, 1 / 32)
NAMES = {1 / 2: "r=1/2", 1 / 4: "r=1/4", 1 / 8: "r=1/8", 1 / 32: "r=1/32"}
MEASURES = ("spectrum", "activation", "taylor", "fisher", "oneshot", "oneshot_bn")
TRAINED = ("fine_tuning", "short_training")
RECOMMENDED = "oneshot_bn"
SPEARMAN, COST = 0.8, 0.05
NETWORKS = {
    "smoke": "the smoke test's tiny network on synthetic images",
    "cpu": "the CPU-scale network",
    "colab": "a thin ResNet-18, briefly trained,",
    "paper": "ResNet-18",
}

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
    return Run(study="sensitivity", profile=profile, arm="dense", seed=0, test=False, **settings)


def _runs(
    base: Run, *, dense: int, networks: int, seeds: int, short: Recipe, ratios: tuple[float, ...],
    layers: int | None = None, images: int = 2000,
) -> tuple[Run, ...]:  # fmt: skip
    ladder = Ladder(measures=dict.fromkeys(MEASURES, ratios), multiple=1, images=images, calibration=images // 2)
    # Sensitivities come from networks of their own: no run is on both sides of a correlation.
    # All but the first are fine-tuned too, layer by layer: a second truth, of the very network that was measured.
    tuning = replace(short, lr=short.lr / 5)
    tuned = replace(ladder, measures={**ladder.measures, "fine_tuning": RATIOS}, tuning=tuning)
    climbs = [replace(base, arm="ladder", seed=dense, ladder=ladder)]
    climbs += [replace(base, arm="tuned", seed=dense + i, ladder=tuned) for i in range(1, networks)]
    cells = list(alone(base, layers))
    truths = [[replace(base, arm=arm, seed=seed, plan=p) for arm, p in cells] for seed in range(seeds)]
    brief = replace(base, recipe=short)
    shorts = [
        replace(brief, arm=f"short {arm}", seed=seed, plan=p)
        for seed in range(20, 22)  # other seeds than the truth's, whose first epochs would be the same
        for arm, p in [("dense", None), *cells]
    ]
    noise = [replace(base, seed=seed) for seed in range(dense)]
    return (*noise, *climbs[:1], *(r for t in truths[:2] for r in t), *climbs[1:], *shorts,
            *(r for t in truths[2:] for r in t))  # fmt: skip


def alone(base: Run, layers: int | None = None) -> Mapping[str, Mapping[str, int]] | Any:
    """Arms and plans with one 3x3 convolution made basis; equal plans at both ratios are one arm."""
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
    """Final losses on held-out images: of the dense runs, and of every layer alone at one ratio."""

    dense: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]

    def truth(self) -> dict[str, float]:
        """Layer -> what it loses on average."""
        return {name: float(np.mean(values) - np.mean(self.dense)) for name, values in self.layers.items()}

    @property
    def spread(self) -> Spread:
        """The standard deviation between equal trainings, pooled over all arms."""
        return pooled_spread([self.dense, *self.layers.values()])

    def estimate(self, layer: str) -> Estimate:
        """What ``layer`` loses, with an interval from the pooled spread, since two runs alone tell little."""
        return self.spread.difference(self.layers[layer], self.dense)


def losses(records: Sequence[Record], ratio: float, *, short: bool = False, metric: str = "loss") -> Losses:
    """The losses at one ratio of the layers that have at least 2 runs; ``short``: of the short trainings.

    With ``metric="accuracy"``: errors, 1 - accuracy, so that larger is worse as well.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        value = record.result["validation"][metric]
        found.setdefault(record.config["arm"], []).append(1 - value if metric == "accuracy" else value)
    prefix = "short " if short else ""
    layers: dict[str, tuple[float, ...]] = {}
    if records:
        config = records[0].config
        for name, out_channels in convolutions(config["model"], config["width"]).items():
            values = found.get(f"{prefix}{name} k={basis_channels_for(ratio, out_channels)}", [])
            if len(values) >= 2:
                layers[name] = tuple(values)
    return Losses(tuple(found.get(f"{prefix}dense", ())), layers)


def tuned_losses(record: Record, ratio: float) -> Losses:
    """What each 3x3 layer costs after fine-tuning one network, against the dense network tuned as long."""
    table = SensitivityTable.from_lines(record.result["tables"]["fine_tuning"])
    square = convolutions(record.config["model"], record.config["width"])
    return Losses((0.0,), {name: (value,) for name, value in values(table, ratio).items() if name in square})


def tables(records: Sequence[Record], measure: str) -> list[SensitivityTable]:
    """One table for each measured network."""
    found = [r.result["tables"] for r in records if r.config["arm"] in ("ladder", "tuned")]
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
    """The mean rank correlation over ratios, with a percentile bootstrap over layers and over runs.

    ``n`` is the number of layers. NaN where there is nothing to correlate. The dense runs shift all layers
    alike and do not touch a rank correlation at one ratio, so they are not drawn.
    """
    rng = np.random.default_rng(seed)
    points, drawn, counts = [], [], []
    for truth, prediction in zip(truths, predictions, strict=True):
        names = [name for name in truth.layers if np.isfinite(prediction.get(name, np.nan))]
        if len(names) < 4:
            return Estimate(float("nan"), float("nan"), float("nan"), 0)
        runs, predicted = [np.array(truth.layers[n]) for n in names], np.array([prediction[n] for n in names])
        points.append(correlation(kind, np.array([r.mean() for r in runs]), predicted))
        means = np.stack([rng.choice(r, (draws, len(names), len(r))).mean(-1) for r in runs], axis=-1)
        chosen = rng.integers(len(names), size=(draws, len(names)))
        # Every time that a layer is drawn, its runs are drawn anew.
        truth_drawn = means[np.arange(draws)[:, None], np.arange(len(names)), chosen]
        drawn.append(correlation(kind, truth_drawn, predicted[chosen]))
        counts.append(len(names))
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return Estimate(float(np.mean(points)), float(low), float(high), min(counts))


def reliability(truth: Losses) -> float:
    """The share of the variance between layers' mean losses that is not noise of the runs, in [0, 1].

    From the two-way analysis of variance of layers and seeds (every layer was trained with the same seeds, so
    that what a seed does to all of them moves no rank). Its square root bounds the correlation that a perfect
    measure could be expected to reach. NaN where there are fewer than two runs or layers.
    """
    seeds = min(map(len, truth.layers.values()), default=0)
    if seeds < 2 or len(truth.layers) < 2:
        return float("nan")
    runs = np.array([values[:seeds] for values in truth.layers.values()])
    means = runs.mean(1)
    rest = runs - means[:, None] - runs.mean(0) + runs.mean()
    noise = (rest**2).sum() / ((len(runs) - 1) * (seeds - 1)) / seeds
    between = float(means.var(ddof=1))
    return max(0.0, 1 - float(noise) / between) if between else 0.0


def training_cost(config: Mapping[str, Any]) -> float:
    """Forward passes of one image that a training takes; a backward pass counts as two."""
    images = config["images"] or {"cifar10": 50000, "synthetic": 2000}[config["data"]] - config["validation"]
    return 3.0 * images * config["recipe"]["epochs"]


def agreements(
    records: Sequence[Record], measures: Sequence[str] = (*MEASURES, *TRAINED), *, truth: Truth = "scratch"
) -> list[Agreement]:
    """The measures against a truth, the cheapest first; those that no record holds are left out.

    The truth is what a layer costs after training from scratch (measures are then means over the measured
    networks), or after fine-tuning of the very network that was measured (correlations are then means over those).
    """
    climbs = [r for r in records if r.config["arm"] in (("tuned",) if truth == "tuned" else ("ladder", "tuned"))]
    if truth == "tuned":
        truths = [tuned_losses(r, ratio) for r in climbs for ratio in RATIOS]
    else:
        truths = [losses(records, ratio) for ratio in RATIOS]

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
            shapes = convolutions(climbs[0].config["model"], climbs[0].config["width"])
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
        trained = [r for r in records if r.config["arm"].startswith("short ")]
        cost, seconds = (sum(x) for x in zip(*((training_cost(r.config), r.result["train_seconds"]) for r in trained),
                                             strict=True))  # fmt: skip
        predictions = [b.truth() for b in brief] * (len(truths) // len(RATIOS))
        rows.append(agreement("short_training", predictions, cost, seconds))
    return sorted(rows, key=lambda row: row.cost)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H1 by :data:`RULE`."""
    truths = [losses(records, ratio) for ratio in RATIOS]
    row = next((row for row in agreements(records, (RECOMMENDED,)) if row.measure == RECOMMENDED), None)
    if row is None or row.spearman.n == 0 or min(len(t.dense) for t in truths) < 4:
        finding = "there are too few runs to compare a sensitivity with full training"
        return (Verdict("H1", profile, "not tested", finding),)
    full = next(r for r in records if r.config["arm"] == "dense")
    share = row.cost / training_cost(full.config)
    label: Label = "partly" if row.spearman.low > 0 else "not reproduced"
    if row.spearman.value >= SPEARMAN and share < COST:
        label = "reproduced"
    finding = (
        f"for {NETWORKS[profile]} {RECOMMENDED} correlates with the loss after full training at Spearman "
        f"{row.spearman.text()} (95 % interval, {row.spearman.n} layers) and takes {share:.1%} of the passes "
        "of one full training"
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
