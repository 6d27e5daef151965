"""Double sparse factorization."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis import count_parameters
from basis.layers.structured import Structure
from basis.layers.structured.double_sparse import DsfConv2d, factorize

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": 2, "padding": (1, 2)},
    "same, even kernel": {"kernel_size": (2, 3), "padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "dilation": (1, 2)},
    "1x1, expansion": {"kernel_size": 1, "size": "0.7"},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(inputs=6, outputs=12, **changes):
    return DsfConv2d(inputs, outputs, **({"kernel_size": 3, "size": "0.3", "dtype": torch.float64} | changes))


def decaying(rows, columns):
    """A random matrix whose singular values fall as 1 / index."""
    size = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, size))[0] for n in (rows, columns))
    return left / torch.arange(1, size + 1) @ right.T


def pruned(matrix, count):
    """The ``count`` entries of largest magnitude."""
    least = matrix.abs().flatten().kthvalue(matrix.numel() - count + 1).values
    return matrix * (matrix.abs() >= least)


@pytest.mark.parametrize("shape", [(6, 10, 9), (2, 6, 10, 9)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward_are_those_of_both_convolutions(options, shape):
    layer = make(**options)
    weight = torch.einsum("om,mcij->ocij", layer.outer[:, :, 0, 0], layer.inner).detach()
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-10, atol=1e-10)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = layer.to_conv()
    out, expected = layer(x), dense(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    up = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, [x], up)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "density", "square", "other"),
    [
        (64, 64, 3, "0.2", 409, 7372 - 409),  # max(0.05, density / 2) of 64^2
        (64, 128, 3, "0.05", 819, 3686 - 819),  # at least 5 %
        (16, 16, 3, "0.1", 16, 230 - 16),  # at least one for each row
        (64, 256, 1, "0.2", 409, 3276 - 409),  # an expansion: the square one at the inputs
    ],
)
def test_what_is_stored(inputs, outputs, kernel, density, square, other):
    layer = DsfConv2d(inputs, outputs, kernel, size=density, bias=False)
    sides = ("inner", "outer") if outputs > inputs * kernel**2 else ("outer", "inner")
    for name, count in zip(sides, (square, other), strict=True):
        assert (getattr(layer, name) != 0).sum() == getattr(layer, f"{name}_mask").sum() == count
        assert layer.bits(name) == 32 * count + getattr(layer, name).numel()
    rows, columns = outputs, inputs * kernel**2
    entries = min(rows, columns) * (rows + columns)
    assert layer.algebra == square + other == int(float(density) * rows * columns)
    assert layer.stored == count_parameters(layer) == math.ceil(square + other + entries / 32)


def test_what_is_executed_is_what_is_counted():
    layer = make(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 6, 7, 7))
    assert counter.get_total_flops() == 2 * (layer.building + 2 * 25 * layer.products[0].macs)


@pytest.mark.parametrize("kernel", [1, 3])
def test_random_masks_lose_no_channel_and_weights_have_the_variance_of_he(kernel):
    layer = DsfConv2d(32, 48, kernel, size="0.2", bias=False)
    square = layer.outer_mask if kernel == 3 else layer.inner_mask
    assert square.flatten(1).diagonal().all()
    for mask in (layer.outer_mask, layer.inner_mask):
        assert mask.flatten(1).any(1).all()
    weights = torch.stack([DsfConv2d(32, 48, kernel, size="0.2").weight.detach() for _ in range(20)])
    assert weights.std() == pytest.approx(math.sqrt(2 / (32 * kernel**2)), rel=0.1)


def test_training_leaves_zeros():
    layer = make(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in layer.parts.items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 6, 5, 5)).square().mean().backward()
        optimizer.step()
    for name, p in layer.parts.items():
        mask = getattr(layer, f"{name}_mask")
        assert not p[~mask].any()
        assert (p != before[name])[mask].all()


@pytest.mark.parametrize("shape", [(48, 16, 3), (32, 128, 1), (128, 32, 1)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.2])
def test_fit_is_better_than_pruning_to_as_many_numbers(shape, density):
    inputs, outputs, kernel = shape
    target = decaying(outputs, inputs * kernel**2)
    conv = nn.Conv2d(inputs, outputs, kernel)
    conv.weight.data = target.view_as(conv.weight).clone()
    layer = DsfConv2d.from_conv(conv, size=density)
    assert (layer.outer != 0).sum() + (layer.inner != 0).sum() == layer.algebra == int(density * target.numel())
    error = (layer.weight.flatten(1) - target).norm()
    assert error < 0.8 * (pruned(target, layer.algebra) - target).norm()
    torch.testing.assert_close(layer.bias, conv.bias)
    assert torch.equal(layer.to_conv().weight, layer.weight)


def test_factors_are_balanced_and_those_of_a_sparse_product_are_nearly_found():
    torch.manual_seed(1)
    first = torch.eye(32) + torch.randn(32, 32) * (torch.rand(32, 32) < 0.2)
    second = torch.randn(32, 200) * (torch.rand(32, 200) < 0.1)
    target, counts = first @ second, (int((first != 0).sum()), int((second != 0).sum()))
    a, b = factorize(target, *counts)
    assert ((a != 0).sum(), (b != 0).sum()) == counts
    error = (a @ b - target).norm() / target.norm()
    assert error < 0.5 * (pruned(target, sum(counts)) - target).norm() / target.norm()
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1))


def test_fit_of_zeros():
    layer = make()
    layer.fit(torch.zeros_like(layer.weight))
    assert not layer.weight.any()
    assert layer.inner_mask.sum() + layer.outer_mask.sum() == layer.algebra


def test_copies_state_meta_and_formats():
    layer, other = make(dtype=torch.float32), make(dtype=torch.float32)
    assert not torch.equal(layer.inner_mask, other.inner_mask)
    other.load_state_dict(copy.deepcopy(layer).state_dict())
    x = torch.randn(2, 6, 6, 6)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.manual_seed(0)
    assert torch.equal(make(dtype=torch.float32).weight, layer.weight)
    assert make(device="meta", dtype=torch.float32)(x.to("meta")).shape == (2, 12, 4, 4)
    conv = nn.Conv2d(6, 12, 3).to(memory_format=torch.channels_last)
    last = DsfConv2d.shaped_like(conv, size="0.3")
    out = last(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, last.weight, last.bias))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out, F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("0.02", r"dsf:0.02 leaves 0 numbers for a factor of 12 x 54 .* at least 12"),
        ("1", "nothing to save"),
        ("0", "above 0"),
        ("2", r"\(0, 1\]"),
        ("", "takes a size"),
    ],
)
def test_sizes(size, message):
    with pytest.raises(ValueError, match=message):
        make(size=size)
    assert Structure.parse("dsf:0.2").obstacle(nn.Conv2d(16, 16, 3)) is None
