"""Training by a recipe, on images that are already on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from basis.batches import Loss
from basis.copies import copy_of
from basis.data import Data, Images, augment, normalise
from basis.digests import contents, structure, weights
from basis.layers.coefficients import Sparse
from basis.layers.conv import BasisConv2d
from basis.layers.structured import StructuredConv2d
from basis.numbers import plain_number
from basis.training.distillation import beside_teacher
from basis.training.epochs import Training
from basis.training.evaluation import evaluate
from basis.training.penalties import decorrelation, product_norm
from basis.training.recipe import (  # noqa: F401  (also for those who import them from here)
    DTYPES,
    MemoryFormat,
    Precision,
    Recipe,
    TrainingError,
    TrainingPaused,
    as_training_error,
    autocast_in,
    choose_device,
    choose_memory_format,
    choose_precision,
    make_optimizer,
    on_device,
)
from basis.training.skipping import Parts, Trained, check_skip
from basis.training.stepping import Capture, TrainingStep, means_for
from basis.training.switching import carry_momentum, dense_weights

if TYPE_CHECKING:
    from basis.search.switching import Switch


@dataclass(frozen=True, kw_only=True)
class Result:
    """What :func:`train` leaves. Accuracies are fractions.

    Attributes:
        curves: one row per epoch: epoch (from 1), train_loss, train_accuracy (on augmented images), seconds, and
            validation_loss, validation_accuracy where images were held out.
        test, validation: loss, accuracy, and accuracy_flip with flip test-time augmentation; None without images.
        train_seconds: without evaluation and without ``setup_seconds``, in which steps were compiled and captured.
        step: how the steps were run.
        switched: what the recipe's switch did: the ``epoch`` after which, ``layers`` with their sizes, its ``seconds``
            (which are among ``train_seconds``), and what else it found.
    """

    curves: Sequence[Mapping[str, float]]
    test: Mapping[str, float] | None
    validation: Mapping[str, float] | None
    train_seconds: float
    steps: int
    images_per_second: float
    precision: str
    memory_format: str
    step: str = "eager"
    setup_seconds: float = 0.0
    switched: Mapping[str, Any] | None = None


class Kind(NamedTuple):
    """What tells one step from another: the parts trained, the objective, and whether masks are fixed."""

    trained: Trained = Trained(basis=True, coefficients=True)
    decorrelates: bool = False
    settled: bool = False


def objective(recipe: Recipe, model: nn.Module, *, share: float = 1.0) -> Callable[[Tensor, Kind | None], Tensor]:
    """From a loss to what is differentiated: ``recipe``'s terms for single layers, in fp32 and before loss scaling.

    ``share`` of the loss counts, where a teacher gives the rest.
    """
    layers = [module for module in model.modules() if isinstance(module, BasisConv2d)]

    def terms(loss: Tensor, kind: Kind | None) -> Tensor:
        loss = loss if share == 1 else share * loss
        if recipe.decay == "product" and layers:
            norms = [product_norm(a.basis, a.coefficients.matrix(), a.coefficients.groups) for a in layers]
            loss = loss + recipe.weight_decay / 2 * torch.stack(norms).sum()
        if recipe.decorrelation is not None and kind and kind.decorrelates:
            correlations = [decorrelation(layer.basis, layer.groups) for layer in layers]
            loss = loss + recipe.decorrelation * torch.stack(correlations).sum()
        return loss

    return terms


class Schedule:
    """What changes from step to step: learning rates, trained parts, and the masks of sparse A, fixed halfway."""

    def __init__(self, run: TrainingStep, recipe: Recipe, *, steps_per_epoch: int, total_steps: int) -> None:
        self.run, self.recipe, self.steps_per_epoch, self.total_steps = run, recipe, steps_per_epoch, total_steps
        self.parts = Parts(run.model)
        layers = [module for module in run.model.modules() if isinstance(module, BasisConv2d)]
        self.sparse = [a for a in (layer.coefficients for layer in layers) if isinstance(a, Sparse)]
        self.settles_at = round(total_steps / 2)

    def kind(self, step: int) -> Kind:
        """Which kind of step this is."""
        skip, trained = self.recipe.skip, Kind().trained
        if skip:
            trained = skip.trains(step, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        every = 10 * (skip.basis_every if skip else 1)
        return Kind(
            trained,
            decorrelates=self.recipe.decorrelation is not None and step % every == 0,
            settled=bool(self.sparse) and step >= self.settles_at,
        )

    def prepare(self, step: int) -> Kind:
        """Before a step: its learning rates, the parts that it trains, and the end of learned masks."""
        skip, kind = self.recipe.skip, self.kind(step)
        rate = self.recipe.rate(step / self.total_steps)
        groups = self.run.optimizer.param_groups
        self.run.set_rates([(skip.rate(group["part"]) if skip else 1) * rate for group in groups])
        if skip:
            self.parts.train(kind.trained)
        if step == self.settles_at:
            for coefficients in self.sparse:
                coefficients.settle()
        return kind


def check_recipe(model: nn.Module, recipe: Recipe, steps_per_epoch: int) -> None:
    """Raise :class:`TrainingError` for terms of the recipe that would have no effect on this model."""
    modules = list(model.modules())
    basis = any(isinstance(module, BasisConv2d) for module in modules)
    factors = any(isinstance(module, StructuredConv2d) and module.factors for module in modules)
    needs = {
        "skip": basis,
        "decorrelation": basis,
        "decay": basis or (factors and recipe.decay == "scaled"),
    }
    for name, good in needs.items():
        if getattr(recipe, name) not in (None, "factors") and not good:
            raise TrainingError(f"the recipe sets {name}, but the model has no layers that it acts on")
    if recipe.skip:
        with as_training_error():
            check_skip(model, recipe.skip, steps_per_epoch=steps_per_epoch, total_steps=recipe.epochs * steps_per_epoch)


def make_step(
    model: nn.Module, recipe: Recipe | None = None, *, device: str | torch.device | None = None,
    capture: Capture | None = None, teacher: nn.Module | None = None, distillation: float = 0.0,
    loss_function: Loss | None = None,
) -> TrainingStep:  # fmt: skip
    """Put ``model`` on the device, and make the step that trains it as ``recipe`` says; arguments as of :func:`train`.

    ``distillation``: the share of the loss that comes from the predictions of the ``teacher``.
    ``loss_function``: in place of cross-entropy.

    To be called with images (N, C, H, W) in the recipe's memory format, labels (N,) and a :class:`Kind`. Skipped
    parts are for the caller to freeze, as are learning rates to set.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if teacher is not None and not trained.isdisjoint(map(id, teacher.parameters())):
        raise TrainingError("the teacher shares parameters with the model, so training would change it; give a copy")
    place = choose_device(device)
    recipe = (recipe or Recipe()).resolved(model, place)
    autocast: Any = partial(autocast_in, place, recipe.precision)
    terms, beside = objective(recipe, model, share=1 - distillation), None
    last = recipe.memory_format == "channels_last"
    layout: Any = torch.channels_last if last else torch.contiguous_format
    if teacher is not None:
        beside = beside_teacher(model, teacher, share=distillation, autocast=autocast)
    for network in (model, teacher):
        if network is not None:
            network.to(device=place, memory_format=layout)  # type: ignore[call-overload]
    return TrainingStep(
        model, make_optimizer(model, recipe, place),
        torch.amp.GradScaler(place.type, enabled=recipe.precision == "fp16"), terms,
        means=means_for(recipe.step, place), autocast=autocast, label_smoothing=recipe.label_smoothing,
        channels_last=last, capture=capture, beside=beside, loss_function=loss_function,
    )  # fmt: skip


class Switcher:
    """Carries out the switch of a recipe in the midst of a training."""

    def __init__(self, switch: Switch, recipe: Recipe, data: Data, place: torch.device) -> None:
        self.switch, self.recipe, self.data, self.place = switch, recipe.after_switch, data, place

    def __call__(self, training: Training) -> None:
        """Observe the network; when it is time, replace layers, and go on with a step for the new network."""
        model, old = training.run.model, training.run
        training.seen = (*training.seen, dict(self.switch.observe(model, self.data)))
        if not self.switch.due(training.epoch, training.epochs, training.seen):
            return
        teacher, weights = self._teacher(model), dense_weights(model)
        with as_training_error():
            found = self.switch.replace(model, self.data, training.seen)
        self._go_on(training, teacher)
        carry_momentum(old.optimizer, training.run.optimizer, model, weights, momentum=self.switch.momentum)
        training.run.scaler.load_state_dict(old.scaler.state_dict())
        old.forget()  # a graph's memory is set free
        training.switched = {"epoch": training.epoch, **found}

    def rebuild(self, training: Training, switched: Mapping[str, Any]) -> None:
        """The network and step of a checkpoint that was written after the switch."""
        teacher = self._teacher(training.run.model)
        self.switch.rebuild(training.run.model, switched["layers"])
        self._go_on(training, teacher)

    def _teacher(self, dense: nn.Module) -> nn.Module | None:
        return None if self.switch.teach is None else copy_of(dense).eval().requires_grad_(False)

    def _go_on(self, training: Training, teacher: nn.Module | None) -> None:
        model, training.setup_seconds = training.run.model, training.setup_seconds + training.run.setup_seconds
        run = make_step(model, self.recipe, device=self.place, teacher=teacher, distillation=self.switch.teach or 0.0)
        steps = training.steps
        schedule = Schedule(run, self.recipe, steps_per_epoch=steps, total_steps=training.epochs * steps)
        training.run, training.prepare, training.teacher = run, schedule.prepare, teacher


def identity(
    model: nn.Module, recipe: Recipe, *, seed: int, steps: int, data: Any, teacher: nn.Module | None = None
) -> dict[str, str]:
    """What a checkpoint of a training by ``recipe`` belongs to, each thing by its name."""
    taught = "" if teacher is None else weights(teacher.state_dict())
    found = {"recipe": repr(recipe), "seed": str(seed), "steps": str(steps), "layers": structure(model)}
    return found | {"starting weights": weights(model.state_dict()), "teacher": taught, "data": contents(data)}


def train(
    model: nn.Module, data: Data, recipe: Recipe | None = None, *, device: str | torch.device | None = None,
    seed: int = 0, checkpoint: str | Path | None = None, checkpoint_every: float = 60.0,
    should_stop: Callable[[], bool] | None = None, progress: bool | str = False, test: bool = True,
) -> Result:  # fmt: skip
    """Train ``model`` in place and test it once, at the end.

    Args:
        model: any network from (N, C, H, W) images to logits; moved to ``device``.
        data: training and test images; validation images are evaluated after every epoch.
        recipe, device: how, ``Recipe()`` unless given; where: the GPU if there is one, else the CPU.
        seed: of the order and the augmentation of the images (not of the initial weights).
        checkpoint: file that is resumed from when it exists, for the same data, recipe, seed and starting weights (or
            those that it holds); removed by nobody. On a CPU a resumed training gives bit for bit the result of an
            uninterrupted one.
        checkpoint_every: seconds after which the file is written at the next end of an epoch.
        should_stop: asked after every step but the last; True undoes an unfinished epoch and raises TrainingPaused.
        progress: whether to draw a bar, or what to write beside it.
        test: whether to look at the test images at all.

    Raises:
        TrainingError: for too few images, a recipe or checkpoint that does not fit the model, or a loss that is no
            longer finite.
        TrainingPaused: see ``should_stop``.
    """
    place = choose_device(device)
    recipe, seed = (recipe or Recipe()).resolved(model, place), plain_number("seed", seed, whole=True)
    steps = len(data.train) // recipe.batch_size
    if steps == 0:
        raise TrainingError(f"batch_size is {recipe.batch_size}, but there are only {len(data.train)} training images")
    first = recipe.before_switch
    check_recipe(model, first, steps)
    run = make_step(model, first, device=place)
    data = data.to(place)
    if recipe.switch:
        with as_training_error():
            recipe.switch.check(model, data)
    schedule = Schedule(run, first, steps_per_epoch=steps, total_steps=recipe.epochs * steps)
    generator = torch.Generator(place).manual_seed(seed)

    def validate() -> dict[str, float]:
        found = evaluate(model, data.validation, precision=recipe.precision) if data.validation else {}
        return {f"validation_{name}": value for name, value in found.items()}

    seen, total = [data.train, data.validation], schedule.total_steps
    belongs = identity(model, recipe, seed=seed, steps=total, data=seen) if checkpoint else {}
    training = Training(
        run=run, identity=belongs, epochs=recipe.epochs, steps=steps, generator=generator, validate=validate,
        batches=partial(augmented_batches, data.train, recipe, generator), prepare=schedule.prepare,
        switch=Switcher(recipe.switch, recipe, data, place) if recipe.switch else None,
    )  # fmt: skip
    with on_device(place), schedule.parts.restored(), as_training_error():
        training.loop(checkpoint, should_stop, progress, title="train", checkpoint_every=checkpoint_every)
    training.run.forget()  # a graph's memory is set free
    last = partial(evaluate, model, precision=recipe.precision, flip=True)
    return Result(
        curves=training.curves, test=last(data.test) if test else None,
        validation=last(data.validation) if data.validation else None, train_seconds=training.seconds,
        steps=training.step, images_per_second=training.images / training.seconds, precision=recipe.precision,
        memory_format=recipe.memory_format, step=str(training.run.means), switched=training.switched,
        setup_seconds=training.setup_seconds + training.run.setup_seconds,
    )  # fmt: skip


def augmented_batches(images: Images, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: normalised (N, C, H, W) and labels (N,), in random order and augmented."""
    size, device = recipe.batch_size, images.x.device
    whole = len(images) // size * size
    order = torch.randperm(len(images), generator=generator, device=device)[:whole]
    options: dict[str, Any] = {"flip": recipe.flip, "translate": recipe.translate, "cutout": recipe.cutout}
    # On a GPU ten batches at a time: the host would take longer to launch the operations than the GPU to do them.
    for index in order.split(10 * size if device.type == "cuda" else size):
        several = augment(images.x, index, generator, **options)
        for batch, its_index in zip(several.split(size), index.split(size), strict=True):
            x = normalise(batch)
            yield x if recipe.memory_format == "channels_last" else x.contiguous(), images.y[its_index]
