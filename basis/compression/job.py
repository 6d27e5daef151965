"""A job of compressing a network: what was asked, checked whole before any long work, and the parts it is done with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basis.batches import outputs_of
from basis.bench.timing import BenchReport, Precision, Setting
from basis.compression.images import Loader, Pictures, Split, hold_out, open_pictures, preparation_for, some
from basis.compression.networks import Network, Preparation, Weights, build_network, fit_weights, read_weights
from basis.compression.workplace import Workplace
from basis.environment import environment
from basis.inference import is_installed
from basis.layers.batchnorm import copy_of
from basis.search.journal import different, structure
from basis.search.selection import UNITS, InfeasibleBudget, select
from basis.search.sensitivity import called_layers, candidate_layers, fingerprint_of, layer_costs
from basis.search.table import MEASURES, Cell, SensitivityTable
from basis.substitution import substitute
from basis.text import few
from basis.training.loop import choose_device

Say = Callable[[str], object]  # is told what is going on, a line at a time

SMALL = 64  # pixels up to which images are small, so that more of them are affordable
ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be done; ``basis compress --help`` explains each.

    Attributes:
        model: a name of torchvision or timm, or ``package.module:factory``.
        weights: safetensors, or a state that ``torch.save`` wrote.
        data: a folder with train/CLASS/* and val/CLASS/*, or an npz.
        budget: unit ("params", "macs", "backward_macs", "milliseconds") -> what the network may keep: a fraction of
            the dense network's in (0, 1], or, above 1, an absolute number.
        out: the folder to fill.
        measure: of the sensitivity; "oneshot_bn" unless given, "oneshot" where there is no batch normalisation.
        ratios, multiple, include, exclude: which candidates each layer has, as for :func:`basis.sensitivity`.
        epochs: of fine-tuning; 0 for none.
        lr: peak learning rate of fine-tuning.
        distil: fine-tuning learns from the dense network's outputs, too.
        batch_size: of fine-tuning, of the evaluations, and of the latencies.
        image_size, mean, std: how images are prepared; as the network's own weights are, unless given.
        calibration_images: training images that the new layers and the batch normalisations are fitted on, and
            the most held out images that a layer's sensitivity is measured on; 2,000 of at most 64 pixels, else 256.
        validation_images: how many are held out; a tenth of the training images, at most 2,000, unless given.
        device: the GPU where there is one, unless given.
        precision: of the latencies.
        seed: of all randomness.
        resume: go on with a run of the same settings; else its folder is refused.
        table: a ``sensitivity.jsonl`` of an earlier run on the same weights and images, to go on from; so several
            budgets need one analysis.
    """

    model: str
    weights: str
    data: str
    budget: Mapping[str, float]
    out: str
    measure: str | None = None
    ratios: Sequence[float] = (0.5, 0.25)
    multiple: int = 8
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    epochs: int = 1
    lr: float = 0.01
    distil: bool = False
    batch_size: int = 64
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    calibration_images: int | None = None
    validation_images: int | None = None
    device: str | None = None
    precision: Precision = "fp32"
    seed: int = 0
    resume: bool = True
    table: str | None = None

    def __post_init__(self) -> None:
        if not self.budget:
            raise ValueError(f"there is no budget; give at least one of {', '.join(UNITS)}, such as params=0.5")
        for unit, value in self.budget.items():
            if unit not in UNITS or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"the budget has {unit}={value}, but {_BUDGET}")
        for name, least in (("epochs", 0), ("batch_size", 1), ("calibration_images", 1), ("validation_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, but it must be at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}, but it must be positive and finite")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, but it must be at least 0 and below 2^63")


_BUDGET = (
    f"a budget is UNIT=X, with a unit of {', '.join(UNITS)} and a fraction X such as 0.5 or 50%, or a number above 1 "
    "such as 5M"
)
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def parse_budget(texts: Sequence[str]) -> dict[str, float]:
    """``["params=0.5", "macs=1.2G"]`` as unit -> number. Raises ``ValueError`` for what is no budget."""
    budget: dict[str, float] = {}
    for text in texts:
        found = re.fullmatch(r"(\w+)=(\d+\.?\d*|\.\d+)([kMG%]?)", text.strip())
        if not found or found[1] not in UNITS or not float(found[2]):
            raise ValueError(f"the budget is {text!r}, but {_BUDGET}")
        if found[1] in budget:
            raise ValueError(f"the budget names {found[1]} twice")
        percent = found[3] == "%"
        if percent and float(found[2]) > 100:
            raise ValueError(f"the budget is {text!r}, but no more than 100% of the dense network's can be kept")
        budget[found[1]] = float(found[2]) / 100 if percent else float(found[2]) * _SCALE[found[3]]
    return budget


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings that were found good, and everything that is made from them.

    Attributes:
        model: the dense network with its weights, on the device, in evaluation mode.
        weights: what was read; ``notes`` says what was changed to fit it in.
        validation, calibration: of training images: the held out ones, and those to fit layers on.
        scored: the held out images that sensitivities are measured on.
        left_out: what will not be made -> why.
        candidates: what can be chosen for each layer, with its cost, as if nothing lost anything.
    """

    settings: Settings
    say: Say
    progress: bool
    network: Network
    model: nn.Module
    weights: Weights
    notes: tuple[str, ...]
    pictures: Pictures
    preparation: Preparation
    validation: Split
    calibration: Split
    scored: Split
    measure: str
    device: torch.device
    place: Workplace
    left_out: Mapping[str, str]
    candidates: SensitivityTable

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return self.place.folder

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.pictures.channels, self.preparation.size, self.preparation.size)

    @property
    def setting(self) -> Setting:
        """How times are taken."""
        s = self.settings
        return Setting(device=str(self.device), precision=s.precision, batch_size=s.batch_size, seconds=60, seed=s.seed)

    def loader(self, split: Split, *, augment: bool = False) -> Loader:
        """Batches of a split."""
        return Loader(
            split, self.preparation, batch_size=self.settings.batch_size, device=self.device, augment=augment,
            seed=self.settings.seed,
        )  # fmt: skip


def prepare(settings: Settings, *, say: Say | None = None) -> Job:
    """Read and check everything that was given; nothing is written.

    Raises:
        FileNotFoundError: where the ``table`` is not there.
        ValueError: each in one sentence, for an unknown network, weights that do not fit it, data without classes,
            a network of another number of classes, one without a convolution that can be replaced, a device that is
            not there, and a folder that holds something else or cannot be written to.
        InfeasibleBudget: for a budget in parameters or MACs that the candidates cannot meet.
    """
    device = _device(settings.device)
    table = None if settings.table is None else SensitivityTable.load(settings.table)
    pictures = open_pictures(settings.data)
    total = len(pictures.train)
    pictures = hold_out(pictures, settings.validation_images or min(2000, max(1, total // 10)), seed=settings.seed)
    weights = read_weights(settings.weights)
    network = build_network(settings.model, classes=len(pictures.classes))
    notes = fit_weights(network.model, weights, settings.weights, classes=len(pictures.classes))
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in network.model.parameters()):
        notes = (*notes, "the network is worked on in float32")
    model = network.model.float().to(device).eval()
    preparation = preparation_for(
        pictures, network.preparation, size=settings.image_size, mean=settings.mean, std=settings.std
    )
    input_size = (pictures.channels, preparation.size, preparation.size)
    _check_outputs(model, pictures, input_size, device)
    _check_training(model, input_size, device, settings)
    few_images = settings.calibration_images or (2000 if preparation.size <= SMALL else 256)
    held = pictures.validation or pictures.train
    norms = any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
    measure = settings.measure or ("oneshot_bn" if norms else "oneshot")
    if measure not in MEASURES or measure.endswith(("tuning", "training")):
        usable = few((name for name in MEASURES if not name.endswith(("tuning", "training"))), limit=9)
        raise ValueError(f"the measure is {measure!r}, but it must be one of {usable}")
    if measure == "oneshot_bn" and not norms:
        raise ValueError("the network has no batch normalisation to recalibrate; use the measure oneshot")
    identity = _identity(settings, model, weights, pictures, preparation, device, measure)
    place = Workplace(Path(settings.out), identity, _versions(network, device))
    job = Job(
        settings=settings, say=say or (lambda line: None), progress=say is not None, network=network, model=model,
        weights=weights, notes=notes, pictures=pictures, preparation=preparation, validation=held,
        calibration=some(pictures.train, few_images, seed=settings.seed),
        scored=some(held, few_images, seed=settings.seed), measure=measure, device=device, place=place,
        left_out=_left_out(), candidates=_candidates(model, settings, measure, input_size),
    )  # fmt: skip
    check_budget(job)
    if table is not None:
        _check_table(job, table)
    place.check(resume=settings.resume)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    place.check_room(4 * size + 3 * size * (settings.epochs > 0) + 10_000_000)
    _tell(job)
    return job


def _device(name: str | None) -> torch.device:
    try:
        device = choose_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name!r} is no device of this machine, which has a CPU (cpu) and "
                         f"{torch.cuda.device_count()} GPUs") from error  # fmt: skip
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device is {name!r}, but times are taken on cpu and cuda only")
    return device


def _check_outputs(
    model: nn.Module, pictures: Pictures, input_size: tuple[int, int, int], device: torch.device
) -> None:
    """Run the network on two images and on one: refuse what it cannot run on, or another number of classes."""
    for count, said in ((1, "one image"), (2, "two images")):
        x = torch.ones(count, *input_size, device=device)
        y = outputs_of(model, x)
        if not isinstance(y, Tensor) or y.dim() != 2 or len(y) != count:
            what = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"the network returns {what} for {said}, but logits (N, classes) can be compressed")
    with torch.no_grad():
        model(x)
    if not (x == 1).all():
        raise ValueError("the network changes its input in place; let its forward pass begin with x = x.clone()")
    if y.shape[1] != len(pictures.classes):
        raise ValueError(
            f"the network has {y.shape[1]} outputs, but the data have {len(pictures.classes)} classes "
            f"({few(pictures.classes)})"
        )


def _check_training(
    model: nn.Module, input_size: tuple[int, int, int], device: torch.device, settings: Settings
) -> None:
    """Refuse what cannot be run in training mode, as recalibrating and fine-tuning do; and to fine-tune what gives
    something else there, as networks with auxiliary outputs do.
    """
    if settings.epochs and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the network requires a gradient, so it cannot be fine-tuned; give 0 epochs")
    try:
        trained = copy_of(model)
    except TypeError as error:
        raise ValueError(f"the network cannot be copied, as replacing its layers needs: {error}") from error
    for module in trained.modules():
        module.training = bool(settings.epochs) or isinstance(module, _BatchNorm)
    y = outputs_of(trained, torch.zeros(2, *input_size, device=device))
    if settings.batch_size == 1:
        try:
            outputs_of(trained, torch.zeros(1, *input_size, device=device))
        except ValueError as error:
            raise ValueError("in training mode the network needs batches of 2 images or more, but batch_size is 1"
                             ) from error  # fmt: skip
    if settings.epochs and not isinstance(y, Tensor):
        raise ValueError(
            f"in training mode the network returns a {type(y).__name__}, so it cannot be fine-tuned; give 0 epochs"
        )


def _check_table(job: Job, table: SensitivityTable) -> None:
    """Refuse a table of other layers, weights or another measure; whether its images are ours is seen later."""
    ours = fingerprint_of(job.model, job.measure, job.candidates.layers)
    differing = different({key: table.fingerprint.get(key, "") for key in ours}, ours)
    if differing:
        what = f"{'another' if len(differing) == 1 else 'other'} {', '.join(differing)}"
        raise ValueError(f"the table {job.settings.table} was measured with {what}, so it cannot be gone on from")


def _identity(
    settings: Settings, model: nn.Module, weights: Weights, pictures: Pictures, preparation: Preparation,
    device: torch.device, measure: str,
) -> dict[str, Any]:  # fmt: skip
    """What makes a run this one: the settings, with the contents of files in place of their names."""
    said = {key: value for key, value in asdict(settings).items() if key not in ("out", "resume", "table")}
    said |= {"architecture": f"sha256 {structure(model)}", "weights": f"sha256 {weights.digest}"}
    said |= {"data": f"sha256 {pictures.digest}", "measure": measure}
    said |= {"device": str(device), "image_size": preparation.size, "mean": preparation.mean, "std": preparation.std}
    return said


def _versions(network: Network, device: torch.device) -> dict[str, str]:
    """Of what the numbers depend on."""
    about = environment(device)
    names = ("python", "torch", "basis", "commit", "cuda")
    return {name: str(about[name]) for name in names if about[name]} | dict(network.versions)


def _left_out() -> dict[str, str]:
    """What cannot be made for want of a package -> the reason."""
    missing = [name for name in ("onnx", "onnxscript") if not is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return {"ONNX": f"{' and '.join(missing)} {verb} not installed (pip install onnx onnxscript onnxruntime)"}
    return {}


def absolute(budget: Mapping[str, float], total: Mapping[str, float | None]) -> dict[str, float]:
    """The budget in parameters, MACs an image and milliseconds; what is in (0, 1] is a fraction of the total."""
    return {unit: value * (total[unit] or math.nan) if value <= 1 else value for unit, value in budget.items()}


def _candidates(
    model: nn.Module, settings: Settings, measure: str, input_size: tuple[int, int, int]
) -> SensitivityTable:
    """Every candidate of every layer, with what it costs, as if none lost anything."""
    s = settings
    found, skipped = candidate_layers(model, s.ratios, (), s.multiple, tuple(s.include), tuple(s.exclude))
    layers, total, _ = layer_costs(substitute(model, {}), found, input_size)
    layers, idle = called_layers(layers)
    cells = tuple(Cell(layer=layer.name, basis_channels=k, value=0.0) for layer in layers for k in layer.candidates)
    return SensitivityTable(
        measure=measure, layers=layers, cells=cells, skipped=skipped | idle, total=total, fingerprint={}, baseline={}
    )


def check_budget(job: Job, times: BenchReport | None = None) -> None:
    """Refuse a budget that no choice of the candidates meets; what is in milliseconds is known with ``times`` only."""
    asked = {unit: value for unit, value in job.settings.budget.items() if unit != "milliseconds" or times is not None}
    totals = {**job.candidates.total, **({} if times is None else total_of(times))}
    if asked:
        try:
            select(job.candidates, budget=absolute(asked, totals), absolute=True, latency=times, step="forward")
        except InfeasibleBudget as error:
            ratios = few(f"{ratio:g}" for ratio in job.settings.ratios)
            text = f"{error}, with ratios of {ratios}; smaller ratios may reach further"
            raise InfeasibleBudget(text, error.fractions, error.numbers) from error


def total_of(times: BenchReport) -> dict[str, float]:
    """The milliseconds of all convolutions, dense."""
    return {"milliseconds": sum(ms[max(ms)] for ms in times.latencies("forward").values())}


def _tell(job: Job) -> None:
    """What will be worked on."""
    pictures, p = job.pictures, job.preparation
    job.say(f"network: {job.network.source}, on {job.device}")
    for note in job.notes:
        job.say(f"weights: {note}")
    for note in pictures.notes:
        job.say(f"data: {note}")
    job.say(
        f"data: {len(pictures.classes)} classes; {len(pictures.train):,} images to train on, of which "
        f"{len(job.calibration):,} calibrate; {len(job.validation):,} held out, {len(job.scored):,} of them to score "
        f"layers; {len(pictures.test):,} for the last numbers"
    )
    values = (", ".join(f"{value:.4g}" for value in values) for values in (p.mean, p.std))
    job.say("images: {} x {} pixels, mean {}, std {} ({})".format(p.size, p.size, *values, p.source))
    for what, why in job.left_out.items():
        job.say(f"left out: {what}, since {why}")
