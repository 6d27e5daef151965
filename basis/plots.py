"""The picture of a sensitivity table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from basis.figures import Theme, canvas, mark_incomplete
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

    title = {column: column if isinstance(column, str) else f"{column:.3g}" for column in table.columns}
    names, values = [shown_name(layer.name) for layer in table.layers], table.values
    grid = pd.DataFrame(math.nan, index=names, columns=list(title.values()))
    for layer in table.layers:
        for k in layer.candidates:
            grid.loc[shown_name(layer.name), title[ratio_of(layer, k)]] = values.get((layer.name, k), math.nan)
    finite = [value for value in values.values() if math.isfinite(value)] or [0.0]
    largest = max(map(abs, finite)) or 1.0
    negative = min(finite) < -largest / 100  # less is noise, and not worth half of the colours
    colours = [theme.cycle[1]] * negative + [theme.background, theme.cycle[0]]
    norm = SymLogNorm(largest / 10, vmin=-largest if negative else 0, vmax=largest)
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=max(3.0, 1.6 + 0.2 * len(names)))  # the label of the colours needs as much
        axes = figure.subplots()
        colormap = LinearSegmentedColormap.from_list("sensitivity", colours)
        seaborn.heatmap(grid, ax=axes, cmap=colormap, norm=norm, yticklabels=True, cbar_kws={"label": table.unit})
        axes.grid(False)
        axes.tick_params(axis="y", labelsize=8, rotation=0)
        structured = ", or structured layer" if any(isinstance(column, str) for column in table.columns) else ""
        axes.set_xlabel(f"ratio r = k / C_out{structured}")
        if table.missing:
            mark_incomplete(axes, f"{len(table.cells)} of {len(table.candidates)} cells", theme)
    return figure
