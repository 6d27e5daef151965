"""A trained network made smaller by every method to one budget, and followed through its repair."""

import copy
from importlib import util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from basis.costs import cost, count_parameters
from basis.data import hold_out, normalise, synthetic
from basis.experiments.comparison import METHODS, Compression, compare, shrink
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.training.loop import evaluate

SMALL = {"calibration": 60, "held": 40, "batch_size": 20}
HERE = [name for name in METHODS if name != "Tucker" or util.find_spec("tensorly")]


@pytest.fixture(scope="module")
def data():
    return hold_out(synthetic(train=100, test=40, size=12), 40)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("resnet20", width=8).eval()


@pytest.mark.parametrize("method", [name for name in HERE if name != "dense"])
def test_every_method_meets_the_budget_and_leaves_the_model_alone(method, model, data):
    before = copy.deepcopy(model.state_dict())
    small, about = shrink(model, Compression(method=method, budget=0.5, **SMALL), data)
    kept = count_parameters(small) / count_parameters(model)
    if "MACs" in method:
        counts = [cost(net, (3, 12, 12), mode="factorized").total.forward_macs for net in (small, model)]
        assert 0.4 < counts[0] / counts[1] <= 0.5
    assert (0.3 if "MACs" in method else 0.43) < kept <= 0.5
    assert method.startswith("selected") or isinstance(small.conv1, torch.nn.Conv2d)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (about["plan"] is None) == (method in ("SVD pairs", "Tucker"))


def test_largest_first_leaves_as_many_layers_dense_as_a_quarter_of_the_rest_allows(model, data):
    _, about = shrink(model, Compression(method="largest first", budget=0.5, **SMALL), data)
    _, uniform = shrink(model, Compression(method="uniform", budget=0.5, **SMALL), data)
    widths = {name: model.get_submodule(name).out_channels for name in uniform["plan"]}
    assert set(about["plan"]) < set(uniform["plan"])
    assert all(widths[name] == 32 for name in about["plan"])  # the last stage has the largest layers
    assert sorted(k / widths[name] for name, k in about["plan"].items())[-2] == 0.25


def test_a_network_is_tested_at_every_stage(model, data):
    given = copy.deepcopy(model)
    result = compare(given, Compression(method="dense", budget=1, **SMALL), data)
    expected = evaluate(model, data.test, precision=result["precision"])
    assert result["stages"]["made"] == pytest.approx(expected, rel=1e-3)
    assert result["given"] == result["stages"]["made"]  # nothing was replaced
    assert list(result["stages"]) == ["made", "recalibrated", "tuned"]
    assert result["test"] == result["stages"]["tuned"] != result["stages"]["made"]
    assert result["macs"] == cost(model, (3, 12, 12)).total.forward_macs
    assert result["parameters"] == count_parameters(model)


@pytest.mark.parametrize("method", [name for name in HERE if name in ("uniform", "Tucker")])
def test_multiplications_are_those_of_factorized_layers(method, model, data):
    asked = Compression(method=method, budget=0.5, **SMALL)
    result = compare(copy.deepcopy(model), asked, data)
    small, _ = shrink(model, asked, data)
    for module in small.modules():
        if isinstance(module, BasisConv2d):
            module.mode = "factorized"
    with FlopCounterMode(display=False) as counter:  # which knows no identity: it counts M whole
        small(normalise(data.train.x[:1]).contiguous())
    identity = cost(small, (3, 12, 12), mode="factorized").total.identity_forward_macs
    assert result["macs"] == counter.get_total_flops() // 2 - identity
