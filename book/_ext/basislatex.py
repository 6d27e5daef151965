"""The book in print: what its pages become when Sphinx writes LaTeX."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

HERE = Path(__file__).resolve().parent
ON_SCREEN = {"figures"}  # pages that print leaves out
SIZES = {r"\small": 92, r"\footnotesize": 103, r"\scriptsize": 116}  # letters on a line
GAP = 2.1  # between two columns, in letters
TOGETHER = re.compile(
    r"(?<=[\d.%],) (?=[-+−]?[\d.]+%?\])|(?<=\d) (?=%)|(?<=\b[a-zA-Z]) (?== )|(?<=\b[a-zA-Z] =) (?=\d)"
)


def configure(app: Sphinx, config: Any) -> None:
    """A book on A4 by Sphinx's own class; after sphinx-jupyterbook-latex, whose fonts and class are others."""
    config.latex_documents = [(config.root_doc, "basis.tex", config.project, config.author, "manual")]
    config.latex_theme = "manual"
    config.latex_additional_files = [str(HERE / "print.sty")]
    config.latex_table_style = ["booktabs", "nocolorrows"]
    config.latex_use_xindy = config.latex_domain_indices = config.jblatex_load_imgconverter = False
    config.jblatex_show_tocs = False
    numbers = json.loads((Path(app.srcdir) / "generated" / "substitutions.json").read_text(encoding="utf-8"))
    config.today = f"Version {numbers['version']}, commit {numbers['commit']}"
    config.latex_elements = {
        "papersize": "a4paper",
        "pointsize": "11pt",
        "extraclassoptions": "openany,oneside",
        "babel": r"\usepackage[english]{babel}",
        "fontpkg": r"\usepackage{unicode-math}\setmathfont{texgyrepagella-math.otf}",
        "fncychap": "",
        "sphinxsetup": "hmargin={27mm,27mm}, vmargin={27mm,30mm}, verbatimforcewraps=true, "
        "InnerLinkColor={RGB}{31,58,95}, OuterLinkColor={RGB}{31,58,95}",
        "preamble": r"\usepackage{print}\booksubtitle{An executable book}",
        "makeindex": "",
        "printindex": "",
    }


def number_exercises(app: Sphinx, env: Any) -> None:
    """Number exercises by chapter as on the pages; with parts, Sphinx would count them by section."""
    if app.builder.format != "latex":
        return
    for numbers in env.toc_fignumbers.values():
        exercises = numbers.get("exercise", {})
        for place, (name, number) in enumerate(list(exercises.items()), 1):
            exercises[name] = (number[0], place) if len(number) > 1 else number


class PrintFigures(SphinxTransform):
    """A figure X.svg that has an X.pdf beside it is printed from that; before the dark one is looked for."""

    default_priority = 300

    def apply(self, **_: Any) -> None:
        if self.app.builder.format != "latex":
            return
        folder = Path(self.document["source"]).parent
        for image in list(self.document.findall(nodes.image)):
            plain = image["uri"].removesuffix(".svg")
            kind = next((kind for kind in (".pdf", ".png") if (folder / (plain + kind)).is_file()), None)
            if image["uri"].endswith(".svg") and kind:
                image["uri"] = plain + kind
            elif image["uri"].endswith(".svg"):
                image.parent.remove(image)


class Print(SphinxPostTransform):
    """Turn the whole book, one tree by now, into what a reader of paper wants."""

    default_priority = 600  # references are resolved; sphinx-jupyterbook-latex arranges the parts at 700
    builders = ("latex",)

    def run(self, **_: Any) -> None:
        for node in list(self.document.findall(left_out)):
            node.parent.remove(node)
        for reference in list(self.document.findall(nodes.reference)):
            page, _, name = reference.get("refuri", "").removeprefix("%").partition("#")
            name = name or reference.get("refid", "")
            if page in ON_SCREEN:
                reference.replace_self(reference.children)
            elif name.startswith("equation-"):  # whose label TeX knows by another name
                label = f"equation:{page or _page(reference)}:{name.removeprefix('equation-')}"
                link = latex(rf"\hyperref[\detokenize{{{label}}}]{{")
                reference.replace_self([link, *reference.children, latex("}")])
        for raw in list(self.document.findall(nodes.raw)):
            raw.replace_self(spoken(raw))
        for grid in [node for node in self.document.findall(nodes.container) if "sd-row" in node["classes"]]:
            grid.replace_self(card_list(grid))
        for text in list(self.document.findall(nodes.Text)):
            if not isinstance(
                text.parent, (nodes.raw, nodes.math, nodes.math_block, nodes.literal_block, nodes.literal)
            ):
                text.parent.replace(text, nodes.Text(TOGETHER.sub("\u00a0", text)))
        for page in self.document.findall(addnodes.start_of_file):
            numbered = bool(self.env.toc_secnumbers.get(page["docname"]))
            depth = r"{2}" if numbered else r"{-1}\setcounter{chapter}{0}"
            page.insert(0, latex(rf"\setcounter{{secnumdepth}}{depth}" + "\n"))
        for table in list(self.document.findall(nodes.table)):
            set_table(table)
        for citation in list(self.document.findall(nodes.citation)):
            anchor = f"cite.{citation['docname']}:{citation['ids'][0]}"
            citation[1].insert(0, latex(rf"\bookentry{{{anchor}}}"))
            citation.replace_self(citation.children[1:])
        front_chapter(next(self.document.findall(nodes.section)))


def latex(text: str) -> nodes.raw:
    return nodes.raw("", text, format="latex")


def _page(node: Any) -> str:
    """The page that a node of the whole book is from, as its section says."""
    while "docname" not in node and node.parent:
        node = node.parent
    return str(node["docname"])


def left_out(node: nodes.Node) -> bool:
    """Whether print has no use for a node: folded cells, code and output, how to run a page, a page of thumbnails."""
    if isinstance(node, addnodes.start_of_file):
        return node["docname"] in ON_SCREEN
    if isinstance(node, nodes.section):
        return node[0].astext() == "Run this page yourself"
    if not isinstance(node, nodes.container):
        return False
    folded = {f"tag_{does}-{{}}" for does in ("hide", "remove")}

    def tagged(container: Any, part: str) -> bool:
        return bool({tag.format(part) for tag in folded} & set(container.get("classes", [])))

    if "cell" in node["classes"]:
        return tagged(node, "cell") and "tag_solution" not in node["classes"]
    parts = [part for part in ("input", "output") if f"cell_{part}" in node["classes"]]
    return any(tagged(node.parent, part) for part in parts)


def spoken(raw: nodes.raw) -> list[nodes.Node]:
    """What raw HTML says in print: a line break, the label of something folded; otherwise nothing."""
    if "html" not in raw["format"]:
        return [raw]
    text = raw.astext()
    if re.fullmatch(r"\s*<br\s*/?>\s*", text):
        return [latex(r"\newline ")]
    label = re.search(r"<summary>(.*?)</summary>", text, re.DOTALL)
    return [nodes.paragraph("", "", nodes.strong("", label[1]))] if label else []


def card_list(grid: nodes.container) -> nodes.bullet_list:
    """The cards of a grid as a list, each with its title in bold."""
    items = []
    for body in grid.findall(lambda node: "sd-card-body" in getattr(node, "get", dict().get)("classes", [])):
        title, *text = body.children
        text[0].insert(0, nodes.strong("", f"{title.astext()}. "))
        items.append(nodes.list_item("", *text))
    return nodes.bullet_list("", *items)


def front_chapter(front: nodes.section) -> None:
    """The front page as a first chapter without number, its sections as that chapter's."""
    marked = {target.get("refid") for target in front.findall(nodes.target)}
    sections = [s for s in front.findall(nodes.section) if s is not front and s.get("docname") == front["docname"]]
    for section in sections[::-1]:
        above, depth = section.parent, 0
        while above is not front:
            above, depth = above.parent, depth + isinstance(above, nodes.section)
        title, *content = section.children
        mark = nodes.target("", "", ids=[name for name in section["ids"] if name not in marked])
        heading = [latex("\n\n\\" + "sub" * depth + "section{"), *title.children, latex("}\n"), mark]
        section.replace_self([*heading, *content])
    front.insert(1, latex("\\setcounter{secnumdepth}{-1}\\chapter{About this book}\n"))


# --- tables ------------------------------------------------------------------------------------


def set_table(table: nodes.table) -> None:
    """Choose columns, type size and page breaks so that a table fits the line."""
    rows = [[_lines(entry) for entry in row.findall(nodes.entry)] for row in table.findall(nodes.row)]
    inset = 0.9 if isinstance(table.parent, (nodes.Admonition, nodes.list_item)) else 1
    size, widths, wraps = layout(rows, inset)
    spec = ""
    for column, width in zip(zip(*rows, strict=False), widths, strict=True):
        right = all(re.fullmatch(r"[-–+±~<>≤≥\d.,%×\s]*", line) for cell in column[1:] for line in cell)
        box = rf"p{{{min(1, width / SIZES[size] / inset):.3f}\linewidth}}"
        spec += rf">{{\ragged{'left' if right else 'right'}\arraybackslash}}{box}" if wraps else "lr"[right]
    if sum(math.ceil(max(map(_height, row, widths))) for row in rows) > 20:
        table["classes"].append("longtable")
    columns = addnodes.tabular_col_spec()
    columns["spec"] = spec
    for empty in [entry for entry in table.findall(nodes.entry) if not entry.astext().strip()]:
        empty.clear()  # where an empty paragraph is a line
    for text in list(table.findall(nodes.Text)):
        if isinstance(text.parent, nodes.paragraph):
            text.parent.replace(text, nodes.Text(re.sub(r"(?<=[_/])(?=\w)", "\u200b", text)))
    place = table.parent.index(table)
    table.parent[place : place + 1] = [
        latex(rf"\begingroup{size}\renewcommand{{\tablerowgap}}{{{3 * wraps}pt}}" + "\n"),
        columns,
        table,
        latex("\\endgroup\n"),
    ]


def layout(rows: Sequence[Sequence[Sequence[str]]], inset: float = 1) -> tuple[str, list[float], bool]:
    """Type size, widths of the columns in letters, and whether their text is wrapped.

    Rows are lists of cells, cells lists of lines. Wrapped columns are as wide as their longest word at
    least; what is left goes letter by letter to the column that shortens the table most.
    """
    columns = list(zip(*rows, strict=False))
    natural = [max(_width(line) for cell in column for line in cell) + 0.5 for column in columns]
    words = [max(_width(word) for cell in column for line in cell for word in _words(line)) + 0.5 for column in columns]
    sizes = [(size, letters * inset - GAP * len(columns)) for size, letters in SIZES.items()]
    for size, room in sizes[:2]:
        if sum(natural) <= room:
            return size, natural, any(len(cell) > 1 for row in rows for cell in row)
    size, room = sizes[1] if sum(words) <= 0.8 * sizes[1][1] else sizes[2]
    widths = list(words)

    def length(widths: Sequence[float]) -> float:
        return sum(sum(_height(*pair) ** 4 for pair in zip(row, widths, strict=False)) ** 0.25 for row in rows)

    while sum(widths) + 1 < min(room, sum(natural)):
        tries = [[w + (i == j) for j, w in enumerate(widths)] for i in range(len(widths)) if widths[i] < natural[i]]
        widths = min(tries, key=length)
    scale = min(1, room / sum(widths))  # breaks words, where they leave no other way
    return size, [scale * width for width in widths], True


def _lines(entry: nodes.entry) -> list[str]:
    """The text of a cell, line by line; mathematics and code by letters about as wide."""
    text = ""
    for node in entry.findall():
        if isinstance(node, nodes.raw):
            text += "\n" * (r"\newline" in node.astext())
        elif isinstance(node, nodes.math):
            text += re.sub(r"\\[a-zA-Z]+", "x", node.astext()).replace("{", "").replace("}", "")
        elif isinstance(node, nodes.Text) and not isinstance(node.parent, (nodes.raw, nodes.math)):
            text += re.sub("[a-z]", "n", node) if isinstance(node.parent, nodes.literal) else node
    return text.split("\n")


def _words(line: str) -> list[str]:
    return re.split(r"[ \t]+|(?<=[-–/])", line)


def _width(text: str) -> float:
    """How wide a text is set in Palatino, in middling letters."""
    return sum(
        1.7 if c in "mwMW+→%" else 1.4 if c.isupper() else 0.6 if c in "ijltfr .,;:|()[]" else 1.05 for c in text
    )


def _height(cell: Sequence[str], width: float) -> float:
    return sum(max(1.0, _width(line) / width) for line in cell)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", configure, priority=900)
    app.connect("env-check-consistency", number_exercises)  # after Sphinx has numbered
    app.add_transform(PrintFigures)
    app.add_post_transform(Print)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
