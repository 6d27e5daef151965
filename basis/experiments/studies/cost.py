"""Chapter 2: what a basis convolution costs: counted, and as ``basis bench layer`` measured it (``results/bench``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from basis.bench.report import BenchReport
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.environment import results_folder
from basis.experiments.runs import DEVICES, Record
from basis.experiments.studies.study import Study, Verdict, label_of, say

RATIO, NARROWEST = 0.5, 128
# What a row of :func:`load_rows` always has; others are there where some benchmark has them.
COLUMNS = (
    "kind", "device", "device_type", "layout", "precision", "batch_size", "model", "width", "shape", "channels", "pass",
    "ratio", "share", "basis_channels", "mode", "coefficients", "norms", "step", "means", "part", "n", "ms", "dense_ms",
    "speedup", "speedup_q1", "speedup_q3", "versus_basis", "versus_basis_q1", "versus_basis_q3", "peak_mib",
    "dense_peak_mib", "resolved", "machine",
)  # fmt: skip
FORMATS = ("bf16 NHWC", "fp16 NHWC", "fp32 NHWC", "bf16 NCHW", "fp16 NCHW", "fp32 NCHW")


def load_benches(profile: str | None, *, kind: str = "bench-layer", folder: Path | None = None) -> list[BenchReport]:
    """The stored benchmarks of a kind: of CPUs for the profile ``cpu``, of GPUs for ``paper``, or all."""
    reports = [BenchReport.load(path) for path in sorted(((folder or results_folder()) / "bench").glob("*.json"))]
    wanted = DEVICES.values() if profile is None else [DEVICES.get(profile)]
    return [one for one in reports if one.kind == kind and one.environment["device_type"] in wanted]


def facts(report: BenchReport) -> dict[str, Any]:
    """What a report says of all its rows: its options, kind, format and device."""
    about = {key: report.environment[key] for key in ("device", "device_type")}
    layout = "NHWC" if report.config["memory_format"] == "channels_last" else "NCHW"
    return {**report.config, **about, "kind": report.kind, "layout": f"{report.config['precision']} {layout}"}


def load_rows(*kinds: str, folder: Path | None = None) -> pd.DataFrame:
    """All rows of the stored benchmarks of these kinds that count, of CPUs first, each after its report's facts."""
    reports = [one for kind in kinds for one in load_benches(None, kind=kind, folder=folder)]
    rows = [{**facts(one), **row} for one in reports for row in one.rows if counts(row)]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)])))
    widths = {text: Shape.parse(text).out_channels for text in frame["shape"].dropna().unique() if " " not in text}
    frame["channels"] = frame["shape"].map(widths)
    frame["short"] = [short_name(row) for row in frame.to_dict("records")]
    return frame.sort_values("device_type", kind="stable", ignore_index=True)


def in_one_format(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each device in the first of :data:`FORMATS` that was measured there."""
    order = rows["layout"].map(FORMATS.index)
    return rows[order == order.groupby(rows["device"]).transform("min")]


def interval(row: Mapping[Any, Any]) -> str:
    """A speed-up with its quartiles, such as ``1.40 [1.33, 1.44]``."""
    return "{speedup:.2f} [{speedup_q1:.2f}, {speedup_q3:.2f}]".format(**row)


def spread(rows: pd.DataFrame) -> pd.Series:
    """The :func:`interval` of each row."""
    return pd.Series([interval(row) for row in rows.to_dict("records")], rows.index, dtype=object)


def milliseconds(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a layer, a column a device, batch and pass: dense → basis milliseconds, and the speed-up with quartiles."""
    times = ["{:.3g} → {:.3g}<br>".format(*pair) for pair in rows[["dense_ms", "ms"]].to_numpy()]
    texts = rows.astype({"short": str, "batch_size": str, "pass": str})
    texts["text"] = pd.Series(times, rows.index, dtype=object) + spread(rows)
    texts["of"] = texts["short"] + ", batch " + texts["batch_size"] + ", " + texts["pass"]
    return texts.pivot_table("text", "shape", "of", aggfunc="first", sort=False).fillna("").reset_index()


def short_name(row: Mapping[str, Any]) -> str:
    """A row's device in a few letters, such as ``CPU EPYC``, ``GPU H200`` or ``GPU RTX 4090``."""
    name, makers = row["device"].split(",")[0], ("AMD", "Intel(R)", "NVIDIA", "Tesla", "GeForce")
    first, *rest = [word for word in name.split() if word not in makers] or [name]
    model = f"{first} {rest[0]}" if rest and first.isalpha() and rest[0][0].isdigit() else first
    return f"{'CPU' if row['device_type'] == 'cpu' else 'GPU'} {model}"


def devices(reports: Sequence[BenchReport]) -> str:
    """The names of the devices that were measured."""
    return ", ".join(sorted({report.environment["device"] for report in reports}))


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a row says how long a layer takes: not if it failed, nor if a GPU waited for its host to launch it."""
    return not row.get("error") and row.get("timed") != "host-bound"


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C2, from the stored benchmarks (``records`` is not used)."""
    reports = load_benches(profile)
    cells = [row for report in reports for row in report.rows if counts(row) and row["shape"] in RESNET18_SHAPES]
    cells = [row for row in cells if row["mode"] == "auto" and row["ratio"] == RATIO]
    cells = [row for row in cells if Shape.parse(row["shape"]).out_channels >= NARROWEST]
    if not cells:
        return (Verdict("C2", profile, "not tested", "no benchmark of such a device is stored"),)
    slower = sum(row["speedup_q3"] < 1 for row in cells)
    label = label_of(all(row["speedup_q1"] > 1 for row in cells), slower > 0)
    speeds = sorted(row["speedup"] for row in cells)
    spread, n = f"{speeds[0]:.2f} to {speeds[-1]:.2f} times", min(row["n"] for row in cells)
    finding = say("findings", "C2", cells=len(cells), slower=slower, spread=spread)
    return (Verdict("C2", profile, label, finding, spread, n, devices(reports)),)


# There are no trainings: the benchmarks are made by `basis bench`.
STUDY = Study.named("cost", tuple, judge, narrowest=NARROWEST)
