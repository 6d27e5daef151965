import importlib.util

import pytest
import torch
from torch import nn

from basis.bench.cases import BASELINES, bench_layers, layer_of
from basis.bench.shapes import RESNET18_SHAPES, Shape

needs_tltorch = pytest.mark.skipif(importlib.util.find_spec("tensorly") is None, reason="needs tensorly-torch")
EAGER = ["basis", "svd", "tucker", "tucker reconstructed"]


def count(module):
    return sum(p.numel() for p in module.parameters())


@needs_tltorch
@pytest.mark.parametrize("name", ["svd", "tucker", "tucker reconstructed"])
@pytest.mark.parametrize("text", RESNET18_SHAPES[::3])
def test_baselines_have_as_many_parameters_as_the_basis_layer(text, name):
    for ratio in (1 / 8, 3 / 4):
        with torch.device("meta"):
            basis, other = (count(layer_of(kind, Shape.parse(text), ratio)) for kind in ("basis", name))
        assert 0.88 * basis < other <= 1.01 * basis  # one rank is up to 13 % of the narrowest layer


@needs_tltorch
@pytest.mark.parametrize("name", ["svd", "tucker", "tucker reconstructed"])
def test_baselines_are_convolutions_of_the_same_shape_that_train(name):
    shape = Shape.parse("8-16@7/2")
    x = torch.randn(32, 8, 7, 7)
    torch.manual_seed(0)
    other = layer_of(name, shape, 0.5)
    y = other(x)
    assert y.shape == shape.conv()(x).shape
    assert 0.05 < y.std() < 2  # no layer of vanishing or exploding maps, which have other speeds
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in other.parameters())


@needs_tltorch
def test_a_cell_has_every_candidate_with_its_count_and_ratios(setting):
    told = []
    report = bench_layers("rivals",
        shapes=["16@6"], ratios=[0.5], candidates=EAGER, setting=setting, progress=told.append
    )  # fmt: skip
    frame = report.to_frame()
    assert len(told) == len(frame) == 2 * (1 + len(EAGER))
    for _, cell in frame.groupby("pass"):
        assert list(cell["mode"]) == ["control", "basis", "svd", "tucker", "tucker reconstructed"]
        assert cell["parameters"].iloc[0] == 9 * 16 * 16
        assert (cell["parameters"].iloc[2:] <= 1.01 * cell["parameters"].iloc[1]).all()
        assert cell["versus_basis"].isna().tolist() == [True, True, False, False, False]
    assert {"versus_basis_q1", "versus_basis_q3", "peak_mib", "dense_peak_mib", "speedup_q1"} <= set(frame)
    assert report.config["left_out"] == {}


@pytest.mark.parametrize("where", ["made", "run"])
def test_a_candidate_that_fails_is_a_row_with_an_error(monkeypatch, where, setting):
    class Broken(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("no such kernel")

    def make(shape, parameters):
        if where == "made":
            raise TypeError("no such layer")
        return Broken(shape.in_channels, 1, 3)

    monkeypatch.setattr("basis.bench.cases.BASELINES", {**BASELINES, "svd": make})
    told = []
    report = bench_layers("rivals",
        shapes=["16@6"], ratios=[0.5], passes=["forward"], candidates=["basis", "svd"], setting=setting,
        progress=told.append,
    )  # fmt: skip
    expected = "TypeError: no such layer" if where == "made" else "RuntimeError: no such kernel"
    assert report.rows[-1]["error"] == expected
    assert "ms" not in report.rows[-1]
    assert "failed" in told[-1]
    assert f"svd failed: {expected}" in str(report)
    assert report.rows[1]["speedup"] == 1
