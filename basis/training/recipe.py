"""How a network is trained: the recipe, its learning rate and optimizer, and where and in which precision it runs.

The default recipe is the 26-epoch ResNet-18 recipe of K. Jordan's cifar10-zoo: 94.0 % with flip test-time
augmentation (n = 200).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from basis.numbers import one_of, plain_fields
from basis.training.penalties import parameter_groups
from basis.training.skipping import Skip
from basis.training.stepping import Step

if TYPE_CHECKING:
    from basis.search.switching import Switch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Decay = Literal["factors", "product", "scaled"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = {
    "precision": get_args(Precision),
    "memory_format": get_args(MemoryFormat),
    "decay": (None, *get_args(Decay)),
    "step": (None, *get_args(Step)),
}
POSITIVE = ("epochs", "batch_size", "lr", "peak", "decorrelation")
BELOW = {"peak": 1, "momentum": 1, "label_smoothing": 1, "translate": 16, "cutout": 33}


class TrainingError(RuntimeError):
    """A training that cannot start or go on; the message says why."""


class TrainingPaused(RuntimeError):
    """The training was asked to stop; the checkpoint holds all finished epochs."""


@contextmanager
def as_training_error() -> Iterator[None]:
    """Turn a ``ValueError`` into a :class:`TrainingError`."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs, batch_size: passes over the training images; images per step (an incomplete last batch is left out).
        lr: peak learning rate of SGD, for a loss that is the mean over the batch.
        peak, start: the fraction of all steps at which the learning rate peaks (it ends at 0); its start over ``lr``.
        momentum, weight_decay, label_smoothing: of Nesterov; L2 on all parameters; of the cross-entropy.
        flip, translate, cutout: the augmentation, see :func:`basis.data.augment`.
        precision, memory_format: of activations, see :func:`choose_precision` and :func:`choose_memory_format`.
        skip: which steps update the basis filters B and the coefficients A; None: all.
        decay: what ``weight_decay`` means for B and A. "factors" (None): the same as for all others; "product": it
            penalises [B; A B] instead (:func:`basis.training.penalties.product_norm`); "scaled": it is multiplied by
            :func:`basis.training.penalties.compression`, also for the ``factors`` of other structured layers.
        decorrelation: weight of :func:`basis.training.penalties.decorrelation`, summed over the layers, added at every
            tenth step that updates B, as LinearConv does (with 0.01).
        step: "eager", "compiled" by torch.compile, "graphed" as a CUDA graph, "fast": both; None: graphed on a GPU,
            else eager. What is not supported is left out, and :attr:`Result.step` says why.
        switch: trains dense first, then replaces layers and goes on (:class:`basis.Switch`); ``decay`` is that of the
            new layers then, "product" unless given.

    Raises:
        ValueError: for a value out of range, and terms that contradict each other.
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
    step: Step | None = None
    switch: Switch | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in (*POSITIVE, *BELOW, "weight_decay"):
            value, below = getattr(self, name), BELOW.get(name, math.inf)
            if value is not None and (not 0 <= value < below or (name in POSITIVE and value == 0)):
                least = "above 0" if name in POSITIVE else "at least 0"
                raise ValueError(f"{name} is {value}, but it must be {least} and below {below}")
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), choices)
        if self.decay in ("product", "scaled") and self.weight_decay == 0:
            raise ValueError(f"decay is {self.decay!r}, which has no effect where weight_decay is 0")
        if self.decorrelation is not None and self.skip and self.skip.basis_until == 0:
            raise ValueError("decorrelation acts on the basis filters, but skip never trains them (basis_until is 0)")
        if self.switch and self.skip:
            raise ValueError("switch goes without skip, which needs its layers from the start")

    @property
    def before_switch(self) -> Recipe:
        """How the dense network is trained; the recipe itself where there is no switch."""
        return replace(self, switch=None, decay=None) if self.switch else self

    @property
    def after_switch(self) -> Recipe:
        """How the network is trained once its layers are replaced."""
        return replace(self, switch=None, decay=self.decay or ("product" if self.weight_decay else None))

    def resolved(self, model: nn.Module, device: torch.device) -> Recipe:
        """The recipe with what "auto" stands for."""
        precision = choose_precision(device) if self.precision == "auto" else self.precision
        layout: Any = self.memory_format
        layout = choose_memory_format(model, device, precision) if layout == "auto" else layout
        return replace(self, precision=precision, memory_format=layout)

    def rate(self, done: float) -> float:
        """The learning rate: from ``start * lr`` up to ``lr`` at ``peak``, then down to 0; ``done`` in [0, 1]."""
        if done < self.peak:
            return self.lr * (self.start + (1 - self.start) * done / self.peak)
        return self.lr * (1 - done) / (1 - self.peak)


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The named device, or the GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_precision(device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """bf16 where the hardware multiplies it (GPUs from sm_80, CPUs with AMX or AVX-512 BF16), else fp16 or fp32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # a T4 emulates bf16, slowly
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def choose_memory_format(model: nn.Module, device: torch.device, precision: str) -> str:
    """Channels last, except for wide networks in fp32 on a CPU, which it makes slower there."""
    widest = max((p.shape[0] for p in model.parameters() if p.dim() == 4), default=0)
    return "contiguous" if device.type == "cpu" and precision == "fp32" and widest > 256 else "channels_last"


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    """SGD with Nesterov momentum over the parameters that require a gradient."""
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    if recipe.skip or recipe.decay in ("product", "scaled"):
        parameters = parameter_groups(model, weight_decay=recipe.weight_decay, decay=recipe.decay)
    fused = device.type == "cuda"  # one kernel, and the loss scale is handled without a sync
    optimizer = torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0, fused=fused,
    )  # fmt: skip
    if fused and recipe.momentum:
        # Where the loss scale makes the first step overflow, fused SGD skips it but believes the momentum to be set.
        for group in optimizer.param_groups:
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
    return optimizer


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
