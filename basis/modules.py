"""What is done to any module: flags and statistics set for a while, hooks, memory format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
def keeping(modules: Iterable[nn.Module], *names: str) -> Iterator[None]:
    """Whatever happens to these attributes of each module, they come back."""
    kept = [(module, name, getattr(module, name)) for module in modules for name in names]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module's own flag comes back."""
    with keeping(model.modules(), "training"):
        model.eval()
        yield


@contextmanager
def training_norms(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """These modules in training mode, their statistics from zero the plain average over the batches to come.

    As in EagleEye (Li et al. 2020, arXiv 2007.02491, section 3.2). Flag and momentum come back.
    """
    with keeping(norms, "training", "momentum"):
        for norm in norms:
            norm.train()
            norm.momentum = None
            norm.reset_running_stats()
        yield


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations with running statistics, each once."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is 4-d and stored channels-last, and not (also) contiguous in the ordinary sense."""
    last = weight.dim() == 4 and weight.permute(0, 2, 3, 1).is_contiguous()  # asked in a way that vmap knows
    return last and not weight.is_contiguous()
