"""The calls of a network's layers in one forward pass, and the products of matrices that happen outside of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from basis.copies import on_a_copy, refuse_lazy, watch_calls
from basis.inputs import Inputs, run, shapes_of, tensors_in
from basis.layers.base import ConvLike
from basis.layers.coefficients import Coefficients
from basis.text import first_line

MATMULS = (_ConvNd, nn.Linear, ConvLike)
# Products by operator, and which argument is their first factor.
FACTORS = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "vdot": 0, "convolution": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1
}  # fmt: skip
# Other operators that multiply matrices: they are named, not counted.
OPAQUE = re.compile(
    r"(?!.*(norm|check|cross))(.*_)?(\w*mm|mv|conv(?!ert)\w*|rnn|lstm(?!_cell)|gru(?!_cell)|attention|encoder|fft|"
    r"linalg|cdist|pdist|trilinear|linear|matmul|cholesky|solve)(_|$)"
)


@dataclass(frozen=True)
class Call:
    """One call of a layer: shapes in and out, bytes per number, and whether dX, and any gradient, is taken."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    itemsize: int
    needs_dx: bool
    recorded: bool = True


class Trace(NamedTuple):
    """One forward pass: every layer, by name, with its calls; other products; operators that cannot be counted."""

    layers: list[tuple[str, nn.Module, list[Call]]]
    products: list[tuple[nn.Module | None, int, int, int]]  # whose, if any; MACs forward, for dX, for parameters
    uncounted: tuple[str, ...]


def has_formula(module: Any) -> bool:
    """Whether shapes say what a call costs; not where somebody else has written the forward pass or the weight."""
    if isinstance(module, ConvLike):
        return True
    if not isinstance(module, MATMULS) or "forward" in vars(module):
        return False
    methods = [getattr(type(module), name, nn.Linear.forward) for name in ("forward", "_conv_forward")]
    plain = all(method.__module__.startswith("torch.nn.modules.") for method in methods)
    return plain and module.weight.layout == torch.strided


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run a copy of ``model`` on ``inputs``, in evaluation mode and without hooks, on the meta device if it can.

    Raises ``ValueError`` for lazy layers, and a model that cannot run on such inputs.
    """
    refuse_lazy(model)
    try:
        return on_a_copy(model, inputs, _run)
    except Exception as error:  # the model's own code may raise anything
        what = f"the model cannot be run on an input of {shapes_of(inputs)}: {first_line(error)}"
        raise ValueError(f"{what}; inputs= takes a batch of any kind") from error


def _run(model: nn.Module, inputs: Inputs) -> Trace:
    calls: dict[nn.Module, list[Call]] = {}
    for module in model.eval().modules():
        holds = next(module.parameters(False), None) is not None and not isinstance(module, Coefficients)
        if holds or isinstance(module, MATMULS):
            calls[module] = []
    watch = _Watch(calls)

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        watch.running.pop()
        x, y = tensors_in((args, kwargs)), tensors_in(output)
        if x and y and module in calls:
            recorded = torch.is_grad_enabled()
            needs_dx = recorded and x[0].requires_grad
            calls[module].append(Call(tuple(x[0].shape), tuple(y[0].shape), x[0].element_size(), needs_dx, recorded))

    watch_calls(model, lambda module, *_: watch.running.append(module), leave)
    with torch.enable_grad(), torch.jit.optimized_execution(False), watch:  # which would hide what takes a gradient
        run(model, inputs)
    layers = [(name, module, calls[module]) for name, module in model.named_modules() if module in calls]
    return Trace(layers, watch.products, tuple(watch.uncounted))


class _Watch(TorchDispatchMode):
    """Keeps the products that no formula of the ``running`` layers covers.

    A product belongs to the layer whose parameter is a factor, or else to the innermost one that runs.
    """

    supports_higher_order_operators = True

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.layers, self.covered = layers, set(filter(has_formula, layers))
        self.owners = WeakIdKeyDictionary({p: layer for layer in layers for p in layer.parameters(recurse=False)})
        self.running: list[nn.Module] = []
        self.products: list[tuple[nn.Module | None, int, int, int]] = []
        self.uncounted: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.covered.isdisjoint(self.running):
            self._keep(func, args, out)
        return out

    def _keep(self, func: Any, args: Any, out: Any) -> None:
        """Note what ``func`` multiplied."""
        operator = func.name().partition(".")[0]
        space, _, name = operator.rstrip("_").partition("::")
        first = FACTORS.get(name, 0)
        factors = [factor for factor in args[first : first + 2] if isinstance(factor, Tensor)]
        sparse = any(factor.layout != torch.strided for factor in factors)
        if space != "aten" or name not in FACTORS or sparse:
            if OPAQUE.match(name) if space == "aten" else not space.startswith(("prim", "profiler")):
                self.uncounted[f"{operator}{' of sparse tensors' * sparse}"] = None
            return
        a, b = factors
        if name == "convolution":
            maps = a if args[6] else out  # of a transposed one each input pixel meets the weight
            macs = maps.numel() // maps.shape[1] * b.numel()
        else:
            macs = a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
        owners = [self.owners.get(f if f._base is None else f._base) for f in factors]
        flows = [macs * (f.requires_grad and torch.is_grad_enabled()) for f in factors]
        weights = sum(flow for flow, owner in zip(flows, owners, strict=True) if owner)
        running = (layer for layer in reversed(self.running) if layer in self.layers)
        owner = next(filter(None, (*owners, *running)), None)
        self.products.append((owner, macs, sum(flows) - weights, weights))
