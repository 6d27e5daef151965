"""The report's page: made from plain numbers, so that a page can be tried without a run."""

import copy
import re
from html.parser import HTMLParser

import pytest

from basis.compression.report import render
from basis.search.table import Cell, Layer, SensitivityTable

LOADING = re.compile(r"""(src|srcset|data|poster|action)\s*=|url\((?!#|&quot;)|@import|<link|<script|<iframe|<object""")


def interval(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.02, "n": 300}


def row(stage, images, accuracy):
    return {
        "stage": stage, "images": images, "accuracy": accuracy, "low": accuracy - 0.021, "high": accuracy + 0.019,
        "n": 1234, "loss": 0.4567, "seconds": 12.5,
    }  # fmt: skip


def times(ms, speedup):
    return {
        "ms": ms, "ms_q1": 0.97 * ms, "ms_q3": 1.04 * ms, "speedup": speedup, "speedup_q1": speedup - 0.02,
        "speedup_q3": speedup + 0.03, "n": 15, "dense_ms": 41.5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def report():
    pair = {"before": 36864, "after": 14336}
    return {
        "basis_report": 1,
        "network": {
            "name": "resnet18 <b>", "source": "resnet18 of torchvision", "weights": "w.pt", "sha256": "ab12",
            "notes": ["took 'module.' from every name"],
        },
        "data": {
            "source": "photos", "classes": 3, "class_names": ["ant", "bee", "<cat>"], "train": 9000,
            "calibration": 256, "held_out": 1000, "scored": 250, "test": 1234, "notes": [],
        },
        "images": {
            "size": 224, "crop": 0.875, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear", "source": "usual for ImageNet",
        },
        "asked": {"params": 0.5}, "budget": {"params": 0.5}, "replaced": 1, "convolutions": 3,
        "cost": {
            "params": {"before": 11173962, "after": 5432100, "ratio": 0.486},
            "macs": {"before": 1814073344, "after": 899000000, "ratio": 0.4956},
            "backward_macs": {"before": 3600000000, "after": 1700000000, "ratio": 0.472},
        },
        "unit": "change of the loss", "predicted": 0.0789,
        "layers": [{
            "name": "layer1.0.conv1", "out_channels": 64, "basis_channels": 16, "ratio": 0.25,
            "params": pair, "macs": pair, "sensitivity": interval(0.0345), "form": "a pair",
        }],
        "kept": [
            {"name": "stem", "reason": "kept dense", "basis_channels": 8, "sensitivity": interval(0.5)},
            {"name": "deep", "reason": "depthwise: one filter per group", "basis_channels": None, "sensitivity": None},
        ],
        "accuracy": [row("dense", "held out", 0.91), row("replaced", "held out", 0.87), row("dense", "test", 0.912),
                     row("compressed", "test", 0.908)],
        "accuracy_change": {"value": -0.004, "low": -0.009, "high": 0.001, "n": 1234},
        "latency": {
            "rows": {"as given": times(41.5, 1.0), "as given, again": times(41.4, 1.002), "folded": times(36.1, 1.15),
                     "exported": times(27.7, 1.49)},
            "batch_size": 64, "precision": "fp32", "memory_format": "contiguous", "device": "a CPU", "threads": 2,
        },
        "files": [
            {"name": "model.safetensors", "about": "the weights", "bytes": 21730000, "error": None},
            {"name": "model.onnx", "about": "for onnxruntime", "bytes": 21800000, "error": 2.3e-7},
            {"name": "model.pt2", "about": "of torch.export", "bytes": 21900000, "error": 0.0},
        ],
        "left_out": {}, "apart": 1.5e-6, "warnings": [], "loading": "import torch\nx = torch.zeros(1) < 2",
        "made": {
            "command": "basis compress resnet18", "seed": 7, "measure": "oneshot_bn", "epochs": 2, "distil": True,
            "device": "a CPU", "versions": {"torch": "2.13.0", "basis": "0.1.0"}, "date": "2026-01-01",
            "seconds": {"dense": 12.5, "sensitivity": 345.6},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def table():
    layers = [
        Layer(name=name, out_channels=64, groups=1, fan_in=576, bias=0, positions=1024, input_gradient=True,
              candidates=(32, 16))
        for name in ("layer1.0.conv1", "stem")
    ]  # fmt: skip
    cells = [Cell(layer=at.name, basis_channels=k, value=1 / k) for at in layers for k in at.candidates]
    return SensitivityTable(
        measure="oneshot", layers=tuple(layers), cells=tuple(cells), skipped={}, total={}, fingerprint={}, baseline={}
    )


@pytest.fixture(scope="module")
def page(report, table):
    return render(report, table)


class Page(HTMLParser):
    """What is on a page: the marked numbers, and the text outside of marks, code and pictures."""

    QUIET = ("data", "code", "pre", "svg", "style", "title")

    def __init__(self, page):
        super().__init__()
        self.numbers, self.text, self.within, self.ids, self.tags = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag in self.QUIET:
            self.within.append(tag)
        if tag == "data":
            self.numbers.append([dict(attributes)["value"], ""])

    def handle_endtag(self, tag):
        if tag in self.QUIET:
            assert self.within.pop() == tag

    def handle_data(self, data):
        if self.within and self.within[-1] == "data":
            self.numbers[-1][1] += data
        elif not self.within:
            self.text.append(data)


def numbers_in(value):
    if isinstance(value, dict):
        return {number for item in value.values() for number in numbers_in(item)}
    if isinstance(value, list):
        return {number for item in value for number in numbers_in(item)}
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def check_page(page, report):
    """Every number is one of the report's, says that number, and no other number stands anywhere."""
    seen = Page(page)
    assert len(seen.numbers) > 50
    for value, text in seen.numbers:
        assert float(value) in numbers_in(report)
        shown = re.fullmatch(r"([+-]?[\d.,]+(?:e[+-]\d+)?)\s?(%|[kMGT]|MB|kB|s|min|h)?", text)
        assert shown, text
        scale = {"%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "MB": 1e6, "kB": 1e3, "min": 60, "h": 3600}
        number = float(shown[1].replace(",", ""))
        factor = 0.01 if text[0] in "+-" and "e" not in text and shown[2] is None else scale.get(shown[2], 1)
        digits = len(shown[1].partition(".")[2])
        assert any(
            abs(number * f - float(value)) <= max(0.51 * f * 10**-digits, 0.006 * abs(float(value)))
            for f in (factor, 1)
        ), (value, text)
    without = " ".join(seen.text)
    words = [report["made"]["device"], report["latency"]["device"], report["latency"]["precision"], "95 %", "SHA-256"]
    words += [
        report["network"]["source"],
        *report["network"]["notes"],
        *report["made"]["versions"],
        *report["warnings"],
    ]
    for known in sorted((*words, *(file["about"] for file in report["files"])), key=len, reverse=True):
        without = without.replace(str(known), "")
    assert not re.search(r"\d", without), re.findall(r".{0,30}\d.{0,10}", without)
    return seen


def test_every_number_is_one_of_the_report(page, report):
    check_page(page, report)


def test_the_page_loads_nothing_and_runs_nothing(page):
    for found in LOADING.finditer(page):
        pytest.fail(f"loads something: {page[found.start() - 40 : found.end() + 40]}")
    links = set(re.findall(r'(?:href|xlink:href)="([^"#][^"]{0,30})', page))
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"\bon\w+=", page)


def test_names_and_sentences_of_others_are_only_text(page):
    assert "resnet18 &lt;b&gt;" in page
    assert "resnet18 <b>" not in page
    assert "&lt;cat&gt;" in page
    assert "zeros(1) &lt; 2" in page


def test_the_page_is_for_light_and_dark_paper_and_phones(page):
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert "@media print" in page
    assert '<meta name="viewport"' in page
    pictures = [attributes for tag, attributes in Page(page).tags if tag == "svg"]
    assert [one["class"] for one in pictures] == ["light", "dark"] * 2
    assert all(len(one["aria-label"]) > 40 for one in pictures)


def test_identifiers_are_each_used_once(page):
    ids = Page(page).ids
    assert len(ids) == len(set(ids)) > 0


def test_what_is_missing_and_what_is_wrong_is_said(report, table):
    other = copy.deepcopy(report) | {"layers": [], "replaced": 0}
    other["left_out"] = {"ONNX": "onnx is not installed (pip install onnx)"}
    other["warnings"] = ["the network is slower here than it was"]
    page = render(other, table)
    assert "Left out: ONNX, since onnx is not installed (pip install onnx)." in page
    assert "the network is slower here than it was" in page
    assert "the budget is met by the network as it is" in page


def test_everything_replaced(report, table):
    assert "Every convolution was replaced." in render(copy.deepcopy(report) | {"kept": []}, table)
