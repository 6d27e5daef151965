"""Intervals against textbook values, and the verdict of C1 on made-up sizes."""

import math

import numpy as np
import pytest
from scipy import stats

from basis.experiments.runs import Record
from basis.experiments.studies import headline
from basis.statistics import difference_estimate, mean_estimate, pooled_spread


def test_students_interval():
    # t(0.975, 4) = 2.776445; standard error of 1..5 is sqrt(2.5 / 5)
    estimate = mean_estimate([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(0.5)
    assert (estimate.value, estimate.n) == (3, 5)
    assert estimate.low == pytest.approx(3 - half, rel=1e-6)
    assert estimate.high == pytest.approx(3 + half, rel=1e-6)


def test_welchs_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        e = difference_estimate(rng.normal(1.0, 0.1, 3), rng.normal(0.0, 0.5, 8))
        hits += e.low < 1.0 < e.high
    assert 460 <= hits <= 492


def test_one_value_has_no_interval():
    assert math.isnan(mean_estimate([1.0]).low)
    assert math.isnan(difference_estimate([1.0], [2.0, 3.0]).high)
    assert mean_estimate([1.0]).text() == "1.00"
    assert mean_estimate([1.0]).support == "n = 1"
    assert mean_estimate([1.0, 2.0]).support == "95 % interval, n = 2"
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])


def test_text_shows_the_interval():
    assert difference_estimate([0.9, 0.92], [0.8, 0.82]).text(scale=100, digits=1, signed=True) == "+10.0 [+3.9, +16.1]"


def records(dense, basis, size=0.5):
    def record(variant, seed, accuracy, parameters):
        config = {"study": "headline", "profile": "small", "variant": variant, "seed": seed}
        test = {"accuracy": accuracy, "accuracy_flip": accuracy}
        result = {"test": test, "parameters": parameters, "macs": parameters, "train_seconds": 1.0, "curves": []}
        return Record(f"{variant}{seed}", config, result, {"device": "test"}, "")

    uniform = headline.variant("uniform", headline.HALF)
    variants = [("dense", dense, 1000), (uniform, basis, round(1000 * size))]
    return [record(variant, i, a, p) for variant, values, p in variants for i, a in enumerate(values)]


@pytest.mark.parametrize(
    ("size", "label"), [(0.5, "by construction"), (0.52, "by construction"), (0.54, "not reproduced")]
)
def test_the_rule_for_c1(size, label):
    assert headline.judge(records([0.9], [0.8], size), "small")[0].label == label


def test_a_pooled_spread_agrees_with_students_interval_for_one_variant_and_ignores_single_runs():
    values = [1.0, 2.0, 4.0]
    spread = pooled_spread([values, [100.0]])
    assert spread.freedom == 2
    alone, pooled = mean_estimate(values), spread.mean(values)
    assert (pooled.low, pooled.high) == pytest.approx((alone.low, alone.high))


def test_a_pooled_difference_is_that_of_the_test_with_equal_variances():
    a, b = [1.0, 2.0, 4.0], [3.0, 3.5, 7.0, 9.0]
    found = pooled_spread([a, b]).difference(a, b)
    expected = stats.ttest_ind(a, b, equal_var=True).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
