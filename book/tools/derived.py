"""Files that repeat the repository's address or the output of code, and how they are kept true.

`sync` writes the setup cell of every notebook, the links, the example, the claims and the headline figure
of README.md, and the lines of CITATION.cff. With `check=True` it changes nothing and says what is out of date.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from book.tools.address import Address, parse_source, source_url
from book.tools.gates import tagged

HEADLINE = "headline"  # the figure of this name stands on the front page and in the README
_SETUP = """\
# Run this cell first. On Colab it fetches the book; anywhere else it does nothing.
import os
import runpy
import sys

if "google.colab" in sys.modules:
    folder, url = "/content/{name}-book", "{repository}"
    if not os.path.isdir(folder):
        os.system(f"git clone --quiet --depth 1 --branch {branch} {{url}} {{folder}}")
    os.chdir(folder)
    runpy.run_path("notebooks/colab.py")"""


def setup_cell(address: Address) -> str:
    """The source of the setup cell that every notebook begins with."""
    return _SETUP.format(name=address.name, branch=address.branch, repository=address.repository)


def readme_links(address: Address) -> str:
    """The line of links at the top of README.md."""
    links = {
        "Start here": address.colab("notebooks/00_start_here.ipynb"),
        "Read the book": address.pages,
        "Source": address.repository,
        "Issues": f"{address.repository}/issues",
    }
    badge = f"[![tests]({address.repository}/actions/workflows/book.yml/badge.svg)]({address.repository}/actions)"
    return " · ".join([*[f"[{text}]({url})" for text, url in links.items()], badge])


def block(text: str, name: str) -> str | None:
    """What stands between the markers `<!-- basis:NAME -->` and `<!-- /basis:NAME -->`."""
    found = re.search(rf"<!-- basis:{name} -->\n(.*?)<!-- /basis:{name} -->", text, re.DOTALL)
    return found[1] if found else None


def _replace_block(text: str, name: str, content: str) -> str:
    old = block(text, name)
    if old is None:
        raise ValueError(f"README.md has no block <!-- basis:{name} --> ... <!-- /basis:{name} -->")
    marker = f"<!-- basis:{name} -->\n"
    return text.replace(marker + old, f"{marker}{content.rstrip()}\n", 1)


def example_output(readme: str, root: Path) -> str:
    """Run the README's Python example and return what it prints."""
    code = re.search(r"```python\n(.*?)```", block(readme, "example") or "", re.DOTALL)
    if code is None:
        raise ValueError("README.md has no Python example between its basis:example markers")
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=root, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(f"the README's example fails: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.rstrip()


def _alike(output: str, told: str) -> bool:
    """Whether two outputs of the example are the same but for percentages: other processors round otherwise."""
    return re.sub(r"\d+%", "%", output) == re.sub(r"\d+%", "%", told)


def readme(text: str, address: Address, *, output: str | None = None, claims: str | None = None) -> str:
    """README.md as it should be; what is None is left as it is. `output` is what its example prints."""
    text = _replace_block(text, "links", readme_links(address))
    if claims is not None:
        text = _replace_block(text, "claims", claims)
    code, _, told = (block(text, "example") or "").partition("```text")
    if output is not None and not _alike(output, told.strip("`\n")):
        code = code.rstrip()
        text = _replace_block(text, "example", f"{code}\n\n```text\n{output}\n```")
    return text


def citation(text: str, address: Address, version: str) -> str:
    """CITATION.cff as it should be."""
    for key, value in {"repository-code": address.repository, "url": address.pages, "version": version}.items():
        text = re.sub(rf"^{key}:.*$", f'{key}: "{value}"', text, flags=re.MULTILINE)
    return text


def notebook_text(text: str, address: Address) -> str:
    """A notebook file with its setup cell as it should be."""
    notebook = nbformat.reads(text, as_version=4)
    for cell in tagged(notebook, "setup"):
        cell.source = setup_cell(address)
    return str(nbformat.writes(notebook)) + "\n"


def sync(root: Path, *, check: bool = False, example: bool = True, claims: str | None = None) -> list[str]:
    """Bring every derived file up to date and say which were not; with `check` change nothing.

    `example=False` leaves out the README's example, which has to be run to be compared; its claims are left out
    unless given (:func:`book.tools.pages.readme_claims`).
    """
    pyproject = (root / "pyproject.toml").read_text(encoding="utf-8")
    address = parse_source(source_url(pyproject))
    found = re.search(r'^version = "([^"]+)"', pyproject, re.MULTILINE)
    version = found[1] if found else ""

    before = {path: path.read_text(encoding="utf-8") for path in _derived_files(root)}
    problems = []
    for path, text in before.items():
        if path.name == "README.md":
            wanted = readme(text, address, output=example_output(text, root) if example else None, claims=claims)
        elif path.name == "CITATION.cff":
            wanted = citation(text, address, version)
        else:
            wanted = notebook_text(text, address)
        if wanted != text:
            name = path.relative_to(root)
            problems.append(
                f"{name} is out of date; `basis dev sync` rewrites it" if check else f"{name} was rewritten"
            )
            if not check:
                path.write_text(wanted, encoding="utf-8")
    return problems + _sync_headline(root, check=check)


def _sync_headline(root: Path, *, check: bool) -> list[str]:
    """Copy the headline figure of the last build to where the README shows it.

    Only a missing copy is a problem: another version of matplotlib draws other bytes.
    """
    problems = []
    for name in (f"{HEADLINE}.svg", f"{HEADLINE}-dark.svg"):
        drawn, shown = root / "book" / "figures" / name, root / "book" / "_static" / name
        if drawn.exists() and not check:
            shutil.copyfile(drawn, shown)
        if not shown.exists():
            problems.append(f"book/_static/{name} is missing; build the book, and `basis dev sync` copies the figure")
    return problems


def _derived_files(root: Path) -> list[Path]:
    return [root / "README.md", root / "CITATION.cff", *sorted((root / "notebooks").glob("*.ipynb"))]
