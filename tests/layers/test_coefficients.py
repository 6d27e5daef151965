"""The forms of A: as text, in every mode against a convolution whose weight is built row by row, and as fits."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis.layers.coefficients import Coefficients, Form, LowRank, Repeat, Sparse
from basis.layers.conv import MODES, BasisConv2d
from tests.layers.by_rows import assert_same, reference, run, shuffled, top

C_IN, C_OUT, K = 8, 24, 8
EXPLICIT = ("factorized", "composed")
FORMS = ("dense", "low_rank:3", "low_rank:1/4", "grouped:2", "sparse:3", "sparse:1/2", "shared", "frozen", "repeat")
CLASSES = {
    "dense": Coefficients, "shared": Coefficients, "grouped": Coefficients, "frozen": Coefficients,
    "low_rank": LowRank, "sparse": Sparse, "repeat": Repeat,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_layer(form, *, permuted=False, kernel_size=3, dtype=torch.float64, **options):
    """A layer of 24 filters, 8 of them basis filters."""
    layer = BasisConv2d(C_IN, C_OUT, kernel_size, basis_channels=K, coefficients=form, dtype=dtype, **options)
    return shuffled(layer) if permuted else layer


def images(**options):
    return torch.randn(2, C_IN, 9, 7, dtype=torch.float64, **options)


# -- as text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*FORMS, "grouped:4", "sparse:1", "low_rank:3/7"])
def test_a_form_gives_its_text_back(text):
    form = Form.parse(text)
    assert str(form) == text
    assert Form.parse(form) is form
    assert form == Form.parse(str(form))


@pytest.mark.parametrize(
    "text",
    ["", "lowrank:3", "Dense", None, "dense:3", "repeat:", "low_rank", "low_rank:", "low_rank:0", "low_rank:-2",
     "low_rank:1.0", "low_rank:5/4", "low_rank:1/0", "sparse:nan", "grouped:1/2"],
)  # fmt: skip
def test_wrong_text_is_refused(text):
    with pytest.raises(ValueError, match=f"coefficients is {str(text)!r}"):
        BasisConv2d(8, 12, 3, ratio=0.5, coefficients=text)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("low_rank:5", {"basis_channels": 4}), ("low_rank:5", {"basis_channels": 12}),
        ("low_rank:3", {"basis_channels": 4, "groups": 2}), ("sparse:5", {"basis_channels": 4}),
        ("grouped:3", {"basis_channels": 4}), ("grouped:4", {"basis_channels": 4, "groups": 2}),
        ("grouped:5", {"basis_channels": 10}),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_refused(form, options):
    with pytest.raises(ValueError, match=f"coefficients is '{form}'"):
        BasisConv2d(8, 16, 3, coefficients=form, **options)


# -- in every mode ------------------------------------------------------------------------------


LAYOUTS = (("batch", 1, False), ("unbatched", 2, True), ("channels_last", 1, True), ("channels_last", 2, False))
# Each form in each mode, with a layout, groups and order that differ between them.
CASES = [(form, mode, *LAYOUTS[(i + j) % 4]) for i, form in enumerate(FORMS) for j, mode in enumerate(EXPLICIT)]


@pytest.mark.parametrize(("form", "mode", "layout", "groups", "permuted"), CASES)
def test_every_form_is_the_dense_convolution_forward_and_backward(form, mode, permuted, groups, layout):
    options = {"groups": groups, "stride": (2, 1), "padding": 1}
    layer = make_layer(form, permuted=permuted, mode=mode, **options)
    assert type(layer.coefficients) is CLASSES[form.split(":")[0]]
    x = images()
    if layout == "unbatched":
        x = x[0]
    if layout == "channels_last":
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    ours = run(layer, x.requires_grad_())
    assert_same(ours, reference(layer, x, kernel_size=3, **options))
    if layout == "channels_last":
        assert ours["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, EXPLICIT[i % 2]) for i, form in enumerate([*FORMS, "low_rank:99", "sparse:99", "grouped:4"])],
)
def test_all_basis_channels_leave_nothing_to_derive(form, mode):
    conv = nn.Conv2d(8, 16, 3, dtype=torch.float64, groups=2)
    layer = BasisConv2d.from_conv(conv, ratio=1, mode=mode, coefficients=form)
    assert layer.coefficients.stored == 0
    x = images(requires_grad=True)
    assert_same(layer(x), conv(x))
    assert_same(layer.weight, conv.weight)
    layer(x).sum().backward()


@pytest.mark.parametrize(("form", "mode", "bias"), [(f, MODES[i % 3], i % 2) for i, f in enumerate(FORMS)])
def test_an_in_place_activation_may_follow(form, bias, mode):
    layer = make_layer(form, permuted=True, mode=mode, bias=bool(bias))
    x, parameters = images(), list(layer.parameters())
    expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), parameters)
    ours = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), parameters)
    for gradient, right in zip(ours, expected, strict=True):
        assert_same(gradient, right, 0)


# -- as a module --------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "mode"), [(form, EXPLICIT[i % 2]) for i, form in enumerate(FORMS)])
def test_state_copies_and_functional_calls_carry_the_form(form, mode):
    layer, other, x = make_layer(form, permuted=True, mode=mode), make_layer(form, mode=mode), images()
    assert_same(copy.deepcopy(layer)(x), layer(x), 0)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert_same(other(x), layer(x), 0)
    third = make_layer(form, mode=mode)
    third.load_state_dict(layer.state_dict() | dict(third.named_parameters()))
    state = dict(layer.named_parameters()) | {n: b for n, b in layer.named_buffers() if "weight" in n}
    assert_same(torch.func.functional_call(third, state, x), layer(x), 0)


# -- what is drawn and stored -------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "low_rank:64", "low_rank:1", "sparse:1", "sparse:1/8", "sparse:64"])
def test_derived_filters_begin_with_the_variance_of_basis_filters(form):
    for groups in [1, 2]:
        layers = [BasisConv2d(4, 512, 1, groups=groups, basis_channels=128, coefficients=form) for _ in range(8)]
        squares = torch.stack([layer.coefficients.matrix().detach().square().sum(1).mean() for layer in layers])
        assert squares.mean().item() == pytest.approx(1, rel=0.08 if form == "low_rank:1" else 0.03)
        if form != "repeat":
            assert torch.stack([layer.coefficients.matrix().detach().mean() for layer in layers]).mean().abs() < 0.01


@pytest.mark.parametrize(
    ("form", "stored", "products"),
    [
        ("dense", 16 * 4, [16 * 4]), ("shared", 16 * 4, [16 * 4]), ("grouped:2", 16 * 2, [16 * 2]),
        ("low_rank:3", 2 * 3 * 4 + 16 * 3, [2 * 3 * 4, 16 * 3]), ("sparse:3", 16 * 3, [16 * 4]),
        ("frozen", 0, [16 * 4]), ("repeat", 0, []),
    ],
)  # fmt: skip
def test_what_a_form_stores_and_multiplies(form, stored, products):
    a = make_layer(form, groups=2).coefficients
    assert (a.rows, a.groups * a.columns) == (16, 8)
    assert a.stored == stored
    assert list(a.products) == products
    assert a.trains == (stored > 0)
    if not isinstance(a, Sparse):
        assert sum(p.numel() for p in a.parameters()) == stored


# -- sparse -------------------------------------------------------------------------------------


def train_a_step(layer, optimizer):
    optimizer.zero_grad()
    layer(images()).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("mode", EXPLICIT)
def test_dropped_entries_come_back_until_the_mask_is_settled(mode):
    layer = make_layer("sparse:3", mode=mode)
    a = layer.coefficients
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    first = a.mask.clone()
    for _ in range(5):
        train_a_step(layer, optimizer)
    assert a.weight.grad.ne(0).all()
    assert not torch.equal(a.mask, first)
    assert not a.settled

    a.settle()
    kept = a.mask.clone()
    assert a.settled
    assert torch.equal(kept, top(a.weight, 3))
    assert a.weight[~kept].eq(0).all()
    before = a.matrix().clone()
    for _ in range(5):
        train_a_step(layer, optimizer)
    a.settle()
    assert torch.equal(a.mask, kept)
    assert a.weight.grad[~kept].eq(0).all()
    assert a.weight.grad[kept].ne(0).all()
    assert a.matrix()[~kept].eq(0).all()
    assert a.matrix()[kept].ne(before[kept]).all()


def test_a_settled_mask_is_part_of_the_state():
    source, target, x = make_layer("sparse:3"), make_layer("sparse:3"), images()
    source.coefficients.settle()
    assert {"coefficients.mask", "coefficients.settled"} < source.state_dict().keys()
    target.load_state_dict(source.state_dict())
    twin = copy.deepcopy(target)
    for layer in (target, twin):
        with torch.no_grad():
            layer.coefficients.weight.add_(1)
            source_values = source.coefficients.weight + 1
        layer(x)
        assert torch.equal(layer.coefficients.mask, source.coefficients.mask)
        assert_same(layer.coefficients.matrix(), source_values * source.coefficients.mask, 0)
    target.load_state_dict(make_layer("sparse:3").state_dict())
    target(x).sum().backward()
    assert target.coefficients.weight.grad.ne(0).all()
    twin.reset_parameters()
    assert not twin.coefficients.settled


# -- shared -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "mode"), [(form, EXPLICIT[i % 2]) for i, form in enumerate(FORMS)])
def test_layers_can_hold_one_a(mode, form):
    first = make_layer(form, mode=mode)
    before = first.coefficients.matrix().clone()
    second = make_layer(first.coefficients, mode=mode, kernel_size=1)
    assert second.coefficients is first.coefficients
    assert_same(first.coefficients.matrix(), before, 0)
    x = images()
    losses = [layer(x).sin().mean() for layer in (first, second)]
    if parameters := list(first.coefficients.parameters()):
        apart = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        for ours, *parts in zip(torch.autograd.grad(sum(losses), parameters), *apart, strict=True):
            assert_same(ours, sum(parts))
    with pytest.raises(ValueError, match="coefficients"):
        BasisConv2d(8, 24, 3, coefficients=first.coefficients, basis_channels=6)


# -- fits ---------------------------------------------------------------------------------------


def error_of(layer, conv):
    return (layer.weight - conv.weight).norm().item()


def some_conv(groups=1, inputs=16):
    """A convolution with filters of unequal sizes and falling singular values."""
    conv = nn.Conv2d(inputs, 48, 3, groups=groups, dtype=torch.float64)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(conv.weight.view(48, -1), full_matrices=False)
        s *= torch.arange(1, 1 + len(s)) ** -0.7
        conv.weight.copy_((torch.rand(48, 1) * (u * s) @ vh).view(conv.weight.shape))
    return conv


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "frozen"])
def test_a_fit_finds_a_layer_of_its_form_again(form, groups):
    layer = make_layer(form, groups=groups)
    again = BasisConv2d.from_conv(layer.to_conv(), basis_channels=K, coefficients=form)
    assert_same(again.weight, layer.weight)
    assert again.coefficients.form == layer.coefficients.form
    x = images()
    for again.mode in MODES:
        assert_same(again(x), layer(x))


@pytest.mark.parametrize(("form", "groups"), [("low_rank:8", 1), ("low_rank:1", 2), ("sparse:8", 1), ("sparse:1", 2)])
def test_a_fit_is_better_than_cutting_the_dense_one(form, groups):
    conv, size = some_conv(groups), Form.parse(form).size
    dense = BasisConv2d.from_conv(conv, basis_channels=24)
    fitted = error_of(BasisConv2d.from_conv(conv, basis_channels=24, coefficients=form), conv)
    a, best = dense.coefficients.weight.data, error_of(dense, conv)
    u, s, vh = torch.linalg.svd(dense.coefficients.blocks().detach(), full_matrices=False)
    low = ((u[..., :size] * s[:, None, :size]) @ vh[:, :size]).flatten(0, 1)
    a.copy_(low if form.startswith("low_rank") else a * top(a, size))
    assert best <= fitted < error_of(dense, conv)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", ["frozen", "repeat"])
def test_where_a_is_fixed_the_basis_is_the_least_squares_solution(form, groups):
    conv = some_conv(groups)
    layer = BasisConv2d.from_conv(conv, basis_channels=16, coefficients=form)
    weight, mixing = conv.weight.view(groups, 48 // groups, -1), layer.mixing.view(groups, 48 // groups, -1)
    assert_same(layer.basis.view(groups, 16 // groups, -1), torch.linalg.pinv(mixing) @ weight)


def test_one_fit_of_several_layers_is_the_best_of_one_matrix():
    convs = [some_conv(), some_conv(inputs=8), nn.Conv2d(4, 48, 1, dtype=torch.float64)]
    layers = BasisConv2d.from_convs(convs, basis_channels=12)
    assert all(layer.coefficients is layers[0].coefficients for layer in layers)
    assert all(torch.equal(layer.order, layers[0].order) for layer in layers)
    together = torch.cat([conv.weight.detach().flatten(1) for conv in convs], dim=1)
    best = torch.linalg.svdvals(together)[12:].norm().item()
    errors = [error_of(layer, conv) for layer, conv in zip(layers, convs, strict=True)]
    assert math.hypot(*errors) == pytest.approx(best, rel=1e-9)
    x = torch.randn(1, 16, 6, 6, dtype=torch.float64)
    for layers[0].mode in MODES:
        assert_same(layers[0](x), layers[0].to_conv()(x))


@pytest.mark.parametrize("rank", [0, 1, 2, K])
def test_fits_of_weights_of_low_rank_are_finite_and_exact_where_they_can_be(rank):
    for form in FORMS:
        conv = nn.Conv2d(C_IN, C_OUT, 3, dtype=torch.float64)
        with torch.no_grad():
            left, right = torch.randn(C_OUT, rank).double(), torch.randn(rank, C_IN * 9).double()
            conv.weight.copy_((left @ right).view_as(conv.weight))
        layer = BasisConv2d.from_conv(conv, basis_channels=K, coefficients=form)
        assert all(p.isfinite().all() for p in layer.parameters())
        if form in ("dense", "shared") or (rank < 3 and form.startswith(("low_rank", "grouped"))):
            assert error_of(layer, conv) < 1e-9
            assert layer.coefficients.matrix().abs().max() < 10
