"""Speed of structured layers: the compositions that they are compared with, and what the benchmarks report."""

import json

import pytest
import torch
from torch import nn

from basis.bench.cases import BenchReport, Setting
from basis.bench.compositions import composition
from basis.bench.structured import bench_structured, bench_structured_training, study_layers
from basis.cli import main
from basis.experiments.studies.substitutes import KINDS, SEPARABLE
from basis.layers.conv import BasisConv2d
from basis.layers.structured import LAYERS, Structure
from basis.models import build

TEXTS = {
    **{kind: [f"{kind}:{sizes[0]}" if sizes[0] else kind] for kind, (_, sizes) in KINDS.items()},
    "basis": ["basis:1/4", "basis:3"], "linearconv": ["linearconv", "linearconv:2"], "dsf": ["dsf:0.5"],
    "acdc": ["acdc:4"], "lfb": ["lfb:0.5,4", "lfb:0.5"], "shuffle": ["shuffle:1", "shuffle:2"],
    "tridiagonal": ["tridiagonal:1,1,7"], "debut": ["debut:0.5"], "dsfb": ["dsfb:1/4,1/8"],
}  # fmt: skip
SHAPES = [(16, 16, 1), (8, 16, 2), (12, 32, 1), (16, 8, 2)]


@pytest.fixture
def setting():
    def timer(step):
        step()
        return 0.002

    return Setting(
        device="cpu", precision="fp32", memory_format="channels_last", batch_size=2, rounds=3, timer=timer
    )  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
def test_a_composition_is_the_same_function_with_the_same_gradients(kind):
    compared = 0
    for text in TEXTS[kind]:
        for c_in, c_out, stride in SHAPES:
            torch.manual_seed(0)
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=(1, 2), bias=compared % 2 == 0, dtype=torch.float64)
            if Structure.parse(text).obstacle(conv):
                continue
            layer = LAYERS[kind].shaped_like(conv, size=Structure.parse(text).size)
            other = composition(layer)
            assert {id(p) for p in other.parameters()} == {id(p) for p in layer.parameters()}
            x = torch.randn(2, c_in, 7, 8, dtype=torch.float64, requires_grad=True)
            changed = [x, *(p for p in layer.parameters() if p.requires_grad)]
            y, expected = other(x), layer(x)
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
            dy = torch.randn_like(y)
            gradients, wanted = (torch.autograd.grad(out, changed, dy) for out in (y, expected))
            torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-9)
            compared += 1
    assert compared


def test_what_is_no_such_layer_has_no_composition():
    with pytest.raises(TypeError, match="takes a structured layer or a basis convolution, not Conv2d"):
        composition(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="the kernel is 1x1"):
        composition(BasisConv2d(8, 8, 1, basis_channels=2))


def test_layers_are_measured_beside_their_compositions(setting):
    ticks = {"dense": 4, "control": 4, "layer": 1, "composition": 2}
    order = []

    def timer(step):
        step()
        (layer,) = step.args
        kind = type(layer).__name__
        order.append(kind)
        return ticks["composition" if kind == "Composition" else "dense" if kind == "Conv2d" else "layer"] / 1000

    told = []
    setting = Setting(**{**vars(setting), "timer": timer})
    report = bench_structured(layers=["sep", "generic:0.25"], shapes=["16@6"], setting=setting, progress=told.append)
    assert report.kind == "bench-structured"
    named = [(row["layer"], row["mode"]) for row in report.rows]
    kinds = [(text, mode) for text in ("sep", "generic:0.25") for mode in ("layer", "composition")]
    assert named == [("dense", "control"), *kinds]
    assert [row["speedup"] for row in report.rows] == pytest.approx([1, 4, 2, 4, 2])
    assert [row.get("versus_composition") for row in report.rows] == [None, 2, None, 2, None]
    assert report.rows[1]["versus_composition_q1"] == pytest.approx(2)
    assert [row["parameters"] for row in report.rows] == [9 * 256, 400, 400, 272, 272]
    assert len(order) == 3 * 6
    assert len(told) == 5
    assert "16@6 forward+backward sep layer: 4.00x [4.00, 4.00], 1.0 ms, 2.00x its composition" in told
    assert "versus_composition" in str(report)


def test_what_a_shape_cannot_take_is_a_row_with_the_reason(setting):
    report = bench_structured(layers=["generic:0.01", "sep"], shapes=["16@6", "128@4"], setting=setting)
    assert [(row["shape"], row["layer"]) for row in report.rows if "error" in row] == [("16@6", "generic:0.01")]
    row = report.rows[1]
    assert "rank 0 with 16 -> 16 channels" in row["error"]
    assert "ms" not in row
    assert "generic:0.01 layer failed: generic:0.01 gives rank 0" in str(report)
    assert len(report.rows) == 1 + 1 + 2 + 1 + 4


def test_networks_are_measured_in_cells_with_a_dense_one_each(setting):
    layers = ["sep", ("generic:0.25", 8), ("dense", 8), "basis:1/4", "generic:0.5", "dense", "generic:0.001"]
    told = []
    report = bench_structured_training(model="wrn-10-1", layers=layers, setting=setting, progress=told.append)
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
    assert [row["substituted"] for row in report.rows[:-1]] == [0, 6, 6, 0, 6, 0, 6]
    assert sizes["sep", None] < sizes["dense", None]
    assert all(row["peak_mib"] > 0 for row in report.rows[:-1])
    assert told[2].startswith("wrn-10-1 generic:0.25@8 layer: 1.00x")


@pytest.mark.parametrize(
    ("bench", "options", "says"),
    [
        (bench_structured, {"layers": ["low"]}, "its kind must be one of"),
        (bench_structured, {"layers": ["sep"], "shapes": ["64"]}, "shape is '64'"),
        (bench_structured, {"layers": ["sep"], "passes": ["back"]}, "pass is 'back'"),
        (bench_structured_training, {"layers": ["low"]}, "its kind must be one of"),
        (bench_structured_training, {"layers": ["sep"], "model": "wrn"}, "model is 'wrn'"),
        (bench_structured_training, {"layers": ["sep"], "include": "x*"}, "include has 'x\\*'"),
    ],
)
def test_bad_options_are_refused(bench, options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench(**options, setting=setting)


def test_the_layers_of_the_study_are_those_trained_from_scratch():
    found = study_layers("cpu", "wrn-10-1")
    assert ("dense", None) not in found
    assert {text.partition(":")[0] for text, _ in found} == {*KINDS, "dense"}
    assert {text for text, width in found if width} >= {"dense", "sep"}
    assert len(found) == len(set(found)) > 2 * len(SEPARABLE)


def test_the_command_line_measures_both(tmp_path, monkeypatch):
    monkeypatch.setattr("basis.cli.results_folder", lambda: tmp_path)
    where = ["--device", "cpu", "--batch-size", "2", "--rounds", "3"]
    where += ["--precision", "fp32", "--memory-format", "contiguous"]
    assert main(["bench", "structured", "--shapes", "16@4", "--layers", "sep", *where]) == 0
    command = ["bench", "structured-train", "--model", "wrn-10-1", "--layers", "sep", "dense@8"]
    assert main([*command, *where]) == 0
    paths = {path.name: json.loads(path.read_text()) for path in (tmp_path / "bench").iterdir()}
    assert set(paths) == {
        "structured-cpu-fp32-contiguous.json", "structured-train-wrn-10-1-cpu-fp32-contiguous.json"
    }  # fmt: skip
    trained = BenchReport.load(tmp_path / "bench" / "structured-train-wrn-10-1-cpu-fp32-contiguous.json")
    assert trained.config["layers"] == ["sep", "dense@8"]
    assert [row["width"] for row in trained.rows] == [None, None, 8]
