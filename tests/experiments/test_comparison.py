"""A trained network made smaller by every method to one budget, and followed through its repair."""

import copy
from importlib import util

import pytest
import torch

from basis.costs import cost, count_parameters
from basis.data import hold_out, normalise, synthetic
from basis.experiments.comparison import METHODS, Compression, compare, shrink
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.training.loop import evaluate

SMALL = {"calibration": 60, "held": 40, "batch_size": 20}
HERE = [name for name in METHODS if name != "tensorly" or util.find_spec("tensorly")]


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
    if "both" in method:
        counts = [cost(net, (3, 12, 12), mode="factorized").total.forward_macs for net in (small, model)]
        assert 0.4 < counts[0] / counts[1] <= 0.5
    assert (0.3 if "both" in method else 0.43) < kept <= 0.5
    assert method.startswith("selected") or isinstance(small.conv1, torch.nn.Conv2d)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (about["plan"] is None) == (method in ("svd", "tensorly"))


def test_a_fit_to_outputs_is_nearer_on_the_calibration_images(model, data):
    x = normalise(data.train.x[:60])
    errors = []
    for method in ("uniform", "uniform, fitted to weights"):
        small, _ = shrink(model, Compression(method=method, budget=0.5, **SMALL), data)
        first = next(name for name, module in small.named_modules() if isinstance(module, BasisConv2d))
        norm = {"layer1.0.conv1": "layer1.0.bn1"}[first]
        with torch.no_grad():
            there = torch.relu(model.bn1(model.conv1(x)))
            outputs = [net.get_submodule(norm)(net.get_submodule(first)(there)) for net in (model, small)]
        errors.append((outputs[0] - outputs[1]).square().mean().item())
    assert errors[0] < errors[1]


def test_a_network_is_tested_at_every_stage(model, data):
    given = copy.deepcopy(model)
    result = compare(given, Compression(method="dense", budget=1, **SMALL), data)
    expected = evaluate(model, data.test, precision=result["precision"])
    assert result["stages"]["made"] == pytest.approx(expected, rel=1e-3)
    assert list(result["stages"]) == ["made", "recalibrated", "tuned"]
    assert result["test"] == result["stages"]["tuned"] != result["stages"]["made"]
    assert result["macs"] == result["dense_macs"] == cost(model, (3, 12, 12)).total.forward_macs
    assert result["parameters"] == result["dense_parameters"] == count_parameters(model)


def test_multiplications_are_those_of_factorized_mode(model, data):
    result = compare(copy.deepcopy(model), Compression(method="uniform", budget=0.5, **SMALL), data)
    small, _ = shrink(model, Compression(method="uniform", budget=0.5, **SMALL), data)
    counted = cost(small, (3, 12, 12), mode="factorized").total
    assert result["macs"] == counted.forward_macs + counted.identity_forward_macs
