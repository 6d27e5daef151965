"""cost() against torch's flop counter, against what autograd really saves, and against known numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from basis.costs import Cost, cost, count_parameters
from basis.layers.batchnorm import couple
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.substitution import substitute

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
MODES = ("factorized", "composed", "hybrid")
NO_STEM = ("conv1", "*.shortcut.*")


def meta_model(name="resnet18", **changes):
    with torch.device("meta"):
        return build(name, **changes)


def basis_model(ratio, exclude=(), **options):
    return substitute(meta_model(), ratio=ratio, exclude=exclude, init="random", **options)


def executed_macs(model, x):
    """MACs that the flop counter sees in a training step of ``model``: forward, backward."""
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        if y.requires_grad:
            y.sum().backward()
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


# -- known numbers ------------------------------------------------------------------------------


def test_dense_resnet18():
    total = cost(meta_model(), (3, 32, 32)).total
    assert total.parameters == 11_173_962
    assert total.forward_macs == 555_422_720
    assert total.weight_gradient_macs == total.forward_macs
    assert total.input_gradient_macs == total.forward_macs - 32 * 32 * 64 * 27  # all but the stem
    assert total.backward_macs == total.input_gradient_macs + total.weight_gradient_macs
    assert total.identity_forward_macs == total.identity_backward_macs == 0


@pytest.mark.parametrize(
    ("ratio", "exclude", "parameters", "millions"),
    [
        (3 / 4, (), 8_710_554, 432.3),
        (1 / 2, (), 6_029_546, 298.7),
        (1 / 4, (), 3_130_938, 154.6),
        (1 / 8, (), 1_600_034, 78.6),
        (3 / 4, NO_STEM, 8_688_714, 431.2),
        (1 / 2, NO_STEM, 6_029_386, 298.5),
        (1 / 4, NO_STEM, 3_195_978, 157.5),
        (1 / 8, NO_STEM, 1_713_994, 83.8),
    ],
)
def test_resnet18_with_basis_convolutions(ratio, exclude, parameters, millions):
    report = cost(basis_model(ratio, exclude), (3, 32, 32))
    assert report.total.parameters == parameters
    assert round(report.total.forward_macs / 1e6, 1) == millions
    dense = cost(meta_model(), (3, 32, 32)).total
    assert report.dense == dense


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
    model = basis_model(1 / 2, coefficients=form)
    report = cost(model, (3, 32, 32))
    assert report.total.parameters == count_parameters(model) == parameters
    assert round(report.total.forward_macs / 1e6, 1) == millions
    dense = cost(meta_model(), (3, 32, 32))
    assert report.dense == dense.total
    assert [layer.name for layer in report.layers] == [layer.name for layer in dense.layers]


def test_one_layer_by_hand():
    layer = BasisConv2d(8, 16, 3, padding=1, groups=2, bias=True, basis_channels=4, mode="factorized")
    ours, dense = (side(cost(layer, (8, 5, 5), batch_size=3)) for side in (lambda r: r.total, lambda r: r.dense))
    n, f = 3 * 25, 4 * 9
    assert ours == Cost(
        parameters=4 * f + 12 * 2 + 16,
        forward_macs=n * (4 * f + 12 * 2),
        input_gradient_macs=n * 12 * 2,  # only dZ: the input needs no gradient
        weight_gradient_macs=n * (4 * f + 12 * 2),
        identity_forward_macs=n * 4 * 2,
        identity_backward_macs=2 * n * 4 * 2,
        activation_bytes=4 * (n * 8 + n * 4 + 16 * 2),
    )
    assert dense == Cost(
        parameters=16 * f + 16,
        forward_macs=n * 16 * f,
        weight_gradient_macs=n * 16 * f,
        activation_bytes=4 * n * 8,
    )


# -- against what is executed -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_training_step_of_the_network_is_what_the_flop_counter_sees(mode, batch_size):
    model = meta_model() if mode is None else basis_model(1 / 4, mode=mode)
    total = cost(model, (3, 32, 32), batch_size=batch_size).total
    forward, backward = executed_macs(model, torch.empty(batch_size, 3, 32, 32, device="meta"))
    assert total.forward_macs + total.identity_forward_macs == forward
    assert total.backward_macs + total.identity_backward_macs == backward
    assert (total.identity_forward_macs > 0) == (mode == "factorized")


OPTIONS = {
    "plain": {},
    "stride, dilation": {"stride": (2, 1), "dilation": (1, 2)},
    "1x1": {"kernel_size": 1},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "bias": False},
}


def block(option, mode=None, dtype=None, form="dense"):
    """A convolution behind a pixel-wise scale, so that its input needs a gradient."""
    arguments = {"kernel_size": 3} | OPTIONS[option]
    if mode is None:
        conv = nn.Conv2d(8, 12, **arguments, dtype=dtype)
    else:
        dense = nn.Conv2d(8, 12, **arguments, dtype=dtype)
        conv = BasisConv2d.from_conv(dense, basis_channels=4, mode=mode, coefficients=form)
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


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("option", OPTIONS)
def test_single_layers_cost_what_the_flop_counter_sees(option, mode, trained):
    assert_counted(block(option, mode), trained)


def assert_counted(model, trained):
    """Algebra plus identity are what the flop counter sees, forward and backward."""
    freeze(model, trained)
    total = cost(model, (8, 9, 7), batch_size=2).total
    forward, backward = executed_macs(model, torch.randn(2, 8, 9, 7))
    assert total.forward_macs + total.identity_forward_macs == forward
    assert total.backward_macs + total.identity_backward_macs == backward


def block_of(form, mode, dtype=None):
    model = block("plain", mode, dtype, form.split(",")[0])
    if "settled" in form:
        model[1].coefficients.settle()
    return model


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_costs_what_the_flop_counter_sees(form, mode, trained):
    assert_counted(block_of(form, mode), trained)


@pytest.mark.parametrize("form", ["dense", "grouped:2", "low_rank:2", "sparse:2", "frozen", "repeat"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_layers_forward(groups, mode, form):
    # Forward only: the flop counter does not divide the weight gradient of a convolution by its groups.
    layer = BasisConv2d(8, 16, 3, groups=groups, basis_channels=4, mode=mode, coefficients=form)
    total = cost(layer, (8, 9, 7), batch_size=2).total
    forward, _ = executed_macs(layer, torch.randn(2, 8, 9, 7))
    assert total.forward_macs + total.identity_forward_macs == forward


def test_mixing_in_groups_divides_what_mixing_costs():
    whole, parts = (
        cost(BasisConv2d(8, 32, 3, basis_channels=16, coefficients=form), (8, 9, 7)).total
        for form in ("dense", "grouped:4")
    )
    n, convolution = 7 * 5, 16 * 8 * 9
    assert whole.parameters - parts.parameters == 16 * 16 - 16 * 4
    for name, fixed in (("forward", convolution), ("input_gradient", 0), ("weight_gradient", convolution)):
        mixing = [getattr(total, f"{name}_macs") - n * fixed for total in (whole, parts)]
        assert mixing == [n * 16 * 16, n * 16 * 4]
    assert whole.identity_forward_macs == 4 * parts.identity_forward_macs == n * 16 * 16
    assert whole.identity_backward_macs == 4 * parts.identity_backward_macs == 2 * n * 16 * 16


@pytest.mark.parametrize("layer", [nn.Conv1d(8, 6, 3), nn.Conv3d(8, 6, 2), nn.ConvTranspose2d(8, 6, 3, stride=2)])
def test_other_convolutions_are_counted_too(layer):
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(
                {nn.Conv1d: x.flatten(2), nn.Conv3d: x[:, :, None].expand(-1, -1, 4, -1, -1)}.get(type(layer), x)
            )

    total = cost(Reshaped(), (8, 9, 7)).total
    forward, backward = executed_macs(Reshaped(), torch.randn(1, 8, 9, 7))
    assert (total.forward_macs, total.backward_macs) == (forward, backward)


def kept_bytes(model, x):
    """Bytes that autograd keeps for the convolution: everything saved but parameters and buffers."""
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    y = model[0](x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model[1](y)
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("option", OPTIONS)
def test_activation_bytes_are_what_autograd_keeps(option, mode, trained, dtype):
    model = block(option, mode, dtype)
    freeze(model, trained)
    counted = cost(model, (8, 9, 7), batch_size=2).layers[-1].cost.activation_bytes
    assert counted == kept_bytes(model, torch.randn(2, 8, 9, 7, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_activation_bytes_of_every_form(form, mode, trained, dtype):
    model = block_of(form, mode, dtype)
    freeze(model, trained)
    counted = cost(model, (8, 9, 7), batch_size=2).layers[-1].cost.activation_bytes
    assert counted == kept_bytes(model, torch.randn(2, 8, 9, 7, dtype=dtype))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_a_layer_that_multiplies_with_coefficients_alone(form, trained):
    layer = BasisConv2d(8, 12, 3, basis_channels=8, mode="factorized", coefficients=form.split(",")[0])
    if "settled" in form:
        layer.coefficients.settle()
    model = nn.Sequential(nn.BatchNorm2d(8), layer)
    assert layer.derives_apart
    freeze(model, trained)
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


def test_forcing_a_mode_is_the_same_as_setting_it():
    auto = basis_model(1 / 2)
    assert cost(auto, (3, 32, 32)) == cost(auto, (3, 32, 32), mode="factorized")
    for mode in MODES:
        assert cost(auto, (3, 32, 32), mode=mode) == cost(basis_model(1 / 2, mode=mode), (3, 32, 32))


def test_the_composed_weight_is_built_once_per_step():
    model = basis_model(1 / 2, mode="composed")
    one, many = (cost(model, (3, 32, 32), batch_size=n) for n in (1, 100))
    built = one.total.forward_macs - one.dense.forward_macs
    assert built > 0
    assert many.dense.forward_macs == 100 * one.dense.forward_macs
    assert many.total.forward_macs - many.dense.forward_macs == built


# -- the model is left alone --------------------------------------------------------------------


def test_the_model_is_untouched_and_its_hooks_do_not_run():
    model = build("resnet20", width=4)
    called = []
    model.conv1.register_forward_hook(lambda *_: called.append("forward"))
    model.register_forward_pre_hook(lambda *_: called.append("pre"))
    before = copy.deepcopy(model.state_dict())
    hooks = {name: list(m._forward_hooks) for name, m in model.named_modules()}
    cost(model, (3, 32, 32))
    assert not called
    assert model.training
    assert hooks == {name: list(m._forward_hooks) for name, m in model.named_modules()}
    assert all(p.grad is None and not p.is_meta for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_mode_of_training_and_dtype_do_not_change_macs():
    model = build("resnet20", width=4)
    expected = cost(model, (3, 32, 32)).total
    assert cost(model.eval(), (3, 32, 32)).total == expected
    half = cost(model.bfloat16(), (3, 32, 32)).total
    assert half.forward_macs == expected.forward_macs
    assert 0.5 <= half.activation_bytes / expected.activation_bytes < 0.51


class LooksAtValues(nn.Module):
    """Cannot run on the meta device."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum().item() == 0 else x


def test_a_model_that_cannot_run_on_meta_runs_for_real():
    assert cost(LooksAtValues(), (3, 5, 5)).total.forward_macs == 9 * 4 * 27


def test_one_image_of_one_pixel_is_enough_for_batch_normalisation():
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4)).train()
    assert cost(model, (3, 5, 5), batch_size=1).total.forward_macs == 4 * 75


def test_shared_layers_count_their_parameters_once_and_every_call():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    report = cost(nn.Sequential(conv, conv), (4, 6, 6))
    assert len(report.layers) == 1
    assert report.total.parameters == 4 * 36 + 4
    assert report.total.forward_macs == 2 * 36 * 4 * 36
    assert report.total.input_gradient_macs == 36 * 4 * 36


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    assert cost(model, (4, 6, 6)).total.parameters == sum(p.numel() for p in model.parameters())


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


def test_a_shared_basis_convolution_counts_once():
    layer = BasisConv2d(4, 4, 3, padding=1, basis_channels=2, coefficients="low_rank:1")
    model = nn.Sequential(layer, layer)
    report = cost(model, (4, 6, 6))
    assert report.total.parameters == count_parameters(model) == 2 * 36 + 4 + 4
    assert report.dense.parameters == 4 * 36 + 4


@pytest.mark.parametrize(
    "wrap", [lambda conv: prune.identity(conv, "weight"), nn.utils.parametrizations.weight_norm, lambda conv: conv]
)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_made_from_other_parameters_count_like_plain_ones(wrap, bias):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), wrap(nn.Conv2d(4, 5, 3, bias=bias)))
    total = cost(model, (3, 6, 6)).total
    assert total.parameters == count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert (total.forward_macs, total.backward_macs) == executed_macs(model, torch.randn(1, 3, 6, 6))


def test_layers_it_cannot_count_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(5, 5))

        def forward(self, x):
            return x @ self.matrix

    unused = nn.Sequential(Odd(), nn.Conv2d(3, 4, 1))
    unused[1].unused = nn.Linear(2, 2)
    report = cost(unused, (3, 5, 5))
    assert [layer.name for layer in report.layers if not layer.counted] == ["0", "1.unused"]
    assert str(report).endswith("0, 1.unused")


# -- the report ---------------------------------------------------------------------------------


def test_the_frame_holds_all_numbers():
    report = cost(basis_model(1 / 2, NO_STEM), (3, 32, 32))
    frame = report.to_frame()
    assert frame.index[0] == "conv1"
    assert frame.loc["layer4.0.conv1", "kind"] == "BasisConv2d"
    assert frame.loc["layer4.0.conv1", "mode"] == "factorized"
    assert frame.loc["conv1", "mode"] == ""
    assert frame["forward_macs"].sum() == report.total.forward_macs
    assert frame["dense_forward_macs"].sum() == report.dense.forward_macs
    assert frame["backward_macs"].sum() == report.total.backward_macs
    assert frame["activation_bytes"].sum() == report.total.activation_bytes


def test_it_prints_as_an_aligned_table():
    lines = str(cost(basis_model(1 / 2), (3, 32, 32))).splitlines()
    assert lines[0] == "one step of 1 image of (3, 32, 32)"
    total, dense, ratio = lines[-3:]
    assert total.split()[:4] == ["total", "6,029,546", "298.7", "M"]
    assert dense.split()[:4] == ["dense", "11,173,962", "555.4", "M"]
    assert ratio.split()[3:5] == ["0.540", "0.538"]
    right_edge = lines[1].index("parameters") + len("parameters")
    for line in lines[3:-1]:
        assert line[right_edge - 1].isdigit()
        assert not line[right_edge : right_edge + 2].strip()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 32), (3, 32, 32, 32), (3, 0, 32), (3, 32.0, 32), 32, "abc", None])
def test_a_bad_input_size_is_refused(size):
    with pytest.raises(ValueError, match=r"input_size is .* must be \(C, H, W\)"):
        cost(nn.Conv2d(3, 4, 3), size)


def test_an_input_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match=r"cannot be run on an input of \(1, 4, 8, 8\).*3 channels"):
        cost(nn.Conv2d(3, 4, 3), (4, 8, 8))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_a_bad_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        cost(nn.Conv2d(3, 4, 3), (3, 8, 8), batch_size=batch_size)


def test_a_bad_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'auto'"):
        cost(nn.Conv2d(3, 4, 3), (3, 8, 8), mode="auto")


def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match="lazy"):
        cost(nn.LazyConv2d(4, 3), (3, 8, 8))
