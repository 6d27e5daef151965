"""Sensitivity tables: what each layer loses with k basis channels, or as a structured layer, and would save."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from basis.saving import number, plain, replacing
from basis.statistics import difference_estimate
from basis.substitution import Size, size_text
from basis.text import few, shown_name

if TYPE_CHECKING:
    pass

Unit = Literal["params", "macs", "backward_macs"]

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
    "short_training": "change of the final validation loss, short training",
    "full_training": "change of the final validation loss",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution that can be substituted, its candidates, and what any k would cost.

    Attributes:
        name: as in ``model.named_modules()``.
        out_channels, groups: C_out and g of the convolution.
        fan_in: F = C_in/groups x kh x kw.
        bias: number of bias parameters, C_out or 0.
        positions: how often the weight is applied for one image (output pixels, summed over calls);
            None where no image was seen.
        input_gradient: whether training computes the gradient of the layer's input (not for the first).
        candidates: what is measured: numbers of basis channels k below C_out, descending, then texts of
            structured layers, such as "tucker:0.41".
        costs: what the layer costs as each of these texts, see :meth:`cost`.
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
        """``params``, ``macs`` and ``backward_macs`` (per image, factorized mode) with k basis channels.

        Equal to :func:`basis.cost` of the substituted layer; k = C_out is the dense layer. In place of k also
        the text of a structured layer among the candidates: parameters that it would share with other layers
        count as if it were alone, and the MACs that build a weight from factors do not count.
        """
        if isinstance(k, str):
            return dict(self.costs[k])
        mix = (self.out_channels - k) * k // self.groups
        thin = k * self.fan_in + mix
        n = self.positions
        backward = thin + mix + self.input_gradient * k * self.fan_in
        return {
            "params": thin + self.bias,
            "macs": None if n is None else n * thin,
            "backward_macs": None if n is None else n * backward,
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer substituted, all others dense.

    Attributes:
        basis_channels: k, or the text of a structured layer.
        value: the sensitivity, in the unit of the table's measure; NaN where it was not finite.
        low, high: its 95 % interval, NaN where there is none.
        n: the images or seeds that the interval rests on, 0 where there is none.
        kl: mean Kullback-Leibler divergence from the dense network's predictions, in nats; NaN where
            not measured.
        forward, backward: passes through the whole network that this cell took, in images (the suffix
            of a network counts for its share of MACs). A pass that scores many cells is shared evenly.
        seconds: wall-clock time, shared in the same way.
    """

    layer: str
    basis_channels: Size
    value: float
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    kl: float = float("nan")
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training from scratch: of the dense network (``layer`` None), or with one layer substituted.

    Attributes:
        basis_channels: k, or the text of a structured layer; 0 for the dense network.
        loss: the final validation loss, NaN where the training diverged.
        forward, backward, seconds: as in :class:`Cell`.
    """

    layer: str | None
    basis_channels: Size
    seed: int
    loss: float
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """What :func:`basis.sensitivity` returns.

    Attributes:
        measure: its name, one of ``MEASURES``; ``_kl`` is appended by :meth:`by_kl`.
        layers: every convolution that can be substituted, in the order of the model.
        cells: what has been measured so far, layer after layer.
        skipped: name of every other convolution -> why it cannot be substituted. It has no sensitivity.
        total: ``params``, ``macs`` and ``backward_macs`` of the whole dense network (MACs per image;
            None where no image was seen).
        fingerprint: what the cells were measured on; tables of equal fingerprint can be merged.
        baseline: what was measured of the dense network, such as its ``loss``.
        seeds, trials: of the measures that train; the cells follow from the trials.
    """

    measure: str
    layers: tuple[Layer, ...]
    cells: tuple[Cell, ...]
    skipped: Mapping[str, str]
    total: Mapping[str, int | None]
    fingerprint: Mapping[str, str]
    baseline: Mapping[str, float]
    seeds: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        """Put the cells, or those that the trials give, in the order of the layers, each once."""
        order: dict[tuple[str | None, Size], int] = {pair: i for i, pair in enumerate(self.candidates)}
        trials = sorted(self.trials, key=lambda t: (order.get((t.layer, t.basis_channels), -1), t.seed))
        object.__setattr__(self, "trials", tuple(trials))
        cells = cells_of(self.layers, self.seeds, self.trials) if self.seeds else self.cells
        unique = {(cell.layer, cell.basis_channels): cell for cell in reversed(cells)}
        ordered = sorted((pair for pair in unique if pair in order), key=order.__getitem__)
        object.__setattr__(self, "cells", tuple(unique[pair] for pair in ordered))
        if self.seeds:
            dense = {trial.seed: trial.loss for trial in self.trials if trial.layer is None}
            there = set(self.seeds) <= set(dense)
            mean = {"loss": sum(dense[seed] for seed in self.seeds) / len(self.seeds)} if there else {}
            object.__setattr__(self, "baseline", mean)

    # -- what is there --------------------------------------------------------------------------

    @property
    def candidates(self) -> tuple[tuple[str, Size], ...]:
        """Every layer with each k or text that is to be measured, in order."""
        return tuple((layer.name, k) for layer in self.layers for k in layer.candidates)

    @property
    def missing(self) -> tuple[tuple[str, Size], ...]:
        """The candidates (layer, k) that have not been measured yet."""
        there = {(cell.layer, cell.basis_channels) for cell in self.cells}
        return tuple(pair for pair in self.candidates if pair not in there)

    @property
    def not_finite(self) -> tuple[tuple[str, Size], ...]:
        """The candidates (layer, k) whose value is not finite; they have no rank."""
        return tuple((cell.layer, cell.basis_channels) for cell in self.cells if not math.isfinite(cell.value))

    @property
    def unit(self) -> str:
        """What the values are, in words."""
        return MEASURES.get(self.measure, "divergence from the dense predictions, nats")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Every ratio k / C_out that some layer has, descending, to three digits."""
        ks = ((layer, k) for layer in self.layers for k in layer.candidates if not isinstance(k, str))
        return tuple(sorted({ratio_of(layer, k) for layer, k in ks}, reverse=True))

    @property
    def texts(self) -> tuple[str, ...]:
        """Every structured layer that some layer has as a candidate."""
        return tuple(dict.fromkeys(k for _, k in self.candidates if isinstance(k, str)))

    @property
    def columns(self) -> tuple[float | str, ...]:
        """The ratios, then the texts."""
        return (*self.ratios, *self.texts)

    @property
    def forward(self) -> float:
        """Forward passes of all cells together, in images."""
        return sum(cell.forward for cell in self.cells)

    @property
    def backward(self) -> float:
        """Backward passes of all cells together, in images."""
        return sum(cell.backward for cell in self.cells)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all cells together."""
        return sum(cell.seconds for cell in self.cells)

    def at(self, ratio: float | str) -> dict[str, Cell | None]:
        """Each layer's cell at the k nearest to ``ratio`` (the larger of two); None where missing.

        ``ratio`` may be the text of a structured layer, too; then it is the layer's cell at that text. Layers
        without such candidates are left out.

        Raises:
            ValueError: for a ratio outside (0, 1), or a text that no layer has as a candidate.
        """
        cells = {(cell.layer, cell.basis_channels): cell for cell in self.cells}
        if isinstance(ratio, str):
            if ratio not in self.texts:
                raise ValueError(f"no layer of the table has the candidate {ratio!r}; there are {few(self.texts)}")
            return {layer.name: cells.get((layer.name, ratio)) for layer in self.layers if ratio in layer.candidates}
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}, but it is k / C_out and must lie between 0 and 1")
        ks = {layer: [k for k in layer.candidates if not isinstance(k, str)] for layer in self.layers}
        nearest = {
            layer.name: min(own, key=lambda k: (abs(k / layer.out_channels - ratio), -k))
            for layer, own in ks.items()
            if own
        }
        return {name: cells.get((name, k)) for name, k in nearest.items()}

    def ranking(self, ratio: float | str) -> tuple[str, ...]:
        """Layer names from the least to the most sensitive, each at its cell of :meth:`at`.

        Layers that have not been measured there, or whose value is not finite, are left out.
        """
        values = {name: cell.value for name, cell in self.at(ratio).items() if cell and math.isfinite(cell.value)}
        return tuple(sorted(values, key=values.__getitem__))

    def by_kl(self) -> SensitivityTable:
        """The same table with the divergence from the dense predictions as value, which has no interval.

        Raises:
            ValueError: where it was not measured.
        """
        if not any(math.isfinite(cell.kl) for cell in self.cells):
            raise ValueError(
                f"this table of {self.measure} holds no divergences; oneshot and oneshot_bn measure them, "
                "where the loss is cross-entropy of logits (N, classes)"
            )
        cells = (replace(cell, value=cell.kl, low=math.nan, high=math.nan, n=0) for cell in self.cells)
        measure = f"{self.measure}_kl"
        return replace(self, measure=measure, cells=tuple(cells), fingerprint={**self.fingerprint, "measure": measure})

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: what it measured, what it cost, and what it would save of the dense layer.

        ``basis_channels`` is k or the text of a structured layer, whose ``ratio`` is NaN.
        """
        rows = []
        layers = {layer.name: layer for layer in self.layers}
        for cell in self.cells:
            layer, k = layers[cell.layer], cell.basis_channels
            dense, thin = layer.cost(layer.out_channels), layer.cost(k)
            saved = {f"saved_{unit}": _less(dense[unit], thin[unit]) for unit in dense}
            own = asdict(cell)
            head = {"layer": own.pop("layer"), "out_channels": layer.out_channels}
            head |= {"basis_channels": own.pop("basis_channels")}
            head |= {"ratio": math.nan if isinstance(k, str) else k / layer.out_channels}
            rows.append(head | own | saved)
        return pd.DataFrame(rows)

    # -- printed and drawn ----------------------------------------------------------------------

    def __str__(self) -> str:
        dense = f"; dense loss {self.baseline['loss']:.4g}" if "loss" in self.baseline else ""
        values = {(cell.layer, cell.basis_channels): cell.value for cell in self.cells}
        columns: dict[float | str, dict[str, float | None]] = {one: {} for one in self.columns}
        for layer in self.layers:
            for k in layer.candidates:
                columns[ratio_of(layer, k)][layer.name] = values.get((layer.name, k))
        least = {one: min(filter(_finite, column.values()), default=None) for one, column in columns.items()}  # type: ignore[type-var]
        titles = (one if isinstance(one, str) else f"r = {one:.3g}" for one in columns)
        rows = [("layer", "C_out", *titles)]
        for layer in self.layers:
            shown = (_text(column, layer.name, least[one]) for one, column in columns.items())
            rows.append((shown_name(layer.name), str(layer.out_channels), *shown))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.measure}: {self.unit}{dense}"]
        for name, *cells in rows:
            right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join((f"{name:<{widths[0]}}", *right)).rstrip())
        lines.append(f"* least sensitive {'in this column' if self.texts else 'at this ratio'}")
        lines.append(
            f"cost: {self.forward:,.0f} forward passes, {self.backward:,.0f} backward passes (in images), "
            f"{self.seconds:,.3g} s"
        )
        for what, pairs in (("not measured yet", self.missing), ("not finite, so not ranked", self.not_finite)):
            if pairs:
                lines.append(f"{what}: " + ", ".join(f"{shown_name(name)} ({size_text(k)})" for name, k in pairs))
        for reason in dict.fromkeys(self.skipped.values()):
            names = [shown_name(name) for name, why in self.skipped.items() if why == reason]
            lines.append(f"kept dense ({reason}): {', '.join(names)}")
        return "\n".join(lines)

    # -- kept -----------------------------------------------------------------------------------

    def to_lines(self) -> list[dict[str, Any]]:
        """Plain values: all but the measurements, then one entry for each measurement. NaN becomes None."""
        held = self.trials if self.seeds else self.cells
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cells", "trials")}
        rows = [asdict(layer) for layer in self.layers]
        content["layers"] = [{key: value for key, value in row.items() if key != "costs" or value} for row in rows]
        return [{"basis_sensitivity": TABLE_VERSION} | plain(content), *map(line_of, held)]

    @classmethod
    def from_lines(cls, lines: Sequence[Mapping[str, Any]]) -> SensitivityTable:
        """The table that :meth:`to_lines` gave. Raises ``ValueError`` where ``lines`` are not one."""
        head = dict(lines[0]) if lines and isinstance(lines[0], Mapping) else {}
        version = head.pop("basis_sensitivity", None)
        if version is None:
            raise ValueError("this is no sensitivity table: it does not begin with an entry 'basis_sensitivity'")
        if version != TABLE_VERSION:
            raise ValueError(f"the sensitivity table has version {version!r}, but {TABLE_VERSION} is read here")
        try:
            layers = tuple(Layer(**{**entry, "candidates": tuple(entry["candidates"])}) for entry in head["layers"])
            head |= {"layers": layers, "seeds": tuple(head["seeds"])}
            head["baseline"] = {key: number(value) for key, value in head["baseline"].items()}
            head["trials" if head["seeds"] else "cells"] = tuple(
                _measurement(line, Trial if head["seeds"] else Cell) for line in lines[1:]
            )
            return cls(**{"cells": (), **head})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the sensitivity table is damaged: {error!r}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON lines to ``path``, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.to_lines()).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> SensitivityTable:
        """Read what :meth:`save` or ``sensitivity(..., resume=path)`` wrote, also while it is being written.

        An incomplete last line is left out.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for a file that is no sensitivity table.
        """
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no sensitivity table at {os.fspath(path)}") from error
        try:
            lines = [json.loads(line) for line in text.split("\n")[:-1]]
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no sensitivity table, or damaged: {error}") from error
        try:
            return cls.from_lines(lines)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def merge(cls, tables: Iterable[SensitivityTable]) -> SensitivityTable:
        """One table of what several workers measured, each a part; what two have is taken from the first.

        Raises:
            ValueError: for no tables, for tables that were measured on different things, whose dense
                networks differ, or that hold different losses of one training.
        """
        tables = list(tables)
        if not tables:
            raise ValueError("there are no tables to merge")
        first = tables[0]
        for table in tables[1:]:
            differing = different(first.fingerprint, table.fingerprint)
            if differing:
                raise ValueError(f"the tables cannot be merged, because they differ in {', '.join(differing)}")
            for key in () if first.seeds else {*first.baseline} & {*table.baseline}:
                a, b = first.baseline[key], table.baseline[key]
                if not math.isclose(a, b, rel_tol=1e-4):
                    raise ValueError(
                        f"the tables cannot be merged: the dense network's {key} is {a:.6g} in one, {b:.6g} in another"
                    )
        trials: dict[tuple, Trial] = {}
        for trial in (trial for table in tables for trial in table.trials):
            known = trials.setdefault((trial.layer, trial.basis_channels, trial.seed), trial)
            if not (known.loss == trial.loss or (math.isnan(known.loss) and math.isnan(trial.loss))):
                raise ValueError(
                    f"the tables cannot be merged: {known.layer or 'the dense network'} with seed {known.seed} "
                    f"ended at {known.loss:.6g} in one, at {trial.loss:.6g} in another"
                )
        cells = tuple(cell for table in tables for cell in table.cells)
        baseline = {key: value for table in reversed(tables) for key, value in table.baseline.items()}
        return replace(first, cells=cells, trials=tuple(trials.values()), baseline=baseline)


# -- helpers ------------------------------------------------------------------------------------


def different(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """The entries of two fingerprints that are not equal."""
    return [key for key in dict.fromkeys((*first, *second)) if first.get(key) != second.get(key)]


def cells_of(layers: Iterable[Layer], seeds: Sequence[int], trials: Iterable[Trial]) -> tuple[Cell, ...]:
    """Mean loss with one layer substituted minus the dense network's, with Welch's 95 % interval.

    Only where every seed has been trained, of the candidate and of the dense network, whose cost all
    candidates share.
    """
    runs: dict[tuple[str | None, Size], dict[int, Trial]] = {}
    for trial in trials:
        runs.setdefault((trial.layer, trial.basis_channels), {})[trial.seed] = trial
    pairs = [(layer.name, k) for layer in layers for k in layer.candidates]
    dense = runs.get((None, 0), {})
    cells = []
    for name, k in pairs:
        own = runs.get((name, k), {})
        if not seeds or not set(seeds) <= set(own) & set(dense):
            continue
        losses, others = ([side[seed].loss for seed in seeds] for side in (own, dense))
        cost = {
            key: sum(getattr(trial, key) for trial in own.values())
            + sum(getattr(trial, key) for trial in dense.values()) / len(pairs)
            for key in ("forward", "backward", "seconds")
        }
        if all(map(math.isfinite, losses + others)):
            found = difference_estimate(losses, others)
            value = {"value": found.value, "low": found.low, "high": found.high, "n": len(seeds)}
        else:
            value = {"value": math.nan}
        cells.append(Cell(layer=name, basis_channels=k, **value, **cost))  # type: ignore[arg-type]
    return tuple(cells)


def line_of(item: Cell | Trial) -> dict[str, Any]:
    """One measurement as plain values; NaN and infinity become None."""
    return plain(asdict(item))


def _measurement(line: Mapping[str, Any], kind: type) -> Any:
    return kind(**{key: value if key == "layer" else number(value) for key, value in line.items()})


def ratio_of(layer: Layer, k: Size) -> Any:
    """k / C_out to three digits; the text of a structured layer as it is."""
    return k if isinstance(k, str) else round(k / layer.out_channels, 3)


def _less(dense: int | None, thin: int | None) -> int | None:
    return None if dense is None or thin is None else dense - thin


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _text(column: Mapping[str, float | None], name: str, least: float | None) -> str:
    """The value as printed: empty where the ratio is no candidate, an ellipsis where not measured."""
    if name not in column:
        return ""
    value = column[name]
    return "..." if value is None else f"{'*' if value == least else ''}{value:.3g}"
