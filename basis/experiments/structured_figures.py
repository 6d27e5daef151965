"""Pictures of structured layers: what each stores, and the weight that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from basis.figures import Theme, canvas
from basis.layers.conv import BasisConv2d
from basis.layers.structured import Structure, StructuredConv2d

CHANNELS = 16
GAP, START = 4, 188  # cells between two tensors; where the weight begins


def stored_tensors(layer: BasisConv2d | StructuredConv2d) -> list[Tensor]:
    """The tensors that a layer stores (one entry a number), as matrices of about as many rows as filters."""
    if isinstance(layer, BasisConv2d):
        parts: Sequence[Tensor] = [layer.basis, layer.coefficients.matrix()]
    else:
        parts = list(layer.parts.values())
    return [_matrix(part.detach()) for part in parts]


def _matrix(part: Tensor, rows: int = CHANNELS) -> Tensor:
    """Two dimensions, and no more rows than a weight has."""
    flat = part.reshape(len(part), -1) if part.dim() > 1 else part[None]
    if len(flat) <= rows and flat.shape[1] <= 10 * rows:
        return flat
    values = flat.flatten()
    columns = math.ceil(len(values) / rows)
    filled = torch.full((rows * columns,), math.nan)
    filled[: len(values)] = values
    return filled.reshape(columns, rows).T


def draw_layers(theme: Theme, layers: Sequence[tuple[str, str, str]]) -> Figure:
    """One row for each layer: its stored tensors at the left, the weight that they make at the right.

    ``layers``: (text of a structured layer, title, formula), drawn for a 3x3 convolution of 16 to 16 channels.
    """
    figure = canvas(0.3 + 0.66 * len(layers))
    rows: Any = figure.subplots(len(layers), 1, squeeze=False)
    colours = LinearSegmentedColormap.from_list("signed", [theme.cycle[1], theme.background, theme.cycle[0]])
    for axes, (text, title, formula) in zip(rows[:, 0], layers, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False)
            layer: Any = Structure.parse(text).make([conv], fitted=False)[0]
        weight = layer.weight.detach().reshape(CHANNELS, -1)
        place = top = 0
        parts = stored_tensors(layer)
        for i, part in enumerate(parts):
            _draw_matrix(axes, part, (place, top), colours, theme)
            under = i + 1 < len(parts) and parts[i + 1].shape[1] == part.shape[1]
            if under and top + len(part) + 1 + len(parts[i + 1]) <= CHANNELS:
                top += len(part) + 1
            else:
                place, top = place + part.shape[1] + GAP, 0
        arrow = {"arrowstyle": "->", "color": theme.muted}
        axes.annotate("", (START - GAP, CHANNELS / 2), (place, CHANNELS / 2), arrowprops=arrow)
        _draw_matrix(axes, weight, (START, 0), colours, theme)
        axes.set(xlim=(-1, START + weight.shape[1] + 1), ylim=(CHANNELS + 0.5, -0.5), aspect="equal")
        axes.set_title(f"{title}   {formula}", fontsize=10.5, fontweight="normal", pad=3)
        axes.axis("off")
    return figure


def _draw_matrix(
    axes: Axes, matrix: Tensor, corner: tuple[float, float], colours: LinearSegmentedColormap, theme: Theme
) -> None:
    (left, top), (rows, columns) = corner, matrix.shape
    scale = matrix.nan_to_num().abs().quantile(0.98).item() or matrix.nan_to_num().abs().max().item() or 1.0
    look: Any = {"cmap": colours, "vmin": -scale, "vmax": scale, "interpolation": "nearest", "aspect": "equal"}
    axes.imshow(matrix.numpy(), extent=(left, left + columns, top + rows, top), **look)
    axes.add_patch(Rectangle(corner, columns, rows, facecolor="none", edgecolor=theme.muted, linewidth=0.6))


def plain_ticks(axes: Axes) -> None:
    """Label a logarithmic x-axis at 1, 2, 5, 10, ... in plain numbers, a short one more densely."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 4 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def name_points(axes: Axes, points: Sequence[tuple[str, float, float, Any]], *, at: float) -> None:
    """Name points, each (name, x, y, colour), in a column at x = ``at``, from which lines lead to them."""
    low, high = axes.get_ylim()
    place, step = low, 0.078 * (high - low)
    for i, (name, x, y, colour) in enumerate(sorted(points, key=lambda point: point[2])):
        last = high - (len(points) - i) * step  # leaves room for those above
        place = max(place + step, min(y, last))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkB": 3}
        axes.annotate(name, (x, y), (at, place), va="center", color=colour, fontsize=9.5, arrowprops=line)
