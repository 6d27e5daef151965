"""All records as two tables for others: one row per run, and one row per measured sensitivity."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from basis.experiments.runs import PROFILES, Record
from basis.experiments.studies import STUDIES, valid_records
from basis.experiments.studies.hours import device_seconds
from basis.saving import replacing
from basis.search.table import SensitivityTable

Getter = Callable[[Record], Any]


def _config(name: str) -> Getter:
    return lambda record: record.config.get(name)


def _width(record: Record) -> int | None:
    width = record.config.get("width")
    return width[0] if isinstance(width, list) else width


def _recipe(name: str) -> Getter:
    return lambda record: record.config["recipe"].get(name)


def _result(name: str) -> Getter:
    return lambda record: record.result.get(name)


def _metric(images: str, name: str) -> Getter:
    return lambda record: (record.result.get(images) or {}).get(name)


def _last(name: str) -> Getter:
    return lambda record: record.result["curves"][-1].get(name)


def _choice(name: str) -> Getter:
    return lambda record: (record.config.get("choice") or {}).get(name)


def _environment(name: str) -> Getter:
    return lambda record: record.environment.get(name)


def _json(get: Getter) -> Getter:
    def text(record: Record) -> str | None:
        value = get(record)
        return None if value is None else json.dumps(value, sort_keys=True)

    return text


def _plan(record: Record) -> Any:
    return record.config.get("plan") or record.result.get("plan")


def _alone(record: Record) -> tuple[str | None, int | None]:
    plan = record.config.get("plan") or {}
    return next(iter(plan.items())) if len(plan) == 1 else (None, None)


# Column -> what it is, with its unit, and how it is read from a record.
COLUMNS: Mapping[str, tuple[str, Getter]] = {
    "id": ("identity of the run: a digest of its configuration, and the name of its record", lambda r: r.id),
    "study": ("the study it belongs to, one for each chapter with trainings", _config("study")),
    "profile": ("the scale: cpu, colab or paper", _config("profile")),
    "variant": ("what is compared within a study", _config("variant")),
    "seed": ("of the initial weights, and of the order and augmentation of the images", _config("seed")),
    "model": ("the network", _config("model")),
    "width": ("its width in channels, of its first stage where each has its own; empty: the published one", _width),
    "ratio": ("r = k / C_out of every convolution; empty where a plan, a layer or nothing is set", _config("ratio")),
    "coefficients": ("how basis layers hold their coefficient matrix; empty: dense", _config("coefficients")),
    "layer": ("the other structured layer that was put in, with its size", _config("layer")),
    "mode": ("how basis layers compute", _config("mode")),
    "plan": ("basis channels of each substituted layer, as JSON", _json(_plan)),
    "alone": ("the layer that alone is substituted", lambda r: _alone(r)[0]),
    "basis_channels": ("k of that layer", lambda r: _alone(r)[1]),
    "rule": ("how the plan was selected from sensitivities", _choice("rule")),
    "budget": ("the fraction of the dense network's that the plan may keep", _choice("budget")),
    "budget_unit": ("of what: params or macs", _choice("unit")),
    "data": ("cifar10 or synthetic", _config("data")),
    "images": ("training images used; empty: all that are not held out", _config("images")),
    "held_out": ("training images held out for validation", _config("validation")),
    "epochs": ("passes over the training images", _recipe("epochs")),
    "batch_size": ("images per step", _recipe("batch_size")),
    "lr": ("peak learning rate", _recipe("lr")),
    "weight_decay": ("L2 penalty", _recipe("weight_decay")),
    "recipe": ("the whole recipe, as JSON", _json(_config("recipe"))),
    "test_accuracy": ("fraction of test images, no test-time augmentation", _metric("test", "accuracy")),
    "test_accuracy_flip": ("the same, averaged with the mirror image", _metric("test", "accuracy_flip")),
    "test_loss": ("cross-entropy, nats", _metric("test", "loss")),
    "validation_accuracy": ("fraction of held-out images", _metric("validation", "accuracy")),
    "validation_loss": ("cross-entropy on held-out images, nats", _metric("validation", "loss")),
    "train_accuracy": ("fraction of augmented training images, last epoch", _last("train_accuracy")),
    "train_loss": ("cross-entropy on them, nats, last epoch", _last("train_loss")),
    "parameters": ("stored parameters of the network", _result("parameters")),
    "macs": ("multiply-accumulates of the forward pass of one image", _result("macs")),
    "backward_macs": ("multiply-accumulates of the backward pass of one image", _result("backward_macs")),
    "steps": ("optimizer steps", _result("steps")),
    "train_seconds": ("seconds of training without evaluation; no benchmark: other runs stood beside it",
                      _result("train_seconds")),
    "device_seconds": ("seconds that it kept its device busy, see jobs", device_seconds),
    "jobs": ("runs that shared the device; empty: unknown", _environment("jobs")),
    "device_type": ("cpu or cuda; never compare seconds across it", _environment("device_type")),
    "device": ("the device", _environment("device")),
    "precision": ("of activations", _result("precision")),
    "torch": ("version", _environment("torch")),
    "commit": ("of this repository", _environment("commit")),
    "date": ("when the run ended, UTC", _environment("date")),
}  # fmt: skip

SENSITIVITY_COLUMNS: Mapping[str, str] = {
    "id": "the run whose network was measured, as in the other table",
    "study": "its study", "profile": "its scale", "model": "its network", "width": "its width",
    "measure": "which sensitivity",
    "layer": "the convolution that alone is substituted",
    "out_channels": "its C_out", "basis_channels": "k", "ratio": "k / C_out",
    "value": "the sensitivity, in the measure's unit; larger is worse",
    "low": "lower end of its 95 % interval, where there is one", "high": "upper end",
    "n": "images or seeds that the interval rests on",
    "kl": "divergence from the dense network's predictions, nats",
    "forward": "forward passes that it took, in images", "backward": "backward passes",
    "seconds": "time that it took, on the run's device",
    "saved_params": "parameters saved", "saved_macs": "forward multiply-accumulates saved",
    "saved_backward_macs": "backward multiply-accumulates saved",
}  # fmt: skip


def sound_records(folder: Path | None = None) -> list[Record]:
    """Every record that a study lists, but those on synthetic images."""
    return [
        record
        for study in STUDIES.values()
        for profile in PROFILES
        if profile != "smoke"
        for record in valid_records(study, profile, folder)
    ]


def runs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, with :data:`COLUMNS`."""
    frame = pd.DataFrame([{name: get(record) for name, (_, get) in COLUMNS.items()} for record in records])
    whole = ("width", "basis_channels", "images", "jobs", "macs", "backward_macs")
    return frame.reindex(columns=list(COLUMNS)).astype(dict.fromkeys(whole, "Int64"))


def sensitivities_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per network, measure, layer and k, with :data:`SENSITIVITY_COLUMNS`."""
    frames = []
    for record in records:
        for measure, lines in (record.result.get("tables") or {}).items():
            frame = SensitivityTable.from_lines(lines).to_frame()
            about = {name: record.config.get(name) for name in ("study", "profile", "model", "width")}
            frames.append(frame.assign(id=record.id, measure=measure, **about))
    columns = list(SENSITIVITY_COLUMNS)
    return pd.concat(frames)[columns].reset_index(drop=True) if frames else pd.DataFrame(columns=columns)


def write_tables(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write both tables as ``.csv.gz``, and as ``.parquet`` where pyarrow is installed; equal records, equal bytes."""
    paths = []
    for name, frame in (("runs", runs_frame(records)), ("sensitivities", sensitivities_frame(records))):
        paths.append(folder / f"{name}.csv.gz")
        with replacing(paths[-1]) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            packed.write(frame.to_csv(index=False).encode())
        if importlib.util.find_spec("pyarrow") is not None:
            paths.append(folder / f"{name}.parquet")
            with replacing(paths[-1]) as file:
                frame.to_parquet(file, index=False)
    return paths
