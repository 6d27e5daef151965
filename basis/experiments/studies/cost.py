"""Chapter 2: what does a basis convolution cost, counted and measured?

What is measured are the benchmarks of ``basis bench layer``, one file for each machine, precision and memory format
under ``results/bench/``; counting needs no runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from basis.bench.report import BenchReport
from basis.bench.shapes import RESNET18_SHAPES, Shape
from basis.environment import results_folder
from basis.experiments.runs import DEVICES, Record, Run
from basis.experiments.studies.study import Study, Verdict, label_of, verdict

RATIO, NARROWEST = 0.5, 128


def load_benches(profile: str | None, *, kind: str = "bench-layer", folder: Path | None = None) -> list[BenchReport]:
    """The stored benchmarks of a kind: of CPUs for the profile ``cpu``, of GPUs for ``colab`` and ``paper``, or all."""
    reports = [BenchReport.load(path) for path in sorted(((folder or results_folder()) / "bench").glob("*.json"))]
    of_kind = [report for report in reports if report.kind == kind]
    if profile is None:
        return of_kind
    return [report for report in of_kind if report.environment["device_type"] == DEVICES.get(profile)]


def devices(reports: Sequence[BenchReport]) -> str:
    """The names of the devices that were measured."""
    return ", ".join(sorted({report.environment["device"] for report in reports}))


def find_training_bench(
    profile: str, run: Run, *, trained: Sequence[str] = (), coefficients: Sequence[str] = ()
) -> BenchReport | None:
    """The stored benchmark of training steps like those of ``run``, with all these parts or forms, or None.

    In factorized mode, with the network, batch size and (unless the run leaves it open) precision of the run.
    """
    wanted: dict[str, object] = {"norms": ["ordinary"], "steps": ["eager"], "batch_size": run.recipe.batch_size}
    wanted |= {"model": run.model, "width": run.width}
    wanted |= {} if run.recipe.precision == "auto" else {"precision": run.recipe.precision}
    listed = {"modes": ("factorized",), "trained": trained, "coefficients": coefficients}
    for report in load_benches(profile, kind="bench-train"):
        has = {"norms": ["ordinary"], "steps": ["eager"], **report.config}
        if wanted.items() <= has.items() and all(set(has.get(key, ())) >= set(names) for key, names in listed.items()):
            return report
    return None


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a row says how long a layer takes: not if it failed, nor if a GPU waited for its host to launch it."""
    return not row.get("error") and row.get("timed") != "host-bound"


def judged_cells(reports: Sequence[BenchReport]) -> list[Mapping[str, Any]]:
    """The rows that the rule speaks of."""
    rows = [row for report in reports for row in report.rows if counts(row) and row["shape"] in RESNET18_SHAPES]
    rows = [row for row in rows if row["mode"] == "auto" and row["ratio"] == RATIO]
    return [row for row in rows if Shape.parse(row["shape"]).out_channels >= NARROWEST]


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C2, from the stored benchmarks (``records`` is not used)."""
    reports = load_benches(profile)
    cells = judged_cells(reports)
    if not cells:
        return (Verdict("C2", profile, "not tested", "no benchmark of such a device is stored"),)
    faster = sum(row["speedup_q1"] > 1 for row in cells)
    speedups = [row["speedup"] for row in cells]
    return (verdict(
        "C2", profile, label_of(faster == len(cells), not faster), low=min(speedups), high=max(speedups),
        n=min(row["n"] for row in cells), faster=faster, cells=len(cells), devices=devices(reports),
    ),)  # fmt: skip


# There are no trainings: the benchmarks are made by `basis bench`.
STUDY = Study.named("cost", tuple, judge, narrowest=NARROWEST)
