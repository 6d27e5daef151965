"""Chapter 2: what does a basis convolution cost, counted and measured?

Counting needs no runs. What is measured are the benchmarks of ``basis bench layer``, one file for each
machine, precision and memory format under ``results/bench/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from basis.bench.report import BenchReport
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.environment import results_folder
from basis.experiments.runs import DEVICES, Record, Run
from basis.experiments.studies.study import Label, Study, Verdict

RATIO, NARROWEST = 0.5, 128

RULE = (
    f"C2 is judged by the measured 3x3 layers of ResNet-18 with at least {NARROWEST} output channels at r = 1/2 in "
    "mode auto, against the dense layer of equal shape, batch, precision and memory format, interleaved. A cell is one "
    "shape, pass (forward; forward and backward), precision and memory format. Reproduced on a kind of device if the "
    "lower quartile of the speed-up is above 1 in every cell, partly if in some, not reproduced if in none."
)


def load_benches(profile: str, *, kind: str = "bench-layer", folder: Path | None = None) -> list[BenchReport]:
    """The stored benchmarks of a kind, of CPUs for the profile ``cpu`` and of GPUs for ``colab`` and ``paper``."""
    wanted = DEVICES.get(profile)
    files = sorted(((folder or results_folder()) / "bench").glob("*.json"))
    reports = [BenchReport.load(path) for path in files]
    return [r for r in reports if r.kind == kind and r.environment["device_type"] == wanted]


def find_training_bench(
    profile: str, run: Run, *, trained: Sequence[str] = (), coefficients: Sequence[str] = ()
) -> BenchReport | None:
    """The stored benchmark of training steps like those of ``run``, with all these parts or forms, if there is one.

    In factorized mode, with the network, batch size and (unless the run leaves it open) precision of the run.
    """
    wanted: dict[str, object] = {"model": run.model, "width": run.width, "batch_size": run.recipe.batch_size}
    wanted |= {} if run.recipe.precision == "auto" else {"precision": run.recipe.precision}
    listed = {"modes": ("factorized",), "trained": trained, "coefficients": coefficients}
    for report in load_benches(profile, kind="bench-train"):
        has = report.config
        plain = all(has.get(key, [usual]) == [usual] for key, usual in (("norms", "ordinary"), ("steps", "eager")))
        if (
            plain
            and all(has[key] == value for key, value in wanted.items())
            and all(set(has.get(key, ())) >= set(values) for key, values in listed.items())
        ):
            return report
    return None


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a row says how long a layer takes: not if it failed, nor if a GPU waited for its host to launch it."""
    return not row.get("error") and row.get("timed") != "host-bound"


def judged_cells(reports: Sequence[BenchReport]) -> list[Mapping[str, Any]]:
    """The rows that the rule speaks of."""
    return [
        row
        for report in reports
        for row in report.rows
        if counts(row) and row["mode"] == "auto" and row["ratio"] == RATIO and row["shape"] in RESNET18_SHAPES
        if Shape.parse(row["shape"]).out_channels >= NARROWEST
    ]


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C2 by :data:`RULE`, from the stored benchmarks (``records`` is not used)."""
    reports = load_benches(profile)
    cells = judged_cells(reports)
    if not cells:
        return (Verdict("C2", profile, "not tested", "no benchmark of such a device is stored"),)
    faster = sum(row["speedup_q1"] > 1 for row in cells)
    label: Label = "reproduced" if faster == len(cells) else "partly" if faster else "not reproduced"
    speedups = sorted(row["speedup"] for row in cells)
    device = ", ".join(sorted({report.environment["device"] for report in reports}))
    finding = (
        f"at r = 1/2 {faster} of {len(cells)} measured cells are faster than dense, "
        f"by factors from {speedups[0]:.2f} to {speedups[-1]:.2f} ({device}; "
        f"medians of {min(row['n'] for row in cells)} or more interleaved rounds)"
    )
    return (Verdict("C2", profile, label, finding),)


def plan(profile: str) -> tuple[Run, ...]:
    """No trainings: the benchmarks are made by ``basis bench``."""
    return ()


STUDY = Study(
    name="cost",
    title="What does it cost, forward and backward?",
    chapter="02_what_does_it_cost",
    claims=("C2",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
    benches=("bench-layer", "bench-train"),
)
