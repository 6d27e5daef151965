"""Training on images that are already on the device: one recipe, one function, one result.

The default recipe is the 26-epoch ResNet-18 recipe of K. Jordan's cifar10-zoo, which reaches 94.0 %
with flip test-time augmentation (n = 200).
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from basis.batches import first_weight
from basis.data import Data, Images, augment, normalise
from basis.layers.coefficients import Sparse
from basis.layers.conv import BasisConv2d
from basis.layers.structured import StructuredConv2d
from basis.modules import evaluating
from basis.saving import replacing
from basis.training.attention import Attention
from basis.training.evaluation import Evaluation, evaluate_batches
from basis.training.penalties import compression, decorrelation, parameter_groups, product_norm
from basis.training.skipping import Parts, Skip, Trained, check_skip
from basis.training.stepping import Capture, Step, TrainingStep, means_for

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Decay = Literal["factors", "product", "scaled"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """A training that cannot start or go on; the message says why and what would be right."""


class TrainingPaused(RuntimeError):
    """The time was up; the checkpoint holds all finished epochs."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. Frozen, so that a record can state it whole.

    Args:
        epochs: passes over the training images.
        batch_size: images per step; an incomplete last batch is left out.
        lr: peak learning rate of SGD, for a loss that is the mean over the batch.
        peak: the fraction of all steps at which the learning rate peaks.
        start: the learning rate of the first step, as a fraction of ``lr``; it ends at 0.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on all parameters.
        label_smoothing: as in ``cross_entropy``.
        flip, translate, cutout: the augmentation, see :func:`basis.data.augment`.
        precision: of activations ("auto": see :func:`choose_precision`); parameters stay fp32.
        memory_format: of weights and activations ("auto": see :func:`choose_memory_format`).
        skip: which steps update the basis filters B and the coefficients A of basis convolutions; None:
            all of them.
        decay: what ``weight_decay`` means for B and A. "factors" (None): what it means for all others;
            "product": it penalises the weight [B; A B] that they make, and B and A not by themselves
            (:func:`basis.training.penalties.product_norm`); "scaled": it is multiplied by the fraction of its
            parameters that the network keeps (:func:`basis.training.penalties.compression`), and so it is for the
            ``factors`` of the other structured layers.
        decorrelation: weight of :func:`basis.training.penalties.decorrelation`, summed over the layers and added
            to the loss at every tenth step that updates B, as LinearConv does (with 0.01); None: not at all.
        settle: the fraction of the training after which the masks of sparse coefficients stay as they
            are; None: half of it.
        step: how a step is run. None: as a CUDA graph on a GPU, else operation by operation; "eager":
            operation by operation; "compiled": by torch.compile; "graphed": as a CUDA graph; "fast": by both, see
            :func:`basis.training.stepping.means_for`. All give equal results, up to rounding. What is not
            supported is left out; :attr:`Result.step` says what was done, and why not more.
        attention: weight of attention transfer from a teacher (:class:`basis.training.attention.Attention`), summed
            over the taps; 1000 in Gray et al. 2019. None: no teacher.
        orthogonality: weight of the sum of ``layer.penalty()`` over the layers that have one, added to the
            loss; None: not at all.
    """

    epochs: int = 26
    batch_size: int = 500
    lr: float = 0.2
    peak: float = 0.2
    start: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    flip: bool = True
    translate: int = 4
    cutout: int = 12
    precision: Precision = "auto"
    memory_format: MemoryFormat = "auto"
    skip: Skip | None = None
    decay: Decay | None = None
    decorrelation: float | None = None
    settle: float | None = None
    step: Step | None = None
    attention: float | None = None
    orthogonality: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be positive")
        for name, below in (("momentum", 1), ("label_smoothing", 1), ("translate", 16), ("cutout", 33)):
            if not 0 <= getattr(self, name) < below:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 0 and below {below}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, but it must be at least 0")
        if not 0 < self.peak < 1:
            raise ValueError(f"peak is {self.peak}, but it is a fraction of the training and must lie in (0, 1)")
        if self.precision not in ("auto", *DTYPES):
            raise ValueError(f"precision is {self.precision!r}, but must be one of auto, {', '.join(DTYPES)}")
        if self.memory_format not in ("auto", "channels_last", "contiguous"):
            raise ValueError(
                f"memory_format is {self.memory_format!r}, but must be one of auto, channels_last, contiguous"
            )
        self._check_terms()

    def _check_terms(self) -> None:
        if self.skip is not None and not isinstance(self.skip, Skip):
            raise ValueError(f"skip is {self.skip!r}, but it must be a Skip, such as Skip(basis_every=4)")
        if self.decay not in (None, *get_args(Decay)):
            raise ValueError(f"decay is {self.decay!r}, but must be one of {', '.join(get_args(Decay))}")
        if self.decay in ("product", "scaled") and self.weight_decay == 0:
            raise ValueError(f"decay is {self.decay!r}, which has no effect where weight_decay is 0")
        for name in ("decorrelation", "attention", "orthogonality"):
            weight = getattr(self, name)
            if weight is not None and not 0 < weight < math.inf:
                raise ValueError(f"{name} is {weight}, but it is a weight and must be positive and finite (or None)")
        if self.decorrelation is not None and self.skip and self.skip.basis_until == 0:
            raise ValueError("decorrelation acts on the basis filters, but skip never trains them (basis_until is 0)")
        if self.settle is not None and not 0 <= self.settle < 1:
            raise ValueError(f"settle is {self.settle}, but it is a fraction of the training and must lie in [0, 1)")
        if self.step not in (None, *get_args(Step)):
            raise ValueError(f"step is {self.step!r}, but must be one of {', '.join(get_args(Step))}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training leaves: curves, final metrics, seconds.

    ``curves`` has one row per epoch: epoch (from 1), train_loss, train_accuracy (on augmented images,
    while training), seconds of that epoch, and validation_loss, validation_accuracy where images were
    held out. ``test`` holds loss and accuracy without test-time augmentation, and accuracy_flip with
    flip; None where no test was asked for. Accuracies are fractions. ``train_seconds`` leaves out all evaluation,
    and ``setup_seconds``, in which steps were compiled and captured. ``step`` says how they were run.
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


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """bf16 where the hardware multiplies it (GPUs from sm_80, CPUs with AMX or AVX-512 BF16), else fp16 or fp32."""
    if device.type == "cuda":
        # A T4 emulates bf16, slowly; hence the question without emulation.
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def choose_memory_format(model: nn.Module, device: torch.device, precision: str) -> str:
    """Channels last, except for wide networks in fp32 on a CPU, which it makes slower there."""
    if device.type == "cpu" and precision == "fp32":
        widest = max((p.shape[0] for p in model.parameters() if p.dim() == 4), default=0)
        return "channels_last" if widest <= 256 else "contiguous"
    return "channels_last"


def learning_rate(recipe: Recipe, done: float) -> float:
    """The triangle: from ``start * lr`` up to ``lr`` at ``peak``, then down to 0; ``done`` in [0, 1]."""
    if done < recipe.peak:
        return recipe.lr * (recipe.start + (1 - recipe.start) * done / recipe.peak)
    return recipe.lr * (1 - done) / (1 - recipe.peak)


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    """SGD with Nesterov momentum over the parameters that require a gradient."""
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if recipe.skip or recipe.decay in ("product", "scaled"):
        scale = compression(model) if recipe.decay == "scaled" else 1.0
        factor = 0.0 if recipe.decay == "product" else scale
        parameters = parameter_groups(model, weight_decay=recipe.weight_decay, factor=factor, structured=scale)
    fused = device.type == "cuda"  # one kernel, and the loss scale is handled without a sync
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=fused,
    )
    if fused and recipe.momentum:
        # Where the loss scale makes the first step overflow, fused SGD skips it but believes the momentum to be set.
        for group in optimizer.param_groups:
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
    return optimizer


class Kind(NamedTuple):
    """What tells one step of a training from another: what is trained, the objective, and whether masks are fixed."""

    trained: Trained = Trained(basis=True, coefficients=True)
    decorrelates: bool = False
    settled: bool = False


def make_step(
    model: nn.Module,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device | None = None,
    capture: Capture | None = None,
    teacher: nn.Module | None = None,
    taps: Sequence[str] | None = None,
) -> TrainingStep:
    """Put ``model`` on the device, and make the step that trains it as ``recipe`` says.

    To be called with what the network takes, (N, C, H, W) in the recipe's memory format, labels (N,) and a
    :class:`Kind`. Skipped parts are for the caller to freeze, as are learning rates to set.

    Args:
        model, recipe, device, teacher, taps: as in :func:`train`.
        capture: see :class:`basis.training.stepping.TrainingStep`.

    Raises:
        TrainingError: for a teacher that the recipe does not ask for, or that cannot teach this model.
    """
    place = choose_device(device)
    recipe = _decided(recipe or Recipe(), model, place)
    autocast = partial(autocast_in, place, recipe.precision)
    _check_teacher(recipe, teacher, taps)
    attention = None
    if teacher is not None and recipe.attention is not None:
        with as_training_error():
            attention = Attention(model, teacher, taps, weight=recipe.attention, autocast=autocast)
    last = recipe.memory_format == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    for network in (model, teacher):
        if network is not None:
            network.to(device=place, memory_format=layout)  # type: ignore[call-overload]
    layers = [module for module in model.modules() if isinstance(module, BasisConv2d)]
    return TrainingStep(
        model,
        make_optimizer(model, recipe, place),
        torch.amp.GradScaler(place.type, enabled=recipe.precision == "fp16"),
        partial(_objective, recipe, layers, penalised=_penalised(model)),
        means=means_for(recipe.step, place),
        autocast=autocast,
        label_smoothing=recipe.label_smoothing,
        channels_last=last,
        capture=capture,
        attention=attention,
    )


def _decided(recipe: Recipe, model: nn.Module, device: torch.device) -> Recipe:
    """The recipe with what "auto" stands for."""
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=choose_precision(device))
    if recipe.memory_format == "auto":
        recipe = replace(recipe, memory_format=choose_memory_format(model, device, recipe.precision))  # type: ignore[arg-type]
    return recipe


def _penalised(model: nn.Module) -> list[Any]:
    """The layers with a ``penalty`` of their own: a function without arguments, to a scalar."""
    return [module for module in model.modules() if callable(getattr(module, "penalty", None))]


def _objective(
    recipe: Recipe, layers: Sequence[BasisConv2d], loss: Tensor, kind: Kind | None, penalised: Sequence[Any] = ()
) -> Tensor:
    """``loss`` and what the recipe adds to it for single layers, in fp32 and before loss scaling."""
    if recipe.decay == "product":
        norms = [product_norm(a.basis, a.coefficients.matrix(), a.coefficients.groups) for a in layers]
        loss = loss + recipe.weight_decay / 2 * torch.stack(norms).sum()
    if recipe.decorrelation is not None and kind and kind.decorrelates:
        correlations = [decorrelation(layer.basis, layer.groups) for layer in layers]
        loss = loss + recipe.decorrelation * torch.stack(correlations).sum()
    if recipe.orthogonality is not None:
        loss = loss + recipe.orthogonality * torch.stack([layer.penalty() for layer in penalised]).sum()
    return loss


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe | None = None,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    should_stop: Callable[[], bool] | None = None,
    progress: bool | str = False,
    test: bool = True,
    step: TrainingStep | None = None,
    teacher: nn.Module | None = None,
    taps: Sequence[str] | None = None,
) -> Result:
    """Train ``model`` in place and test it once, at the end.

    Args:
        model: any network from (N, C, H, W) images to logits; moved to ``device``.
        data: training and test images; validation images are evaluated after every epoch.
        recipe: how; the default is ``Recipe()``.
        device: where; the GPU if there is one, else the CPU.
        seed: of the order and the augmentation of the images (not of the initial weights).
        checkpoint: file that is resumed from when it exists; removed by nobody. A resumed training gives bit for
            bit the result of an uninterrupted one on a CPU.
        checkpoint_every: seconds; the file is written after an epoch when so many have passed since the last time,
            and when the training stops early.
        should_stop: asked after every epoch; True ends the training by :class:`TrainingPaused`.
        progress: whether to draw a bar, or what to write beside it.
        test: whether to look at the test images at all; trainings that only inform a choice do not.
        step: made by :func:`make_step` for this very model and recipe, and used before, so that nothing
            has to be compiled or captured again.
        teacher: a network for ``recipe.attention``; moved to ``device``, and otherwise left as it is.
        taps: names of the modules whose attention maps are compared; None: ``model.stages``.

    Raises:
        TrainingError: for too few images, a recipe with terms that this model gives no meaning to, a
            step of another model, a teacher whose maps cannot be compared, a checkpoint of another
            training, or a loss that is no longer finite.
        TrainingPaused: see ``should_stop``.
    """
    place = choose_device(device)
    recipe = _decided(recipe or Recipe(), model, place)
    steps_per_epoch = len(data.train) // recipe.batch_size
    if steps_per_epoch == 0:
        raise TrainingError(f"batch_size is {recipe.batch_size}, but there are only {len(data.train)} training images")
    if step is None:
        check_recipe(model, recipe, steps_per_epoch, teacher)
        step = make_step(model, recipe, device=place, teacher=teacher, taps=taps)
    else:
        _check_step(step, model, recipe, taught=teacher is not None or taps is not None)
        check_recipe(model, recipe, steps_per_epoch, step.attention.teacher if step.attention else None)
    data = data.to(place)
    if step.attention:
        with as_training_error(), on_device(place):
            step.attention.check(_input(data.train.x[:1], recipe.memory_format))
    state = _State(model, recipe, seed, place, total_steps=recipe.epochs * steps_per_epoch, step=step)
    path = Path(checkpoint) if checkpoint else None
    if path and path.exists():
        state.restore(path)
    total, first = state.total_steps, state.epoch * steps_per_epoch
    title = progress if isinstance(progress, str) else None
    bar = tqdm(total=total, initial=first, disable=not progress, desc=title, unit="step", dynamic_ncols=True)
    saved = time.monotonic()
    with bar, on_device(place), state.parts.restored():
        while state.epoch < recipe.epochs:
            row = _epoch(state, data.train, bar)
            if data.validation:
                held = evaluate(model, data.validation, precision=recipe.precision)
                row |= {"validation_loss": held["loss"], "validation_accuracy": held["accuracy"]}
            state.curves.append(row)
            shown = row.get("validation_accuracy", row["train_accuracy"])
            bar.set_postfix_str(f"epoch {state.epoch}/{recipe.epochs}, accuracy {shown:.1%}")
            stops = should_stop is not None and state.epoch < recipe.epochs and should_stop()
            if path and (stops or time.monotonic() - saved >= checkpoint_every):
                state.save(path)
                saved = time.monotonic()
            if stops:
                raise TrainingPaused(f"stopped after epoch {state.epoch} of {recipe.epochs}, as asked")
    seconds = sum(row["seconds"] for row in state.curves)
    return Result(
        curves=tuple(state.curves),
        test=evaluate(model, data.test, precision=recipe.precision, flip=True) if test else None,
        validation=evaluate(model, data.validation, precision=recipe.precision, flip=True) if data.validation else None,
        train_seconds=seconds,
        steps=total,
        images_per_second=total * recipe.batch_size / seconds,
        precision=recipe.precision,
        memory_format=recipe.memory_format,
        step=str(state.step.means),
        setup_seconds=state.step.setup_seconds,
    )


def check_recipe(model: nn.Module, recipe: Recipe, steps_per_epoch: int, teacher: nn.Module | None = None) -> None:
    """Raise :class:`TrainingError` for terms of the recipe that would have no effect on this model."""
    has_basis = any(isinstance(module, BasisConv2d) for module in model.modules())
    product = recipe.decay if recipe.decay == "product" else None
    terms = {"skip": recipe.skip, "decay": product, "decorrelation": recipe.decorrelation}
    named = [name for name, value in terms.items() if value is not None]
    if named and not has_basis:
        raise TrainingError(f"the recipe sets {', '.join(named)}, but the model has no basis convolutions")
    has_factors = any(isinstance(module, StructuredConv2d) and module.factors for module in model.modules())
    if recipe.decay == "scaled" and not (has_basis or has_factors):
        raise TrainingError("the recipe sets decay, but the model has no basis convolutions or structured layers")
    if recipe.orthogonality is not None and not _penalised(model):
        raise TrainingError("the recipe sets orthogonality, but the model has no layers with a penalty")
    _check_teacher(recipe, teacher)
    if recipe.settle is not None and not any(isinstance(module, Sparse) for module in model.modules()):
        raise TrainingError("the recipe sets settle, but the model has no sparse coefficients")
    if recipe.skip:
        with as_training_error():
            check_skip(model, recipe.skip, steps_per_epoch=steps_per_epoch, total_steps=recipe.epochs * steps_per_epoch)


def _check_teacher(recipe: Recipe, teacher: nn.Module | None, taps: Sequence[str] | None = None) -> None:
    if recipe.attention is not None and teacher is None:
        raise TrainingError("the recipe sets attention, but there is no teacher; give one by teacher=network")
    if recipe.attention is None and not (teacher is taps is None):
        raise TrainingError("a teacher or taps are given, but the recipe does not set attention (attention=1000)")


def _check_step(step: TrainingStep, model: nn.Module, recipe: Recipe, *, taught: bool) -> None:
    if step.model is not model:
        raise TrainingError("the step was made for another model; make one for this model by make_step")
    if taught:
        raise TrainingError("a step has a teacher of its own; give teacher and taps to make_step instead")
    weight = step.attention.weight if step.attention else None
    if weight != recipe.attention:
        raise TrainingError(f"the step was made with attention = {weight}, but the recipe has {recipe.attention}")


@contextmanager
def as_training_error() -> Iterator[None]:
    """What is wrong with a value is wrong with the training."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


class _State:
    """All that a training changes, so that a checkpoint can hold all of it."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        *,
        total_steps: int,
        step: TrainingStep | None = None,
    ) -> None:
        self.model, self.recipe, self.device, self.total_steps = model, recipe, device, total_steps
        self.step = step or make_step(model, recipe, device=device)
        self.step.restart()
        self.optimizer, self.scaler = self.step.optimizer, self.step.scaler
        self.steps_per_epoch = total_steps // recipe.epochs
        self.layers = [module for module in model.modules() if isinstance(module, BasisConv2d)]
        self.parts = Parts(model)
        self.sparse = [a for a in (layer.coefficients for layer in self.layers) if isinstance(a, Sparse)]
        self.settles_at = min(round((0.5 if recipe.settle is None else recipe.settle) * total_steps), total_steps - 1)
        self.epoch = 0
        self.curves: list[dict[str, float]] = []
        self.generator = torch.Generator(device).manual_seed(seed)
        shapes = [tuple(p.shape) for p in model.parameters()]
        said = {name: value for name, value in asdict(recipe).items() if value is not None}
        forms = [str(layer.coefficients.form) for layer in self.layers]
        more: list[Any] = forms if set(forms) - {"dense"} else []
        more += [module.text for module in model.modules() if isinstance(module, StructuredConv2d)]
        if self.step.attention:
            more += [self.step.attention.taps, [tuple(p.shape) for p in self.step.attention.teacher.parameters()]]
        self.identity = repr((said, seed, total_steps, shapes, *more))

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
        """Before a step: its learning rate, the parts that it trains, and the end of learned masks."""
        skip, kind = self.recipe.skip, self.kind(step)
        rate = learning_rate(self.recipe, step / self.total_steps)
        groups = self.optimizer.param_groups
        self.step.set_rates([(skip.rate(group["part"]) if skip else 1) * rate for group in groups])
        if skip:
            self.parts.train(kind.trained)
        if step == self.settles_at:
            for coefficients in self.sparse:
                coefficients.settle()
        return kind

    def save(self, path: Path) -> None:
        content = {
            "identity": self.identity,
            "epoch": self.epoch,
            "curves": self.curves,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        write_checkpoint(path, content)

    def restore(self, path: Path) -> None:
        content = read_checkpoint(path, self.identity)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step.forget()
        self.generator.set_state(content["generator"])
        torch.set_rng_state(content["random"])
        self.epoch, self.curves = content["epoch"], content["curves"]


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all; ``content`` has an ``identity``."""
    packed = io.BytesIO()  # torch reports a full disk in words of its own, a plain write as what it is
    torch.save(dict(content), packed)
    with replacing(path) as file:
        file.write(packed.getbuffer())


def read_checkpoint(path: Path, identity: str) -> dict[str, Any]:
    """The content of a checkpoint of the training of this identity; else a :class:`TrainingError`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["identity"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise TrainingError(f"checkpoint {path} cannot be read ({error}); delete it to start again") from error
    if found != identity:
        raise TrainingError(
            f"checkpoint {path} belongs to a training with another model, recipe, seed or data; "
            "delete it to start again, or name another file"
        )
    return content


def _epoch(state: _State, images: Images, bar: Any) -> dict[str, float]:
    """One pass over the images. The device is read once, at the end."""
    recipe, run = state.recipe, state.step
    steps = len(images) // recipe.batch_size
    state.model.train()
    run.start_epoch()
    began, setup = time.perf_counter(), run.setup_seconds
    for step, (x, labels) in enumerate(_batches(images, recipe, state.generator)):
        run(x, labels, state.prepare(state.epoch * steps + step))
        bar.update()
    train_loss = run.loss.item() / steps
    seconds = time.perf_counter() - began - (run.setup_seconds - setup)
    state.epoch += 1
    if not math.isfinite(train_loss):
        raise TrainingError(
            f"the training loss is {train_loss} in epoch {state.epoch} with lr = {recipe.lr} "
            f"and {recipe.precision}; a smaller lr would be right"
        )
    return {
        "epoch": state.epoch,
        "train_loss": train_loss,
        "train_accuracy": run.correct.item() / (steps * recipe.batch_size),
        "seconds": seconds,
    }


def _batches(images: Images, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: normalised (N, C, H, W) and labels (N,), in random order and augmented."""
    size, device = recipe.batch_size, images.x.device
    whole = len(images) // size * size
    order = torch.randperm(len(images), generator=generator, device=device)[:whole]
    # On a GPU ten batches at a time: the host would take longer to launch the operations than the GPU to do them.
    for index in order.split(10 * size if device.type == "cuda" else size):
        several = augment(
            images.x, index, generator, flip=recipe.flip, translate=recipe.translate, cutout=recipe.cutout
        )
        for batch, its_index in zip(several.split(size), index.split(size), strict=True):
            yield _input(batch, recipe.memory_format), images.y[its_index]


def seconds_per_step(step: TrainingStep, images: Images, recipe: Recipe, *, steps: int = 3) -> float:
    """How long a training step takes, data and all, once it is captured; changes the weights."""
    recipe = _decided(recipe, step.model, images.x.device)
    generator = torch.Generator(images.x.device)
    step.model.train()
    with on_device(images.x.device):
        for done, (x, labels) in enumerate(itertools.islice(_batches(images, recipe, generator), steps + 1)):
            step(x, labels, Kind())
            if done == 0:
                step.loss.item()  # waits for the device
                began = time.perf_counter()
        step.loss.item()
    return (time.perf_counter() - began) / max(done, 1)


@overload
def evaluate(
    model: nn.Module, data: Images, *, precision: Precision = ..., batch_size: int = ..., flip: bool = ...
) -> dict[str, float]: ...
@overload
def evaluate(
    model: nn.Module, data: Iterable[Any], *, precision: Precision = ..., progress: bool | str = ...
) -> Evaluation: ...
def evaluate(
    model: nn.Module,
    data: Images | Iterable[Any],
    *,
    precision: Precision = "fp32",
    batch_size: int = 1000,
    flip: bool = False,
    progress: bool | str = False,
) -> dict[str, float] | Evaluation:
    """Mean loss and accuracy (a fraction) of ``model`` in evaluation mode; every module's flag is put back.

    Args:
        data: :class:`basis.data.Images` on the model's device; or any iterable of batches (inputs, labels) of
            tensors, such as a ``DataLoader``, which are brought to the model's device one after the other.
        precision: of activations, see :class:`Recipe`.
        batch_size: for ``Images``.
        flip: for ``Images``: also ``accuracy_flip``, the logits averaged over each image and its mirror image.
        progress: for batches: whether to draw a bar, or what to write beside it.

    Returns:
        For ``Images`` a dictionary; for batches an :class:`Evaluation`, which has the same keys, and intervals.

    Raises:
        ValueError: for batches that are empty, that the model cannot run on, or whose labels do not fit.
    """
    if isinstance(data, Images):
        return _evaluate_images(model, data, precision=precision, batch_size=batch_size, flip=flip)
    if isinstance(data, Data):
        raise ValueError("data are training, validation and test images; give one of them, such as data.test")
    if flip:
        raise ValueError("flip goes with basis.data.Images; give batches of mirrored images yourself")
    device = first_weight(model).device
    autocast = autocast_in(device, choose_precision(device) if precision == "auto" else precision)
    return evaluate_batches(model, data, autocast=autocast, progress=progress)


@torch.no_grad()
def _evaluate_images(
    model: nn.Module, images: Images, *, precision: Precision, batch_size: int, flip: bool
) -> dict[str, float]:
    device = images.x.device
    precision = choose_precision(device) if precision == "auto" else precision
    weight = next((p for p in model.parameters() if p.dim() == 4), None)
    last = weight is not None and weight.is_contiguous(memory_format=torch.channels_last)
    loss, right, right_flip = (torch.zeros((), device=device) for _ in range(3))
    with evaluating(model):
        for x, y in zip(images.x.split(batch_size), images.y.split(batch_size), strict=True):
            batch = _input(x, "channels_last" if last else "contiguous")
            with autocast_in(device, precision):
                logits = model(batch).float()
                mirrored = model(batch.flip(3)).float() if flip else logits
            loss += F.cross_entropy(logits, y, reduction="sum")
            right += (logits.argmax(1) == y).sum()
            right_flip += ((logits + mirrored).argmax(1) == y).sum()
    metrics = {"loss": loss.item() / len(images), "accuracy": right.item() / len(images)}
    return metrics | {"accuracy_flip": right_flip.item() / len(images)} if flip else metrics


def _input(batch: Tensor, memory_format: str) -> Tensor:
    x = normalise(batch)
    return x if memory_format == "channels_last" else x.contiguous()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """On a GPU: make it the current one, and let cuDNN try its convolutions once for every shape."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        yield


def autocast_in(device: torch.device, precision: str) -> torch.autocast:
    """A context in which activations have this precision."""
    dtype = None if precision == "fp32" else DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
