"""A run: the frozen configuration of one training, its identity, and the files that belong to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from basis.experiments.comparison import Compression
from basis.experiments.records import Record, digest, identity, load_records, read_record  # noqa: F401  others do
from basis.layers.conv import Mode
from basis.saving import plain
from basis.search.measures import singular_energies
from basis.training.loop import Recipe, choose_device, choose_precision

PROFILES = ("smoke", "small", "paper")
ARCHIVED = "cpu"  # an older scale, of which there are records; it is shown until ``small`` has replaced it
# The kind of device that a profile, or its benchmarks, are meant for; "smoke" and "small" take any.
DEVICES: Mapping[str, str] = {"cpu": "cpu", "paper": "cuda"}


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sensitivities of a trained dense network, measured at the end of its run.

    ``measures`` are names of :data:`basis.search.table.MEASURES` with the ratios of each, ``multiple`` is what
    every k is a multiple of. They are measured on ``images`` held-out images, after recalibration on ``calibration``
    training images; the measure "fine_tuning" trains by ``tuning``.
    """

    measures: Mapping[str, Sequence[float]]
    multiple: int = 8
    images: int = 2000
    calibration: int = 2000
    tuning: Recipe | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan selected by ``rule`` (and its ``ratio``) of :func:`basis.select` from what another run has measured.

    ``budget`` is the fraction of the dense network's ``unit``, "params" or "macs", that may be kept; ``table`` is the
    identity of the run with the ladder, ``measure`` which of its measures ranks the layers, and ``exclude`` are
    patterns of layers that stay dense.
    """

    rule: str
    unit: str
    budget: float
    table: str
    measure: str
    ratio: float | None = None
    exclude: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, fully described."""

    study: str  # with `profile`: where it belongs; no part of its identity
    profile: str
    variant: str  # what is compared, such as "r=1/2"
    seed: int  # of the initial weights and of the order and augmentation of the images
    model: str = "resnet18"  # a network of basis.models, of this width
    width: int | Sequence[int] | None = None
    # What becomes basis: every convolution at this ratio, or those of `plan` (layer -> basis channels) or `choice`.
    ratio: float | None = None
    mode: Mode = "auto"
    data: str = "cifar10"  # or "synthetic"
    images: int | None = None  # training images; None: all that are left
    validation: int = 0  # training images held out first
    recipe: Recipe = field(default_factory=Recipe)
    plan: Mapping[str, int] | None = None
    choice: Choice | None = None
    ladder: Ladder | None = None
    test: bool | None = None  # False where the test images are not looked at
    coefficients: str | None = None  # see basis.layers.coefficients.Form
    layer: str | None = None  # another structured layer, for the convolutions that the pattern `include` names
    include: str | None = None
    compression: Compression | None = None  # how the network is made smaller after it was trained, dense

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as plain values, as a record holds it."""
        return plain(asdict(self))

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits that identify what is done, and name the record."""
        return identity(self.config)


def record_path(folder: Path, run: Run) -> Path:
    """The file of a run's record."""
    return folder / run.study / run.profile / f"{run.id}.json"


def checkpoint_path(folder: Path, run: Run, device: torch.device) -> Path:
    """Where a run keeps its checkpoint on this kind of device; another kind computes other numbers."""
    name = f"{run.id}-{device.type}-{choose_precision(device)}.pt"
    return record_path(folder, run).parent / "checkpoints" / name


def device_for(profile: str, name: str | None = None) -> torch.device:
    """The named device, or the one that records of ``profile`` are made on.

    Raises ``ValueError`` for a device of another kind; comparing its times would compare machines.
    """
    kind = DEVICES.get(profile)
    device = torch.device("cpu") if name is None and kind == "cpu" else choose_device(name)
    if kind not in (None, device.type):
        raise ValueError(f"the profile {profile!r} is for {kind} devices, but the device is {device}")
    return device


def spectrum(model: torch.nn.Module, ratios: Sequence[float] = (0.125, 0.25, 0.5, 0.75)) -> dict[str, dict[str, float]]:
    """For every convolution: the relative Frobenius error of its best approximation at each ratio."""
    errors: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            energy = singular_energies(module.weight)
            kept = {r: int(max(1, round(r * module.out_channels))) for r in ratios}
            errors[name] = {str(r): float((energy[k:].sum() / energy.sum()).sqrt()) for r, k in kept.items()}
    return errors


def duration(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``9m``, ``1h30m``; a bare number counts seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 90s, 9m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds
