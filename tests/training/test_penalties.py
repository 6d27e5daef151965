"""Decay of the product, scaled decay and decorrelation: the formulas, and what a recipe makes of them."""

import dataclasses

import numpy as np
import pytest
import torch

import basis
from basis.data import synthetic
from basis.layers.coefficients import Sparse
from basis.layers.structured.separable import GenericConv2d
from basis.models import build
from basis.training.loop import (
    Kind,
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
from tests.training.test_skipping import resumed

RECIPE = Recipe(epochs=3, batch_size=20, translate=2, cutout=8, precision="fp32")  # 4 steps an epoch


@pytest.fixture(scope="module")
def data():
    return synthetic(train=80, test=20, size=16)


def network(*, seed=0, coefficients="dense"):
    torch.manual_seed(seed)
    model = build("resnet20", width=4)
    return basis.substitute(model, ratio=0.5, init="random", mode="factorized", coefficients=coefficients)


def layers(model):
    return [module for module in model.modules() if isinstance(module, basis.BasisConv2d)]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def schedule(model, recipe, steps=12):
    return Schedule(make_step(model, recipe, device="cpu"), recipe, steps_per_epoch=4, total_steps=steps)


# -- the formulas -----------------------------------------------------------------------------------


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


def test_decorrelation_of_special_filters():
    assert decorrelation(torch.randn(3, 2, 3, 3), 3) == 0  # one filter a group
    twins = torch.randn(1, 3, 3, 3).repeat(2, 1, 1, 1)
    assert decorrelation(twins).item() == pytest.approx(2)
    constant = torch.cat([torch.ones(1, 3, 3, 3), torch.randn(2, 3, 3, 3)]).requires_grad_()
    value = decorrelation(constant)
    value.backward()
    assert value.item() == pytest.approx(decorrelation(constant[1:]).item())
    assert constant.grad.isfinite().all()


def test_compression_counts_what_is_trained():
    dense = sum(p.numel() for p in build("resnet20", width=4).parameters())
    assert compression(build("resnet20", width=4)) == 1
    for form in ("dense", "shared", "frozen", "low_rank:1/2"):
        model = network(coefficients=form)
        assert compression(model) == pytest.approx(sum(p.numel() for p in model.parameters()) / dense, rel=1e-12)
    assert compression(network(coefficients="shared")) < compression(network())
    sparse = basis.BasisConv2d(3, 16, 3, ratio=0.25, bias=False, coefficients="sparse:1")
    assert compression(sparse) == (108 + 12) / 432
    # one layer alone: C_out F = 16 * 27 dense, k F + (C_out - k) k = 4 * 27 + 12 * 4
    assert compression(basis.BasisConv2d(3, 16, 3, ratio=0.25, bias=False)) == (108 + 48) / 432


# -- in the optimizer ---------------------------------------------------------------------------------


def test_fused_sgd_lets_b_and_a_begin_at_different_steps():
    """It demands of each group of parameters that all make their first step together."""
    found = []
    for fused in (False, True):
        model = network()
        parts, groups = Parts(model), parameter_groups(model, weight_decay=0.01)
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=fused)
        for trained in (Trained(True, False), Trained(False, True), Trained(True, True)):
            parts.train(trained)
            optimizer.zero_grad(set_to_none=True)
            model(torch.ones(2, 3, 32, 32)).square().sum().backward()
            optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(*found)


# -- structured layers --------------------------------------------------------------------------------


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


class Masked(GenericConv2d):
    """With a frozen mask among the factors."""

    def _build(self, factory):
        super()._build(factory)
        self.mask = torch.nn.Parameter(torch.ones(5, dtype=torch.uint8), requires_grad=False)


def test_masks_are_not_decayed():
    layer = Masked(8, 16, 3, size=0.25)
    assert any(p is layer.mask for p in layer.factors)
    recipe = Recipe(lr=1.0, momentum=0.0, weight_decay=0.1, decay="scaled")
    groups = make_optimizer(layer, recipe, torch.device("cpu")).param_groups
    assert {group["part"]: len(group["params"]) for group in groups} == {"others": 2, "factors": 2}
    assert shrunk(layer, recipe)["mask"] == 1


class Penalised(GenericConv2d):
    """With the penalty sum(up^2) / 2, whose gradient is ``up``."""

    def penalty(self):
        return self.up.square().sum() / 2


def test_layers_may_have_a_penalty():
    model = torch.nn.Sequential(*(Penalised(8, 16, 3, size=0.25) for _ in range(2)), GenericConv2d(8, 16, 3, size=0.25))
    step = make_step(model, Recipe(orthogonality=0.5, precision="fp32"), device="cpu")
    loss = torch.tensor(1.0)
    term = step._objective(loss, Kind())
    torch.testing.assert_close(term, 1 + 0.25 * sum(model[i].up.square().sum() for i in (0, 1)))
    term.backward()
    for i in (0, 1):
        torch.testing.assert_close(model[i].up.grad, model[i].up.detach() / 2)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in ("0.up", "1.up"))
    assert make_step(model, Recipe(precision="fp32"), device="cpu")._objective(loss, Kind()) is loss


# -- in the loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["grouped:2"])
def test_the_decay_of_the_product_is_half_of_its_norm(form):
    model = network(coefficients=form)
    loss = torch.tensor(1.0)
    term = objective(Recipe(decay="product", weight_decay=0.01), model)(loss, Kind()) - loss
    expected = 0.005 * sum(layer.weight.square().sum() for layer in layers(model))
    torch.testing.assert_close(term, expected)
    assert objective(Recipe(), model)(loss, Kind()) is loss


def test_decorrelation_is_added_at_every_tenth_step():
    model = network()
    loss, recipe = torch.tensor(1.0), Recipe(decorrelation=0.01)
    expected = 1 + 0.01 * sum(decorrelation(layer.basis) for layer in layers(model))
    of, kinds = objective(recipe, model), schedule(model, recipe)
    terms = [of(loss, kinds.kind(step)) for step in range(21)]
    assert [step for step in range(21) if terms[step] is not loss] == [0, 10, 20]
    torch.testing.assert_close(terms[10], expected)


# -- in a training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms",
    [
        {"decay": "product", "decorrelation": 0.01},
        {"decay": "scaled", "skip": Skip(basis_every=2)},
        {"decay": "product", "skip": Skip(alternate=True), "precision": "bf16"},
        {"settle": 0.7},
    ],
    ids=str,
)
def test_a_resumed_training_is_bit_identical(data, tmp_path, terms):
    recipe = dataclasses.replace(RECIPE, **terms)
    form = "sparse:1/2" if "settle" in terms else "dense"
    whole = resumed(recipe, form, data, tmp_path / "c.pt")
    plain = network(coefficients=form)
    train(plain, data, dataclasses.replace(RECIPE, precision=recipe.precision), device="cpu")
    assert not torch.equal(weights(plain), weights(whole))


@pytest.mark.parametrize(("settle", "step"), [(None, 6), (0.0, 0), (0.3, 4), (0.99, 11)])
def test_masks_are_settled_once(settle, step, monkeypatch):
    calls, now = [], []
    monkeypatch.setattr(Sparse, "settle", lambda self: calls.append(len(now)))
    model = network(coefficients="sparse:1/2")
    plan = schedule(model, dataclasses.replace(RECIPE, settle=settle))
    for i in range(12):
        assert plan.prepare(i).settled == (i >= step)
        now.append(i)
    assert calls == [step] * len(layers(model))


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms",
    [
        {"skip": Skip()},
        {"decay": "product"},
        {"decay": "scaled"},
        {"decorrelation": 0.1},
        {"orthogonality": 1.0},
        {"settle": 0.5},
    ],
    ids=str,
)
def test_terms_without_effect_are_refused(data, terms):
    (name,) = terms
    with pytest.raises(TrainingError, match=f"sets {name}, but the model has no"):
        train(build("resnet20", width=4), data, dataclasses.replace(RECIPE, **terms), device="cpu")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"decay": "l1"}, "decay"),
        ({"decay": "product", "weight_decay": 0.0}, "weight_decay"),
        ({"decorrelation": float("nan")}, "decorrelation"),
        ({"decorrelation": 0.1, "skip": Skip(basis_until=0)}, "skip never trains them"),
        ({"attention": 0.0}, "attention"),
        ({"orthogonality": -1.0}, "orthogonality"),
        ({"settle": 1.0}, "settle"),
        ({"step": "quick"}, "step is 'quick'"),
        ({"skip": {"basis_every": 4}}, "skip"),
    ],
)
def test_terms_that_make_no_sense_say_so(terms, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**terms)
