"""The book in print: what is dropped, how tables are fitted to the line, and what is said where TeX is missing."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from docutils import nodes

from basis.environment import repository_root
from book.tools import pdf
from book.tools.build import BookError

ROOT = repository_root()
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import basislatex  # noqa: E402

PAGE = """\
# Question

<p class="basis-badges"><a href="x">Notebook</a></p>

```{figure} figures/curve.svg
:name: fig-curve
:alt: A curve.

The finding, α ≤ 1.
```

| what | found |
|---|---|
| one | 0.5 [0.4, 0.6] |

Text by {cite:t}`someone2020`, see {numref}`fig-curve` and {eq}`eq-one`.

$$
y = W x
$$ (eq-one)

<details><summary>Solution</summary>

Forty-two.

</details>
"""
ENTRY = "@article{someone2020, author={Some One}, title={Work}, journal={Journal}, year={2020}}\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg"/>'


def test_without_tex_the_command_names_the_packages_before_any_work(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    with pytest.raises(BookError, match=r"apt-get install latexmk texlive-xetex .*fonts-texgyre"):
        pdf.build()


def test_a_part_that_is_there_is_not_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0)
    lacks = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: lacks if "titlesec.sty" in command else done)
    assert pdf.lacking() == ["texlive-latex-extra"]


def test_chapters_and_scale_are_chosen_by_the_build_of_the_pages():
    with pytest.raises(ValueError, match="without --pdf"):
        pdf.build(only=["3"])


def test_without_pages_the_command_says_what_makes_them(monkeypatch, tmp_path):
    monkeypatch.setattr(pdf, "lacking", list)
    monkeypatch.setattr(pdf, "checkout", lambda: tmp_path)
    with pytest.raises(BookError, match="`basis book` makes them"):
        pdf.build()


def test_the_front_page_offers_what_was_built(tmp_path):
    (tmp_path / "_static").mkdir()
    made = tmp_path / "basis.pdf"
    made.write_bytes(b"%PDF" * 500_000)
    pdf.offer(made, tmp_path / "nowhere")
    front = tmp_path / "intro.html"
    front.write_text('<p>Read</p><p id="basis-pdf" hidden></p>')
    for _ in range(2):
        pdf.offer(made, tmp_path)
        assert front.read_text().count('<a href="_static/basis.pdf">') == 1
    assert "(2 MB)" in front.read_text()
    assert (tmp_path / "_static" / "basis.pdf").is_file()


def test_the_front_page_has_a_place_for_it_and_the_readers_learn_what_it_needs():
    assert pdf.FRONT.search((ROOT / "book" / "intro.md").read_text())
    for page in ("README.md", "book/run-it.md"):
        assert set(pdf.PARTS.values()) <= set(re.split(r"[\s`]+", (ROOT / page).read_text()))


@pytest.mark.parametrize(
    ("line", "faulty"),
    [
        ("Missing character: There is no α (U+03B1) in font x!", True),
        ("LaTeX Warning: Hyper reference `a:b' on page 140 undefined on input line 7.", True),
        (r"Overfull \hbox (31.2pt too wide) in paragraph at lines 1--2", True),
        (r"Overfull \hbox (3.2pt too wide) in paragraph at lines 1--2", False),
        ("LaTeX Font Warning: Size substitutions have occurred.", False),
    ],
)
def test_what_makes_a_pdf_unfit(line, faulty):
    assert bool(pdf.FAULTS.search(f"before\n{line}\nafter")) is faulty


# --- what is printed of a page ---


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ([], ["input", "output"]),
        (["hide-input"], ["output"]),
        (["remove-output"], ["input"]),
        (["hide-cell"], []),
        (["remove-cell"], []),
        (["hide-cell", "solution"], ["input", "output"]),
    ],
)
def test_a_folded_cell_is_left_out(tags, kept):
    parts = [nodes.container("", classes=[f"cell_{part}"]) for part in ("input", "output")]
    cell = nodes.container("", *parts, classes=["cell", *(f"tag_{tag}" for tag in tags)])
    if basislatex.left_out(cell):
        assert kept == []
    else:
        assert [p["classes"][0][5:] for p in parts if not basislatex.left_out(p)] == kept


def test_raw_html_says_what_a_reader_of_paper_needs():
    def said(html):
        return [node.astext().strip() for node in basislatex.spoken(nodes.raw("", html, format="html"))]

    assert said("<br>") == [r"\newline"]
    assert said("<details><summary>Solution to 2</summary>") == ["Solution to 2"]
    assert said('<dl class="basis-provenance"><div>commit</div></dl>') == []


def rows(*texts):
    return [[[cell] for cell in row] for row in texts]


def test_a_narrow_table_is_left_as_wide_as_it_is():
    size, widths, wraps = basislatex.layout(rows(("layer", "ms"), ("conv1", "0.25")))
    assert (size, wraps) == (r"\small", False)
    assert sum(widths) < 20


@pytest.mark.parametrize("columns", [2, 5, 9])
def test_a_wide_table_is_wrapped_within_the_line(columns):
    text = "a sentence that goes on for a while and then some more words still"
    size, widths, wraps = basislatex.layout(rows(["head"] * columns, [text] * columns))
    assert wraps
    assert sum(widths) + basislatex.GAP * columns <= basislatex.SIZES[size] + columns


def test_the_column_with_the_most_text_gets_the_most_room():
    long = "a sentence that goes on for a while and then some more words " * 4
    _, widths, wraps = basislatex.layout(rows(("claim", "finding", "n"), ("C1", long, "8")))
    assert wraps
    assert widths[1] > 5 * max(widths[0], widths[2])


# --- a small book, as far as this machine goes ---


@pytest.fixture
def small_book(tmp_path):
    book = tmp_path / "book"
    for folder in ("figures", "generated"):
        (book / folder).mkdir(parents=True)
    for folder in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / folder, book / folder)
    shutil.copy(ROOT / "book" / "_config.yml", book)
    (book / "references.bib").write_text(ENTRY)
    (book / "intro.md").write_text("# Front\n\nRead {cite:t}`someone2020`.\n\n## Part\n\nText.\n")
    (book / "page.md").write_text(PAGE)
    (book / "bibliography.md").write_text("# Bibliography\n\n```{bibliography}\n```\n")
    parts = "".join(f"- caption: {name}\n  chapters:\n  - file: {name}\n" for name in ("page", "bibliography"))
    (book / "_toc.yml").write_text(f"format: jb-book\nroot: intro\nparts:\n{parts}")
    (book / "generated" / "substitutions.json").write_text(json.dumps({"version": "1.0", "commit": "abc"}))
    for ending in (".svg", "-dark.svg"):
        (book / "figures" / f"curve{ending}").write_text(SVG)
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(2, 1))
    figure.savefig(book / "figures" / "curve.pdf")
    plt.close(figure)
    return tmp_path


def test_a_small_book_is_written_for_tex_and_set(small_book):
    made = small_book / "print"
    assert pdf.write(small_book, made) == []
    folder = made / "_build" / "latex"
    text = (folder / "basis.tex").read_text(encoding="utf-8")
    assert "{curve}.pdf" in text
    for absent in ("basis-badges", "Notebook", "dark", ".svg"):
        assert absent not in text.split(r"\begin{document}")[1].replace(r"\DUrole", "")
    for there in (r"\sphinxstylestrong{Solution}", "Forty", r"\bookentry{cite.", r"\chapter{About this book}"):
        assert there in text
    if not pdf.lacking():
        assert not pdf.FAULTS.search(pdf.typeset(folder))
        assert (folder / "basis.pdf").stat().st_size > 10_000
