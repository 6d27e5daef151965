"""What is done to any module: flags and statistics set for a while, hooks, memory format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """With these forward hooks on the layers of these names."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module's own flag comes back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def is_channels_last(weight: Tensor) -> bool:
    """Whether a 4-d weight is stored channels-last and not (also) contiguous in the ordinary sense."""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations with running statistics, each once."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def training_norms(norms: Sequence[_BatchNorm], *, afresh: bool = False) -> Iterator[None]:
    """These modules in training mode; afterwards they have the flag and the momentum that they had.

    With ``afresh`` their statistics start at zero and become the plain average over the batches to come, whatever
    their momentum (EagleEye: Li et al. 2020, arXiv 2007.02491, section 3.2).
    """
    kept = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train()
        if afresh:
            norm.momentum = None
            norm.reset_running_stats()
    try:
        yield
    finally:
        for norm, (flag, momentum) in zip(norms, kept, strict=True):
            norm.training, norm.momentum = flag, momentum
