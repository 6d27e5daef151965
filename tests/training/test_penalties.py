"""Decay of the product, scaled decay and decorrelation: the formulas, and what a recipe makes of them."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

import basis
from basis.layers.coefficients import Sparse
from basis.layers.structured.separable import GenericConv2d
from basis.models import build
from basis.training.loop import (
    Recipe,
    Schedule,
    TrainingError,
    make_optimizer,
    make_step,
    objective,
    train,
)
from basis.training.penalties import compression, decorrelation, parameter_groups, product_norm
from basis.training.skipping import Parts, Skip, Trained
from tests.training.common import DATA, RECIPE, layers, network, resumed


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def schedule(model, recipe, steps=12):
    return Schedule(make_step(model, recipe, device="cpu"), recipe, steps_per_epoch=4, total_steps=steps)


@pytest.mark.parametrize(
    ("form", "groups"), [("dense", 1), ("low_rank:2", 2), ("grouped:2", 1), ("sparse:2", 2), ("repeat", 1)]
)
def test_the_product_norm_is_that_of_the_weight(form, groups):
    torch.manual_seed(1)
    layer = basis.BasisConv2d(6, 16, 3, groups=groups, basis_channels=8, coefficients=form, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p is not layer.bias]
    norm = product_norm(layer.basis, layer.coefficients.matrix(), layer.coefficients.groups)
    plain = layer.weight.square().sum()
    torch.testing.assert_close(norm, plain, rtol=1e-10, atol=1e-10)
    found, expected = torch.autograd.grad(norm, parameters), torch.autograd.grad(plain, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_decorrelation_is_the_sum_of_correlations(groups):
    filters = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    blocks = filters.reshape(groups, 8 // groups, -1).numpy()
    expected = sum(np.abs(np.corrcoef(block) - np.eye(len(block))).sum() for block in blocks)
    assert decorrelation(filters, groups).item() == pytest.approx(expected, rel=1e-6)
    constant = torch.ones(3, 2, 3, 3, requires_grad=True)  # which correlates with nothing
    decorrelation(constant).backward()
    assert constant.grad.isfinite().all()


def test_compression_counts_what_is_trained():
    dense = sum(p.numel() for p in network().parameters())
    assert compression(network()) == 1
    for form in ("dense", "shared", "frozen", "low_rank:1/2"):
        model = network(form)
        assert compression(model) == pytest.approx(sum(p.numel() for p in model.parameters()) / dense, rel=1e-12)
    # one layer alone: C_out F = 16 * 27 dense, k F + (C_out - k) k = 4 * 27 + 12 * 4
    assert compression(basis.BasisConv2d(3, 16, 3, ratio=0.25, bias=False)) == (108 + 48) / 432
    sparse = basis.BasisConv2d(3, 16, 3, ratio=0.25, bias=False, coefficients="sparse:1")
    assert compression(sparse) == (108 + 12) / 432


def test_compression_counts_shared_factors_once():
    layers = [GenericConv2d(8, 16, 3, size=0.25, bias=False) for _ in range(2)]
    stored = sum(p.numel() for p in layers[0].parameters())
    layers[1].up = layers[0].up
    expected = (2 * stored - layers[0].up.numel()) / (2 * 16 * 8 * 9)
    assert compression(torch.nn.Sequential(*layers)) == pytest.approx(expected, rel=1e-12)


def test_fused_sgd_lets_b_and_a_begin_at_different_steps():
    """It demands of each group of parameters that all make their first step together."""
    found = []
    for fused in (False, True):
        model = network("dense")
        parts, groups = Parts(model), parameter_groups(model, weight_decay=0.01)
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=fused)
        for trained in (Trained(True, False), Trained(False, True), Trained(True, True)):
            parts.train(trained)
            optimizer.zero_grad(set_to_none=True)
            model(torch.ones(2, 3, 32, 32)).square().sum().backward()
            optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(*found)


def structured(layer="generic:0.5", *, include="layer1*conv?"):
    torch.manual_seed(0)
    return basis.substitute(build("resnet20", width=4), layer=layer, include=include, init="random")


def mixed():
    """Basis convolutions in one stage, structured layers in another, a dense one in the third."""
    return basis.substitute(structured(), ratio=0.5, include="layer2*conv?", init="random")


def test_compression_of_the_network_of_gray_et_al():
    with torch.device("meta"):
        dense = build("wrn-28-10")
        model = basis.substitute(dense, layer="generic:0.03", include="layer?.*.conv?", init="random")
    assert sum(p.numel() for p in dense.parameters()) == 36_479_194
    assert compression(model) == 601_162 / 36_479_194  # in their log: 0.0165


def shrunk(model, recipe):
    """By what each parameter, by name, is multiplied in a step of learning rate 1 in which all gradients are 0."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        make_optimizer(model, recipe, torch.device("cpu")).step()
        found = {name: p.unique() for name, p in model.named_parameters()}
    assert all(len(values) == 1 for values in found.values())
    return {name: values.item() for name, values in found.items()}


@pytest.mark.parametrize(
    ("decay", "skip", "on_basis", "on_factors"),
    [("scaled", None, "scaled", "scaled"), ("product", None, 0, 1), ("factors", Skip(), 1, 1)],
)
def test_one_step_without_gradients_shrinks_the_right_tensors(decay, skip, on_basis, on_factors):
    model = mixed()
    model.layer1[0].conv1.up.requires_grad_(False)
    recipe = Recipe(lr=1.0, momentum=0.0, weight_decay=0.1, decay=decay, skip=skip)
    assert 0.1 < compression(model) < 0.9
    on_basis, on_factors = (compression(model) if each == "scaled" else each for each in (on_basis, on_factors))
    expected = {}
    for name, _ in model.named_parameters():
        factor, inner = name.endswith((".up", ".down")), name.endswith(".basis") or ".coefficients." in name
        expected[name] = 1 - 0.1 * (on_factors if factor else on_basis if inner else 1)
    assert {expected[name] for name in expected if "depthwise" in name} == {0.9}
    expected["layer1.0.conv1.up"] = 1.0  # frozen
    assert shrunk(model, recipe) == pytest.approx(expected, rel=1e-6)


def test_scaled_decay_trains_structured_layers():
    model, plain = structured(), structured()
    train(model, DATA, dataclasses.replace(RECIPE, decay="scaled", weight_decay=0.1), device="cpu")
    train(plain, DATA, dataclasses.replace(RECIPE, weight_decay=0.1), device="cpu")
    factors = [module.layer1[0].conv1.up.norm().item() for module in (model, plain)]
    assert factors[0] > factors[1]  # decayed by less


def test_decorrelation_is_added_at_every_tenth_step():
    model = network("dense")
    loss, recipe = torch.tensor(1.0), Recipe(decorrelation=0.01)
    expected = 1 + 0.01 * sum(decorrelation(layer.basis) for layer in layers(model))
    of, kinds = objective(recipe, model), schedule(model, recipe)
    terms = [of(loss, kinds.kind(step)) for step in range(21)]
    assert [step for step in range(21) if terms[step] is not loss] == [0, 10, 20]
    torch.testing.assert_close(terms[10], expected)


@pytest.mark.parametrize(
    "terms",
    [
        {"decay": "product", "decorrelation": 0.01},
        {"decay": "scaled", "skip": Skip(basis_every=2)},
        {"decay": "product", "skip": Skip(alternate=True), "precision": "bf16"},
        {"lr": 0.1},
    ],
    ids=str,
)
def test_a_resumed_training_is_bit_identical(tmp_path, terms):
    recipe = dataclasses.replace(RECIPE, **terms)
    form = "sparse:1/2" if "lr" in terms else "dense"
    whole = resumed(recipe, tmp_path / "c.pt", partial(network, form))
    plain = network(form)
    train(plain, DATA, dataclasses.replace(RECIPE, precision=recipe.precision), device="cpu")
    assert not torch.equal(weights(plain), weights(whole))


def test_masks_are_settled_once_halfway(monkeypatch):
    calls, now = [], []
    monkeypatch.setattr(Sparse, "settle", lambda self: calls.append(len(now)))
    model = network("sparse:1/2")
    plan = schedule(model, RECIPE)
    for i in range(12):
        assert plan.prepare(i).settled == (i >= 6)
        now.append(i)
    assert calls == [6] * len(layers(model))


@pytest.mark.parametrize(
    "terms",
    [
        {"skip": Skip()},
        {"decay": "product"},
        {"decay": "scaled"},
        {"decorrelation": 0.1},
    ],
    ids=str,
)
def test_terms_without_effect_are_refused(terms):
    (name,) = terms
    with pytest.raises(TrainingError, match=f"sets {name}, but the model has no"):
        train(build("resnet20", width=4), DATA, dataclasses.replace(RECIPE, **terms), device="cpu")
