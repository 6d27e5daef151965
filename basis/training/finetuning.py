"""Short fine-tuning of a network on any batches, optionally beside a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from basis.batches import Batch, Loss, first_weight, logits_of, losses_of, outputs_of, stream_batches, targets_of
from basis.data import Data, Images
from basis.digests import contents, length_of
from basis.inputs import samples_in
from basis.modules import evaluating, is_channels_last
from basis.numbers import plain_number
from basis.training.distillation import teacher_logits
from basis.training.epochs import Training
from basis.training.loop import augmented_batches, identity, make_step
from basis.training.recipe import (
    Precision,
    Recipe,
    TrainingError,
    as_training_error,
    autocast_in,
    choose_precision,
    on_device,
)
from basis.training.stepping import Autocast

WARM_UP = 0.05  # the fraction of all steps in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What :func:`finetune` leaves.

    Attributes:
        recipe: the options, with the precision that "auto" stood for.
        distillation: the share of the loss that came from a teacher; None without one.
        curves: one row per epoch, with train_loss and lr (at its end); with train_accuracy (a fraction) where the loss
            is cross-entropy.
        steps, images, seconds: over all epochs.
    """

    recipe: Recipe
    distillation: float | None
    curves: tuple[Mapping[str, float], ...]
    steps: int
    images: int
    seconds: float

    def __str__(self) -> str:
        of, epochs = self.recipe, self.recipe.epochs
        taught = "" if self.distillation is None else f", {self.distillation:g} of the loss from a teacher"
        head = f"fine-tuned for {epochs} epoch{'s' * (epochs > 1)}: {self.steps:,} steps, {self.images:,} images, "
        head += f"{self.seconds:.1f} s, {of.precision}, lr {of.lr:g}{taught}"
        return f"{head}, train loss {self.curves[-1]['train_loss']:.4g} in the last epoch"


def finetune(
    model: nn.Module, data: Iterable[Any] | Data, *, epochs: int = 1, lr: float = 0.01, weight_decay: float = 5e-4,
    label_smoothing: float = 0.0, loss: Loss | None = None, teacher: nn.Module | None = None,
    distillation: float = 0.9, precision: Precision = "auto", batch_size: int = 128, seed: int = 0,
    checkpoint: str | Path | None = None, should_stop: Callable[[], bool] | None = None,
    progress: bool | str = False,
) -> FineTuning:  # fmt: skip
    """Train ``model`` further, in place and on its own device: SGD with Nesterov momentum 0.9.

    Args:
        data: batches (inputs, labels), see :func:`basis.batches.stream_batches`, with a length, that can be gone
            through once per epoch, such as a ``DataLoader``; labels are classes (N,), or probabilities (N, classes),
            that are at least 0 and sum to 1, unless ``loss`` takes others. Or :class:`basis.data.Data`: its training
            images, shuffled and augmented as in :func:`basis.train` by ``seed``, in batches of ``batch_size``.
        epochs, lr: passes over the data; the peak learning rate, for a loss that is the mean over the batch. It rises
            in the first twentieth of all steps and falls by a cosine to 0.
        weight_decay, label_smoothing, precision: as in :class:`basis.Recipe`.
        loss: in place of cross-entropy, from outputs and targets, whatever they are, to the loss of each sample, (N,),
            or their mean; called under autocast where ``precision`` is not "fp32".
        teacher, distillation: a network with the same outputs, such as the dense one; d of the loss
            (1 - d) CE + d T^2 KL(p || q), see :mod:`basis.training.distillation`. Both give logits (N, classes), also
            where ``loss`` takes the place of CE.
        checkpoint, should_stop, progress: as in :func:`basis.train`, written after every epoch. The order of a
            ``DataLoader`` is resumed, too, where it comes from torch's random numbers or the loader's ``generator``.
            Data and losses are told apart as far as :func:`basis.digests.contents` does.

    Raises:
        ValueError: for options out of range.
        TrainingError: before anything is changed, for a model, data, teacher or checkpoint that do not fit; later, for
            a loss that is no longer finite, or a batch that does not fit.
        TrainingPaused: see ``should_stop``.
    """
    precision = _precision(model, precision)
    device, seed = first_weight(model).device, plain_number("seed", seed, whole=True)
    recipe = Recipe(
        epochs=epochs, lr=lr, weight_decay=weight_decay, label_smoothing=label_smoothing, batch_size=batch_size,
        precision=precision, step="eager",
        memory_format="channels_last" if is_channels_last(first_weight(model)) else "contiguous",
    )  # fmt: skip
    if loss is not None and label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing}, which goes with cross-entropy, not with a loss")
    distillation = plain_number("distillation", distillation)
    if not 0 < distillation <= 1:
        raise ValueError(f"distillation is {distillation}, but it must lie in (0, 1]")
    generator = getattr(data, "generator", None)
    if isinstance(data, Data):
        generator = torch.Generator(device).manual_seed(seed)
    source, steps = _source(model, data, recipe, generator)
    taught = 0.0 if teacher is None else distillation
    run = make_step(model, recipe, device=device, teacher=teacher, distillation=taught, loss_function=loss)
    belongs = {}
    if checkpoint:
        seen = data.train if isinstance(data, Data) else data
        belongs = identity(model, recipe, seed=seed, steps=steps, teacher=teacher, data=seen)
        belongs |= {"distillation": str(taught), "loss": "" if loss is None else contents(loss)}
    autocast = partial(autocast_in, device, precision)
    training = Training(
        run=run, identity=belongs, epochs=recipe.epochs, steps=steps,
        batches=lambda: _fitting(source(), model, teacher, loss, autocast),
        prepare=lambda step: run.set_rates([rate(recipe.lr, step, recipe.epochs * steps)]),
        validate=lambda: {"lr": run.optimizer.param_groups[0]["lr"]},
        generator=generator if isinstance(generator, torch.Generator) else None,
    )  # fmt: skip
    with on_device(device), evaluating(model), as_training_error():
        training.loop(checkpoint, should_stop, progress, title="fine-tune")
    return FineTuning(
        recipe=recipe, distillation=taught, curves=training.curves, steps=training.step, images=training.images,
        seconds=training.seconds,
    )  # fmt: skip


def rate(peak: float, step: int, total: int) -> float:
    """The learning rate of a step: up to its peak in the warm-up, then by a cosine down to 0 at the end."""
    warm = round(WARM_UP * total)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm)))) / 2


def _precision(model: nn.Module, precision: Any) -> Any:
    """What the precision "auto" stands for, after checking that the model can be trained."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if not kinds:
        raise TrainingError("no parameter of the model requires a gradient, so there is nothing to train")
    if kinds - {torch.float32, torch.float64}:
        raise TrainingError(f"the model has parameters of {kinds}; train model.float(), in which small steps are kept")
    usual = "fp32" if torch.float64 in kinds else choose_precision(first_weight(model).device)
    return usual if precision == "auto" else precision


def _source(model: nn.Module, data: Any, recipe: Recipe, generator: Any) -> tuple[Callable[[], Iterator[Batch]], int]:
    """What gives the batches of one epoch, and their number."""
    if isinstance(data, Images):
        raise TrainingError("Images alone cannot be fine-tuned on; give Data, whose training images are augmented")
    if isinstance(data, Data):
        if len(data.train) < recipe.batch_size:
            raise TrainingError(f"batch_size is {recipe.batch_size}, but there are {len(data.train)} training images")
        images = data.train.to(first_weight(model).device)
        return partial(augmented_batches, images, recipe, generator), len(images) // recipe.batch_size
    steps = length_of(data)
    if isinstance(data, Iterator) and recipe.epochs > 1:
        raise TrainingError(f"data are a {type(data).__name__}, which gives its batches only once; give what it reads")
    if not steps:
        what = "hold no batch" if steps == 0 else f"are a {type(data).__name__} without a length"
        raise TrainingError(f"data {what}; give a list of batches, or a DataLoader of a dataset with a length")
    return partial(stream_batches, data, model, "data"), steps


def _fitting(
    batches: Iterable[Batch], model: nn.Module, teacher: nn.Module | None, loss: Loss | None, autocast: Autocast
) -> Iterator[Batch]:
    """The batches as the loss takes them; ``ValueError`` before the first that fits no network."""
    for i, (x, y) in enumerate(batches):
        if i == 0:
            with torch.no_grad(), evaluating(model), autocast():
                outputs = outputs_of(model, x)
                if loss is not None:
                    losses_of(loss, outputs, y, samples=samples_in(x), mean=True)
            taught = outputs if teacher is None else teacher_logits(teacher, x, autocast)
            if teacher is not None and taught.shape != logits_of(outputs).shape:
                raise ValueError(f"the teacher's logits are {taught.shape}, but the model's {outputs.shape}")
        yield x, targets_of(y, logits_of(outputs), samples=samples_in(x)) if loss is None else y
