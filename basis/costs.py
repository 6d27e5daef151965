"""What a model costs: parameters, multiply-accumulates (MACs) forward and backward, activation bytes.

Everything is counted from shapes, beside the same layer as a dense convolution. What the 1x1 convolution with
M = [I; A] multiplies by the identity stands apart as ``identity_*``; ``torch.utils.flop_counter`` counts both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from basis.copies import copy_of, shape_copy, without_hooks
from basis.layers.base import ConvLike
from basis.layers.batchnorm import BasisBatchNorm2d, uncouple
from basis.layers.coefficients import Coefficients, LowRank, Sparse
from basis.layers.conv import BasisConv2d, ExplicitMode
from basis.layers.structured import StructuredConv2d
from basis.saving import columns

if TYPE_CHECKING:
    import pandas as pd

MATMULS = (_ConvNd, nn.Linear, ConvLike)

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
    entries it keeps, a frozen A none, a structured layer its bits, 32 to a number. ``activation_bytes`` are what a
    layer with parameters keeps for its own backward pass: its input (without padding), Z, and the M or W it builds.
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
    counted: bool = True  # else MACs are missing: it holds weights but is never called, or is of an unknown kind


@dataclass(frozen=True)
class CostReport:
    """What :func:`cost` returns. Prints as a table; :meth:`to_frame` gives all numbers."""

    layers: tuple[LayerCost, ...]
    input_size: tuple[int, int, int]
    batch_size: int

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
            rows.append({"layer": layer.name, "kind": layer.kind, "mode": layer.mode})
            for prefix, own in (("", layer.cost), ("dense_", layer.dense)):
                numbers = asdict(own) | {"backward_macs": own.backward_macs}
                rows[-1] |= {prefix + key: number for key, number in numbers.items()}
        return pd.DataFrame(rows).set_index("layer")

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
        title = f"one step of {self.batch_size} image{'s' * (self.batch_size > 1)} of {self.input_size}"
        lines = [title, *columns(rows, left=2)]
        if missing := [layer.name for layer in self.layers if not layer.counted]:
            lines.append(f"MACs not counted (not called, or of an unknown kind): {', '.join(missing)}")
        return "\n".join(lines)


def _short(number: float) -> str:
    """1234567 as ``1.235 M``; 0 as an empty cell."""
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.4g}{unit}" if number else ""
        number /= 1000
    return f"{number:,.4g} T"


def cost(
    model: nn.Module, input_size: Sequence[int], *, batch_size: int = 1, mode: ExplicitMode | None = None
) -> CostReport:
    """Count what ``model`` costs in one training step of ``batch_size`` images, layer by layer.

    Every module that holds parameters gets a row. MACs are those of convolutions and linear layers; gradients are
    counted where training computes them. Shapes come from one run of a copy on the meta device, in evaluation mode
    and without hooks; a model that cannot run there runs once on its own device, on zeros.

    Args:
        input_size: (C, H, W) of one image.
        mode: how basis convolutions are counted. None: each in its own mode, and ``"auto"`` as factorized.

    Raises ``ValueError`` for an argument out of range, lazy layers, and a model that cannot run on such an input.
    """
    size = tuple(input_size)
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in (*size, batch_size)):
        given = f"input_size is {input_size!r} and batch_size is {batch_size!r}"
        raise ValueError(f"{given}, but they must be (C, H, W) and a number, all whole and at least 1")
    if mode not in (None, "factorized", "composed"):
        raise ValueError(f"mode is {mode!r}, but it must be factorized, composed or None")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model has lazy layers, whose shapes are not known yet; run it once first")
    named: dict[str, Any] = dict(model.named_modules())
    coupled = any(isinstance(module, BasisBatchNorm2d) for module in named.values())
    parts = {p for m in named.values() if isinstance(m, StructuredConv2d) for p in m.modules() if p is not m}
    seen: set[int] = set()
    layers = []
    for name, module, calls in trace_calls(uncouple(model) if coupled else model, (batch_size, *size)):
        own, counted = named[name], ""
        if isinstance(own, BasisConv2d):
            counted = mode or ("factorized" if own.mode == "auto" or own.mixed_later else own.mode)
        as_is, dense = _stored(module, seen)
        for call in calls:
            dense += _dense_cost(module, call)
            if isinstance(own, BasisBatchNorm2d):
                as_is += _through_basis_cost(own.conv, call)
            else:
                as_is += _called_cost(module, call, counted)
        if own in parts:  # a normalisation within a structured layer, which a dense one has not
            dense = Cost()
        plain = all(p.dim() < 2 for p in module.parameters(recurse=False))
        known = bool(calls) if isinstance(module, MATMULS) else plain
        layers.append(LayerCost(name, type(module).__name__, counted, as_is, dense, known))
    return CostReport(tuple(layers), size, batch_size)


def cost_alone(layer: ConvLike, calls: Sequence[Call], mode: ExplicitMode = "factorized") -> Cost:
    """What a basis convolution or structured layer costs in such calls (see :func:`trace_calls`), all its own."""
    return sum((_called_cost(layer, call, mode) for call in calls), Cost(count_parameters(layer)))


def count_parameters(model: nn.Module) -> int:
    """The trained numbers that ``model`` stores: ``cost(...).total.parameters``, without a forward pass."""
    seen: set[int] = set()
    return sum(_count_new(module, seen) for module in model.modules())


def count_trained(model: nn.Module) -> int:
    """The numbers that training changes: entries of parameters that require a gradient, tied ones once."""
    found = {
        id(p): module.trained(name) if isinstance(module, StructuredConv2d) and name in module.parts else p.numel()
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad
    }
    return sum(found.values())


def _count_new(module: nn.Module, seen: set[int]) -> int:
    """The numbers stored in ``module`` itself, without those of parameters already ``seen``."""
    new = {name: p for name, p in module.named_parameters(recurse=False) if id(p) not in seen}
    seen.update(map(id, new.values()))
    if isinstance(module, Coefficients):
        return module.stored if new else 0
    if isinstance(module, StructuredConv2d):
        return math.ceil(sum(32 * p.numel() if name == "bias" else module.bits(name) for name, p in new.items()) / 32)
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


@dataclass(frozen=True)
class Call:
    """One call of a layer: shapes in and out, bytes per number, and whether dX is needed."""

    x: tuple[int, ...]
    y: tuple[int, ...]
    itemsize: int
    needs_dx: bool


def trace_calls(model: nn.Module, size: tuple[int, ...]) -> list[tuple[str, nn.Module, list[Call]]]:
    """Every layer (in a copy of the model) with its calls in one forward pass."""
    try:
        return _run(shape_copy(model), size)
    except Exception:  # whatever the meta device cannot do, or a wrong input: the real run tells
        try:
            return _run(copy_of(model), size)
        except Exception as error:
            raise ValueError(f"the model cannot be run on an input of {size} (images, C, H, W): {error}") from error


def _run(model: nn.Module, size: tuple[int, ...]) -> list[tuple[str, nn.Module, list[Call]]]:
    calls: dict[nn.Module, list[Call]] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is not None and isinstance(output, Tensor):
            calls[module].append(Call(tuple(x.shape), tuple(output.shape), x.element_size(), x.requires_grad))

    for module in without_hooks(model).eval().modules():
        holds = next(module.parameters(False), None) is not None and not isinstance(module, Coefficients)
        if holds or isinstance(module, MATMULS):
            calls[module] = []
            module.register_forward_hook(record, with_kwargs=True)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.enable_grad():
        model(torch.zeros(size, dtype=like.dtype, device=like.device))
    return [(name, module, calls[module]) for name, module in model.named_modules() if module in calls]


def _called_cost(module: Any, call: Call, mode: str) -> Cost:
    """One call of any layer; without parameters."""
    if isinstance(module, BasisConv2d):
        return _basis_cost(module, call, mode)
    return _structured_cost(module, call) if isinstance(module, StructuredConv2d) else _dense_cost(module, call)


def _dense_cost(module: Any, call: Call) -> Cost:
    """Any layer of torch, and a basis convolution or structured layer as if it were dense."""
    trains = any(p.requires_grad for p in module.parameters())
    kept = math.prod(call.x) * call.itemsize if trains or call.needs_dx else 0
    if not isinstance(module, MATMULS):
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
        macs, trained = product.macs * pixels[product.at], product.trained and learns
        kept = product.reads * pixels[product.reads_at] * call.itemsize * (flows or trained)
        total += Cost(0, macs, flows * macs, trained * macs, activation_bytes=kept)
        flows = flows or trained
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
