"""Pictures of structured layers: what each stores and the weight that it makes, and accuracy against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from basis.statistics import Estimate

CHANNELS = 16
GAP = 4  # cells between two tensors
START = 188  # where the weight begins
MARKERS = "sD^vP<>X*hpd"


def stored_tensors(layer: nn.Module) -> list[Tensor]:
    """The tensors that a layer stores (one entry a number), as matrices of about as many rows as filters."""
    if isinstance(layer, BasisConv2d):
        parts: Sequence[Tensor] = [layer.basis, layer.coefficients.matrix()]
    elif isinstance(layer, StructuredConv2d):
        parts = [_as_stored(layer, name) for name in layer.parts if layer.bits(name)]
    else:
        raise ValueError(f"{type(layer).__name__} is no basis convolution and no structured layer")
    return [_matrix(part.detach()) for part in parts]


def _as_stored(layer: StructuredConv2d, name: str) -> Tensor:
    """The parameter of that name; its mask, where only the mask is stored."""
    part = layer.parts[name].detach()
    return (part.abs() > part.abs().median()).float() if layer.bits(name) == part.numel() else part


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

    Args:
        layers: (text of a structured layer, title, formula), drawn for a 3x3 convolution of 16 to 16 channels.
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
        axes.annotate(
            "", (START - GAP, CHANNELS / 2), (place, CHANNELS / 2),
            arrowprops={"arrowstyle": "->", "color": theme.muted},
        )  # fmt: skip
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
    extent = (left, left + columns, top + rows, top)
    axes.imshow(
        matrix.numpy(), cmap=colours, vmin=-scale, vmax=scale, extent=extent, interpolation="nearest", aspect="equal"
    )
    axes.add_patch(Rectangle(corner, columns, rows, facecolor="none", edgecolor=theme.muted, linewidth=0.6))


class Point(NamedTuple):
    """One variant in a picture of accuracy against cost."""

    cost: float
    accuracy: Estimate


def draw_tradeoff(
    axes: Axes, theme: Theme, curves: Mapping[str, Sequence[Point]], *, bold: Mapping[str, str], unit: float = 1.0
) -> None:
    """Curves of accuracy against cost on a logarithmic axis, one a name.

    Args:
        curves: name -> its points, in any order.
        bold: names that stand out, with their colours; the others go through the theme's from the second on.
        unit: what the ticks of the cost count.
    """
    others = [name for name in curves if name not in bold]
    for name, points in curves.items():
        points = sorted(points, key=lambda point: point.cost)
        i = others.index(name) if name in others else -1
        style: dict[str, Any] = {"marker": "o", "markersize": 7, "linewidth": 2.2, "zorder": 3}
        if i >= 0:
            style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 0.9, "zorder": 2, "alpha": 0.85}
        style["color"] = bold.get(name) or theme.cycle[1:][i % (len(theme.cycle) - 1)]
        low = [p.accuracy.value - p.accuracy.low for p in points]
        high = [p.accuracy.high - p.accuracy.value for p in points]
        errors = None if any(map(math.isnan, low)) else (low, high)
        axes.errorbar(
            [p.cost / unit for p in points], [p.accuracy.value for p in points], yerr=errors, elinewidth=0.5,
            label=name, **style,
        )  # fmt: skip
    axes.set_xscale("log")
    plain_ticks(axes)
    axes.margins(y=0.12)


def plain_ticks(axes: Axes) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10, ... in plain numbers."""
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
