"""Every gate of the book: a planted fault is refused, and the same thing without the fault passes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from basis import figures
from basis.bench.report import BenchReport
from basis.experiments.studies import STUDIES
from book.tools import build as book
from book.tools import chapter, derived, gates, myst, pages
from book.tools.address import Address, address

ROOT = Path(__file__).resolve().parents[2]
HERE = Address("someone", "thing", "main")
PARAMETERS = 'profile: str = "auto"  # auto | small | paper\nseeds: int = 3  # how many'
CAPTION = {"basis_caption": "loss"}
FIGURE = {"basis_figure": {"name": "loss", "caption": "The loss falls: $x$.", "alt": 'A "falling" line: steep.'}}


def code(source, *tags, outputs=()):
    return new_code_cell(source, metadata={"tags": list(tags)}, outputs=list(outputs))


def text(source, *tags):
    return new_markdown_cell(source, metadata={"tags": list(tags)})


def markdown_output(answer, **metadata):
    return new_output("display_data", {"text/markdown": answer}, metadata=metadata)


@pytest.fixture
def source():
    """A notebook that keeps the whole contract."""
    return new_notebook(
        cells=[
            text("# Does it work?"),
            code(derived.setup_cell(HERE), "setup", "hide-input"),
            text("**You will learn** much.", "card"),
            code(PARAMETERS, "parameters"),
            code("Markdown(f'It does: {gain:.1f} points.')", "answer"),
            code("show(draw)"),
            text("$$a\\tag{1}$$\n\nSee [(1)](#eq-1).\n\n## Deviations\n\n## When to use it\n\n## Exercises"),
            text("**Exercise.** Try.", "exercise"),
            text("**Solution.** It works.", "solution"),
            code("1 + 1", "solution"),
        ]
    )


@pytest.fixture
def executed(source):
    """The same, as papermill leaves it."""
    source.cells.insert(4, code('# Parameters\nprofile = "small"', "injected-parameters"))
    source.cells[5].outputs = [markdown_output("It does: 1.2 points.")]
    source.cells[6].outputs = [
        new_output("stream", name="stdout", text="a line\n"),
        new_output("display_data", {"image/png": "AAAA"}, metadata=FIGURE),
        markdown_output("The loss falls.", **CAPTION),
    ]
    for number, cell in enumerate(source.cells):
        cell.metadata["papermill"] = {"duration": number / 3, "start_time": "now"}
        cell.metadata["execution"] = {"iopub.execute_input": "now"}
    source.metadata["papermill"] = {"duration": 12.3, "input_path": "/somewhere/notebooks/a.ipynb"}
    return source


# --- source notebooks ---


def test_a_clean_notebook_passes(source):
    assert gates.source_problems(source, "a") == []
    assert gates.contract_problems(source, "a") == []
    assert gates.notebook_number_problems(source, "a") == []


@pytest.mark.parametrize(("key", "value"), [("outputs", [new_output("stream", text="x")]), ("execution_count", 3)])
def test_committed_outputs_and_counts_are_refused(source, key, value):
    source.cells[5][key] = value
    assert "stored with outputs or a count" in gates.source_problems(source, "a")[0]


def test_a_missing_parameters_tag_is_refused(source):
    source.cells[3].metadata.tags = []
    assert "0 cells are tagged 'parameters'" in gates.source_problems(source, "a")[0]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("n = 3  # how many", "may only hold"),
        ("import os", "may only hold"),
        ("n: int = 2 * m  # how many", "is computed"),
        ("n: int = 3", "no comment"),
        ("n: int = ", "not Python"),
    ],
)
def test_parameters_are_commented_typed_literals(source, line, fault):
    source.cells[3].source += "\n" + line
    (problem,) = gates.source_problems(source, "a")
    assert fault in problem


@pytest.mark.parametrize(
    ("index", "change", "fault"),
    [
        (0, "# It works", "asks a question"),
        (6, "## Deviations\n\n## When to use it", "'## Exercises'"),
        (6, "## Exercises\n\n## When to use it", "'## Deviations'"),
        (6, "## Exercises\n\n## Deviations", "'## When to use it'"),
        (8, "$$a \\tag{3}$$", "must be numbered in order"),
    ],
)
def test_the_page_contract(source, index, change, fault):
    source.cells[index].source = change
    (problem,) = gates.contract_problems(source, "a")
    assert fault in problem


@pytest.mark.parametrize("tag", gates.REQUIRED_TAGS)
def test_the_tagged_cells_are_needed(source, tag):
    gates.tagged(source, tag)[0].metadata.tags = []
    (problem,) = gates.contract_problems(source, "a")
    assert repr(tag) in problem


def test_unknown_parameters_are_refused_by_name():
    assert gates.unknown_parameters({"profile", "seeds"}, {"seeds"}, "a") == []
    (problem,) = gates.unknown_parameters({"profile", "seeds"}, {"sedes"}, "a")
    assert problem == "a has no parameter 'sedes'; it has profile, seeds"


def test_execute_refuses_an_unknown_parameter_before_it_runs(tmp_path, source):
    source.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    nbformat.write(source, tmp_path / "a.ipynb")
    with pytest.raises(book.BookError, match="'sedes'; it has profile, seeds"):
        book.execute(tmp_path / "a.ipynb", {"sedes": 1}, tmp_path)


# --- numbers in the text ---


@pytest.mark.parametrize(
    "line",
    [
        "It reaches 94.0 % accuracy.", "It loses 0.8 points.", "The drop is -1.2 percentage points.", "It takes 15 s.",
        "Ten epochs take 3 minutes.", "It is 1.6x faster.", "A speed-up of 2× is seen.", "It is 2 times faster.",
        "The network has 11.17 M parameters.", "It needs 12 GB.", "The error is 6%.", "The accuracy is 91.2 per cent.",
        "A step takes 5.5 ms on it.", "The accuracy is 0.912 in the end.", "It is three times faster.",
        "It reaches $91.2\\%$.",
    ],
)  # fmt: skip
def test_typed_measurements_are_refused(line):
    (problem,) = gates.number_problems(f"Before.\n\n{line}\n", "a")
    assert problem.startswith("a: ")


@pytest.mark.parametrize(
    "line",
    [
        "A 3x3 filter, a 3 x 3 filter, 32 x 32 pixels, 1x1 and 3×3.",
        "At r = 1/2 with k = 32 of 64 filters and 8 seeds.",
        "Section 3, CIFAR-10, ResNet-18, Python 3.10 and 5 epochs.", "The accuracy is {{ accuracy }} %.",
        "The space is $94 s$ and `94 %` and `--time-limit 9m`.", "Of 95 % intervals, with 80 % power.",
        "It reaches 92.5 % {cite:p}`he2016residual`.",
        "It reaches 92.5 %, says [its table](https://example.org/table).", "```text\n94.0 %\n```", "<!-- 94 % -->",
        "$$\n94 \\cdot 2\n$$",
    ],
)  # fmt: skip
def test_other_numbers_are_left_alone(line):
    assert gates.number_problems(line, "a") == []


def test_a_citation_excuses_only_its_own_line():
    assert gates.number_problems("See {cite:p}`x`.\nIt reaches 92.5 %.", "a")


def test_typed_measurements_in_code_are_refused_and_computed_ones_are_not(source):
    source.cells[5].source = "Markdown(f'It reaches {accuracy:.1f} % in {seconds:.0f} s (n = {n}).')"
    assert gates.notebook_number_problems(source, "a") == []
    source.cells[5].source = "%matplotlib inline\nMarkdown(f'It reaches 94.0 % (n = {n}).')"
    (problem,) = gates.notebook_number_problems(source, "a")
    assert "94.0 %" in problem


def test_code_that_is_no_python_is_refused_by_its_place(source):
    source.cells[5].source = "x = (1"
    (problem,) = gates.notebook_number_problems(source, "a")
    assert problem.startswith("a, cell 6: this is not Python")


# --- executed notebooks ---


def test_an_executed_notebook_passes(executed):
    assert gates.executed_problems(executed, "a") == []


def test_an_error_output_is_refused(executed):
    executed.cells[6].outputs.append(new_output("error", ename="ValueError", evalue="no", traceback=["tail"]))
    assert "fails with ValueError: no" in gates.executed_problems(executed, "a")[0]
    assert "tail" in book.failure(executed, "a")


def test_stderr_is_refused(executed):
    executed.cells[6].outputs.append(new_output("stream", name="stderr", text="UserWarning: old\n"))
    assert "writes to stderr: UserWarning: old" in gates.executed_problems(executed, "a")[0]


def test_no_output_at_all_is_refused(executed):
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    assert "no cell has an output" in gates.executed_problems(executed, "a")[0]


def test_an_answer_that_is_no_text_is_refused(executed):
    executed.cells[5].outputs = [new_output("display_data", {"text/plain": "1.2"})]
    assert "displays no Markdown" in gates.executed_problems(executed, "a")[0]


# --- the page ---


@pytest.fixture
def page(executed):
    facts = chapter.PageFacts(
        "01_a", HERE, "under 10 s", "results/a", (("small", "3 of 4", "12 s", "a CPU"),), {"commit": "abc"}
    )
    return chapter.assemble_page(executed, facts)


def test_the_answer_stands_under_the_title(page):
    assert page.cells[0].source == "# Does it work?"
    assert page.cells[1].source == "::::{div} basis-answer\nIt does: 1.2 points.\n::::"
    assert page.metadata.basis.answer == "It does: 1.2 points."


def test_badges_lead_to_source_and_records(page):
    badges = page.cells[2].source
    assert HERE.colab("notebooks/01_a.ipynb") in badges
    assert HERE.tree("results/a") in badges
    assert "<img" not in badges


def test_the_story_comes_before_the_plumbing(page):
    sources = [cell.source for cell in page.cells]
    (last,) = [i for i, source in enumerate(sources) if source.startswith("## Run this page yourself")]
    assert "| small | 3 of 4 | 12 s | a CPU |" in sources[last]
    assert "You will learn" in sources[3]
    tags = [set(gates.tags(cell)) & chapter.PLUMBING for cell in page.cells]
    assert [*map(bool, tags)] == [*[False] * (last + 1), True, True, True, True, False]


def test_an_exercise_is_followed_by_its_solution(page):
    sources = [cell.source for cell in page.cells]
    start = sources.index("`````{exercise}\n:label: ex-01-1\n\nTry.\n`````")
    opened, closed = "```{solution-start} ex-01-1\n:class: dropdown\n```", "```{solution-end}\n```"
    assert sources[start + 1 : start + 5] == [opened, "It works.", "1 + 1", closed]


@pytest.mark.parametrize(
    ("plain", "converted"),
    [
        ("$$\na * b \\tag{2}\n$$", "$$\na * b\n$$ (eq-03-2)"),
        ("see [(2)](#eq-2), [(1.4)](01_a_b.ipynb#eq-4)", "see {eq}`eq-03-2`, {eq}`eq-01-4`"),
        ("[Figure](#fig-loss), [Figure](04_x.ipynb#fig-gone)", "{numref}`fig-loss`, the figure"),
        ("Of [Li et al., 2020](https://a.org/1).", "Of {cite:t}`li2020`."),
        ("So ([Li et al., 2020](https://a.org/1)).", "So {cite:p}`li2020`."),
        ("the [roof](https://a.org/1) and [b](https://b.org)", "the roof {cite:p}`li2020` and [b](https://b.org)"),
        (
            "*Basis filters* are *not* **all** $a *b* c$",
            "{term}`Basis filters <basis filters>` are *not* **all** $a *b* c$",
        ),
        ("`*basis filters*`\n```python\n*basis filters*\n```", "`*basis filters*`\n```python\n*basis filters*\n```"),
    ],
)
def test_plain_markdown_becomes_myst(plain, converted):
    targets = myst.Targets({"https://a.org/1": "li2020"}, {"basis filters"}, {"loss"})
    assert myst.to_myst(plain, "03", targets) == converted


def test_the_targets_of_this_book_are_read():
    targets = myst.Targets.read(ROOT / "book", {"loss"})
    assert targets.citations["https://arxiv.org/abs/2408.06024"] == "alekseev2024basis"
    assert {"basis filters", "sensitivity"} <= set(targets.terms)


def test_figures_become_numbered_directives(page):
    (figure,) = [cell for cell in page.cells if "{figure}" in cell.source]
    assert "```{figure} ../figures/loss.svg\n:name: fig-loss\n" in figure.source
    assert r':alt: "A \"falling\" line: steep."' in figure.source
    assert "The loss falls: $x$." in figure.source
    drawn = page.cells[page.cells.index(figure) + 1]
    assert [output.output_type for output in drawn.outputs] == ["stream"]
    assert "hide-input" in drawn.metadata.tags


def test_the_parameters_used_are_the_visible_ones(page):
    (defaults,) = gates.tagged(page, "parameters")
    (injected,) = gates.tagged(page, "injected-parameters")
    assert "hide-cell" in defaults.metadata.tags
    assert "hide-cell" not in injected.metadata.tags


def test_pages_are_deterministic_and_name_no_place(page, executed):
    dumped = nbformat.writes(page)
    assert "/somewhere" not in dumped
    assert "papermill" not in dumped
    assert "iopub" not in dumped
    again = chapter.assemble_page(executed, chapter.PageFacts("01_a", HERE, "", "results/a", (), {"commit": "abc"}))
    assert [cell.id for cell in again.cells] == [cell.id for cell in page.cells]
    nbformat.validate(page)


def test_assembling_leaves_the_executed_notebook_alone(executed):
    before = nbformat.writes(executed)
    chapter.assemble_page(executed, chapter.PageFacts("01_a", HERE))
    assert nbformat.writes(executed) == before


def test_provenance_ends_the_page(page):
    assert "<dt>commit</dt><dd>abc</dd>" in page.cells[-1].source


# --- built pages ---


def built(folder, body, name="index.html", head=""):
    page = folder / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<html><head>{head}</head><body>{body}</body></html>")
    return gates.read_pages(folder)


@pytest.mark.parametrize("alt", ["", 'alt=""', 'alt="_images/0a1b.png"', 'alt="a.svg"'])
def test_images_without_a_description_are_refused(tmp_path, alt):
    assert gates.alt_problems(built(tmp_path, f'<img src="a.svg" {alt}>'))


def test_described_images_pass(tmp_path):
    assert gates.alt_problems(built(tmp_path, '<img src="a.svg" alt="A falling line.">')) == []


@pytest.mark.parametrize(
    "load",
    [
        '<script src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"></script>',
        '<script src="//example.org/a.js"></script>',
        '<link rel="stylesheet" href="https://example.org/a.css">',
        '<img src="https://example.org/badge.svg" alt="Tests pass.">',
        '<iframe src="https://example.org/"></iframe>',
        '<script>const THEBE_JS_URL = "https://unpkg.com/thebe@0.8.2/lib/index.js"</script>',
        "<style>@import 'https://example.org/a.css';</style>",
        '<p style="background: url(https://example.org/a.png)">x</p>',
    ],
)
def test_remote_loads_are_refused(tmp_path, load):
    assert gates.remote_problems(built(tmp_path, load), tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.css", "body { background: url('https://example.org/a.png') }"),
        ("a.js", 'load("https://cdn.example.org/x")'),
        ("a.svg", "<style>@import '//example.org/a.css';</style>"),
    ],
)
def test_remote_loads_in_other_files_are_refused(tmp_path, name, content):
    pages = built(tmp_path, "")
    (tmp_path / name).write_text(content)
    assert gates.remote_problems(pages, tmp_path)


def test_links_and_local_loads_pass(tmp_path):
    body = (
        '<a href="https://example.org/a.js">x</a><script src="a.js"></script><svg xmlns="http://www.w3.org/2000/svg"/>'
    )
    head = '<link rel="canonical" href="https://example.org/">'
    assert gates.remote_problems(built(tmp_path, body, head=head), tmp_path) == []


@pytest.mark.parametrize("link", ["missing.html", "other.html#nowhere", "#nowhere", "../outside.html"])
def test_broken_links_are_refused(tmp_path, link):
    built(tmp_path, '<h1 id="here">x</h1>', name="other.html")
    assert gates.link_problems(built(tmp_path, f'<a href="{link}">x</a>'), tmp_path)


def test_whole_links_pass(tmp_path):
    built(tmp_path, '<h1 id="here">x</h1>', name="other.html")
    links = ["other.html?x=1#here", "#a", "#", "mailto:a@b.c"]
    body = '<p id="a">x</p>' + "".join(f'<a href="{link}">x</a>' for link in links)
    assert gates.link_problems(built(tmp_path, body), tmp_path) == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        (HERE.colab("notebooks/gone.ipynb"), "leads to nothing"),
        (HERE.colab("notebooks/a.md"), "is no notebook"),
        (Address("someone", "thing", "master").colab("notebooks/a.ipynb"), "another branch"),
        (Address("other", "thing", "main").colab("notebooks/a.ipynb"), "another repository"),
        ("https://colab.research.google.com/drive/abc", "no link to a notebook"),
        (HERE.blob("notebooks/gone.ipynb"), "leads to nothing"),
    ],
)
def test_links_into_the_repository_must_lead_somewhere(tmp_path, link, fault):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "a.ipynb").touch()
    (tmp_path / "notebooks" / "a.md").touch()
    pages = built(tmp_path / "html", f'<a href="{link}">x</a>')
    (problem,) = gates.repository_link_problems(pages, tmp_path, HERE)
    assert fault in problem


def test_links_into_the_repository_pass(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "a.ipynb").touch()
    links = [HERE.colab("notebooks/a.ipynb"), HERE.tree("notebooks"), HERE.repository, "https://github.com/other/x"]
    pages = built(tmp_path / "html", "".join(f'<a href="{link}">x</a>' for link in links))
    assert gates.repository_link_problems(pages, tmp_path, HERE) == []


def test_the_table_of_contents_and_the_notebooks_agree():
    toc = "- file: notebooks/01_a\n- file: notebooks/02_b.ipynb\n- file: intro\n"
    notebooks = {"01_a": Path("x"), "02_b": Path("y")}
    assert gates.contents_problems(toc, notebooks) == []
    assert "does not list notebooks/03_c" in gates.contents_problems(toc, {**notebooks, "03_c": Path("z")})[0]
    assert "02_b, which does not exist" in gates.contents_problems(toc, {"01_a": Path("x")})[0]


# --- a whole small book ---


@pytest.fixture
def small_book(tmp_path, page):
    """A checkout with one chapter and a front page, configured like this book."""
    folder = tmp_path / "book"
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, folder / name)
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / "book" / name, folder)
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nparts:\n- numbered: true\n  chapters:\n  - file: notebooks/01_a\n"
    )
    (folder / "intro.md").write_text(
        "# A book\n\n{{ answer }} points, says {cite:t}`he2016residual`: $\\cancel{x}$.\n\n```{bibliography}\n```\n"
    )
    for name in ("generated", "notebooks", "figures"):
        (folder / name).mkdir()
    (folder / "generated" / "substitutions.json").write_text('{"answer": "1.2", "version": "1", "commit": "abc"}')
    nbformat.write(page, folder / "notebooks" / "01_a.ipynb")
    figures.save(lambda theme: figures.canvas(), name="loss", folder=folder / "figures")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_a.ipynb").write_text('{"the": "source"}')
    return tmp_path


def test_a_small_book_is_rendered_without_a_problem(small_book):
    assert book.render(small_book) == []
    html = small_book / "book" / "_build" / "html"
    built_pages = gates.read_pages(html)
    assert gates.alt_problems(built_pages) == []
    assert gates.remote_problems(built_pages, html) == []
    assert gates.link_problems(built_pages, html) == []
    assert (html / "_static" / "mathjax" / "input" / "tex" / "extensions" / "cancel.js").exists()

    chapter = (html / "notebooks" / "01_a.html").read_text()
    assert "THEBE_JS_URL" not in chapter
    assert address().colab("notebooks/01_a.ipynb") in chapter
    assert f"{address().repository}/edit/{address().branch}/notebooks/01_a.ipynb" in chapter
    assert "Fig. 1.1" in chapter
    assert re.search(r'See <a[^>]*href="#equation-eq-01-1">\(1.1\)</a>', chapter)
    assert "Exercise 1.1" in chapter
    (pair,) = re.findall(r'<div class="basis-pair[^>]*>.*?</div>', chapter, re.DOTALL)
    assert re.findall(r'class="[^"]*only-(\w+)[^"]*"[^>]*src="([^"]+)"', pair) == [
        ("light", "../_images/loss.svg"),
        ("dark", "../_images/loss-dark.svg"),
    ]
    assert pair.count("falling") == 2
    assert (html / "_sources" / "notebooks" / "01_a.ipynb").read_text() == '{"the": "source"}'


def test_a_number_that_is_not_computed_fails_the_rendering(small_book):
    intro = small_book / "book" / "intro.md"
    intro.write_text(intro.read_text() + "\n{{ accuracy }} %\n")
    (problem,) = book.render(small_book)
    assert "'accuracy' is undefined" in problem


# --- what the sources and the records refuse ---


def test_the_build_runs_the_gates_on_sources_and_records(tmp_path, monkeypatch, source):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "_toc.yml").write_text("- file: notebooks/01_a\n")
    (tmp_path / "book" / "page.md").write_text("It reaches 94.0 %.")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(source, tmp_path / "notebooks" / "01_a.ipynb")
    monkeypatch.setattr(book, "sync", lambda *_, **__: ["README.md is out of date"])
    monkeypatch.setattr(book, "check_records", lambda *_: ["a record of a changed study"])
    problems = book.source_gates(tmp_path, {"01_a": tmp_path / "notebooks" / "01_a.ipynb"})
    assert [problem.split()[0] for problem in problems] == ["book/page.md:", "README.md", "a"]
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))  # records that nobody publishes
    assert book.source_gates(tmp_path, {"01_a": tmp_path / "notebooks" / "01_a.ipynb"}) == problems[:2]


def test_a_failing_build_names_every_problem():
    error = book.BookError(["one is wrong", "two is wrong"])
    assert str(error) == "the book has 2 problems:\n  - one is wrong\n  - two is wrong"


def test_only_chosen_notebooks_are_executed(tmp_path):
    sources = {"01_a": Path("a"), "02_b": Path("b")}
    (tmp_path / "02_b.ipynb").touch()
    assert set(book._choose(sources, None, tmp_path)) == {"01_a", "02_b"}
    assert set(book._choose(sources, ["01"], tmp_path)) == {"01_a"}
    assert set(book._choose(sources, ["02_b"], tmp_path)) == {"01_a", "02_b"}  # 01_a has no page yet
    assert set(book._choose({"02_b": Path("b"), "03_c": Path("c")}, ["2"], tmp_path)) >= {"02_b"}
    with pytest.raises(ValueError, match="no notebook '7'"):
        book._choose(sources, ["7"], tmp_path)


# --- generated fragments ---


def test_provenance_names_only_the_benchmarks_that_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    for kind, of, device in (("layer", "cpu", "a CPU"), ("layer", "cuda", "a GPU"), ("rivals", "cpu", "third")):
        where = {"device": device, "device_type": of, "date": "2026-01-02T03:04:05"}
        report = BenchReport(kind=f"bench-{kind}", config={}, environment=where, rows=[])
        report.save(tmp_path / "bench" / f"{kind}-{of}.json")
    facts = pages.records_provenance(STUDIES["cost"], "cpu")
    assert facts == {"records": "2 benchmarks", "measured on": "a CPU, a GPU", "dated": "2026-01-02"}


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "under 1 s"), (42, "42 s"), (812, "14 min"), (9000, "2.5 h")])
def test_times_read_well(seconds, text):
    assert pages.human_time(seconds) == text


# --- files that are derived from the address ---


@pytest.fixture
def checkout(tmp_path, source):
    (tmp_path / "pyproject.toml").write_text(
        f'version = "0.2.0"\n[project.urls]\nSource = "{HERE.tree("").rstrip("/")}"\n'
    )
    (tmp_path / "README.md").write_text(
        "<!-- basis:links -->\n<!-- /basis:links -->\n"
        "<!-- basis:example -->\n```python\nprint(6 * 7)\n```\n<!-- /basis:example -->\n"
    )
    (tmp_path / "CITATION.cff").write_text('title: x\nversion: ""\nrepository-code: ""\nurl: ""\n')
    (tmp_path / "notebooks").mkdir()
    for folder in ("figures", "_static"):
        (tmp_path / "book" / folder).mkdir(parents=True)
    for name in ("headline.svg", "headline-dark.svg"):
        (tmp_path / "book" / "figures" / name).write_text(name)
    source.cells[1].source = "old"
    (tmp_path / "notebooks" / "01_a.ipynb").write_text(nbformat.writes(source) + "\n")
    return tmp_path


def test_sync_brings_every_copy_up_to_date(checkout):
    assert len(derived.sync(checkout, check=True)) == 5
    assert "old" in (checkout / "notebooks" / "01_a.ipynb").read_text()
    derived.sync(checkout)
    assert derived.sync(checkout, check=True) == []
    assert (checkout / "book" / "_static" / "headline-dark.svg").read_text() == "headline-dark.svg"
    readme = (checkout / "README.md").read_text()
    assert f"links -->\n[Start here]({HERE.colab('notebooks/00_start_here.ipynb')})" in readme
    assert HERE.pages in readme
    assert "```python\nprint(6 * 7)\n```\n\n```text\n42\n```\n<!-- /basis:example -->" in readme
    assert f'version: "0.2.0"\nrepository-code: "{HERE.repository}"' in (checkout / "CITATION.cff").read_text()
    notebook = nbformat.read(checkout / "notebooks" / "01_a.ipynb", as_version=4)
    assert gates.tagged(notebook, "setup")[0].source == derived.setup_cell(HERE)


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "notebooks/01_a.ipynb"])
def test_a_stale_copy_is_refused(checkout, name):
    derived.sync(checkout)
    path = checkout / name
    path.write_text(path.read_text().replace("someone", "nobody"))
    (problem,) = derived.sync(checkout, check=True)
    assert problem.startswith(f"{name} is out of date")


def test_a_missing_headline_figure_is_refused(checkout):
    derived.sync(checkout)
    (checkout / "book" / "_static" / "headline.svg").unlink()
    (problem,) = derived.sync(checkout, check=True)
    assert problem.startswith("book/_static/headline.svg is missing")


def test_an_example_that_fails_is_refused(checkout):
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("6 * 7", "1 / 0"))
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        derived.sync(checkout)


def test_the_setup_cell_does_nothing_outside_colab(tmp_path):
    cell = derived.setup_cell(HERE)
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_setup_cell_on_colab(monkeypatch, capsys):
    commands, entered = [], []
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr("os.system", lambda command: commands.append(command.split()))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("os.chdir", entered.append)
    monkeypatch.setattr("sys.path", list(sys.path))
    exec(derived.setup_cell(HERE), {})
    clone, install = commands
    assert clone[:2] == ["git", "clone"]
    assert clone[-4:] == ["--branch", "main", HERE.repository, "/content/thing-book"]
    assert "--no-deps" in install
    assert install[-2] == "--editable"
    assert not {"torch", "numpy", "pandas", "matplotlib"} & {*install}
    assert entered == ["/content/thing-book"]
    assert "This runtime has" in capsys.readouterr().out


# --- this repository ---


def test_the_copies_of_this_repository_are_up_to_date():
    assert derived.sync(ROOT, check=True) == []


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_of_this_repository_keep_the_contract(path):
    notebook = nbformat.read(path, as_version=4)
    problems = [
        *gates.source_problems(notebook, path.name),
        *gates.contract_problems(notebook, path.name),
        *gates.notebook_number_problems(notebook, path.name),
    ]
    assert problems == []
    assert gates.tagged(notebook, "setup")[0].source == derived.setup_cell(address())


@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*.md")), ids=lambda path: path.stem)
def test_the_text_of_this_book_types_no_measurement(path):
    assert gates.number_problems(path.read_text(), path.name) == []


def test_the_configuration_holds_no_address():
    for path in (ROOT / "book" / "_config.yml", ROOT / "book" / "_toc.yml"):
        assert address().owner not in path.read_text()


def test_bundled_files_load_nothing(tmp_path):
    for path in (ROOT / "book" / "_static").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert gates.remote_problems([], tmp_path) == []


def test_a_notebook_runs_to_a_page(tmp_path):
    """The way of a real chapter: papermill with a parameter, then the page."""
    notebook = new_notebook(
        cells=[
            text("# Is it so?"),
            code("n: int = 1  # a number", "parameters"),
            code("from IPython.display import Markdown\nMarkdown(f'It is **{n}**.')", "answer"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "a.ipynb")
    run = book.execute(tmp_path / "a.ipynb", {"n": 2}, tmp_path)
    assert run.seconds > 0
    page = chapter.assemble_page(run.notebook, chapter.PageFacts("a", HERE))
    assert page.metadata.basis.answer == "It is **2**."
    json.dumps(page)


def test_a_failing_notebook_is_named_with_its_traceback(tmp_path):
    notebook = new_notebook(
        cells=[code("n: int = 1  # a number", "parameters"), code("def f():\n    raise KeyError('lost')\n\nf()")],
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "a.ipynb")
    with pytest.raises(book.BookError, match=r"(?s)a\.ipynb fails in the cell.*KeyError: 'lost'"):
        book.execute(tmp_path / "a.ipynb", {}, tmp_path)
