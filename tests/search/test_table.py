import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from basis import cost, figures, substitute
from basis.models import build
from basis.search.table import Cell, Layer, SensitivityTable, Trial
from basis.statistics import difference_estimate

VALUES = {("a", 8): 0.1, ("a", 4): 0.4, ("b", 16): -0.05, ("b", 8): math.nan, ("c", 4): 0.2}


def layer(name, out_channels, candidates, **options):
    settings = {"groups": 1, "fan_in": 27, "bias": 0, "positions": 10, "input_gradient": True} | options
    return Layer(name=name, out_channels=out_channels, candidates=candidates, **settings)


LAYERS = (layer("a", 16, (8, 4)), layer("b", 32, (16, 8)), layer("c", 8, (4,), positions=None))


def table(values=None, **options):
    values = VALUES if values is None else values
    cells = [
        Cell(
            layer=n, basis_channels=k, value=v, low=v - 0.1, high=v + 0.1, n=9, kl=abs(v) / 2,
            forward=3, backward=2, seconds=0.5,
        )
        for (n, k), v in values.items()
    ]  # fmt: skip
    settings = {
        "measure": "oneshot",
        "layers": LAYERS,
        "cells": tuple(cells),
        "skipped": {"d": "depthwise: one filter per group", "e": "depthwise: one filter per group"},
        "total": {"params": 5000, "macs": 40000, "backward_macs": 80000},
        "fingerprint": {"measure": "oneshot", "weights": "123"},
        "baseline": {"loss": 0.75},
    }
    return SensitivityTable(**(settings | options))


def trained(losses, seeds=(0, 1), **options):
    trials = tuple(
        Trial(layer=n, basis_channels=k, seed=s, loss=v, forward=10, backward=6, seconds=1)
        for (n, k, s), v in losses.items()
    )
    settings = {"cells": (), "seeds": seeds, "trials": trials, "measure": "short_training", "baseline": {}}
    return table(**(settings | options))


# -- what is there ------------------------------------------------------------------------------


def test_missing_and_not_finite():
    whole = table()
    assert whole.missing == ()
    assert whole.not_finite == (("b", 8),)
    part = table({("b", 16): 1.0, ("a", 4): 2.0})
    assert part.missing == (("a", 8), ("b", 8), ("c", 4))
    assert [(c.layer, c.basis_channels) for c in part.cells] == [("a", 4), ("b", 16)]  # in the order of layers
    assert whole.ratios == (0.5, 0.25)


def test_the_first_of_two_equal_cells_counts():
    cells = (Cell(layer="c", basis_channels=4, value=1.0), Cell(layer="c", basis_channels=4, value=2.0))
    assert [c.value for c in table(cells=cells).cells] == [1.0]


def test_totals():
    whole = table()
    assert (whole.forward, whole.backward, whole.seconds) == (15, 10, 2.5)


def test_ranking_takes_the_nearest_candidate_and_leaves_out_what_is_not_finite():
    assert table().ranking(0.5) == ("b", "a", "c")
    assert table().ranking(0.25) == ("c", "a")  # b is not finite there, and c has no smaller candidate
    assert table({("a", 8): 0.3, ("c", 4): 0.1}).ranking(0.5) == ("c", "a")
    assert table().at(0.375)["a"].basis_channels == 8  # halfway: the larger
    for ratio in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match=f"ratio is {ratio}, but it is k / C_out and must lie between 0 and 1"):
            table().ranking(ratio)


def test_by_kl():
    other = table().by_kl()
    assert [c.value for c in other.cells][:3] == [0.05, 0.2, 0.025]
    assert all(math.isnan(c.low) and c.n == 0 for c in other.cells)
    assert other.layers == LAYERS
    assert str(other).startswith("oneshot_kl: divergence from the dense predictions, nats")
    bare = table(cells=(Cell(layer="a", basis_channels=8, value=1.0),), measure="fisher")
    with pytest.raises(
        ValueError, match="this table of fisher holds no divergences; oneshot and oneshot_bn measure them"
    ):
        bare.by_kl()


@pytest.mark.parametrize("groups", [1, 4])
def test_costs_are_those_of_the_substituted_layer(groups):
    model = build("resnet20", width=8)
    if groups > 1:
        model.layer1[0].conv2 = type(model.conv1)(8, 8, 3, padding=1, groups=groups)
    size, names = (3, 16, 16), ("conv1", "layer1.0.conv2", "layer2.0.conv1")
    dense = {row.name: row.cost for row in cost(model, size).layers}
    for name in names:
        conv = model.get_submodule(name)
        own = Layer(
            name=name, out_channels=conv.out_channels, groups=conv.groups, fan_in=conv.weight[0].numel(),
            bias=0 if conv.bias is None else len(conv.bias), candidates=(4,), input_gradient=name != "conv1",
            positions=dense[name].forward_macs // conv.weight.numel(),
        )  # fmt: skip
        thin = {row.name: row.cost for row in cost(substitute(model, {name: 4}), size, mode="factorized").layers}[name]
        for k, report in ((4, thin), (conv.out_channels, dense[name])):
            expected = {"params": report.parameters, "macs": report.forward_macs, "backward_macs": report.backward_macs}
            assert own.cost(k) == expected


def test_frame():
    frame = table().to_frame()
    row = frame[(frame.layer == "b") & (frame.basis_channels == 16)].iloc[0]
    assert len(frame) == 5
    assert row.ratio == 0.5
    assert row.out_channels == 32
    assert row.value == -0.05
    assert row.saved_params == 32 * 27 - (16 * 27 + 16 * 16)
    assert row.saved_macs == 10 * row.saved_params
    assert math.isnan(frame[frame.layer == "c"].iloc[0].saved_macs)
    assert {"low", "high", "n", "kl", "forward", "backward", "seconds", "saved_backward_macs"} <= set(frame.columns)


def test_print():
    text = str(table())
    lines = text.splitlines()
    assert lines[0] == "oneshot: change of the loss; dense loss 0.75"
    assert lines[1].split() == ["layer", "C_out", "r", "=", "0.5", "r", "=", "0.25"]
    assert lines[2].split() == ["a", "16", "0.1", "*0.4"]
    assert lines[3].split() == ["b", "32", "*-0.05", "nan"]
    assert lines[4].split() == ["c", "8", "0.2"]
    assert "cost: 15 forward passes, 10 backward passes (in images), 2.5 s" in lines
    assert "not finite, so not ranked: b (k = 8)" in lines
    assert "kept dense (depthwise: one filter per group): d, e" in lines
    assert "not measured yet" not in text
    part = str(table({("c", 4): 1.0}))
    assert "not measured yet: a (k = 8), a (k = 4), b (k = 16), b (k = 8)" in part
    assert part.splitlines()[2].split() == ["a", "16", "...", "..."]
    assert "the model itself" in str(table(layers=(layer("", 16, (8,)),), cells=()))


# -- drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK])
def test_heatmap(theme):
    figure = table().plot(theme=theme)
    axes = figure.axes[0]
    grid = np.asarray(next(c for c in axes.get_children() if isinstance(c, AxesImage)).get_array())
    assert grid[0] == pytest.approx([0.1, 0.4])
    assert grid[1][0] == -0.05
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.5", "0.25"]
    hatched = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()]
    assert [(p.get_x(), p.get_y()) for p in hatched] == [(0.5, 0.5)]
    assert not axes.texts
    figure.canvas.draw()


def test_bars():
    axes = table().plot("bars", ratio=0.25).axes[0]
    assert [round(bar.get_width(), 6) for bar in axes.containers[1].patches] == [0.4]
    assert "r = 0.25" in axes.get_xlabel()
    assert [p.get_hatch() for p in axes.patches if p.get_hatch()] == ["////"]
    assert "n = 9" in [t.get_text() for t in axes.texts]
    part = table({("a", 8): 1.0}).plot("bars").axes[0]
    assert "r = 0.5" in part.get_xlabel()  # the ratio that most layers have
    assert "incomplete: 1 of 3 layers" in [t.get_text() for t in part.texts]
    assert "incomplete: 1 of 5 cells" in [t.get_text() for t in table({("a", 8): 1.0}).plot().axes[0].texts]


def test_names_of_fifty_layers_do_not_overlap():
    layers = tuple(layer(f"layer{i}.conv", 16, (8,)) for i in range(50))
    cells = tuple(Cell(layer=one.name, basis_channels=8, value=i / 7) for i, one in enumerate(layers))
    for kind in ("heatmap", "bars"):
        figure = table(layers=layers, cells=cells).plot(kind)
        figure.canvas.draw()
        boxes = [t.get_window_extent() for t in figure.axes[0].get_yticklabels()]
        assert len(boxes) == 50
        assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="kind is 'pie', but it must be 'heatmap' or 'bars'"):
        table().plot("pie")
    with pytest.raises(ValueError, match="nothing of this table has been measured yet"):
        table(cells=()).plot()


# -- trained ------------------------------------------------------------------------------------

LOSSES = {(None, 0, 0): 1.0, (None, 0, 1): 1.2, ("a", 8, 0): 1.5, ("a", 8, 1): 1.9, ("a", 4, 0): 3.0, ("c", 4, 0): 1.0}


def test_cells_follow_from_trials():
    own = trained(LOSSES)
    (cell,) = own.cells  # only where all seeds are there
    expected = difference_estimate([1.5, 1.9], [1.0, 1.2])
    assert (cell.layer, cell.basis_channels, cell.n) == ("a", 8, 2)
    assert (cell.value, cell.low, cell.high) == (expected.value, expected.low, expected.high)
    assert cell.value == pytest.approx(0.6)
    assert cell.forward == pytest.approx(20 + 20 / 5)  # its own, and a share of the dense trainings
    assert cell.backward == pytest.approx(12 + 12 / 5)
    assert cell.seconds == pytest.approx(2 + 2 / 5)
    assert own.baseline == {"loss": pytest.approx(1.1)}
    assert own.missing == (("a", 4), ("b", 16), ("b", 8), ("c", 4))


def test_a_diverged_trial_gives_nan():
    own = trained(LOSSES | {("a", 8, 1): math.nan, ("c", 4, 1): 1.1})
    assert own.not_finite == (("a", 8),)
    assert own.ranking(0.5) == ("c",)


def test_without_dense_trials_there_are_no_cells():
    own = trained({key: value for key, value in LOSSES.items() if key[0]})
    assert own.cells == ()
    assert own.baseline == {}


# -- kept ---------------------------------------------------------------------------------------


def equal(first, second):
    return repr(first) == repr(second)  # NaN is not equal to itself


@pytest.mark.parametrize("made", [table(), table(cells=()), trained(LOSSES), trained(LOSSES | {("a", 8, 1): math.nan})])
def test_saved_and_loaded(made, tmp_path):
    path = tmp_path / "deep" / "table.jsonl"
    made.save(path)
    assert equal(SensitivityTable.load(path), made)
    assert equal(SensitivityTable.from_lines(made.to_lines()), made)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which is no JSON


def test_infinity_is_kept_as_not_finite():
    made = table({("a", 8): math.inf})
    assert SensitivityTable.from_lines(made.to_lines()).not_finite == (("a", 8),)


def test_an_incomplete_last_line_is_left_out(tmp_path):
    path = tmp_path / "table.jsonl"
    table().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert equal(SensitivityTable.load(path), replace(table(), cells=table().cells[:-1]))
    path.write_bytes(whole[:-1])  # complete but for its end of line
    assert len(SensitivityTable.load(path).cells) == 4


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "table.jsonl"
    with pytest.raises(FileNotFoundError, match=r"there is no sensitivity table at .*table.jsonl"):
        SensitivityTable.load(path)
    for text, what in (
        ("", "begin with an entry 'basis_sensitivity'"),
        ("{}\n", "begin with an entry 'basis_sensitivity'"),
        ("[1]\n", "begin with an entry 'basis_sensitivity'"),
        ("hello\nyou\n", "is no sensitivity table, or damaged"),
        ('{"basis_sensitivity": 7}\n', "has version 7, but 1 is read here"),
        ('{"basis_sensitivity": 1}\n', "the sensitivity table is damaged: KeyError"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"table.jsonl.*{what}"):
            SensitivityTable.load(path)
    table().save(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"layer": "a"}\n', *lines[1:]]))
    with pytest.raises(ValueError, match="the sensitivity table is damaged: TypeError"):
        SensitivityTable.load(path)


def test_merge():
    whole = table()
    parts = [replace(whole, cells=whole.cells[i::2]) for i in (0, 1)]
    assert equal(SensitivityTable.merge(reversed(parts)), whole)
    assert equal(SensitivityTable.merge([replace(whole, cells=(), baseline={}), whole]), whole)
    assert equal(SensitivityTable.merge([whole, whole]), whole)


def test_merge_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match="there are no tables to merge"):
        SensitivityTable.merge([])
    other = table(fingerprint={"measure": "oneshot", "weights": "456", "data": "7"})
    with pytest.raises(ValueError, match="cannot be merged, because they differ in weights, data"):
        SensitivityTable.merge([table(), other])
    with pytest.raises(ValueError, match=r"the dense network's loss is 0.75 in one, 0.76 in another"):
        SensitivityTable.merge([table(), table(baseline={"loss": 0.76})])
    with pytest.raises(ValueError, match=r"the dense network with seed 1 ended at 1.2 in one, at 1.3 in another"):
        SensitivityTable.merge([trained(LOSSES), trained(LOSSES | {(None, 0, 1): 1.3})])


def test_merged_trials_give_the_cells():
    dense = {key: value for key, value in LOSSES.items() if key[0] is None}
    rest = {key: value for key, value in LOSSES.items() if key[0] is not None}
    assert equal(SensitivityTable.merge([trained(dense), trained(rest)]), trained(LOSSES))
