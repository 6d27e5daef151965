"""Pictures of structured layers: what they show is what is stored, and all of it is in the picture."""

import math

import matplotlib
import pytest
import torch
from basis.experiments.structured_figures import Point, draw_layers, draw_tradeoff, stored_tensors
from torch import nn

from basis.experiments.studies.substitutes import judged
from basis.figures import DARK, LIGHT
from basis.layers.structured import LAYERS, Structure
from basis.statistics import Estimate

SIZES = {"dsf": "dsf:0.25", "acdc": "acdc:8", "dsfb": "dsfb:1/4,1/16", "tridiagonal": "tridiagonal:1,3"}


def text_of(kind):
    return SIZES.get(kind) or judged(kind)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_stored_number_is_a_cell(kind):
    (layer,) = Structure.parse(text_of(kind)).make([nn.Conv2d(16, 16, 3, bias=False)], fitted=False)
    cells = sum(int((~tensor.isnan()).sum()) for tensor in stored_tensors(layer))
    if kind in ("basis", "linearconv"):
        assert cells == layer.basis.numel() + layer.coefficients.stored
    elif kind == "pemn":  # a bit a cell
        assert cells == 16 * 144
        assert set(stored_tensors(layer)[0].unique().tolist()) == {0, 1}
    elif kind == "dsf":  # its zeros are shown too
        assert sum(int((tensor != 0).sum()) for tensor in stored_tensors(layer)) <= layer.stored
    else:
        assert cells == layer.stored


def test_what_is_no_such_layer_is_refused():
    with pytest.raises(ValueError, match="Conv2d is no basis convolution and no structured layer"):
        stored_tensors(nn.Conv2d(3, 3, 3))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_the_picture_holds_all_tensors_and_the_weight(theme):
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    with matplotlib.rc_context(theme.rc()):
        figure = draw_layers(theme, [(text_of(kind), kind, "$W$") for kind in LAYERS])
    assert torch.rand(1) == before
    assert len(figure.axes) == len(LAYERS)
    for axes in figure.axes:
        left, right = axes.get_xlim()
        for image in axes.images:
            x0, x1, *_ = image.get_extent()
            assert left <= x0 < x1 <= right
        assert axes.images[-1].get_array().shape == (16, 144)


def test_points_are_joined_in_the_order_of_their_cost():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    nan = math.nan
    points = [Point(10, Estimate(2, nan, nan, 1)), Point(1, Estimate(1, nan, nan, 1))]
    curves = {"a": points, "dense": [Point(5, Estimate(3, 2, 4, 2))]}
    draw_tradeoff(axes, LIGHT, curves, bold={"dense": "black"}, unit=10)
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 1], [1, 2]]
    assert axes.get_xscale() == "log"
