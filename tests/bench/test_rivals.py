import importlib.util
import warnings

import basis.bench.rivals as rivals
import pytest
import torch
from torch import nn

from basis.bench.cases import RESNET18_SHAPES, Setting, Shape
from basis.bench.rivals import CANDIDATES, RIVALS, bench_rivals, svd_pair, tucker_conv
from basis.decompositions import tucker_ranks
from basis.layers.conv import BasisConv2d

needs_tltorch = pytest.mark.skipif(importlib.util.find_spec("tensorly") is None, reason="needs tensorly-torch")
EAGER = [name for name in CANDIDATES if "compiled" not in name]


@pytest.fixture
def setting():
    def timer(step):
        step()
        return 0.002

    return Setting(
        device="cpu", precision="fp32", memory_format="channels_last", batch_size=2, rounds=3, timer=timer
    )  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


@needs_tltorch
@pytest.mark.parametrize("name", ["svd", "tucker", "tucker reconstructed"])
@pytest.mark.parametrize("ratio", [1 / 8, 1 / 4, 1 / 2, 3 / 4])
@pytest.mark.parametrize("text", RESNET18_SHAPES)
def test_rivals_have_as_many_parameters_as_the_basis_layer(text, ratio, name):
    with torch.device("meta"):
        conv = Shape.parse(text).conv()
        basis = count(BasisConv2d.shaped_like(conv, ratio=ratio))
        rival = count(RIVALS[name](conv, basis))
    assert 0.88 * basis < rival <= 1.01 * basis  # one rank is up to 13 % of the narrowest layer


@needs_tltorch
@pytest.mark.parametrize("text", ["16@6", "16-32@6/2", "32-16@7"])
def test_no_larger_rank_would_fit(text):
    conv = Shape.parse(text).conv()
    wanted = 1500
    out, into = tucker_ranks(conv, wanted)
    assert count(tucker_conv(conv, wanted)) <= 1.01 * wanted
    larger = [tucker_ranks(conv, n)[0:2] for n in range(wanted, 2 * wanted)]
    following = next(pair for pair in larger if pair != (out, into))
    assert sum(following) == out + into + 1
    q = svd_pair(conv, wanted)[0].out_channels
    assert count(svd_pair(conv, wanted)) <= 1.01 * wanted < (q + 1) * (9 * conv.in_channels + conv.out_channels)


def test_ranks_stop_at_the_channels():
    assert tucker_ranks(nn.Conv2d(4, 8, 3), 10**9) == (8, 4)


def test_too_few_parameters_are_refused():
    conv = nn.Conv2d(4, 8, 3)
    with pytest.raises(ValueError, match="a pair of convolutions has at least 44 parameters, which is above 40"):
        svd_pair(conv, 40)
    with pytest.raises(ValueError, match="a Tucker convolution has at least 39 parameters, which is above 30"):
        tucker_ranks(conv, 30)


@needs_tltorch
@pytest.mark.parametrize("name", ["svd", "tucker", "tucker reconstructed"])
def test_rivals_are_convolutions_of_the_same_shape_that_train(name):
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
    x = torch.randn(32, 8, 7, 7)
    torch.manual_seed(0)
    rival = RIVALS[name](conv, 800)
    y = rival(x)
    assert y.shape == conv(x).shape
    assert 0.05 < y.std() < 2  # no layer of vanishing or exploding maps, which have other speeds
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rival.parameters())


@needs_tltorch
def test_both_tucker_implementations_are_the_same_convolution():
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    a, b = (tucker_conv(conv, 800, implementation=how) for how in ("factorized", "reconstructed"))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(a(x), b(x))


@needs_tltorch
def test_tensorly_is_quiet(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tucker_conv(nn.Conv2d(8, 16, 3), 800)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@needs_tltorch
def test_a_cell_has_every_candidate_with_its_count_and_ratios(setting):
    told = []
    report = bench_rivals(
        shapes=["16@6"], ratios=[0.5], candidates=EAGER, setting=setting, progress=told.append
    )  # fmt: skip
    frame = report.to_frame()
    assert len(told) == len(frame) == 2 * (1 + len(EAGER))
    for _, cell in frame.groupby("pass"):
        assert list(cell["mode"]) == ["control", "basis", "svd", "tucker", "tucker reconstructed"]
        assert cell["parameters"].iloc[0] == 9 * 16 * 16
        assert (cell["parameters"].iloc[2:] <= 1.01 * cell["parameters"].iloc[1]).all()
        assert cell["versus_basis"].isna().tolist() == [True, True, False, False, False]
    assert {"versus_basis_q1", "versus_basis_q3", "peak_mib", "dense_peak_mib", "speedup_q1"} <= set(frame)
    assert report.config["left_out"] == {}
    assert report.config["tltorch"]
    assert report.faster_than_basis() == []


def test_the_faster_rivals_are_named(setting):
    seconds = {"Conv2d": 0.004, "BasisConv2d": 0.002, "Sequential": 0.001}

    def timer(step):
        step()
        return seconds[type(step.args[0]).__name__]

    options = {"shapes": ["16@6"], "ratios": [0.5], "passes": ["forward"], "candidates": ["basis", "svd"]}
    report = bench_rivals(**options, setting=Setting(**{**vars(setting), "timer": timer}))
    assert [row["speedup"] for row in report.rows] == pytest.approx([1, 2, 4])
    assert report.rows[2]["versus_basis"] == pytest.approx(2)
    assert report.faster_than_basis() == [report.rows[2]]


def test_every_candidate_has_the_memory_format_of_the_setting(monkeypatch, setting):
    seen = []
    forward = nn.Conv2d.forward

    def spy(self, x):
        last = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.weight)]
        seen.append((*last, self.kernel_size))
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", spy)
    bench_rivals(shapes=["16@6"], ratios=[0.5], passes=["forward"], candidates=["svd"], setting=setting)
    assert set(seen) == {(True, True, (3, 3)), (True, True, (1, 1))}


def test_what_is_not_installed_is_left_out_and_named(monkeypatch, setting):
    monkeypatch.setattr(rivals.util, "find_spec", lambda name: None)
    options = {"shapes": ["16@6"], "ratios": [0.5], "passes": ["forward"], "setting": setting}
    report = bench_rivals(**options, candidates=["basis", "tucker"])
    assert [row["mode"] for row in report.rows] == ["control", "basis"]
    assert report.config["left_out"] == {"tucker": "tensorly-torch is not installed"}
    assert report.config["tltorch"] is None


@pytest.mark.parametrize("where", ["made", "run"])
def test_a_candidate_that_fails_is_a_row_with_an_error(monkeypatch, where, setting):
    class Broken(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("no such kernel")

    def make(conv, parameters):
        if where == "made":
            raise TypeError("no such layer")
        return Broken(conv.in_channels, 1, 3)

    monkeypatch.setattr(rivals, "RIVALS", {**RIVALS, "svd": make})
    told = []
    report = bench_rivals(
        shapes=["16@6"], ratios=[0.5], passes=["forward"], candidates=["basis", "svd"], setting=setting,
        progress=told.append,
    )  # fmt: skip
    expected = "TypeError: no such layer" if where == "made" else "RuntimeError: no such kernel"
    assert report.rows[-1]["error"] == expected
    assert "ms" not in report.rows[-1]
    assert "failed" in told[-1]
    assert f"svd failed: {expected}" in str(report)
    assert report.rows[1]["speedup"] == 1


def test_compiled_candidates_are_compiled_whole_and_keep_channels_last(monkeypatch, setting):
    seen = []

    def compile_(layer, **options):
        seen.append((type(layer).__name__, options))
        return layer

    monkeypatch.setattr(torch, "compile", compile_)
    candidates = ["basis", "dense compiled", "basis compiled", "svd"]
    report = bench_rivals(shapes=["16@6"], ratios=[0.5], passes=["forward"], candidates=candidates, setting=setting)
    options = {"fullgraph": True, "dynamic": False, "options": {"force_layout_optimization": True}}
    assert seen == [("Conv2d", options), ("BasisConv2d", options)]
    assert [row["mode"] for row in report.rows] == ["control", *candidates]


def test_compiled_is_compared_with_compiled():
    names = dict.fromkeys(["dense", "control", "basis", "basis compiled", "dense compiled", "svd"])
    assert rivals._versus(names) == {"dense compiled": "basis compiled", "svd": "basis"}
    assert rivals._versus(dict.fromkeys(["basis", "dense compiled"])) == {"dense compiled": "basis"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"candidates": ["cp"]}, "candidate is 'cp', but must be one of basis, basis compiled, dense compiled"),
        ({"shapes": ["64"]}, "shape is '64'"),
        ({"ratios": [2]}, "ratio is 2"),
        ({"passes": ["back"]}, "pass is 'back'"),
    ],
)
def test_bad_options_are_refused(options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_rivals(**options, setting=setting)
