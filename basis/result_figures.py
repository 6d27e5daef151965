"""The pictures of plans, costs and repairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from basis.figures import Theme, canvas, note_n
from basis.text import shown_name

if TYPE_CHECKING:
    from basis.finetuning import FineTuning
    from basis.repair import Recalibration


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
        for axes, key in ((left, "loss"), (right, "accuracy")):
            scale = 100 if key == "accuracy" else 1
            axes.plot(
                epochs, [scale * row[f"train_{key}"] for row in result.curves], "o-", color=theme.cycle[0],
                label="training",
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
        right.legend()
    return figure
