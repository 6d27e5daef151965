"""The report of a compressed network: one HTML file that loads nothing, made from what ``report.json`` holds."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from basis.figures import DARK, LIGHT, Draw, Theme, canvas, render_figure
from basis.plots import heatmap
from basis.search.table import SensitivityTable


def render(report: Mapping[str, Any], table: SensitivityTable) -> str:
    """The page, of the template beside this file; ``table`` is drawn."""
    import jinja2

    template = files("basis.compression").joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows = [row for stage in report["stages"].values() for row in stage.get("accuracy", ())]
    figures = {
        "accuracy": _inline(lambda theme: accuracy_figure(rows, theme), "accuracy", "Accuracy after each stage"),
        "sensitivity": _inline(lambda theme: heatmap(table, theme), "sensitivity", "Sensitivity by layer and ratio"),
    }
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(template).render(**report, rows=rows, figures=figures)


def accuracy_figure(rows: list[Mapping[str, Any]], theme: Theme) -> Any:
    """Accuracy with its interval, a line for each row."""
    import matplotlib

    with matplotlib.rc_context(theme.rc()):
        axes = (figure := canvas(height=1.0 + 0.36 * len(rows))).subplots()
        for y, row in enumerate(rows):
            value, low, high = (100 * row[key] for key in ("value", "low", "high"))
            colour = theme.cycle[row["images"] == "test"]
            axes.errorbar([value], [y], xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=4)
        axes.set_yticks(range(len(rows)), [f"{row['stage']} ({row['images']})" for row in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="accuracy, %")
    return figure


def _inline(draw: Draw, name: str, alt: str) -> str:
    """The drawing as SVG for a light and a dark page, with identifiers of its own."""
    pictures = []
    for theme in (LIGHT, DARK):
        text = render_figure(draw, theme, name=f"{name}-{theme.name}", fmt="svg").decode()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-{theme.name}-", text)
        label = f'<svg class="{theme.name}" role="img" aria-label="{html.escape(alt)}" '
        pictures.append(text.replace("<svg ", label, 1))
    return "".join(pictures)
