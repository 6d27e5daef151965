"""The page of a chapter, made of its executed notebook.

A notebook is plain Markdown (:mod:`book.tools.myst`) and code; its cells say by tags what they are:

    (first cell)  the title, a question
    setup         written by `basis dev sync`: what Colab runs first
    parameters    `name: type = literal  # what it is`, and nothing else
    plumbing      imports, and the frames that the page draws
    answer        displays Markdown computed from records; the page puts it under the title
    card          goals and needs
    exercise      an exercise, "**Exercise.** ..."
    solution      follows it, "**Solution.** ...", with code that is run

On the page the answer comes first, and setup, parameters, plumbing and the answer's code come last.
`basis.figures.show` displays a figure; the page numbers it and folds the code that draws it.
"""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import nbformat
from nbformat.v4 import new_markdown_cell

from basis.figures import CAPTION_KEY, EXPLORER_KEY, FIGURE_KEY, table
from book.tools import gates
from book.tools.address import Address
from book.tools.myst import Targets, to_myst

Notebook = Any  # nbformat.NotebookNode, which carries no types
PLUMBING = {"setup", "parameters", "injected-parameters", "plumbing", "answer"}


@dataclass(frozen=True)
class PageFacts:
    """What a page says about itself beyond what its notebook says."""

    stem: str
    address: Address
    time: str = ""  # how long the notebook took, coarsely
    records: str = "results"  # path of the records' folder in the repository
    run_times: tuple[tuple[str, ...], ...] = ()  # profile, runs, time, hardware
    provenance: Mapping[str, str] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)

    @property
    def source(self) -> str:
        """Path of the source notebook in the repository."""
        return f"notebooks/{self.stem}.ipynb"


def assemble_page(executed: Notebook, facts: PageFacts) -> Notebook:
    """Make the page of an executed notebook: answer first, story, then how it was made.

    Pure and deterministic: nothing of the machine or the moment stays in the page but `facts`.
    """
    notebook, chapter = copy.deepcopy(executed), facts.stem[:2]
    _to_myst(notebook, partial(to_myst, chapter=chapter, targets=facts.targets))
    title, _, rest = notebook.cells[0].source.partition("\n")
    answer = _answer(notebook)
    lead = f"::::{{div}} basis-answer\n{answer}\n::::" if answer else ""
    story = [new_markdown_cell(text) for text in (title, lead, badges(facts), rest.strip()) if text]
    plumbing, drawn, exercises, before = [new_markdown_cell(_plumbing(facts))], [], 0, ""
    folded: list[Any] = []
    for cell in [*notebook.cells[1:], None]:
        tags = gates.tags(cell) if cell else []
        if before == "solution" and "solution" not in tags:
            story.append(new_markdown_cell("```{solution-end}\n```"))
        if cell is None:
            break
        figures = _take_figures(cell) if cell.cell_type == "code" else []
        drawn += figures
        if "card" in tags:
            cell = new_markdown_cell(f"::::{{admonition}} Before you start\n:class: basis-card\n{cell.source}\n::::")
        elif "exercise" in tags:
            exercises += 1
            cell = new_markdown_cell(_exercise(cell.source, f"ex-{chapter}-{exercises}"))
        elif "solution" in tags and before != "solution":
            start = f"```{{solution-start}} ex-{chapter}-{exercises}\n:class: dropdown\n```"
            story.append(new_markdown_cell(start))
            cell.source = cell.source.removeprefix("**Solution.**").strip()
        elif PLUMBING & {*tags} and "injected-parameters" not in tags:
            cell.outputs = [] if "answer" in tags else cell.outputs
            tags.append("hide-input" if cell.outputs else "hide-cell")
        silent = (
            cell.cell_type == "code" and "hide-input" in tags and not (figures or cell.outputs or PLUMBING & {*tags})
        )
        tags += ["figure", "hide-input"] if figures or silent else []
        cell.metadata = nbformat.from_dict(_cell_metadata(tags))
        place = plumbing if PLUMBING & {*tags} else story
        if silent:  # it prepares the figure that follows
            folded.append(cell)
            continue
        place += [*[new_markdown_cell(figure_directive(about)) for about in figures], *folded, cell]
        folded = []
        before = "solution" if "solution" in tags else ""
    cells = [*story, *folded, *plumbing, new_markdown_cell(_provenance(facts))]
    for number, cell in enumerate(cells):
        cell.id = f"{facts.stem[:40]}-{number}"
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.output_type = "display_data"
    notebook.cells = cells
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "basis": {
                "answer": answer,
                "figures": drawn,
                "time": facts.time,
                "measured": facts.provenance.get("measured on", ""),
            },
        }
    )
    return notebook


def _to_myst(notebook: Notebook, convert: Callable[[str], str]) -> None:
    """Convert the notebook's text: Markdown cells, Markdown outputs and captions."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = convert(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = convert(output.data["text/markdown"])
            about = output.get("metadata", {})
            if FIGURE_KEY in about:
                about[FIGURE_KEY]["caption"] = convert(about[FIGURE_KEY]["caption"])
            if EXPLORER_KEY in about:
                output.data["text/latex"] = ""  # in print there is the picture alone


def _exercise(text: str, label: str) -> str:
    """An exercise as sphinx-exercise has it, numbered, without the word that begins it in the notebook."""
    text = text.strip().removeprefix("**Exercise.**").strip()
    return f"`````{{exercise}}\n:label: {label}\n\n{text}\n`````"


_PROMPTS = {
    "setup": "Setup",
    "parameters": "Parameters",
    "plumbing": "Imports and data",
    "answer": "How the answer is computed",
    "figure": "How the figure is drawn",
}


def _cell_metadata(tags: Sequence[str]) -> dict[str, Any]:
    """The tags, sorted, and what stands on the handle of a folded cell."""
    if not tags:
        return {}
    prompt = next((text for tag, text in _PROMPTS.items() if tag in tags), None)
    folded = {"mystnb": {"code_prompt_show": prompt, "code_prompt_hide": prompt}} if prompt else {}
    return {"tags": sorted(set(tags)), **folded}


def _answer(notebook: Notebook) -> str:
    texts = (
        output.data["text/markdown"]
        for cell in gates.tagged(notebook, "answer")
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    )
    return str(next(texts, "")).strip()


def badges(facts: PageFacts) -> str:
    """The row of links under the answer; drawn by the style sheet, so that no image is loaded."""
    links = {
        "Open in Colab": facts.address.colab(facts.source),
        "Notebook": facts.address.blob(facts.source),
        "Records": facts.address.tree(facts.records),
    }
    anchors = "\n".join(
        f'<a class="basis-badge basis-badge-{text.split()[-1].lower()}" href="{url}">{text}</a>'
        for text, url in links.items()
    )
    return f'<p class="basis-badges">\n{anchors}\n</p>'


def _take_figures(cell: Any) -> list[Mapping[str, str]]:
    """Remove figures and their captions from a cell's outputs; return what they say of themselves."""
    about = [output.metadata[FIGURE_KEY] for output in cell.outputs if FIGURE_KEY in output.get("metadata", {})]
    cell.outputs = [o for o in cell.outputs if not {FIGURE_KEY, CAPTION_KEY} & set(o.get("metadata", {}))]
    return about


def figure_directive(about: Mapping[str, str], *, folder: str = "../figures", label: str | None = None) -> str:
    """The MyST figure of a drawn figure: numbered, captioned, with its alt text."""
    name = about["name"]
    alt = json.dumps(" ".join(about["alt"].split()), ensure_ascii=False)
    lines = [f":name: {label or 'fig-' + name}", f":alt: {alt}", ":class: basis-figure"]
    return "\n".join([f"```{{figure}} {folder}/{name}.svg", *lines, "", about["caption"].strip(), "```"])


def _plumbing(facts: PageFacts) -> str:
    """The heading of the last section, with the runs behind the page and how to make them."""
    text = f"[Open it in Colab]({facts.address.colab(facts.source)}), or execute it in a clone."
    runs = table(("Profile", "Runs here", "Time", "Hardware"), facts.run_times) if facts.run_times else ""
    return f"## Run this page yourself\n\n{text} In the notebook the cells below come first.\n\n{runs}".rstrip()


def _provenance(facts: PageFacts) -> str:
    rows = "\n".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
        for key, value in facts.provenance.items()
    )
    return f'<h2 class="basis-provenance-title">Provenance</h2>\n<dl class="basis-provenance">\n{rows}\n</dl>'
