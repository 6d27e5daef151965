"""Modes by measurement: every basis convolution of a network, timed in each way on the machine at hand.

    table = tune(network, input_size=(3, 32, 32), setting=Setting(batch_size=500))
    print(table)
    table.save("modes.json")
    use_modes(network, table)  # mode "auto" now stands for what was fastest

Where a batch normalisation directly follows, both are timed together, with the ReLU after them, and taking
the normalisation through the basis (:mod:`basis.layers.batchnorm`) is one of the ways. What is fastest depends on the
processor, the number format, the memory format and the batch, so a table holds for one machine and one
setting. Layers that no table names follow the rule of :func:`basis.layers.conv.resolve_mode`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from basis.bench.cases import Block
from basis.bench.report import BenchReport
from basis.bench.timing import Pass, Progress, Setting, layer_steps, tell
from basis.costs import trace_calls
from basis.layers.batchnorm import couple, couple_in_place, couplings, uncouple, uncouple_in_place
from basis.layers.conv import BasisConv2d, ExplicitMode
from basis.text import few

KIND = "bench-modes"
Way = Literal["factorized", "composed", "hybrid", "through_basis"]
EXPLICIT: tuple[ExplicitMode, ...] = get_args(ExplicitMode)
WAYS: tuple[Way, ...] = get_args(Way)


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

    Each layer, with the batch normalisation that directly follows it, is timed alone, as a copy with its own
    values, on the inputs that it gets in one forward pass on images of ``input_size``, (C, H, W); in evaluation
    mode where ``one`` is "forward", and in the number format of the setting. Layers that time cannot tell apart
    are measured once; the rows of the others name the first in ``same_as``. ``model`` itself is not changed:
    that is :func:`use_modes`.

    Raises:
        ValueError: for a model without such a layer, or that cannot be run on such images; for a setting
            that makes no sense.
    """
    norms, plain = couplings(model).norms, uncouple(model)
    layers = {name: module for name, module in plain.named_modules() if isinstance(module, BasisConv2d)}
    calls = {n: calls for n, _, calls in trace_calls(plain, (1, *input_size)) if n in layers and calls}
    if not calls:
        raise ValueError("the model has no basis convolution that is called, so there is no mode to choose")
    setting = (setting or Setting()).settled(plain)
    cells: dict[tuple, list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for layer, traced in calls.items():
        bn = plain.get_submodule(norms[layer]) if layer in norms else None
        inputs = tuple(call.x[1:] for call in traced)
        needs_dx = any(call.needs_dx for call in traced)
        key = (_kind(layers[layer]), str(bn), inputs, needs_dx)
        cell = cells.get(key)
        if cell is None:
            cell = cells[key] = _measure(layers[layer], bn, layer, inputs, one, needs_dx, setting, progress)
        first = cell[0]["layer"]
        rows += [{**row, "layer": layer, "same_as": None if layer == first else first} for row in cell]
    options = {"model": name or type(model).__name__, "input_size": list(input_size), "passes": [one]}
    return setting.report(KIND, rows, **options)


def fastest(table: BenchReport) -> dict[str, Way]:
    """The way of the largest median speed-up of each layer, from a report of :func:`tune`.

    Raises:
        ValueError: for a report of another kind.
    """
    if table.kind != KIND:
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

    Changes ``model`` in place: its layers show their mode when printed, and those for which it is fastest are
    coupled to their batch normalisation; all others are not. Layers whose mode is not "auto" keep theirs.

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


def _kind(layer: BasisConv2d) -> str:
    """Everything about a layer that its time depends on."""
    trains = [parameter.requires_grad for parameter in layer.parameters()]
    return f"{layer.extra_repr()} {layer.coefficients.form} {layer.derives_apart} {trains}"


def _measure(
    layer: BasisConv2d,
    bn: nn.Module | None,
    name: str,
    inputs: tuple[tuple[int, ...], ...],
    one: Pass,
    needs_dx: bool,
    setting: Setting,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    with setting.globals():
        found: dict[str, Any] = {"dense": layer.to_conv(), "control": layer.to_conv()}
        found |= {mode: copy.deepcopy(layer) for mode in EXPLICIT}
        for mode in EXPLICIT:
            found[mode].mode = mode
        if bn is not None:
            found = {key: Block(conv, copy.deepcopy(bn)) for key, conv in found.items()}
            found["through_basis"] = couple(found["factorized"], ["conv"])
        placed = {key: setting.place(module.float().train(one != "forward")) for key, module in found.items()}
        steps = layer_steps(placed, inputs, one, setting, input_gradient=needs_dx)
        measured = setting.measure(steps, may_fail=[way for way in WAYS if way in placed])
    sizes = "+".join("x".join(map(str, size[1:])) for size in inputs)
    kernel, stride = ("x".join(map(str, pair)) for pair in (layer.kernel_size, layer.stride))
    shape = f"{layer.in_channels}-{layer.out_channels}@{sizes} {kernel}/{stride}"
    rows = []
    for way, values in measured.items():
        row = {"layer": name, "shape": shape, "pass": one, "ratio": layer.ratio}
        rows.append({**row, "basis_channels": layer.basis_channels, "mode": way, **values})
        tell(progress, rows[-1], name)
    return rows
