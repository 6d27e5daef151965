"""BasisConv2d against nn.Conv2d with the weight [B; A B], built here row by row."""

import copy
import inspect
import io
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis.layers.conv import (
    MODES,
    BasisConv2d,
    basis_channels_for,
    derives_apart,
    factorize,
    mixes_rows,
    padded_channels,
    resolve_mode,
)

C_IN, C_OUT, K = 8, 12, 4
EXPLICIT = ("factorized", "composed", "hybrid")
A = "coefficients.values"

# What nn.Conv2d offers; kernel_size and bias belong to it. Input images are 9 x 7.
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "kernel (3, 5)": {"kernel_size": (3, 5), "padding": (1, 2)},
    "even kernel": {"kernel_size": 2},
    "1x1": {"kernel_size": 1},
    "1x1, strided, no bias": {"kernel_size": 1, "stride": 2, "bias": False},
    "padding int": {"padding": 1},
    "padding tuple": {"padding": (2, 0)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 2)},
    "same, dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "stride (2, 1)": {"stride": (2, 1), "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "groups 4, no bias": {"groups": 4, "bias": False, "stride": (1, 2)},
    "reflect": {"padding_mode": "reflect", "padding": (1, 2)},
    "replicate": {"padding_mode": "replicate", "padding": 1, "stride": 2},
    "circular": {"padding_mode": "circular", "padding": (2, 1), "dilation": 2},
    "circular, same, even kernel": {"padding_mode": "circular", "padding": "same", "kernel_size": (2, 4)},
    "everything": {
        "groups": 2, "padding_mode": "reflect", "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1),
        "kernel_size": (2, 3), "bias": False,
    },
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def arguments(option, **changes):
    return {"kernel_size": 3} | OPTIONS[option] | changes


def make_layer(option="plain", *, permuted=False, **changes):
    """A float64 layer; ``permuted`` shuffles the output channels within their groups."""
    layer = BasisConv2d(C_IN, C_OUT, basis_channels=K, dtype=torch.float64, **arguments(option, **changes))
    if permuted:
        width = C_OUT // layer.groups
        order = torch.cat([torch.randperm(width) + i * width for i in range(layer.groups)])
        layer.load_state_dict(layer.state_dict() | {"order": order})
    return layer


def explicit_weight(layer, basis, coefficients):
    """W, row by row: per group the basis filters, then each derived one as a sum of them."""
    g, k = layer.groups, layer.basis_channels // layer.groups
    derived_per_group = layer.out_channels // g - k
    rows = []
    for i in range(g):
        own = [basis[i * k + j] for j in range(k)]
        rows += own
        for d in range(derived_per_group):
            a = coefficients[i * derived_per_group + d]
            rows.append(sum((a[j] * own[j] for j in range(k)), torch.zeros_like(basis[0])))
    return torch.stack([rows[c] for c in layer.order.tolist()])


def fixed_gradient(y):
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))


def reference(layer, x, option, trained=("x", "basis", A, "bias")):
    """Output and gradients of a plain nn.Conv2d with that weight."""
    leaves = {name: p.detach().clone().requires_grad_(name in trained) for name, p in layer.named_parameters()}
    leaves["x"] = x.detach().clone().requires_grad_("x" in trained)
    has_bias = layer.bias is not None
    conv = nn.Conv2d(C_IN, C_OUT, dtype=torch.float64, **arguments(option, bias=has_bias))
    weights = {"weight": explicit_weight(layer, leaves["basis"], leaves[A])}
    if has_bias:
        weights["bias"] = leaves["bias"]
    y = torch.func.functional_call(conv, weights, leaves["x"])
    y.backward(fixed_gradient(y))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def run(layer, x):
    """Output and gradients of the layer."""
    y = layer(x)
    y.backward(fixed_gradient(y))
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def assert_same(ours, expected, tolerance=1e-10):
    assert (ours is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", ["batch", "unbatched", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_mode_is_the_dense_convolution_forward_and_backward(option, mode, layout):
    layer = make_layer(option, permuted=layout != "unbatched", mode=mode)
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64)
    if layout == "unbatched":
        x = x[0]
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
    y, gradients = run(layer, x.requires_grad_())
    expected, expected_gradients = reference(layer, x, option)
    assert_same(y, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_same(gradient, expected_gradients[name])


@pytest.mark.parametrize("trained", [("basis",), (A,), ("bias",), ("x",), ("x", A), ("basis", "bias")])
@pytest.mark.parametrize("mode", EXPLICIT)
@pytest.mark.parametrize("option", ["plain", "everything", "groups"])
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(option, mode, trained):
    layer = make_layer(option, permuted=True, mode=mode, bias=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64, requires_grad="x" in trained)
    y, gradients = run(layer, x)
    expected, expected_gradients = reference(layer, x, option, trained)
    assert_same(y, expected)
    for name, gradient in gradients.items():
        assert (gradient is not None) == (name in trained)
        assert_same(gradient, expected_gradients[name])


def test_it_takes_the_arguments_of_conv2d_in_the_same_order():
    dense = list(inspect.signature(nn.Conv2d).parameters)
    ours = list(inspect.signature(BasisConv2d).parameters)
    assert ours[: len(dense)] == dense
    assert BasisConv2d(8, 12, 3, 2, 1, 1, 4, False, "reflect", ratio=1 / 3).basis.shape == (4, 2, 3, 3)


def test_all_basis_channels_make_a_plain_convolution():
    layer = BasisConv2d(8, 12, 3, ratio=1)
    assert layer.coefficients.matrix().shape == (0, 12)
    x = torch.randn(1, 8, 5, 5)
    for mode in EXPLICIT:
        layer.mode = mode
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.basis, layer.bias))
        layer(x).sum().backward()


# -- from and to a dense convolution ------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("k", [2, 4, 8, 10])
def test_from_conv_is_the_best_approximation_of_rank_k(k, groups):
    conv = nn.Conv2d(C_IN, C_OUT, 3, groups=groups, dtype=torch.float64)
    layer = BasisConv2d.from_conv(conv, basis_channels=k)
    rows = conv.weight.detach().reshape(groups, C_OUT // groups, -1)
    best = torch.linalg.svdvals(rows)[:, k // groups :].square().sum().sqrt()
    error = (layer.weight - conv.weight).norm()
    assert best > 0.1
    assert error.item() == pytest.approx(best.item(), rel=1e-9)


@pytest.mark.parametrize("option", OPTIONS)
def test_from_conv_is_exact_at_full_rank(option):
    conv = nn.Conv2d(C_IN, C_OUT, dtype=torch.float64, **arguments(option))
    layer = BasisConv2d.from_conv(conv, ratio=1)
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64)
    for layer.mode in MODES:
        assert_same(layer(x), conv(x))


def weight_of_rank(rank):
    return torch.randn(C_OUT, rank).double() @ torch.randn(rank, C_IN * 9).double()


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_from_conv_is_exact_and_finite_for_weights_of_low_rank(rank):
    conv = nn.Conv2d(C_IN, C_OUT, 3, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(weight_of_rank(rank).view_as(conv.weight))
    layer = BasisConv2d.from_conv(conv, basis_channels=K)
    assert_same(layer.weight, conv.weight)
    assert layer.coefficients.matrix().abs().max() < 10


def test_from_conv_is_exact_with_more_basis_filters_than_inputs_to_a_filter():
    conv = nn.Conv2d(1, 16, 3, dtype=torch.float64)  # F = 9 < k = 12 < C_out = 16
    layer = BasisConv2d.from_conv(conv, basis_channels=12)
    assert_same(layer.weight, conv.weight)
    assert_same(layer.to_conv().weight, conv.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_conv_works_in_every_floating_dtype(dtype):
    conv = nn.Conv2d(C_IN, C_OUT, 3).to(dtype)
    layer = BasisConv2d.from_conv(conv, basis_channels=8)
    double = BasisConv2d.from_conv(conv.double(), basis_channels=8)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    error = (layer.weight.double() - double.weight).norm() / double.weight.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_the_gauge_picks_coefficients_that_stay_small():
    basis, coefficients, order = factorize(torch.randn(64, 100, dtype=torch.float64), 16)
    assert basis.shape == (16, 100)
    assert coefficients.shape == (48, 16)
    assert sorted(order.tolist()) == list(range(64))
    assert coefficients.abs().max() < 3


def test_from_conv_keeps_what_belongs_to_the_layer():
    conv = nn.Conv2d(C_IN, C_OUT, 3, dtype=torch.float16).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    for layer in (
        BasisConv2d.from_conv(conv, ratio=0.5, mode="composed"),
        BasisConv2d.shaped_like(conv, ratio=0.5, mode="composed"),
    ):
        assert not layer.training
        assert layer.mode == "composed"
        assert not layer.basis.requires_grad
        assert not layer.coefficients.values.requires_grad
        assert layer.bias.requires_grad
        assert layer.bias.data_ptr() != conv.bias.data_ptr()
        assert layer.basis.is_contiguous(memory_format=torch.channels_last)
        assert layer.basis.dtype == torch.float16
        back = layer.to_conv()
        assert not back.training
        assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)
        assert back.weight.is_contiguous(memory_format=torch.channels_last)
        assert back.weight.dtype == torch.float16


def test_from_conv_takes_only_conv2d():
    with pytest.raises(TypeError, match="Linear"):
        BasisConv2d.from_conv(nn.Linear(3, 4), ratio=0.5)


@pytest.mark.parametrize("option", OPTIONS)
def test_to_conv_is_the_same_function_with_parameters_of_its_own(option):
    layer = make_layer(option, permuted=True)
    conv = layer.to_conv()
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64)
    assert type(conv) is nn.Conv2d
    assert_same(conv(x), layer(x))
    before = conv(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert_same(conv(x), before, 0)


# -- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("k", [16, 128])
def test_fresh_layers_keep_the_variance_of_a_dense_one(groups, k):
    c_in, c_out = 64, 256
    x = torch.randn(8, c_in, 8, 8)
    dense = nn.Conv2d(c_in, c_out, 3, groups=groups, bias=False)(x).var().item()
    basis, derived = [], []
    for _ in range(12):
        layer = BasisConv2d(c_in, c_out, 3, groups=groups, bias=False, basis_channels=k)
        variance = layer(x).detach().var(dim=(0, 2, 3)).view(groups, -1)
        basis.append(variance[:, : k // groups].mean())
        derived.append(variance[:, k // groups :].mean())
    assert torch.stack(basis).mean().item() == pytest.approx(dense, rel=0.04)
    assert torch.stack(derived).mean().item() == pytest.approx(dense, rel=0.08)


def test_the_bias_is_drawn_as_conv2d_draws_it():
    bound = 1 / math.sqrt(4 * 9)
    bias = BasisConv2d(4, 4096, 3, ratio=0.5).bias
    assert 0.99 * bound < bias.abs().max() <= bound
    assert bias.var().item() == pytest.approx(bound**2 / 3, rel=0.08)


# -- as a module --------------------------------------------------------------------------------


def test_extra_repr_names_what_matters():
    layer = BasisConv2d(8, 16, 3, padding=1, stride=(2, 1), groups=2, bias=False, ratio=0.25, mode="hybrid")
    assert repr(layer) == (
        "BasisConv2d(8, 16, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1), groups=2, bias=False, "
        "basis_channels=4 (r=0.25), mode=hybrid)"
    )
    assert repr(BasisConv2d(1, 4, 1, ratio=0.5)) == (
        "BasisConv2d(1, 4, kernel_size=(1, 1), basis_channels=2 (r=0.5), mode=auto)"
    )


@pytest.mark.parametrize("mode", EXPLICIT)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_state_carries_the_order_of_the_channels(mode, groups):
    fresh = BasisConv2d(C_IN, C_OUT, 3, groups=groups, basis_channels=K, mode=mode)
    made = BasisConv2d.from_conv(nn.Conv2d(C_IN, C_OUT, 3, groups=groups), basis_channels=K, mode=mode)
    assert not torch.equal(made.order, fresh.order)
    x = torch.randn(2, C_IN, 6, 6)
    for source, target in ((made, copy.deepcopy(fresh)), (fresh, copy.deepcopy(made))):
        target.load_state_dict(source.state_dict())
        assert_same(target(x), source(x), 0)


def test_reset_parameters_forgets_the_order():
    layer = BasisConv2d.from_conv(nn.Conv2d(C_IN, C_OUT, 3), basis_channels=K)
    layer.reset_parameters()
    assert layer.order.tolist() == list(range(C_OUT))
    assert_same(layer.weight, explicit_weight(layer, layer.basis, layer.coefficients.matrix()), 1e-6)


def test_deepcopy_is_equal_and_independent():
    layer = make_layer(permuted=True)
    x = torch.randn(1, C_IN, 5, 5, dtype=torch.float64)
    twin, before = copy.deepcopy(layer), layer(x)
    assert_same(twin(x), before, 0)
    with torch.no_grad():
        twin.basis.zero_()
    assert_same(layer(x), before, 0)


@pytest.mark.parametrize("mode", EXPLICIT)
def test_autocast_gives_bf16_close_to_full_precision(mode):
    layer = BasisConv2d(32, 64, 3, padding=1, ratio=0.25, mode=mode)
    x = torch.randn(4, 32, 8, 8)
    exact = layer(x)
    fixed_loss = torch.randn(exact.shape)
    gradients = torch.autograd.grad((exact * fixed_loss).sum(), layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.01
    rounded = torch.autograd.grad((y * fixed_loss).sum(), layer.parameters())
    for ours, expected in zip(rounded, gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() / expected.norm() < 0.01


def test_hybrid_refuses_second_derivatives_in_words():
    layer = make_layer(mode="hybrid")
    x = torch.randn(1, C_IN, 5, 5, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", ["factorized", "composed"])
def test_the_other_modes_have_second_derivatives(mode):
    layer = make_layer(mode=mode)
    x = torch.randn(1, C_IN, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("option", ["plain", "no bias", "groups"])
@pytest.mark.parametrize("mode", MODES)
def test_an_in_place_activation_may_follow(mode, option):
    layer = make_layer(option, permuted=True, mode=mode)
    x = torch.randn(2, C_IN, 6, 6, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), parameters)
    ours = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), parameters)
    for gradient, right in zip(ours, expected, strict=True):
        assert_same(gradient, right, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_export_gives_the_same_numbers(mode, option):
    layer = make_layer(option, permuted=True, mode=mode).eval()
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        assert_same(exported(x), layer(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("mode", EXPLICIT)
@pytest.mark.parametrize("permuted", [False, True])
def test_compile_takes_the_layer_as_one_graph(mode, permuted):
    layer = make_layer(permuted=permuted, mode=mode)
    torch._dynamo.reset()  # the limit on recompilations is one of the process
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, C_IN, 6, 6, dtype=torch.float64)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    y = compiled(x)
    assert_same(y, layer(x))
    for ours, right in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        assert_same(ours, right)


@pytest.mark.parametrize("mode", EXPLICIT)
def test_functional_call_uses_the_parameters_given(mode):
    layer, other = (make_layer(permuted=True, mode=mode) for _ in range(2))
    layer.load_state_dict(layer.state_dict() | {"order": other.order})
    x = torch.randn(1, C_IN, 5, 5, dtype=torch.float64)
    ours = torch.func.functional_call(layer, dict(other.named_parameters()), x)
    assert not torch.allclose(layer(x), other(x))
    assert_same(ours, other(x), 0)


@pytest.mark.parametrize("mode", EXPLICIT)
def test_it_runs_on_the_meta_device(mode):
    layer = BasisConv2d(8, 16, 3, ratio=0.5, mode=mode, device="meta")
    assert layer(torch.empty(2, 8, 5, 5, device="meta")).shape == (2, 16, 3, 3)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, -0.25, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"ratio is {ratio}, .*\(0, 1\]"):
        BasisConv2d(8, 12, 3, ratio=ratio)
    with pytest.raises(ValueError, match=f"ratio is {ratio}"):
        BasisConv2d.from_conv(nn.Conv2d(8, 12, 3), ratio=ratio)


@pytest.mark.parametrize(
    ("k", "groups", "right"),
    [
        (0, 1, "between 1 and out_channels = 12"),
        (13, 1, "between 1 and out_channels = 12"),
        (-1, 1, "between 1 and out_channels = 12"),
        (True, 1, "whole number"),
        (4.0, 1, "whole number"),
        (3, 2, "multiple of groups = 2"),
    ],
)
def test_a_number_of_basis_channels_that_makes_no_sense_is_refused(k, groups, right):
    with pytest.raises(ValueError, match=f"basis_channels is {k}, .*{right}"):
        BasisConv2d(8, 12, 3, groups=groups, basis_channels=k)


def test_exactly_one_of_ratio_and_basis_channels_is_wanted():
    for wrong in ({}, {"ratio": 0.5, "basis_channels": 6}):
        with pytest.raises(ValueError, match="give one of basis_channels"):
            BasisConv2d(8, 12, 3, **wrong)


def test_an_unknown_mode_is_refused_at_any_time():
    with pytest.raises(ValueError, match=r"mode is 'fast', .*factorized, composed, hybrid"):
        BasisConv2d(8, 12, 3, ratio=0.5, mode="fast")
    layer = BasisConv2d(8, 12, 3, ratio=0.5)
    with pytest.raises(ValueError, match="mode is 'dense'"):
        layer.mode = "dense"
    assert layer.mode == "auto"


@pytest.mark.parametrize(
    ("ratio", "out_channels", "groups", "k"),
    [(0.5, 64, 1, 32), (0.25, 10, 1, 2), (0.001, 64, 1, 1), (1, 7, 1, 7), (0.3, 12, 4, 4), (0.01, 12, 3, 3)],
)
def test_the_nearest_number_of_basis_channels(ratio, out_channels, groups, k):
    assert basis_channels_for(ratio, out_channels, groups) == k


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 8])
def test_resolved_mode_is_one_of_the_three(mode, groups):
    resolved = BasisConv2d(256, 256, 3, groups=groups, ratio=0.25, mode=mode).resolved_mode
    assert resolved in EXPLICIT
    assert mode in ("auto", resolved)


@pytest.mark.parametrize(
    ("fan_in", "width", "ratio", "cpu", "cuda"),
    [
        (9 * 64, 64, 1 / 2, "factorized", "composed"),  # 64 channels: a GPU is bound by memory there
        (9 * 64, 64, 3 / 4, "factorized", "composed"),
        (9 * 64, 128, 1 / 2, "factorized", "composed"),
        (9 * 64, 128, 1 / 4, "factorized", "factorized"),
        (9 * 128, 128, 1 / 2, "factorized", "factorized"),
        (9 * 128, 128, 65 / 128, "factorized", "composed"),
        (9 * 128, 256, 1 / 2, "factorized", "factorized"),
        (9 * 256, 256, 3 / 4, "factorized", "composed"),
        (9 * 512, 512, 3 / 4, "factorized", "composed"),
        (9 * 256, 256, 121 / 256, "factorized", "factorized"),  # costs a GPU as much as 128
        (9 * 256, 256, 129 / 256, "factorized", "composed"),  # as much as 136
        (9 * 3, 64, 1 / 4, "composed", "composed"),  # a stem has little to save
        (256, 1024, 1 / 4, "composed", "composed"),  # a 1x1 convolution neither
        (9 * 16, 16, 1 / 4, "composed", "composed"),
        (9 * 32, 32, 1 / 2, "factorized", "composed"),
        (9 * 512, 512, 1.0, "composed", "composed"),
    ],
)
def test_auto_follows_its_rule(fan_in, width, ratio, cpu, cuda):
    for device, expected in ((torch.device("cpu"), cpu), (torch.device("cuda"), cuda)):
        shape = {"out_channels": width, "basis_channels": round(width * ratio)}
        apart = derives_apart(device, **shape)
        assert resolve_mode("auto", device=device, fan_in=fan_in, apart=apart, **shape) == expected


@pytest.mark.parametrize("ratio", [1 / 4, 1 / 2, 3 / 4, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_factorized_gives_the_same_whether_it_mixes_or_joins(ratio, bias, permuted):
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=bias).double()
    layer = BasisConv2d.from_conv(conv, ratio=ratio, mode="factorized")
    if not permuted:
        layer = BasisConv2d.shaped_like(conv, ratio=ratio, mode="factorized")
    assert layer.derives_apart == (ratio in (1 / 2, 3 / 4) and torch.equal(layer.order, torch.arange(8)))
    dense = layer.to_conv()
    for x in (torch.randn(2, 6, 5, 5).double(), torch.randn(6, 5, 5).double()):
        assert_same(layer(x), dense(x))


@pytest.mark.parametrize(
    ("device", "dtype", "k", "expected"),
    [
        ("cuda", torch.float16, 20, 24),
        ("cuda", torch.bfloat16, 24, 24),
        ("cuda", torch.float32, 20, 20),
        ("cpu", torch.bfloat16, 20, 20),
    ],
)
def test_basis_channels_are_filled_up_where_tensor_cores_want_it(device, dtype, k, expected):
    assert padded_channels(torch.device(device), dtype, k) == expected


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_filling_up_changes_no_number(last, permuted, monkeypatch):
    conv = nn.Conv2d(6, 20, 3, padding=1).double()
    conv = conv.to(memory_format=torch.channels_last) if last else conv
    make = BasisConv2d.from_conv if permuted else BasisConv2d.shaped_like
    layer = make(conv, basis_channels=5, mode="factorized")
    x = torch.randn(2, 6, 5, 5).double().requires_grad_()
    seen = []

    def gradients():
        y = layer(x)
        return y, torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    def filled(device, dtype, k):
        seen.append((device.type, dtype, k))
        return 8

    plain = gradients()
    monkeypatch.setattr("basis.layers.conv.padded_channels", filled)
    assert_same(gradients(), plain)
    assert seen == [("cpu", torch.float64, 5)]


# -- mixing as a GPU does it, on a CPU ----------------------------------------------------------


def test_a_gpu_mixes_rows_in_half_precision_only():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert mixes_rows(gpu, torch.bfloat16)
    assert mixes_rows(gpu, torch.float16)
    assert not mixes_rows(gpu, torch.float32)  # which it would multiply without TF32
    assert not mixes_rows(cpu, torch.bfloat16)


@pytest.fixture
def linear_calls(monkeypatch):
    """Take every decision as on a GPU in half precision; the inputs of the calls of F.linear."""
    calls, linear = [], F.linear

    def counted(x, *args):
        calls.append(x)
        return linear(x, *args)

    monkeypatch.setattr("basis.layers.conv.mixes_rows", lambda device, dtype: True)
    monkeypatch.setattr("basis.layers.conv.derives_apart", lambda device, **shape: False)
    monkeypatch.setattr("basis.layers.conv.padded_channels", lambda device, dtype, k: 8 * math.ceil(k / 8))
    monkeypatch.setattr(F, "linear", counted)
    return calls


def last(x):
    return x.to(memory_format=torch.channels_last)


def gpu_layer(*, k=8, bias=True, permuted=False, dtype=torch.float64, **changes):
    conv = nn.Conv2d(C_IN, 20, 3, padding=1, bias=bias, dtype=dtype)
    make = BasisConv2d.from_conv if permuted else BasisConv2d.shaped_like
    return make(conv, basis_channels=k, mode="factorized", **changes)


def values_and_gradients(layer, x, call=None):
    """What ``call(x)`` gives, the layer unless told, and the gradients of a sum of its squares."""
    x = x.detach().requires_grad_()  # keeps the memory format
    y = (layer if call is None else call)(x)
    y.square().sum().backward()
    result = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return result


def assert_all_same(ours, expected, tolerance=1e-12):
    for value, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=tolerance, atol=tolerance)


def by_weight(layer):
    """The same function of the same parameters, by one convolution."""
    return lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("form", ["dense", "sparse:2", "grouped:2"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("k", [6, 8, 10])
@pytest.mark.parametrize("bias", [False, True])
def test_mixing_rows_changes_no_number(form, permuted, k, bias, linear_calls):
    layer = gpu_layer(k=k, bias=bias, permuted=permuted, coefficients=form).eval()
    for x in (torch.randn(2, C_IN, 5, 4).double(), torch.randn(C_IN, 5, 4).double()):
        assert_all_same(values_and_gradients(layer, x), values_and_gradients(layer, x, by_weight(layer)))
    assert not linear_calls
    x = last(torch.randn(2, C_IN, 5, 4).double())
    ours = values_and_gradients(layer, x)
    assert_all_same(ours, values_and_gradients(layer, x, by_weight(layer)))
    assert len(linear_calls) == (form != "grouped:2")
    assert all(rows.is_contiguous() and rows.shape[-1] % 8 == 0 for rows in linear_calls)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in ours[:2])


@pytest.mark.parametrize("permuted", [False, True])
def test_mixing_rows_in_one_graph_twice_in_checkpoints_and_in_place(permuted, linear_calls):
    layer = gpu_layer(permuted=permuted)
    x, dense = last(torch.randn(2, C_IN, 5, 4).double()), by_weight(layer)
    again = torch.randn(C_IN, 20, 1, 1).double()

    def twice(one):
        return lambda x: one(F.conv2d(one(x), again))

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    for call, right in (
        (twice(layer), twice(dense)),
        (twice(checkpointed), twice(dense)),
        (lambda x: F.relu(layer(x), inplace=True), lambda x: F.relu(dense(x))),
    ):
        assert_all_same(values_and_gradients(layer, x, call), values_and_gradients(layer, x, right), 1e-11)
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),), fast_mode=True)
    exact = values_and_gradients(layer, x)
    two = layer(x), layer(x)  # both before a backward pass
    sum(y.square().sum() for y in two).backward()
    assert_all_same([p.grad / 2 for p in layer.parameters()], exact[2:])


def test_mixing_rows_follows_the_parameters(linear_calls):
    layer = gpu_layer(permuted=True)
    x = last(torch.randn(2, C_IN, 5, 4).double())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(2):
        assert_all_same(values_and_gradients(layer, x), values_and_gradients(layer, x, by_weight(layer)))
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.coefficients.values.data.add_(0.5)  # an update that the version counter does not tell
    with torch.inference_mode():
        y = layer.eval()(x)
    assert_all_same([y], [by_weight(layer)(x)])
    twin = copy.deepcopy(layer)
    assert_all_same(values_and_gradients(twin, x), values_and_gradients(layer, x))
    assert_all_same([twin.float()(x.float())], [y.float()], 1e-4)


@pytest.mark.parametrize("k", [6, 8])
def test_mixing_rows_under_autocast(k, linear_calls):
    layer = gpu_layer(k=k, dtype=torch.float32)
    x = last(torch.randn(2, C_IN, 5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = values_and_gradients(layer, x)
    assert ours[0].dtype == torch.bfloat16
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert len(linear_calls) == 1
    for value, right in zip(ours, values_and_gradients(layer, x, by_weight(layer)), strict=True):
        assert (value - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("k", [6, 8])
def test_mixing_rows_compiles_as_one_graph(k, linear_calls):
    layer = gpu_layer(k=k, permuted=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = last(torch.randn(2, C_IN, 5, 4).double())
    assert_all_same(values_and_gradients(layer, x, compiled), values_and_gradients(layer, x))


def test_mixing_rows_of_several_layers_at_once(linear_calls):
    layers = [gpu_layer() for _ in range(2)]
    x = last(torch.randn(2, C_IN, 5, 4).double())
    state = torch.func.stack_module_state(layers)
    ours = torch.vmap(lambda *own: torch.func.functional_call(layers[0], own, x))(*state)
    assert_all_same(ours, [by_weight(layer)(x) for layer in layers])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("k", [20, 32])
def test_a_cuda_graph_of_the_layer_follows_its_parameters(k):
    layer = last(BasisConv2d(32, 128, 3, padding=1, basis_channels=k, mode="factorized", device="cuda"))
    parameters = list(layer.parameters())
    x = last(torch.randn(8, 32, 16, 16, device="cuda"))

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            y = layer(x)
        gradients = torch.autograd.grad(y.float().square().mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient)
        return y, *gradients

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        twin = copy.deepcopy(layer).double()
        y = by_weight(twin)(x.double())
        expected = [y, *torch.autograd.grad(y.square().mean(), list(twin.parameters()))]
        graph.replay()
        for ours, right in zip(results, expected, strict=True):
            assert (ours - right).norm() < 0.02 * right.norm()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):  # eager, after updates by the graph
        y, right = layer(x), by_weight(layer)(x)
    assert (y - right).norm() < 0.02 * right.norm()


# -- the identity in M is kept, but is no part of the state -------------------------------------


def test_the_identity_is_in_no_state_and_survives_every_move():
    layer = BasisConv2d(C_IN, C_OUT, 3, basis_channels=K)
    state, x = layer.state_dict(), torch.randn(1, C_IN, 5, 5)
    assert sorted(state) == ["basis", "bias", A, "order"]
    expected, address = layer.mixing, layer._identity.data_ptr()
    layer.load_state_dict(state)
    layer.float()
    assert layer._identity.data_ptr() == address  # which a CUDA graph may have recorded
    empty, assigned = (BasisConv2d(C_IN, C_OUT, 3, basis_channels=K, device="meta") for _ in range(2))
    empty.to_empty(device="cpu").load_state_dict(state)
    assigned.load_state_dict({n: v.double() if v.is_floating_point() else v for n, v in state.items()}, assign=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (empty, assigned.float(), torch.load(file, weights_only=False), copy.deepcopy(layer)):
        assert_same(other.mixing, expected, 0)
        assert_same(other(x), layer(x), 1e-6)
    halves = {name: p.bfloat16() for name, p in layer.named_parameters()}
    assert torch.func.functional_call(layer, halves, x.bfloat16()).dtype == torch.bfloat16
