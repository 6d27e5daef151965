"""How long runs take, told before they begin by how long others took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median

import torch
from torch import nn

from basis.experiments.records import Record, load_records
from basis.experiments.runs import Run
from basis.models import build

# GB/s of device memory, by the makers' data sheets. Training a thin network is bound by it (chapter 10).
BANDWIDTH: Mapping[str, float] = {
    "T4": 320, "L4": 300, "P100": 732, "V100": 900, "A10": 600, "A100": 1555, "H100": 3350, "H200": 4800
}  # fmt: skip


def name_of(device: torch.device) -> str:
    """``cpu``, or what a GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@lru_cache
def convolutions(model: str) -> int:
    """How many convolutions a network has."""
    with torch.device("meta"):
        return sum(isinstance(module, nn.Conv2d) for module in build(model).modules())


def epochs_of(runs: Sequence[Run]) -> float:
    """Epochs that the runs train together: with fine-tuning, and of sensitivities those that train."""
    total, taught = 0.0, set()
    for run in runs:
        if run.compression and (run.model, run.seed) not in taught:
            total += run.recipe.epochs  # of the dense network, which such runs of one seed share
            taught.add((run.model, run.seed))
        total += run.compression.epochs if run.compression else run.recipe.epochs
        if run.ladder and run.ladder.tuning:
            layers = convolutions(run.model)
            total += layers * len(run.ladder.measures["fine_tuning"]) * run.ladder.tuning.epochs
    return total


def timed_runs(folder: Path, profile: str) -> list[Record]:
    """By what times of a profile are told: the published records of ``headline``, and all in ``folder``."""
    return load_records(study="headline", profile=profile) + load_records(folder, profile=profile)


def estimate(runs: Sequence[Run], device: str, records: Sequence[Record]) -> float | None:
    """About how many seconds the runs take on ``device``, "cpu" or a GPU's name, by how long the records' runs took.

    Those are of one profile. Between GPUs, times go with the bandwidth of their memories, between networks with the
    number of convolutions. None where no record tells.
    """

    def bandwidth(name: str) -> float:
        return next((value for model, value in BANDWIDTH.items() if model in name), BANDWIDTH["T4"])

    kind = "cpu" if device == "cpu" else "cuda"
    known = [r for r in records if r.environment["device_type"] == kind and "recipe" in r.config]
    paces = []  # seconds of an epoch and layer on the device, by runs on that very one if there are any
    for record in [r for r in known if r.environment["device"] == device] or known:
        slower = 1 if kind == "cpu" else bandwidth(record.environment["device"]) / bandwidth(device)
        seconds = slower * record.result["train_seconds"] / record.environment.get("jobs", 1)
        paces.append(seconds / max(1, len(record.result["curves"])) / convolutions(record.config["model"]))
    models = {run.model for run in runs}
    work = (convolutions(m) * epochs_of([run for run in runs if run.model == m]) for m in models)
    return sum(work) * median(paces) if paces else None


def minutes(seconds: float | None) -> str:
    """Such as ``about 7 minutes``."""
    if seconds is None:
        return "for how long is not known yet"
    many = max(1, round(seconds / 60))
    return f"about {many / 60:.0f} hours" if many > 100 else f"about {many} minute{'s' * (many > 1)}"
