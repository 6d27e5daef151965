"""Short fine-tuning of a network on any batches, optionally beside a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from basis.batches import Batch, Batches, first_weight, length_of, logits_of, outputs_of, stream_batches, with_labels
from basis.data import Data, Images
from basis.modules import evaluating, is_channels_last
from basis.saving import Saved, columns
from basis.statistics import proportion_estimate
from basis.training.epochs import Training
from basis.training.evaluation import evaluate
from basis.training.loop import augmented_batches
from basis.training.recipe import (
    Precision,
    Recipe,
    TrainingError,
    as_training_error,
    autocast_in,
    choose_precision,
    make_optimizer,
    on_device,
)
from basis.training.stepping import Means, TrainingStep

Schedule = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How :func:`finetune` trained; see there."""

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
        for name in ("epochs", "lr", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but it must be positive and finite")
        for name in ("warm_up", "momentum", "label_smoothing", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 0 and below 1")
        if self.distillation is not None and not 0 < self.distillation <= 1:
            raise ValueError(f"distillation is {self.distillation}, but it is a share of the loss, in (0, 1]")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule is {self.schedule!r}, but it must be 'cosine' or 'linear'")

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
        curves: one row per epoch: epoch (from 1), train_loss (what was minimised), train_accuracy, lr (at its end),
            seconds (without evaluation), and with validation data validation_loss, validation_accuracy and its 95 %
            interval validation_low, validation_high. Accuracies are fractions.
        steps, images, seconds: over all epochs; seconds without evaluation.
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
        taught = "" if s.distillation is None else f", {s.distillation:g} of the loss from a teacher"
        head = (
            f"fine-tuned for {s.epochs} epoch{'s' * (s.epochs > 1)}: {self.steps:,} steps, {self.images:,} images, "
            f"{self.seconds:.1f} s, {s.precision}, lr {s.lr:g} ({s.schedule}){taught}"
        )
        names = [name for name in self.curves[0] if name not in ("lr", "validation_low", "validation_high")]
        rows = [tuple(name.replace("_", " ") for name in names)]
        rows += [tuple(f"{row[name]:.4g}" for name in names) for row in self.curves]
        return "\n".join([head, *columns(rows)])


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q) of predictions at temperature T, mean over samples: logits (N, classes) of model and teacher.

    T^2 keeps the size of the gradients (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2).
    """
    log_q, log_p = (values.div(temperature).log_softmax(1) for values in (logits, taught))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


@dataclass(frozen=True)
class Distillation:
    """Runs a network beside its teacher: the logits, and the weighted :func:`distillation_loss`."""

    student: nn.Module
    teacher: nn.Module
    settings: Settings
    autocast: Callable[[], AbstractContextManager]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For inputs (N, ...)."""
        with self.autocast():
            logits = logits_of(self.student(x)).float()
        with torch.no_grad(), evaluating(self.teacher), self.autocast():
            taught = logits_of(self.teacher(x)).float()
        share, temperature = self.settings.distillation or 0.0, self.settings.temperature or 1.0
        return logits, share * distillation_loss(logits, taught, temperature)


def finetune(
    model: nn.Module, data: Iterable[Any] | Data, *, epochs: int = 1, lr: float = 0.01,
    schedule: Schedule = "cosine", warm_up: float = 0.05, momentum: float = 0.9, weight_decay: float = 5e-4,
    label_smoothing: float = 0.0, clip: float | None = None, teacher: nn.Module | None = None,
    temperature: float = 4.0, distillation: float = 0.9, precision: Precision = "auto", batch_size: int = 128,
    seed: int = 0, validation: Batches | None = None, checkpoint: str | Path | None = None,
    should_stop: Callable[[], bool] | None = None, progress: bool | str = False,
) -> FineTuning:  # fmt: skip
    """Train ``model`` further, in place and on its own device: SGD with Nesterov momentum, a short schedule.

    With a ``teacher`` the loss is (1 - d) CE + d T^2 KL(p || q) (:func:`distillation_loss`), d = ``distillation``.

    Args:
        data: batches (inputs, labels) with a length that can be gone through once per epoch, such as a ``DataLoader``;
            labels are classes (N,), or probabilities (N, classes). Or :class:`basis.data.Data`: its training images,
            shuffled and augmented as in :func:`basis.train`.
        epochs, lr: passes over the data; the peak learning rate, for a loss that is the mean over the batch.
        schedule, warm_up: how the learning rate falls to 0; the fraction of all steps in which it rises before.
        momentum, weight_decay, label_smoothing, precision: as in :class:`basis.Recipe`.
        clip: the largest norm of the gradient of all parameters together.
        teacher, temperature, distillation: a network with the same outputs, such as the dense one; T and d.
        batch_size, seed: with ``Data``: images per step, and of their order and augmentation.
        validation: evaluated after every epoch: batches or :class:`basis.data.Images`; of ``Data``, its validation
            images unless given.
        checkpoint, should_stop, progress: as in :func:`basis.train`, written after every epoch. The order of a
            ``DataLoader`` is resumed, too, where it comes from torch's random numbers or the loader's ``generator``.

    Raises:
        ValueError: for options out of range.
        TrainingError: before anything is changed, for a model, data, teacher or checkpoint that do not fit; later,
            for a loss that is no longer finite, or a batch that does not fit.
        TrainingPaused: see ``should_stop``.
    """
    taught = teacher is not None
    device, precision = _trainable(model, teacher, precision)
    settings = Settings(
        epochs=epochs, lr=lr, schedule=schedule, warm_up=warm_up, momentum=momentum, weight_decay=weight_decay,
        label_smoothing=label_smoothing, clip=clip, temperature=temperature if taught else None,
        distillation=distillation if taught else None, precision=precision,
    )  # fmt: skip
    recipe = Recipe(lr=lr, momentum=momentum, weight_decay=weight_decay, batch_size=batch_size, precision=precision)
    generator = (
        torch.Generator(device).manual_seed(seed) if isinstance(data, Data) else getattr(data, "generator", None)
    )
    source, steps = _source(model, data, recipe, generator)
    if validation is None and isinstance(data, Data):
        validation = data.validation
    if isinstance(validation, Iterator) and epochs > 1:
        raise TrainingError("validation can be gone through only once, but there are more epochs; give a list")
    autocast = partial(autocast_in, device, precision)
    beside = None if teacher is None else Distillation(model, teacher.to(device), settings, autocast)
    weight = 1 - (settings.distillation or 0.0)
    run = TrainingStep(
        model, make_optimizer(model, recipe, device), torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        (lambda loss, kind: weight * loss) if taught else (lambda loss, kind: loss), means=Means(), autocast=autocast,
        label_smoothing=label_smoothing, clip=clip, beside=beside, sums_objective=True,
    )  # fmt: skip
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    its_shapes = None if teacher is None else [tuple(p.shape) for p in teacher.parameters()]
    training = Training(
        run=run, identity=repr((asdict(settings), steps, shapes, its_shapes)), epochs=epochs, steps=steps,
        batches=lambda: _fitting(source(), model, teacher, autocast),
        prepare=lambda step: run.set_rates([settings.rate(step, epochs * steps)]),
        validate=lambda: {"lr": run.optimizer.param_groups[0]["lr"]} | _validated(model, validation, precision),
        generator=generator if isinstance(generator, torch.Generator) else None, check_every=20,
    )  # fmt: skip
    with on_device(device), evaluating(model), as_training_error():
        training.loop(checkpoint, should_stop, progress, title="fine-tune")
    return FineTuning(
        settings=settings, curves=training.curves, steps=training.step, images=training.images,
        seconds=training.seconds,
    )  # fmt: skip


def _trainable(model: nn.Module, teacher: nn.Module | None, precision: Any) -> tuple[torch.device, Any]:
    """The device, and what the precision "auto" stands for, after checking that the model can be trained."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if not kinds:
        raise TrainingError("no parameter of the model requires a gradient, so there is nothing to train")
    if kinds - {torch.float32, torch.float64}:
        raise TrainingError(f"the model has parameters of {kinds}; train model.float(), in which small steps are kept")
    if teacher is model:
        raise TrainingError("the teacher is the model itself; give the dense network, of which substitute made a copy")
    device = first_weight(model).device
    wide = torch.float64 in kinds
    return device, ("fp32" if wide else choose_precision(device)) if precision == "auto" else precision


def _source(model: nn.Module, data: Any, recipe: Recipe, generator: Any) -> tuple[Callable[[], Iterator[Batch]], int]:
    """What gives the batches of one epoch, and their number."""
    if isinstance(data, Images):
        raise TrainingError("Images alone cannot be fine-tuned on; give Data, whose training images are augmented")
    if isinstance(data, Data):
        images = data.train
        if len(images) < recipe.batch_size:
            raise TrainingError(f"batch_size is {recipe.batch_size}, but there are {len(images)} training images")
        weight = first_weight(model)
        images = Images(images.x.to(weight.device), images.y.to(weight.device))
        recipe = replace(recipe, memory_format="channels_last" if is_channels_last(weight) else "contiguous")
        return partial(augmented_batches, images, recipe, generator), len(images) // recipe.batch_size
    steps = length_of(data)
    if not steps:
        what = "hold no batch" if steps == 0 else f"are a {type(data).__name__} without a length"
        raise TrainingError(f"data {what}; give a list of batches, or a DataLoader of a dataset with a length")
    return partial(stream_batches, data, model, "data"), steps


def _fitting(batches: Iterable[Batch], model: nn.Module, teacher: Any, autocast: Any) -> Iterator[Batch]:
    """The batches with labels as cross-entropy takes them; ``ValueError`` before the first that fits no network."""
    like = None
    for x, y in batches:
        if like is None:
            found = []
            for network in (model, teacher) if teacher is not None else (model,):
                with torch.no_grad(), evaluating(network), autocast():
                    found.append(logits_of(outputs_of(network, x[:2])).float())
            if found[0].shape != found[-1].shape:
                raise ValueError(f"the teacher's logits are {found[1].shape}, but the model's {found[0].shape}")
            like = found[0]
        yield with_labels([(x, y)], like)[0]


def _validated(model: nn.Module, data: Any, precision: Precision) -> dict[str, float]:
    if data is None:
        return {}
    found = evaluate(model, data, precision=precision)
    n = len(data) if isinstance(data, Images) else found.n
    accuracy = proportion_estimate(round(found["accuracy"] * n), n)
    values = {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}
    return {"validation_loss": found["loss"]} | {f"validation_{name}": value for name, value in values.items()}
