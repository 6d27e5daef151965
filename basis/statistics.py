"""Means and differences with 95 % intervals, for small numbers of independent runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


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


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean with Student's interval. Raises ``ValueError`` for no values."""
    if not len(values):
        raise ValueError("there are no values to take a mean of")
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan, math.nan, len(x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def difference_estimate(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """mean(first) - mean(second) with Welch's interval; n is the smaller of the two numbers of runs.

    Runs are independent even at equal seeds (Jordan 2023, arXiv 2304.01910), so nothing is paired.
    """
    if not len(first) or not len(second):
        raise ValueError("a difference needs runs on both sides")
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    value, n = float(a.mean() - b.mean()), min(len(a), len(b))
    if n < 2:
        return Estimate(value, math.nan, math.nan, n)
    if a.std() + b.std() == 0:  # no spread at all, where Welch's degrees of freedom are 0 / 0
        return Estimate(value, value, value, n)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return Estimate(value, float(interval.low), float(interval.high), n)
