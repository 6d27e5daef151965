"""The report's page, from plain numbers, without a run."""

import re

import pytest

from basis.compression.report import render
from basis.search.table import Cell, Layer, SensitivityTable

KEPT = {"deep": "depthwise: one filter per group"}


def row(stage, images, value):
    return {"stage": stage, "images": images, "value": value, "low": value - 0.02, "high": value + 0.02, "n": 1234}


def times(ms, speedup):
    return {"ms": ms, "dense_ms": 41.5, "speedup": speedup, "speedup_q1": 0.97, "speedup_q3": 1.04, "n": 15}


@pytest.fixture
def report():
    about = dict.fromkeys(("torch", "python", "basis", "commit", "date"), "x") | {"device": "a CPU", "threads": 2}
    last = [row("dense", "test", 0.9123), row("compressed", "test", 0.9081)]
    files = {"model.onnx": {"batch": "dynamic", "error": 2.3e-7}, "model.pt2": {"failed": "no operator"}}
    latency = {"rows": {"exported": times(27.7, 1.49)}, "pairs": ["conv1"], "batch_size": 64, "environment": about}
    stages = {
        "measure_sensitivity": {"measure": "oneshot", "unit": "change of the loss"},
        "replace_layers": {"accuracy": [row("replaced", "held-out", 0.87)], "layers": {"conv1": 16}, "kept": KEPT},
        "evaluate_last": {"accuracy": last, "change": {"value": -0.004, "low": -0.009, "high": 0.001}},
        "measure_latency": latency,
        "export": {"files": files},
    }
    cell = {"layer": "conv1", "out_channels": 64, "basis_channels": 16, "value": 0.0345, "low": 0.03, "high": 0.04}
    settings = {"model": "resnet18 <b>", "budget": {"params": 0.5}, "mean": None, "std": None, "classes": None}
    return {
        "command": "basis compress resnet18", "settings": settings,
        "identity": {"weights": "ab12", "data": "cd34", "preparation": {"resize": 256}},
        "cost": {"params": [11173962, 5432100], "macs": [1814073344, 899000000], "backward_macs": [0, 0]},
        "images": {"train": 9000, "scored": 250}, "input_size": [3, 224, 224], "folder": "/out",
        "cells": [cell, cell | {"layer": "stem"}],
        "stages": {name: one | {"seconds": 1.5} for name, one in stages.items()},
        "classes": ["ant", "<cat>"], "prepared": "resized to 256",
    }  # fmt: skip


@pytest.fixture
def table():
    layer = Layer(name="conv1", out_channels=64, groups=1, fan_in=576, bias=0, positions=1024, input_gradient=True,
                  candidates=(32, 16))  # fmt: skip
    cells = tuple(Cell(layer="conv1", basis_channels=k, value=1 / k) for k in layer.candidates)
    return SensitivityTable(measure="oneshot", layers=(layer,), cells=cells, skipped=KEPT, total={}, fingerprint={}, baseline={})  # fmt: skip  # noqa: E501


def test_the_page_says_what_was_done_and_what_it_cost(report, table):
    page = render(report, table)
    text = re.sub(r"\s+", " ", re.sub(r"<(svg|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))
    for said in (
        "1 of 2 convolutions", "50.00 % of params", "48.61 % of its parameters", "11.2 M", "5.43 M",
        "from 91.23 % to 90.81 %", "-0.40 points", "[-0.90, +0.10]", "64 images take 27.7 ms where they took 41.5 ms",
        "conv1 64 16 0.0345 [0.03, 0.04] a pair", "depthwise: one filter per group", "model.onnx any number 2.3e-07",
        "Left out: model.pt2, since no operator.", "basis compress resnet18", "cd34",
        "resized to 256", "resize",
    ):  # fmt: skip
        assert said in text, said
    assert "stem" not in text
    assert "Warning" not in text


def test_the_page_loads_nothing_and_escapes_what_others_named(report, table):
    page = render(report, table)
    assert "resnet18 &lt;b&gt;" in page
    assert "<b>" not in page
    assert "&lt;cat&gt;" in page
    assert not re.search(r"(\bsrc|srcset|poster|action|\bon\w+)\s*=|url\((?!#)|@import|<link|<script|<iframe", page)
    links = re.findall(r'(?:href|xlink:href)="([^"#][^"]{0,30})', page)
    assert all(link.startswith("data:image/png;base64,") for link in links)


def test_the_figure_has_a_label_and_identifiers_of_its_own(report, table):
    page = render(report, table)
    assert len(re.findall(r'<svg role="img" aria-label="\w', page)) == page.count("<svg") == 1
    assert "@media screen and (prefers-color-scheme: dark)" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_warnings_are_shown(report, table):
    report["stages"]["measure_latency"]["warning"] = "the network is slower"
    assert "Warning: the network is slower" in render(report, table)
