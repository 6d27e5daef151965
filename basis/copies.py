"""Copies of any network, whatever tensors its modules keep beside parameters and buffers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from basis.inputs import Inputs, mapped


class _Copying(TorchFunctionMode):
    """Tensors that ``copy.deepcopy`` meets are copied by ``how``; by torch where it gives None."""

    def __init__(self, how: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.how = how

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo and (copied := self.how(tensor)) is not None:
            memo[id(tensor)] = copied
        return memo[id(tensor)] if id(tensor) in memo else func(*args)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also where modules keep computed tensors (pruning, activations); ``ValueError`` for DDP."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            what = f"its layer {name}" if name else "the model"
            raise ValueError(f"{what} is wrapped in DistributedDataParallel; change its .module, and wrap the result")
    with torch.no_grad(), _Copying(_apart):
        copied = copy.deepcopy(model)
    for new, old in zip(copied.parameters(), model.parameters(), strict=True):
        if new.requires_grad != old.requires_grad:  # as torch copies scripted modules
            new.requires_grad_(old.requires_grad)
    return copied


def _apart(tensor: Tensor) -> Tensor | None:
    """A copy of a tensor that torch itself would not copy: computed, not yet shaped, or of a kind of the user's."""
    if isinstance(tensor, UninitializedBuffer):
        return type(tensor)(device=tensor.device, dtype=tensor.dtype)  # type: ignore[call-arg]
    if tensor.is_leaf and type(tensor) is Tensor:
        return None
    copied = tensor.detach().clone().requires_grad_(tensor.is_leaf and tensor.requires_grad)
    vars(copied).update(vars(tensor))
    return copied


def shape_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the meta device: shapes without values."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    with _Copying(lambda tensor: tensor.detach().to("meta").requires_grad_(tensor.requires_grad)):
        return copy.deepcopy(model, memo)


def without_hooks(model: nn.Module) -> nn.Module:
    """``model`` itself without hooks but those of torch that make weights: for copies that are run and thrown away."""
    for module in model.modules():
        for hooks in (value for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)):
            for key, hook in list(hooks.items()):
                if not makes_weights(hook):
                    del hooks[key]
    return model


def makes_weights(hook: Any) -> bool:
    """Whether a hook is torch's own that computes a parameter before each call: of pruning, or of old weight norm."""
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def without_pruning(layer: nn.Module) -> nn.Module:
    """``layer`` itself, whose pruned parameters are plain ones from now on, with their zeros."""
    for module in layer.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return layer


def refuse_lazy(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model with lazy layers."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has lazy layers, whose shapes are not known yet; run it once first")


def on_a_copy(model: nn.Module, inputs: Inputs, do: Callable[[nn.Module, Inputs], Any]) -> Any:
    """What ``do`` gives for a copy without hooks, which it may use up: on the meta device if that can be, else real."""
    try:
        return do(without_hooks(shape_copy(model)), mapped(lambda tensor: tensor.to("meta"), inputs))
    except Exception:  # whatever the meta device cannot do, or a wrong input: the real run tells
        return do(without_hooks(copy_of(model)), inputs)


def watch_calls(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
    """Call ``enter`` (module, args, kwargs) before, and ``leave`` (these, output) after every call of a module."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True, always_call=True)


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """For runs of copies of ``model``: afterwards torch's random numbers and all buffers are as they were.

    A copy may reach the model's own layers, where somebody put a closure into it. What is compiled runs as written, and
    nothing that the model warns of is shown.
    """
    devices = {tensor.get_device() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    before = [(b, b.clone()) for b in model.buffers() if not b.is_meta and b.layout == torch.strided]
    compiles = "torch._dynamo" in sys.modules  # which takes long to import
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    with torch.random.fork_rng(devices), eager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    with torch.no_grad():
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def keep_attributes(old: nn.Module, new: nn.Module, *, own: Container[str] = ()) -> None:
    """Give ``new``, which takes the place of ``old``, its attributes that ``new`` lacks, whoever set them.

    Not what ``nn.Module`` itself keeps, nor the names that are ``own`` to the kind of ``old``.
    """
    for name in vars(old).keys() - vars(nn.Module()).keys():
        if name not in own and not hasattr(new, name):
            object.__setattr__(new, name, vars(old)[name])
