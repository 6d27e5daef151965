"""The layer whose k changes without a change of shape: it is the basis convolution of that k, compiled once."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import basis.training.stepping
from basis import BasisConv2d, sensitivity, substitute
from basis.data import hold_out, synthetic
from basis.models import BasicBlock, ResNet
from basis.search.sensitivity import _reset
from basis.search.static import StaticBasisConv2d, load, static
from basis.training.loop import Recipe

SHAPES = {
    "plain": {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "padding": 1, "bias": False},
    "bias": {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 1), "stride": (2, 1), "dilation": 2},
    "groups": {"in_channels": 4, "out_channels": 12, "kernel_size": 3, "groups": 2, "padding_mode": "reflect"},
    "same": {"in_channels": 2, "out_channels": 4, "kernel_size": 2, "padding": "same"},
}


@pytest.fixture
def compilations(monkeypatch):
    """Count the graphs that dynamo hands over; they are run as they are, without a C++ compiler."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        basis.training.stepping, "compiled", lambda model, last: torch.compile(model, backend="aot_eager")
    )
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def gradients(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_basis_convolution_of_each_k(shape, last, fitted):
    torch.manual_seed(0)
    conv = nn.Conv2d(**SHAPES[shape], dtype=torch.float64)
    conv.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    x = torch.randn(2, conv.in_channels, 7, 6, dtype=torch.float64)
    layer = StaticBasisConv2d.of(conv)
    where = layer.weight.data_ptr(), layer.coefficients.data_ptr()
    c, groups = conv.out_channels, conv.groups
    for k in range(groups, c + 1, groups):
        make = BasisConv2d.from_conv if fitted else BasisConv2d.shaped_like
        other = make(conv, basis_channels=k, mode="composed")
        layer.load(other)
        with torch.no_grad():  # masked values are of no account, whatever they are
            kept = torch.arange(c // groups) < k // groups
            layer.weight.unflatten(0, (groups, -1))[:, ~kept] = torch.inf
            layer._by_groups(layer.coefficients)[:, ~(kept & ~kept[:, None])] = torch.nan
        ours, theirs = gradients(layer, x), gradients(other, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert layer.basis_channels == k
        weight, block = layer._by_groups(layer.weight.grad), layer._by_groups(layer.coefficients.grad)
        torch.testing.assert_close(weight[:, kept].flatten(0, 1), other.basis.grad, rtol=1e-12, atol=1e-12)
        inside = block[:, ~kept][:, :, kept]
        if k < c:
            torch.testing.assert_close(
                inside.reshape(c - k, -1), other.coefficients.values.grad, rtol=1e-12, atol=1e-12
            )
        assert not weight[:, ~kept].any()
        assert block.count_nonzero() == inside.count_nonzero()
        back = layer.to_basis()
        assert all(
            torch.equal(a, b) for a, b in zip(back.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert where == (layer.weight.data_ptr(), layer.coefficients.data_ptr())
    layer.load(conv)
    for ours, theirs in zip(gradients(layer, x), gradients(conv, x), strict=True):
        assert torch.equal(ours, theirs)  # the identity changes no bit


def test_momentum_and_decay_of_masked_entries_reach_nothing():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, dtype=torch.float64)
    other = BasisConv2d.from_conv(conv, basis_channels=3, mode="composed")
    layer = StaticBasisConv2d.of(other)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[3:] = 5.0
    for each in (layer, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True)
        for _ in range(5):
            gradients(each, x)
            optimizer.step()
    torch.testing.assert_close(layer.composed(), other.weight, rtol=1e-12, atol=1e-12)


def test_the_weight_is_made_in_full_precision_under_autocast():
    layer = StaticBasisConv2d.of(BasisConv2d(3, 8, 3, basis_channels=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.composed(), layer.composed().float())
        assert layer.composed().dtype == torch.float32
        assert layer(torch.randn(1, 3, 5, 5)).dtype == torch.bfloat16


def test_every_k_is_one_compilation(compilations):
    layer = StaticBasisConv2d(3, 16, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    for k in range(1, 17):
        layer.load(BasisConv2d(3, 16, 3, basis_channels=k))
        torch.testing.assert_close(compiled(x), layer.to_basis()(x))
        compiled(x).sum().backward()
    assert compilations() == 1


@pytest.mark.parametrize("k", [0, 9, 4.0, 3])
def test_numbers_that_cannot_be_k_are_refused(k):
    layer = StaticBasisConv2d(4, 8, 3, groups=2)
    with pytest.raises(ValueError, match=f"basis_channels is {k}"):
        layer.set_basis_channels(k)
    assert layer.basis_channels == 8


def test_layers_that_cannot_be_loaded_are_refused():
    layer = StaticBasisConv2d(4, 8, 3)
    with pytest.raises(ValueError, match="the coefficients are low_rank:2, but a static layer holds dense ones"):
        layer.load(BasisConv2d(4, 8, 3, ratio=0.5, coefficients="low_rank:2"))
    with pytest.raises(ValueError, match="has another shape"):
        layer.load(nn.Conv2d(4, 8, 1))


def block(width=8):
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1), width=width, num_classes=10)


def test_a_network_takes_the_values_of_any_plan():
    model, x = block().double(), torch.randn(2, 3, 8, 8).double()
    network = static(model, ["layer1.0.conv2", "layer2.0.conv1"]).eval()
    for plan in ({}, {"layer1.0.conv2": 3}, {"layer2.0.conv1": 5}, {"layer1.0.conv2": 1, "layer2.0.conv1": 15}):
        other = substitute(model, plan, init="random").eval()
        other.apply(_reset)
        other(x.requires_grad_())
        other.bn1.running_mean.normal_()
        load(network, other)
        torch.testing.assert_close(network(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", ["short_training", "fine_tuning"])
def test_a_search_compiles_once_and_finds_the_same(compilations, measure):
    data = hold_out(synthetic(train=120, test=10, size=8), 40)
    recipe = Recipe(epochs=2, batch_size=20, lr=0.02, translate=1, cutout=0, precision="fp32")
    options = {"measure": measure, "include": "*.conv?", "multiple": 2, "seeds": 2}
    ratios = (0.75, 0.5, 0.25)
    expected = sensitivity(block(), data, recipe=recipe, ratios=ratios, **options)
    assert compilations() == 0
    assert expected.fingerprint["recipe"].endswith("settle=None)")  # as before there was a step
    fast = dataclasses.replace(recipe, step="compiled")
    sensitivity(block(), data, recipe=fast, ratios=ratios[:1], **options)
    few = compilations()
    table = sensitivity(block(), data, recipe=fast, ratios=ratios, **options)
    assert compilations() == few == 1
    assert len(table.trials) == len(expected.trials) > 20
    for ours, theirs in zip(table.trials, expected.trials, strict=True):
        assert (ours.layer, ours.basis_channels, ours.seed) == (theirs.layer, theirs.basis_channels, theirs.seed)
        assert (ours.forward, ours.backward) == (theirs.forward, theirs.backward)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
    assert len({round(t.loss, 4) for t in table.trials}) > 20  # they do differ from each other by more
    assert table.fingerprint["recipe"] != expected.fingerprint["recipe"]
