"""Means, proportions and differences with 95 % intervals, for small numbers of independent runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval; ``low`` and ``high`` are NaN where n is too small for one."""

    value: float
    low: float
    high: float
    n: int

    @property
    def support(self) -> str:
        """What the interval rests on, such as ``95 % interval, n = 3``."""
        return f"n = {self.n}" if math.isnan(self.low) else f"95 % interval, n = {self.n}"

    def text(self, *, scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
        """Such as ``1.24 [0.98, 1.50]``, all three multiplied by ``scale``."""
        sign = "+" if signed else ""
        value, low, high = (f"{scale * x:{sign}.{digits}f}" for x in (self.value, self.low, self.high))
        return value if math.isnan(self.low) else f"{value} [{low}, {high}]"

    def gap(self) -> str:
        """A difference in points in words, such as ``1.24 [0.98, 1.50] points above`` (something)."""
        if math.isnan(self.value):
            return "an unknown number of points from"
        if self.value >= 0:
            return f"{self.text()} points above"
        return f"{Estimate(-self.value, -self.high, -self.low, self.n).text()} points below"


def mean_estimate(values: Sequence[float], *, comparisons: int = 1) -> Estimate:
    """The mean with Student's interval; of ``comparisons`` such intervals that hold together with 95 % (Bonferroni).

    Raises ``ValueError`` for no values.
    """
    from scipy import stats

    if not (n := len(values)):
        raise ValueError("there are no values to take a mean of")
    mean = float(np.mean(values))
    half = stats.t.ppf(1 - 0.025 / comparisons, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, float(mean - half), float(mean + half), n)


def proportion_estimate(successes: float, n: int) -> Estimate:
    """The share ``successes / n`` with Wilson's score interval (1927); ``ValueError`` where there can be no such."""
    from scipy import stats

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials make no proportion")
    interval = stats.binomtest(int(successes), n).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def paired_difference(
    first: Mapping[int, float] | pd.Series, second: Mapping[int, float] | pd.Series, *, comparisons: int = 1
) -> Estimate:
    """The mean of first - second over the keys (seeds) that both have, with Student's interval; NaN without any."""
    common = [key for key in first.keys() if key in second.keys()]  # noqa: SIM118  (of a pandas Series, too)
    if not common:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return mean_estimate([first[key] - second[key] for key in common], comparisons=comparisons)


def detectable(spread: float, n: int, *, comparisons: int = 1) -> float:
    """The smallest true difference that n pairs show with 80 % power; ``spread``: a difference's standard deviation.

    Two-sided, at 5 % over all ``comparisons``; by the normal approximation with Student's quantiles.
    """
    from scipy import stats

    quantiles = stats.t.ppf([1 - 0.025 / comparisons, 0.8], n - 1)
    return float(quantiles.sum() * spread / math.sqrt(n))
