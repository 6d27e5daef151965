"""The one benchmark that all others are tables for: cells of candidates that take turns, beside a dense one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from basis.bench.timing import Pass, Progress, Setting, forget_compiled, layer_steps, tell
from basis.costs import count_parameters

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Layers or networks that are measured together.

    Args:
        about: what every row says.
        candidates: name -> what makes it, "dense" among them, of which the control is another one. A name that ends
            in "compiled" is that of a compiled module.
        rows: name -> what the row of that candidate, or of "control", says besides.
        one: the pass that is timed, on images of each of the ``inputs``, (C, H, W).
        input_gradient: whether a backward pass takes the gradients of the inputs.
        versus: candidate -> the other one that it is compared with as well.
        key: cells of equal keys and passes are measured once; the others name the first one's layer in ``same_as``.
    """

    about: Mapping[str, Any]
    candidates: Mapping[str, Callable[[], nn.Module]]
    inputs: tuple[tuple[int, ...], ...]
    one: Pass
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    input_gradient: bool = True
    versus: Mapping[str, str] = field(default_factory=dict)
    key: Hashable = None


def measure_cells(cells: Iterable[Cell], setting: Setting, progress: Progress | None = None) -> list[Row]:
    """A row for the control and each candidate of every cell, in order; ``progress`` is told those measured.

    Rows have ``pass``, ``mode`` (the candidate), ``parameters``, ``resolved`` (the mode that a basis layer executes)
    and what :meth:`Setting.measure` found. A candidate that cannot be made or run has ``error``. Where the mode that
    "auto" stands for is a candidate too, "auto" is the same measurement, and names it in ``same_as``.
    """
    rows: list[Row] = []
    first: dict[Hashable, tuple[Any, list[Row]]] = {}
    for cell in cells:
        key = (cell.key, cell.one)
        if cell.key is None:
            rows += _measured(cell, setting, progress)
        elif key not in first:
            first[key] = cell.about["layer"], _measured(cell, setting, progress)
            rows += [{**row, "same_as": None} for row in first[key][1]]
        else:
            layer, found = first[key]
            rows += [{**row, **cell.about, "same_as": layer} for row in found]
    return rows


def _measured(cell: Cell, setting: Setting, progress: Progress | None) -> list[Row]:
    modules: dict[str, nn.Module] = {}
    found: dict[str, Row] = {}
    names = [name for name in cell.candidates if name != "dense"]
    with setting.globals():
        for name in ("dense", "control", *names):
            try:
                modules[name] = setting.place(cell.candidates["dense" if name == "control" else name]())
            except Exception as error:  # another package's layer may raise anything
                if name not in names:
                    raise
                found[name] = {"error": f"{type(error).__name__}: {error}"}
        about = {name: _about(module) for name, module in modules.items()}
        twin = about.get("auto", {}).get("resolved")
        timed = {name: module for name, module in modules.items() if name != "auto" or twin not in modules}
        steps = layer_steps(timed, cell.inputs, cell.one, setting, input_gradient=cell.input_gradient)
        versus = {name: twin if other == "auto" and twin in timed else other for name, other in cell.versus.items()}
        found |= setting.measure(steps, versus=versus, may_fail=names)
    if twin in timed:
        found["auto"] = {**found[twin], "same_as": twin}
    rows = []
    for name in ("control", *names):
        row = {**cell.about, "pass": cell.one, "mode": name, **about.get(name, {}), **cell.rows.get(name, {})}
        rows.append(row | found[name])
        tell(progress, rows[-1])
    if any(name.endswith("compiled") for name in names):
        forget_compiled()
    return rows


def _about(module: nn.Module) -> Row:
    """The parameters of a layer (or block, by its ``conv``) or network, and the mode that a basis layer executes."""
    resolved = getattr(getattr(module, "conv", module), "resolved_mode", None)
    return {"parameters": count_parameters(module), **({"resolved": resolved} if resolved else {})}
