"""Sensitivity tables: what each layer loses with k basis channels, or as a structured layer, and what it would save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from basis.saving import columns, number, plain, replacing
from basis.substitution import Size, size_text
from basis.text import shown_name

TABLE_VERSION = 1

# Every measure, from cheap to dear, and what its values are.
MEASURES: Mapping[str, str] = {
    "spectrum": "relative error of the weight",
    "activation": "relative error of the output",
    "taylor": "first-order change of the loss",
    "fisher": "quadratic change of the loss",
    "oneshot": "change of the loss",
    "oneshot_bn": "change of the loss, statistics recalibrated",
    "fine_tuning": "change of the validation loss after fine-tuning",
}
SEARCHES = tuple(measure for measure in MEASURES if measure != "fine_tuning")  # those that train nothing


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution that can be substituted, and what it costs.

    Attributes:
        fan_in: F = C_in/groups x kh x kw; ``bias``: C_out or 0.
        positions: output pixels of one image, summed over calls; None where no image was seen.
        input_gradient: whether training computes the gradient of the layer's input (not for the first).
        candidates: numbers of basis channels k below C_out, descending, then texts of structured layers.
        costs: what the layer costs as each of these texts.
    """

    name: str
    out_channels: int
    groups: int
    fan_in: int
    bias: int
    positions: int | None
    input_gradient: bool
    candidates: tuple[Size, ...]
    costs: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict, hash=False)

    def cost(self, k: Size) -> dict[str, int | None]:
        """``params``, ``macs`` and ``backward_macs`` (per image, factorized) with k basis channels, or as a text.

        Equal to :func:`basis.cost` of the substituted layer as if it shared no parameter; k = C_out is the dense layer.
        """
        if isinstance(k, str):
            return dict(self.costs[k])
        mix = (self.out_channels - k) * k // self.groups
        thin = k * self.fan_in + mix
        if self.positions is None:
            return {"params": thin + self.bias, "macs": None, "backward_macs": None}
        backward = thin + mix + self.input_gradient * k * self.fan_in
        return {"params": thin + self.bias, "macs": self.positions * thin, "backward_macs": self.positions * backward}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer substituted, with ``basis_channels`` k or as the text of a structured layer, all others dense.

    Attributes:
        value, low, high: the sensitivity in the unit of the table's measure and its 95 % interval; NaN for none.
        n: the images or seeds that the interval rests on.
        kl: mean Kullback-Leibler divergence from the dense network's predictions, in nats; NaN where not measured.
        forward, backward, seconds: passes, in images, and time. What many cells need is shared evenly.
    """

    layer: str
    basis_channels: Size
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    kl: float = math.nan
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """What :func:`basis.sensitivity` returns.

    Attributes:
        measure: one of ``MEASURES``.
        layers: every convolution that can be substituted, in the order of the model.
        cells: what has been measured so far, layer after layer.
        skipped: every other convolution -> why it cannot be substituted. It has no sensitivity.
        total: ``params``, ``macs`` and ``backward_macs`` of the dense network (per image; None without images).
        fingerprint: what the cells were measured on.
        baseline: what was measured of the dense network, such as its ``loss``.
    """

    measure: str
    layers: tuple[Layer, ...]
    cells: tuple[Cell, ...]
    skipped: Mapping[str, str]
    total: Mapping[str, int | None]
    fingerprint: Mapping[str, str]
    baseline: Mapping[str, float]

    def __post_init__(self) -> None:
        """Put the cells in the order of the layers, each once."""
        unique = {(cell.layer, cell.basis_channels): cell for cell in reversed(self.cells)}
        object.__setattr__(self, "cells", tuple(unique[pair] for pair in self.candidates if pair in unique))

    @property
    def candidates(self) -> tuple[tuple[str, Size], ...]:
        """Every layer with each k or text that is to be measured, in order."""
        return tuple((layer.name, k) for layer in self.layers for k in layer.candidates)

    @property
    def values(self) -> dict[tuple[str, Size], float]:
        """(layer, k or text) -> the sensitivity, of all that has been measured."""
        return {(cell.layer, cell.basis_channels): cell.value for cell in self.cells}

    @property
    def missing(self) -> tuple[tuple[str, Size], ...]:
        """The candidates that have not been measured yet."""
        values = self.values
        return tuple(pair for pair in self.candidates if pair not in values)

    @property
    def unit(self) -> str:
        """What the values are, in words."""
        return MEASURES.get(self.measure, self.measure)

    @property
    def columns(self) -> tuple[float | str, ...]:
        """Every ratio k / C_out that some layer has, descending, to three digits, then the texts."""
        found = dict.fromkeys(ratio_of(layer, k) for layer in self.layers for k in layer.candidates)
        return tuple(sorted(found, key=lambda one: (1, 0) if isinstance(one, str) else (0, -one)))

    def at(self, ratio: float) -> dict[str, Cell | None]:
        """Each layer's cell at the k nearest to ``ratio`` (the larger of two), which is None where missing.

        Layers without a k are left out. Raises ``ValueError`` for a ratio outside (0, 1).
        """
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}, but it is k / C_out and must lie between 0 and 1")
        cells = {(cell.layer, cell.basis_channels): cell for cell in self.cells}
        found = {}
        for layer in self.layers:
            ks = [k for k in layer.candidates if not isinstance(k, str)]
            if ks:
                nearest = min(ks, key=lambda k: (abs(k / layer.out_channels - ratio), -k))
                found[layer.name] = cells.get((layer.name, nearest))
        return found

    def ranking(self, ratio: float) -> tuple[str, ...]:
        """Layer names from the least to the most sensitive at :meth:`at`, without those that have no finite value."""
        values = {name: cell.value for name, cell in self.at(ratio).items() if cell and math.isfinite(cell.value)}
        return tuple(sorted(values, key=values.__getitem__))

    def to_frame(self) -> Any:
        """A pandas frame with a row per cell: what it measured, what it cost, and what it saves of the dense layer."""
        import pandas as pd

        rows, layers = [], {layer.name: layer for layer in self.layers}
        for cell in self.cells:
            layer, k = layers[cell.layer], cell.basis_channels
            head = {"layer": cell.layer, "out_channels": layer.out_channels, "basis_channels": k}
            head["ratio"] = math.nan if isinstance(k, str) else k / layer.out_channels
            dense: dict[str, Any] = layer.cost(layer.out_channels)
            saved = {f"saved_{u}": None if one is None else dense[u] - one for u, one in layer.cost(k).items()}
            rows.append(head | asdict(cell) | saved)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        rows = [("layer", "C_out", *(one if isinstance(one, str) else f"r = {one:.3g}" for one in self.columns))]
        values = self.values
        for layer in self.layers:
            known = {k: values.get((layer.name, k)) for k in layer.candidates}
            found = {ratio_of(layer, k): "..." if value is None else f"{value:.3g}" for k, value in known.items()}
            rows.append((shown_name(layer.name), str(layer.out_channels), *(found.get(c, "") for c in self.columns)))
        keys = ("forward", "backward", "seconds")
        forward, backward, seconds = (sum(getattr(cell, key) for cell in self.cells) for key in keys)
        dense = f"; dense loss {self.baseline['loss']:.4g}" if "loss" in self.baseline else ""
        passes = f"{forward:,.0f} forward passes, {backward:,.0f} backward passes (in images)"
        lines = [f"{self.measure}: {self.unit}{dense}", *columns(rows), f"cost: {passes}, {seconds:,.3g} s"]
        strange = [pair for pair, value in values.items() if not math.isfinite(value)]
        for what, pairs in (("not measured yet", self.missing), ("not finite, so not ranked", strange)):
            if pairs:
                lines.append(f"{what}: " + ", ".join(f"{shown_name(name)} ({size_text(k)})" for name, k in pairs))
        for reason in dict.fromkeys(self.skipped.values()):
            names = [shown_name(name) for name, why in self.skipped.items() if why == reason]
            lines.append(f"kept dense ({reason}): {', '.join(names)}")
        return "\n".join(lines)

    def to_lines(self) -> list[dict[str, Any]]:
        """Plain values: all but the cells, then an entry for each of them. NaN becomes None."""
        content = plain(asdict(self))
        cells = content.pop("cells")
        for layer in content["layers"]:
            if not layer["costs"]:
                del layer["costs"]
        return [{"basis_sensitivity": TABLE_VERSION} | content, *cells]

    @classmethod
    def from_lines(cls, lines: Sequence[Mapping[str, Any]]) -> SensitivityTable:
        """The table that :meth:`to_lines` gave. Raises ``ValueError`` where ``lines`` are not one."""
        try:
            head = dict(lines[0])
            version = head.pop("basis_sensitivity")
            if version != TABLE_VERSION:
                raise ValueError(f"the sensitivity table has version {version!r}, but {TABLE_VERSION} is read here")
            head.pop("seeds", None)  # tables were once written with them
            entries: Any = ({key: one if key == "layer" else number(one) for key, one in e.items()} for e in lines[1:])
            head["cells"] = tuple(Cell(**entry) for entry in entries)
            head["layers"] = tuple(Layer(**e | {"candidates": tuple(e["candidates"])}) for e in head["layers"])
            head["baseline"] = {key: number(value) for key, value in head["baseline"].items()}
            return cls(**head)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no sensitivity table, or damaged: {error!r}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON lines to ``path``, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.to_lines()).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> SensitivityTable:
        """Read what :meth:`save` or ``sensitivity(..., resume=path)`` wrote, but for a last line that was cut short."""
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no sensitivity table at {os.fspath(path)}")
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            return cls.from_lines([json.loads(line) for line in text.split("\n")[:-1]])
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no sensitivity table, or damaged: {error}") from error


def ratio_of(layer: Layer, k: Size) -> Any:
    """k / C_out to three digits; the text of a structured layer as it is."""
    return k if isinstance(k, str) else round(k / layer.out_channels, 3)
