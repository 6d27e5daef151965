"""Short fine-tuning of a network on any batches, optionally beside a teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from basis.batches import Batches, first_weight, length_of, outputs_of, stream_batches, with_labels
from basis.data import Data, Images, augment, normalise
from basis.modules import evaluating, is_channels_last
from basis.saving import Saved, columns
from basis.statistics import proportion_estimate
from basis.text import few
from basis.training.evaluation import logits_of
from basis.training.loop import (
    DTYPES,
    Precision,
    Recipe,
    TrainingError,
    TrainingPaused,
    as_training_error,
    autocast_in,
    choose_precision,
    evaluate,
    make_optimizer,
    on_device,
    read_checkpoint,
    write_checkpoint,
)

if TYPE_CHECKING:
    pass

Schedule = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How :func:`finetune` trained; see there.

    Raises:
        ValueError: for a number that makes no sense.
    """

    epochs: int
    lr: float
    schedule: Schedule
    warm_up: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    clip: float | None
    temperature: float | None
    distillation: float | None
    precision: Precision

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs!r}, but it must be a whole number of at least 1")
        for name in ("lr", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but it must be positive and finite")
        for name in ("warm_up", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 0 and below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, but it must be at least 0")
        if self.distillation is not None and not 0 < self.distillation <= 1:
            raise ValueError(f"distillation is {self.distillation}, but it is a share of the loss, in (0, 1]")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule is {self.schedule!r}, but it must be 'cosine' or 'linear'")
        if self.precision not in ("auto", *DTYPES):
            raise ValueError(f"precision is {self.precision!r}, but must be one of auto, {', '.join(DTYPES)}")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step: up to ``lr`` in the warm-up, then down to 0 at the end."""
        warm = round(self.warm_up * total)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1, total - warm))
        return self.lr * ((1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done)


@dataclass(frozen=True, kw_only=True)
class FineTuning(Saved):
    """What :func:`finetune` leaves.

    Attributes:
        settings: the options, with the precision that "auto" stood for.
        curves: one row per epoch: ``epoch`` (from 1), ``train_loss`` (what was minimised), ``train_accuracy``,
            ``lr`` (at its end), ``seconds`` (without evaluation), and with validation data ``validation_loss``,
            ``validation_accuracy`` and its 95 % interval ``validation_low``, ``validation_high``. Accuracies are
            fractions, on the data as they came.
        steps, images: how many, over all epochs.
        seconds: of training, without evaluation.
    """

    kind: ClassVar[str] = "fine_tuning"
    parts: ClassVar[Mapping[str, type]] = {"settings": Settings}

    settings: Settings
    curves: tuple[Mapping[str, float], ...]
    steps: int
    images: int
    seconds: float

    def __str__(self) -> str:
        s = self.settings
        taught = "" if s.distillation is None else f", {s.distillation:g} of the loss from a teacher at temperature "
        taught += "" if s.temperature is None else f"{s.temperature:g}"
        epochs = f"{s.epochs} epoch{'s' * (s.epochs > 1)}"
        lines = [
            f"fine-tuned for {epochs}: {self.steps:,} steps, {self.images:,} images, {self.seconds:.1f} s, "
            f"{s.precision}, lr {s.lr:g} ({s.schedule}){taught}"
        ]
        validated = bool(self.curves) and "validation_accuracy" in self.curves[0]
        head = ("epoch", "loss", "accuracy", *(("validation loss", "validation accuracy") * validated), "seconds")
        rows: list[tuple[str, ...]] = [head]
        for row in self.curves:
            held: tuple[str, ...] = ()
            if validated:
                low, high = (f"{100 * row[key]:.2f}" for key in ("validation_low", "validation_high"))
                held = (f"{row['validation_loss']:.4f}", f"{100 * row['validation_accuracy']:.2f} % [{low}, {high}]")
            own = (f"{row['train_loss']:.4f}", f"{100 * row['train_accuracy']:.2f} %")
            rows.append((f"{row['epoch']:.0f}", *own, *held, f"{row['seconds']:.1f}"))
        return "\n".join([*lines, *columns(rows)])


def finetune(
    model: nn.Module,
    data: Iterable[Any] | Data,
    *,
    epochs: int = 1,
    lr: float = 0.01,
    schedule: Schedule = "cosine",
    warm_up: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    clip: float | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    distillation: float = 0.9,
    precision: Precision = "auto",
    batch_size: int = 128,
    seed: int = 0,
    validation: Batches | None = None,
    checkpoint: str | Path | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool | str = False,
) -> FineTuning:
    """Train ``model`` further, in place and on its own device: SGD with Nesterov momentum, a short schedule.

    With a ``teacher`` the loss is (1 - d) CE + d T^2 KL(p || q), where p and q are the predictions of teacher and
    model with logits divided by the temperature T, and d is ``distillation`` (Hinton, Vinyals and Dean 2015,
    arXiv 1503.02531, section 2).

    Args:
        data: batches (inputs, labels) that can be gone through once per epoch and have a length, such as a
            ``DataLoader`` (in whose own order, and with whose own augmentation, they come); labels are classes
            (N,), or probabilities (N, classes). Or :class:`basis.data.Data`: its training images, shuffled and
            augmented as in :func:`basis.train`, in batches of ``batch_size``.
        epochs: passes over the data.
        lr: peak learning rate, for a loss that is the mean over the batch.
        schedule: how the learning rate falls to 0.
        warm_up: the fraction of all steps in which it rises before.
        momentum, weight_decay, label_smoothing: as in :class:`basis.Recipe`.
        clip: the largest norm of the gradient of all parameters together; None: any.
        teacher: a network with the same outputs, such as the dense one; brought to the device of ``model``, and
            otherwise left as it is.
        temperature, distillation: T and d above.
        precision: of activations, see :func:`basis.training.loop.choose_precision` for "auto"; parameters stay fp32.
        batch_size, seed: with ``Data``: images per step, and of their order and augmentation.
        validation: evaluated after every epoch: batches or :class:`basis.data.Images`; of ``Data``, its
            validation images unless given.
        checkpoint: file written after every epoch and resumed from when it exists; removed by nobody. The order of a
            ``DataLoader`` is resumed, too, where it comes from torch's random numbers or the loader's ``generator``.
        should_stop: asked after every epoch but the last; True ends the training by ``TrainingPaused``.
        progress: whether to draw a bar, or what to write beside it.

    Raises:
        ValueError: for options that make no sense.
        TrainingError: before anything is changed: for a model without trainable parameters, or in half precision,
            data that are empty, have no length or do not fit the model, a teacher that does not fit; a checkpoint
            of another training. Later, for a loss that is no longer finite, or a batch that does not fit.
        TrainingPaused: see ``should_stop``.
    """
    settings = Settings(
        epochs=epochs, lr=lr, schedule=schedule, warm_up=warm_up, momentum=momentum, weight_decay=weight_decay,
        label_smoothing=label_smoothing, clip=clip, temperature=None if teacher is None else temperature,
        distillation=None if teacher is None else distillation, precision=precision,
    )  # fmt: skip
    settings = _checked(model, teacher, settings)
    source, steps = _source(model, data, batch_size, seed, epochs)
    if validation is None and isinstance(data, Data):
        validation = data.validation
    if validation is not None and epochs > 1 and isinstance(validation, Iterator):
        raise TrainingError(
            "validation can be gone through only once, but there are more epochs; give a list or a loader"
        )
    run = _Run(model, teacher, source, settings, steps)
    path = None if checkpoint is None else Path(checkpoint)
    if path and path.exists():
        run.restore(path)
    title = progress if isinstance(progress, str) else "fine-tune"
    bar = tqdm(total=epochs * steps, initial=run.step, disable=not progress, desc=title, dynamic_ncols=True)
    with bar, on_device(run.device), _flags_kept(model):
        while run.epoch < epochs:
            row = run.epoch_of(bar)
            if validation is not None:
                row |= _validated(model, validation, settings.precision)
            run.curves.append(row)
            shown = row.get("validation_accuracy", row["train_accuracy"])
            bar.set_postfix_str(f"epoch {run.epoch}/{epochs}, accuracy {shown:.1%}")
            if path:
                run.save(path)
            if should_stop and run.epoch < epochs and should_stop():
                raise TrainingPaused(f"stopped after epoch {run.epoch} of {epochs}, as asked")
    seconds = sum(row["seconds"] for row in run.curves)
    return FineTuning(settings=settings, curves=tuple(run.curves), steps=run.step, images=run.images, seconds=seconds)


# -- what is asked ------------------------------------------------------------------------------


def _checked(model: nn.Module, teacher: nn.Module | None, settings: Settings) -> Settings:
    """The settings with what "auto" stands for, after checking that the model can be trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("no parameter of the model requires a gradient, so there is nothing to train")
    kinds = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if kinds:
        raise TrainingError(
            f"the model has parameters of {few(sorted(map(str, kinds)))}, in which small steps are lost; train "
            "model.float(), with precision for the activations, and convert it afterwards"
        )
    if teacher is model:
        raise TrainingError("the teacher is the model itself; give the dense network, of which substitute made a copy")
    if settings.precision == "auto":
        wide = any(p.dtype == torch.float64 for p in trained)
        chosen: Any = "fp32" if wide else choose_precision(trained[0].device)
        settings = Settings(**{**asdict(settings), "precision": chosen})
    return settings


class _Augmented:
    """The training images of one epoch after the other, shuffled and augmented, in batches."""

    def __init__(self, images: Images, batch_size: int, seed: int, weight: Tensor) -> None:
        self.images = Images(images.x.to(weight.device), images.y.to(weight.device))
        self.batch_size, self.last = batch_size, is_channels_last(weight)
        self.generator = torch.Generator(weight.device).manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.y.device
        order = torch.randperm(len(self.images), generator=self.generator, device=device)
        for step in range(len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            x = normalise(augment(self.images.x, index, self.generator))
            yield x if self.last else x.contiguous(), self.images.y[index]


def _source(
    model: nn.Module, data: Iterable[Any] | Data, batch_size: int, seed: int, epochs: int
) -> tuple[Iterable[Any], int]:
    """What an epoch goes through, and its number of steps."""
    if isinstance(data, Images):
        raise TrainingError("Images alone cannot be fine-tuned on; give Data, whose training images are augmented")
    if isinstance(data, Data):
        if not 1 <= batch_size <= len(data.train):
            raise TrainingError(f"batch_size is {batch_size}, but there are {len(data.train)} training images")
        data = _Augmented(data.train, batch_size, seed, first_weight(model))
    steps = length_of(data)
    if steps is None:
        raise TrainingError(
            f"data are a {type(data).__name__} without a length, so the learning rate has no schedule; give a list of "
            "batches, or a DataLoader of a dataset with a length"
        )
    if steps == 0:
        raise TrainingError(
            "data hold no batch, so there is nothing to train on (does drop_last leave too few images?)"
        )
    return data, steps


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _validated(model: nn.Module, validation: Any, precision: Precision) -> dict[str, float]:
    if isinstance(validation, Images):
        device = first_weight(model).device
        images = Images(validation.x.to(device), validation.y.to(device))
        found = evaluate(model, images, precision=precision)
        accuracy = proportion_estimate(round(found["accuracy"] * len(images)), len(images))
    else:
        with as_training_error():
            own = evaluate(model, validation, precision=precision)
        found, accuracy = dict(own), own.accuracy
    return {
        "validation_loss": found["loss"], "validation_accuracy": accuracy.value,
        "validation_low": accuracy.low, "validation_high": accuracy.high,
    }  # fmt: skip


# -- the training -------------------------------------------------------------------------------


class _Run:
    """All that a fine-tuning changes, so that a checkpoint can hold all of it."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, source: Iterable[Any], settings: Settings, steps: int
    ) -> None:
        self.model, self.source, self.settings, self.steps = model, source, settings, steps
        self.device = first_weight(model).device
        self.teacher = None if teacher is None else teacher.to(self.device)
        recipe = Recipe(lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
        self.optimizer = make_optimizer(model, recipe, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.epoch = self.step = self.images = 0
        self.curves: list[dict[str, float]] = []
        shapes: Sequence[Any] = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        taught = None if teacher is None else [tuple(p.shape) for p in teacher.parameters()]
        self.identity = repr((asdict(settings), steps, shapes, taught))

    @property
    def _generator(self) -> torch.Generator | None:
        found = getattr(self.source, "generator", None)
        return found if isinstance(found, torch.Generator) else None

    def save(self, path: Path) -> None:
        write_checkpoint(
            path,
            {
                "identity": self.identity,
                "epoch": self.epoch,
                "step": self.step,
                "images": self.images,
                "curves": self.curves,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "generator": None if self._generator is None else self._generator.get_state(),
                "random": torch.get_rng_state(),
            },
        )

    def restore(self, path: Path) -> None:
        content = read_checkpoint(path, self.identity)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self._generator is not None and content["generator"] is not None:
            self._generator.set_state(content["generator"])
        torch.set_rng_state(content["random"])
        self.epoch, self.step, self.images = content["epoch"], content["step"], content["images"]
        self.curves = content["curves"]

    def epoch_of(self, bar: Any) -> dict[str, float]:
        """One pass over the data."""
        began, total, images = time.perf_counter(), torch.zeros((), device=self.device), 0
        right, batches = torch.zeros((), device=self.device), 0
        with as_training_error():
            for x, y in stream_batches(self.source, self.model, "data"):
                if self.step == 0:
                    self._fits(x[:2], y[:2])
                loss, correct = self._train_on(x, y)
                total, right = total + loss, right + correct
                images, batches = images + len(x), batches + 1
                if batches % 20 == 1:
                    self._check(loss)
                bar.update()
        self._check(total)
        self.epoch, self.images = self.epoch + 1, self.images + images
        return {
            "epoch": self.epoch,
            "train_loss": total.item() / batches,
            "train_accuracy": right.item() / images,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - began,
        }

    @torch.no_grad()
    def _fits(self, x: Tensor, y: Tensor) -> None:
        """Raise ``ValueError`` where the first samples do not fit the model, or the teacher, before they change it."""
        shapes = []
        for network in (self.model, self.teacher):
            if network is not None:
                with evaluating(network), autocast_in(self.device, self.settings.precision):
                    shapes.append(tuple(logits_of(outputs_of(network, x)).shape))
        with_labels([(x, y)], torch.zeros(shapes[0]))
        if len(set(shapes)) > 1:
            raise ValueError(f"the teacher's logits are {shapes[1]}, but the model's {shapes[0]}")

    def _train_on(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        self.model.train()
        autocast = autocast_in(self.device, settings.precision)
        with autocast:
            logits = logits_of(self.model(x)).float()
        [(_, y)] = with_labels([(x, y)], logits)
        loss = F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad(), evaluating(self.teacher), autocast:
                taught = logits_of(self.teacher(x)).float()
            share = settings.distillation or 0.0
            loss = (1 - share) * loss + share * distillation_loss(logits, taught, settings.temperature or 1.0)
        rate = settings.rate(self.step, settings.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if settings.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        hard = y if y.dim() == 1 else y.argmax(1)
        return loss.detach(), (logits.detach().argmax(1) == hard).sum()

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the training loss is {loss.item()} in epoch {self.epoch + 1} with lr = {self.settings.lr} and "
                f"{self.settings.precision}; a smaller lr, or clip=1.0, would be right"
            )


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q) of predictions at temperature T, mean over samples: logits of the model and of its teacher.

    The factor T^2 keeps the size of its gradients the same for all temperatures (Hinton et al. 2015, section 2).
    """
    log_q, log_p = (values.div(temperature).log_softmax(1) for values in (logits, taught))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
