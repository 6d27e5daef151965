"""Masks over frozen random values."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis import count_parameters
from basis.layers.structured import Structure
from basis.layers.structured.masks import PemnConv2d

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False, "size": "1/3"},
    "strided": {"stride": 2, "padding": (1, 2)},
    "same, even kernel": {"kernel_size": (2, 3), "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "dilation": (1, 2)},
    "1x1": {"kernel_size": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(inputs=6, outputs=10, **changes):
    return PemnConv2d(inputs, outputs, **({"kernel_size": 3, "size": 1, "dtype": torch.float64} | changes))


def masked(layer):
    """The values of the half with the largest scores."""
    scores = layer.scores.detach().abs().flatten()
    keep = scores.argsort(descending=True)[: len(scores) // 2]
    weight = torch.zeros_like(scores)
    weight[keep] = layer.values.flatten()[keep]
    return weight.view(layer.scores.shape)


@pytest.mark.parametrize("shape", [(6, 10, 9), (2, 6, 10, 9)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_is_that_of_the_masked_values_and_backward_goes_straight_through(options, shape):
    layer = make(**options)
    torch.testing.assert_close(layer.weight.detach(), masked(layer), rtol=0, atol=0)
    dense = layer.to_conv()
    assert torch.equal(dense.weight, layer.weight)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), dense(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    up = torch.randn_like(out)
    into, scores = torch.autograd.grad(out, [x, layer.scores], up)
    dense_into, weight = torch.autograd.grad(expected, [x, dense.weight], up)
    torch.testing.assert_close(into, dense_into, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scores, weight * layer.values * layer.scores.sign(), rtol=1e-10, atol=1e-10)


def test_values_are_normal_and_a_fraction_of_them_repeats():
    layer = make(64, 64, dtype=torch.float32)
    assert layer.values.std() == pytest.approx(math.sqrt(2 / 576), rel=0.02)
    assert layer.values.unique().numel() > 0.99 * layer.values.numel()
    few = make(64, 64, size="0.01", dtype=torch.float32).values.flatten()
    period = 36864 // 100 + 1  # int(rho length) + 1
    assert torch.equal(few[period:], few[:-period])
    assert few[:period].unique().numel() == period


def test_one_bit_is_stored_for_each_weight():
    layer = make(64, 64, bias=False, device="meta")
    assert layer.bits("scores") == 36864
    assert layer.stored == count_parameters(layer) == 36864 // 32
    assert list(layer.parts) == ["scores"]
    assert layer.products[0].macs == 36864
    assert layer.building == 0


def test_training_moves_the_mask_and_nothing_else():
    layer = make(dtype=torch.float32)
    values, before = layer.values.clone(), layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x, goal = torch.randn(16, 6, 5, 5), torch.randn(16, 10, 3, 3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(layer.values, values)
    assert not torch.equal(layer.weight, before)
    assert (layer.weight != 0).sum() == layer.values.numel() // 2


def test_seeds_come_from_torch_and_survive():
    layer = make(dtype=torch.float32)
    torch.manual_seed(0)
    assert torch.equal(make(dtype=torch.float32).weight, layer.weight)
    other = make(dtype=torch.float32)
    assert not torch.equal(other.values, layer.values)
    state = layer.state_dict()
    assert "values" not in state
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.weight, layer.weight)
    wide = make()  # float64
    wide.load_state_dict(state)
    assert torch.equal(wide.weight.float(), layer.weight)
    layer.reset_parameters()
    assert not torch.equal(other.values, layer.values)


def test_from_the_meta_device():
    layer = make(device="meta", dtype=torch.float32)
    state = torch.get_rng_state()
    assert layer(torch.empty(2, 6, 5, 5, device="meta")).shape == (2, 10, 3, 3)
    make(device="meta")
    assert torch.equal(torch.get_rng_state(), state)
    other = make(dtype=torch.float32)
    layer.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)


def test_fit_is_the_best_half():
    """By all halves of a small layer; as good as any random ones in a large one."""
    layer = make(1, 1, kernel_size=(2, 4))
    target = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    magnitudes = layer.scores.detach().abs().flatten().sort().values
    layer.fit(target)
    torch.testing.assert_close(layer.scores.detach().abs().flatten().sort().values, magnitudes)
    halves = (torch.tensor([i >> j & 1 for j in range(8)]) for i in range(256))
    errors = [(h.view(1, 1, 2, 4) * layer.values - target).norm() for h in halves if h.sum() == 4]
    assert (layer.weight - target).norm().item() == pytest.approx(min(errors).item())
    conv = nn.Conv2d(32, 32, 3)
    fitted = PemnConv2d.from_conv(conv, size="0.5")
    torch.testing.assert_close(fitted.bias, conv.bias)
    assert torch.equal(fitted.weight, masked(fitted))
    assert (fitted.weight - conv.weight).norm() < 0.8 * (PemnConv2d(32, 32, 3, size=1).weight - conv.weight).norm()
    assert F.cosine_similarity(fitted.weight.flatten(), conv.weight.flatten(), 0) > 0.4  # 0 for random masks


def test_formats_and_precision():
    x = torch.randn(2, 6, 6, 6)
    conv = nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)
    layer = PemnConv2d.shaped_like(conv, size=1)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out, F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize(("size", "message"), [("0", "above 0"), ("2", r"\(0, 1\]"), ("x", "a number"), ("", "a size")])
def test_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        make(size=size)
    assert Structure.parse("pemn:0.5").obstacle(nn.Conv2d(6, 10, 3)) is None
