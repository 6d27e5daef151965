"""BasisConv2d against nn.Conv2d with the weight [B; A B], built here row by row."""

import copy
import inspect
import io
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis.layers.conv import MODES, BasisConv2d, derives_apart, resolve_mode
from tests.layers.by_rows import assert_same, reference, run, shuffled

C_IN, C_OUT, K = 8, 12, 4
EXPLICIT = ("factorized", "composed")
A = "coefficients.weight"

# What nn.Conv2d offers; kernel_size and bias belong to it. Input images are 9 x 7.
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "kernel (3, 5)": {"kernel_size": (3, 5), "padding": (1, 2)},
    "even kernel": {"kernel_size": 2},
    "1x1, strided, no bias": {"kernel_size": 1, "stride": 2, "bias": False},
    "padding tuple": {"padding": (2, 0)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 2)},
    "same, dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
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
    layer = BasisConv2d(C_IN, C_OUT, basis_channels=K, dtype=torch.float64, **arguments(option, **changes))
    return shuffled(layer) if permuted else layer


def images():
    return torch.randn(2, C_IN, 9, 7, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LAYOUTS = ("batch", "unbatched", "channels_last")
CASES = [(option, MODES[i // 3 % 3], LAYOUTS[i % 3]) for i, option in enumerate(OPTIONS)]  # every pair of them


@pytest.mark.parametrize(("option", "mode", "layout"), CASES)
def test_every_mode_is_the_dense_convolution_forward_and_backward(option, mode, layout):
    layer = make_layer(option, permuted=layout != "unbatched", mode=mode)
    x = images()
    if layout == "unbatched":
        x = x[0]
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
    assert_same(run(layer, x.requires_grad_()), reference(layer, x, **arguments(option)))


@pytest.mark.parametrize("trained", [("basis",), (A,), ("bias",), ("x", A)])
@pytest.mark.parametrize(("mode", "option"), list(zip(EXPLICIT, ("plain", "everything"), strict=True)))
def test_frozen_parts_get_no_gradient_and_the_others_the_right_one(option, mode, trained):
    layer = make_layer(option, permuted=True, mode=mode, bias=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    x = torch.randn(2, C_IN, 9, 7, dtype=torch.float64, requires_grad="x" in trained)
    assert_same(run(layer, x), reference(layer, x, trained, **arguments(option)))


def test_it_takes_the_arguments_of_conv2d_in_the_same_order():
    dense = list(inspect.signature(nn.Conv2d).parameters)
    ours = list(inspect.signature(BasisConv2d).parameters)
    assert ours[: len(dense)] == dense
    assert BasisConv2d(8, 12, 3, 2, 1, 1, 4, False, "reflect", ratio=1 / 3).basis.shape == (4, 2, 3, 3)


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


@pytest.mark.parametrize("option", ["plain", "same, even kernel", "everything"])
def test_from_conv_is_exact_at_full_rank(option):
    conv = nn.Conv2d(C_IN, C_OUT, dtype=torch.float64, **arguments(option))
    layer = BasisConv2d.from_conv(conv, ratio=1)
    x = images()
    for layer.mode in MODES:
        assert_same(layer(x), conv(x))
    assert_same(layer.to_conv()(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_conv_works_in_every_floating_dtype(dtype):
    conv = nn.Conv2d(C_IN, C_OUT, 3).to(dtype)
    layer = BasisConv2d.from_conv(conv, basis_channels=8)
    double = BasisConv2d.from_conv(conv.double(), basis_channels=8)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    error = (layer.weight.double() - double.weight).norm() / double.weight.norm()
    assert error < 4 * torch.finfo(dtype).eps


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
        assert not layer.coefficients.weight.requires_grad
        assert layer.bias.requires_grad
        assert layer.bias.data_ptr() != conv.bias.data_ptr()
        assert layer.basis.is_contiguous(memory_format=torch.channels_last)
        assert layer.basis.dtype == torch.float16
        back = layer.to_conv()
        assert not back.training
        assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)
        assert back.weight.is_contiguous(memory_format=torch.channels_last)
        assert back.weight.dtype == torch.float16


# -- as a module --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", EXPLICIT)
def test_both_modes_have_second_derivatives(mode):
    layer = make_layer(mode=mode)
    x = torch.randn(1, C_IN, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize(("mode", "option"), list(zip(MODES, ("plain", "everything", "plain"), strict=True)))
def test_export_gives_the_same_numbers(mode, option):
    layer = make_layer(option, permuted=True, mode=mode).eval()
    x = images()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        assert_same(exported(x), layer(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize(("mode", "permuted"), list(zip(EXPLICIT, (False, True), strict=True)))
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


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ratio": 0.0}, "ratio is 0.0"), ({"ratio": 1.5}, "ratio is 1.5"),
        ({"basis_channels": 0}, "basis_channels is 0, .*out_channels = 12"),
        ({"basis_channels": True}, "basis_channels is True"), ({"basis_channels": 4.0}, "basis_channels is 4.0"),
        ({"basis_channels": 3, "groups": 2}, "basis_channels is 3, .*groups = 2"), ({}, "basis_channels"),
        ({"ratio": 0.5, "basis_channels": 6}, "basis_channels"), ({"ratio": 0.5, "mode": "fast"}, "mode is 'fast'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, name):
    with pytest.raises(ValueError, match=name):
        BasisConv2d(8, 12, 3, **options)


@pytest.mark.parametrize(
    ("fan_in", "width", "ratio", "cpu", "cuda"),
    [
        (9 * 64, 64, 1 / 2, "factorized", "composed"),  # 64 channels: a GPU is bound by memory there
        (9 * 64, 128, 1 / 4, "factorized", "factorized"),
        (9 * 128, 128, 1 / 2, "factorized", "factorized"),
        (9 * 128, 128, 65 / 128, "factorized", "composed"),
        (9 * 256, 256, 3 / 4, "factorized", "composed"),
        (9 * 256, 256, 121 / 256, "factorized", "factorized"),  # costs a GPU as much as 128
        (9 * 256, 256, 129 / 256, "factorized", "composed"),  # as much as 136
        (9 * 3, 64, 1 / 4, "composed", "composed"),  # a stem has little to save
        (256, 1024, 1 / 4, "composed", "composed"),  # a 1x1 convolution neither
        (9 * 512, 512, 1.0, "composed", "composed"),
    ],
)
def test_auto_follows_its_rule(fan_in, width, ratio, cpu, cuda):
    for device, expected in ((torch.device("cpu"), cpu), (torch.device("cuda"), cuda)):
        shape = {"out_channels": width, "basis_channels": round(width * ratio)}
        apart = derives_apart(device, **shape)
        assert resolve_mode("auto", device=device, fan_in=fan_in, apart=apart, **shape) == expected


@pytest.mark.parametrize(
    ("ratio", "bias", "permuted"),
    [(1 / 4, True, False), (1 / 2, True, False), (3 / 4, False, False), (1 / 2, False, True), (1.0, True, False)],
)
def test_factorized_gives_the_same_whether_it_mixes_or_joins(ratio, bias, permuted):
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=bias).double()
    layer = BasisConv2d.from_conv(conv, ratio=ratio, mode="factorized")
    if not permuted:
        layer = BasisConv2d.shaped_like(conv, ratio=ratio, mode="factorized")
    assert layer.derives_apart == (ratio in (1 / 2, 3 / 4) and torch.equal(layer.order, torch.arange(8)))
    dense = layer.to_conv()
    for x in (torch.randn(2, 6, 5, 5).double(), torch.randn(6, 5, 5).double()):
        assert_same(layer(x), dense(x))


# -- mixing as a GPU does it, on a CPU ----------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "fitted", "k", "bias"),
    [
        ("dense", False, 6, True),
        ("dense", True, 8, False),
        ("sparse:2", True, 10, True),
        ("grouped:2", False, 8, False),
    ],
)
def test_mixing_rows_changes_no_number(form, fitted, k, bias, monkeypatch):
    calls, linear = [], F.linear
    monkeypatch.setattr("basis.layers.conv.uses_tensor_cores", lambda x: True)
    monkeypatch.setattr("basis.layers.conv.derives_apart", lambda device, **shape: False)
    monkeypatch.setattr(F, "linear", lambda x, *args: (calls.append(x), linear(x, *args))[1])
    conv = nn.Conv2d(C_IN, 20, 3, padding=1, bias=bias, dtype=torch.float64)
    make = BasisConv2d.from_conv if fitted else BasisConv2d.shaped_like
    layer = make(conv, basis_channels=k, mode="factorized", coefficients=form).eval()
    batch = torch.randn(2, C_IN, 5, 4).double()
    for x, rows in ((batch, 0), (batch[0], 0), (batch.to(memory_format=torch.channels_last), form != "grouped:2")):
        x.requires_grad_()
        wanted = [x, *layer.parameters()]
        y, expected = layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)
        ours, right = (torch.autograd.grad(value.square().sum(), wanted) for value in (y, expected))
        for value, other in zip((y, *ours), (expected, *right), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-12)
        assert len(calls) == rows
    assert all(maps.is_contiguous() and maps.shape[-1] % 8 == 0 for maps in calls)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if form == "dense":
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


# -- the identity in M is kept, but is no part of the state -------------------------------------


def test_the_identity_is_in_no_state_and_survives_every_move():
    layer = BasisConv2d(C_IN, C_OUT, 3, basis_channels=K)
    state, x = layer.state_dict(), torch.randn(1, C_IN, 5, 5)
    assert sorted(state) == ["basis", "bias", A, "order"]
    expected, address = layer.mixing, layer.constant("identity", layer.basis).data_ptr()
    layer.load_state_dict(state)
    layer.float()
    assert layer.constant("identity", layer.basis).data_ptr() == address  # which a CUDA graph may have recorded
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
