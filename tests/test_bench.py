import json

import pytest
import torch
from torch import nn

from basis import substitute
from basis.bench import (
    TRAINED,
    BenchReport,
    Setting,
    Shape,
    _training_step,
    bench_latency,
    bench_layers,
    bench_training,
    compare,
    interleave,
)
from basis.cli import main
from basis.conv import BasisConv2d, resolve_mode
from basis.models import build
from basis.runs import RecordError
from basis.skipping import Parts
from basis.studies.cost import load_benches

# Nothing here looks at real times, which would make the tests fail on a busy machine.


class Clock:
    """Runs each step and reports a time of its choosing, by the class and mode of what was run."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, step):
        step()
        self.calls += 1
        return self.seconds(self.calls)


@pytest.fixture
def setting():
    return Setting(
        device="cpu", precision="fp32", memory_format="contiguous", batch_size=2, rounds=3, timer=Clock(lambda _: 0.002)
    )


@pytest.fixture
def report(setting):
    return bench_layers(shapes=["8@4", "4-8@5/2"], ratios=[0.25, 0.5], setting=setting)


def test_every_round_runs_each_step_once_in_changing_order():
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in "abcd"}
    times = interleave(steps, timer=Clock(lambda call: call), rounds=20)
    rounds = [tuple(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    assert len(rounds) == 2 + 20
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds[2:])) > 5
    # Each time landed with the step that took it: call numbers 1..80, in the order of the rounds.
    order = [name for one in rounds[2:] for name in one]
    assert {n: [i + 1 for i, o in enumerate(order) if o == n] for n in "abcd"} == times


def test_the_same_seed_gives_the_same_order():
    orders = []
    for seed in (0, 0, 1):
        ran = []
        interleave({n: lambda n=n, r=ran: r.append(n) for n in "abc"}, timer=Clock(lambda _: 1), rounds=9, seed=seed)
        orders.append(ran)
    assert orders[0] == orders[1] != orders[2]


def test_a_spent_budget_stops_after_three_rounds():
    times = interleave({"a": lambda: None}, timer=Clock(lambda _: 1), rounds=1000, seconds=0)
    assert len(times["a"]) == 3


def test_speedup_is_the_median_of_ratios_within_rounds():
    # A machine that slows down tenfold half-way: medians taken apart would not see the factor 2.
    dense, candidate = [0.002, 0.002, 0.02, 0.02, 0.02], [0.001, 0.001, 0.001, 0.01, 0.01]
    row = compare(candidate, dense)
    assert row["speedup"] == pytest.approx(2)
    assert (row["speedup_q1"], row["speedup_q3"]) == pytest.approx((2, 2))
    assert (row["ms"], row["dense_ms"], row["n"]) == pytest.approx((1, 20, 5))


def test_rows_cover_all_cells_and_each_has_a_control(report):
    frame = report.to_frame()
    assert len(frame) == 2 * 2 * 2 * 5
    cells = frame.groupby(["shape", "pass", "ratio"])["mode"].agg(set)
    assert len(cells) == 8
    assert all(modes == {"control", "factorized", "composed", "hybrid", "auto"} for modes in cells)
    assert set(frame["shape"]) == {"8@4", "4-8@5/2"}
    assert (frame["speedup"] == 1).all()
    assert (frame["n"] == 3).all()
    assert frame["peak_mib"].isna().all()
    assert report.failed_controls() == []
    assert set(frame[frame["mode"] == "auto"]["resolved"]) <= {"factorized", "composed"}


def test_a_control_that_is_off_is_reported(setting):
    report = bench_layers(shapes=["4@4"], ratios=[0.5], modes=[], passes=["forward"], setting=setting)
    assert "1 is within the quartiles in 1 of 1 cells" in str(report)
    off = BenchReport(**{**vars(report), "rows": [{**report.rows[0], "speedup_q1": 1.1, "speedup_q3": 1.2}]})
    assert off.failed_controls() == list(off.rows)
    assert "1 is within the quartiles in 0 of 1 cells" in str(off)


def test_passes_run_what_they_say(monkeypatch, setting):
    seen = []
    forward = BasisConv2d.forward
    monkeypatch.setattr(
        BasisConv2d, "forward", lambda self, x: seen.append((torch.is_grad_enabled(), x)) or forward(self, x)
    )
    for one, gradients in (("forward", False), ("forward+backward", True)):
        seen.clear()
        bench_layers(shapes=["4-8@6/2"], ratios=[0.5], modes=["composed"], passes=[one], setting=setting)
        assert {enabled for enabled, _ in seen} == {gradients}
        assert all((x.grad is not None) == gradients for _, x in seen)
        assert {tuple(x.shape) for _, x in seen} == {(2, 4, 6, 6)}


@pytest.mark.parametrize(("memory_format", "last"), [("contiguous", False), ("channels_last", True)])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_both_sides_have_the_same_layout_and_precision(monkeypatch, memory_format, last, precision, dtype):
    seen = []
    for kind in (nn.Conv2d, BasisConv2d):
        forward = kind.forward

        def spy(self, x, forward=forward):
            y = forward(self, x)
            weight = self.basis if isinstance(self, BasisConv2d) else self.weight
            is_last = [t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight, y)]
            seen.append((type(self).__name__, x.dtype, y.dtype, weight.dtype, *is_last))
            return y

        monkeypatch.setattr(kind, "forward", spy)
    bench_layers(
        shapes=["8@4"], ratios=[0.5], modes=["factorized", "composed"], passes=["forward+backward"],
        setting=Setting(device="cpu", precision=precision, memory_format=memory_format, batch_size=2, rounds=3),
    )  # fmt: skip
    expected = (dtype, dtype, torch.float32, last, last, last)
    assert set(seen) == {("Conv2d", *expected), ("BasisConv2d", *expected)}


def test_mac_ratios_are_those_of_the_formulas():
    shape = Shape.parse("64-128@33/2")  # 17 x 17 pixels come out
    k, f, c, pixels = 32, 576, 128, 4 * 17 * 17
    assert shape.macs(k, "dense", 4, "forward") == pixels * c * f
    assert shape.macs(k, "factorized", 4, "forward") == pixels * k * (f + c)
    assert shape.macs(k, "composed", 4, "forward") == pixels * c * f + (c - k) * k * f
    assert shape.macs(k, "factorized", 4, "forward+backward") == 3 * pixels * k * (f + c)
    hybrid = pixels * c * f + (c - k) * k * f + 2 * pixels * k * (f + c)
    assert shape.macs(k, "hybrid", 4, "forward+backward") == hybrid


@pytest.mark.parametrize("text", ["64@32", "64-128@32/2", "128-64@7"])
def test_shapes_read_back_as_written(text):
    assert str(Shape.parse(text)) == text


def test_training_measures_whole_steps(setting):
    told = []
    report = bench_training(model="resnet20", width=4, ratios=[0.5], setting=setting, progress=told.append)
    assert [row["mode"] for row in report.rows] == ["control", "auto"]
    control, auto = report.rows
    assert control["parameter_ratio"] == 1 < auto["parameter_ratio"]
    assert auto["images_per_second"] == pytest.approx(2 / 0.002)
    assert report.config["model"] == "resnet20"
    assert len(told) == 2
    assert "resnet20" in told[0]
    assert "resnet20" in str(report)


def test_training_measures_forms_and_parts_together(setting):
    report = bench_training(
        model="resnet20", width=8, ratios=[0.5], modes=["factorized"], coefficients=["dense", "repeat"],
        trained=["both", "coefficients"], setting=setting,
    )  # fmt: skip
    candidates = [(row["coefficients"], row["trained"]) for row in report.rows]
    assert candidates == [
        ("", "both"), ("dense", "both"), ("dense", "coefficients"), ("repeat", "both"), ("repeat", "coefficients"),
    ]  # fmt: skip
    sizes = [row["parameters"] for row in report.rows]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] == sizes[4]
    assert "coefficients" in str(report)


def test_what_a_step_does_not_train_stays_as_it_is():
    torch.manual_seed(0)
    network = substitute(build("resnet20", width=4), ratio=0.5, init="random", mode="factorized")
    Parts(network).train(TRAINED["coefficients"])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    setting = Setting(device="cpu", precision="fp32").settled(network)
    _training_step(network, torch.randn(4, 3, 32, 32), torch.randint(10, (4,)), setting)()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.endswith(".basis") for name in moved)
    assert sum(".coefficients." in name for name in moved) == sum(".coefficients." in name for name in before)


def test_a_form_that_fits_not_every_layer_is_refused_before_anything_is_measured(setting):
    told = []
    with pytest.raises(ValueError, match=r"conv1: .* A is 3 x 1, and no rank is above 1"):
        bench_training(
            model="resnet20", width=4, ratios=[0.5, 0.25], coefficients=["low_rank:2"], setting=setting,
            progress=told.append,
        )  # fmt: skip
    assert told == []


def test_an_unknown_part_or_form_is_refused(setting):
    with pytest.raises(ValueError, match="trained is 'all', but must be one of both, basis, coefficients, neither"):
        bench_training(model="resnet20", width=4, trained=["all"], setting=setting)
    with pytest.raises(ValueError, match="'thin'"):
        bench_training(model="resnet20", width=4, ratios=[0.5], coefficients=["thin"], setting=setting)


class Odd(nn.Module):
    """Layers that differ in all that a time depends on, two that do not, and some that cannot be substituted."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect", bias=False)
        self.b = nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect", bias=False)
        self.point = nn.Conv2d(16, 32, 1)
        self.grouped = nn.Conv2d(32, 32, (3, 1), dilation=(2, 1), groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.spare = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.b(self.a(self.stem(x)))
        return self.depthwise(self.grouped(self.point(self.a(x))))


@pytest.fixture
def latency(setting):
    return bench_latency(nn.Sequential(Odd()), input_size=(3, 20, 16), ratios=[0.25, 0.5], setting=setting)


def test_latency_measures_each_layer_where_it_stands(monkeypatch, setting):
    seen = []
    for kind in (nn.Conv2d, BasisConv2d):
        forward = kind.forward

        def spy(self, x, forward=forward):
            k = getattr(self, "basis_channels", None)
            seen.append((self.out_channels, k, tuple(x.shape), torch.is_grad_enabled(), x.requires_grad))
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", spy)
    report = bench_latency(Odd(), input_size=(3, 20, 16), ratios=[0.5], setting=setting)
    timed = {one for one in seen if one[2][0] == 2 and one[1] is not None}
    assert timed == {
        (16, 8, (2, 3, 20, 16), False, False), (16, 8, (2, 3, 20, 16), True, False),  # no gradient of the images
        (16, 8, (2, 16, 10, 8), False, False), (16, 8, (2, 16, 10, 8), True, True),
        (32, 16, (2, 16, 10, 8), False, False), (32, 16, (2, 16, 10, 8), True, True),
        (32, 16, (2, 32, 10, 8), False, False), (32, 16, (2, 32, 10, 8), True, True),
    }  # fmt: skip
    shapes = {row["layer"]: row["shape"] for row in report.rows}
    assert shapes == {
        "stem": "3-16@20x16 3x3/2",
        "a": "16-16@10x8+10x8 3x3",  # called twice
        "b": "16-16@10x8 3x3",
        "point": "16-32@10x8 1x1",
        "grouped": "32-32@10x8 3x1 dilation 2x1 groups 4",
    }


def test_latency_rows_cover_all_layers_candidates_and_passes(latency):
    frame = latency.to_frame()
    assert set(frame["layer"]) == {f"0.{name}" for name in ("stem", "a", "b", "point", "grouped")}
    ks = frame.groupby(["layer", "pass"])["basis_channels"].agg(list).to_dict()
    # k is a multiple of 8 (and of the groups) below C_out; the control is the dense layer.
    narrow, wide = [16, 8], [32, 8, 16]
    expected = {"0.stem": narrow, "0.a": narrow, "0.b": narrow, "0.point": wide, "0.grouped": wide}
    assert ks == {(name, one): own for name, own in expected.items() for one in ("forward", "forward+backward")}
    assert list(frame[frame["mode"] == "control"]["ratio"].unique()) == [1.0]
    assert (frame["ratio"] == frame["basis_channels"] / frame["shape"].str.extract(r"-(\d+)@")[0].astype(int)).all()
    assert (frame["n"] == 3).all()
    assert {"ms", "dense_ms", "speedup", "speedup_q1", "speedup_q3", "resolved"} <= set(frame)
    assert "1 is within the quartiles in 10 of 10 cells" in str(latency)
    assert "0.grouped" in str(latency)
    assert latency.config["model"] == "Sequential"
    assert latency.latencies("forward")["0.point"] == {k: pytest.approx(2) for k in wide}


def test_equal_shapes_are_measured_once(setting):
    told = []
    setting.timer.seconds = lambda call: call  # no two times are equal
    report = bench_latency(
        nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))), input_size=(8, 6, 6),
        ratios=[0.5], multiple=1, passes=["forward+backward"], setting=setting, progress=told.append,
    )  # fmt: skip
    assert setting.timer.calls == 2 * 3 * 3  # the first layer has no gradient of its input, so it stands alone
    assert len(told) == 2 * 2
    same = {row["layer"]: row["same_as"] for row in report.rows}
    assert same == {"0": None, "1": None, "2": "1", "3": "1"}
    assert len(report.controls()) == 2
    times = report.latencies("forward+backward")
    assert times["1"] == times["2"] == times["3"] != times["0"]


def test_a_layer_too_narrow_for_the_multiple_is_only_timed_dense(setting):
    report = bench_latency(nn.Conv2d(3, 8, 3), input_size=(3, 6, 6), passes=["forward"], setting=setting)
    assert report.latencies("forward") == {"": {8: pytest.approx(2)}}


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (nn.Conv2d(3, 3, 3, groups=3), {}, "no convolution that can be substituted"),
        (nn.Conv2d(3, 8, 3), {"input_size": (4, 8, 8)}, "the model cannot be run on an input of"),
        (nn.Conv2d(3, 8, 3), {"ratios": [2]}, "ratio is 2"),
        (nn.Conv2d(3, 8, 3), {"passes": ["back"]}, "pass is 'back'"),
        (nn.Conv2d(3, 8, 3), {"multiple": 0}, "multiple is 0"),
    ],
)
def test_latency_refuses_what_makes_no_sense(model, options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_latency(model, **{"input_size": (3, 8, 8), **options}, setting=setting)
    assert setting.timer.calls == 0


def test_only_a_latency_report_has_latencies(report, latency):
    with pytest.raises(ValueError, match="kind 'bench-layer', but it must be one of `basis bench latency`"):
        report.latencies("forward")
    with pytest.raises(ValueError, match=r"step is 'backward', but the latency report has only forward, forward\+b"):
        latency.latencies("backward")


def test_the_command_stores_latencies_beside_the_other_benchmarks(tmp_path, monkeypatch, capsys, report):
    monkeypatch.setattr("basis.cli.results_folder", lambda: tmp_path)
    report.save(tmp_path / "bench" / "layer.json")
    options = "--model resnet20 --width 4 --ratios 0.5 --multiple 2 --passes forward --rounds 3 --batch-size 2"
    where = "--device cpu --precision fp32 --memory-format contiguous --input-size 3 8 8"
    assert main(["bench", "latency", *options.split(), *where.split()]) == 0
    path = tmp_path / "bench" / "latency-resnet20-w4-3x8x8-cpu-fp32-contiguous.json"
    assert f"saved in {path}" in capsys.readouterr().out
    stored = BenchReport.load(path)
    assert stored.config["model"] == "resnet20-w4"
    assert len(stored.latencies("forward")) == 19
    assert load_benches("cpu", folder=tmp_path) == [report]
    assert load_benches("cpu", kind="bench-latency", folder=tmp_path) == [stored]


def test_a_report_survives_its_file(report, tmp_path):
    path = tmp_path / "bench" / "layer.json"
    report.save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["kind"] == "bench-layer"
    assert content["config"]["batch_size"] == 2
    assert content["environment"]["torch"] == torch.__version__
    assert {"device", "threads", "cpu_capability", "python", "date", "commit"} <= set(content["environment"])
    assert BenchReport.load(path) == report


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not a JSON"), ('{"version": 2}', "version 2"), ('{"version": 1}', "lacks"), ("[]", "None")],
)
def test_bad_files_are_refused(tmp_path, text, says):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=says):
        BenchReport.load(path)


def test_the_global_random_state_is_left_alone(setting):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    bench_layers(shapes=["4@4"], ratios=[0.5], modes=["auto"], setting=setting)
    bench_training(model="resnet20", width=4, ratios=[0.5], setting=setting)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "meta"}, "device is meta"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"memory_format": "nhwc"}, "memory_format is 'nhwc'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rounds": 2}, "rounds is 2"),
    ],
)
def test_bad_settings_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Setting(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shapes": ["64"]}, "shape is '64'"),
        ({"shapes": ["0@8"]}, "shape is '0@8'"),
        ({"ratios": [0.0]}, "ratio is 0.0"),
        ({"ratios": [1.5]}, "ratio is 1.5"),
        ({"modes": ["fast"]}, "mode is 'fast'"),
        ({"passes": ["backward"]}, "pass is 'backward'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_layers(**options, setting=setting)
    assert setting.timer.calls == 0


def test_an_unknown_model_is_refused(setting):
    with pytest.raises(ValueError, match="model is 'resnet19'"):
        bench_training(model="resnet19", setting=setting)


@pytest.mark.parametrize(
    ("fan_in", "width", "ratio", "cpu", "cuda"),
    [
        (9 * 64, 64, 1 / 2, "factorized", "composed"),  # 64 channels: a GPU is bound by memory there
        (9 * 64, 64, 3 / 4, "composed", "composed"),
        (9 * 128, 128, 1 / 2, "factorized", "factorized"),
        (9 * 128, 128, 3 / 4, "factorized", "composed"),
        (9 * 512, 512, 3 / 4, "factorized", "composed"),
        (9 * 128, 128, 65 / 128, "factorized", "composed"),  # 65 costs a GPU as much as 72
        (9 * 3, 64, 1 / 4, "composed", "composed"),  # a stem has little to save
        (256, 1024, 1 / 4, "composed", "composed"),  # a 1x1 convolution neither
        (9 * 16, 16, 1 / 8, "composed", "composed"),
        (9 * 32, 32, 1 / 2, "factorized", "composed"),
        (9 * 512, 512, 1.0, "composed", "composed"),
    ],
)
def test_auto_follows_its_rule(fan_in, width, ratio, cpu, cuda):
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        shape = {"fan_in": fan_in, "out_channels": width, "basis_channels": round(width * ratio)}
        assert resolve_mode("auto", device=torch.device(device), **shape) == expected
