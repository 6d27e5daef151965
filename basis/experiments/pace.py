"""How long runs kept a device busy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from basis.experiments.records import Record
from basis.search.table import SensitivityTable

KINDS = {"cpu": "CPU", "cuda": "GPU"}


def device_seconds(record: Record) -> float:
    """Seconds of training, its preparation and the sensitivities; shared out where runs stood side by side.

    Reading data, evaluation and a teacher's training are not timed.
    """
    tables = record.result.get("tables") or {}
    measuring = sum(cell.seconds for lines in tables.values() for cell in SensitivityTable.from_lines(lines).cells)
    training = record.result["train_seconds"] + record.result.get("setup_seconds", 0.0)
    return float(training + measuring) / record.environment.get("jobs", 1)


def spent(records: Iterable[Record]) -> dict[str, float]:
    """Device seconds by kind of device ("cpu", "cuda"), which are never added up."""
    total: dict[str, float] = defaultdict(float)
    for record in records:
        total[record.environment.get("device_type", "cpu")] += device_seconds(record)
    return dict(total)


def in_hours(seconds: Mapping[str, float]) -> str:
    """Such as ``0.25 h CPU, 1.50 h GPU``; empty for nothing."""
    return ", ".join(f"{value / 3600:.2f} h {KINDS.get(device, device)}" for device, value in sorted(seconds.items()))
