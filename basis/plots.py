"""The pictures of a sensitivity table."""

from __future__ import annotations

import math

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from basis.figures import Theme, canvas, mark_incomplete, note_n
from basis.search.table import MEASURES, SensitivityTable, ratio_of
from basis.text import shown_name


def heatmap(table: SensitivityTable, theme: Theme) -> Figure:
    """Layers against ratios, then texts of structured layers; what is not finite is hatched."""
    columns, rows = table.columns, {layer.name: i for i, layer in enumerate(table.layers)}
    of = {layer.name: layer for layer in table.layers}
    grid = [[math.nan] * len(columns) for _ in rows]
    strange = []
    for cell in table.cells:
        i, j = rows[cell.layer], columns.index(ratio_of(of[cell.layer], cell.basis_channels))
        grid[i][j] = cell.value
        if not math.isfinite(cell.value):
            strange.append((i, j))
    finite = [value for row in grid for value in row if math.isfinite(value)] or [0.0]
    largest = max(map(abs, finite)) or 1.0
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=max(3.0, 1.6 + 0.2 * len(rows)))  # the label of the colours needs as much
        axes = figure.subplots()
        colours = (
            [theme.cycle[1], theme.background, theme.cycle[0]]
            if min(finite) < 0
            else [theme.background, theme.cycle[0]]
        )
        norm = SymLogNorm(largest / 10, vmin=-largest if min(finite) < 0 else 0, vmax=largest)
        picture = axes.imshow(
            grid, cmap=LinearSegmentedColormap.from_list("sensitivity", colours), norm=norm, aspect="auto"
        )
        for i, j in strange:
            axes.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor=theme.muted, linewidth=0)
            )
        axes.grid(False)
        axes.set_xticks(range(len(columns)), list(map(_said, columns)), rotation=30 if table.texts else 0)
        axes.set_yticks(range(len(rows)), list(map(shown_name, rows)), fontsize=8)
        what = ["ratio r = k / C_out"] * bool(table.ratios) + ["structured layer"] * bool(table.texts)
        axes.set_xlabel(", or ".join(what) + ("; hatched: not finite" if strange else ""))
        figure.colorbar(picture, ax=axes, label=table.unit)
        if table.missing:
            mark_incomplete(axes, f"{len(table.cells)} of {len(table.candidates)} cells", theme)
    return figure


def _said(column: float | str) -> str:
    return column if isinstance(column, str) else f"{column:.3g}"


def bars(table: SensitivityTable, ratio: float | str | None, theme: Theme) -> Figure:
    """The values at one ratio or text, with their intervals; at that which most layers have where it is None."""
    if ratio is None:
        every = [ratio_of(layer, k) for layer in table.layers for k in layer.candidates]
        most = max(table.columns, key=every.count)
        ratio = most if isinstance(most, str) else min(most, 0.999)  # a k just below C_out rounds to 1
    cells = table.at(ratio)
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.6 + 0.2 * len(cells))
        axes = figure.subplots()
        for i, cell in enumerate(cells.values()):
            if cell is None:
                continue
            if not math.isfinite(cell.value):
                axes.axhspan(i - 0.4, i + 0.4, facecolor="none", edgecolor=theme.muted, hatch="////", linewidth=0)
                continue
            error = None if math.isnan(cell.low) else [[cell.value - cell.low], [cell.high - cell.value]]
            axes.barh(
                i,
                cell.value,
                xerr=error,
                color=theme.cycle[0],
                ecolor=theme.text,
                height=0.7,
                error_kw={"elinewidth": 1.2},
            )
        axes.set_yticks(range(len(cells)), list(map(shown_name, cells)), fontsize=8)
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        where = ratio if isinstance(ratio, str) else f"r = {ratio:.3g} or nearest"
        axes.set_xlabel(f"{MEASURES.get(table.measure, 'sensitivity')}, {where}")
        n = {cell.n for cell in cells.values() if cell and cell.n}
        if n:
            note_n(axes, min(n), theme)
        gone = sum(cell is None for cell in cells.values())
        if gone:
            mark_incomplete(axes, f"{len(cells) - gone} of {len(cells)} layers", theme)
    return figure
