"""What a model costs: parameters, multiply-accumulates (MACs) forward and backward, activation bytes.

Everything is counted from shapes, beside the same layer as a dense convolution. What the 1x1 convolution with
M = [I; A] multiplies by the identity stands apart as ``identity_*``; ``torch.utils.flop_counter`` counts both.
Products outside these layers are seen as torch dispatches them: attention, recurrent cells, ``y @ y.mT``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from basis.inputs import Inputs, example_inputs, samples_in, shapes_of
from basis.layers.base import ConvLike
from basis.layers.batchnorm import BasisBatchNorm2d, uncouple
from basis.layers.calls import MATMULS, Call, has_formula, trace
from basis.layers.coefficients import Coefficients, LowRank, Sparse
from basis.layers.conv import BasisConv2d, ExplicitMode
from basis.layers.structured import StructuredConv2d
from basis.saving import columns

if TYPE_CHECKING:
    import pandas as pd

FUNCTIONS = "(functions)"  # the row of products that belong to no layer

# The columns of a printed report: title, unit, and the numbers of a cost that they add up.
COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("parameters", "", ("parameters",)),
    ("forward", "MACs", ("forward_macs",)),
    ("dX, dZ", "MACs", ("input_gradient_macs",)),
    ("weights", "MACs", ("weight_gradient_macs",)),
    ("identity", "MACs", ("identity_forward_macs", "identity_backward_macs")),
    ("kept", "bytes", ("activation_bytes",)),
    ("building", "MACs", ("building_macs",)),
)


@dataclass(frozen=True)
class Cost:
    """Numbers of one layer, or of a whole model, for one training step.

    ``parameters`` are trained numbers that are stored; a tied one counts where it appears first. A sparse A counts the
    entries it keeps, a frozen A none. ``activation_bytes`` are what a layer with parameters keeps for its own backward
    pass: its input (without padding), Z, and the M or W it builds.
    """

    parameters: int = 0
    forward_macs: int = 0
    input_gradient_macs: int = 0  # of gradients that flow on towards the input: dX, and dZ of the basis channels
    weight_gradient_macs: int = 0
    identity_forward_macs: int = 0  # what is multiplied by the identity in M, on top
    identity_backward_macs: int = 0
    activation_bytes: int = 0
    building_macs: int = 0  # what makes a structured layer's weight, once per step, beside ``forward_macs``

    @property
    def backward_macs(self) -> int:
        """MACs of the backward pass: input and weight gradients."""
        return self.input_gradient_macs + self.weight_gradient_macs

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))


@dataclass(frozen=True)
class LayerCost:
    """One layer: its ``cost`` as it is (a basis convolution in ``mode``), and as a ``dense`` one of the same shape."""

    name: str
    kind: str
    mode: str
    cost: Cost
    dense: Cost
    counted: bool = True  # else it is a convolution or linear layer that is never called
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class CostReport:
    """What :func:`cost` returns, for a step of ``batch_size`` samples. Prints as a table.

    :meth:`to_frame` gives all numbers. ``input_size`` is None where inputs were given; ``inputs`` are their shapes.
    ``uncounted`` are the operators whose work is not in the MACs.
    """

    layers: tuple[LayerCost, ...]
    input_size: tuple[int, ...] | None
    batch_size: int
    inputs: str = ""
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> Cost:
        """The sum over all layers."""
        return sum((layer.cost for layer in self.layers), Cost())

    @property
    def dense(self) -> Cost:
        """The sum over all layers, were every basis convolution and structured layer a dense one."""
        return sum((layer.dense for layer in self.layers), Cost())

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, indexed by name; the columns of the dense layer begin with ``dense_``."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for layer in self.layers:
            rows.append({"kind": layer.kind, "mode": layer.mode})
            for prefix, own in (("", layer.cost), ("dense_", layer.dense)):
                numbers = asdict(own) | {"backward_macs": own.backward_macs}
                rows[-1] |= {prefix + key: number for key, number in numbers.items()}
        return pd.DataFrame(rows, index=pd.Index([layer.name for layer in self.layers], name="layer"))

    def __str__(self) -> str:
        shown = COLUMNS if self.total.building_macs else COLUMNS[:-1]

        def values(own: Cost) -> list[int]:
            return [sum(getattr(own, name) for name in names) for *_, names in shown]

        def row(name: str, kind: str, own: Cost) -> tuple[str, ...]:
            parameters, *others = values(own)
            return (name, kind, f"{parameters:,}", *map(_short, others))

        ratios = (f"{a / b:.3f}" if b else "" for a, b in zip(values(self.total), values(self.dense), strict=True))
        rows = [("", "", *(title for title, *_ in shown)), ("layer", "kind", *(unit for _, unit, _ in shown))]
        rows += [row(layer.name, f"{layer.kind} {layer.mode}".strip(), layer.cost) for layer in self.layers]
        rows += [row("total", "", self.total), row("dense", "", self.dense), ("total / dense", "", *ratios)]
        kind = "image" if self.input_size and len(self.input_size) == 3 else "sample"
        title = f"one step of {self.batch_size} {kind}{'s' * (self.batch_size > 1)} of {self.input_size or self.inputs}"
        lines = [title, *columns(rows, left=2)]
        missing = [layer.name for layer in self.layers if not layer.counted]
        notes = {"never called": missing, "not counted": self.uncounted}
        return "\n".join(lines + [f"{what}: {', '.join(names)}" for what, names in notes.items() if names])


def _short(number: float) -> str:
    """1234567 as ``1.235 M``; 0 as an empty cell."""
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.4g}{unit}" if number else ""
        number /= 1000
    return f"{number:,.4g} T"


def cost(
    model: nn.Module, input_size: Iterable[int] | None = None, *, inputs: Inputs | None = None, batch_size: int = 1,
    mode: ExplicitMode | None = None,
) -> CostReport:  # fmt: skip
    """Count what ``model`` costs in one training step of ``batch_size`` samples, layer by layer.

    Every module that holds parameters gets a row. MACs are those of convolutions and products of matrices; those of
    complex numbers count as one. Gradients count where autograd records the product itself. A product outside of
    convolutions and linear layers counts for the layer whose parameter is a factor, or else for the layer with
    parameters that makes it; what is left is the row "(functions)". Operators that cannot be counted, such as quantised
    ones and FFT, are named. Shapes come from one run of a copy, in evaluation mode and without hooks, on the meta
    device if it can be.

    Args:
        input_size: the size of one sample, such as (C, H, W); the input is zeros then.
        inputs: in its place, a batch as the model takes it: a tensor, a tuple or list of arguments, or a dictionary
            of keyword arguments.
        mode: how basis convolutions are counted. None: each in its own mode, and ``"auto"`` as factorized.

    Raises ``ValueError`` for an argument out of range, lazy layers, and a model that cannot run on such an input.
    """
    if mode not in (None, "factorized", "composed"):
        raise ValueError(f"mode is {mode!r}, but it must be factorized, composed or None")
    example: Any = example_inputs(model, input_size, inputs, batch_size=batch_size)
    named: dict[str, Any] = dict(model.named_modules())
    coupled = any(isinstance(module, BasisBatchNorm2d) for module in named.values())
    seen: set[int] = set()
    layers = []
    traced = trace(uncouple(model) if coupled else model, example)
    outside: dict[nn.Module | None, Cost] = {}
    for layer, *macs in traced.products:
        outside[layer] = outside.get(layer, Cost()) + Cost(0, *macs)
    for name, module, calls in traced.layers:
        own, counted = named[name], ""
        if isinstance(own, BasisConv2d):
            counted = mode or ("factorized" if own.mode == "auto" or own.mixed_later else own.mode)
        others = outside.get(module, Cost())
        as_is, dense = (stored + others for stored in _stored(module, seen))
        for call in calls:
            through = isinstance(own, BasisBatchNorm2d)
            one = _through_basis_cost(own.conv, call) if through else _called_cost(module, call, counted)
            as_is, dense = as_is + _recorded(one, call), dense + _recorded(_dense_cost(module, call), call)
        known = bool(calls) or not isinstance(module, MATMULS) or module in outside
        layers.append(LayerCost(name, type(module).__name__, counted, as_is, dense, known, tuple(calls)))
    if None in outside:
        layers.append(LayerCost(FUNCTIONS, "", "", outside[None], outside[None]))
    size = tuple(example.shape[1:]) if inputs is None else None
    return CostReport(tuple(layers), size, samples_in(example), shapes_of(example), traced.uncounted)


def cost_alone(layer: ConvLike, calls: Sequence[Call], mode: ExplicitMode = "factorized") -> Cost:
    """What a basis convolution or structured layer costs in such calls, all its own."""
    costs = (_recorded(_called_cost(layer, call, mode), call) for call in calls)
    return sum(costs, Cost(count_parameters(layer)))


def count_parameters(model: nn.Module) -> int:
    """The trained numbers that ``model`` stores: ``cost(...).total.parameters``, without a forward pass."""
    seen: set[int] = set()
    return sum(_count_new(module, seen) for module in model.modules())


def count_trained(model: nn.Module) -> int:
    """The numbers that training changes: entries of parameters that require a gradient, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _count_new(module: nn.Module, seen: set[int]) -> int:
    """The numbers stored in ``module`` itself, without those of parameters already ``seen``."""
    new = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
    seen.update(map(id, new.values()))
    if isinstance(module, Coefficients):
        return module.stored if new else 0
    return sum(p.numel() for p in new.values())


def _stored(module: nn.Module, seen: set[int]) -> tuple[Cost, Cost]:
    """The parameters of a layer as it is, and of a dense one in its place, without those already ``seen``."""
    new = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
    own = _count_new(module, seen)
    if not isinstance(module, (BasisConv2d, StructuredConv2d)):
        return Cost(own), Cost(own)
    dense = new["bias"].numel() if "bias" in new else 0
    if "basis" in new or isinstance(module, StructuredConv2d):
        dense += module.out_channels * math.prod(module.filter_shape)
    if isinstance(module, BasisConv2d):
        own += _count_new(module.coefficients, seen)
    return Cost(own), Cost(dense)


def _recorded(cost: Cost, call: Call) -> Cost:
    """What is left where autograd did not record the call."""
    none = {"input_gradient_macs": 0, "weight_gradient_macs": 0, "identity_backward_macs": 0, "activation_bytes": 0}
    return cost if call.recorded else replace(cost, **none)


def _called_cost(module: Any, call: Call, mode: str) -> Cost:
    """One call of any layer; without parameters."""
    if isinstance(module, BasisConv2d):
        return _basis_cost(module, call, mode)
    return _structured_cost(module, call) if isinstance(module, StructuredConv2d) else _dense_cost(module, call)


def _dense_cost(module: Any, call: Call) -> Cost:
    """Any layer of torch, and a basis convolution or structured layer as if it were dense."""
    trains = any(p.requires_grad for p in module.parameters())
    kept = math.prod(call.x) * call.itemsize if trains or call.needs_dx else 0
    if not has_formula(module):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and kept:
            kept += 2 * call.x[1] * max(call.itemsize, 4)  # the statistics are never in half precision
        return Cost(activation_bytes=kept)
    if isinstance(module, ConvLike):
        weight = module.out_channels * math.prod(module.filter_shape)
        trains_weight = any(p.requires_grad for name, p in module.named_parameters() if name != "bias")
    else:
        weight, trains_weight = module.weight.numel(), module.weight.requires_grad
    macs = _positions(module, call) * weight
    return Cost(0, macs, call.needs_dx * macs, trains_weight * macs, activation_bytes=kept)


def _basis_cost(layer: BasisConv2d, call: Call, mode: str) -> Cost:
    """A basis convolution in one of the two modes: n C F, n k F and the products of A, as the code says."""
    n, f, a = _positions(layer, call), layer.basis[0].numel(), layer.coefficients
    c, k, rank = layer.out_channels, layer.basis_channels, a.rank if isinstance(a, LowRank) else 0
    dx, db, da = call.needs_dx, layer.basis.requires_grad, a.trains
    dz = dx or db
    trains = da or db or (layer.bias is not None and layer.bias.requires_grad)
    x = math.prod(call.x) * call.itemsize
    z, m, w, own = (size * call.itemsize for size in (n * k, c * a.columns, c * f, a.rows * a.columns))
    hidden = rank * a.groups * call.itemsize  # what a low-rank A keeps between U and V, for one pixel or weight

    if mode == "composed":
        build = _products(a.products, f, dz=db, da=da)
        kept = (x + w) * (trains or dx) + f * hidden * da + own * (db and isinstance(a, Sparse))
        weights = (da or db) * n * c * f + build.backward_macs
        return Cost(0, n * c * f + build.forward_macs, dx * n * c * f, weights, activation_bytes=kept)
    convolve = Cost(0, n * k * f, dx * n * k * f, db * n * k * f)
    if not a.mixes:
        kept = x * dz + (bool(rank) * z + n * hidden) * (dz or da)
        return convolve + _products(a.products, n, dz=dz, da=da) + Cost(activation_bytes=kept)
    identity = n * k * a.columns
    mix = convolve + _products((a.rows * a.columns,), n, dz=dz, da=da)
    return mix + Cost(0, 0, 0, 0, identity, (dz + da) * identity, x * dz + (z + m) * (trains or dx))


def _products(products: Sequence[int], times: int, *, dz: bool, da: bool) -> Cost:
    """Products with parts of A, one after the other; dz: whether what the first is applied to needs a gradient."""
    flows = sum(macs * (dz or (da and i > 0)) for i, macs in enumerate(products))
    return Cost(0, times * sum(products), times * flows, times * da * sum(products))


def _structured_cost(layer: StructuredConv2d, call: Call) -> Cost:
    """A structured layer, product after product, each at its own resolution."""
    *images, _, height, width = call.x
    pixels = {"output": _positions(layer, call), "input": math.prod(images) * height * width}
    learns = any(p.requires_grad for p in layer.parts.values())
    flows = call.needs_dx  # whether what the next product takes in needs a gradient
    kept = math.prod(call.x) * call.itemsize * (flows or any(p.requires_grad for p in layer.parameters()))
    total = Cost(activation_bytes=kept, building_macs=layer.building)
    for product in layer.products:
        macs, kept = product.macs * pixels[product.at], product.reads * pixels[product.reads_at] * call.itemsize
        total += Cost(0, macs, flows * macs, learns * macs, activation_bytes=kept * (flows or learns))
        flows = flows or learns
    return total


def _through_basis_cost(conv: BasisConv2d, call: Call) -> Cost:
    """A batch normalisation through the basis: n k^2 for the covariance of Z, and as much in the gradient of Z."""
    images, c, *spatial = call.y
    k = conv.basis_channels
    macs = images * math.prod(spatial) * k * k
    return Cost(0, macs, call.needs_dx * macs, activation_bytes=4 * (c * k + c + k))


def _positions(module: Any, call: Call) -> int:
    """How often the weight is applied: images x output pixels (input pixels where transposed), or rows."""
    if isinstance(module, nn.Linear):
        return math.prod(call.y[:-1])
    shape = call.x if isinstance(module, _ConvTransposeNd) else call.y
    spatial = len(module.kernel_size)
    return math.prod(shape[: -spatial - 1]) * math.prod(shape[-spatial:])
