"""All runs as one tidy table, a row a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from basis.experiments.records import Record, device_seconds
from basis.experiments.runs import ARCHIVED, PROFILES
from basis.experiments.studies import STUDIES, valid_records


def _read(record: Record, way: str) -> Any:
    """What ``way`` leads to, such as "result.test.accuracy"; None where it ends before."""
    value: Any = vars(record)
    for step in way.split("."):
        value = value[int(step)] if isinstance(value, list) else (value or {}).get(step)
    return value


def _alone(record: Record) -> tuple[str | None, int | None]:
    plan = record.config.get("plan") or {}
    return next(iter(plan.items())) if len(plan) == 1 else (None, None)


def _width(record: Record) -> int | None:
    width = record.config.get("width")
    return width[0] if isinstance(width, list) else width


def _plan(record: Record) -> str | None:
    plan = record.config.get("plan") or record.result.get("plan")
    return plan and json.dumps(plan, sort_keys=True)


# Column -> what it is, with its unit, and where a record holds it.
COLUMNS: Mapping[str, tuple[str, str | Callable[[Record], Any]]] = {
    "id": ("identity of the run: a digest of its configuration, and the name of its record", "id"),
    "study": ("the study it belongs to, one for each chapter with trainings", "config.study"),
    "profile": ("the scale: small, cpu or paper", "config.profile"),
    "variant": ("what is compared within a study", "config.variant"),
    "seed": ("of the initial weights, and of the order and augmentation of the images", "config.seed"),
    "model": ("the network", "config.model"),
    "width": ("its width in channels, of its first stage where each has its own; empty: the published one", _width),
    "ratio": ("r = k / C_out of every convolution; empty where a plan, a layer or nothing is set", "config.ratio"),
    "coefficients": ("how basis layers hold their coefficient matrix; empty: dense", "config.coefficients"),
    "layer": ("the other structured layer that was put in, with its size", "config.layer"),
    "mode": ("how basis layers compute", "config.mode"),
    "plan": ("basis channels of each substituted layer, as JSON", _plan),
    "alone": ("the layer that alone is substituted", lambda r: _alone(r)[0]),
    "basis_channels": ("k of that layer", lambda r: _alone(r)[1]),
    "rule": ("how the plan was selected from sensitivities", "config.choice.rule"),
    "budget": ("the fraction of the dense network's that the plan may keep", "config.choice.budget"),
    "budget_unit": ("of what: params or macs", "config.choice.unit"),
    "data": ("cifar10 or synthetic", "config.data"),
    "images": ("training images used; empty: all that are not held out", "config.images"),
    "held_out": ("training images held out for validation", "config.validation"),
    "epochs": ("passes over the training images", "config.recipe.epochs"),
    "batch_size": ("images per step", "config.recipe.batch_size"),
    "lr": ("peak learning rate", "config.recipe.lr"),
    "weight_decay": ("L2 penalty", "config.recipe.weight_decay"),
    "recipe": ("the whole recipe, as JSON", lambda r: json.dumps(r.config["recipe"], sort_keys=True)),
    "test_accuracy": ("fraction of test images, no test-time augmentation", "result.test.accuracy"),
    "test_accuracy_flip": ("the same, averaged with the mirror image", "result.test.accuracy_flip"),
    "test_loss": ("cross-entropy, nats", "result.test.loss"),
    "validation_accuracy": ("fraction of held-out images", "result.validation.accuracy"),
    "validation_loss": ("cross-entropy on held-out images, nats", "result.validation.loss"),
    "train_accuracy": ("fraction of augmented training images, last epoch", "result.curves.-1.train_accuracy"),
    "train_loss": ("cross-entropy on them, nats, last epoch", "result.curves.-1.train_loss"),
    "parameters": ("stored parameters of the network", "result.parameters"),
    "macs": ("multiply-accumulates of the forward pass of one image", "result.macs"),
    "backward_macs": ("multiply-accumulates of the backward pass of one image", "result.backward_macs"),
    "steps": ("optimizer steps", "result.steps"),
    "train_seconds": ("seconds of training without evaluation; no benchmark: other runs stood beside it",
                      "result.train_seconds"),
    "device_seconds": ("seconds that it kept its device busy, see jobs", device_seconds),
    "jobs": ("runs that shared the device; empty: unknown", "environment.jobs"),
    "device_type": ("cpu or cuda; never compare seconds across it", "environment.device_type"),
    "device": ("the device", "environment.device"),
    "precision": ("of activations", "result.precision"),
    "torch": ("version", "environment.torch"),
    "commit": ("of this repository", "environment.commit"),
    "date": ("when the run ended, UTC", "environment.date"),
}  # fmt: skip


def sound_records(folder: Path | None = None) -> list[Record]:
    """Every record that a study lists, and the archived ones; none on synthetic images."""
    places = product(STUDIES.values(), [profile for profile in (*PROFILES, ARCHIVED) if profile != "smoke"])
    return [record for study, profile in places for record in valid_records(study, profile, folder)]


def runs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per run, with :data:`COLUMNS`."""
    ways = {name: way for name, (_, way) in COLUMNS.items()}
    rows = [{name: _read(r, way) if isinstance(way, str) else way(r) for name, way in ways.items()} for r in records]
    whole = ("width", "basis_channels", "images", "jobs", "macs", "backward_macs")
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(whole, "Int64"))


def csv(frame: pd.DataFrame) -> bytes:
    """A table as text; six digits, so that it is the same wherever it is written."""
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
