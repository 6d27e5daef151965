"""cost() against torch's flop counter, against what autograd really saves, and against known numbers."""

import copy
import itertools
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from basis.costs import FUNCTIONS, cost, count_parameters
from basis.inputs import tensors_in
from basis.layers.batchnorm import couple
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.substitution import substitute
from tests.unusual import UNUSUAL, Clips, Of, Pitch, Two, made

IGNORED = ("Using padding='same' with even kernel", "TF32 acceleration", ".*torch.jit.script", ".*quantize_per_tensor")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in IGNORED]
MODES = ("factorized", "composed")
NO_STEM = ("conv1", "*.shortcut.*")


def meta_model(name="resnet18", **changes):
    with torch.device("meta"):
        return build(name, **changes)


def basis_model(ratio, exclude=(), **options):
    return substitute(meta_model(), ratio=ratio, exclude=exclude, init="random", **options)


def executed_macs(model, *inputs):
    """MACs that the flop counter sees in a training step of ``model``: forward, backward."""
    # It cannot see into other kernels of attention, nor into oneDNN's LSTM.
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        with FlopCounterMode(display=False) as forward:
            outputs = tensors_in(model(*inputs))
        with FlopCounterMode(display=False) as backward:
            if recorded := [y for y in outputs if y.requires_grad]:
                sum(y.sum() for y in recorded).backward()
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


class Mixed(nn.Module):
    """A grouped basis convolution, a branch on values, which meta tensors lack, and layers that cannot be counted."""

    def __init__(self):
        super().__init__()
        self.conv = BasisConv2d(8, 16, 3, groups=2, basis_channels=4, mode="factorized")
        self.unused, self.odd = nn.Linear(2, 2), nn.Parameter(torch.ones(5, 5))

    def forward(self, x):
        return self.conv(x) if x.sum().item() == 0 else x


def test_a_model_that_cannot_run_on_meta_runs_for_real_and_names_what_it_cannot_count():
    report = cost(Mixed(), (8, 5, 5), batch_size=3)
    n, f = 3 * 9, 4 * 9
    layer = report.to_frame().loc["conv"]
    assert layer["parameters"] == 4 * f + 12 * 2 + 16
    assert layer["forward_macs"] == layer["weight_gradient_macs"] == n * (4 * f + 12 * 2)
    assert layer["input_gradient_macs"] == n * 12 * 2  # only dZ: the input needs no gradient
    assert (layer["identity_forward_macs"], layer["dense_forward_macs"]) == (n * 4 * 2, n * 16 * f)
    assert [layer.name for layer in report.layers if not layer.counted] == ["unused"]
    assert str(report).endswith("never called: unused")


# -- known numbers ------------------------------------------------------------------------------


def test_dense_resnet18():
    total = cost(meta_model(), (3, 32, 32)).total
    assert total.parameters == 11_173_962
    assert total.forward_macs == 555_422_720
    assert total.weight_gradient_macs == total.forward_macs
    assert total.input_gradient_macs == total.forward_macs - 32 * 32 * 64 * 27  # all but the stem
    assert total.backward_macs == total.input_gradient_macs + total.weight_gradient_macs
    assert total.identity_forward_macs == total.identity_backward_macs == 0


def published(ratio, exclude=(), **options):
    """As published, with every layer: also those that a uniform plan leaves dense, since they grow."""
    model = meta_model()
    sizes = {n: round(ratio * m.out_channels) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    chosen = {n: k for n, k in sizes.items() if not any(fnmatchcase(n, pattern) for pattern in exclude)}
    return substitute(model, chosen, init="random", **options)


@pytest.mark.parametrize(
    ("ratio", "exclude", "parameters", "millions"),
    [
        (3 / 4, (), 8_710_554, 432.3), (1 / 2, (), 6_029_546, 298.7), (1 / 4, (), 3_130_938, 154.6),
        (1 / 8, (), 1_600_034, 78.6), (3 / 4, NO_STEM, 8_688_714, 431.2), (1 / 2, NO_STEM, 6_029_386, 298.5),
        (1 / 4, NO_STEM, 3_195_978, 157.5), (1 / 8, NO_STEM, 1_713_994, 83.8),
    ],
)  # fmt: skip
def test_resnet18_with_basis_convolutions(ratio, exclude, parameters, millions):
    report = cost(published(ratio, exclude), (3, 32, 32))
    assert report.total.parameters == parameters
    assert round(report.total.forward_macs / 1e6, 1) == millions
    assert report.dense == cost(meta_model(), (3, 32, 32)).total


@pytest.mark.parametrize(
    ("form", "parameters", "millions"),
    [
        ("dense", 6_029_546, 298.7),
        ("low_rank:10", 5_642_346, 283.9),  # LinearConv, WACV 2021: 5.64 M
        ("low_rank:1/4", 5_811_946, 288.2),
        ("sparse:1/8", 5_648_746, 298.7),
        ("shared", 5_681_386, 298.7),
        ("frozen", 5_594_346, 298.7),
        ("repeat", 5_594_346, 277.7),
    ],
)
def test_resnet18_with_other_forms_of_coefficients(form, parameters, millions):
    model = published(1 / 2, coefficients=form)
    report = cost(model, (3, 32, 32))
    assert report.total.parameters == count_parameters(model) == parameters
    assert round(report.total.forward_macs / 1e6, 1) == millions
    dense = cost(meta_model(), (3, 32, 32))
    assert report.dense == dense.total
    assert [layer.name for layer in report.layers] == [layer.name for layer in dense.layers]


# -- against what is executed -------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "batch_size"), [(None, 1), *zip(MODES, (4, 1), strict=True)])
def test_a_training_step_of_the_network_is_what_the_flop_counter_sees(mode, batch_size):
    model = meta_model() if mode is None else basis_model(1 / 4, mode=mode)
    total = cost(model, (3, 32, 32), batch_size=batch_size).total
    forward, backward = executed_macs(model, torch.empty(batch_size, 3, 32, 32, device="meta"))
    assert total.forward_macs + total.identity_forward_macs == forward
    assert total.backward_macs + total.identity_backward_macs == backward
    assert (total.identity_forward_macs > 0) == (mode == "factorized")


OPTIONS = (
    {}, {"stride": (2, 1), "dilation": (1, 2)}, {"kernel_size": 1}, {"padding": "same"}, {"padding": 1, "bias": False},
    {"padding": "same", "kernel_size": 4}, {"padding": 1, "padding_mode": "circular"},
)  # fmt: skip


def block(mode=None, dtype=None, form="dense", **options):
    """A convolution behind a pixel-wise scale, so that its input needs a gradient."""
    conv = nn.Conv2d(8, 12, **({"kernel_size": 3} | options), dtype=dtype)
    if mode is not None:
        form, _, settled = form.partition(",")
        conv = BasisConv2d.from_conv(conv, basis_channels=4, mode=mode, coefficients=form)
        if settled:
            conv.coefficients.settle()
    return nn.Sequential(nn.BatchNorm2d(8, dtype=dtype), conv)


def freeze(model, trained):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


FORMS = ("low_rank:2", "sparse:2", "sparse:2, settled", "frozen", "repeat")
TRAINED = (
    ("0.weight", "1.basis", "1.coefficients", "1.bias", "1.weight"),
    ("1.basis", "1.coefficients", "1.weight"),
    ("1.basis",),
    ("1.coefficients",),
    ("1.bias",),
    ("0.weight",),
    ("0.weight", "1.coefficients"),
    (),
)


def every(firsts, seconds, thirds):
    """Every pair of the first two, each with the next of the third: a handful in place of the full product."""
    return [(a, b, thirds[i % len(thirds)]) for i, (a, b) in enumerate(itertools.product(firsts, seconds))]


def test_single_layers_cost_what_is_executed_and_kept():
    for options, mode, trained in every(OPTIONS, (None, *MODES), TRAINED[:7]):
        assert_counted(block(mode, **options), trained)
        if options.get("padding_mode") is None and options.get("kernel_size") != 4:  # padded inputs are not counted
            assert_kept(block(mode, torch.bfloat16, **options), trained)


def assert_counted(model, trained):
    """Algebra plus identity are what the flop counter sees, forward and backward."""
    freeze(model, trained)
    total = cost(model, (8, 9, 7), batch_size=2).total
    forward, backward = executed_macs(model, torch.randn(2, 8, 9, 7))
    assert total.forward_macs + total.identity_forward_macs == forward
    assert total.backward_macs + total.identity_backward_macs == backward


def test_every_form_costs_what_is_executed_and_kept():
    for form, mode, trained in every(FORMS, MODES, TRAINED[:7]) + every(FORMS, MODES, TRAINED[::-1]):
        assert_counted(block(mode, form=form), trained)
        assert_kept(block(mode, form=form), trained)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(8, 6, 3), nn.Conv3d(8, 6, (1, 2, 2)), nn.ConvTranspose2d(8, 6, 3, stride=2)]
)
def test_other_convolutions_are_counted_too(layer):
    shapes = {nn.Conv1d: (8, 63), nn.Conv3d: (8, 1, 9, 7)}
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, shapes.get(type(layer), (8, 9, 7))), layer)
    total = cost(model, (8, 9, 7)).total
    assert (total.forward_macs, total.backward_macs) == executed_macs(model, torch.randn(1, 8, 9, 7))


def kept_bytes(model, x):
    """Bytes that autograd keeps for the convolution: everything saved but parameters and buffers."""
    constants = [t for module in model.modules() for t in getattr(module, "_placed", {}).values()]
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *constants)}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    y = model[0](x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model[1](y)
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in held)


def assert_kept(model, trained):
    freeze(model, trained)
    counted = cost(model, (8, 9, 7), batch_size=2).layers[-1].cost.activation_bytes
    assert counted == kept_bytes(model, torch.randn(2, 8, 9, 7, dtype=model[0].weight.dtype))


@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_a_layer_that_multiplies_with_coefficients_alone(form):
    layer = BasisConv2d(8, 12, 3, basis_channels=8, mode="factorized", coefficients=form.split(",")[0])
    model = nn.Sequential(nn.BatchNorm2d(8), layer)
    assert layer.derives_apart
    total = cost(model, (8, 9, 7), batch_size=2).total
    assert (total.forward_macs, total.backward_macs) == executed_macs(model, torch.randn(2, 8, 9, 7))


@pytest.mark.parametrize("mode", ["auto", "composed"])
def test_batch_normalisation_through_the_basis(mode):
    conv = BasisConv2d(8, 16, 3, basis_channels=5, mode=mode)
    ordinary = nn.Sequential(nn.BatchNorm2d(8), conv, nn.BatchNorm2d(16))
    coupled = couple(ordinary)
    before, after = (cost(model, (8, 20, 20), batch_size=4) for model in (ordinary, coupled))
    assert [layer.mode for layer in after.layers if layer.mode] == ["factorized"]
    assert after.dense == before.dense
    assert after.total.parameters == before.total.parameters
    pixels = 4 * 18 * 18
    norm = after.layers[-1]
    assert norm.cost.forward_macs == norm.cost.input_gradient_macs == pixels * 5 * 5
    assert norm.dense.activation_bytes - norm.cost.activation_bytes == 4 * (pixels * 16 + 2 * 16 - 16 * 5 - 16 - 5)
    small = 10 * 16 * 5 * 5  # products of matrices alone
    forward, backward = executed_macs(coupled, torch.randn(4, 8, 20, 20))
    assert 0 <= forward - after.total.forward_macs - after.total.identity_forward_macs < small
    assert 0 <= backward - after.total.backward_macs - after.total.identity_backward_macs < small
    assert coupled[1].mixed_later


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(7, 5)])
def test_activation_bytes_of_other_layers(layer):
    model = nn.Sequential(nn.Identity(), layer)
    counted = cost(model, (8, 9, 7), batch_size=2).total.activation_bytes
    assert counted == kept_bytes(model, torch.randn(2, 8, 9, 7))


def test_the_model_is_untouched_and_its_hooks_do_not_run():
    model, called = build("resnet20", width=4), []
    model.conv1.register_forward_hook(lambda *_: called.append("forward"))
    before = copy.deepcopy(model.state_dict())
    cost(model, (3, 32, 32))
    assert not called
    assert model.training
    assert len(model.conv1._forward_hooks) == 1
    assert all(p.grad is None and not p.is_meta for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_layers_count_their_parameters_once_and_every_call():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    report = cost(nn.Sequential(conv, conv), (4, 6, 6))
    assert len(report.layers) == 1
    assert report.total.parameters == 4 * 36 + 4
    assert report.total.forward_macs == 2 * 36 * 4 * 36
    assert report.total.input_gradient_macs == 36 * 4 * 36


@pytest.mark.parametrize("form", ["dense", "low_rank:2", "sparse:2", "frozen", "repeat"])
def test_shared_coefficients_count_where_they_appear_first(form):
    first = BasisConv2d(4, 8, 3, basis_channels=4, bias=False, coefficients=form)
    second = BasisConv2d(8, 8, 1, basis_channels=4, bias=False, coefficients=first.coefficients)
    model = nn.Sequential(first, second)
    stored = {"dense": 16, "low_rank:2": 16, "sparse:2": 8}.get(form, 0)
    report = cost(model, (4, 6, 6))
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert [layer.cost.parameters for layer in report.layers] == [4 * 36 + stored, 4 * 8]
    assert [layer.dense.parameters for layer in report.layers] == [8 * 36, 8 * 8]
    assert count_parameters(model) == report.total.parameters


@pytest.mark.parametrize(
    "wrap", [lambda conv: prune.identity(conv, "weight"), nn.utils.parametrizations.weight_norm, lambda conv: conv]
)
def test_weights_made_from_other_parameters_count_like_plain_ones(wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), wrap(nn.Conv2d(4, 5, 3)))
    total = cost(model, (3, 6, 6)).total
    assert total.parameters == count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert (total.forward_macs, total.backward_macs) == executed_macs(model, torch.randn(1, 3, 6, 6))


def test_it_prints_as_a_table():
    lines = str(cost(published(1 / 2), (3, 32, 32))).splitlines()
    assert lines[0] == "one step of 1 image of (3, 32, 32)"
    total, dense, ratio = lines[-3:]
    assert total.split()[:4] == ["total", "6,029,546", "298.7", "M"]
    assert dense.split()[:4] == ["dense", "11,173,962", "555.4", "M"]
    assert ratio.split()[3:5] == ["0.540", "0.538"]


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        ((3, 32), {}, "cannot be run on an input of"), (32, {}, "input_size"),
        ((3, 0, 32), {}, "input_size"), ((3, 32.0, 32), {}, "input_size"),
        ((4, 8, 8), {}, "3 channels"), ((3, 8, 8), {"batch_size": 1.5}, "batch_size"),
        ((3, 8, 8), {"mode": "auto"}, "mode"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(size, options, says):
    with pytest.raises(ValueError, match=says):
        cost(nn.Conv2d(3, 4, 3), size, **options)


def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match="lazy"):
        cost(nn.LazyConv2d(4, 3), (3, 8, 8))


# -- products outside of layers -------------------------------------------------------------------


class Adapted(nn.Linear):
    """A linear layer with a forward pass of its own (LoRA, arXiv 2106.09685)."""

    def __init__(self, wide):
        super().__init__(wide, 8)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.ones(2, wide)), nn.Parameter(torch.ones(8, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Own(nn.Conv1d):
    """With a weight that it computes, and a product more than others."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias) + super()._conv_forward(x, weight, None)


def linear(rows, columns, **options):
    return nn.Linear(columns, rows, bias=False, **options)


X = (2, 5, 8)
PRODUCTS = {
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), X),
    "lstm": (lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True, proj_size=3), X),
    "gru": (lambda: nn.GRU(8, 6), X),
    "cell": (lambda: nn.LSTMCell(8, 6), (2, 8)),
    "attention": (lambda: Of(lambda m, x: m.a(x, x, x), a=nn.MultiheadAttention(8, 2, batch_first=True)), X),
    "itself": (lambda: Of(lambda m, x: x @ x.mT), X),
    "einsum": (lambda: Of(lambda m, x: torch.einsum("bij,bkj->bik", m.a(x), x), a=linear(8, 8)), X),
    "dot product attention": (
        lambda: Of(lambda m, x: F.scaled_dot_product_attention(*m.a(x).chunk(3, -1)), a=linear(24, 8)), X,
    ),
    "parameter": (lambda: Of(lambda m, x: x @ m.a, a=nn.Parameter(torch.ones(8, 3))), X),
    "F.linear": (lambda: Of(lambda m, x: F.linear(x, m.a.weight), a=linear(3, 8)), X),
    "F.conv": (lambda: Of(lambda m, x: F.conv1d(m.a(x), m.a.weight), a=nn.Conv1d(5, 5, 3)), X),
    "transposed": (
        lambda: Of(lambda m, x: F.conv_transpose1d(m.a(x), m.b, stride=2), a=nn.Conv1d(5, 5, 1),
                   b=nn.Parameter(torch.ones(5, 3, 3))), X,
    ),
    "own forward pass": (lambda: nn.Sequential(Adapted(8), Adapted(8)), X),
    "own convolution": (lambda: nn.Sequential(Own(5, 4, 3), Own(4, 4, 3)), X),
    "no gradients": (lambda: Of(lambda m, x: m.b(torch.no_grad()(m.a)(x)), a=linear(8, 8), b=linear(3, 8)), X),
    "vmap": (lambda: Of(lambda m, x: torch.vmap(lambda one: one @ m.a)(x), a=nn.Parameter(torch.ones(8, 3))), X),
    "branch": (lambda: Of(lambda m, x: x @ x.mT if x.sum().item() < 1e9 else x), X),
    "torchscript": (lambda: torch.jit.script(nn.Sequential(linear(4, 8), nn.ReLU(), linear(4, 4))), X),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_outside_of_layers_count(name):
    make, size = PRODUCTS[name]
    model = make().eval()
    report, total = cost(model, inputs=torch.randn(size)), cost(model, size[1:], batch_size=size[0]).total
    assert report.total == total
    assert total.forward_macs > 0
    assert (total.forward_macs, total.backward_macs) == executed_macs(model, torch.randn(size))
    assert all(layer.counted for layer in report.layers)


def test_a_product_belongs_to_the_layer_whose_parameter_it_takes_or_that_makes_it():
    def forward(m, x):
        return F.linear(x @ x.mT @ x, m.used.weight) + m.inner(x)

    inner = Of(lambda m, x: x @ (2 * m.a), a=nn.Parameter(torch.ones(8, 3)))
    report = cost(Of(forward, used=linear(3, 8), inner=inner), (5, 8)).to_frame()
    assert report.index.tolist() == ["used", "inner", FUNCTIONS]
    assert report.forward_macs.tolist() == [5 * 8 * 3, 5 * 8 * 3, 2 * 5 * 5 * 8]
    assert report.weight_gradient_macs.tolist()[0] == 5 * 8 * 3
    attention = nn.MultiheadAttention(8, 2)
    rows = {layer.name: layer for layer in cost(Of(lambda m, x: m.a(x, x, x), a=attention), (5, 8)).layers}
    assert rows["a.out_proj"].counted
    assert rows["a.out_proj"].cost.forward_macs == 5 * 8 * 8


def test_functions_are_on_both_sides_of_a_share():
    model, x = made(Two)
    small = cost(substitute(model, ratio=0.5), inputs=x)
    dense = cost(model, inputs=x)
    assert small.dense == dense.total
    saved = dense.total.forward_macs - small.total.forward_macs
    convolutions = dense.layers[0].cost.forward_macs - small.layers[0].cost.forward_macs
    assert saved == convolutions > 0
    assert small.layers[-1].name == FUNCTIONS
    assert f"{FUNCTIONS}  " in str(small)


def quantised():
    weight = torch.quantize_per_tensor(torch.ones(3, 8), 0.1, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return Of(lambda m, x: torch.ops.quantized.linear_dynamic(x, packed))


UNCOUNTED = {
    "quantized::linear_dynamic": quantised,
    "aten::_fft_r2c": lambda: Of(lambda m, x: torch.fft.rfft2(x).abs()),
    "aten::_cdist_forward": lambda: Of(lambda m, x: torch.cdist(x, x)),
    "aten::_trilinear": lambda: Of(lambda m, x: m.a(x, x), a=nn.Bilinear(8, 8, 2)),
    "aten::linalg_inv_ex": lambda: Of(lambda m, x: torch.linalg.inv(x[..., :5])),
    "aten::mkldnn_rnn_layer": lambda: Of(lambda m, x: m.a(x)[0] if x.sum().item() < 9 else x, a=nn.LSTM(8, 4)),
}


@pytest.mark.parametrize("name", UNCOUNTED)
def test_what_cannot_be_counted_is_named(name):
    report = cost(UNCOUNTED[name](), (5, 8))
    assert report.uncounted == (name,)
    assert str(report).endswith(f"not counted: {name}")
    assert report.to_frame().index.name == "layer"


def test_operators_that_multiply_nothing_are_not_named():
    def forward(m, x):
        x = F.interpolate(m.norm(x)[:, None], scale_factor=2, mode="bilinear")
        x = F.grid_sample(x, torch.zeros(1, 3, 3, 2).to(x), align_corners=False)
        return F.avg_pool2d(x, 2).cumsum(-1).double().sort().values.norm() + torch.linalg.vector_norm(x)

    assert cost(Of(forward, norm=nn.LayerNorm(8)), (5, 8)).uncounted == ()


# -- inputs of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNUSUAL)
def test_networks_that_take_something_else(kind):
    model, x = made(kind)
    report = cost(model, inputs=x)
    batch = x if isinstance(x, tuple) else (x,)
    assert (report.total.forward_macs, report.total.backward_macs) == executed_macs(model, *batch)
    assert (report.input_size, report.batch_size) == (None, 2)
    assert str(report).startswith(f"one step of 2 samples of {tuple(batch[0].shape)} float32")


def test_sizes_of_any_length_and_keyword_inputs():
    pitch, frames = made(Pitch)
    assert cost(pitch, (1024,), batch_size=2).layers == cost(pitch, inputs=frames).layers
    two, (image, tokens) = made(Two)
    named = cost(two, inputs={"tokens": tokens, "image": image})
    assert named.layers == cost(two, inputs=(image, tokens)).layers
    clips = cost(made(Clips)[0], [4, 3, np.int64(9), 8], batch_size=np.int64(3))
    assert (clips.input_size, clips.batch_size) == ((4, 3, 9, 8), 3)
    assert {type(n) for n in (*clips.input_size, clips.batch_size, *vars(clips.total).values())} == {int}


def test_complex_numbers_count_once_and_sparse_factors_are_said():
    report = cost(nn.Conv1d(5, 4, 3, dtype=torch.complex64), (5, 8))
    assert (report.total.forward_macs, report.total.activation_bytes) == (6 * 4 * 15, 5 * 8 * 8)
    report = cost(Of(lambda m, x: torch.sparse.mm(m.a, x), a=nn.Buffer(torch.eye(5).to_sparse())), (8,), batch_size=5)
    assert report.total.forward_macs == 0
    assert "sparse" in report.uncounted[0]
