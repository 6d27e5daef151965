"""Chapter 10: how fast can a network of basis convolutions be trained?

The measurements are those of ``basis bench``: single layers, layers beside their rivals, blocks, and training steps.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import pandas as pd
import torch

from basis.bench.report import BenchReport
from basis.bench.roofline import Machine, kernels, predicted
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.experiments.runs import Record
from basis.experiments.studies.cost import COLUMNS, counts, devices, facts, in_one_format, interval, load_benches
from basis.experiments.studies.study import Study, Verdict, label_of, say
from basis.layers.conv import derives_apart
from basis.training.loop import DTYPES

TOLERANCE = 1.02
WANTED: Mapping[float, float] = {1 / 2: 1.3, 1 / 4: 1.6}  # ratio -> speed-up of a training step
# Rivals of `basis bench rivals` that H2 speaks of, as the text names them.
RIVALS = {"svd": "the SVD pair", "tucker": "Tucker, factorized", "tucker reconstructed": "Tucker, reconstructed"}
ABOUT = ("device", "device_type", "layout", "shape", "channels", "ratio", "speedup", "n")  # of a point of the roofline


def cells(layers: Sequence[BenchReport], rivals: Sequence[BenchReport]) -> list[dict[str, Any]]:
    """The cases that H2 speaks of: ``relative`` is the time of mode auto / that of the ``opponent``, with quartiles."""
    found = []
    for opponents, report in [({"auto": "dense"}, one) for one in layers] + [(RIVALS, one) for one in rivals]:
        about = {key: report.config[key] for key in ("precision", "memory_format")}
        for row in (row for row in report.rows if counts(row) and row["mode"] in opponents):
            if row["shape"] in RESNET18_SHAPES and row["pass"] == "forward+backward" and 1 / 8 <= row["ratio"] <= 3 / 4:
                key, power = ("speedup", -1) if row["mode"] == "auto" else ("versus_basis", 1)
                relative, *quartiles = (row[key + end] ** power for end in ("", "_q1", "_q3"))
                cell = {"relative": relative, "q1": min(quartiles), "q3": max(quartiles)}
                cell |= {"slower": relative > TOLERANCE and cell["q1"] > 1, "opponent": opponents[row["mode"]]}
                found.append(about | cell | {key: row[key] for key in ("shape", "ratio", "n")})
    return found


def _judge_layers(profile: str) -> Verdict:
    """The verdict on H2."""
    layers, rivals = load_benches(profile), load_benches(profile, kind="bench-rivals")
    found = cells(layers, rivals)
    against = {name: [c["slower"] for c in found if c["opponent"] == name] for name in ("dense", *RIVALS.values())}
    against = {name: slower for name, slower in against.items() if slower}
    if "dense" not in against or len(against) < 2:
        return Verdict("H2", profile, "not tested", "layers and their rivals are not both measured on such a device")
    slower, worst = sum(cell["slower"] for cell in found), max(found, key=lambda cell: cell["relative"])
    lost = {name: slow for name, slow in against.items() if any(slow)} or against
    parts = ", ".join(f"{sum(slow)} of {len(slow)} against {name}" for name, slow in lost.items())
    finding = say("findings", "H2", slower=slower, cells=len(found), parts=parts, worst=worst)
    difference, n = "{relative:.2f} [{q1:.2f}, {q3:.2f}] times as long".format(**worst), min(c["n"] for c in found)
    label = label_of(slower == 0, slower > 0)
    return Verdict("H2", profile, label, finding, difference, n, devices([*layers, *rivals]))


def whole_steps(reports: Sequence[BenchReport]) -> list[dict[str, Any]]:
    """Full training steps of basis networks after their report's facts, each against the *best* dense one.

    That is the one of least milliseconds of the same network, batch, format and device (``best_norms``, ``best_step``,
    ``best_ms``). A row that was compared with another one has speed-up and peak memory over the best one: round by
    round where both were timed together (``versus_compiled``), else scaled by medians (``scaled``).
    """
    found, dense = [], _dense_steps(reports)
    for report in reports:
        about = facts(report)
        own_norms = next((row.get("norms", "ordinary") for row in report.rows if row["mode"] == "control"), "ordinary")
        for row in report.rows:
            parts = row.get("coefficients", "dense"), row.get("trained", "both")
            if not counts(row) or row["mode"] == "control" or _is_dense(row) or parts != ("dense", "both"):
                continue
            own = own_norms, row.get("step", "eager")
            known = dense.get(_network(about, row), {})
            best = min(known, key=lambda kind: known[kind][0]) if own in known else own
            step = {"norms": "ordinary", "step": own[1], **about, **row, "scaled": best != own}
            step |= {"best_norms": best[0], "best_step": best[1], "best_ms": known.get(best, (row["dense_ms"],))[0]}
            if best != own:
                together = best[1] in ("compiled", "fast") and "versus_compiled" in row
                key, factor = ("versus_compiled", 1) if together else ("speedup", known[best][0] / known[own][0])
                step |= {f"speedup{quartile}": row[key + quartile] * factor for quartile in ("", "_q1", "_q3")}
                step |= {"dense_ms": known[best][0], "dense_peak_mib": known[best][1], "scaled": not together}
            found.append(step)
    return found


def load_steps(*kinds: str) -> pd.DataFrame:
    """:func:`whole_steps` of the stored benchmarks of these kinds, of CPUs first."""
    rows = whole_steps([one for kind in kinds for one in load_benches(None, kind=kind)])
    more = ["best_norms", "best_step", "best_ms", "scaled", *(key for row in rows for key in row)]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*COLUMNS, *more])))
    return frame.sort_values("device_type", kind="stable", ignore_index=True)


def best_steps(model: str = "resnet18") -> pd.DataFrame:
    """The rows of mode auto of :func:`load_steps` of a network: at the largest batch, the fastest kind of step each."""
    steps = in_one_format(load_steps("bench-train", "bench-plans"))
    steps = steps[(steps["model"] == model) & steps["width"].isna() & (steps["mode"] == "auto")]
    steps = steps[steps["batch_size"] == steps.groupby("device")["batch_size"].transform("max")]
    steps = steps.sort_values(["device_type", "scaled", "ms"])
    return steps.drop_duplicates(["device", "ratio", "share", "norms"], ignore_index=True)


def _is_dense(row: Mapping[str, Any]) -> bool:
    return str(row["mode"]).startswith("dense")


def _network(about: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("model"), *(about.get(key) for key in ("width", "batch_size", "layout", "device"))


def _dense_steps(reports: Sequence[BenchReport]) -> dict[tuple[Any, ...], dict[tuple[str, str], tuple[float, Any]]]:
    """Network -> (norms, kind of step) -> the median milliseconds and the peak memory of its dense step."""
    times: dict[tuple[Any, ...], dict[tuple[str, str], list[tuple[float, Any]]]] = {}
    for report in reports:
        about = facts(report)
        for row in report.rows:
            if counts(row) and (row["mode"] == "control" or _is_dense(row)):
                side = "dense_" if row["mode"] == "control" else ""
                kind = row.get("norms", "ordinary"), row.get("step", "eager")
                known = times.setdefault(_network(about, row), {}).setdefault(kind, [])
                known.append((row[f"{side}ms"], row.get(f"{side}peak_mib")))
    return {
        network: {kind: (median(ms for ms, _ in seen), seen[0][1]) for kind, seen in kinds.items()}
        for network, kinds in times.items()
    }


def step_rows(reports: Sequence[BenchReport]) -> dict[float, Mapping[str, Any]]:
    """Ratio -> the row of the training step that H3 speaks of: with batch normalisation through the basis.

    All parts are trained, in mode auto with dense coefficients, against the best dense step (:func:`whole_steps`); of
    several, the one whose dense step is fastest by the image.
    """
    wanted = {"norms": "through_basis", "mode": "auto", "model": "resnet18", "width": None}
    rows = [row for row in whole_steps(reports) if wanted.items() <= row.items()]
    rows.sort(key=lambda row: (row["best_ms"] / row["batch_size"], row["scaled"], row["dense_ms"]))
    return {row["ratio"]: row for row in reversed(rows)}


def roofline_point(row: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row of ``basis bench layer`` lies: the mode it ran in, and multiply-adds per byte, here and at the ridge.

    ``rate`` is in per cent of the machine's, ``predicted`` the speed-up over the dense layer that the roofline allows.
    """
    shape, k, machine = Shape.parse(row["shape"]), int(row["basis_channels"]), Machine(**row["machine"])
    mode = {"control": "dense", "auto": row["resolved"]}.get(row["mode"], row["mode"])
    apart = derives_apart(torch.device(row["device_type"]), out_channels=shape.out_channels, basis_channels=k)
    mode = "cat" if mode == "factorized" and apart else mode
    size, step = DTYPES[row["precision"]].itemsize, {"batch_size": row["batch_size"], "passes": row["pass"]}
    macs, values = map(sum, zip(*kernels(shape, k, mode, **step), strict=True))
    dense, least = (predicted(shape, k, m, bytes_per_value=size, machine=machine, **step) for m in ("dense", mode))
    rate = 1e5 * macs / row["ms"] / machine.macs_per_second
    point = {"intensity": macs / values / size, "ridge": machine.ridge, "rate": rate, "predicted": dense / least}
    return {key: row[key] for key in ABOUT} | {"mode": mode, **point}


def _judge_steps(profile: str) -> Verdict:
    """The verdict on H3."""
    reports = load_benches(profile, kind="bench-train")
    rows = {ratio: row for ratio, row in step_rows(reports).items() if ratio in WANTED}
    if len(rows) < len(WANTED):
        return Verdict("H3", profile, "not tested", "no training step of such a device is measured")
    parts, speeds, reached, missed = [], [], [], []
    for ratio, wanted in WANTED.items():
        row = rows[ratio]
        share = row["peak_mib"] / row["dense_peak_mib"] if row["peak_mib"] else math.nan
        reached.append(row["speedup_q1"] > wanted and share < 1)
        missed.append(row["speedup_q3"] < wanted or share > 1)
        memory = "memory not measured" if math.isnan(share) else f"{share:.0%} of the memory"
        parts.append(say("findings", "H3", **row, memory=memory))
        speeds.append(f"{interval(row)} times")
    finding = f"a training step of ResNet-18 is {' and '.join(parts)}"
    n, label = min(row["n"] for row in rows.values()), label_of(all(reached), any(missed))
    return Verdict("H3", profile, label, finding, ", ".join(speeds), n, devices(reports))


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on H2 and H3, from the stored benchmarks (``records`` is not used)."""
    return _judge_layers(profile), _judge_steps(profile)


# There are no trainings: the benchmarks are made by `basis bench`.
STUDY = Study.named("speed", tuple, judge, tolerance=TOLERANCE)
