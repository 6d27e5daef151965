"""The look into trained networks, at the smallest scale."""

import pytest
import torch

from basis.bench.timing import Setting
from basis.experiments import trained
from basis.layers.conv import BasisConv2d


@pytest.mark.weekly
def test_plans_of_every_size_are_measured_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    monkeypatch.setattr(trained, "BUDGETS", (0.01, 0.5))
    setting = Setting(device="cpu", batch_size=2, rounds=3, timer=lambda step: step() or 1.0)
    report = trained.bench_trained(profile="smoke", setting=setting)
    budgets = [(row["rule"], row["budget"]) for row in report.rows if "budget" in row]
    assert budgets == [("optimal", 0.5), ("largest_first", 0.5)]  # nothing meets a hundredth
    orders = [[row for row in report.rows if "replaced" in row and row["rule"] == rule] for rule in
              ("least sensitive first", "largest first")]  # fmt: skip
    for rows in orders:
        assert [len(row["plan"]) for row in rows] == [row["replaced"] for row in rows] == [*range(1, len(rows) + 1)]
        assert all(row["speedup"] == 1 and row["growth_low"] <= row["growth"] <= row["growth_high"] for row in rows)
        assert rows[-1]["params"] < rows[0]["params"] < 1
    assert orders[0][-1]["growth"] == pytest.approx(orders[1][-1]["growth"], abs=1e-4)  # all layers, in either order
    filters, k = torch.tensor(report.config["filters"]), report.config["basis_channels"]
    assert (len(filters), k) == (4, 2)
    derived = BasisConv2d.from_conv(_conv(filters), basis_channels=k).weight
    assert torch.allclose(derived, filters, atol=1e-5)  # the others are combinations of the first k
    assert all(values == sorted(values, reverse=True) for values in report.config["singular_values"].values())


def _conv(filters):
    conv = torch.nn.Conv2d(filters.shape[1], len(filters), filters.shape[2], bias=False)
    conv.weight.data = filters
    return conv
