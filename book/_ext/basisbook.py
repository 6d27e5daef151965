"""The book's own Sphinx extension: offline mathematics, no remote scripts, dark figures, right links."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from book.tools.address import address

MATHJAX = ("tex-mml-chtml.js", "input/tex", "output/chtml")  # `input` holds what some macros load later
CDN = b"https://cdn.jsdelivr.net/npm/"  # where MathJax would look for its screen-reader voice


def configure(app: Sphinx, config: Any) -> None:
    """Take the address from its one place, and the numbers of the pages from the records."""
    here = address()
    config.html_baseurl = here.pages
    config.mathjax_path = "mathjax/tex-mml-chtml.js"
    config.html_theme_options |= {
        "repository_url": here.repository,
        "repository_branch": here.branch,
        "path_to_docs": "book",
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
    }
    numbers = Path(app.srcdir) / "generated" / "substitutions.json"
    config.myst_substitutions = json.loads(numbers.read_text(encoding="utf-8"))


class DarkFigures(SphinxTransform):
    """Beside every figure X.svg that has an X-dark.svg, show that one in the dark theme."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        for image in list(self.document.findall(nodes.image)):
            uri = image["uri"]
            dark = uri.removesuffix(".svg") + "-dark.svg"
            folder = Path(self.document["source"]).parent
            if not uri.endswith(".svg") or not (folder / dark).is_file():
                continue
            light_image, dark_image = image.deepcopy(), image.deepcopy()
            light_image["classes"] = [*image["classes"], "only-light"]
            dark_image["classes"] = [*image["classes"], "only-dark"]
            dark_image["uri"] = dark
            # The theme hides what follows a hidden image in its parent, so the pair gets its own.
            pair = nodes.container("", light_image, dark_image, classes=["basis-pair"])
            image.parent[image.parent.index(image)] = pair


def finish_page(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Drop the remote Thebe script, and lead notebook pages' links to the source notebook."""
    for key in ("script_files", "css_files"):
        if key in context:
            context[key] = [item for item in context[key] if "thebe" not in _described(item)]
    here = address()
    built = f"/{here.branch}/book/notebooks/"
    for button in _buttons(context.get("header_buttons", [])):
        button["url"] = button["url"].replace(built, f"/{here.branch}/notebooks/")


def _described(item: Any) -> str:
    return f"{getattr(item, 'filename', item)} {getattr(item, 'attributes', '')}".lower()


def _buttons(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in items:
        if "url" in item:
            yield item
        yield from _buttons(item.get("buttons", []))


def finish_book(app: Sphinx, error: Exception | None) -> None:
    """Copy MathJax, and offer the source notebook for download instead of the page's."""
    if error is not None:
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-mathjax-offline is not installed; install the extra 'book'")
    source, out = Path(spec.origin).parent / "static" / "mathjax", Path(app.outdir)
    target = out / "_static" / "mathjax"
    for part in MATHJAX:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, dirs_exist_ok=True)
        else:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            (target / part).write_bytes((source / part).read_bytes().replace(CDN, b"./"))
    for name in ("sphinx-thebe.js", "sphinx-thebe.css"):
        (out / "_static" / name).unlink(missing_ok=True)
    notebooks = Path(app.srcdir).parent / "notebooks"
    for offered in (out / "_sources" / "notebooks").glob("*.ipynb"):
        shutil.copyfile(notebooks / offered.name, offered)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", finish_page, priority=900)
    app.connect("build-finished", finish_book)
    app.add_transform(DarkFigures)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
