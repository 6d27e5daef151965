"""One style for every figure: colour-blind safe, light, dark and print.

A figure is a pure function of a `Theme`, which draws on a :func:`canvas` and returns it; it is called for the light and
the dark picture of the book and for print: ``show(draw, name="cost-forward", caption="What to see.", alt="...")``.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from basis.environment import repository_root
from basis.statistics import mean_estimate

TEXT_WIDTH = 7.0  # inches: the width of the book's text, and of a printed page's
FIGURE_KEY = "basis_figure"  # output metadata of a figure, which the book replaces by a numbered one
# That of the caption under it, which the book drops, and of its interactive twin, which paper drops.
CAPTION_KEY, EXPLORER_KEY = "basis_caption", "basis_explorer"

# One colour for each thing that is compared, wherever it appears: (light, dark). The ratios run from purple to
# yellow-green in order of size; each colour keeps a contrast of 3 or more to its own background.
_GREY, _BLUE, _RED, _GREEN, _PURPLE, _GOLD = (
    ("#3c4046", "#d5d9de"), ("#2f5fb3", "#7fabf5"), ("#c8553d", "#f58f78"), ("#008a7a", "#4fd0bd"),
    ("#7b3294", "#c58be0"), ("#b7791f", "#f0b754"),
)  # fmt: skip
_COLOURS = {
    "dense": _GREY, "r=1/8": _PURPLE, "r=1/4": _BLUE, "r=1/2": _GREEN, "r=3/4": _GOLD, "factorized": _BLUE,
    "composed": _RED, "auto": _PURPLE, "selected": _BLUE, "uniform": _RED, "narrowerdense": _GREEN,
    "largestfirst": _PURPLE, "threshold": _GOLD, "switched": _GOLD,
}  # fmt: skip
_CYCLE = (_BLUE, _RED, _GREEN, _PURPLE, _GOLD, ("#5b6470", "#aab4c0"))
_LIGHT_COLOURS, _DARK_COLOURS = ({label: pair[i] for label, pair in _COLOURS.items()} for i in (0, 1))
_LIGHT_CYCLE, _DARK_CYCLE = (tuple(pair[i] for pair in _CYCLE) for i in (0, 1))


@dataclass(frozen=True)
class Theme:
    """The colours of one background."""

    name: str
    text: str
    muted: str
    grid: str
    warning: str
    background: str
    colours: Mapping[str, str]
    cycle: tuple[str, ...]

    def colour(self, label: str) -> str:
        """The colour of a ratio ("r=1/2"), a mode ("composed") or any other label, always the same."""
        known = self.colours.get(label.replace(" ", ""))
        return known or self.cycle[sum(label.encode()) % len(self.cycle)]

    def rc(self, salt: str = "basis") -> dict[str, Any]:
        """Matplotlib settings for this theme; `salt` fixes the identifiers inside an SVG."""
        clear = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
        text = ("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor")
        small = dict.fromkeys(("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 11)
        sizes = {"axes.titlesize": 12.5, "axes.labelsize": 12, **small}
        lines = {"lines.linewidth": 2, "lines.markersize": 5.5, "grid.linewidth": 0.7}
        frame = {"axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
        title = {"axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False}
        fixed = {"svg.hashsalt": salt, "svg.fonttype": "path", "pdf.fonttype": 42, "font.family": "DejaVu Sans"}
        muted = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.muted)
        colours = {"grid.color": self.grid, "axes.prop_cycle": cycler(color=list(self.cycle))}
        return clear | dict.fromkeys(text, self.text) | sizes | lines | frame | title | fixed | muted | colours


LIGHT = Theme("light", "#1f2328", "#6b7280", "#e3e6ea", "#9a5b00", "#ffffff", _LIGHT_COLOURS, _LIGHT_CYCLE)
DARK = Theme("dark", "#e6e9ed", "#a2abb6", "#3a424c", "#f0b754", "#14181e", _DARK_COLOURS, _DARK_CYCLE)

Draw = Callable[[Theme], Figure]


def canvas(height: float = 3.8, width: float = TEXT_WIDTH) -> Figure:
    """An empty figure of the text's width, outside pyplot, so that nothing global holds it."""
    return Figure(figsize=(width, height), layout="constrained")


def render_figure(draw: Draw, theme: Theme, *, name: str, fmt: str, **options: Any) -> bytes:
    """Draw in one theme; the same drawing always gives the same bytes."""
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    if fmt == "png":  # for screens and slides
        options = {"dpi": 192, "facecolor": theme.background, **options}
    buffer = io.BytesIO()
    with matplotlib.rc_context(theme.rc(name)), warnings.catch_warnings():
        # Of pandas, about how matplotlib reads the single interval that seaborn hands to it.
        warnings.filterwarnings("ignore", "Calling float on a single element Series", FutureWarning)
        figure = draw(theme)
        figure.savefig(buffer, format=fmt, metadata=undated.get(fmt, {}), **options)
    return buffer.getvalue()


def save(draw: Draw, *, name: str, folder: Path, data: pd.DataFrame | None = None) -> bytes:
    """Write NAME.svg and NAME-dark.svg (clear), NAME.pdf, NAME.png and, given `data`, NAME.csv; return the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, theme in ((".svg", LIGHT), ("-dark.svg", DARK), (".pdf", LIGHT), (".png", LIGHT)):
        content = render_figure(draw, theme, name=name, fmt=ending[-3:])
        (folder / f"{name}{ending}").write_bytes(content)
    if data is not None:
        data.to_csv(folder / f"{name}.csv", index=False, float_format="%.10g", lineterminator="\n")
    return content


def interactive(facts: Mapping[str, Any], *, name: str, root: Path) -> str:
    """The HTML of a figure's interactive twin, facts and script, of which nothing is seen where no script runs."""
    text = json.dumps(facts, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    code = (root / "book" / "_static" / "explorer.js").read_text(encoding="utf-8")
    held = f'<div class="basis-explorer" data-figure="{name}"><script type="application/json">{text}</script></div>'
    return f"{held}\n<script>\n{code}</script>"


def show(
    draw: Draw, *, name: str, caption: str, alt: str, data: pd.DataFrame | None = None, folder: Path | None = None,
    explorer: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Show a figure with its caption in the notebook, and write its files for the book.

    `caption` is plain Markdown and states the finding; `alt` describes what is seen to someone who does not see it;
    `data` is the table that is drawn. The files of :func:`save` go to `folder`, by default `$BASIS_FIGURES` or
    `book/figures` of the checkout, if there is one. `explorer` are the facts of an interactive twin: its `kind`, and
    what `book/_static/explorer.js` says that this kind needs.
    """
    from IPython.display import Markdown, display

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"figure name {name!r} must be small letters, digits and hyphens")
    root, named = repository_root(), os.environ.get("BASIS_FIGURES")
    folder = folder or (Path(named) if named else root and root / "book" / "figures")
    drawn = save(draw, name=name, folder=folder, data=data) if folder else None
    png = drawn or render_figure(draw, LIGHT, name=name, fmt="png")
    width, height = struct.unpack(">II", png[16:24])  # shown at half its size, sharp on dense screens
    picture = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    shape = {"width": width // 2, "height": height // 2, "alt": alt}
    about = {"image/png": shape, FIGURE_KEY: {"name": name, "caption": caption, "alt": alt}}
    display(picture, raw=True, metadata=about)
    display(Markdown(f"**Figure {name}.** {caption}"), metadata={CAPTION_KEY: name})
    if explorer and root:
        display({"text/html": interactive(explorer, name=name, root=root)}, raw=True, metadata={EXPLORER_KEY: name})


# For seaborn, where three rows of a frame hold an estimate and both ends of its interval (or quartiles).
ENDS: Mapping[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}


def student(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval for seaborn's ``errorbar``: from three values on, or it would dwarf all else."""
    mean = mean_estimate(values)
    return (mean.value, mean.value) if mean.n == 2 else (mean.low, mean.high)


def side_by_side(runs: pd.DataFrame, x: str, *, by: str, step: float = 0.012) -> pd.DataFrame:
    """The runs with ``x`` moved a little for each value of ``by`` but "dense", so that no interval hides another."""
    names = [name for name in runs[by].unique() if name != "dense"]
    moves = {name: step * (i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    return runs.assign(**{x: runs[x] + runs[by].map(moves).fillna(0)})


def mark_incomplete(axes: Axes, what: str, theme: Theme) -> None:
    """Say on the figure itself that data are missing, for example "6 of 10 runs"."""
    box = {"boxstyle": "round,pad=0.35", "facecolor": "none", "edgecolor": theme.warning, "linestyle": "--"}
    look: Any = {"ha": "left", "va": "top", "color": theme.warning, "bbox": box, "xytext": (6, -8)}
    axes.annotate(f"incomplete: {what}", (0, 1), xycoords="axes fraction", textcoords="offset points", **look)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(item).replace("|", "\\|") for item in line) + " |" for line in lines)
