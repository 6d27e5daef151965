"""What structured layers cost: against what is executed, what is stored, and the counts of the layers by hand."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis import cost, count_parameters, count_trained, substitute
from basis.costs import Cost
from basis.layers.structured import LAYERS, Product, StructuredConv2d
from basis.layers.structured.layer import draw_bias

SIZE = (8, 12, 12)


def model(stride: int = 2, kernel: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel, stride=stride, padding=kernel // 2),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("text", ["sep", "generic:0.25"])
def test_forward_macs_are_what_is_executed(text, stride):
    network = substitute(model(stride), {"0": text, "2": text}, init="random")
    total = cost(network, SIZE, batch_size=3).total
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(3, *SIZE))
    assert counter.get_total_flops() == 2 * (total.forward_macs + total.building_macs)


def test_backward_macs_are_what_is_executed():
    """With 1x1 kernels: the counter of torch takes the weight gradients of depthwise filters for dense ones."""
    network = substitute(model(kernel=1), layer="generic:0.25", init="random")
    total = cost(network, SIZE, batch_size=3).total
    out = network(torch.randn(3, *SIZE))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * total.backward_macs


@pytest.mark.parametrize("text", ["sep", "generic:0.25"])
def test_parameters_are_those_that_are_stored_and_dense_those_of_the_convolution(text):
    network = substitute(model(), layer=text, init="random")
    report = cost(network, SIZE)
    assert report.total.parameters == sum(p.numel() for p in network.parameters()) == count_parameters(network)
    assert report.dense == cost(model(), SIZE).total
    assert report.total.identity_forward_macs == report.total.identity_backward_macs == 0


def test_generic_by_hand():
    row = cost(substitute(model(), {"2": "generic:0.25"}), SIZE, batch_size=2).layers[1]
    assert (row.kind, row.mode) == ("GenericConv2d", "")
    n, rank = 2 * 6 * 6, 8
    macs = 16 * 9 + 16 * rank + rank * 32
    kept = 2 * 16 * 12 * 12 + n * (16 + rank)  # its input, and those of both pointwise products
    assert row.cost == Cost(macs + 32, n * macs, n * macs, n * macs, 0, 0, 4 * kept)


def test_frozen_layers_have_no_weight_gradients_but_pass_them_on():
    network = substitute(model(), layer="sep")
    network[2].requires_grad_(False)
    first, second = (row.cost for row in cost(network, SIZE).layers)
    n, macs = 36, 16 * 9 + 16 * 32
    assert (second.input_gradient_macs, second.weight_gradient_macs) == (n * macs, 0)
    assert first.input_gradient_macs == 144 * 8 * 16  # of the map alone: it follows the trained depthwise filters
    assert first.weight_gradient_macs == first.forward_macs


class MaskedConv2d(StructuredConv2d):
    """Two products at two resolutions, a mask of one bit for each number, and random numbers from a seed."""

    kind, source = "masked", "this test"

    def _build(self, factory):
        self.frozen = nn.Parameter(torch.empty((self.out_channels, *self.filter_shape), **factory), requires_grad=False)
        self.scores = nn.Parameter(torch.empty_like(self.frozen))

    def reset_parameters(self):
        nn.init.normal_(self.frozen)
        nn.init.normal_(self.scores)
        draw_bias(self)

    def bits(self, name):
        return self.scores.numel() if name == "scores" else 0

    @property
    def weight(self):
        return self.frozen * self.scores

    @property
    def products(self):
        return (Product(10, at="input", trained=False), Product(7, reads=3, reads_at="input"))

    @property
    def building(self):
        return self.frozen.numel()


def test_bits_seeds_resolutions_and_building():
    layer = MaskedConv2d(3, 5, 3, stride=2, padding=1, dtype=torch.float64)
    numbers = 5 * 3 * 9
    assert count_parameters(layer) == -(-numbers // 32) + 5 == -(-(numbers + 5 * 32) // 32)
    assert count_trained(layer) == numbers + 5
    report = cost(layer, (3, 8, 6), batch_size=4)
    inside, outside = 4 * 48, 4 * 12
    assert report.total == Cost(
        parameters=count_parameters(layer),
        forward_macs=inside * 10 + outside * 7,
        weight_gradient_macs=outside * 7,  # nothing before the second product is trained
        activation_bytes=8 * inside * (3 + 3),
        building_macs=numbers,
    )
    assert report.to_frame().loc["", "building_macs"] == numbers
    assert (report.dense.parameters, report.dense.building_macs) == (numbers + 5, 0)
    assert "building" in str(report)
    assert "building" not in str(cost(model(), SIZE))


def test_shared_parameters_count_where_they_appear_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (MaskedConv2d(4, 4, 3, padding=1) for _ in range(2))
            self.b.scores = self.a.scores

        def forward(self, x):
            return self.b(self.a(x))

    numbers = 4 * 4 * 9
    first, second = cost(Two(), (4, 5, 5)).layers
    assert (first.cost.parameters, second.cost.parameters) == (-(-numbers // 32) + 4, 4)
    assert first.dense.parameters == second.dense.parameters == numbers + 4
    assert count_trained(Two()) == numbers + 8


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_beside_the_dense_network(kind):
    texts = {"acdc": "acdc:4", "debut": "debut:0.5", "dsf": "dsf:0.5", "dsfb": "dsfb:1/4,1/8", "shuffle": "shuffle:2",
             "tridiagonal": "tridiagonal:1,1,7", "dcf": "dcf:3"}  # fmt: skip
    text = texts.get(kind, f"{kind}:1/4" if LAYERS[kind].sizes and kind != "linearconv" else kind)
    network = substitute(model(), {"2": text}, init="random")
    report = cost(network, SIZE, batch_size=3, mode="composed")
    assert report.dense == cost(model(), SIZE, batch_size=3).total
    assert report.total.parameters == count_parameters(network) < report.dense.parameters
    assert all(row.counted for row in report.layers)
    if kind not in ("acdc", "basis", "linearconv"):  # those execute transforms, or as their mode says
        with FlopCounterMode(display=False) as counter:
            network(torch.randn(3, *SIZE))
        assert counter.get_total_flops() == 2 * (report.total.forward_macs + report.total.building_macs)
