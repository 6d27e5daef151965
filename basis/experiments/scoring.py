"""Score your own way of ranking layers against what fine-tuning left, without training anything."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from basis.environment import stored_results
from basis.experiments.runs import Record
from basis.experiments.studies import gather
from basis.experiments.studies.sensitivity import TRUTH, agreement, agreements, cells, means

Scores = Mapping[str, float] | Mapping[tuple[str, float], float]


def score(
    scores: Scores, *, profile: str = "auto", records: Sequence[Record] | None = None, beside: bool = True
) -> pd.DataFrame:
    """Rank correlations of your scores with what each layer lost, beside those of our measures.

    Args:
        scores: how much each convolution would suffer, larger for worse, in any unit: layer -> value or
            (layer, ratio) -> value, with the two ratios of the truth. Further layers are ignored.
        profile: whose truth, as :func:`basis.experiments.studies.gather` takes it.
        records: of the study "sensitivity"; default: the committed ones.
        beside: whether our measures are put beside them.

    Returns:
        One row per measure, "yours" first, then ours from cheap to dear: ``spearman`` (mean over the two ratios)
        with the ends of its 95 % bootstrap interval, and ``layers``, on how many it rests. The statistics are those
        of chapter 4.

    Raises:
        ValueError: for an unknown profile, scores that are missing or not finite, and where no records are.
    """
    records = gather("sensitivity", profile, folder=stored_results()).records if records is None else records
    frame = cells(records)
    truth = means(frame, TRUTH)
    if len(truth.columns) < 4:
        raise ValueError(f"the truth of the profile {profile!r} holds {len(truth.columns)} layers, too few to rank")
    own = pd.DataFrame([_values(scores, ratio, list(truth.columns)) for ratio in truth.index])
    found = {"yours": agreement(truth, own)}
    found |= dict(agreements(frame)[["measure", "spearman"]].itertuples(index=False)) if beside else {}
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
