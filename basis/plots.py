"""The pictures of a sensitivity table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from basis.figures import Theme, canvas, mark_incomplete, note_n
from basis.search.table import SensitivityTable, ratio_of
from basis.text import shown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmap(table: SensitivityTable, theme: Theme) -> Figure:
    """Layers against ratios, then texts of structured layers; what has no finite value is blank."""
    import matplotlib
    import pandas as pd
    import seaborn
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    names, values = [shown_name(layer.name) for layer in table.layers], table.values
    grid = pd.DataFrame(math.nan, index=names, columns=[_title(column) for column in table.columns])
    for layer in table.layers:
        for k in layer.candidates:
            grid.loc[shown_name(layer.name), _title(ratio_of(layer, k))] = values.get((layer.name, k), math.nan)
    finite = [value for value in values.values() if math.isfinite(value)] or [0.0]
    largest, negative = max(map(abs, finite)) or 1.0, min(finite) < 0
    colours = [theme.cycle[1]] * negative + [theme.background, theme.cycle[0]]
    norm = SymLogNorm(largest / 10, vmin=-largest if negative else 0, vmax=largest)
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=max(3.0, 1.6 + 0.2 * len(names)))  # the label of the colours needs as much
        axes = figure.subplots()
        colormap = LinearSegmentedColormap.from_list("sensitivity", colours)
        seaborn.heatmap(grid, ax=axes, cmap=colormap, norm=norm, yticklabels=True, cbar_kws={"label": table.unit})
        axes.grid(False)
        axes.tick_params(axis="y", labelsize=8, rotation=0)
        axes.set_xlabel("ratio r = k / C_out, or structured layer")
        if table.missing:
            mark_incomplete(axes, f"{len(table.cells)} of {len(table.candidates)} cells", theme)
    return figure


def _title(column: float | str) -> str:
    return column if isinstance(column, str) else f"{column:.3g}"


def bars(table: SensitivityTable, ratio: float | str | None, theme: Theme) -> Figure:
    """The values at one ratio or text, with their intervals; at that which most layers have where it is None."""
    import matplotlib

    if ratio is None:
        every = [ratio_of(layer, k) for layer in table.layers for k in layer.candidates]
        ratio = max(table.columns, key=every.count)
    cells = table.at(ratio if isinstance(ratio, str) else min(ratio, 0.999))  # a k just below C_out rounds to 1
    known = {i: cell for i, cell in enumerate(cells.values()) if cell is not None and math.isfinite(cell.value)}
    errors = np.array([[c.value - c.low, c.high - c.value] for c in known.values()]).reshape(-1, 2).T
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.6 + 0.2 * len(cells))
        axes = figure.subplots()
        axes.barh(list(known), [c.value for c in known.values()], xerr=errors, color=theme.cycle[0], ecolor=theme.text)
        axes.set_yticks(range(len(cells)), list(map(shown_name, cells)), fontsize=8)
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{table.unit}, {ratio if isinstance(ratio, str) else f'r = {ratio:.3g} or nearest'}")
        counts = [cell.n for cell in known.values() if cell.n]
        if counts:
            note_n(axes, min(counts), theme)
        if None in cells.values():
            missing = list(cells.values()).count(None)
            mark_incomplete(axes, f"{len(cells) - missing} of {len(cells)} layers", theme)
    return figure
