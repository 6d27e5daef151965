"""The forms of A: as text, in every mode against a convolution whose weight is built row by row, and as fits."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis.layers.coefficients import Coefficients, Form, Frozen, LowRank, Repeat, Sparse
from basis.layers.conv import MODES, BasisConv2d

C_IN, C_OUT, K = 8, 24, 8
EXPLICIT = ("factorized", "composed", "hybrid")
FORMS = ("dense", "low_rank:3", "low_rank:1/4", "grouped:2", "sparse:3", "sparse:1/2", "shared", "frozen", "repeat")
CLASSES = {
    "dense": Coefficients, "shared": Coefficients, "grouped": Coefficients, "low_rank": LowRank, "sparse": Sparse,
    "frozen": Frozen, "repeat": Repeat,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_layer(form, *, permuted=False, kernel_size=3, dtype=torch.float64, **options):
    """A layer of 24 filters, 8 of them basis filters; ``permuted`` shuffles the outputs within mixing groups."""
    layer = BasisConv2d(C_IN, C_OUT, kernel_size, basis_channels=K, coefficients=form, dtype=dtype, **options)
    if permuted:
        groups = layer.coefficients.groups
        width = C_OUT // groups
        order = torch.cat([torch.randperm(width) + i * width for i in range(groups)])
        layer.load_state_dict(layer.state_dict() | {"order": order})
    return layer


def top(values, entries):
    """Where the largest entries of each row are."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    for row, kept in zip(values, mask, strict=True):
        kept[sorted(range(len(row)), key=lambda j: -abs(row[j].item()))[:entries]] = True
    return mask


def explicit_matrix(a, leaves):
    """A, entry by entry, from tensors of the names that the parameters of ``a`` have."""
    if isinstance(a, LowRank):
        per_group = a.rows // a.groups
        terms = range(a.rank)
        rows = [
            sum(leaves["left"][i, q] * leaves["right"][i // per_group * a.rank + q] for q in terms)
            for i in range(a.rows)
        ]
        return torch.stack(rows)
    if isinstance(a, Repeat):
        eye = torch.eye(a.columns, dtype=torch.float64)
        return torch.stack([eye[i % (a.rows // a.groups) % a.columns] for i in range(a.rows)])
    return leaves.get("values", a.values)


def explicit_weight(layer, basis, matrix):
    """W, row by row: per mixing group the basis filters, then each derived one as a sum of them."""
    groups, k = layer.coefficients.groups, layer.coefficients.columns
    derived = layer.coefficients.rows // groups
    rows = []
    for i in range(groups):
        own = basis[i * k : (i + 1) * k]
        rows += [*own, *(torch.einsum("j,jchw->chw", a, own) for a in matrix[i * derived : (i + 1) * derived])]
    return torch.stack([rows[c] for c in layer.order.tolist()])


def fixed_gradient(y):
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))


def reference(layer, x, trained=None):
    """Output and gradients of F.conv2d with that weight; a sparse A is a leaf of its own, already masked."""
    a = layer.coefficients
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {
        name: leaf.detach().clone().requires_grad_(trained is None or name in trained) for name, leaf in leaves.items()
    }
    if isinstance(a, Sparse):
        values = leaves["coefficients.values"]
        with torch.no_grad():
            values.mul_(top(values, a.entries))
    parts = {name.removeprefix("coefficients."): leaf for name, leaf in leaves.items()}
    weight = explicit_weight(layer, leaves["basis"], explicit_matrix(a, parts))
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    y = F.conv2d(leaves["x"], weight, leaves.get("bias"), *options)
    if y.requires_grad:
        y.backward(fixed_gradient(y))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def run(layer, x):
    """Output and gradients of the layer."""
    y = layer(x)
    if y.requires_grad:
        y.backward(fixed_gradient(y))
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def assert_same(ours, expected, tolerance=1e-10):
    assert (ours is None) == (expected is None)
    if expected is not None:
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def assert_all_same(ours, expected, tolerance=1e-10):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert_same(tensor, expected[name], tolerance)


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
    ("text", "columns", "count"), [("1/8", 64, 8), ("1/8", 20, 2), ("1/8", 30, 4), ("0.01", 64, 1), ("10", 4, 10)]
)
def test_fractions_are_of_the_columns_rounded_and_at_least_one(text, columns, count):
    assert Form.parse(f"sparse:{text}").count(columns) == count


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
        ("low_rank:5", {"basis_channels": 4}),
        ("low_rank:5", {"basis_channels": 12}),
        ("low_rank:3", {"basis_channels": 4, "groups": 2}),
        ("sparse:5", {"basis_channels": 4}),
        ("grouped:3", {"basis_channels": 4}),
        ("grouped:4", {"basis_channels": 4, "groups": 2}),
        ("grouped:5", {"basis_channels": 10}),
    ],
)
def test_a_size_that_does_not_fit_is_refused(form, options):
    with pytest.raises(ValueError, match=f"coefficients is '{form}'"):
        BasisConv2d(8, 16, 3, coefficients=form, **options)


# -- in every mode ------------------------------------------------------------------------------


LAYOUTS = (("batch", 1, False), ("unbatched", 2, True), ("channels_last", 1, True), ("channels_last", 2, False))
# Each form in each mode, with a layout, groups and order that differ between them.
CASES = [(form, mode, *LAYOUTS[(i + j) % 4]) for i, form in enumerate(FORMS) for j, mode in enumerate(EXPLICIT)]


@pytest.mark.parametrize(("form", "mode", "layout", "groups", "permuted"), CASES)
def test_every_form_is_the_dense_convolution_forward_and_backward(form, mode, permuted, groups, layout):
    layer = make_layer(form, permuted=permuted, groups=groups, mode=mode, stride=(2, 1), padding=1)
    assert type(layer.coefficients) is CLASSES[form.split(":")[0]]
    x = images()
    if layout == "unbatched":
        x = x[0]
    if layout == "channels_last":
        x, layer = x.to(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    y, gradients = run(layer, x.requires_grad_())
    expected, expected_gradients = reference(layer, x)
    assert_same(y, expected)
    assert_all_same(gradients, expected_gradients)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, EXPLICIT[i % 3]) for i, form in enumerate([*FORMS, "low_rank:99", "sparse:99", "grouped:4"])],
)
def test_all_basis_channels_leave_nothing_to_derive(form, mode):
    conv = nn.Conv2d(8, 16, 3, dtype=torch.float64, groups=2)
    layer = BasisConv2d.from_conv(conv, ratio=1, mode=mode, coefficients=form)
    assert layer.coefficients.stored == 0
    x = images(requires_grad=True)
    assert_same(layer(x), conv(x))
    assert_same(layer.weight, conv.weight)
    layer(x).sum().backward()


@pytest.mark.parametrize(("form", "mode", "bias"), [(f, MODES[i % 4], i % 2) for i, f in enumerate(FORMS)])
def test_an_in_place_activation_may_follow(form, bias, mode):
    layer = make_layer(form, permuted=True, mode=mode, bias=bool(bias))
    x, parameters = images(), list(layer.parameters())
    expected = torch.autograd.grad(F.relu(layer(x)).square().sum(), parameters)
    ours = torch.autograd.grad(F.relu(layer(x), inplace=True).square().sum(), parameters)
    for gradient, right in zip(ours, expected, strict=True):
        assert_same(gradient, right, 0)


# -- as a module --------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "mode"), [(form, EXPLICIT[i % 3]) for i, form in enumerate(FORMS)])
def test_state_copies_and_functional_calls_carry_the_form(form, mode):
    layer, other, x = make_layer(form, permuted=True, mode=mode), make_layer(form, mode=mode), images()
    assert_same(copy.deepcopy(layer)(x), layer(x), 0)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert_same(other(x), layer(x), 0)
    third = make_layer(form, mode=mode)
    third.load_state_dict(layer.state_dict() | dict(third.named_parameters()))
    state = dict(layer.named_parameters()) | {n: b for n, b in layer.named_buffers() if "values" in n}
    assert_same(torch.func.functional_call(third, state, x), layer(x), 0)


@pytest.mark.parametrize(("form", "mode"), [(form, EXPLICIT[i % 3]) for i, form in enumerate(FORMS)])
def test_it_runs_on_the_meta_device_and_can_be_filled_there(form, mode):
    layer = make_layer(form, mode=mode, device="meta")
    assert layer(torch.empty(2, 8, 5, 5, device="meta", dtype=torch.float64)).shape == (2, C_OUT, 3, 3)
    source, x = make_layer(form, mode=mode, permuted=True), images()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same(layer(x), source(x), 0)


# -- what is drawn and stored -------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", [*FORMS, "low_rank:64", "low_rank:1", "sparse:1", "sparse:1/8", "sparse:64"])
def test_derived_filters_begin_with_the_variance_of_basis_filters(form, groups):
    layers = [BasisConv2d(4, 512, 1, groups=groups, basis_channels=128, coefficients=form) for _ in range(8)]
    squares = torch.stack([layer.coefficients.matrix().detach().square().sum(1).mean() for layer in layers])
    assert squares.mean().item() == pytest.approx(1, rel=0.08 if form == "low_rank:1" else 0.03)
    if form != "repeat":
        assert torch.stack([layer.coefficients.matrix().detach().mean() for layer in layers]).mean().abs() < 0.01


@pytest.mark.parametrize(
    ("form", "stored", "products"),
    [
        ("dense", 16 * 4, [16 * 4]),
        ("shared", 16 * 4, [16 * 4]),
        ("grouped:2", 16 * 2, [16 * 2]),
        ("low_rank:3", 2 * 3 * 4 + 16 * 3, [2 * 3 * 4, 16 * 3]),
        ("sparse:3", 16 * 3, [16 * 4]),
        ("frozen", 0, [16 * 4]),
        ("repeat", 0, []),
    ],
)
def test_what_a_form_stores_and_multiplies(form, stored, products):
    a = make_layer(form, groups=2).coefficients
    assert (a.rows, a.groups * a.columns) == (16, 8)
    assert a.stored == stored
    assert list(a.products) == products
    assert a.trains == (stored > 0)
    if not isinstance(a, Sparse):
        assert sum(p.numel() for p in a.parameters()) == stored


def test_resetting_draws_every_form_anew():
    for form in FORMS:
        layer = make_layer(form, permuted=True)
        before = layer.coefficients.matrix().clone()
        layer.reset_parameters()
        assert torch.equal(layer.coefficients.matrix(), before) == (form == "repeat")
        assert layer.order.tolist() == list(range(C_OUT))
        x = images()
        assert_same(layer(x), reference(layer, x)[0])


# -- sparse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EXPLICIT)
def test_the_mask_follows_the_values_in_training_only(mode):
    layer, x = make_layer("sparse:3", mode=mode), images()
    a = layer.coefficients
    first = a.mask.clone()
    assert torch.equal(first, top(a.values, 3))
    with torch.no_grad():
        a.values.copy_(a.values.flip(1))
    layer.eval()(x)
    assert torch.equal(a.mask, first)
    layer.train()(x)
    assert torch.equal(a.mask, first.flip(1))
    assert torch.equal(a.matrix() != 0, a.mask)


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
    assert a.values.grad.ne(0).all()
    assert not torch.equal(a.mask, first)
    assert not a.settled

    a.settle()
    kept = a.mask.clone()
    assert a.settled
    assert torch.equal(kept, top(a.values, 3))
    assert a.values[~kept].eq(0).all()
    before = a.matrix().clone()
    for _ in range(5):
        train_a_step(layer, optimizer)
    a.settle()
    assert torch.equal(a.mask, kept)
    assert a.values.grad[~kept].eq(0).all()
    assert a.values.grad[kept].ne(0).all()
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
            layer.coefficients.values.add_(1)
            source_values = source.coefficients.values + 1
        layer(x)
        assert torch.equal(layer.coefficients.mask, source.coefficients.mask)
        assert_same(layer.coefficients.matrix(), source_values * source.coefficients.mask, 0)
    target.load_state_dict(make_layer("sparse:3").state_dict())
    target(x).sum().backward()
    assert target.coefficients.values.grad.ne(0).all()
    twin.reset_parameters()
    assert not twin.coefficients.settled


# -- shared -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "mode"), [(form, EXPLICIT[i % 3]) for i, form in enumerate(FORMS)])
def test_layers_can_hold_one_a(mode, form):
    first = make_layer(form, mode=mode)
    before = first.coefficients.matrix().clone()
    second = make_layer(first.coefficients, mode=mode, kernel_size=1)
    assert second.coefficients is first.coefficients
    assert_same(first.coefficients.matrix(), before, 0)
    x = images()
    names = [f"coefficients.{name}" for name, _ in first.coefficients.named_parameters()]
    (first(x).sin().mean() + second(x).sin().mean()).backward()
    for name in names:
        ours = first.get_parameter(name).grad
        alone = []
        for layer in (first, second):
            one = copy.deepcopy(layer)
            one.zero_grad()
            one(x).sin().mean().backward()
            alone.append(one.get_parameter(name).grad)
        assert_same(ours, sum(alone))


@pytest.mark.parametrize("options", [{"basis_channels": 6}, {"basis_channels": 8, "groups": 2}])
def test_layers_of_different_shape_cannot_hold_one_a(options):
    given = make_layer("shared").coefficients
    with pytest.raises(ValueError, match="coefficients"):
        BasisConv2d(8, 24, 3, coefficients=given, **options)


def test_given_coefficients_keep_their_flags_and_values():
    given = make_layer("dense").coefficients
    conv = nn.Conv2d(8, 24, 3, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    before = given.matrix().clone()
    for make in (BasisConv2d.from_conv, BasisConv2d.shaped_like):
        layer = make(conv, basis_channels=8, coefficients=given)
        assert layer.coefficients is given
        assert given.trains
        assert given.training
        assert not layer.training
        assert_same(given.matrix(), before, 0)


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


@pytest.mark.parametrize(("rank", "groups"), [(1, 2), (8, 1)])
def test_a_low_rank_fit_is_no_worse_than_cutting_the_dense_one(rank, groups):
    conv = some_conv(groups)
    dense = BasisConv2d.from_conv(conv, basis_channels=24)
    layer = BasisConv2d.from_conv(conv, basis_channels=24, coefficients=f"low_rank:{rank}")
    fitted = error_of(layer, conv)
    assert torch.linalg.matrix_rank(layer.coefficients.blocks()).max() == rank
    best = error_of(dense, conv)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(dense.coefficients.blocks(), full_matrices=False)
        cut = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
        dense.coefficients.values.copy_(cut.flatten(0, 1))
    assert best <= fitted < error_of(dense, conv)


@pytest.mark.parametrize("form", ["low_rank:8", "sparse:8"])
def test_the_first_rows_become_the_basis_only_where_that_is_clearly_better(form):
    layer = BasisConv2d.from_conv(some_conv(), basis_channels=8, coefficients=form)
    assert layer.coefficients.matrix().abs().max() < 2
    dense = BasisConv2d.from_conv(some_conv(), basis_channels=8).to_conv()
    exact = BasisConv2d.from_conv(dense, basis_channels=8, coefficients=form)
    assert_same(exact.weight, dense.weight)
    assert exact.coefficients.matrix().abs().max() < 2


@pytest.mark.parametrize(("entries", "groups"), [(1, 2), (8, 1)])
def test_a_sparse_fit_is_no_worse_than_cutting_the_dense_one(entries, groups):
    conv = some_conv(groups)
    dense = BasisConv2d.from_conv(conv, basis_channels=24)
    layer = BasisConv2d.from_conv(conv, basis_channels=24, coefficients=f"sparse:{entries}")
    assert layer.coefficients.matrix().ne(0).sum(1).max() == entries
    fitted = error_of(layer, conv)
    best = error_of(dense, conv)
    with torch.no_grad():
        dense.coefficients.values.mul_(top(dense.coefficients.values, entries))
    assert best <= fitted < error_of(dense, conv)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_grouped_fit_is_the_best_of_each_group(groups):
    conv = some_conv(groups)
    layer = BasisConv2d.from_conv(conv, basis_channels=24, coefficients="grouped:3")
    rows = conv.weight.detach().view(3 * groups, 16 // groups, -1)
    best = torch.linalg.svdvals(rows)[:, 8 // groups :].square().sum().sqrt()
    assert error_of(layer, conv) == pytest.approx(best.item(), rel=1e-9)


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 2])
def test_fits_of_degenerate_weights_are_finite(rank, form):
    conv = nn.Conv2d(C_IN, C_OUT, 3, dtype=torch.float64)
    with torch.no_grad():
        left, right = torch.randn(C_OUT, rank).double(), torch.randn(rank, C_IN * 9).double()
        conv.weight.copy_((left @ right).view_as(conv.weight))
    layer = BasisConv2d.from_conv(conv, basis_channels=K, coefficients=form)
    assert all(p.isfinite().all() for p in layer.parameters())
    if Form.parse(form).kind in ("dense", "shared", "low_rank", "grouped"):
        assert error_of(layer, conv) < 1e-9
