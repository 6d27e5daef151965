import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from basis.bench.cases import Block, bench_layers
from basis.bench.networks import bench_training
from basis.bench.report import BenchReport
from basis.bench.shapes import Shape
from basis.bench.timing import MOST_SETS, Setting, compare, interleave, peak_bytes
from basis.bench.tuning import bench_latency
from basis.cli import main
from basis.commands.bench import BENCHES, file_stem
from basis.experiments.sweep import Measurement, bench_gpu, file_name
from basis.layers.conv import BasisConv2d
from basis.saving import RecordError
from basis.training.stepping import Means
from tests.bench.conftest import Clock

ROOT = Path(__file__).resolve().parents[2]


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


def test_speedup_is_the_median_of_ratios_within_rounds():
    # A machine that slows down tenfold half-way: medians taken apart would not see the factor 2.
    dense, candidate = [0.002, 0.002, 0.02, 0.02, 0.02], [0.001, 0.001, 0.001, 0.01, 0.01]
    row = compare(candidate, dense)
    assert row["speedup"] == pytest.approx(2)
    assert (row["speedup_q1"], row["speedup_q3"]) == pytest.approx((2, 2))
    assert (row["ms"], row["dense_ms"], row["n"]) == pytest.approx((1, 20, 5))


def test_peak_memory_counts_what_is_alive_at_once_and_nothing_else():
    mib, kept = 2**20, []

    def step():
        first = torch.empty(3 * mib, dtype=torch.uint8)
        second = torch.empty(2 * mib, dtype=torch.uint8)
        del first
        third = torch.empty(4 * mib, dtype=torch.uint8)  # 6 MiB with the second
        del second, third
        torch.empty(5 * mib, dtype=torch.uint8)

    resident = torch.empty(64 * mib, dtype=torch.uint8)
    assert [peak_bytes(step, torch.device("cpu")) for _ in range(3)] == [6 * mib] * 3
    assert peak_bytes(lambda: None, torch.device("cpu")) == 0
    assert peak_bytes(lambda: kept.append(resident.clone()), torch.device("cpu")) == 64 * mib


def test_peak_memory_of_a_backward_pass_holds_what_it_saves_and_the_gradients():
    n = 2**18  # floats: 1 MiB
    weight, x = torch.ones(n, requires_grad=True), torch.ones(n)

    def step():
        (x * weight).exp().sum().backward()  # alive together: exp's output, its gradient, that of x * weight
        weight.grad = None

    assert 2 * 4 * n <= peak_bytes(step, torch.device("cpu")) <= 4 * 4 * n + 1024


def test_a_step_that_may_fail_becomes_an_error(setting):
    def fails():
        raise RuntimeError("no such kernel\n\nand a long story")

    steps = {"dense": lambda: None, "a": lambda: None, "b": fails, "c": lambda: None}
    found = setting.measure(steps, may_fail=["b"], reference={"c": "b"}, versus={"a": "dense"})
    assert found["b"] == {"error": "RuntimeError: no such kernel"}
    assert found["c"] == {"error": "b, which it is compared with, failed"}
    assert found["a"]["speedup"] == found["a"]["versus_basis"] == 1
    with pytest.raises(RuntimeError, match="no such kernel"):
        setting.measure(steps)


def test_rows_cover_all_cells_and_each_has_a_control(report):
    frame = report.to_frame()
    assert len(frame) == 2 * 2 * 2 * 4
    cells = frame.groupby(["shape", "pass", "ratio"])["mode"].agg(set)
    assert len(cells) == 8
    assert all(modes == {"control", "factorized", "composed", "auto"} for modes in cells)
    assert set(frame["shape"]) == {"8@4", "4-8@5/2"}
    assert (frame["speedup"] == 1).all()
    assert (frame["n"] == 3).all()
    assert (frame["peak_mib"] > 0).all()
    assert set(frame[frame["mode"] == "auto"]["resolved"]) <= {"factorized", "composed"}


def test_a_control_that_is_off_is_reported(setting):
    report = bench_layers(shapes=["4@4"], ratios=[0.5], candidates=[], passes=["forward"], setting=setting)
    assert "1 is within the quartiles in 1 of 1 cells" in str(report)
    off = BenchReport(**{**vars(report), "rows": [{**report.rows[0], "speedup_q1": 1.1, "speedup_q3": 1.2}]})
    assert "1 is within the quartiles in 0 of 1 cells" in str(off)


def test_passes_run_what_they_say(monkeypatch, setting):
    seen, gradients = [], []
    forward = BasisConv2d.forward

    def spy(self, x):
        seen.append((torch.is_grad_enabled(), tuple(x.shape), self.basis.grad, x.grad))
        if x.requires_grad:
            x.register_hook(lambda gradient: gradients.append(tuple(gradient.shape)))
        return forward(self, x)

    monkeypatch.setattr(BasisConv2d, "forward", spy)
    for one, backward in (("forward", False), ("forward+backward", True)):
        seen.clear()
        gradients.clear()
        bench_layers(shapes=["4-8@6/2"], ratios=[0.5], candidates=["composed"], passes=[one], setting=setting)
        assert set(seen) == {(backward, (2, 4, 6, 6), None, None)}  # no step leaves gradients to the next
        assert set(gradients) == ({(2, 4, 6, 6)} if backward else set())


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
        shapes=["8@4"], ratios=[0.5], candidates=["factorized", "composed"], passes=["forward+backward"],
        setting=Setting(device="cpu", precision=precision, memory_format=memory_format, batch_size=2, rounds=3),
    )  # fmt: skip
    expected = (dtype, dtype, torch.float32, last, last, last)
    assert set(seen) == {("Conv2d", *expected), ("BasisConv2d", *expected)}


@pytest.mark.parametrize("text", ["64@32", "64-128@32/2", "128-64@7"])
def test_shapes_read_back_as_written(text):
    assert str(Shape.parse(text)) == text


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


def test_training_measures_norms_and_steps_against_the_dense_network_by_the_same_step(setting):
    report = bench_training(
        model="resnet20", width=8, ratios=[0.5], norms=["ordinary", "through_basis"], steps=["eager", "graphed"],
        setting=setting,
    )  # fmt: skip
    kinds = [(row["mode"], row["norms"], row["step"]) for row in report.rows]
    assert kinds == [
        ("control", "ordinary", "eager"), ("dense", "ordinary", "graphed"),
        ("auto", "ordinary", "eager"), ("auto", "ordinary", "graphed"),
        ("auto", "through_basis", "eager"), ("auto", "through_basis", "graphed"),
    ]  # fmt: skip
    assert {row["means"] for row in report.rows if row["step"] == "graphed"} == {
        "eager (CUDA graphs need a GPU, not cpu)"
    }
    assert str(report).count("graphed was eager (CUDA graphs need a GPU, not cpu)") == 1
    ordinary, through = report.rows[2], report.rows[4]
    assert ordinary["parameters"] == through["parameters"]
    assert through["peak_mib"] < ordinary["peak_mib"]  # the normalised maps are not kept
    assert (ordinary["coupled"], through["coupled"]) == (0, 19)
    assert report.config["norms"] == ["ordinary", "through_basis"]


def rehearse(function):
    """Stands for a CUDA graph: runs a function while it is captured, and again at each replay."""
    function()
    return lambda: function()


def refuse(*modes):
    """A capture that fails for layers of these modes, and for dense ones by "dense"."""

    def capture(function):
        if getattr(function.args[0], "mode", "dense") in modes:
            raise RuntimeError("operation not permitted when stream is capturing\n\nand more")
        return rehearse(function)

    return capture


@pytest.fixture
def graphing(monkeypatch):
    """Training steps are graphed as if there were a GPU."""
    for module in ("bench.networks", "training.loop"):
        monkeypatch.setattr(
            f"basis.{module}.means_for",
            lambda step, device: Means(graphed=step in ("graphed", "fast"), compiled=step == "fast"),
        )


def test_the_peak_of_a_graph_is_that_of_its_capture(graphing, setting):
    """Repeating it allocates nothing."""
    report = bench_training(
        model="resnet20", width=4, ratios=[0.5], steps=["eager", "graphed"], setting=replace(setting, capture=rehearse)
    )
    peaks = {(row["mode"], row["step"]): (row["peak_mib"], row["dense_peak_mib"]) for row in report.rows}
    assert peaks["auto", "graphed"] == pytest.approx(peaks["auto", "eager"], rel=0.1)
    assert peaks["dense", "graphed"] == pytest.approx([peaks["auto", "eager"][1]] * 2, rel=0.1)
    timed = {(row["mode"], row["step"]): row["timed"] for row in report.rows}
    assert timed == {
        ("control", "eager"): "host-bound", ("dense", "graphed"): "graph",
        ("auto", "eager"): "host-bound", ("auto", "graphed"): "graph",
    }  # fmt: skip


def test_layers_are_timed_as_graphs_on_inputs_in_rotation(setting):
    captured = []

    def capture(function):
        captured.append(function)
        return rehearse(function)

    graphed = replace(setting, capture=capture)
    modes = ["factorized", "composed", "auto"]
    report = bench_layers(shapes=["8@4"], ratios=[0.5], candidates=modes, passes=["forward+backward"], setting=graphed)
    assert len(captured) == 4  # dense, control and two modes, of which auto is one
    assert {row["timed"] for row in report.rows} == {"graph"}
    assert {row["sets"] for row in report.rows} == {MOST_SETS}  # such small inputs never fill the cache
    assert [row["ms"] for row in report.rows] == pytest.approx([2 / MOST_SETS] * 4)  # of one set
    assert all(row["peak_mib"] > 0 for row in report.rows)
    assert "capture" not in report.config
    auto = report.rows[-1]
    assert auto["same_as"] == auto["resolved"] in modes


def test_a_layer_that_cannot_be_captured_is_never_mixed_with_graphs(setting):
    options = {
        "shapes": ["8@4"],
        "ratios": [0.5],
        "candidates": ["factorized", "composed"],
        "passes": ["forward+backward"],
    }
    control, factorized, composed = bench_layers(**options, setting=replace(setting, capture=refuse("composed"))).rows
    assert control["timed"] == factorized["timed"] == "graph"
    assert composed["error"].startswith("could not be captured: RuntimeError: operation not permitted when stream")
    assert "ms" not in composed
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        bench_layers(**options, setting=replace(setting, capture=refuse("dense")))


def test_a_step_that_is_no_graph_where_the_dense_one_is_has_failed(graphing, setting, monkeypatch):
    first = []

    def capture(function):
        if first:  # dense is the last to be captured: what may fail runs before
            first.append(function)
            return rehearse(function)
        first.append(function)
        raise RuntimeError("no")

    report = bench_training(
        model="resnet20", width=4, ratios=[0.5], steps=["graphed"], setting=replace(setting, capture=capture)
    )
    control, auto = report.rows
    assert control["error"] == "its step is eager (could not be graphed: no), that of the dense network graphed"
    assert auto["timed"] == "graph"


def test_graphs_beside_a_compiled_dense_network_are_compared_with_it(graphing, setting, monkeypatch):
    monkeypatch.setattr("basis.training.stepping.compiled", lambda model, channels_last: model)
    report = bench_training(
        model="resnet20", width=4, ratios=[0.5], steps=["graphed"], dense_steps=["fast"],
        setting=replace(setting, capture=rehearse),
    )  # fmt: skip
    control, dense, auto = report.rows
    assert (dense["mode"], dense["step"], auto["step"]) == ("dense", "fast", "graphed")
    assert auto["versus_compiled"] == control["versus_compiled"] == 1
    assert "versus_compiled" in str(report)

    def fails(model, channels_last):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(
        "basis.training.stepping.compiled", lambda model, channels_last: lambda x: fails(model, channels_last)
    )
    report = bench_training(
        model="resnet20", width=4, ratios=[0.5], modes=[], steps=["graphed"], dense_steps=["fast"],
        setting=replace(setting, capture=rehearse),
    )  # fmt: skip
    assert report.rows[1]["means"] == "graphed (could not be compiled: no compiler)"
    assert not any("versus_compiled" in row for row in report.rows)


def test_blocks_are_measured_with_and_through_batch_normalisation(monkeypatch, setting):
    seen, gradients = set(), []
    forward = Block.forward

    def spy(self, x):
        seen.add((self.training, type(self.bn).__name__))
        for tensor in (x,):
            if type(tensor) is torch.Tensor and tensor.requires_grad:  # not while the block is traced
                tensor.register_hook(lambda gradient: gradients.append(tuple(gradient.shape)))
        return forward(self, x)

    monkeypatch.setattr(Block, "forward", spy)
    report = bench_layers(
        "block", shapes=["8-16@6/2"], ratios=[0.5], candidates=["auto", "through_basis"], setting=setting
    )
    assert [row["mode"] for row in report.rows] == ["control", "auto", "through_basis"]
    assert {(True, "BatchNorm2d"), (True, "BasisBatchNorm2d")} <= seen
    assert set(gradients) == {(2, 8, 6, 6)}
    assert report.rows[-1]["versus_basis"] == 1
    assert report.rows[-1]["peak_mib"] < report.rows[-1]["dense_peak_mib"]


@pytest.mark.weekly
def test_the_sweep_measures_everything_and_saves_each_report(tmp_path, monkeypatch):
    monkeypatch.setattr("basis.bench.timing.MOST_SETS", 2)
    told = []
    setting = Setting(
        device="cpu", precision="fp32", batch_size=2, rounds=3, timer=Clock(lambda _: 0.002), capture=rehearse
    )
    paths = bench_gpu(tmp_path, setting=setting, time_limit=3600, tiny=True, progress=told.append)
    reports = [BenchReport.load(path) for path in paths]
    assert [report.kind for report in reports] == [
        *["bench-train"] * 3, "bench-block", "bench-latency", "bench-plans", "bench-layer", "bench-layer",
        "bench-train", *["bench-inference"] * 3, "bench-latency", *["bench-budget"] * 3, "bench-rivals", "bench-parts",
    ]  # fmt: skip
    assert len(set(paths)) == len(reports)
    rates = [report.config["machine"]["macs_per_second"] for report in reports]
    assert rates == pytest.approx([2 * 16**2 * 64 * 9 * 64 / 0.002] * len(reports))
    assert not [row for report in reports for row in report.rows if "error" in row]
    layers = reports[6]
    assert layers.config["shapes"] == ["16@6", "16-32@6/2"] == list(dict.fromkeys(r["shape"] for r in layers.rows))
    assert {row.get("timed") for row in layers.rows + reports[4].rows} == {"graph"}
    assert {row["norms"] for row in reports[0].rows} == {"ordinary", "fused", "through_basis", "tuned"}
    assert {row["share"] for row in reports[5].rows} == {1.0}
    assert [report.config["batch_size"] for report in reports[9:12]] == [2, 3, 1]
    assert [line for line in told if line.endswith(" s  layer: 2 of 2 parts")]


def report_of(name):
    """A report of one row."""
    config = {"shapes": [name], "device": "cpu", "precision": "fp32", "memory_format": "contiguous", "batch_size": 2}
    row = {"shape": name, "mode": "auto", "ms": 1.0}
    return BenchReport(kind="bench-layer", config=config, environment={"device": "a processor"}, rows=[row])


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs a sweep of made-up measurements: the files, (shape, seconds) of what began, and what was told."""
    made, told = [], []

    def part(name):
        def measure(*, setting, progress):
            made.append((name, setting.seconds))
            if name == "broken":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return report_of(name)

        return measure

    def run(time_limit=240, **parts):
        plan = [Measurement(name, 0.5, [part(one) for one in names]) for name, names in parts.items()]
        monkeypatch.setattr("basis.experiments.sweep.measurements", lambda tiny: plan)
        setting = Setting(device="cpu", timer=Clock(lambda _: 1))
        paths = bench_gpu(tmp_path, setting=setting, time_limit=time_limit, tiny=True, progress=told.append)
        return paths, made, told

    return run


def test_the_sweep_begins_nothing_when_the_time_is_up(sweep, monkeypatch):
    clock = iter(range(0, 100_000, 30))  # half a minute passes between two looks
    monkeypatch.setattr("basis.experiments.sweep.time.monotonic", lambda: next(clock))
    paths, made, told = sweep(200, first="abc", second="d", third="e")
    assert [name for name, _ in made] == ["a"]
    assert made[0][1] < 200 / 3 / 2
    assert [path.name for path in paths] == ["first-cpu-fp32-contiguous.json"]
    assert [line.split(" s  ")[1] for line in told[1:]] == [
        "first: 1 of 3 parts", "second: 0 of 1 parts", "third: 0 of 1 parts",
    ]  # fmt: skip


def test_the_sweep_goes_on_without_a_part_that_fails_and_shows_what_cannot_be_saved(sweep, tmp_path):
    (tmp_path / "second-cpu-fp32-contiguous.json").mkdir()  # stands for a full disk
    paths, _, told = sweep(first=["a", "broken", "c"], second=["d"])
    assert [path.name for path in paths] == ["first-cpu-fp32-contiguous.json"]
    assert [row["shape"] for row in BenchReport.load(paths[0]).rows] == ["a", "c"]
    assert any(line.endswith("first: part 2 failed, OutOfMemoryError: CUDA out of memory") for line in told)
    assert any("could not be written" in line and "auto" in line for line in told)


@pytest.mark.parametrize(
    ("options", "says"),
    [({}, "the device is cpu, but this measures a GPU"), ({"tiny": True, "time_limit": 0}, "time_limit is 0")],
)
def test_the_sweep_refuses_what_makes_no_sense(options, says, setting, tmp_path):
    with pytest.raises(ValueError, match=says):
        bench_gpu(tmp_path, setting=setting, **options)
    assert not list(tmp_path.iterdir())
    assert setting.timer.calls == 0


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, setting):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to the folder .*file"):
        bench_gpu(tmp_path / "file", setting=setting, tiny=True)
    assert setting.timer.calls == 0
    monkeypatch.setitem(BENCHES, "layer", (None, *BENCHES["layer"][1:]))
    for out, says in ((tmp_path / "file" / "a.json", "nothing can be written"), (tmp_path, "is a folder, but must be")):
        assert main(["bench", "layer", "--device", "cpu", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err


def test_the_commands_for_blocks_and_rivals_store_the_machine_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("basis.commands.bench.results_folder", lambda: tmp_path)
    where = "--device cpu --precision fp32 --memory-format contiguous --rounds 3 --batch-size 2 --ratios 0.5"
    assert main(["bench", "block", "--shapes", "8@4", "--candidates", "auto", "through_basis", *where.split()]) == 0
    command = ["bench", "rivals", "--shapes", "16@4", "--passes", "forward", "--candidates", "basis", "svd"]
    assert main([*command, *where.split()]) == 0
    for name in ("block", "rivals"):
        report = BenchReport.load(tmp_path / "bench" / f"{name}-cpu-fp32-contiguous.json")
        assert report.config["machine"]["bytes_per_second"] > 0
    assert "versus_basis" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "bench").glob("train-[fnp]*.json")), ids=lambda p: p.stem)
def test_reports_of_trainings_are_filed_as_the_stored_ones_are(path):
    report = BenchReport.load(path)
    assert file_name(file_stem("train", report.config), report) == path.stem


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


def test_a_layer_too_narrow_for_the_multiple_is_only_timed_dense(setting):
    report = bench_latency(nn.Conv2d(3, 8, 3), input_size=(3, 6, 6), passes=["forward"], setting=setting)
    assert report.latencies("forward") == {"": {8: pytest.approx(2)}}


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (nn.Conv2d(3, 3, 3, groups=3), {}, "no convolution that can be substituted"),
        (nn.Conv2d(3, 8, 3), {"input_size": (4, 8, 8)}, "the model cannot be run on an input of"),
        (nn.Conv2d(3, 8, 3), {"ratios": [2]}, "ratio is 2"),
    ],
)
def test_latency_refuses_what_makes_no_sense(model, options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_latency(model, **{"input_size": (3, 8, 8), **options}, setting=setting)
    assert setting.timer.calls == 0


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
    bench_layers(shapes=["4@4"], ratios=[0.5], candidates=["auto"], setting=setting)
    bench_training(model="resnet20", width=4, ratios=[0.5], setting=setting)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "meta"}, "device is meta"), ({"precision": "int8"}, "precision is 'int8'"),
        ({"memory_format": "nhwc"}, "memory_format is 'nhwc'"), ({"batch_size": 0}, "batch_size is 0"),
        ({"rounds": 2}, "rounds is 2"), ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)  # fmt: skip
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
        ({"candidates": ["fast"]}, "'fast', but its kind"),
        ({"kind": "rivals", "candidates": ["cp"]}, "'cp', but its kind"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, says, setting):
    with pytest.raises(ValueError, match=says):
        bench_layers(**options, setting=setting)
    assert setting.timer.calls == 0
