"""Deformable butterflies, against their factors written out as matrices."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis.layers.structured import Structure
from basis.layers.structured.butterfly import PAPER, DebutConv2d

CHAINS = {  # of the paper, with the compression that it gives for the layer
    (64, 576): ("(4,6,1)(2,3,4)(1,2,8)(8,16,8)", 88.2),
    (128, 1152): ("(8,9,1)(2,4,8)(2,4,16)(4,8,32)", 91.0),
    (256, 2304): ("(8,9,1)(4,8,8)(2,4,32)(4,8,64)", 94.8),
    (512, 4608): ("(8,9,1)(2,2,8)(2,2,16)(2,2,32)(2,4,64)(2,4,128)(2,4,256)", 96.8),
}
SMALL = "(4,9,1)(2,2,4)(2,4,8)"  # 8 -> 16 channels, 3x3
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": 2, "padding": (1, 2)},
    "same, even kernel": {"kernel_size": (2, 3), "padding": "same", "size": "0.4"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "dilation": (1, 2)},
    "1x1": {"kernel_size": 1, "size": "0.7"},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(inputs=8, outputs=16, **changes):
    return DebutConv2d(inputs, outputs, **({"kernel_size": 3, "size": SMALL, "dtype": torch.float64} | changes))


def matrix(layer):
    """R_N ... R_1, each block by block of r x s diagonal matrices."""
    product = torch.eye(math.prod(layer.filter_shape), dtype=torch.float64)
    for factor in layer.parts.values():
        blocks = [torch.cat([torch.cat([e.diag() for e in row], 1) for row in block]) for block in factor.detach()]
        product = torch.block_diag(*blocks) @ product
    return product


@pytest.mark.parametrize("shape", [(8, 10, 9), (2, 8, 10, 9)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_forward_and_backward_are_those_of_the_product_of_the_factors(options, shape):
    layer = make(**options)
    kh, kw = layer.kernel_size
    weight = matrix(layer).view(16, kh, kw, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = layer.to_conv()
    out, expected = layer(x), dense(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    up = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, [x], up)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_factors():
    layer = make(2, 4, size="(2,9,1)(2,2,2)")
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in layer.parts.items()), strict=True)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def forward(*factors):
        return torch.func.functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, values)


def test_patches_have_channels_inside():
    """The first factor of (4,9,1) reaches 9 neighbours in the order kernel position, then channel."""
    layer = make()
    first = dict(layer.named_parameters())["factor_1"]
    first.data[1:] = 0  # but for the first block: all 8 channels of position 0, and channel 0 of position 1
    reached = layer.weight.detach().flatten(2).abs().sum(0).nonzero().tolist()
    assert sorted(reached) == sorted([[c, 0] for c in range(8)] + [[0, 1]])


@pytest.mark.parametrize(("shape", "text", "saved"), [(k, *v) for k, v in CHAINS.items()], ids=map(str, CHAINS))
def test_chains_of_the_paper(shape, text, saved):
    layer = DebutConv2d(shape[1] // 9, shape[0], 3, size=text, device="meta")
    assert "".join(str(factor).replace(" ", "") for factor in PAPER[shape]) == text
    assert layer.stored == layer.algebra == sum(p.numel() for p in layer.parts.values())
    assert 100 * (1 - layer.stored / math.prod(shape)) == pytest.approx(saved, abs=0.1)
    assert layer.products[0].macs == math.prod(shape)  # what is executed


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(16, 16), (16, 32), (24, 24), (40, 40), (64, 64), (64, 128), (160, 160), (256, 256), (320, 640), (512, 512)],
)
@pytest.mark.parametrize("limit", [0.2, 0.3, 0.5])
def test_fractions_are_met_nearly_and_at_full_rank(inputs, outputs, limit):
    layer = DebutConv2d(inputs, outputs, 3, size=limit, device="meta")
    dense = outputs * inputs * 9
    assert 0.7 * limit * dense < layer.stored <= limit * dense
    assert min(b * r * t for b, r, _, t in (p.shape for p in layer.parts.values())) >= outputs
    assert layer.stored == layer.algebra


def test_narrow_chains_where_no_other_is_small_enough():
    layer = make(16, 16, size="0.1")
    assert layer.stored <= 0.1 * 16 * 144
    assert torch.linalg.matrix_rank(matrix(layer)) == 8
    assert torch.linalg.matrix_rank(matrix(make(16, 16, size="0.2"))) == 16


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 64), (96, 24), (32, 192)])
def test_kernels_of_1x1(inputs, outputs):
    layer = DebutConv2d(inputs, outputs, 1, size=0.3, dtype=torch.float64)
    assert 0.2 * inputs * outputs < layer.stored <= 0.3 * inputs * outputs
    assert torch.linalg.matrix_rank(matrix(layer)) == min(inputs, outputs)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("(4,9,2)(2,2,4)(2,4,8)", r"factor 1 .* \(4,9,2\), but its t must be .* 1$"),
        ("(4,9,1)(2,2,4)(2,4,4)", r"factor 3 .* \(2,4,4\), but its t must be .* 8$"),
        ("(4,9,1)(2,3,4)(2,4,8)", r"factor 2 .* \(2,3,4\), which takes a multiple of s t = 12 .* gets 32"),
        ("(4,9,1)(2,2,4)(2,2,8)", r"factor 3 .* \(2,2,8\), which takes exactly s t = 16 .* gets 32"),
        ("(4,9,1)(2,2,4)(4,4,8)", "gives 32 numbers, but the layer has 16 output channels"),
        ("(4,9,1)(2,2)", r"must be whole numbers \(r,s,t\)"),
        ("(4,9,1),(2,2,4)", r"must be whole numbers \(r,s,t\)"),
        ("0", "above 0"),
        ("1.5", r"\(0, 1\]"),
        ("many", "must be a number"),
        ("0.05", r"no chain for 16 x 72 has at most 57 of the 1,152 numbers: the smallest has \d+"),
        ("", "takes a size"),
    ],
)
def test_sizes_that_do_not_fit(size, message):
    with pytest.raises(ValueError, match=message):
        make(size=size)


def test_the_smallest_fraction_that_is_named_can_be_had():
    with pytest.raises(ValueError, match="the smallest has") as error:
        make(size="0.05")
    _, rest = str(error.value).split("the smallest has ")
    count, least = rest.split(", for a fraction of ")
    assert make(size=least).stored == int(count)
    with pytest.raises(ValueError, match="there is none for this shape"):
        make(1, 7, size="0.5")


@pytest.mark.parametrize("text", ["0.05", "0.1", "0.3", CHAINS[64, 576][0]])
def test_new_weights_have_the_variance_of_he_and_deep_stacks_keep_theirs(text):
    layers = [DebutConv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False, size=text) for _ in range(10)]
    weights = torch.stack([layer.weight.detach() for layer in layers])
    assert weights.std() == pytest.approx(math.sqrt(2 / 576), rel=0.1)
    x = torch.randn(8, 64, 8, 8)
    for layer in layers:
        x = layer(x.relu()).detach()
    assert 0.3 < x.std() < 2.5  # a layer of PyTorch's default would leave 1e-4


def test_fit_finds_a_butterfly():
    target = make(64, 64, size=CHAINS[64, 576][0]).weight.detach()
    layer = make(64, 64, size=CHAINS[64, 576][0])
    layer.fit(target)
    assert (layer.weight - target).norm() < 1e-10 * target.norm()


def test_fit_is_a_minimum_in_each_factor():
    """And captures at least the fraction of a random weight that its number of parameters is."""
    conv = nn.Conv2d(32, 32, 3)
    layer = DebutConv2d.from_conv(conv, size="0.2")
    error = (layer.weight - conv.weight).square().sum()
    assert error < (1 - layer.stored / conv.weight.numel()) * conv.weight.square().sum()
    torch.testing.assert_close(layer.bias, conv.bias)
    last = list(layer.parts.values())[-1]
    (slope,) = torch.autograd.grad(error, last)
    assert slope.norm() < 1e-4 * error.detach().sqrt() * conv.weight.norm()


def test_copies_state_and_formats():
    layer = make().float()
    other = make(dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(layer).state_dict())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    last = DebutConv2d.shaped_like(conv, size=SMALL)
    out = last(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, last.weight, last.bias))
    assert layer(x).is_contiguous()


def test_autocast_rounds_the_weight_once():
    layer = make(dtype=torch.float32)
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert layer.weight.dtype == torch.float32
    expected = F.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    torch.testing.assert_close(out, expected)


def test_text_and_meta():
    structure = Structure.parse("debut:" + SMALL)
    assert str(structure) == "debut:" + SMALL
    assert structure.obstacle(nn.Conv2d(8, 16, 3)) is None
    assert "(2,4,8), which takes exactly s t = 32 numbers, but gets 16" in structure.obstacle(nn.Conv2d(4, 16, 3))
    assert structure.check(nn.Conv2d(8, 16, 3))(torch.empty(1, 8, 5, 5, device="meta")).shape == (1, 16, 3, 3)
