import json
import math

import numpy as np
import pytest

from basis import figures, plots
from basis.search.table import Cell, Layer, SensitivityTable

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


def test_ranking_takes_the_nearest_candidate_and_leaves_out_what_is_not_finite():
    assert table().ranking(0.5) == ("b", "a", "c")
    assert table().ranking(0.25) == ("c", "a")  # b is not finite there, and c has no smaller candidate
    assert table({("a", 8): 0.3, ("c", 4): 0.1}).ranking(0.5) == ("c", "a")
    assert table().at(0.375)["a"].basis_channels == 8  # halfway: the larger
    for ratio in (0, 1, -0.5, 2):
        with pytest.raises(ValueError, match=f"ratio is {ratio}, but it is k / C_out and must lie between 0 and 1"):
            table().ranking(ratio)


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


def equal(first, second):
    return repr(first) == repr(second)  # NaN is not equal to itself


@pytest.mark.parametrize("made", [table(), table(cells=())])
def test_saved_and_loaded(made, tmp_path):
    path = tmp_path / "deep" / "table.jsonl"
    made.save(path)
    assert equal(SensitivityTable.load(path), made)
    assert equal(SensitivityTable.from_lines(made.to_lines()), made)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN, which is no JSON


def test_what_is_no_table_is_refused(tmp_path):
    path = tmp_path / "table.jsonl"
    with pytest.raises(FileNotFoundError):
        SensitivityTable.load(path)
    texts = ("", "{}\n", "[1]\n", "hello\n", '{"basis_sensitivity": 7}\n', '{"basis_sensitivity": 1}\n')
    table().save(path)
    head, *rest = path.read_text().splitlines(keepends=True)
    for text in (*texts, "".join([head, '{"layer": "a"}\n', *rest])):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"table.jsonl is no sensitivity table, or damaged"):
            SensitivityTable.load(path)


def test_cells_are_in_the_order_of_layers_and_the_first_of_two_counts():
    part = table({("b", 16): 1.0, ("a", 4): 2.0})
    assert part.missing == (("a", 8), ("b", 8), ("c", 4))
    assert [(c.layer, c.basis_channels) for c in part.cells] == [("a", 4), ("b", 16)]
    assert table().columns == (0.5, 0.25)
    cells = (Cell(layer="c", basis_channels=4, value=1.0), Cell(layer="c", basis_channels=4, value=2.0))
    assert [c.value for c in table(cells=cells).cells] == [1.0]


def test_print():
    lines = str(table()).splitlines()
    assert lines[0] == "oneshot: change of the loss; dense loss 0.75"
    assert [line.split() for line in lines[2:5]] == [
        ["a", "16", "0.1", "0.4"],
        ["b", "32", "-0.05", "nan"],
        ["c", "8", "0.2"],
    ]
    assert "not finite, so not ranked: b (k = 8)" in lines
    assert "kept dense (depthwise: one filter per group): d, e" in lines
    part = str(table({("c", 4): 1.0}))
    assert "not measured yet: a (k = 8), a (k = 4), b (k = 16), b (k = 8)" in part
    assert part.splitlines()[2].split() == ["a", "16", "...", "..."]
    assert "the model itself" in str(table(layers=(layer("", 16, (8,)),), cells=()))


def test_drawn():
    theme = figures.DARK
    axes = plots.heatmap(table(), theme).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.5", "0.25"]
    shown = np.ma.filled(axes.collections[0].get_array().astype(float), math.nan).reshape(3, 2)
    assert shown[0] == pytest.approx([0.1, 0.4])
    assert shown[1] == pytest.approx([-0.05, math.nan], nan_ok=True)
    part = plots.heatmap(table({("a", 8): 1.0}), theme).axes[0]
    assert "incomplete: 1 of 5 cells" in [t.get_text() for t in part.texts]
