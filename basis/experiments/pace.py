"""How long runs kept a device busy, and how long another one like them will."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from basis.experiments.records import Record
from basis.search.table import SensitivityTable

KINDS = {"cpu": "CPU", "cuda": "GPU"}


def device_seconds(record: Record) -> float:
    """Seconds of training, its preparation and the sensitivities; shared out where runs stood side by side.

    Reading data, evaluation and a teacher's training are not timed.
    """
    tables = record.result.get("tables") or {}
    measuring = sum(SensitivityTable.from_lines(lines).seconds for lines in tables.values())
    training = record.result["train_seconds"] + record.result.get("setup_seconds", 0.0)
    return float(training + measuring) / record.environment.get("jobs", 1)


def spent(records: Iterable[Record]) -> dict[str, float]:
    """Device seconds by kind of device ("cpu", "cuda"), which are never added up."""
    total: dict[str, float] = {}
    for record in records:
        kind = str(record.environment.get("device_type", "cpu"))
        total[kind] = total.get(kind, 0.0) + device_seconds(record)
    return total


def in_hours(seconds: Mapping[str, float]) -> str:
    """Such as ``0.25 h CPU, 1.50 h GPU``; empty for nothing."""
    return ", ".join(f"{value / 3600:.2f} h {KINDS.get(device, device)}" for device, value in sorted(seconds.items()))


class Pace:
    """How long runs take on one device; it learns as more are done."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Any, ...], list[float]] = {}

    @classmethod
    def of(cls, records: Iterable[Record], device: str, jobs: int) -> Pace:
        """From the records made on the device of that name, with as many runs side by side."""
        pace = cls()
        for record in records:
            if record.environment.get("device") == device and record.environment.get("jobs", 1) == jobs:
                pace.learn(record.config, device_seconds(record) * jobs)
        return pace

    def learn(self, config: Mapping[str, Any], seconds: float) -> None:
        """A run of this configuration took so long."""
        for key in _likenesses(config):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds(self, config: Mapping[str, Any]) -> float | None:
        """The longest of the last three runs of its variant, else of those like it; None where there was none."""
        known = (self._seconds.get(key, [])[-3:] for key in _likenesses(config))
        return next((max(some) for some in known if some), None)


def _likenesses(config: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    like = (config["model"], str(config["width"]), config["recipe"]["epochs"], config.get("ladder") is None)
    return [(config["variant"], *like), like]
