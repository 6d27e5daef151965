"""Every layer of a network, timed where it stands: latencies for a budget, and the fastest mode of each basis layer.

    table = tune(network, input_size=(3, 32, 32), setting=Setting(batch_size=500))
    use_modes(network, table)  # mode "auto" now stands for what was fastest

A table holds for one machine and one setting. Layers that no table names follow the rule of
:func:`basis.layers.conv.resolve_mode`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from basis.bench.cases import Block
from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS, TimedLayer
from basis.bench.timing import PASSES, Pass, Progress, Setting, check_known, layer_steps, tell
from basis.costs import cost, trace_calls
from basis.layers.batchnorm import couple, couple_in_place, couplings, uncouple, uncouple_in_place
from basis.layers.conv import BasisConv2d, ExplicitMode, basis_channels_for
from basis.substitution import plan_of
from basis.text import few

Way = Literal["factorized", "composed", "through_basis"]
EXPLICIT: tuple[ExplicitMode, ...] = get_args(ExplicitMode)
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class _Layer:
    """A layer of a network; those of equal ``key`` are measured once."""

    key: Hashable
    inputs: tuple[tuple[int, ...], ...]  # (C, H, W) of each call in one forward pass
    input_gradient: bool
    make: Callable[[Pass], dict[str, nn.Module]]  # its candidates, with "dense" and "control"
    about: Callable[[str, nn.Module], dict[str, Any]]  # what the row of a candidate says of it


def _measure(
    layers: Mapping[str, _Layer], passes: Sequence[Pass], setting: Setting, progress: Progress | None
) -> list[dict[str, Any]]:
    cells: dict[Hashable, list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for (name, layer), one in itertools.product(layers.items(), passes):
        if (layer.key, one) not in cells:
            with setting.globals():
                placed = {key: setting.place(module) for key, module in layer.make(one).items()}
                steps = layer_steps(placed, layer.inputs, one, setting, input_gradient=layer.input_gradient)
                optional = [key for key in placed if key not in ("dense", "control")]
                measured = setting.measure(steps, may_fail=optional)
            found = cells[layer.key, one] = []
            for key, values in measured.items():
                found.append({"layer": name, "pass": one, **layer.about(key, placed[key]), **values})
                tell(progress, found[-1], name)
        cell = cells[layer.key, one]
        first = cell[0]["layer"]
        rows += [{**row, "layer": name, "same_as": None if name == first else first} for row in cell]
    return rows


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
    check_known("pass", passes, PASSES)
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but must be at least 1")
    for ratio in ratios:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense
    free = {layer for layer, why in plan_of(model).skipped.items() if why == "left dense"}
    found = {}
    for layer, conv, calls in trace_calls(model, (1, *input_size)):
        if layer in free and calls and isinstance(conv, nn.Conv2d):
            timed = TimedLayer.of(conv, (c.x[1:] for c in calls), input_gradient=any(c.needs_dx for c in calls))
            ks = {basis_channels_for(r, conv.out_channels, math.lcm(conv.groups, multiple)) for r in ratios}
            make = partial(_thinner, timed, sorted(k for k in ks if k < conv.out_channels))
            found[layer] = _Layer(timed, timed.inputs, timed.input_gradient, make, partial(_about, timed))
    if not found:
        raise ValueError("the model has no convolution that can be substituted and is called")
    setting = (setting or Setting()).settled(model)
    rows = _measure(found, passes, setting, progress)
    options = {"model": name or type(model).__name__, "input_size": list(input_size), "multiple": multiple}
    options["macs"] = cost(model, input_size).total.forward_macs
    return setting.report("bench-latency", rows, **options, ratios=list(ratios), passes=list(passes))


def _thinner(timed: TimedLayer, ks: Sequence[int], one: Pass) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {"dense": timed.conv(), "control": timed.conv()}
    return layers | {str(k): BasisConv2d.shaped_like(timed.conv(), basis_channels=k, mode="auto") for k in ks}


def _about(timed: TimedLayer, key: str, layer: nn.Module) -> dict[str, Any]:
    width: int = timed.options[1]
    k = width if key == "control" else int(key)
    about = {"shape": str(timed), "ratio": k / width, "basis_channels": k}
    return about | {
        "mode": "control" if key == "control" else "auto",
        "resolved": getattr(layer, "resolved_mode", "dense"),
    }


def tune(
    model: nn.Module,
    *,
    input_size: Sequence[int] = (3, 32, 32),
    one: Pass = "forward+backward",
    setting: Setting | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> BenchReport:
    """Time every basis convolution of ``model`` in every way, beside its dense layer; all of a layer together.

    Each layer, with the batch normalisation that directly follows it and a ReLU, is timed alone, as a copy, on the
    inputs that it gets in one forward pass on images of ``input_size``, (C, H, W); taking the normalisation through
    the basis (:mod:`basis.layers.batchnorm`) is one of the ways. ``model`` is not changed: that is :func:`use_modes`.

    Raises:
        ValueError: for a model without such a layer, or that cannot be run on such images; for a setting
            that makes no sense.
    """
    norms, plain = couplings(model).norms, uncouple(model)
    found = {}
    for layer, _, calls in trace_calls(plain, (1, *input_size)):
        module = plain.get_submodule(layer)
        if isinstance(module, BasisConv2d) and calls:
            bn = plain.get_submodule(norms[layer]) if layer in norms else None
            inputs, needs_dx = tuple(call.x[1:] for call in calls), any(call.needs_dx for call in calls)
            trains = [parameter.requires_grad for parameter in module.parameters()]
            about_module = f"{module.extra_repr()} {module.coefficients.form} {module.derives_apart}"
            key = f"{about_module} {trains} {bn} {inputs} {needs_dx}"
            sizes = "+".join("x".join(map(str, size[1:])) for size in inputs)
            kernel, stride = ("x".join(map(str, pair)) for pair in (module.kernel_size, module.stride))
            shape = f"{module.in_channels}-{module.out_channels}@{sizes} {kernel}/{stride}"
            about = {"shape": shape, "ratio": module.ratio, "basis_channels": module.basis_channels}
            found[layer] = _Layer(key, inputs, needs_dx, partial(_ways, module, bn), partial(_way, about))
    if not found:
        raise ValueError("the model has no basis convolution that is called, so there is no mode to choose")
    setting = (setting or Setting()).settled(plain)
    rows = _measure(found, [one], setting, progress)
    options = {"model": name or type(model).__name__, "input_size": list(input_size), "passes": [one]}
    return setting.report("bench-modes", rows, **options)


def _ways(layer: BasisConv2d, bn: nn.Module | None, one: Pass) -> dict[str, nn.Module]:
    found: dict[str, Any] = {"dense": layer.to_conv(), "control": layer.to_conv()}
    found |= {mode: copy.deepcopy(layer) for mode in EXPLICIT}
    for mode in EXPLICIT:
        found[mode].mode = mode
    if bn is not None:
        found = {key: Block(conv, copy.deepcopy(bn)) for key, conv in found.items()}
        found["through_basis"] = couple(found["factorized"], ["conv"])
    return {key: module.float().train(one != "forward") for key, module in found.items()}


def _way(about: Mapping[str, Any], key: str, layer: nn.Module) -> dict[str, Any]:
    return {**about, "mode": key}


def fastest(table: BenchReport) -> dict[str, Way]:
    """The way of the largest median speed-up of each layer, from a report of :func:`tune`.

    Raises:
        ValueError: for a report of another kind.
    """
    if table.kind != "bench-modes":
        raise ValueError(f"the table is a report of kind {table.kind!r}, but it must be one of `basis bench modes`")
    best: dict[str, Mapping[str, Any]] = {}
    for row in table.rows:
        if row["mode"] not in WAYS or row.get("error"):
            continue
        if row["speedup"] > best.get(row["layer"], {"speedup": 0.0})["speedup"]:
            best[row["layer"]] = row
    return {layer: row["mode"] for layer, row in best.items()}


def use_modes(model: nn.Module, table: BenchReport) -> None:
    """Let mode "auto" of the layers that ``table`` names stand for what was fastest, on such a device.

    Changes ``model`` in place: layers for which it is fastest are coupled to their batch normalisation, the other
    named ones are not. Layers whose mode is not "auto" keep theirs.

    Raises:
        ValueError: where the table is of another kind, or names a layer that is not there, that has another
            number of basis channels, or that cannot be coupled but should be; nothing is changed then.
    """
    chosen, device = fastest(table), table.environment["device_type"]
    modules: dict[str, Any] = dict(model.named_modules())
    ks = {row["layer"]: row["basis_channels"] for row in table.rows}
    wrong = [n for n in chosen if getattr(modules.get(n), "basis_channels", None) != ks[n]]
    if wrong:
        raise ValueError(
            f"the table was measured for another network: it has {few(wrong)} with k = {few(str(ks[n]) for n in wrong)}"
        )
    free = {layer: way for layer, way in chosen.items() if modules[layer].mode == "auto"}
    before = [n for n, m in modules.items() if isinstance(m, BasisConv2d) and m.mixed_later and n not in free]
    wanted = [*before, *(n for n, way in free.items() if way == "through_basis")]
    couple_in_place(model, wanted)  # refuses what cannot be coupled before it changes anything
    couple_in_place(uncouple_in_place(model), wanted)
    for layer, way in free.items():
        modules[layer].measured_mode = None if way == "through_basis" else (device, way)
