"""Chapter 4: does a cheap sensitivity predict what is left after fine-tuning?

The truth: one layer of a trained network cut, the network trained on briefly, its held-out loss against that of the
uncut network trained on as long. The candidates: every measure of :func:`basis.sensitivity` that trains nothing, taken
of the same networks, and the layers' sizes.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from basis.experiments.runs import Ladder, Record, Run
from basis.experiments.studies.study import Study, Verdict, label_of, training_cost, untested, verdict
from basis.search.table import SEARCHES, SensitivityTable
from basis.statistics import Estimate

RATIOS = (1 / 4, 1 / 16)
TRUTH, SIZE, RECOMMENDED = "fine_tuning", "size", "oneshot_bn"
MEASURES = (SIZE, *SEARCHES)
FACTOR, COST, NEEDED = 0.7, 0.05, 4
FIXED: Mapping[str, Any] = {"variant": "tuned", "test": False}
FIRST_SEED = 200  # no network of another study is measured here
COLUMNS = ("seed", "measure", "ratio", "layer", "value", "cost")


def _runs(base: Run, *, networks: int, images: int = 1000) -> tuple[Run, ...]:
    """Network after network, each trained dense, measured, then fine-tuned layer by layer."""
    tuning = replace(base.recipe, epochs=1, lr=base.recipe.lr / 5)
    measures = dict.fromkeys((*SEARCHES, TRUTH), RATIOS)
    ladder = Ladder(measures=measures, multiple=1, images=images, calibration=images, tuning=tuning)
    return tuple(replace(base, seed=FIRST_SEED + i, ladder=ladder) for i in range(networks))


def cells(records: Sequence[Record]) -> pd.DataFrame:
    """A row a network (``seed``), ``measure``, ``ratio`` of the truth and ``layer``, of the networks fine-tuned.

    ``value``: the sensitivity; of "size", minus the layer's parameters, since the smallest is expected to suffer most.
    ``cost``: passes as a share of one training's, see :func:`training_cost`.
    """
    rows: list[tuple[Any, ...]] = []
    for record in records:
        if record.config["variant"] != FIXED["variant"]:
            continue
        found = {name: SensitivityTable.from_lines(lines) for name, lines in record.result["tables"].items()}
        seed, full = record.config["seed"], training_cost(record.config)
        for ratio in record.config["ladder"]["measures"][TRUTH]:
            sizes = {layer.name: layer.cost(layer.out_channels)["params"] for layer in found[TRUTH].layers}
            rows += [(seed, SIZE, ratio, name, -float(size or 0), 0.0) for name, size in sizes.items()]
            for measure, table in found.items():
                for name, c in table.at(ratio).items():
                    passes = (c.forward + 2 * c.backward) / full if c else 0.0
                    rows += [(seed, measure, ratio, name, c.value, passes)] if c else []
    return pd.DataFrame(rows, columns=list(COLUMNS))


def means(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The mean over networks of :func:`cells`, a row a ratio and a column a layer; NaN where one of them diverged."""
    own = frame[frame["measure"] == measure]
    found = own.groupby(["ratio", "layer"])["value"].agg(lambda values: values.mean(skipna=False))
    return found.unstack().sort_index(ascending=False)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the rows of ``a`` and ``b``, (..., n); 0 where one side does not vary."""
    a, b = (stats.rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def agreement(truth: pd.DataFrame, said: pd.DataFrame, other: pd.DataFrame | None = None) -> Estimate:
    """Spearman's correlation over layers, mean of the ratios, of what a measure ``said``; minus that of the ``other``.

    All are :func:`means`. The 95 % interval is a BCa bootstrap over layers (Efron 1987). Noise that is each layer's own
    is drawn with the layers. ``n`` is the number of layers that are finite in all; with fewer than 4 there is no value.
    """
    both = pd.concat([truth, said] if other is None else [truth, said, other], join="inner")
    rows, ratios = both.dropna(axis=1).to_numpy(dtype=float), len(truth)
    if rows.shape[1] < 4:
        return Estimate(math.nan, math.nan, math.nan, 0)

    def statistic(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        first, *others = (np.stack(drawn[i : i + ratios]) for i in range(0, len(drawn), ratios))
        found = [correlation(first, one).mean(0) for one in others]
        return found[0] if len(found) == 1 else found[0] - found[1]

    value, how = float(statistic(*rows)), {"paired": True, "vectorized": True, "n_resamples": 2000, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where no draw differs, there is no interval: it is the value
        ends = stats.bootstrap(tuple(rows), statistic, **how).confidence_interval
    low, high = np.nan_to_num([ends.low, ends.high], nan=value)
    return Estimate(value, float(low), float(high), rows.shape[1])


def ceiling(frame: pd.DataFrame) -> float:
    """What the noise of the truth lets a perfect measure reach: sqrt(reliability of the layers' mean ranks).

    The reliability is the share of their variance that is not noise, by a two-way analysis of variance of networks and
    layers; the mean of the ratios. NaN below two networks.
    """
    found = []
    for _, side in frame[frame["measure"] == TRUTH].groupby("ratio"):
        ranks = side.pivot(index="seed", columns="layer", values="value").dropna(axis=1).rank(axis=1).to_numpy()
        if min(ranks.shape) < 2:
            return math.nan
        noise = ranks - ranks.mean(0) - ranks.mean(1, keepdims=True) + ranks.mean()
        error = float((noise**2).sum()) / (ranks.shape[0] - 1) / (ranks.shape[1] - 1) / len(ranks)
        between = float(ranks.mean(0).var(ddof=1))
        found.append(math.sqrt(max(0.0, 1 - error / between)) if between else 0.0)
    return float(np.mean(found)) if found else math.nan


def agreements(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a measure, the cheapest first: ``spearman`` with the truth, ``cost`` of both ratios."""
    truth, networks, rows = means(frame, TRUTH), frame["seed"].nunique(), []
    for measure, own in frame[frame["measure"] != TRUTH].groupby("measure", sort=False):
        rows.append((measure, agreement(truth, means(frame, str(measure))), float(own["cost"].sum()) / networks))
    found = pd.DataFrame(rows, columns=["measure", "spearman", "cost"])
    return found.sort_values("cost", kind="stable", ignore_index=True)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on H1."""
    frame = cells(records)
    if (networks := frame["seed"].nunique()) < NEEDED:
        return (untested("H1", profile, networks, NEEDED),)
    truth, said = means(frame, TRUTH), means(frame, RECOMMENDED)
    one, top = agreement(truth, said), ceiling(frame)
    share = float(frame.loc[frame["measure"] == RECOMMENDED, "cost"].sum()) / networks
    goal = FACTOR * top
    label = label_of(one.low > goal and share < COST, one.high < goal or share >= COST)
    found = verdict(
        "H1", profile, label, scale=STUDY.scale(profile), spearman=one.text(), layers=one.n, share=share, goal=goal,
        ceiling=top, size=agreement(truth, said, means(frame, SIZE)).text(signed=True),
    )  # fmt: skip
    over = Estimate(one.value - goal, one.low - goal, one.high - goal, networks)
    return (replace(found, difference=f"correlation {over.text(signed=True)} over the goal", n=networks),)


STUDY = Study.named(
    "sensitivity", _runs, judge, FIXED, recommended=RECOMMENDED, factor=FACTOR, cost=COST, needed=NEEDED
)
