"""Chapter 10: how fast can a network of basis convolutions be trained?

The measurements are those of ``basis bench``: single layers, layers beside their rivals, blocks, and training steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from basis.bench.report import BenchReport
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.experiments.runs import Record
from basis.experiments.studies.cost import counts, devices, load_benches
from basis.experiments.studies.study import Study, Verdict, label_of, say, verdict
from basis.layers.conv import derives_apart

TOLERANCE = 1.02
WANTED: Mapping[float, float] = {1 / 2: 1.3, 1 / 4: 1.6}  # ratio -> speed-up of a training step
# Rivals of `basis bench rivals` that H2 speaks of, as the text names them.
RIVALS: Mapping[str, str] = {
    "svd": "the SVD pair", "tucker": "Tucker, factorized", "tucker reconstructed": "Tucker, reconstructed"
}  # fmt: skip


def load_rows(profile: str) -> pd.DataFrame:
    """All that was measured on such devices: each row after what its report says (``kind``, ``device``, options)."""
    reports = [one for kind in STUDY.benches for one in load_benches(profile, kind=kind)]
    about = [{**one.config, "kind": one.kind, "device": one.environment["device"]} for one in reports]
    return pd.DataFrame(
        {**what, **row} for what, one in zip(about, reports, strict=True) for row in one.rows if counts(row)
    )


def cells(layers: Sequence[BenchReport], rivals: Sequence[BenchReport]) -> list[dict[str, Any]]:
    """The cells that H2 speaks of, each with its shape, ratio, setting and number ``n`` of rounds.

    ``relative`` is the time of mode auto / that of the ``opponent``, with quartiles ``q1`` and ``q3``; ``slower`` says
    whether auto is.
    """
    found = []
    for opponents, report in [({"auto": "dense"}, one) for one in layers] + [(RIVALS, one) for one in rivals]:
        rows = [
            row for row in report.rows if counts(row) and row["mode"] in opponents and row["shape"] in RESNET18_SHAPES
        ]
        for row in rows:
            if row["pass"] != "forward+backward" or not 1 / 8 <= row["ratio"] <= 3 / 4:
                continue
            if "auto" in opponents:
                relative, q1, q3 = (1 / row[f"speedup{quartile}"] for quartile in ("", "_q3", "_q1"))
            else:
                relative, q1, q3 = (row[f"versus_basis{quartile}"] for quartile in ("", "_q1", "_q3"))
            cell = {key: report.config[key] for key in ("precision", "memory_format")}
            cell |= {"opponent": opponents[row["mode"]], **{key: row[key] for key in ("shape", "ratio", "n")}}
            found.append(cell | {"relative": relative, "q1": q1, "q3": q3, "slower": relative > TOLERANCE and q1 > 1})
    return found


def _judge_layers(profile: str) -> Verdict:
    """The verdict on H2."""
    layers, rivals = load_benches(profile), load_benches(profile, kind="bench-rivals")
    found = cells(layers, rivals)
    against = {name: [c["slower"] for c in found if c["opponent"] == name] for name in ("dense", *RIVALS.values())}
    against = {name: slower for name, slower in against.items() if slower}
    if "dense" not in against or len(against) < 2:
        return Verdict("H2", profile, "not tested", "layers and their rivals are not both measured on such a device")
    slower = sum(cell["slower"] for cell in found)
    return verdict(
        "H2", profile, label_of(not slower, 10 * slower > len(found)), slower=slower, cells=len(found),
        parts=", ".join(f"{sum(lost)} of {len(lost)} against {name}" for name, lost in against.items()),
        worst=max(found, key=lambda cell: cell["relative"]), devices=devices([*layers, *rivals]),
    )  # fmt: skip


def step_rows(reports: Sequence[BenchReport]) -> dict[float, Mapping[str, Any]]:
    """Ratio -> the row of the training step that H3 speaks of: with batch normalisation through the basis.

    All parts are trained, in mode auto with dense coefficients, in the kind of step in which dense is fastest by image.
    """
    wanted = {"norms": "through_basis", "mode": "auto", "coefficients": "dense", "trained": "both", "model": "resnet18"}
    found: dict[float, tuple[float, Mapping[str, Any]]] = {}
    for report in reports:
        rows = () if report.config["width"] else report.rows
        for row in (row for row in rows if not row.get("error") and wanted.items() <= row.items()):
            per_image = row["dense_ms"] / report.config["batch_size"]
            if row["ratio"] not in found or per_image < found[row["ratio"]][0]:
                found[row["ratio"]] = per_image, row
    return {ratio: row for ratio, (_, row) in found.items()}


def executed_mode(row: Mapping[str, Any], device_type: str) -> str:
    """The mode of :data:`basis.bench.roofline.ROOFLINE_MODES` that a row of ``basis bench layer`` executed."""
    mode = {"control": "dense", "auto": row["resolved"]}.get(row["mode"], row["mode"])
    width = Shape.parse(row["shape"]).out_channels
    apart = derives_apart(torch.device(device_type), out_channels=width, basis_channels=row["basis_channels"])
    return "cat" if mode == "factorized" and apart else mode


def _judge_steps(profile: str) -> Verdict:
    """The verdict on H3."""
    reports = load_benches(profile, kind="bench-train")
    rows = {ratio: row for ratio, row in step_rows(reports).items() if ratio in WANTED}
    if len(rows) < len(WANTED):
        return Verdict("H3", profile, "not tested", "no training step of such a device is measured")
    parts, reached = [], []
    for ratio, wanted in WANTED.items():
        row = rows[ratio]
        share = row["peak_mib"] and row["peak_mib"] / row["dense_peak_mib"]
        reached.append(row["speedup_q1"] > wanted and bool(share) and share < 1)
        memory = f"with {share:.0%} of the peak memory" if share else "its memory not measured"
        parts.append(say("findings", "H3", **{**row, "memory": memory}))
    label = label_of(all(reached), not any(row["speedup_q1"] > 1 for row in rows.values()))
    finding = f"on {devices(reports)} a training step of ResNet-18 is {'; '.join(parts)}"
    return Verdict("H3", profile, label, finding)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on H2 and H3, from the stored benchmarks (``records`` is not used)."""
    return _judge_layers(profile), _judge_steps(profile)


# There are no trainings: the benchmarks are made by `basis bench`.
STUDY = Study.named("speed", tuple, judge, tolerance=TOLERANCE)
