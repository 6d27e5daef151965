"""Speed of structured layers."""

import pytest

from basis.bench.cases import bench_layers
from basis.bench.networks import bench_structured_training
from basis.models import build


def test_what_a_shape_cannot_take_is_a_row_with_the_reason(setting):
    report = bench_layers("structured", candidates=["generic:0.01", "sep"], shapes=["16@6", "128@4"], setting=setting)
    assert [(row["shape"], row["layer"]) for row in report.rows if "error" in row] == [("16@6", "generic:0.01")]
    row = report.rows[1]
    assert "rank 0 with 16 -> 16 channels" in row["error"]
    assert "ms" not in row
    assert "generic:0.01 layer failed: " in str(report)
    assert len(report.rows) == 2 * (1 + 2)


def test_networks_are_measured_in_cells_with_a_dense_one_each(setting):
    layers = [
        ("sep", None), ("generic:0.25", 8), ("dense", 8), ("basis:1/4", None), ("generic:0.5", None), ("dense", None),
        ("generic:0.001", None),
    ]  # fmt: skip
    told = []
    report = bench_structured_training(
        model="wrn-10-1", layers=layers, include="layer?.*.conv?", setting=setting, progress=told.append
    )
    assert report.kind == "bench-structured-train"
    named = [(row["layer"], row["width"], row["mode"]) for row in report.rows]
    assert named == [
        ("dense", None, "control"), ("sep", None, "layer"), ("generic:0.25", 8, "layer"), ("dense", 8, "dense"),
        ("basis:1/4", None, "layer"), ("dense", None, "control"), ("generic:0.5", None, "layer"),
        ("generic:0.001", None, "layer"),
    ]  # fmt: skip
    assert [row["speedup"] for row in report.rows[:-1]] == [1] * 7
    assert "no convolution can become generic:0.001: generic:0.001 gives rank 0" in report.rows[-1]["error"]
    sizes = {(row["layer"], row["width"]): row.get("parameters") for row in report.rows}
    assert sizes["dense", None] == sum(p.numel() for p in build("wrn-10-1").parameters())
    assert sizes["dense", 8] == sum(p.numel() for p in build("wrn-10-1", width=8).parameters())
    assert sizes["sep", None] < sizes["dense", None]
    assert all(row["peak_mib"] > 0 for row in report.rows[:-1])
    assert len(told) == len(report.rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": [("sep", None)], "include": "*", "model": "wrn"}, "model"),
    ],
)
def test_bad_options_are_refused(options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_structured_training(**options, setting=setting)
