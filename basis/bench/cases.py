"""Speed of single layers against dense twins: a table of candidates for each kind of case, one way to measure it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import util
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS, RESNET18_SHAPES, WRN_SHAPES, Shape, TimedLayer
from basis.bench.timing import PASSES, Pass, Progress, Setting, forget_compiled, layer_steps, tell
from basis.costs import cost, count_parameters, trace_calls
from basis.decompositions import tensorly_conv
from basis.layers.batchnorm import activate
from basis.layers.conv import MODES, BasisConv2d, Mode, basis_channels_for
from basis.layers.structured import LAYERS, Structure
from basis.substitution import plan_of, substitute
from basis.training.stepping import compiled

Norms = Literal["ordinary", "through_basis"]
NORMS: tuple[Norms, ...] = get_args(Norms)
ABOVE = 0.01  # a baseline may have that part more parameters than the basis layer, where its rank is coarse
Make = Callable[[Shape, float], nn.Module]  # the layer of a shape at a ratio


class Block(nn.Module):
    """Convolution, batch normalisation, sum with a shortcut where one is given, ReLU; as in the ResNets."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """From (N, C_in, H, W), and a shortcut of the output's shape, to (N, C_out, H', W')."""
        return activate(self.bn, self.conv(x), shortcut)


# -- the candidates --


def basis_layer(shape: Shape, ratio: float, *, mode: Mode = "auto") -> BasisConv2d:
    """The basis convolution of a shape."""
    k = basis_channels_for(ratio, shape.out_channels)
    return BasisConv2d.shaped_like(shape.conv(), basis_channels=k, mode=mode)


def dense_block(shape: Shape, ratio: float = 1) -> Block:
    """Dense convolution and batch normalisation."""
    return Block(shape.conv(), nn.BatchNorm2d(shape.out_channels))


def basis_block(shape: Shape, ratio: float, *, mode: Mode = "auto", batch_norm: Norms = "ordinary") -> nn.Module:
    """The block with a basis convolution."""
    return substitute(dense_block(shape), ratio=ratio, mode=mode, init="random", batch_norm=batch_norm)


def structured_layer(shape: Shape, ratio: float, *, text: str) -> nn.Module:
    """The structured layer of a text, which has its own size; ``ValueError`` where the shape cannot take it."""
    structure = Structure.parse(text)
    return LAYERS[structure.kind].shaped_like(shape.conv(), size=structure.size)


def svd_pair(shape: Shape, ratio: float) -> nn.Sequential:
    """A 3x3 convolution C_in -> q, then one q -> C_out of 1x1, as a truncated SVD of the weight gives them.

    q is the largest with at most 1 % more weights than the basis layer (X. Zhang et al. 2016, arXiv 1505.06798).
    """
    conv, parameters = shape.conv(), count_parameters(basis_layer(shape, ratio))
    q = int((1 + ABOVE) * parameters / (conv.weight[0].numel() + conv.out_channels))
    if q < 1:
        raise ValueError(f"no pair of convolutions has as few as {parameters} parameters")
    first = nn.Conv2d(conv.in_channels, q, 3, shape.stride, 1, bias=False)
    return nn.Sequential(first, nn.Conv2d(q, conv.out_channels, 1, bias=False))


def tucker_conv(shape: Shape, ratio: float, *, implementation: str = "factorized") -> nn.Module:
    """tensorly-torch's Tucker convolution with at most 1 % more parameters than the basis layer, new weights."""
    conv, parameters = shape.conv(), count_parameters(basis_layer(shape, ratio))
    layer: Any = tensorly_conv(conv, (1 + ABOVE) * parameters, implementation=implementation, fitted=False)
    layer.reset_parameters(std=(3 * conv.weight[0].numel()) ** -0.5)  # the spread of nn.Conv2d's own weights
    return layer


# What a user would take instead, at equal parameters; "X compiled" is X after torch.compile(fullgraph=True).
BASELINES: Mapping[str, Make] = {
    "basis": basis_layer,
    "dense": lambda shape, ratio: shape.conv(),
    "svd": svd_pair,
    "tucker": tucker_conv,
    "tucker reconstructed": partial(tucker_conv, implementation="reconstructed"),
}
CANDIDATES = tuple(name + how for name in BASELINES for how in ("", " compiled") if name + how != "dense")
USUAL = ("dense compiled", "basis", "basis compiled", "svd", "tucker", "tucker reconstructed")


# -- the measurements --


def bench_layers(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[Mode] = get_args(Mode),
    passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure basis layers against ``nn.Conv2d``; a cell is a shape (:class:`Shape`), a pass and a ratio.

    "forward" is inference; "forward+backward" takes the gradients of the input and of all parameters. Rows have
    ``resolved``, the mode that "auto" stands for (where that is measured too, "auto" is the same measurement, named
    in ``same_as``), and ``mac_ratio``, what the multiplications alone would give as speed-up.

    Raises:
        ValueError: for a shape, ratio, mode, pass or setting that makes no sense.
    """
    _check("mode", modes, MODES)
    candidates: dict[str, Make] = {mode: partial(basis_layer, mode=mode) for mode in modes}
    return _bench("bench-layer", shapes, ratios, passes, candidates, setting, progress, modes=list(modes))


def bench_blocks(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[Mode] = get_args(Mode),
    norms: Sequence[Norms] = NORMS,
    residual: bool = False,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure :class:`Block` in training, forward and backward, against the one with ``nn.Conv2d``.

    The candidates are the modes with the ordinary batch normalisation, and "through_basis", where it is taken from
    the basis channels (:mod:`basis.layers.batchnorm`); its ``versus_basis`` is against mode auto.

    Args:
        norms: whether to measure the modes ("ordinary"), "through_basis", or both.
        residual: whether a shortcut is added before the ReLU.

    Raises:
        ValueError: for a shape, ratio, mode, norm or setting that makes no sense.
    """
    _check("mode", modes, MODES)
    _check("norms", norms, NORMS)
    candidates: dict[str, Make] = {}
    if "ordinary" in norms:
        candidates |= {mode: partial(basis_block, mode=mode) for mode in modes}
    if "through_basis" in norms:
        candidates["through_basis"] = partial(basis_block, batch_norm="through_basis")
    return _bench(
        "bench-block", shapes, ratios, PASSES[1:], candidates, setting, progress, dense=dense_block, shortcut=residual,
        versus={"through_basis": "auto"}, modes=list(modes), norms=list(norms), residual=residual,
    )  # fmt: skip


def bench_rivals(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    passes: Sequence[Pass] = PASSES,
    candidates: Sequence[str] = USUAL,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure basis layers in mode auto, and what a user would take instead (:data:`BASELINES`), against ``nn.Conv2d``.

    Rows have ``parameters`` (those of the basis layer, of the others at most 1 % more) and ``versus_basis``, basis /
    candidate within a round, compiled with compiled. ``left_out`` in the options names what is not installed.

    Raises:
        ValueError: for a shape, ratio, pass, candidate or setting that makes no sense.
    """
    _check("candidate", candidates, CANDIDATES)
    installed = all(map(util.find_spec, ("tltorch", "tensorly")))  # the one does not ask for the other
    left_out = {} if installed else {n: "tensorly-torch is not installed" for n in candidates if "tucker" in n}
    chosen = [name for name in candidates if name not in left_out]
    versus = {
        name: "basis compiled" if name.endswith("compiled") and "basis compiled" in chosen else "basis"
        for name in chosen
        if not name.startswith("basis")
    }
    makes = {name: BASELINES[name.removesuffix(" compiled")] for name in chosen}
    if "basis" in chosen and "basis compiled" in chosen:
        versus["basis compiled"] = "basis"
    versus = {name: like for name, like in versus.items() if like in chosen and name != like}
    return _bench(
        "bench-rivals", shapes, ratios, passes, makes, setting, progress, versus=versus,
        candidates=list(candidates), left_out=left_out,
    )  # fmt: skip


def bench_structured(
    *,
    layers: Sequence[str],
    shapes: Sequence[str] = WRN_SHAPES,
    passes: Sequence[Pass] = PASSES[1:],
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure structured layers, by texts such as "tucker:0.41", against ``nn.Conv2d``; a cell is a shape and a pass.

    Rows have ``layer``, the text, and ``parameters``, stored numbers. A layer that a shape cannot take has ``error``.

    Raises:
        ValueError: for an unknown kind of layer, or a shape, pass or setting that makes no sense.
    """
    texts = [str(Structure.parse(text)) for text in layers]
    makes = {text: partial(structured_layer, text=text) for text in texts}
    report = _bench("bench-structured", shapes, (1,), passes, makes, setting, progress, layers=texts)
    rows = []
    for row in report.rows:
        control = row["mode"] == "control"
        named = {"layer": "dense" if control else row["mode"], "mode": "control" if control else "layer"}
        rows.append({k: v for k, v in row.items() if k not in ("ratio", "basis_channels")} | named)
    return BenchReport(kind=report.kind, config=report.config, environment=report.environment, rows=rows)


def bench_latency(
    model: nn.Module,
    *,
    input_size: Sequence[int] = (3, 32, 32),
    ratios: Sequence[float] = RATIOS,
    multiple: int = 8,
    passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> BenchReport:
    """Measure every convolution of ``model`` that can be substituted, alone, dense and in mode auto.

    For :func:`basis.select`. A cell is a layer and a pass; its candidates are k nearest to each ratio, a multiple of
    ``multiple`` and of the layer's groups, below C_out. Layers have the model's shapes but fresh weights, on the
    inputs of one forward pass on images of ``input_size``, (C, H, W); the first layer takes no gradient of its input.
    Equal shapes are measured once: the rows of the others name the first in ``same_as``. Rows have ``layer``,
    ``shape``, ``basis_channels`` (C_out in the control row) and ``resolved``.

    Raises:
        ValueError: for a model without such a layer, or that cannot be run on such images; for a ratio, multiple,
            pass or setting that makes no sense.
    """
    _check("pass", passes, PASSES)
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but must be at least 1")
    free = {layer for layer, why in plan_of(model).skipped.items() if why == "left dense"}
    found = {
        layer: TimedLayer.of(conv, (c.x[1:] for c in calls), input_gradient=any(c.needs_dx for c in calls))
        for layer, conv, calls in trace_calls(model, (1, *input_size))
        if layer in free and calls and isinstance(conv, nn.Conv2d)
    }
    if not found:
        raise ValueError("the model has no convolution that can be substituted and is called")
    setting = (setting or Setting()).settled(model)
    cells: dict[tuple[TimedLayer, Pass], list[dict[str, Any]]] = {}
    rows = []
    for (layer, timed), one in itertools.product(found.items(), passes):
        cell = cells.get((timed, one))
        if cell is None:
            cell = cells[timed, one] = _latency_rows(layer, timed, one, ratios, multiple, setting, progress)
        first = cell[0]["layer"]
        rows += [{**row, "layer": layer, "same_as": None if layer == first else first} for row in cell]
    options = {"model": name or type(model).__name__, "input_size": list(input_size), "multiple": multiple}
    options["macs"] = cost(model, input_size).total.forward_macs
    return setting.report("bench-latency", rows, **options, ratios=list(ratios), passes=list(passes))


def _latency_rows(
    layer: str,
    timed: TimedLayer,
    one: Pass,
    ratios: Sequence[float],
    multiple: int,
    setting: Setting,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    _, width, *_, groups, _, _ = timed.options
    candidates = {basis_channels_for(r, width, math.lcm(groups, multiple)) for r in ratios}
    ks = {"control": width} | {str(k): k for k in sorted(candidates) if k < width}
    with setting.globals():
        layers: dict[str, nn.Module] = {"dense": timed.conv(), "control": timed.conv()}
        for key, k in ks.items():
            if key != "control":
                layers[key] = BasisConv2d.shaped_like(timed.conv(), basis_channels=k, mode="auto")
        placed = {key: setting.place(module) for key, module in layers.items()}
        steps = layer_steps(placed, timed.inputs, one, setting, input_gradient=timed.input_gradient)
        measured = setting.measure(steps, may_fail=[key for key in ks if key != "control"])
    rows = []
    for key, k in ks.items():
        row: dict[str, Any] = {"layer": layer, "shape": str(timed), "pass": one, "ratio": k / width}
        row |= {"basis_channels": k, "mode": "control" if key == "control" else "auto"}
        rows.append(row | {"resolved": getattr(placed[key], "resolved_mode", "dense"), **measured[key]})
        tell(progress, rows[-1], layer)
    return rows


def _bench(
    kind: str,
    shapes: Sequence[str],
    ratios: Sequence[float],
    passes: Sequence[Pass],
    makes: Mapping[str, Make],
    setting: Setting | None,
    progress: Progress | None,
    *,
    dense: Make = BASELINES["dense"],
    versus: Mapping[str, str] | None = None,
    shortcut: bool = False,
    **options: Any,
) -> BenchReport:
    """One row for each candidate of ``makes`` (and the control) in each cell: a shape, a pass and a ratio."""
    _check("pass", passes, PASSES)
    parsed = [Shape.parse(text) for text in shapes]
    for shape, ratio in itertools.product(parsed, ratios):
        basis_channels_for(ratio, shape.out_channels)  # refuses a ratio that makes no sense before any is measured
    with torch.device("meta"):
        setting = (setting or Setting()).settled(nn.ModuleList([shape.conv() for shape in parsed]))
    rows = []
    for shape, one, ratio in itertools.product(parsed, passes, ratios):
        with setting.globals():
            about, measured = _measure(shape, ratio, one, {"dense": dense, "control": dense, **makes}, setting,
                                       versus or {}, shortcut)  # fmt: skip
        k = basis_channels_for(ratio, shape.out_channels)
        for name in ("control", *makes):
            row: dict[str, Any] = {"shape": str(shape), "pass": one, "ratio": ratio, "basis_channels": k, "mode": name}
            row |= about.get(name, {})
            apart = row.pop("apart", False)
            if kind == "bench-layer":  # what the multiplications alone would give
                mode = "cat" if apart and row["resolved"] == "factorized" else row["resolved"]
                dense_macs, macs = (shape.macs(k, m, setting.batch_size, one) for m in ("dense", mode))
                row["mac_ratio"] = dense_macs / macs
            rows.append(row | measured[name])
            tell(progress, rows[-1], f"{kind.removeprefix('bench-')} {shape}")
        if any(name.endswith("compiled") for name in makes):
            forget_compiled()
    listed = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "passes": list(passes)}
    return setting.report(kind, rows, **listed, **options)


def _measure(
    shape: Shape,
    ratio: float,
    one: Pass,
    makes: Mapping[str, Make],
    setting: Setting,
    versus: Mapping[str, str],
    shortcut: bool,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What is known of each layer, and what was measured of it; "auto" shares the measurement of its mode."""
    layers: dict[str, nn.Module] = {}
    about: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, Any]] = {}
    for name, make in makes.items():
        try:
            layer = setting.place(make(shape, ratio))
        except Exception as error:  # another package's layer may raise anything
            measured[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        conv = getattr(layer, "conv", layer)
        about[name] = {"resolved": getattr(conv, "resolved_mode", "dense"), "parameters": count_parameters(layer)}
        about[name]["apart"] = bool(getattr(conv, "derives_apart", False))
        if name.endswith("compiled"):
            layer = compiled(layer, setting.memory_format == "channels_last", fullgraph=True)
        layers[name] = layer
    twin = about["auto"]["resolved"] if "auto" in layers else None
    if twin in layers:
        del layers["auto"]
        versus = {name: twin if like == "auto" else like for name, like in versus.items()}
    steps = layer_steps(layers, [shape.input_size], one, setting, shortcut=shortcut)
    optional = [name for name in layers if name not in ("dense", "control")]
    measured |= setting.measure(steps, versus=versus, may_fail=optional)
    if twin in layers:
        measured["auto"] = {**measured[twin], "same_as": twin}
    return about, measured


def _check(what: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(known)}")
