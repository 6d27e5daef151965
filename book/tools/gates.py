"""What the book refuses. Each gate is a function that returns problems, one sentence each.

An empty list means that all is well. `book.tools.build.build` runs them all; tests/test_book.py plants
a fault for each. Notebooks are given as nbformat nodes, built pages as their folder.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from book.tools.address import Address

Notebook = Any  # nbformat.NotebookNode, which carries no types
REQUIRED_TAGS = ("setup", "parameters", "answer", "card")
REQUIRED_SECTIONS = ("Exercises", "Deviations", "When to use it")


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def tagged(notebook: Notebook, tag: str) -> list[Any]:
    """The cells that carry a tag."""
    return [cell for cell in notebook.cells if tag in tags(cell)]


# --- source notebooks --------------------------------------------------------------------------


def source_problems(notebook: Notebook, name: str) -> list[str]:
    """Committed outputs, and a `parameters` cell that is missing or holds more than literals."""
    problems = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code" and (cell.get("outputs") or cell.get("execution_count")):
            problems.append(f"{name}: cell {number} is stored with outputs or a count; strip them")
    cells = tagged(notebook, "parameters")
    if len(cells) != 1:
        return [*problems, f"{name}: {len(cells)} cells are tagged 'parameters'; there must be one"]
    return problems + parameter_problems(cells[0].source, name)


def parameter_problems(source: str, name: str) -> list[str]:
    """Anything in a parameters cell but `name: type = literal  # what it is`."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [f"{name}: the parameters cell is not Python: {error.msg} in line {error.lineno}"]
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    problems = []
    for statement in tree.body:
        line = source.splitlines()[statement.lineno - 1].strip()
        if not isinstance(statement, ast.AnnAssign) or statement.value is None:
            problems.append(f"{name}: the parameters cell may only hold `name: type = literal`, not `{line}`")
        elif not _is_literal(statement.value):
            problems.append(f"{name}: the parameter in `{line}` is computed; papermill would not recompute it")
        elif statement.end_lineno not in commented:
            problems.append(f"{name}: the parameter in `{line}` has no comment that says what it is")
    return problems


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def unknown_parameters(known: Iterable[str], passed: Iterable[str], name: str) -> list[str]:
    """Parameters that the notebook does not have; papermill itself would only warn."""
    names = sorted(known)
    return [
        f"{name} has no parameter {unknown!r}; it has {', '.join(names) or 'none'}"
        for unknown in sorted(set(passed) - set(names))
    ]


def contract_problems(notebook: Notebook, name: str) -> list[str]:
    """What a chapter must have: a question as title, the tagged cells, the sections, an exercise."""
    problems = []
    title = first_heading(notebook)
    if not title.endswith("?"):
        problems.append(f"{name}: the first cell must be a title that asks a question, not {title!r}")
    for tag in REQUIRED_TAGS:
        count = len(tagged(notebook, tag))
        if count != 1:
            problems.append(f"{name}: {count} cells are tagged {tag!r}; there must be one")
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    sections = re.findall(r"^## +(.+?)\s*$", text, re.MULTILINE)
    for wanted in REQUIRED_SECTIONS:
        if not any(section.startswith(wanted) for section in sections):
            problems.append(f"{name}: there is no section '## {wanted}'")
    kinds = [tags(cell) for cell in notebook.cells]
    solved = ["solution" in after for kind, after in zip(kinds, [*kinds[1:], []], strict=True) if "exercise" in kind]
    if not solved or not all(solved):
        problems.append(f"{name}: a cell tagged 'exercise' must be there, and one tagged 'solution' follow each")
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", text)]
    if numbers != [*range(1, len(numbers) + 1)]:
        problems.append(f"{name}: the equations are tagged {numbers}, but must be numbered in order, from 1")
    return problems


def first_heading(notebook: Notebook) -> str:
    """The title of a notebook, empty if it does not begin with one."""
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        return ""
    return str(first.source.splitlines()[0][2:].strip())


# --- numbers in the text -----------------------------------------------------------------------

_UNIT = r"""(?:
    \s?(?: % | (?:percent|per\ cent|pp|points?|percentage\ points?)\b
      | (?:ms|us|µs|s|sec|min|h|(?:milli)?seconds?|minutes?|hours?|days?)\b
      | (?:[kKMG]|thousand|million|billion|[KMG]i?B|[GT]?flop/?s)\b(?!/)
      | (?:x|×|times)(?=\s+(?:as|faster|slower|smaller|larger|bigger|fewer|less|more|quicker|cheaper|speed)))
    | [x×](?!\w|\s?[\d$A-Z]|\sk\b) )"""
_MANY = r"(?:[Tt]wo|[Tt]hree|[Ff]our|[Ff]ive|[Ss]ix|[Ee]ight|[Tt]en)"
_WORDS = rf"{_MANY}\s+times\s+(?:as|faster|slower|smaller|larger|fewer|less|more)\b"
_MEASURED = re.compile(rf"(?<![\w.^/])(?: [-+−]?\d[\d,]*(?:\.\d+)?{_UNIT} | 0\.\d{{3,}}\b | {_WORDS} )", re.VERBOSE)
_PER_CENT_IN_MATHS = re.compile(r"\d\s*\\%")
_LEVEL = re.compile(r"\b9[59](?:\.\d)?\s?%[ -](?:confidence|interval|CI\b|band|Welch)|\b80\s?% power\b")
_CITED = re.compile(r"\{cite(?::\w+)?\}`|\]\(https?://|<a href=.https?://")
_NOT_PROSE = re.compile(
    r"^(```+|~~~+).*?^\1\s*$|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]+`|\{\{.*?\}\}|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)


def number_problems(text: str, where: str) -> list[str]:
    """Measured-looking numbers that were typed instead of computed.

    A number looks measured when a unit of accuracy, time, size or speed follows it: %, points, ms,
    s, minutes, hours, k, M, GB, "x faster" and the like, also "three times faster"; and when it is a
    fraction of three digits or more, such as an accuracy. It may stand in code, in mathematics
    (without a per cent sign) and in a `{{ substitution }}`, as a level ("95 % interval",
    "80 % power"), and on a line that cites its source with {cite} or a link to it. What code computes
    needs no citation.
    """

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    lines = text.splitlines()
    bare = _LEVEL.sub(" ", _NOT_PROSE.sub(blank, text)).splitlines()
    return [
        f"{where}: {match[0].strip()!r} is typed into the text; compute it from records or cite its source: "
        f"{line.strip()[:80]!r}"
        for line, stripped in zip(lines, bare, strict=False)
        if not _CITED.search(line)
        for match in (*_MEASURED.finditer(stripped), *_PER_CENT_IN_MATHS.finditer(line))
    ]


def notebook_number_problems(notebook: Notebook, name: str) -> list[str]:
    """`number_problems` of a notebook's Markdown, and of the string literals in its code."""
    problems = []
    for number, cell in enumerate(notebook.cells, 1):
        where = f"{name}, cell {number}"
        if cell.cell_type == "markdown":
            problems += number_problems(cell.source, where)
        elif cell.cell_type == "code" and not {"parameters", "setup"} & set(tags(cell)):
            try:
                texts = list(_literals(cell.source))
            except SyntaxError as error:
                problems.append(f"{where}: this is not Python: {error.msg} in line {error.lineno}")
                continue
            for text in texts:
                problems += number_problems(text, where)
    return problems


def _literals(source: str) -> Iterator[str]:
    """String literals of some code; what an f-string computes stands as a letter."""
    code = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.splitlines())
    tree = ast.parse(code)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in joined for part in ast.walk(node)} - {id(node) for node in joined}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "N" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


# --- executed notebooks ------------------------------------------------------------------------


def executed_problems(notebook: Notebook, name: str) -> list[str]:
    """An error, something on stderr, an answer that is no text, or no output at all."""
    problems = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        line = (cell.source.strip().splitlines() or ["(empty)"])[0]
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"{name}: the cell `{line}` fails with {output.ename}: {output.evalue}")
            elif output.output_type == "stream" and output.name == "stderr":
                first = output.text.strip().splitlines()[:1]
                problems.append(f"{name}: the cell `{line}` writes to stderr: {' '.join(first)}")
    if not any(cell.outputs for cell in code):
        problems.append(f"{name}: no cell has an output; was the notebook executed?")
    elif not any(
        "text/markdown" in output.get("data", {}) for cell in tagged(notebook, "answer") for output in cell.outputs
    ):
        problems.append(f"{name}: the cell tagged 'answer' displays no Markdown")
    return problems


# --- built pages -------------------------------------------------------------------------------


class Page(HTMLParser):
    """One built page: its elements with their attributes, its anchors, its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.anchors: set[str] = set()
        self.inline: list[str] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if "style" in attributes:
            self.inline.append(attributes["style"])
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self._open = ""

    def handle_data(self, data: str) -> None:
        """Keep what scripts and style sheets say."""
        if self._open in ("script", "style"):
            self.inline.append(data)


def read_pages(html: Path) -> list[Page]:
    """Parse every page of a built book."""
    return [Page(path) for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]


def is_path(text: str) -> bool:
    """Whether a text is the name of a file and therefore no description."""
    return bool(re.fullmatch(r"\S*[/\\]\S*|\S+\.(svg|png|jpe?g|gif|webp|pdf)", text.strip()))


def alt_problems(pages: Iterable[Page]) -> list[str]:
    """Images whose alt text is missing, empty or the name of a file."""
    return [
        f"{page.path.name}: the image {attributes.get('src')!r} has the alt text {attributes.get('alt')!r}"
        for page in pages
        for tag, attributes in page.elements
        if tag == "img" and (not attributes.get("alt", "").strip() or is_path(attributes["alt"]))
    ]


_REMOTE = re.compile(r"^(?:https?:)?//", re.IGNORECASE)
_LOADED_BY_CODE = re.compile(
    r"""url\(\s*['"]?(?:https?:)?//[^)]*\)|@import\s+['"](?:https?:)?//[^'"]+"""
    r"""|https?://[\w.-]+/[\w./@-]*\.(?:m?js|css|wasm|woff2?)\b"""
    r"""|https?://(?:unpkg\.com|cdn\.[\w.-]+|cdnjs\.[\w.-]+|esm\.sh|fonts\.[\w.-]+)[\w./@-]*"""
)
_COMMENT = re.compile(r"/\*.*?\*/|^\s*//.*?$", re.DOTALL | re.MULTILINE)
_LINK_LOADS = {
    "stylesheet",
    "preload",
    "prefetch",
    "modulepreload",
    "icon",
    "manifest",
    "preconnect",
    "dns-prefetch",
}


def remote_problems(pages: Iterable[Page], html: Path) -> list[str]:
    """Anything that a page would load from another machine; plain links are no load."""
    problems = []
    for page in pages:
        for tag, attributes in page.elements:
            for key in ("src", "srcset", "data", "poster", "href", "xlink:href"):
                if not _REMOTE.match(attributes.get(key, "")) or (tag == "a" and key == "href"):
                    continue
                if tag == "link" and not _LINK_LOADS & set(attributes.get("rel", "").lower().split()):
                    continue
                problems.append(f"{page.path.name}: <{tag}> loads {attributes[key]}")
        problems += [f"{page.path.name}: {load}" for text in page.inline for load in _remote_code(text)]
    for path in sorted(html.rglob("*")):
        if path.suffix in (".css", ".js", ".svg") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            problems += [f"{path.relative_to(html)}: {load}" for load in _remote_code(text)]
    return problems


def _remote_code(text: str) -> list[str]:
    return [f"the code names {match[0]}" for match in _LOADED_BY_CODE.finditer(_COMMENT.sub(" ", text))]


def link_problems(pages: Iterable[Page], html: Path) -> list[str]:
    """Links inside the book to files or anchors that do not exist."""
    pages = list(pages)
    anchors = {page.path.resolve(): page.anchors for page in pages}
    problems = []
    for page in pages:
        for tag, attributes in page.elements:
            target = attributes.get("src" if tag in ("img", "script") else "href", "")
            parts = urlsplit(target)
            if not target or target == "#" or parts.scheme or parts.netloc:
                continue
            path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            if not path.exists():
                problems.append(f"{page.path.relative_to(html)}: {target!r} does not exist")
            elif parts.fragment and path in anchors and unquote(parts.fragment) not in anchors[path]:
                problems.append(f"{page.path.relative_to(html)}: {target!r} has no such anchor")
    return problems


def repository_link_problems(pages: Iterable[Page], root: Path, address: Address) -> list[str]:
    """Colab and repository links that lead to another repository or to a file that is not there."""
    place = re.compile(
        r"https://(?:colab\.research\.google\.com/github|github\.com)/(?P<owner>[^/]+)/(?P<name>[^/]+)"
        rf"/(?P<kind>blob|tree|edit)/(?P<branch>{re.escape(address.branch)}|[^/]+)/(?P<path>[^#?]+)"
    )
    ours = f"{address.repository.removeprefix('https://github.com/')}/"
    problems = []
    for page in pages:
        links = [attributes.get("href", "") for tag, attributes in page.elements if tag == "a"]
        for link in dict.fromkeys(links):
            colab, match = "//colab.research.google.com/" in link, place.match(link)
            where = f"{page.path.name}: {link}"
            if match is None:
                if colab:
                    problems.append(f"{where} is no link to a notebook that Colab can open")
            elif not f"{match['owner']}/{match['name']}/".startswith(ours):
                if colab:
                    problems.append(f"{where} leads to another repository than {address.repository}")
            elif match["branch"] != address.branch:
                problems.append(f"{where} leads to another branch than {address.branch}")
            elif not (root / unquote(match["path"])).exists():
                problems.append(f"{where} leads to nothing: the repository has no {match['path']}")
            elif colab and not match["path"].endswith(".ipynb"):
                problems.append(f"{where} is no notebook")
    return problems


def page_problems(html: Path, root: Path, address: Address) -> list[str]:
    """All gates on the built pages."""
    pages = read_pages(html)
    return [
        *alt_problems(pages),
        *remote_problems(pages, html),
        *link_problems(pages, html),
        *repository_link_problems(pages, root, address),
    ]


# --- the table of contents ---------------------------------------------------------------------


def contents_problems(toc: str, notebooks: Mapping[str, Path]) -> list[str]:
    """Notebooks that the table of contents forgets, and entries without a notebook."""
    listed = set(re.findall(r"^\s*-\s*file:\s*notebooks/(\S+?)(?:\.ipynb)?\s*$", toc, re.MULTILINE))
    return [
        *[f"book/_toc.yml does not list notebooks/{name}" for name in sorted(set(notebooks) - listed)],
        *[f"book/_toc.yml lists notebooks/{name}, which does not exist" for name in sorted(listed - set(notebooks))],
    ]
