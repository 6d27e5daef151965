"""Networks chosen for milliseconds, measured."""

import pytest

from basis.bench.timing import BenchReport, Setting
from basis.experiments.budget_bench import bench_budget
from basis.search.selection import InfeasibleBudget

TINY = {"model": "resnet20", "width": 16, "ratios": (1 / 2, 1 / 8)}
SETTING = Setting(device="cpu", precision="fp32", batch_size=2, rounds=3)


def times(report, *, thin, thick=1.0):
    """The report as if every layer's candidates took ``thin`` of its dense time."""
    rows = [row | {"ms": row["dense_ms"] * (thick if row["mode"] == "control" else thin)} for row in report.rows]
    return BenchReport(kind=report.kind, config=report.config, environment=report.environment, rows=rows)


@pytest.fixture
def layers_take(monkeypatch):
    """Let every layer alone take so much of its dense time."""
    real = bench_budget.__globals__["bench_latency"]

    def give(thin):
        monkeypatch.setattr(
            "basis.experiments.budget_bench.bench_latency",
            lambda *args, **options: times(real(*args, **options), thin=thin),
        )

    return give


def test_every_plan_meets_its_share_and_is_measured_beside_the_dense_network(layers_take):
    layers_take(0.3)
    report = bench_budget(**TINY, shares=(0.9, 0.5), setting=SETTING)
    assert [row["mode"] for row in report.rows] == ["control", "dense folded", "selected"] * 2
    for share in (0.9, 0.5):
        (row,) = (row for row in report.rows if row["share"] == share and row["mode"] == "selected")
        assert row["predicted"] <= share
        assert row["predicted"] > share - 0.15
        assert 0 < row["layers"] < 20
        assert 0 <= row["pairs"] <= row["layers"]
        assert row["parameters"] < 1
        assert row["ms"] > 0
    few, many = (row for row in report.rows if row["mode"] == "selected")
    assert few["layers"] < many["layers"]


def test_training_steps_of_plans_count_every_layer_with_its_backward_pass(layers_take):
    layers_take(0.3)
    report = bench_budget(**TINY, shares=(0.5,), one="forward+backward", setting=SETTING)
    control, auto, through = report.rows
    assert (auto["norms"], through["norms"]) == ("ordinary", "through_basis")
    assert report.kind == "bench-plans"
    assert (control["share"], auto["share"]) == (0.5, 0.5)
    assert 0.35 < auto["predicted"] <= 0.5
    assert 0 < len(auto["layers"]) < 20
    assert "layers" not in control
    assert auto["ms"] > 0
    assert "ratio" not in auto


def test_the_smallest_share_that_can_be_met_stands_for_what_is_out_of_reach(layers_take):
    layers_take(0.9)
    options = {**TINY, "one": "forward+backward", "setting": SETTING}
    report = bench_budget(**options, shares=(0.5, 0.4), smallest=True)
    (least,) = report.config["shares"]
    assert 0.89 < least < 1
    assert report.config["beyond"] == [0.5, 0.4]
    assert report.rows[-1]["predicted"] == pytest.approx(least, abs=1e-3)
    with pytest.raises(InfeasibleBudget, match="milliseconds"):
        bench_budget(**options, shares=(0.5,))


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(share, monkeypatch):
    monkeypatch.setattr("basis.experiments.budget_bench.bench_latency", None)
    with pytest.raises(ValueError, match=r"a share is .*, but must be in \(0, 1\]"):
        bench_budget(**TINY, shares=(0.5, share), setting=SETTING)
