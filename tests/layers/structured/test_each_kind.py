"""What is special to a kind of structured layer: its formula, its drawing, its fit."""

import math

import pytest
import scipy.fft
import tensorly
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker, tensor_train
from torch import nn

from basis import count_parameters, count_trained
from basis.layers.conv import BasisConv2d
from basis.layers.structured import LAYERS, Structure
from basis.layers.structured.filters import fourier_bessel
from basis.layers.structured.maps import hashes, three_dimensions
from basis.layers.structured.sparse import factorize
from tests.layers.structured.kinds import conv_of, fitted_to, make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_basis_and_linearconv_make_basis_convolutions():
    conv = nn.Conv2d(8, 12, 3)
    layers = [make(text, conv, fitted=True) for text in ("basis:1/4", "basis:5", "linearconv", "linearconv:2")]
    assert all(isinstance(layer, BasisConv2d) for layer in layers)
    assert [layer.basis_channels for layer in layers] == [3, 5, 6, 6]
    assert [layer.mode for layer in layers] == ["auto", "auto", "composed", "composed"]
    assert [str(layer.coefficients.form) for layer in layers] == ["dense", "dense", "dense", "low_rank:2"]
    assert make("basis:1/2", nn.Conv2d(8, 12, 3, groups=2)).basis_channels == 6


def test_tied_is_v_transposed_v_of_repeated_channels():
    layer, x = make("tied:0.3", conv_of(16, 32, padding=1)), torch.randn(2, 16, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, layer.depthwise, padding=1, groups=16).repeat(1, 2, 1, 1)
    y = F.conv2d(F.conv2d(y, layer.factor), layer.factor.transpose(0, 1), layer.bias)
    torch.testing.assert_close(layer(x), y)


def test_shuffle_has_as_many_groups_as_divide_the_channels():
    for wanted, shape, groups in ((3, (16, 160), 2), (7, (16, 160), 4), (7, (160, 160), 5)):
        assert make(f"shuffle:{wanted}", conv_of(*shape)).conv_groups == groups


@pytest.mark.parametrize("shape", [(12, 12), (6, 12), (8, 12), (12, 4)], ids=str)
def test_acdc_is_the_product_of_its_factors(shape):
    (c, o), n, layer = shape, max(shape), make("acdc:4", conv_of(*shape))
    eye = torch.eye(n, dtype=torch.float64).numpy()
    transform, inverse = (torch.from_numpy(f(eye, type=2, axis=1)) for f in (scipy.fft.dct, scipy.fft.idct))
    order, product = [*range(0, n, 2), *range(1, n, 2)], torch.eye(n, dtype=torch.float64)
    for a, d in zip(layer.a, layer.d, strict=True):
        product = product @ (((a.diag() @ transform)[:, order]) @ (d.diag() @ inverse))[:, order]
    x = torch.randn(c, dtype=torch.float64)
    padded = {(8, 12): torch.cat([x, x[:4]]), (6, 12): torch.cat([x, x])}.get(shape, x)
    torch.testing.assert_close(layer._map() @ x, (product @ padded).view(o, -1).sum(1))


def test_tensors_are_decomposed_as_by_tensorly():
    assert [three_dimensions(n) for n in (2560, 409600, 64, 21, 7)] == [
        (16, 16, 10), (80, 80, 64), (4, 4, 4), (3, 7, 1), (7, 1, 1)
    ]  # fmt: skip
    weight = torch.randn(16, 10, 1, 1, dtype=torch.float64)
    train, tucker = fitted_to("tensor_train:0.5", weight), fitted_to("tucker:0.5", weight)
    tensor = weight.view(three_dimensions(160)).numpy()
    factors = (tucker.factor1, tucker.factor2, tucker.factor3)
    with tensorly.backend_context("numpy"):  # tensorly-torch, which other tests import, changes it
        turned = tensor.transpose(2, 1, 0)  # they go from the first dimension to the last
        parts = tensor_train(turned, rank=[1, len(train.core3), len(train.core2), 1])
        theirs = tensorly.tt_to_tensor(parts).transpose(2, 1, 0)
        tucker_parts, _ = partial_tucker(tensor, rank=[len(f) for f in factors], modes=[0, 1, 2], n_iter_max=0)
        theirs_too = tensorly.tucker_to_tensor(tucker_parts)
    for layer, expected in ((train, theirs), (tucker, theirs_too)):
        torch.testing.assert_close(layer.weight.detach().flatten(), torch.tensor(expected).flatten(), rtol=0, atol=1e-9)
    for factor in factors:
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))


def test_the_hash_function_is_the_same_for_ever():
    assert hashes(3, None).tolist() == [2626580360, 2524728788, 2591768622]
    assert hashes(1 << 16, None).unique().numel() == 1 << 16


@pytest.mark.parametrize(("text", "places"), [("hashed:0.1", 16 * 32 * 9), ("sep_hashed:0.1", 16 * 32)])
def test_a_hashed_layer_uses_all_its_numbers_alike(text, places):
    layer = make(text, conv_of(16, 32, bias=False))
    assert layer.bias is not None
    uses = torch.bincount(layer.constant("indices", layer.table), minlength=int(0.1 * places))
    assert uses.sum() == places
    assert uses.min() >= 1
    assert uses.double().var() == pytest.approx(10, rel=0.4)  # Poisson
    assert layer.to(torch.float16).constant("indices", layer.table).dtype == torch.int64


def test_tridiagonal_has_three_diagonals_of_riffled_channels_and_further_entries():
    mask = make("tridiagonal:1,2", conv_of(8, 8))._map() != 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for i in range(8):
        expected[i, [(i - 1) % 8, i, (i + 2) % 8]] = True
    assert torch.equal(mask[:, [0, 2, 4, 6, 1, 3, 5, 7]], expected)
    for shape in ((8, 12), (12, 8)):
        mask, more = (make(f"tridiagonal:1,1{text}", conv_of(*shape))._map() != 0 for text in ("", ",10"))
        assert min(mask.sum(0).min(), mask.sum(1).min()) >= 3
        assert more.sum() == mask.sum() + 10 == (more | mask).sum()


def test_filters_are_mixed_as_the_papers_say():
    for text in ("lfb:1,2", "basisconv:0.4", "dcf:3", "dsfb:1/4,1/8"):
        layer = make(text, conv_of())
        if text == "dcf:3":
            weight = torch.einsum("ockl,kij->ocij", layer.coefficients, layer.functions)
        elif text == "dsfb:1/4,1/8":
            scale = layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()
            filters = torch.cat([layer.basis, layer.unique])
            weight = torch.einsum("om,m,mcij->ocij", layer.mixing[:, :, 0, 0], scale, filters)
        else:
            parts = layer.mixing[:, :, 0, 0].split(len(layer.basis), dim=1)  # one for each group
            weight = torch.cat([torch.einsum("om,mcij->ocij", part, layer.basis) for part in parts], 1)
        torch.testing.assert_close(layer.weight, weight)


def test_a_normalisation_inside_takes_the_batch_in_training():
    layer, x = make("dsfb:1/4,1/8", conv_of()).train(), torch.randn(4, 8, 9, 7, dtype=torch.float64)
    maps = F.conv2d(x, torch.cat([layer.basis, layer.unique]))
    maps = F.batch_norm(maps, None, None, layer.norm.weight, layer.norm.bias, training=True)
    torch.testing.assert_close(layer(x), F.conv2d(maps, layer.mixing, layer.bias), rtol=0, atol=1e-10)
    fitted = make("dsfb:1/2,1/4", conv_of(8, 8), fitted=True)
    assert fitted.penalty().item() == pytest.approx(0, abs=1e-20)
    nn.init.zeros_(fitted.unique)
    assert fitted.penalty().item() == pytest.approx(2 / 36)  # two zero rows in a 6 x 6 matrix


@pytest.mark.parametrize("fitted", [False, True])
def test_fixed_filters_come_from_the_seed_or_are_stored(fitted):
    conv = conv_of(8, 12, bias=False)
    layer, other = make("basisconv:0.5", conv, fitted=fitted), make("basisconv:0.5", conv)
    rows = layer.basis.flatten(1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(6, dtype=torch.float64))
    assert not torch.equal(other.basis, layer.basis)
    other.load_state_dict(layer.state_dict())
    assert other.stored == layer.stored == count_parameters(layer) == (6 * (12 + 72) if fitted else 6 * 12)
    assert count_trained(layer) == 6 * 12
    assert layer.factors == [layer.mixing]
    with pytest.raises(ValueError, match="with fitted filters"):
        make("basisconv:0.9", conv, fitted=True)


def test_fourier_bessel_functions():
    three = torch.from_numpy(fourier_bessel(3))
    assert three[0, 1, 1] > three[0, 0, 1] > three[0, 0, 0] > 0  # J_0: falls from the middle
    torch.testing.assert_close(three[0], three[0].rot90())
    torch.testing.assert_close(three[1].rot90().abs(), three[2].abs())  # cosine and sine of the same wave
    for size, count in ((3, 8), (2, 3), (5, 24)):
        functions = torch.from_numpy(fourier_bessel(size)).flatten(1)
        assert torch.linalg.matrix_rank(functions) == len(functions) <= count


def test_masks_keep_the_better_half_and_gradients_go_straight_through():
    layer = make("pemn:1/3", conv_of(6, 10))
    scores, values = layer.scores.detach().abs(), layer.constant("values", layer.scores)
    expected = values * (scores > scores.flatten().sort().values[len(scores.flatten()) // 2 - 1])
    assert torch.equal(layer.weight, expected)
    assert torch.equal(values.flatten()[181:], values.flatten()[:-181])  # int(540 / 3) + 1 values, repeated
    x, dense = torch.randn(2, 6, 5, 5, dtype=torch.float64), layer.to_conv()
    (mine,), (theirs,) = (torch.autograd.grad(y.square().sum(), w) for y, w in (
        (layer(x), layer.scores), (dense(x), dense.weight)))  # fmt: skip
    torch.testing.assert_close(mine, theirs * values * layer.scores.sign())
    assert layer.stored == math.ceil(540 / 32)
    assert "values" not in layer.state_dict()


def test_double_sparse_counts_and_training_that_leaves_zeros():
    for shape, density, square, other in (((64, 64, 3), "0.2", 409, 6963), ((64, 256, 1), "0.2", 409, 2867)):
        layer = make(f"dsf:{density}", conv_of(*shape))
        sides = ("inner", "outer") if shape[1] > shape[0] * shape[2] ** 2 else ("outer", "inner")
        for name, count in zip(sides, (square, other), strict=True):
            assert (getattr(layer, name) != 0).sum() == getattr(layer, f"{name}_mask").sum() == count
            assert layer.bits(name) == 32 * count + getattr(layer, name).numel()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        layer(torch.randn(2, 64, 3, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    assert not layer.outer[~layer.outer_mask].any()
    assert count_trained(layer) == 3276 + 256


def test_double_sparse_factors_are_found_and_beat_pruning():
    torch.manual_seed(1)
    first = torch.eye(32) + torch.randn(32, 32) * (torch.rand(32, 32) < 0.2)
    second = torch.randn(32, 200) * (torch.rand(32, 200) < 0.1)
    target, counts = first @ second, (int((first != 0).sum()), int((second != 0).sum()))
    a, b = factorize(target, *counts)
    assert ((a != 0).sum(), (b != 0).sum()) == counts
    least = target.abs().flatten().kthvalue(target.numel() - sum(counts) + 1).values
    assert (a @ b - target).norm() < 0.5 * (target * (target.abs() < least)).norm()
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1))


def test_a_butterfly_is_the_product_of_its_factors():
    """R_N ... R_1, each block by block of r x s diagonal matrices, on patches with channels inside."""
    layer = make("debut:0.4", conv_of())
    product = torch.eye(72, dtype=torch.float64)
    for factor in layer.parts.values():
        blocks = [torch.cat([torch.cat([e.diag() for e in row], 1) for row in block]) for block in factor.detach()]
        product = torch.block_diag(*blocks) @ product
    torch.testing.assert_close(layer.weight.detach(), product.view(16, 3, 3, 8).permute(0, 3, 1, 2))


def test_fractions_are_met_nearly_at_full_rank_and_the_smallest_is_named():
    for inputs, outputs, kernel in ((16, 16, 3), (40, 40, 3), (64, 128, 3), (64, 256, 1)):
        layer = LAYERS["debut"](inputs, outputs, kernel, size=0.2, device="meta")
        dense = outputs * inputs * kernel**2
        assert 0.14 * dense < layer.stored <= 0.2 * dense
        assert min(b * r * t for b, r, _, t in (p.shape for p in layer.parts.values())) >= min(inputs, outputs)
    reason = Structure.parse("debut:0.05").obstacle(conv_of())
    assert Structure.parse(f"debut:{reason.split()[-1]}").obstacle(conv_of()) is None
