"""Benchmarks that tell PyTorch's batch normalisation from ours, and what is measured where steps are captured."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from basis import substitute
from basis.bench.cases import Block, bench_layers
from basis.bench.networks import bench_training
from basis.bench.tuning import bench_latency, tune
from basis.experiments.budget_bench import bench_budget
from basis.inference import bench_inference
from basis.models import build


def rehearse(function):
    """Stands for a CUDA graph."""
    function()
    return function


def clock(step):
    """A layer coupled to its normalisation takes half of the time of all others, a whole network ten times as long."""
    step()
    layer = getattr(step, "args", [None])[0]
    conv = layer.conv if isinstance(layer, Block) else layer
    milliseconds = 10 if conv is None or hasattr(conv, "fc") else 1 - 0.5 * getattr(conv, "mixed_later", False)
    return milliseconds / 1000 * getattr(step, "sets", 1)


@pytest.fixture
def captured(setting, monkeypatch):
    monkeypatch.setattr("basis.bench.timing.MOST_SETS", 4)
    return replace(setting, timer=clock, capture=rehearse)


def test_training_has_the_dense_network_fused_and_with_pytorchs_norms(setting, monkeypatch):
    from basis.bench import networks

    hooked, real = [], networks.trainer_of

    def spy(network, *args):
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        hooked.append({bool(norm._forward_hooks) for norm in norms})
        return real(network, *args)

    monkeypatch.setattr(networks, "trainer_of", spy)
    model = substitute(build("resnet20", width=4), ratio=0.5, init="random")
    table = tune(model, setting=replace(setting, timer=clock))
    norms = ["ordinary", "fused", "through_basis", "tuned"]
    options = {"model": "resnet20", "width": 4, "ratios": [0.5], "setting": setting}
    report = bench_training(**options, norms=norms, tables={0.5: table})
    assert [(row["mode"], row["norms"]) for row in report.rows] == [
        ("control", "fused"), ("dense", "ordinary"), *(("auto", one) for one in norms),
    ]  # fmt: skip
    assert hooked == [{False}, {False}, {True}, {True}, {False}, {False}, {False}]
    assert [row["coupled"] for row in report.rows] == [0, 0, 0, 0, 19, 19]  # tuned as the table says
    assert {row["norms"] for row in bench_training(**options).rows} == {"ordinary"}  # on a CPU, unless asked for


def test_a_tuned_network_is_tuned_on_the_way(setting, monkeypatch):
    asked = []

    def spy(network, **options):
        asked.append(options["setting"].seconds)
        return tune(network, setting=replace(options["setting"], timer=clock))

    monkeypatch.setattr("basis.bench.networks.tune", spy)
    report = bench_training(model="resnet20", width=4, ratios=[0.5], norms=["tuned"], setting=setting)
    assert report.rows[-1]["coupled"] == 19
    assert len(asked) == 1
    assert asked[0] < 1


def test_blocks_are_compared_with_pytorchs_normalisation(setting):
    report = bench_layers("block", shapes=["8@4"], ratios=[0.5], candidates=["auto", "ordinary"], setting=setting)
    assert [(row["mode"], row["resolved"]) for row in report.rows][-1] == ("ordinary", "dense")
    assert report.rows[-1]["parameters"] == report.rows[0]["parameters"]


def test_latencies_have_the_norm_and_keep_the_faster_way(captured, setting):
    model = build("resnet20", width=16)
    report = bench_latency(model, ratios=[0.5], setting=captured)
    auto = [row for row in report.rows if row["mode"] == "auto"]
    assert len(auto) == 2 * 19  # one k below C_out for each, and one row
    assert {row["resolved"] for row in auto if row["pass"] == "forward+backward"} == {"through_basis"}
    assert {row["resolved"] for row in auto if row["pass"] == "forward"} <= {"factorized", "composed"}
    layers = {row["layer"] for row in report.rows}
    assert report.config["layers_ms"] == pytest.approx(dict.fromkeys(("forward", "forward+backward"), len(layers)))
    assert report.config["network_ms"] == pytest.approx(dict.fromkeys(("forward", "forward+backward"), 10))
    assert report.config["norm"] is True
    plain = bench_latency(model, ratios=[0.5], passes=["forward+backward"], setting=replace(setting, timer=clock))
    assert "network_ms" not in plain.config
    assert "through_basis" not in {row["resolved"] for row in plain.rows}


@pytest.mark.weekly
def test_a_plan_is_trained_in_the_ways_that_its_latencies_found(captured):
    options = {"model": "resnet20", "width": 16, "ratios": (1 / 2,), "setting": captured}
    report = bench_budget(**options, shares=(0.6,), one="forward+backward")
    control, fused, tuned = report.rows
    assert (control["norms"], fused["norms"], tuned["norms"]) == ("fused", "fused", "tuned")
    assert (fused["coupled"], tuned["coupled"]) == (0, len(tuned["layers"]))
    assert tuned["coupled"] > 10


@pytest.mark.weekly
def test_inference_is_compared_with_the_folded_network_where_it_is_captured(captured):
    half = replace(captured, precision="bf16")
    report = bench_inference(model="resnet20", width=4, ratios=[0.5], setting=half)
    modes = ["control", "dense plain", "auto", "folded", "folded, pairs", "program"]
    assert [row["mode"] for row in report.rows] == modes
    assert not any("error" in row for row in report.rows)
    assert {row["batch_size"] for row in report.rows} == {2}
    sizes = {row["mode"]: row["parameters"] for row in report.rows}
    assert sizes["control"] == sizes["folded"] < sizes["dense plain"]  # it has no normalisation left


def test_folded_networks_hold_weights_in_the_precision(monkeypatch, captured):
    seen = set()
    forward = nn.Conv2d.forward

    def spy(self, x):
        if x.dtype == torch.bfloat16:
            seen.add(self.weight.dtype)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    bench_inference(model="resnet20", width=4, ratios=[], plans={0.5: {}}, setting=replace(captured, precision="bf16"))
    assert seen == {torch.bfloat16, torch.float32}  # the plain one by autocast
