"""The verdicts on speed, from made-up benchmarks."""

import pytest

from basis.bench.timing import BenchReport
from basis.experiments.studies import cost, speed


def report(kind, rows, **config):
    config = {"precision": "fp32", "memory_format": "channels_last", "width": None, "batch_size": 64, **config}
    return BenchReport(kind=kind, config=config, environment={"device_type": "cpu", "device": "a CPU"}, rows=rows)


def quartiles(key, value):
    return {key: value, f"{key}_q1": 0.99 * value, f"{key}_q3": 1.01 * value}


def layer(speedup, **options):
    row = {"mode": "auto", "pass": "forward+backward", "shape": "64@32", "ratio": 0.5, "n": 9}
    return {**row, **quartiles("speedup", speedup), **options}


def rival(versus, **options):
    return layer(1.0, **{"mode": "svd", **quartiles("versus_basis", versus), **options})


def step(speedup, ratio, **options):
    row = {"model": "resnet18", "ratio": ratio, "mode": "auto", "coefficients": "dense", "trained": "both", "n": 9}
    row |= {"norms": "through_basis", "step": "eager", "dense_ms": 100.0, "peak_mib": 70.0, "dense_peak_mib": 100.0}
    return {**row, **quartiles("speedup", speedup), **options}


@pytest.fixture
def judged(monkeypatch):
    """The verdicts by claim, from these rows of each kind."""

    def judge(**kinds):
        reports = {f"bench-{name}": [report(f"bench-{name}", rows)] for name, rows in kinds.items()}
        monkeypatch.setattr(speed, "load_benches", lambda profile, kind="bench-layer": reports.get(kind, []))
        return {verdict.claim: verdict for verdict in speed.STUDY.verdicts([], "cpu")}

    return judge


@pytest.mark.parametrize(("slower", "label"), [(0, "reproduced"), (1, "not reproduced")])
def test_one_layer_that_is_slower_refutes_h2(judged, slower, label):
    layers = [layer(0.9 if i < slower else 1.5) for i in range(20)]
    assert judged(layer=layers)["H2"].label == "not tested"
    verdict = judged(layer=layers, rivals=[rival(0.9)])["H2"]
    assert verdict.label == label
    more = "" if slower else ", 0 of 1 against the SVD pair"
    assert f"{slower} of 21 cases ({slower} of 20 against dense{more})" in verdict.finding


@pytest.mark.parametrize(
    ("row", "slower"),
    [
        (layer(1 / 1.03), True),
        (layer(1 / 1.015), False),  # within the tolerance
        (layer(1 / 1.03, speedup_q3=1.01), False),  # the quartiles enclose 1
        (layer(1 / 1.03, **{"pass": "forward"}), None),
        (layer(1 / 1.03, shape="32@32"), None),  # no layer of ResNet-18
        ({"mode": "auto", "shape": "64@32", "error": "failed"}, None),
        (rival(1.03), True),
        (rival(1.015), False),
        (rival(1.03, timed="host-bound"), None),
    ],
)
def test_what_counts_as_slower(row, slower):
    found = speed.cells([], [report("", [row])]) if "versus_basis" in row else speed.cells([report("", [row])], [])
    assert [cell["slower"] for cell in found] == ([] if slower is None else [slower])
    assert all(cell["q1"] <= cell["relative"] <= cell["q3"] for cell in found)


@pytest.mark.parametrize(
    ("half", "quarter", "label"),
    [
        (step(1.4, 0.5), step(1.7, 0.25), "reproduced"),
        (step(1.3, 0.5), step(1.7, 0.25), "inconclusive"),  # its quartiles enclose the limit
        (step(1.4, 0.5, peak_mib=None), step(1.7, 0.25), "inconclusive"),
        (step(1.4, 0.5, peak_mib=101.0), step(1.7, 0.25), "not reproduced"),
        (step(1.4, 0.5), step(1.5, 0.25), "not reproduced"),
    ],
)
def test_steps_are_judged_by_both_ratios_and_memory(judged, half, quarter, label):
    assert judged(train=[half, quarter])["H3"].label == label


def test_the_step_judged_is_the_one_in_which_dense_is_fastest_by_the_image():
    wanted = step(1.1, 0.5)
    others = [{"mode": "composed"}, {"coefficients": "frozen"}, {"trained": "neither"}, {"error": "failed"}]
    rows = [step(3.0, 0.5, dense_ms=200.0), wanted, *(step(3.0, 0.5, dense_ms=50.0, **other) for other in others)]
    small = report("bench-train", [step(3.0, 0.5, dense_ms=60.0)], batch_size=32)
    assert wanted.items() <= speed.step_rows([small, report("bench-train", rows)])[0.5].items()


def dense_step(ms, **options):
    row = {"model": "resnet18", "ratio": 0.5, "mode": "dense", "norms": "ordinary", "step": "eager", "n": 9}
    return {**row, "ms": ms, "dense_ms": 100.0, "peak_mib": 80.0, "dense_peak_mib": 100.0, **options}


@pytest.mark.parametrize(
    ("compiled", "versus", "speedup", "scaled"),
    [
        (120.0, 1.8, 1.5, False),  # fused norms are faster than compiling: the row's own dense step
        (80.0, 1.25, 1.25, False),  # compiled is the better one, timed in the same rounds
        (80.0, None, 1.2, True),  # and where it was not: by medians
    ],
)
def test_a_step_is_judged_against_the_better_of_fused_and_compiled_dense(judged, compiled, versus, speedup, scaled):
    fused = dense_step(100.0, mode="control", norms="fused")
    others = [dense_step(130.0), dense_step(compiled, norms="fused", step="fast")]
    basis = step(1.5, 0.5, **({} if versus is None else quartiles("versus_compiled", versus)))
    rows = [fused, *others, basis, step(1.9, 0.5, norms="fused"), step(1.9, 0.5, norms="tuned")]
    found = speed.step_rows([report("bench-train", rows)])[0.5]
    assert (found["speedup"], found["scaled"]) == (pytest.approx(speedup), scaled)
    assert found["dense_peak_mib"] == (100.0 if compiled > 100 else 80.0)
    assert speed.whole_steps([report("bench-train", rows)])[1]["norms"] == "fused"


def test_a_point_of_the_roofline_says_what_was_executed_and_what_is_predicted():
    machine = {"device": "", "precision": "", "threads": 0, "macs_per_second": 1e12, "bytes_per_second": 1e30}
    row = layer(2.0, resolved="factorized", basis_channels=32, machine=machine, ms=1.0, precision="bf16", batch_size=1)
    row |= {"layout": "", "channels": 64, "device": "", "device_type": "cuda"}
    points = [speed.roofline_point({**row, **other}) for other in ({}, {"device_type": "cpu"}, {"mode": "control"})]
    assert [point["mode"] for point in points] == ["factorized", "cat", "dense"]
    assert points[0]["predicted"] == pytest.approx(576 / (32 * 576 + 64 * 32) * 64)  # nothing but the count decides
    assert points[2]["rate"] == pytest.approx(100 * 3 * 32 * 32 * 64 * 576 / 1e9)


def test_devices_have_short_names():
    names = "AMD EPYC, 2 cores", "NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA GeForce RTX 4090"
    short = [cost.short_name({"device": name, "device_type": "cuda"}) for name in names]
    assert short == ["GPU EPYC", "GPU H100", "GPU T4", "GPU RTX 4090"]


def test_rows_of_all_devices_are_one_frame(tmp_path):
    cpu = [report("bench-layer", [layer(1.5)], precision=p) for p in ("fp32", "bf16")]
    for number, one in enumerate(cpu):
        one.save(tmp_path / "bench" / f"{number}.json")
    rows = cost.load_rows("bench-layer", "bench-parts", folder=tmp_path)
    assert rows[["layout", "channels"]].to_numpy().tolist() == [["fp32 NHWC", 64], ["bf16 NHWC", 64]]
    assert cost.in_one_format(rows)["layout"].tolist() == ["bf16 NHWC"]
    assert cost.in_one_format(cost.load_rows("bench-parts", folder=tmp_path)).empty
