"""Score your own way of ranking layers against what full training lost, without training anything."""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import pandas as pd

from basis.environment import stored_results
from basis.experiments.runs import PROFILES, Record
from basis.experiments.studies import STUDIES, valid_records
from basis.experiments.studies.sensitivity import RATIOS, Truth, agreements, bootstrap, truths_of
from basis.numbers import one_of

Scores = Mapping[str, float] | Mapping[tuple[str, float], float]


def score(
    scores: Scores, *, truth: Truth = "scratch", profile: str = "cpu", records: Sequence[Record] | None = None,
    beside: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Rank correlations of your scores with what each layer lost in training, beside those of our measures.

    Args:
        scores: how much each 3x3 convolution would suffer, larger for worse, in any unit: layer -> value or
            (layer, ratio) -> value, with the ratios 1/8 and 1/32 of the truth. Further layers are ignored.
        truth: what a layer loses after training from scratch ("scratch"), or after fine-tuning ("tuned").
        profile: whose truth, "cpu" or "paper".
        records: of the study "sensitivity"; default: the committed ones.
        beside: whether our measures are put beside them.

    Returns:
        One row per measure, "yours" first, then ours from cheap to dear: ``spearman`` (mean over the two ratios)
        with the ends of its 95 % bootstrap interval, and ``layers``, on how many it rests. The statistics are those
        of chapter 4.

    Raises:
        ValueError: for an unknown or unmeasured truth, scores that are missing or not finite, and where no records are.
    """
    one_of("truth", truth, get_args(Truth))
    one_of("profile", profile, PROFILES)
    records = valid_records(STUDIES["sensitivity"], profile, stored_results()) if records is None else records
    truths = truths_of(records, truth)
    layers = [name for name in (truths[0].layers if truths else ()) if all(name in one.layers for one in truths)]
    if len(layers) < 4:
        raise ValueError(f"the truth {truth!r} of the profile {profile!r} holds {len(layers)} layers, too few to rank")
    predictions = [_values(scores, ratio, layers) for ratio in RATIOS] * (len(truths) // len(RATIOS))
    found = {"yours": bootstrap(truths, predictions)}
    found |= {row.measure: row.spearman for row in (agreements(records, truth=truth) if beside else ())}
    columns = ["measure", "spearman", "spearman_low", "spearman_high", "layers"]
    return pd.DataFrame([(name, one.value, one.low, one.high, one.n) for name, one in found.items()], columns=columns)


def _values(scores: Scores, ratio: float, layers: Sequence[str]) -> dict[str, float]:
    """The score of every layer at one ratio."""
    pairs = [(key if isinstance(key, tuple) else (key, ratio), value) for key, value in scores.items()]
    found = {name: float(value) for (name, at), value in pairs if math.isclose(at, ratio)}
    if absent := [name for name in layers if name not in found]:
        raise ValueError(f"scores for r = {ratio:g} lack {len(absent)} of {len(layers)} layers: {', '.join(absent)}")
    if strange := [name for name in layers if not math.isfinite(found[name])]:
        raise ValueError(f"the score of {strange[0]} is {found[strange[0]]}, but all must be finite to be ranked")
    return {name: found[name] for name in layers}
