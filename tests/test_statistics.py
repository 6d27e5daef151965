"""Intervals against textbook values, and the verdict of C1 on made-up sizes."""

import math

import numpy as np
import pytest

from basis.experiments.runs import Record
from basis.experiments.studies import headline
from basis.statistics import Estimate, detectable, mean_estimate, paired_difference


def test_students_interval():
    # t(0.975, 4) = 2.776445; standard error of 1..5 is sqrt(2.5 / 5)
    estimate = mean_estimate([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(0.5)
    assert (estimate.value, estimate.n) == (3, 5)
    assert estimate.low == pytest.approx(3 - half, rel=1e-6)
    assert estimate.high == pytest.approx(3 + half, rel=1e-6)


def test_of_eight_pairs_the_detectable_difference_is_seen_four_times_in_five():
    rng = np.random.default_rng(0)
    gaps = rng.normal(detectable(1.0, 8), 1.0, (1000, 8))
    assert np.mean([mean_estimate(one).low > 0 for one in gaps]) == pytest.approx(0.8, abs=0.06)
    assert detectable(1.0, 8, comparisons=5) > detectable(1.0, 8) > detectable(1.0, 16)


def test_differences_are_paired_by_key_and_hold_together():
    first, second = {0: 5.0, 1: 7.0, 2: 9.0, 9: 100.0}, {0: 4.0, 1: 5.0, 2: 6.0}
    alone, one_of_four = (paired_difference(first, second, comparisons=c) for c in (1, 4))
    assert (alone.value, alone.n) == (2.0, 3)
    # t(0.975, 2) = 4.302653, t(1 - 0.025 / 4, 2) = 8.860; the standard error is 1 / sqrt(3)
    assert alone.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert one_of_four.high == pytest.approx(2 + 8.8602 / math.sqrt(3), rel=1e-4)
    assert math.isnan(paired_difference(first, {}).value)


def test_one_value_has_no_interval():
    assert math.isnan(mean_estimate([1.0]).low)
    assert mean_estimate([1.0]).text() == "1.00"
    assert mean_estimate([1.0]).support == "n = 1"
    assert mean_estimate([1.0, 2.0]).support == "95 % interval, n = 2"
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])


def test_a_difference_in_words():
    assert Estimate(1.0, 0.5, 1.5, 8).gap() == "1.00 [0.50, 1.50] points above"
    assert Estimate(-1.0, -1.5, 0.5, 8).gap() == "1.00 [-0.50, 1.50] points below"
    assert "unknown" in paired_difference({}, {}).gap()


def records(dense, basis, size=0.5):
    def record(variant, seed, accuracy, parameters):
        config = {"study": "headline", "profile": "small", "variant": variant, "seed": seed, "model": "resnet18"}
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
