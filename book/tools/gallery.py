"""The page of all figures: what each shows, how to draw it anew, and the data behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from book.tools.derived import HEADLINE
from book.tools.gates import first_heading

WIDTH = 480  # pixels of a thumbnail
FIGURES = Path(__file__).resolve().parents[1] / "figures"


def thumbnails(folder: Path) -> None:
    """Make NAME.webp of every NAME.png in the folder of figures: small, on white."""
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.thumbnail((WIDTH, 2 * WIDTH))
            picture.convert("RGB").save(path.with_suffix(".webp"), quality=85)


def gallery(pages: Mapping[str, Any], headline: Mapping[str, str] | None, folder: Path = FIGURES) -> str:
    """A section for each chapter, with a card for each of its figures, as Markdown."""
    parts = [_cards([headline], folder)] if headline else []
    for stem, page in sorted(pages.items()):
        about = page.metadata.basis
        if about.figures:
            made = f"Drawn by {{doc}}`chapter {int(stem[:2])} </notebooks/{stem}>` in {about.time}"
            measured = f", from results of {about.measured}" if about.measured else ""
            parts.append(f"## {first_heading(page)}\n\n{made}{measured}.\n\n{_cards(about.figures, folder)}")
    return "\n\n".join(parts)


def _cards(figures: Iterable[Mapping[str, str]], folder: Path) -> str:
    return "\n".join(["::::{grid} 1 2 2 3\n:gutter: 3\n", *(_card(about, folder) for about in figures), "::::"])


def _card(about: Mapping[str, str], folder: Path) -> str:
    name = about["name"]
    says = re.split(r"(?<=[.:])\s+(?=[A-Z`])", " ".join(about["caption"].split()), maxsplit=1)[0]
    files = [ending for ending in ("svg", "pdf", "png", "csv") if (folder / f"{name}.{ending}").exists()]
    links = " · ".join(f"{{download}}`{ending.upper()} <figures/{name}.{ending}>`" for ending in files)
    label = "fig-front" if name == HEADLINE else f"fig-{name}"
    lines = [f"![{json.dumps(about['alt'])[1:-1]}](figures/{name}.webp)", f"{{numref}}`{label}` {says}"]
    lines += [f"`basis figures {name}`", links]
    return ":::{grid-item-card}\n:class-card: basis-thumbnail\n" + "\n\n".join(lines) + "\n:::"
