"""The pictures of plans, costs and repairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from basis.figures import Theme, canvas, note_n
from basis.text import shown_name

if TYPE_CHECKING:
    from basis.complexity import CostReport
    from basis.finetuning import FineTuning
    from basis.repair import Recalibration
    from basis.substitution import Plan


def _named_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [shown_name(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def recalibration(result: Recalibration, theme: Theme) -> Figure:
    """Two panels of bars: how far each mean moved, and by what factor each deviation changed."""
    names = [norm.name for norm in result.norms]
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.6 + 0.2 * len(names))
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(range(len(names)), [norm.mean for norm in result.norms], color=theme.cycle[0], height=0.7)
        left.set_xlabel("mean moved by (old deviations)")
        factors = [norm.deviation for norm in result.norms]
        right.barh(range(len(names)), [f - 1 for f in factors], left=1, color=theme.cycle[1], height=0.7)
        right.axvline(1, color=theme.muted, linewidth=1)
        right.set_xlabel("new / old deviation")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(5))
            _named_rows(axes, names)
        note_n(right, f"{result.images:,}", theme)
    return figure


def fine_tuning(result: FineTuning, theme: Theme) -> Figure:
    """Loss and accuracy by epoch; validation with its interval."""
    epochs = [row["epoch"] for row in result.curves]
    held = bool(result.curves) and "validation_loss" in result.curves[0]
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=3.2)
        left, right = figure.subplots(1, 2)
        taught = "training" if result.settings.distillation is None else "training, with the teacher's part"
        for axes, key in ((left, "loss"), (right, "accuracy")):
            scale = 100 if key == "accuracy" else 1
            axes.plot(
                epochs, [scale * row[f"train_{key}"] for row in result.curves], "o-", color=theme.cycle[0],
                label=taught if key == "loss" else "training",
            )  # fmt: skip
            if held:
                values = [scale * row[f"validation_{key}"] for row in result.curves]
                error = None
                if key == "accuracy":
                    ends = [(100 * row["validation_low"], 100 * row["validation_high"]) for row in result.curves]
                    error = [[v - low for v, (low, _) in zip(values, ends, strict=True)],
                             [high - v for v, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
                axes.errorbar(
                    epochs, values, yerr=error, fmt="s--", capsize=3, color=theme.cycle[1], label="validation"
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel("accuracy, %" if key == "accuracy" else "loss, nats")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.1, y=0.25)
            axes.legend(fontsize=9)
    return figure


def plan(of: Plan, theme: Theme) -> Figure:
    """A bar of length k / C_out for each basis convolution; dense ones are grey, structured layers hatched."""
    known = [name for name in of.out_channels if name in of.layers or name in of.skipped]
    names = [*known, *(name for name in (*of.layers, *of.skipped) if name not in of.out_channels)]
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.6 + 0.2 * len(names))
        axes = figure.subplots()
        for i, name in enumerate(names):
            size, width = of.layers.get(name), of.out_channels.get(name)
            if isinstance(size, str):
                axes.barh(i, 1, facecolor="none", edgecolor=theme.cycle[1], hatch="///", linewidth=0, height=0.7)
                note = size
            elif size is None or width is None or size == width:
                axes.barh(i, 1, color=theme.colour("dense"), alpha=0.35, height=0.7)
                note = "dense" if width is None else f"dense, {width}"
            else:
                axes.barh(i, size / width, color=theme.cycle[0], height=0.7)
                note = f"{size} of {width}"
            end = 1 if size is None or isinstance(size, str) or width is None else size / width
            axes.annotate(
                note, (end, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7, color=theme.muted
            )
        _named_rows(axes, names)
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("ratio r = k / C_out")
    return figure


def costs(report: CostReport, theme: Theme) -> Figure:
    """Two panels of bars, parameters and forward MACs: the layer as it is, before an outline of the dense one."""
    layers = [layer for layer in report.layers if layer.dense.forward_macs]
    with matplotlib.rc_context(theme.rc()):
        figure = canvas(height=1.8 + 0.2 * len(layers))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, of, label in zip(panels, ("parameters", "forward_macs"), ("parameters", "forward MACs"), strict=True):
            dense, own = ([getattr(c, of) for c in cs] for cs in ([x.dense for x in layers], [x.cost for x in layers]))
            axes.barh(
                range(len(layers)), dense, facecolor="none", edgecolor=theme.colour("dense"), linewidth=1, height=0.7,
                label="dense",
            )  # fmt: skip
            axes.barh(range(len(layers)), own, color=theme.cycle[0], height=0.7, label="as it is")
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
            _named_rows(axes, [layer.name for layer in layers])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=9)
    return figure
