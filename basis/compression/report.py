"""The report of a compressed network: one HTML file that loads nothing, made from what ``report.json`` holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from basis.figures import LIGHT, render_figure
from basis.plots import heatmap
from basis.search.table import SensitivityTable


def render(report: Mapping[str, Any], table: SensitivityTable) -> str:
    """The page, of the template beside this file; ``table`` is drawn."""
    import jinja2

    template = files("basis.compression").joinpath("report.html.jinja").read_text(encoding="utf-8")
    rows = [row for stage in report["stages"].values() for row in stage.get("accuracy", ())]
    options = {"name": "sensitivity", "fmt": "svg", "facecolor": LIGHT.background}
    picture = render_figure(lambda theme: heatmap(table, theme), LIGHT, **options).decode()
    picture = re.sub(r"<metadata>.*?</metadata>", "", picture[picture.index("<svg") :], flags=re.DOTALL)
    picture = picture.replace("<svg ", '<svg role="img" aria-label="Sensitivity by layer and ratio" ', 1)
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(template).render(**report, rows=rows, sensitivity=picture)
