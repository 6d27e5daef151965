"""What is special to a kind of structured layer: its formula, its drawing, its fit."""

import pytest
import scipy.fft
import tensorly
import torch
from tensorly.decomposition import partial_tucker, tensor_train
from torch import nn

from basis.layers.conv import BasisConv2d
from basis.layers.structured.maps import hashes, three_dimensions
from tests.layers.structured.kinds import conv_of, fitted_to, make


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_basis_makes_basis_convolutions():
    layers = [make(text, nn.Conv2d(8, 12, 3), fitted=True) for text in ("basis:1/4", "basis:5")]
    assert all(isinstance(layer, BasisConv2d) for layer in layers)
    assert [layer.basis_channels for layer in layers] == [3, 5]
    assert [layer.mode for layer in layers] == ["auto", "auto"]
    assert make("basis:1/2", nn.Conv2d(8, 12, 3, groups=2)).basis_channels == 6


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


def test_a_hashed_layer_uses_all_its_numbers_alike():
    layer, places = make("hashed:0.1", conv_of(16, 32, bias=False)), 16 * 32 * 9
    assert layer.bias is not None
    uses = torch.bincount(layer.constant("indices", layer.table), minlength=int(0.1 * places))
    assert uses.sum() == places
    assert uses.min() >= 1
    assert uses.double().var() == pytest.approx(10, rel=0.4)  # Poisson
    assert layer.to(torch.float16).constant("indices", layer.table).dtype == torch.int64


def test_a_learned_basis_is_mixed_for_each_group():
    layer = make("lfb:1,2", conv_of())
    parts = layer.mixing[:, :, 0, 0].split(len(layer.basis), dim=1)
    weight = torch.cat([torch.einsum("om,mcij->ocij", part, layer.basis) for part in parts], 1)
    torch.testing.assert_close(layer.weight, weight)
