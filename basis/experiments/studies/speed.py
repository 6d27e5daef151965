"""Chapter 10: how fast can a network of basis convolutions be trained?

The measurements are those of ``basis bench``: single layers, layers beside their rivals, blocks with their
batch normalisation, and whole training steps; one file each under ``results/bench/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from basis.bench.report import BenchReport
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import counts, load_benches
from basis.experiments.studies.study import Label, Study, Verdict
from basis.layers.conv import derives_apart

TOLERANCE = 1.02
WANTED: Mapping[float, float] = {1 / 2: 1.3, 1 / 4: 1.6}  # ratio -> speed-up of a training step

RULE = (
    "H2 is judged by the 3x3 layers of ResNet-18 at r = 1/8 to 3/4 (against rivals: the ratios measured), forward and "
    "backward, in mode auto: against the dense layer, and against two convolutions as an SVD gives them and Tucker "
    "convolutions of tensorly-torch, all eager, at equal parameters. A cell is one shape, ratio, precision, memory "
    f"format and opponent. Auto is slower in a cell if the median over rounds of its time relative to the opponent's "
    f"is above {TOLERANCE} and the quartiles exclude 1. Reproduced if it is slower in no cell, partly if in at most a "
    "tenth of them, else not reproduced; not before both kinds of measurement are there. H3 is judged by training "
    "steps of ResNet-18, each against the dense network by the kind of step (eager, compiled, graphed or both) in "
    "which the dense one is fastest: reproduced if the lower quartile of the speed-up is above 1.3 at r = 1/2 and "
    "above 1.6 at r = 1/4, and the step takes less memory than the dense one; partly if the lower quartile is above 1 "
    "at either; else not reproduced."
)


def load_rows(profile: str) -> pd.DataFrame:
    """All that was measured on such devices: each row after what its report says (``kind``, ``device``, options)."""
    reports = [one for kind in STUDY.benches for one in load_benches(profile, kind=kind)]
    return pd.DataFrame(
        {**one.config, "kind": one.kind, "device": one.environment["device"], **row}
        for one in reports
        for row in one.rows
        if counts(row)
    )


# Rivals of `basis bench rivals` that H2 speaks of, as the text names them.
RIVALS: Mapping[str, str] = {
    "svd": "the SVD pair",
    "tucker": "Tucker, factorized",
    "tucker reconstructed": "Tucker, reconstructed",
}


def cells(layers: Sequence[BenchReport], rivals: Sequence[BenchReport]) -> list[dict[str, Any]]:
    """The cells that H2 speaks of.

    Each has ``opponent``, ``shape``, ``ratio``, ``precision``, ``memory_format``, ``n`` rounds, ``relative`` (the
    time of mode auto / that of the opponent) with quartiles ``q1`` and ``q3``, and whether auto is ``slower``.
    """
    rows = [
        (report, row, "dense", [1 / row[key] for key in ("speedup", "speedup_q3", "speedup_q1")])
        for report in layers
        for row in report.rows
        if row["mode"] == "auto" and _counts(row)
    ]
    rows += [
        (report, row, RIVALS[row["mode"]], [row[key] for key in ("versus_basis", "versus_basis_q1", "versus_basis_q3")])
        for report in rivals
        for row in report.rows
        if row["mode"] in RIVALS and _counts(row)
    ]
    return [
        {
            "opponent": opponent, "shape": row["shape"], "ratio": row["ratio"], "n": row["n"],
            "precision": report.config["precision"], "memory_format": report.config["memory_format"],
            "relative": relative, "q1": low, "q3": high, "slower": relative > TOLERANCE and low > 1,
        }
        for report, row, opponent, (relative, low, high) in rows
    ]  # fmt: skip


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether H2 speaks of a row."""
    if not counts(row) or row["pass"] != "forward+backward":
        return False
    return row["shape"] in RESNET18_SHAPES and 1 / 8 <= row["ratio"] <= 3 / 4


def judge_layers(profile: str) -> Verdict:
    """The verdict on H2 by :data:`RULE`, from the stored benchmarks."""
    layers, rivals = load_benches(profile), load_benches(profile, kind="bench-rivals")
    found = cells(layers, rivals)
    opponents = dict.fromkeys(cell["opponent"] for cell in found)
    if "dense" not in opponents or len(opponents) < 2:
        return Verdict("H2", profile, "not tested", "layers and their rivals are not both measured on such a device")
    slower = [cell for cell in found if cell["slower"]]
    label: Label = "not reproduced"
    if 10 * len(slower) <= len(found):
        label = "partly" if slower else "reproduced"
    counts = ", ".join(
        f"{sum(cell['opponent'] == name for cell in slower)} of {sum(cell['opponent'] == name for cell in found)} "
        f"against {name}"
        for name in opponents
    )
    worst = max(found, key=lambda cell: cell["relative"])
    finding = (
        f"auto is slower in {len(slower)} of {len(found)} cells ({counts}); at worst it takes "
        f"{worst['relative']:.2f} times as long ({worst['shape']}, r = {worst['ratio']:g}, {worst['precision']}, "
        f"against {worst['opponent']}; {_devices([*layers, *rivals])})"
    )
    return Verdict("H2", profile, label, finding)


def _devices(reports: Sequence[BenchReport]) -> str:
    return ", ".join(sorted({report.environment["device"] for report in reports}))


def step_rows(reports: Sequence[BenchReport]) -> dict[float, Mapping[str, Any]]:
    """Ratio -> the row of the training step that H3 speaks of: with batch normalisation through the basis.

    All parts of it are trained, in mode auto with dense coefficients. Of the kinds of step it takes the one in
    which the dense network takes the least time per image.
    """
    wanted = {"norms": "through_basis", "mode": "auto", "coefficients": "dense", "trained": "both", "model": "resnet18"}
    found: dict[float, tuple[float, Mapping[str, Any]]] = {}
    for report in reports:
        for row in report.rows if not report.config["width"] else ():
            if row.get("error") or any(row.get(key) != value for key, value in wanted.items()):
                continue
            per_image = row["dense_ms"] / report.config["batch_size"]
            if row["ratio"] not in found or per_image < found[row["ratio"]][0]:
                found[row["ratio"]] = per_image, row
    return {ratio: row for ratio, (_, row) in found.items()}


def ordinary_row(reports: Sequence[BenchReport], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the same measurement with the ordinary batch normalisation."""
    alike = ("ratio", "mode", "coefficients", "trained", "step")
    for report in reports:
        if any(one is row for one in report.rows):
            same = [one for one in report.rows if all(one[key] == row[key] for key in alike)]
            return next((one for one in same if one["norms"] == "ordinary" and not one.get("error")), None)
    return None


def executed_mode(row: Mapping[str, Any], device_type: str) -> str:
    """The mode of :data:`basis.bench.roofline.ROOFLINE_MODES` that a row of ``basis bench layer`` executed."""
    mode = {"control": "dense", "auto": row["resolved"]}.get(row["mode"], row["mode"])
    width = Shape.parse(row["shape"]).out_channels
    apart = derives_apart(torch.device(device_type), out_channels=width, basis_channels=row["basis_channels"])
    return "cat" if mode == "factorized" and apart else mode


def judge_steps(profile: str) -> Verdict:
    """The verdict on H3 by :data:`RULE`, from the stored benchmarks."""
    reports = load_benches(profile, kind="bench-train")
    rows = step_rows(reports)
    if not set(WANTED) <= set(rows):
        return Verdict("H3", profile, "not tested", "no training step of such a device is measured")
    label: Label = "partly" if any(rows[r]["speedup_q1"] > 1 for r in WANTED) else "not reproduced"
    if all(rows[r]["speedup_q1"] > wanted and _less_memory(rows[r]) for r, wanted in WANTED.items()):
        label = "reproduced"
    parts = [
        f"{rows[r]['speedup']:.3f} [{rows[r]['speedup_q1']:.3f}, {rows[r]['speedup_q3']:.3f}] times as fast as the "
        f"dense one at r = {r:g} (n = {rows[r]['n']}, {rows[r]['step']}), {_memory(rows[r])}"
        for r in WANTED
    ]
    return Verdict("H3", profile, label, f"on {_devices(reports)} a training step of ResNet-18 is {'; '.join(parts)}")


def _less_memory(row: Mapping[str, Any]) -> bool:
    return bool(row["peak_mib"]) and row["peak_mib"] < row["dense_peak_mib"]


def _memory(row: Mapping[str, Any]) -> str:
    if not row["peak_mib"]:
        return "its memory not measured"
    return f"with {row['peak_mib'] / row['dense_peak_mib']:.0%} of the peak memory"


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on H2 and H3 by :data:`RULE`, from the stored benchmarks (``records`` is not used)."""
    return judge_layers(profile), judge_steps(profile)


def plan(profile: str) -> tuple[Run, ...]:
    """No trainings: the benchmarks are made by ``basis bench``."""
    return ()


STUDY = Study(
    name="speed",
    title="How fast can it be trained?",
    chapter="10_making_it_fast",
    claims=("H2", "H3"),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
    benches=("bench-layer", "bench-block", "bench-rivals", "bench-train", "bench-plans", "bench-inference"),
)
