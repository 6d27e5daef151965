"""The one benchmark that all others are tables for: cells of candidates that take turns, beside a dense one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from basis.bench.timing import Progress, Setting, layer_steps, tell
from basis.costs import count_parameters
from basis.inputs import Inputs
from basis.text import first_line

Row = dict[str, Any]
Make = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Layers or networks that are measured together; this class times the pass that ``about["pass"]`` names.

    Args:
        about: what every row says.
        candidates: name -> what makes it, "dense" among them, of which the control is another one. Names of what is
            compiled end in "compiled" or "fast".
        rows: name -> what the row of that candidate, or of "control", says besides.
        inputs: what each call in one pass takes, see :func:`basis.bench.timing.layer_steps`.
        input_gradient: whether a backward pass takes the gradients of the inputs.
        rotated: whether there are several sets of inputs on a GPU; a whole network's maps fill its cache anyway.
        versus: candidate -> the other one that it is compared with as well.
        key: cells of equal keys are measured once; the others name the first one's layer in ``same_as``.
    """

    about: Mapping[str, Any]
    candidates: Mapping[str, Make]
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: tuple[Inputs, ...] = ((3, 32, 32),)
    input_gradient: bool = True
    rotated: bool = True
    versus: Mapping[str, str] = field(default_factory=dict)
    key: Hashable = None

    def measure(self, modules: Mapping[str, nn.Module], setting: Setting) -> dict[str, Row]:
        """What is found of the modules, which are placed, by name: all but "dense"."""
        twin = resolved(modules["auto"]) if "auto" in modules else None
        timed = {name: module for name, module in modules.items() if name != "auto" or twin not in modules}
        versus = {name: twin if other == "auto" and twin in timed else other for name, other in self.versus.items()}
        options = {"input_gradient": self.input_gradient, "rotated": self.rotated}
        steps = layer_steps(timed, self.inputs, self.about["pass"], setting, **options)
        optional = [name for name in timed if name not in ("dense", "control")]
        found = setting.measure(steps, versus=versus, may_fail=optional)
        return found if twin not in timed else {**found, "auto": {**found[twin], "same_as": twin}}


def measure_cells(cells: Iterable[Cell], setting: Setting, progress: Progress | None = None) -> list[Row]:
    """A row for the control and each candidate of every cell, in order; ``progress`` is told those measured.

    Rows have ``mode`` (the candidate), ``parameters``, ``resolved`` (the mode that a basis layer executes) and what the
    cell measured. A candidate that cannot be made or run has ``error``. Where the mode that "auto" stands for is a
    candidate too, "auto" is the same measurement, and names it in ``same_as``.
    """
    rows: list[Row] = []
    first: dict[Hashable, tuple[Any, list[Row]]] = {}
    for cell in cells:
        layer, found = first.get(cell.key) or (None, _measured(cell, setting, progress))
        if cell.key is not None:
            first.setdefault(cell.key, (cell.about["layer"], found))
            found = [{**row, "layer": cell.about["layer"], "same_as": layer} for row in found]
        rows += found
    return rows


def _measured(cell: Cell, setting: Setting, progress: Progress | None) -> list[Row]:
    makes = {"dense": cell.candidates["dense"], "control": cell.candidates["dense"], **cell.candidates}
    modules: dict[str, nn.Module] = {}
    found: dict[str, Row] = {}
    with setting.globals():
        for name, make in makes.items():
            try:
                modules[name] = setting.place(make())
            except Exception as error:  # another package's layer may raise anything
                if name in ("dense", "control"):
                    raise
                found[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
        known: dict[str, Row] = {name: {"parameters": count_parameters(module)} for name, module in modules.items()}
        for name, module in modules.items():
            known[name] |= {"resolved": mode} if (mode := resolved(module)) else {}
        found |= cell.measure(modules, setting)
    rows = []
    for name in (name for name in makes if name != "dense"):
        rows.append({**cell.about, "mode": name, **known.get(name, {}), **cell.rows.get(name, {}), **found[name]})
        tell(progress, rows[-1])
    if any(name.endswith(("compiled", "fast")) for name in makes):
        import torch._dynamo  # slow to import

        torch._dynamo.reset()  # compiling gives up in silence after a few networks of a class
    return rows


def resolved(module: nn.Module) -> str | None:
    """The mode that a basis layer, or that of a block as its ``conv``, executes; None for others."""
    return getattr(getattr(module, "conv", module), "resolved_mode", None)


def with_pytorchs_norms(module: nn.Module) -> nn.Module:
    """``module``, in which batch normalisation is PyTorch's own from now on: where there are hooks, none is fused."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.register_forward_hook(lambda *_: None)
    return module
