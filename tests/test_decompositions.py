"""What other tools make of a trained convolution: exact at full rank, best at a smaller one, within the budget."""

from importlib import util

import pytest
import torch
from torch import nn

from basis.costs import count_parameters
from basis.decompositions import pair_of, svd_pairs, tensorly_conv, tensorly_network

needs_tltorch = pytest.mark.skipif(util.find_spec("tensorly") is None, reason="needs tensorly-torch")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, bias=False),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False, "stride": (2, 1), "padding": (1, 2)},
        {"dilation": 2, "padding": "same", "padding_mode": "reflect"},
    ],
)
def test_a_pair_of_full_rank_is_the_convolution(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(pair_of(conv, 6)(x), conv(x), atol=1e-5, rtol=1e-4)


def test_a_pair_is_the_best_of_its_rank():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    first, second = pair_of(conv, 2)
    weight = torch.einsum("oq,qihw->oihw", second.weight[:, :, 0, 0], first.weight)
    tail = torch.linalg.svdvals(conv.weight.flatten(1))[2:].square().sum()
    torch.testing.assert_close((weight - conv.weight).square().sum(), tail, rtol=1e-4, atol=0)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_pairs_meet_the_budget_as_nearly_as_one_rank_allows(share):
    model = network()
    wanted = int(share * count_parameters(model))
    small = svd_pairs(model, wanted, ["0"])
    assert wanted - (9 * 24 + 32) <= count_parameters(small) <= wanted  # a step of the common fraction is one rank
    assert type(small[0]) is nn.Conv2d
    assert isinstance(small[3], nn.Sequential)
    assert type(model[3]) is nn.Conv2d  # the given model is left alone


def test_what_makes_no_sense_is_refused():
    for q, groups in ((0, 1), (7, 1), (1, 2)):
        with pytest.raises(ValueError, match="groups is"):
            pair_of(nn.Conv2d(4, 6, 3, groups=groups), q)
    with pytest.raises(ValueError, match="above 500"):
        svd_pairs(network(), 500)
    with pytest.raises(ValueError, match="exclude has stem"):
        svd_pairs(network(), 5000, ["stem"])


@needs_tltorch
def test_tensorly_decomposes_the_weight_it_is_given():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(tensorly_conv(conv, 10**6)(x), conv(x), atol=1e-4, rtol=1e-3)


@needs_tltorch
def test_tensorlys_network_meets_the_budget():
    model = network()
    wanted = count_parameters(model) // 2
    small = tensorly_network(model, wanted, ["0", "5"])
    assert 0.9 * wanted < count_parameters(small) <= wanted
    assert [type(small[i]) is nn.Conv2d for i in (0, 3, 5, 7)] == [True, False, True, False]
