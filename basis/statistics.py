"""Means, proportions and differences with 95 % intervals, for small numbers of independent runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


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


def difference_estimate(first: Sequence[float], second: Sequence[float], *, comparisons: int = 1) -> Estimate:
    """mean(first) - mean(second) with Welch's interval; n is the smaller of the two numbers of runs.

    Runs are independent even at equal seeds (Jordan 2023, arXiv 2304.01910), so nothing is paired. With
    ``comparisons`` > 1 it is one of that many intervals that hold together with 95 % (Bonferroni).
    """
    from scipy import stats

    if not len(first) or not len(second):
        raise ValueError("a difference needs runs on both sides")
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    value, n = float(a.mean() - b.mean()), min(len(a), len(b))
    if n < 2:
        return Estimate(value, math.nan, math.nan, n)
    if a.std() + b.std() == 0:  # no spread at all, where Welch's degrees of freedom are 0 / 0
        return Estimate(value, value, value, n)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 0.05 / comparisons)
    return Estimate(value, float(interval.low), float(interval.high), n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float], *, comparisons: int = 1) -> Estimate:
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


@dataclass(frozen=True)
class Spread:
    """The standard deviation between equal runs, pooled over variants of few runs each, and its degrees of freedom."""

    value: float
    freedom: int

    def mean(self, values: Sequence[float]) -> Estimate:
        """The mean of one variant, with the interval that this spread gives it."""
        return self.contrast([(1, values)])

    def difference(self, first: Sequence[float], second: Sequence[float], *, comparisons: int = 1) -> Estimate:
        """mean(first) - mean(second) with its interval; n is the smaller of the two numbers of runs."""
        return self.contrast([(1, first), (-1, second)], comparisons=comparisons)

    def contrast(self, variants: Sequence[tuple[float, Sequence[float]]], *, comparisons: int = 1) -> Estimate:
        """The sum of weight x mean over the variants, with Student's interval; see :func:`difference_estimate`."""
        from scipy import stats

        value = float(sum(weight * np.mean(values) for weight, values in variants))
        error = self.value * math.sqrt(sum(weight**2 / len(values) for weight, values in variants))
        half = float(stats.t.ppf(1 - 0.025 / comparisons, self.freedom)) * error if self.freedom else math.nan
        return Estimate(value, value - half, value + half, min(len(values) for _, values in variants))


def pooled_spread(variants: Iterable[Sequence[float]]) -> Spread:
    """The spread within variants; a variant of one run adds nothing to it."""
    runs = [np.asarray(values, dtype=float) for values in variants if len(values) > 1]
    freedom = sum(len(values) - 1 for values in runs)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in runs)
    return Spread(math.sqrt(squares / freedom) if freedom else math.nan, freedom)
