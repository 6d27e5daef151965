"""Score your own way of ranking layers against what full training lost, without training anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pandas as pd

from basis.experiments.runs import PROFILES, Record
from basis.experiments.studies import STUDIES, valid_records
from basis.experiments.studies.sensitivity import RATIOS, Kind, Losses, Truth, agreements, bootstrap, truths_of
from basis.search.table import SensitivityTable
from basis.statistics import Estimate

Scores = Mapping[str, float] | Mapping[tuple[str, float], float] | Sequence[str] | pd.Series | SensitivityTable


def truth_records(profile: str) -> list[Record]:
    """The committed runs that hold the truth of chapter 4.

    Raises:
        ValueError: for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile is {profile!r}, but it must be one of {', '.join(PROFILES)}")
    return valid_records(STUDIES["sensitivity"], profile)


def score(
    scores: Scores,
    *,
    truth: Truth = "scratch",
    profile: str = "cpu",
    records: Sequence[Record] | None = None,
    beside: bool = True,
) -> pd.DataFrame:
    """Rank correlations of your scores with what each layer lost in training, beside those of our measures.

    Args:
        scores: how much each 3x3 convolution would suffer, larger for worse, in any unit: layer -> value;
            (layer, ratio) -> value, with the ratios 1/8 and 1/32 of the truth; a pandas Series of values whose
            index is either; a :class:`basis.SensitivityTable`; or layers alone, in order from the least to the most
            sensitive. Further layers are ignored.
        truth: what a layer loses after training from scratch ("scratch"), or after fine-tuning ("tuned").
        profile: whose truth, "cpu" or "paper".
        records: of the study "sensitivity"; default: the committed ones.
        beside: whether our measures are put beside them.

    Returns:
        One row per measure, "yours" first, then ours from cheap to dear: ``spearman`` and ``kendall`` (means over
        the two ratios), each with the ends of its 95 % bootstrap interval (``_low``, ``_high``), and ``layers``,
        on how many it rests. The statistics are those of chapter 4 (:func:`basis.experiments.studies.sensitivity.bootstrap`).

    Raises:
        ValueError: where the truth has not been measured yet, where scores are missing, repeated or not finite, or
            where layers alone are a set, which has no order.
    """
    if truth not in get_args(Truth):
        raise ValueError(f"truth is {truth!r}, but it must be one of {', '.join(get_args(Truth))}")
    records = truth_records(profile) if records is None else records
    truths = truths_of(records, truth)
    layers = list(truths[0].layers) if truths else []
    layers = [name for name in layers if all(name in one.layers for one in truths)]
    if len(layers) < 4:
        raise ValueError(f"the truth {truth!r} of the profile {profile!r} holds {len(layers)} layers, too few to rank")
    scores = _ordered(scores)
    predictions = [_values(scores, ratio, layers) for ratio in RATIOS]
    rows = [_row("yours", *_correlations(truths, predictions * (len(truths) // len(RATIOS))))]
    if beside:
        rows += [_row(one.measure, one.spearman, one.kendall) for one in agreements(records, truth=truth)]
    return pd.DataFrame(rows)


def _correlations(truths: Sequence[Losses], predictions: Sequence[Mapping[str, float]]) -> list[Estimate]:
    return [bootstrap(truths, predictions, kind=kind) for kind in get_args(Kind)]


def _row(name: str, spearman: Estimate, kendall: Estimate) -> dict[str, object]:
    row: dict[str, object] = {"measure": name}
    for kind, found in (("spearman", spearman), ("kendall", kendall)):
        row |= {kind: found.value, f"{kind}_low": found.low, f"{kind}_high": found.high}
    return row | {"layers": spearman.n}


def _ordered(scores: Scores) -> Scores:
    """The scores as they are, but a Series as what it stands for; a set is refused."""
    if isinstance(scores, (set, frozenset)):
        raise ValueError("the layers are a set, which has no order; give a list, from the least to the most sensitive")
    if not isinstance(scores, pd.Series):
        return scores
    if all(isinstance(value, str) for value in scores):
        return list(scores)
    if not scores.index.is_unique:
        raise ValueError(f"the Series of scores has {scores.index[scores.index.duplicated()][0]} more than once")
    found: dict[Any, float] = scores.to_dict()
    return found


def _values(scores: Scores, ratio: float, layers: Sequence[str]) -> dict[str, float]:
    """The score of every layer at one ratio."""
    if isinstance(scores, SensitivityTable):
        found = {name: cell.value for name, cell in scores.at(ratio).items() if cell is not None}
    elif isinstance(scores, Mapping):
        found = {}
        for key, value in scores.items():
            name, at = key if isinstance(key, tuple) else (key, ratio)
            if math.isclose(at, ratio):
                found[name] = float(value)
    else:
        names = list(scores)
        if len(set(names)) < len(names):
            raise ValueError("a ranking names every layer once, from the least to the most sensitive")
        found = {name: float(place) for place, name in enumerate(names)}
    absent = [name for name in layers if name not in found]
    if absent:
        raise ValueError(f"scores for r = 1/{1 / ratio:.0f} lack {len(absent)} of {len(layers)} layers: "
                         f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}")  # fmt: skip
    strange = [name for name in layers if not math.isfinite(found[name])]
    if strange:
        raise ValueError(f"the score of {strange[0]} is {found[strange[0]]}, but all must be finite to be ranked")
    return {name: found[name] for name in layers}
