import copy

import pytest
import scipy.fft
import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker, tensor_train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis import count_parameters, merge, substitute
from basis.experiments.studies.published import GRAY, INCLUDE, mult_adds
from basis.layers.structured import Structure
from basis.layers.structured.hashed import hashes
from basis.layers.structured.tensors import three_dimensions
from basis.models import build

LAYERS = (
    "sep", "generic:0.25", "tied:1/4", "sep_hashed:0.2", "hashed:0.2", "tensor_train:0.4", "tucker:0.5",
    "shuffle:2", "acdc:3", "tridiagonal:1,2", "tridiagonal:1,1,9",
)  # fmt: skip
GEOMETRIES = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "bias": False},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 1, "stride": 2, "padding": 1},
)


def make(text, conv, *, fitted=False):
    return Structure.parse(text).make([conv], fitted=fitted)[0]


def conv_of(c_in=16, c_out=16, kernel_size=3, dtype=torch.float64, **options):
    return nn.Conv2d(c_in, c_out, kernel_size, dtype=dtype, **options)


def layer_of(text, *shape, **options):
    torch.manual_seed(0)
    return make(text, conv_of(*shape, **options))


def error(layer, weight):
    return float((layer.weight.detach() - weight).norm() / weight.norm())


@pytest.fixture(scope="module")
def wide():
    with torch.device("meta"):
        return build("wrn-28-10")


# -- what was published ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", GRAY, ids=lambda row: row.setting)
def test_parameters_and_mult_adds_are_those_of_gray_et_al(wide, row):
    model = substitute(wide, layer=row.layer, include=INCLUDE, init="random") if row.layer else wide
    assert count_parameters(model) == row.parameters
    assert f"{mult_adds(model, (3, 32, 32)):.3e}" == f"{row.mult_adds:.3e}"


@pytest.mark.parametrize(
    ("layer", "parameters", "macs"),
    [
        ("shuffle:3", 1_343_834, None), ("shuffle:8", None, 7.69784e7), ("shuffle:16", None, 6.07583e7),
        ("shuffle:32", None, 5.12965e7), ("shuffle:4", None, 1.17201e8), ("sep_hashed:0.05", None, 6.29697e8),
        ("hashed:0.01", 654_272, None), ("acdc:12", 555_498, 1.339e9), ("acdc:48", 1_200_618, None),
        ("acdc:64", 1_487_338, None),
    ],
)  # fmt: skip
def test_so_are_those_in_their_log(wide, layer, parameters, macs):
    model = substitute(wide, layer=layer, include=INCLUDE, init="random")
    assert parameters in (None, count_parameters(model))
    assert macs is None or mult_adds(model, (3, 32, 32)) == pytest.approx(macs, rel=5e-4 if macs > 1e9 else 1e-5)


def test_mult_adds_leaves_the_model_alone_and_knows_only_their_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    before = copy.deepcopy(model.state_dict())
    assert mult_adds(model, (3, 8, 8)) == 36 * 8 * 27 + 36 * 8 + 36 * 8 * 5
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="0 is a BasisConv2d"):
        mult_adds(substitute(model, {"0": 4}), (3, 8, 8))


def test_mult_adds_of_a_tied_layer_repeat_the_channels():
    layer = layer_of("tied:1/4", 16, 32, 3, padding=1)
    assert mult_adds(layer, (16, 4, 4)) == 16 * (16 * 9 + 2 * 32 * 8)


# -- all layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("text", LAYERS)
def test_every_layer_is_the_convolution_with_its_weight(text, shape):
    if text.startswith("tied") and shape == (32, 16):
        pytest.skip("not defined")
    for geometry in GEOMETRIES:
        conv = conv_of(*shape, **geometry)
        if (geometry["kernel_size"] == 1) and Structure.parse(text).obstacle(conv):
            continue
        layer = make(text, conv)
        dense = layer.to_conv()
        assert dense.weight.shape == conv.weight.shape
        assert torch.equal(dense.weight, layer.weight)
        x = torch.randn(2, shape[0], 9, 10, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=0, atol=1e-10)
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), dense(x), rtol=0, atol=1e-10)
        bias = geometry.get("bias", True) or "hashed" in text
        assert (layer.bias is not None) == bias


@pytest.mark.parametrize("text", LAYERS)
def test_gradients_are_those_of_the_convolution_with_its_weight(text):
    layer = layer_of(text, padding=1)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    here = torch.autograd.grad(layer(x), inputs, gradient)
    there = torch.autograd.grad(F.conv2d(x, layer.weight, layer.bias, padding=1), inputs, gradient)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("text", LAYERS)
def test_under_autocast_a_weight_is_built_in_full_precision(text):
    layer = layer_of(text, dtype=torch.float32, padding=1)
    x = torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, weight = layer(x), layer.weight
    assert y.dtype == torch.bfloat16
    assert torch.equal(weight, layer.weight)
    assert (y - layer(x)).norm() < 0.02 * layer(x).norm()


@pytest.mark.parametrize("text", LAYERS)
def test_states_copies_and_seeds(text):
    layer, again = layer_of(text), layer_of(text)
    assert torch.equal(layer.weight, again.weight)
    x = torch.randn(1, 16, 5, 5, dtype=torch.float64)
    state = layer.state_dict()
    assert sum(value.numel() for value in state.values()) == count_parameters(layer)
    other = make(text, conv_of())
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(state)
    unmade = make(text, nn.Conv2d(16, 16, 3, device="meta", dtype=torch.float64))
    assert unmade(x.to("meta")).shape == (1, 16, 3, 3)
    unmade.to_empty(device="cpu").load_state_dict(state)
    for same in (other, unmade, copy.deepcopy(layer)):
        assert torch.equal(same(x), layer(x))


@pytest.mark.parametrize("text", LAYERS)
def test_compiles_without_graph_breaks(text):
    layer = layer_of(text, padding=1)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("options", [{}, {"stride": 2}], ids=str)
@pytest.mark.parametrize("text", LAYERS)
def test_products_and_building_are_what_is_executed(text, options):
    layer = layer_of(text, 16, 32, 3, padding=1, **options)
    x = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    pixels = {"input": 3 * 64, "output": y.numel() // 32}
    macs = sum(product.macs * pixels[product.at] for product in layer.products)
    assert counter.get_total_flops() == 2 * (macs + layer.building)


@pytest.mark.parametrize("text", LAYERS)
def test_models_take_them_and_give_them_back(text):
    torch.manual_seed(0)
    model = build("resnet20", width=16).double().eval()
    changed = substitute(model, layer=text, include="layer2.*.conv2", init="random")
    assert count_parameters(changed) < count_parameters(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    merged = merge(changed)
    assert type(merged.layer2[1].conv2) is nn.Conv2d
    torch.testing.assert_close(merged(x), changed(x), rtol=0, atol=1e-10)


# -- fitting ----------------------------------------------------------------------------------------


def fitted(text, weight, **options):
    conv = conv_of(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **options)
    conv.weight.data = weight.detach().to(conv.weight.dtype)
    return make(text, conv, fitted=True)


@pytest.mark.parametrize(
    "text",
    ["sep", "generic:0.25", "sep_hashed:0.2", "hashed:0.2", "tensor_train:0.4", "tucker:0.5", "tridiagonal:1,2,9"],
)
@pytest.mark.parametrize("shape", [(16, 16, 1), (16, 16, 3), (32, 16, 3), (16, 32, 3)], ids=str)
def test_the_fit_of_a_weight_of_the_structure_is_that_weight(text, shape):
    if text == "sep" and shape[-1] == 1:
        pytest.skip("a dense layer")
    source = layer_of(text, *shape)
    if shape[-1] > 1 and not text.startswith("hashed"):
        # The scale and sign of each channel's filter are free: those that the fit begins with.
        with torch.no_grad():
            source.depthwise.abs_()
            source.depthwise /= source.depthwise.flatten(1).norm(dim=1)[:, None, None, None]
    assert error(fitted(text, source.weight), source.weight) < 1e-7
    torch.manual_seed(1)
    single = fitted(text, source.weight, dtype=torch.float32)
    assert single.weight.dtype == torch.float32
    assert error(single, source.weight) < 1e-5


@pytest.mark.parametrize("text", ["tied:1/4", "shuffle:2", "acdc:3"])
def test_descent_comes_near_a_1x1_weight_of_the_structure(text):
    source = layer_of(text, 16, 16, 1)
    torch.manual_seed(1)
    assert error(fitted(text, source.weight), source.weight) < 1e-3


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("text", LAYERS)
def test_a_fit_is_better_than_zero_and_leaves_flags_alone(text, kernel_size):
    torch.manual_seed(0)
    conv = conv_of(16, 16, kernel_size)
    if text == "sep" and kernel_size == 1:
        pytest.skip("a dense layer")
    conv.weight.requires_grad_(False)
    layer = make(text, conv, fitted=True)
    assert error(layer, conv.weight) < 0.999
    assert torch.equal(layer.bias, conv.bias)
    assert not any(p.requires_grad for p in layer.parts.values())
    assert all(p.grad is None for p in layer.parameters())


def test_the_fit_of_a_zero_weight_is_finite():
    for text in ("sep", "generic:0.25", "sep_hashed:0.2", "hashed:0.2", "tensor_train:0.4", "tridiagonal:1,2"):
        assert fitted(text, torch.zeros(16, 16, 3, 3)).weight.abs().max() < 1e-10


def test_alternating_improves_on_the_first_approximation(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    for text in ("generic:0.25", "sep_hashed:0.2", "tridiagonal:1,2"):
        layer = fitted(text, weight)
        monkeypatch.setattr(type(layer), "rounds", 1)
        assert error(layer, weight) < error(fitted(text, weight), weight)


# -- each of them -----------------------------------------------------------------------------------


def test_tied_is_v_transposed_v_of_repeated_channels():
    layer = layer_of("tied:0.3", 16, 32, 3, padding=1)
    assert layer.factor.shape == (9, 32, 1, 1)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, layer.depthwise, padding=1, groups=16).repeat(1, 2, 1, 1)
    y = F.conv2d(F.conv2d(y, layer.factor), layer.factor.transpose(0, 1), layer.bias)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize(("text", "places"), [("hashed:0.1", 16 * 32 * 9), ("sep_hashed:0.1", 16 * 32)])
def test_a_hashed_layer_uses_all_its_numbers_alike(text, places):
    layer = layer_of(text, 16, 32, 3, bias=False)
    assert len(layer.table) == int(0.1 * places)
    assert layer.bias is not None
    uses = torch.bincount(layer.indices, minlength=len(layer.table))
    assert uses.sum() == places
    assert uses.min() >= 1
    assert uses.double().var() == pytest.approx(10, rel=0.4)  # Poisson
    own = layer.weight if text.startswith("hashed") else layer.matrix
    assert own.unique().numel() == len(layer.table)


def test_the_hash_function_is_the_same_for_ever():
    assert hashes(3, None).tolist() == [2626580360, 2524728788, 2591768622]
    many = hashes(1 << 16, None)
    assert many.unique().numel() == 1 << 16
    assert (many % 1000).double().mean() == pytest.approx(499.5, abs=5)


def test_hash_places_follow_the_layer_to_other_dtypes():
    layer = layer_of("hashed:0.1").to(torch.float16)
    assert layer.indices.dtype == torch.int64
    assert layer.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("n", "dimensions"),
    [
        (160 * 16, (16, 16, 10)), (160 * 160, (32, 32, 25)), (320 * 160, (40, 40, 32)), (320 * 320, (50, 64, 32)),
        (640 * 320, (64, 64, 50)), (640 * 640, (80, 80, 64)), (64, (4, 4, 4)), (21, (3, 7, 1)), (7, (7, 1, 1)),
    ],
)  # fmt: skip
def test_tensors_have_the_dimensions_of_gray_et_al(n, dimensions):
    assert three_dimensions(n) == dimensions


@pytest.fixture
def _tensorly_with_numpy():
    """tensorly-torch, which other tests import, changes the backend of tensorly."""
    with tensorly.backend_context("numpy"):
        yield


@pytest.mark.usefixtures("_tensorly_with_numpy")
def test_a_fitted_tensor_train_is_that_of_tensorly():
    torch.manual_seed(0)
    weight = torch.randn(16, 10, 1, 1, dtype=torch.float64)
    layer = fitted("tensor_train:0.5", weight)
    a, b, c = three_dimensions(160)
    ranks = (1, len(layer.core3), len(layer.core2), 1)
    turned = weight.view(a, b, c).permute(2, 1, 0).numpy()  # they go from the first dimension to the last
    theirs = torch.from_numpy(tensorly.tt_to_tensor(tensor_train(turned, rank=list(ranks)))).permute(2, 1, 0)
    torch.testing.assert_close(layer.weight.flatten(), theirs.flatten(), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("_tensorly_with_numpy")
def test_a_fitted_tucker_tensor_is_that_of_tensorly():
    torch.manual_seed(0)
    weight = torch.randn(16, 16, 1, 1, dtype=torch.float64)
    layer = fitted("tucker:0.5", weight)
    dimensions = three_dimensions(256)
    factors = (layer.factor1, layer.factor2, layer.factor3)
    for factor in factors:
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))
    (core, theirs), _ = partial_tucker(
        weight.view(dimensions).numpy(), rank=[len(f) for f in factors], modes=[0, 1, 2], n_iter_max=0
    )
    tensor = torch.from_numpy(tensorly.tucker_to_tensor((core, theirs)))
    torch.testing.assert_close(layer.weight.flatten(), tensor.flatten(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("text", ["tensor_train:0.4", "tucker:0.5"])
def test_tensors_begin_as_projections_of_a_uniform_map(text):
    torch.manual_seed(0)
    layer = layer_of(text, 64, 64, 3)
    drawn = torch.full((), 1 / 64 / 3, dtype=torch.float64).sqrt()  # the standard deviation of U(+-1 / sqrt(64))
    assert 0.3 * drawn < layer.matrix.std() < 0.9 * drawn


@pytest.mark.parametrize("shape", [(12, 12), (6, 12), (8, 12), (12, 4)], ids=str)
def test_acdc_is_the_product_of_its_factors(shape):
    c, o = shape
    layer = layer_of("acdc:4", c, o, 3)
    n = max(shape)
    assert layer.a.shape == (3, n)
    eye = torch.eye(n, dtype=torch.float64).numpy()
    transform, inverse = (torch.from_numpy(f(eye, type=2, axis=1)) for f in (scipy.fft.dct, scipy.fft.idct))
    order = [*range(0, n, 2), *range(1, n, 2)]
    product = torch.eye(n, dtype=torch.float64)
    for a, d in zip(layer.a, layer.d, strict=True):
        product = product @ (((a.diag() @ transform)[:, order]) @ (d.diag() @ inverse))[:, order]
    x = torch.randn(c, dtype=torch.float64)
    padded = {(8, 12): torch.cat([x, x[:4]]), (6, 12): torch.cat([x, x])}.get(shape, x)
    y = (product @ padded).view(o, -1).sum(1)
    torch.testing.assert_close(layer.matrix @ x, y)


@pytest.mark.parametrize(("wanted", "shape", "groups"), [(3, (16, 160), 2), (7, (16, 160), 4), (7, (160, 160), 5)])
def test_shuffle_lowers_its_groups(wanted, shape, groups):
    assert layer_of(f"shuffle:{wanted}", *shape).conv_groups == groups


def test_shuffle_is_the_three_convolutions():
    layer = layer_of("shuffle:2", 8, 24, 3, padding=1, stride=2)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    y = F.conv2d(x, layer.down, groups=2)[:, [0, 3, 1, 4, 2, 5]]
    y = F.conv2d(y, layer.depthwise, stride=2, padding=1, groups=6)
    torch.testing.assert_close(layer(x), F.conv2d(y, layer.up, layer.bias, groups=2))
    assert {id(p) for p in layer.factors} == {id(p) for p in (layer.down, layer.depthwise, layer.up)}


def test_tridiagonal_has_three_diagonals_of_riffled_channels():
    matrix = layer_of("tridiagonal:1,2", 8, 8).matrix
    riffled = matrix[:, [0, 2, 4, 6, 1, 3, 5, 7]] != 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for i in range(8):
        expected[i, [(i - 1) % 8, i, (i + 2) % 8]] = True
    assert torch.equal(riffled, expected)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)], ids=str)
def test_tridiagonal_reaches_every_channel_and_adds_entries(shape):
    mask = layer_of("tridiagonal:1,1", *shape).matrix != 0
    assert mask.sum(0 if shape[0] > shape[1] else 1).tolist() == [3] * max(shape)
    assert min(mask.sum(0).min(), mask.sum(1).min()) >= 3
    more = layer_of("tridiagonal:1,1,10", *shape).matrix != 0
    assert more.sum() == mask.sum() + 10
    assert (more | mask).sum() == more.sum()


def test_a_stack_of_tridiagonal_layers_mixes_all_channels():
    mask = (layer_of("tridiagonal:1,1", 64, 64).matrix != 0).double()
    assert (torch.linalg.matrix_power(mask, 8) > 0).all()


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("tied:0.1", (16, 24), "must divide that of the output channels, but there are 16 -> 24"),
        ("tied:0.01", (16, 16), "tied:0.01 gives rank 0"),
        ("hashed:0.00001", (4, 4), "hashed:0.00001 stores none of 144 numbers"),
        ("sep_hashed:2", (16, 16), r"the size of sep_hashed is 2, but it is a fraction and must lie in \(0, 1\]"),
        ("tensor_train:x", (16, 16), "the size of tensor_train is 'x', but it must be a number"),
        ("tucker", (16, 16), "the layer is 'tucker', but tucker takes a size"),
        ("acdc:1", (16, 16), "acdc:1 has no factors"),
        ("acdc:3", (15, 15), "acdc needs an even number of channels, but the larger one is 15"),
        ("acdc:3", (16, 12), "acdc sums output channels, .* there are 16 -> 12"),
        ("acdc:2.5", (16, 16), "the size of acdc is '2.5', but it must be a whole number"),
        ("shuffle:2", (16, 3), "shuffle needs at least 4 output channels, and there are 3"),
        ("shuffle:0", (16, 16), "the size of shuffle is '0'"),
        ("tridiagonal:1", (16, 16), "the size of tridiagonal is '1', but it must be P,Q"),
        ("tridiagonal:1,-1", (16, 16), "the size of tridiagonal is '1,-1'"),
        ("tridiagonal:4,4", (8, 8), "the diagonals -4, 0 and 4 of tridiagonal:4,4 are not three among 8 channels"),
        ("tridiagonal:0,1", (8, 8), "are not three"),
        ("tridiagonal:1,1,99", (8, 8), "has 123 entries, but the map has only 64"),
        ("sep_hashed:0.9", (16, 1), "nothing to save"),
    ],
)
def test_what_is_not_possible_is_told(text, shape, message):
    conv = conv_of(*shape)
    with pytest.raises(ValueError, match=message):
        make(text, conv)
    assert Structure.parse(text).obstacle(conv)
