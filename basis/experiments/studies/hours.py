"""How long runs have kept a device busy, and how long the missing ones will."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from basis.experiments.runs import DEVICES, Record, Run
from basis.search.table import SensitivityTable

KINDS = {"cpu": "CPU", "cuda": "GPU"}


def kind(record: Record) -> str:
    """The kind of device that made a record, "cpu" or "cuda"."""
    return str(record.environment.get("device_type", "cpu"))


def device_seconds(record: Record) -> float:
    """Seconds of training, of its preparation and of the ladder; shared out where runs stood side by side.

    What is not timed is not in it: reading data, evaluation, and a teacher's training.
    """
    tables = record.result.get("tables") or {}
    ladder = sum(SensitivityTable.from_lines(lines).seconds for lines in tables.values())
    training = record.result["train_seconds"] + record.result.get("setup_seconds", 0.0)
    return float(training + ladder) / record.environment.get("jobs", 1)


def spent(records: Iterable[Record]) -> dict[str, float]:
    """Device seconds by kind of device, which are never added up."""
    total: dict[str, float] = {}
    for record in records:
        total[kind(record)] = total.get(kind(record), 0.0) + device_seconds(record)
    return total


def expected(missing: Iterable[Run], records: Sequence[Record]) -> tuple[dict[str, float], int]:
    """Device seconds that the missing runs will take, by kind of device, and how many cannot be told.

    A run takes as long as the recorded ones of its variant did on that kind of device; where there are none, as those of
    its network that were trained for as many epochs and measured no ladder either.
    """
    known: dict[tuple[str, Any], list[float]] = {}
    for record in records:
        for key in (record.config["variant"], _likeness(record.config)):
            known.setdefault((kind(record), key), []).append(device_seconds(record))
    kinds = sorted({device for device, _ in known})
    total: dict[str, float] = {}
    unknown = 0
    for run in missing:
        device = DEVICES.get(run.profile, kinds[0] if kinds else "cpu")
        like = known.get((device, run.variant)) or known.get((device, _likeness(run.config)))
        if like:
            total[device] = total.get(device, 0.0) + fmean(like)
        else:
            unknown += 1
    return total, unknown


def _likeness(config: Any) -> tuple[Any, ...]:
    return config["model"], str(config["width"]), config["recipe"]["epochs"], config.get("ladder") is None


def in_hours(seconds: dict[str, float]) -> str:
    """Such as ``0.25 h CPU, 1.50 h GPU``; empty for nothing."""
    return ", ".join(f"{value / 3600:.2f} h {KINDS.get(device, device)}" for device, value in sorted(seconds.items()))


@dataclass
class Pace:
    """How long runs take on one device, from those that were done there; it learns as more are done."""

    _seconds: dict[tuple[Any, ...], list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record], device: str, jobs: int) -> Pace:
        """From the records that were made on the device of that name, as many runs side by side."""
        pace = cls()
        for record in records:
            if record.environment.get("device") == device and record.environment.get("jobs", 1) == jobs:
                pace.learn(record.config, device_seconds(record) * jobs)
        return pace

    def learn(self, config: Any, seconds: float) -> None:
        """A run of this configuration took so long."""
        for key in ((config["variant"], *_likeness(config)), _likeness(config)):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds(self, config: Any) -> float | None:
        """What such a run will take at most: the longest of the last three of its variant, else of those like it."""
        own = self._seconds.get((config["variant"], *_likeness(config))) or self._seconds.get(_likeness(config), [])
        return max(own[-3:], default=None)
