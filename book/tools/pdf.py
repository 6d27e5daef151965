"""The book as one PDF: the pages of the last build, set by TeX.

Needs programs, packages and fonts that no Python package brings; `PARTS` names what Debian calls them.
How a page looks in print stands in `book/_ext`: `basislatex.py` and `print.sty`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from book.tools.build import BookError, checkout

# A program or file that is needed -> the package of Debian that has it.
PARTS = {
    "latexmk": "latexmk",
    "xelatex": "texlive-xetex",
    "titlesec.sty": "texlive-latex-extra",
    "texgyrepagella-regular.otf": "fonts-texgyre",
    "texgyrepagella-math.otf": "fonts-texgyre-math",
    "DejaVuSansMono.ttf": "fonts-dejavu-core",
}
FRONT = re.compile(r'<p id="basis-pdf"( hidden)?>.*?</p>', re.DOTALL)  # where the front page offers the file
# What makes a PDF unfit to be published, as TeX's log says it.
FAULTS = re.compile(r"Missing character: .*|.*LaTeX Warning: .*undefined.*|Overfull \\hbox \(\d{2,}\.\d+pt.*")


def build(
    *,
    profile: str | None = None,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Path:
    """Print the pages of the last build as book/_build/basis.pdf, and offer that on the book's front page.

    Raises:
        ValueError: for a profile or chapters, which only a build of the pages can choose.
        BookError: without TeX or pages, and for everything in the PDF that is unfit to be published.
    """
    if profile or only:
        raise ValueError("--pdf prints the pages of the last build; choose chapters and scale there, without --pdf")
    if packages := lacking():
        raise BookError([f"the PDF needs TeX and fonts: `apt-get install {' '.join(packages)}`"])
    root = checkout()
    if not (root / "book" / "generated" / "substitutions.json").is_file():
        raise BookError(["there are no pages to print; `basis book` makes them"])
    made = root / "book" / "_build" / "print"
    shutil.rmtree(made, ignore_errors=True)
    progress("writing the pages for TeX")
    problems = write(root, made)
    progress("setting the book")
    log = typeset(made / "_build" / "latex")
    pdf = Path(shutil.copy(made / "_build" / "latex" / "basis.pdf", root / "book" / "_build" / "basis.pdf"))
    offer(pdf, root / "book" / "_build" / "html")
    if problems := [*problems, *dict.fromkeys(FAULTS.findall(log))]:
        raise BookError(problems, pdf)
    return pdf


def lacking() -> list[str]:
    """The Debian packages of what is missing here."""
    finder = shutil.which("kpsewhich")

    def there(part: str) -> bool:
        if "." not in part:
            return shutil.which(part) is not None
        return bool(finder) and subprocess.run([str(finder), part], capture_output=True).returncode == 0

    return [package for part, package in PARTS.items() if not there(part)]


def write(root: Path, made: Path) -> list[str]:
    """Let Jupyter Book write LaTeX of the pages; return its warnings."""
    code = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", "book", "--builder", "latex", "--path-output", str(made)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # for book.tools
    done = subprocess.run([*command, "-n", "-q"], cwd=root, env=environment, capture_output=True, text=True)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + "\n" + done.stderr).replace(f"{root}{os.sep}", "")
    if done.returncode:
        raise BookError([f"Jupyter Book: {line}" for line in output.strip().splitlines()[-15:]])
    lines = (line.strip() for line in output.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line))
    return [f"Jupyter Book: {line}" for line in dict.fromkeys(lines)]


def typeset(folder: Path) -> str:
    """Make basis.pdf of basis.tex in `folder`; return what TeX's last run logged."""
    command = ["latexmk", "-xelatex", "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "basis.tex"]
    wide = {**os.environ, "max_print_line": "1000"}  # whole messages on their lines
    done = subprocess.run(command, cwd=folder, env=wide, capture_output=True, text=True, errors="replace")
    log = (folder / "basis.log").read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        said = re.findall(r"^\S*\.(?:tex|sty):\d+: .*(?:\n.*){3}", log, re.MULTILINE)
        raise BookError(said or done.stdout.strip().splitlines()[-15:], folder / "basis.log")
    return log


def offer(pdf: Path, html: Path) -> None:
    """Put the PDF into the built pages, and a link to it on their front page."""
    front = html / "intro.html"
    if not front.is_file():
        return
    shutil.copy(pdf, html / "_static" / pdf.name)
    megabytes = max(1, round(pdf.stat().st_size / 1e6))
    link = f'<a href="_static/{pdf.name}">The whole book as one PDF</a> ({megabytes} MB)'
    front.write_text(FRONT.sub(f'<p id="basis-pdf">{link}</p>', front.read_text(encoding="utf-8")), encoding="utf-8")
