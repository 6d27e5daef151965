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
    """In evaluation mode; every module's own flag comes back, by its own ``train()``, which may do more."""
    flags = [(module, module.training) for module in model.modules()]
    with keeping(model.modules(), "training"):
        model.eval()
        try:
            yield
        finally:
            for module, flag in flags:
                if module.training != flag:
                    module.train(flag)


@contextmanager
def training_norms(norms: Sequence[_BatchNorm]) -> Iterator[list[_BatchNorm]]:
    """These modules in training mode, their statistics the plain average over the batches to come.

    As in EagleEye (Li et al. 2020, arXiv 2007.02491, section 3.2). Flag and momentum come back; after an exception,
    and where a norm stays in evaluation mode or counts no batch, the old statistics, too. Yields the norms that train,
    after the block without those that counted no batch.
    """
    before = [(norm, buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    with training_among(norms) as live, keeping(norms, "momentum"):
        measured: list[_BatchNorm] = []
        try:
            for norm in live:  # the first batch replaces the statistics, which a norm that counts none needs
                norm.momentum = None
                for buffer in norm.buffers(recurse=False):
                    buffer.nan_to_num_()
                norm.num_batches_tracked.zero_()  # type: ignore[union-attr]
            yield live
            measured = [norm for norm in live if norm.num_batches_tracked != 0]
        finally:
            live[:] = measured
            for _, buffer, old in (one for one in before if one[0] not in live):
                buffer.copy_(old)


@contextmanager
def training_among(norms: Sequence[_BatchNorm]) -> Iterator[list[_BatchNorm]]:
    """Those of the norms that ``train()`` brings into training mode; what else is inside them is in evaluation."""
    with keeping([part for norm in norms for part in norm.modules()], "training"):
        for norm in norms:
            norm.train()
            for part in norm.children():
                part.eval()
        yield [norm for norm in norms if norm.training]


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisations with running statistics, each once."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [m for m in norms if m.running_mean is not None and m.num_batches_tracked is not None]


def recalibrates(model: nn.Module) -> bool:
    """Whether some batch normalisation has running statistics that training would change."""
    with training_among(tracking_norms(model)) as norms:
        return bool(norms)


def is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is 4-d and stored channels-last, and not (also) contiguous in the ordinary sense."""
    last = weight.dim() == 4 and weight.permute(0, 2, 3, 1).is_contiguous()  # asked in a way that vmap knows
    return last and not weight.is_contiguous()
