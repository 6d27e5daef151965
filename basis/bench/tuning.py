"""Every layer of a network, timed where it stands: latencies for a budget, and the fastest mode of each basis layer.

    table = tune(network, input_size=(3, 32, 32), setting=Setting(batch_size=500))
    use_modes(network, table)  # mode "auto" now stands for what was fastest

A table holds for one machine and one setting. Layers that no table names follow the rule of
:func:`basis.layers.conv.resolve_mode`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from basis.bench.cases import Block
from basis.bench.cells import Cell, Make, measure_cells
from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS, TimedLayer, example, timed_layers
from basis.bench.timing import PASSES, Pass, Progress, Setting
from basis.copies import copy_of
from basis.costs import cost
from basis.inputs import Inputs, shapes_of
from basis.layers.batchnorm import couple, couple_in_place, couplings, uncouple, uncouple_in_place
from basis.layers.conv import BasisConv2d, ExplicitMode, basis_channels_for
from basis.layers.norm_pairs import norms_after
from basis.numbers import plain_number
from basis.substitution import plan_of
from basis.text import few

Way = Literal["factorized", "composed", "through_basis"]
EXPLICIT: tuple[ExplicitMode, ...] = get_args(ExplicitMode)
WAYS: tuple[Way, ...] = get_args(Way)


def bench_latency(
    model: nn.Module, *, input_size: Sequence[int] | None = None, inputs: Inputs | None = None,
    ratios: Sequence[float] = RATIOS, multiple: int = 8, passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None, progress: Progress | None = None, name: str | None = None,
) -> BenchReport:  # fmt: skip
    """Measure every convolution of ``model`` that can be substituted, alone, dense and in mode auto.

    For :func:`basis.select`. A cell is a layer and a pass; its candidates are k nearest to each ratio, a multiple of
    ``multiple`` and of the layer's groups, below C_out. Layers have fresh weights, on inputs as in one forward pass on
    samples of ``input_size``, (3, 32, 32) unless given, or on ``inputs``, a batch as the model takes it. With the
    backward pass a layer is timed with the batch normalisation that directly follows it, and a ReLU; a forward pass is
    that of a folded layer, without. Where steps are captured a k also has batch normalisation through the basis, and
    the row of the faster one stays. Rows have ``layer``, ``shape``, ``basis_channels`` (C_out in the control row),
    ``resolved`` (a mode, or "through_basis") and, where an equal layer was measured, that in ``same_as``.
    ``config`` has for each pass ``layers_ms``, the sum of the dense layers' times, and, where steps are captured,
    ``network_ms``, that of the whole dense network, with all its other layers. Neither has loss or optimiser.

    Raises ``ValueError`` for a model without such a layer, or that cannot be run on such inputs; for a ratio or setting
    that makes no sense.
    """
    given, ratios = example(model, input_size, inputs), [*map(float, ratios)]
    multiple = plain_number("multiple", multiple, whole=True, least=1)
    free = [layer for layer, why in plan_of(model).skipped.items() if why == "left dense"]
    free = [layer for layer in free if isinstance(model.get_submodule(layer), nn.Conv2d)]
    setting = (setting or Setting()).settled(model)
    norms = {conv: model.get_submodule(norm) for conv, norm in norms_after(model, given).items()}
    cells = []
    for layer, timed in timed_layers(model, given, free).items():
        conv: Any = model.get_submodule(layer)
        step, width = math.lcm(conv.groups, multiple), conv.out_channels
        ks = sorted(k for k in {basis_channels_for(ratio, width, step) for ratio in ratios} if k < width)
        for one in passes:
            norm = norms.get(layer) if one != "forward" else None
            rows: dict[str, dict[str, Any]] = {"control": {"ratio": 1.0, "basis_channels": width}}
            makes = {"dense": partial(_with_norm, timed.conv, norm, one)}
            for k in ks:
                about = {"mode": "auto", "ratio": k / width, "basis_channels": k}
                rows |= {f"{k}": about, f"{k} through_basis": {**about, "resolved": "through_basis"}}
                makes[f"{k}"] = partial(_with_norm, partial(timed.basis, k), norm, one)
                if setting.captures and norm is not None:
                    makes[f"{k} through_basis"] = partial(makes[f"{k}"], coupled=True)
            cells += [Cell(
                about={"layer": layer, "shape": str(timed), "pass": one, "resolved": "dense"}, rows=rows,
                candidates=makes, inputs=timed.inputs, input_gradient=timed.input_gradient, key=(timed, one, str(norm)),
            )]  # fmt: skip
    if not cells:
        raise ValueError("the model has no convolution that can be substituted and is called")
    found = measure_cells(cells, setting, progress)
    dense_rows = [row for row in found if row["mode"] == "control" and "dense_ms" in row]
    report = cost(model, inputs=given)
    options = {"model": name or type(model).__name__, "inputs": report.inputs, "multiple": multiple}
    options |= {"macs": report.total.forward_macs // report.batch_size, "ratios": ratios, "passes": list(passes)}
    options["layers_ms"] = {one: sum(row["dense_ms"] for row in dense_rows if row["pass"] == one) for one in passes}
    options["norm"] = True
    if setting.captures:
        with setting.globals():
            whole_inputs = torch.randn_like(given) if isinstance(given, Tensor) and inputs is None else given
        options["network_ms"] = {one: _whole_ms(model, whole_inputs, one, setting) for one in passes}
    quickest: dict[Any, Mapping[str, Any]] = {}
    for row in found:
        place = row["layer"], row["pass"], row["basis_channels"]
        if row.get("ms", math.inf) < quickest.setdefault(place, row).get("ms", math.inf):
            quickest[place] = row
    return setting.report("bench-latency", list(quickest.values()), **options)


def _with_norm(make: Make, norm: nn.Module | None, one: Pass, *, coupled: bool = False) -> nn.Module:
    whole = make() if norm is None else Block(make(), copy.deepcopy(norm))
    whole = couple(whole, ["conv"]) if coupled else whole
    return whole.float().train(one != "forward")


def _whole_ms(model: nn.Module, inputs: Inputs, one: Pass, setting: Setting) -> float | None:
    """Milliseconds of the pass of a whole network; None where it cannot be run like a layer."""
    cell = Cell(
        about={"pass": one}, candidates={"dense": lambda: copy_of(model).train(one != "forward")},
        inputs=(inputs,), input_gradient=False, rotated=False,
    )  # fmt: skip
    try:
        return measure_cells([cell], setting)[0]["dense_ms"]
    except Exception:  # it needs more memory than its layers, or cannot be captured
        return None


def tune(
    model: nn.Module, *, input_size: Sequence[int] | None = None, inputs: Inputs | None = None,
    one: Pass = "forward+backward", setting: Setting | None = None, progress: Progress | None = None,
    name: str | None = None,
) -> BenchReport:  # fmt: skip
    """Time every basis convolution of ``model`` in every way, beside its dense layer; all of a layer together.

    A copy of each layer, with the batch normalisation that directly follows it and a ReLU, is timed alone, on inputs as
    for :func:`bench_latency`. Taking the normalisation through the basis (:mod:`basis.layers.batchnorm`) is one of the
    ways. Raises ``ValueError`` as :func:`bench_latency` does.
    """
    given = example(model, input_size, inputs)
    norms, plain = couplings(model, inputs=given).norms, uncouple(model)
    layers = {layer: module for layer, module in plain.named_modules() if isinstance(module, BasisConv2d)}
    cells = []
    for layer, timed in timed_layers(plain, given, layers).items():
        module = layers[layer]
        bn = plain.get_submodule(norms[layer]) if layer in norms else None
        trains = [parameter.requires_grad for parameter in module.parameters()]
        alike = f"{module.extra_repr()} {module.coefficients.form} {module.derives_apart} {trains} {bn}"
        about = {"layer": layer, "shape": str(timed), "pass": one, "ratio": module.ratio}
        ways = ("dense", *(WAYS if bn is not None else EXPLICIT))
        cells += [Cell(
            about={**about, "basis_channels": module.basis_channels}, key=(timed, alike),
            candidates={way: partial(_way, module, bn, way, one) for way in ways},
            inputs=timed.inputs, input_gradient=timed.input_gradient,
        )]  # fmt: skip
    if not cells:
        raise ValueError("the model has no basis convolution that is called, so there is no mode to choose")
    setting = (setting or Setting()).settled(plain)
    options = {"model": name or type(model).__name__, "inputs": shapes_of(given), "passes": [one]}
    return setting.report("bench-modes", measure_cells(cells, setting, progress), **options)


def _way(layer: BasisConv2d, bn: nn.Module | None, way: str, one: Pass) -> nn.Module:
    conv: Any = layer.to_conv() if way == "dense" else copy.deepcopy(layer)
    if way != "dense":
        conv.mode = "factorized" if way == "through_basis" else way
    return _with_norm(lambda: conv, bn, one, coupled=way == "through_basis")


def fastest(table: BenchReport) -> dict[str, Way]:
    """The way of the largest median speed-up of each layer, from a report of :func:`tune`.

    Raises ``ValueError`` for a report of another kind.
    """
    if table.kind != "bench-modes":
        raise ValueError(f"the table is a report of kind {table.kind!r}, but it must be one that tune made")
    rows = [row for row in table.rows if row["mode"] in WAYS and not row.get("error")]
    best: dict[str, Way] = {}
    for row in sorted(rows, key=lambda row: row["speedup"], reverse=True):
        best.setdefault(row["layer"], row["mode"])
    return best


def use_modes(model: nn.Module, table: BenchReport, *, inputs: Inputs | None = None) -> None:
    """Let mode "auto" of the layers that ``table`` names stand for what was fastest, on such a device.

    Changes ``model`` in place: layers for which it is fastest are coupled to their batch normalisation, the other
    named ones are not. Layers whose mode is not "auto" keep theirs. ``inputs``: see
    :func:`basis.layers.batchnorm.couplings`.

    Raises ``ValueError`` where the table is of another kind, or names a layer that is not there, that has another shape
    or number of basis channels, or that cannot be coupled but should be; nothing is changed then. The sizes of the
    images may be others.
    """
    chosen, device = fastest(table), table.environment["device_type"]
    modules: dict[str, Any] = dict(model.named_modules())
    rows = {row["layer"]: row for row in table.rows}
    if wrong := [n for n in chosen if not _is_of(rows[n], modules.get(n))]:
        found = few(f"{n} ({rows[n]['shape']}, k = {rows[n]['basis_channels']})" for n in wrong)
        raise ValueError(f"the table was measured for another network: it has {found}")
    free = {layer: way for layer, way in chosen.items() if modules[layer].mode == "auto"}
    before = [n for n, m in modules.items() if isinstance(m, BasisConv2d) and m.mixed_later and n not in free]
    wanted = [*before, *(n for n, way in free.items() if way == "through_basis")]
    couple_in_place(model, wanted, inputs=inputs)  # refuses what cannot be coupled before it changes anything
    couple_in_place(uncouple_in_place(model), wanted, inputs=inputs)
    for layer, way in free.items():
        modules[layer].measured_mode = None if way == "through_basis" else (device, way)


def _is_of(row: Mapping[str, Any], layer: Any) -> bool:
    """Whether a row was measured for such a layer, on images of whatever size."""
    if not isinstance(layer, BasisConv2d):
        return False
    shape = str(TimedLayer.of(layer, (), input_gradient=False))
    return row["basis_channels"] == layer.basis_channels and re.sub(r"@\S*", "@", row["shape"]) == shape
