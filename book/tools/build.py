"""The book: execute the notebooks, make pages of them, and let Jupyter Book render the pages.

`build` is the whole way. What a page is made of stands in `book.tools.pages`, what is refused in
`book.tools.gates`, and the files that repeat the repository's address in `book.tools.derived`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import nbformat

from basis.environment import is_published, repository_root, results_folder
from basis.experiments.runs import ARCHIVED
from basis.experiments.studies import STUDIES, check_records, shown_profile
from book.tools import front_page, gates
from book.tools.address import address
from book.tools.chapter import Notebook, assemble_page
from book.tools.derived import HEADLINE, block, sync
from book.tools.gallery import thumbnails
from book.tools.myst import Targets
from book.tools.pages import fragments, page_facts, study_of

# What the files of a figure end with, by format.
ENDINGS: Mapping[str, Sequence[str]] = {
    "svg": (".svg", "-dark.svg"),
    "pdf": (".pdf",),
    "png": (".png",),
    "csv": (".csv",),
}


class BookError(RuntimeError):
    """The book could not be built, or was built and is not fit to be published."""

    def __init__(self, problems: Sequence[str], where: Path | None = None) -> None:
        self.problems = tuple(problems)
        head = f"the book has {len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        shown = f" (look at it in {where})" if where else ""
        super().__init__("\n  - ".join([f"{head}{shown}:", *self.problems]))


# --- executing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """A notebook as papermill left it, with the seconds it took."""

    notebook: Notebook
    seconds: float


def known_parameters(source: Path) -> set[str]:
    """The names in a notebook's parameters cell."""
    import papermill

    return set(papermill.inspect_notebook(str(source)))


def execute(source: Path, parameters: Mapping[str, Any], root: Path, figures: Path | None = None) -> Execution:
    """Run a notebook with parameters, in this interpreter's environment and the repository's folder.

    Its figures go to `figures`, by default where the book has them.
    """
    unknown = gates.unknown_parameters(known_parameters(source), parameters, source.name)
    if unknown:
        raise BookError(unknown)
    here = Path(sys.prefix) / "share" / "jupyter"
    # The kernel is this interpreter's.
    settings = {"JUPYTER_PATH": str(here), "JUPYTER_PLATFORM_DIRS": "1", "PYTHONHASHSEED": "0"}
    # Two notebooks run at a time; more threads than cores would wait for each other in every small operation.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    environment = {**threads, **os.environ, **settings}
    environment |= {"BASIS_FIGURES": str(figures)} if figures else {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / source.name
        command = [sys.executable, "-m", "papermill", str(source), str(target), "--kernel", "python3"]
        command += ["--cwd", str(root), "--no-progress-bar", "--log-level", "ERROR", "--execution-timeout", "600"]
        if parameters:
            command += ["--parameters_yaml", json.dumps(dict(parameters))]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        if not target.exists():
            raise BookError([f"{source.name} could not be run: {tail}"])
        notebook = nbformat.read(target, as_version=4)
    if done.returncode:
        raise BookError([failure(notebook, source.name) or f"{source.name} could not be run: {tail}"])
    return Execution(notebook, float(notebook.metadata.get("papermill", {}).get("duration") or 0))


def failure(notebook: Notebook, name: str) -> str:
    """The failing cell of an executed notebook and the end of its traceback."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback)).splitlines()
                code = "\n".join(f"    | {line}" for line in cell.source.splitlines()[:12])
                tail = "\n".join(f"    {line}" for line in trace[-12:])
                return f"{name} fails in the cell\n{code}\n    with\n{tail}"
    return ""


# --- the whole way -----------------------------------------------------------------------------


def build(
    *,
    profile: str | None = None,
    html_dir: Path | None = None,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Build the book and return the path of its first page.

    Every notebook is executed with `profile`, by default the largest whose records decide its study's
    claims. `only` names the chapters to execute again; the others keep the page of the last
    build. Claims and records are checked where they are those that the repository publishes. The
    pages are in `book/_build/html`, and in `html_dir` too if that is given. If anything is wrong,
    everything that is wrong is named in one `BookError`.
    """
    root = checkout()
    say = progress or (lambda message: None)
    sources = _notebooks()
    problems = source_gates(root, sources)

    target = root / "book" / "notebooks"
    chosen = _choose(sources, only, target)
    if only is None:
        for folder in (target, root / "book" / "figures"):
            shutil.rmtree(folder, ignore_errors=True)
    say(f"executing {counted(chosen)}")
    executions = execute_all(chosen, profile, root)
    for stem, run in executions.items():
        problems += gates.executed_problems(run.notebook, sources[stem].name)

    target.mkdir(parents=True, exist_ok=True)
    targets = Targets.read(root / "book", {path.stem for path in (root / "book" / "figures").glob("*.svg")})
    listed = figures_known()
    for stem, run in executions.items():
        page = assemble_page(run.notebook, page_facts(stem, run.seconds, root, targets, profile))
        nbformat.write(page, target / f"{stem}.ipynb")
        known = [name for name, home, _ in listed if home == stem]
        strange = [one.name for one in page.metadata.basis.figures if not any(fnmatch(one.name, n) for n in known)]
        problems += [f"{stem} draws {name}, which `basis figures` does not find by that name" for name in strange]
    pages = {stem: nbformat.read(target / f"{stem}.ipynb", as_version=4) for stem in sources}
    generated = root / "book" / "generated"
    generated.mkdir(exist_ok=True)
    front_page.save(profile, root / "book" / "figures")
    thumbnails(root / "book" / "figures")
    texts = fragments(pages, profile)
    for name, text in texts.items():
        (generated / name).write_text(text + "\n", encoding="utf-8")

    if profile is None and is_published(results_folder()):
        shown = block((root / "README.md").read_text(encoding="utf-8"), "claims") or ""
        if shown.strip() != texts["readme-claims.md"].strip():
            problems.append("README.md's claims are not what the records say; `basis dev sync` rewrites them")

    say("rendering the pages")
    html = root / "book" / "_build" / "html"
    problems += render(root)
    if html.is_dir():
        problems += gates.page_problems(html, root, address())
        if html_dir is not None:
            shutil.copytree(html, html_dir, dirs_exist_ok=True)
    if problems:
        raise BookError(problems, html / "index.html" if html.is_dir() else None)
    return (html_dir or html) / "index.html"


_NAMED = re.compile(r"(?:figures\.show\(.*?\bname=f?|about = \{\"name\": )\"([a-z0-9{}-]+)\"", re.DOTALL)


def figures_known() -> list[tuple[str, str, str]]:
    """Name, notebook and title of every figure; a `*` in a name is for what the notebook puts there."""
    known = [(HEADLINE, "", "Front page")]
    for stem, path in _notebooks().items():
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            for name in re.findall(_NAMED, cell.source):
                known.append((re.sub(r"{.*?}", "*", name), stem, gates.first_heading(notebook)))
    return known


def export_figures(
    names: Sequence[str], out: Path, *, chapters: Sequence[str] = (), formats: Sequence[str] = tuple(ENDINGS),
    profile: str | None = None, progress: Callable[[str], None] | None = None,
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """Draw figures anew into `out`, those named and those of chapters, or all: the files, and what could not be drawn.

    Raises:
        ValueError: for a figure or chapter that is not there.
    """
    root, sources, known = checkout(), _notebooks(), {name: stem for name, stem, _ in figures_known()}
    homes = {name: [known[one] for one in sorted(known, key=name.__ne__) if fnmatch(name, one)] for name in names}
    if unknown := [name for name in names if not homes[name]]:
        near = {name: ", ".join(difflib.get_close_matches(name, known)) or f"--chapter {name}" for name in unknown}
        meant = "; ".join(f"there is no figure {name!r}; did you mean {one}?" for name, one in near.items())
        raise ValueError(f"{meant} `basis figures --list` lists all")
    asked = named(sources, chapters)
    wanted = {name: found[0] for name, found in homes.items()}
    wanted |= {name: stem for name, stem in known.items() if stem in asked or not (names or chapters)}
    stems = sorted({*wanted.values()} - {""})
    if progress and stems:
        progress(f"executing {counted(stems)}")
    paths: dict[str, Path] = {}
    lacking: list[str] = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        try:
            execute_all({stem: sources[stem] for stem in stems}, profile, root, Path(place))
        except BookError as error:
            lacking += error.problems
        if HEADLINE in wanted:
            front_page.save(profile, Path(place))
        for name, stem in wanted.items():
            drawn = {path for ends in ENDINGS.values() for end in ends for path in Path(place).glob(name + end)}
            kept = sorted(path for path in drawn if path.suffix[1:] in formats)
            paths |= {path.name: Path(shutil.copy(path, out)) for path in kept}
            if not drawn and not any(f"{stem}.ipynb" in problem for problem in lacking):
                why = _making(stem, profile) if name in known else f"{stem} draws nothing of that name"
                lacking.append(f"{name} is not drawn: {why}")
            elif drawn and not kept:
                lacking.append(f"{name} gives no table for a csv file")
    return list(paths.values()), lacking


def _making(stem: str, profile: str | None) -> str:
    """What makes the records that a chapter's figures lack."""
    study, folder = study_of(stem) or STUDIES["headline"], results_folder()
    shown = profile or ("small" if (shown := shown_profile(study)) == ARCHIVED else shown)
    command = f"basis run {study.name} --profile {shown}" if study.runs("small") else "basis bench"
    where = "" if is_published(folder) else f" --results {folder}"
    return f"{folder} lacks records for it, which `{command}{where}` makes"


def counted(notebooks: Collection[str]) -> str:
    """Such as `1 notebook`."""
    return f"{len(notebooks)} notebook{'s' * (len(notebooks) != 1)}"


def _notebooks() -> dict[str, Path]:
    return {path.stem: path for path in sorted((checkout() / "notebooks").glob("*.ipynb"))}


def checkout() -> Path:
    """The checkout of the repository that the package runs from."""
    root = repository_root()
    if root is None:
        raise BookError(["the book is built in a checkout of the repository, and this package is not in one"])
    return root


def source_gates(root: Path, sources: Mapping[str, Path]) -> list[str]:
    """All gates that need nothing to be executed."""
    problems = gates.contents_problems((root / "book" / "_toc.yml").read_text(encoding="utf-8"), sources)
    for path in sources.values():
        notebook = nbformat.read(path, as_version=4)
        problems += gates.source_problems(notebook, path.name)
        problems += gates.contract_problems(notebook, path.name)
        problems += gates.notebook_number_problems(notebook, path.name)
    for path in sorted((root / "book").glob("*.md")):
        problems += gates.number_problems(path.read_text(encoding="utf-8"), f"book/{path.name}")
    problems += sync(root, check=True, example=False)
    return problems + (check_records() if is_published(results_folder()) else [])


def _choose(sources: Mapping[str, Path], only: Sequence[str] | None, target: Path) -> dict[str, Path]:
    """The notebooks to execute: those named, and those that have no page yet."""
    if only is None:
        return dict(sources)
    wanted = named(sources, only)
    return {s: path for s, path in sources.items() if s in wanted or not (target / f"{s}.ipynb").exists()}


def named(sources: Mapping[str, Path], chapters: Sequence[str]) -> set[str]:
    """The notebooks that chapters such as `3`, `03` or `03_every_layer` mean."""
    found = {name: {s for s in sources if s == name or s.startswith(f"{name.zfill(2)}_")} for name in chapters}
    if unknown := [name for name, stems in found.items() if not stems]:
        raise ValueError(f"there is no notebook {unknown[0]!r}; there are {', '.join(sources)}")
    return set().union(*found.values())


def execute_all(
    sources: Mapping[str, Path], profile: str | None, root: Path, figures: Path | None = None
) -> dict[str, Execution]:
    """Execute notebooks, two at a time; all that fail are named together."""

    def one(stem: str) -> Execution | BookError:
        # The book shows records; it trains and measures nothing.
        offered = {"run_missing": False} | ({"profile": profile} if profile else {})
        takes = known_parameters(sources[stem])
        parameters = {name: value for name, value in offered.items() if name in takes}
        try:
            return execute(sources[stem], parameters, root, figures)
        except BookError as error:
            return error

    with ThreadPoolExecutor(max_workers=2) as pool:
        results = dict(zip(sources, pool.map(one, sources), strict=True))
    failed = [problem for result in results.values() if isinstance(result, BookError) for problem in result.problems]
    if failed:
        raise BookError(failed)
    return {stem: result for stem, result in results.items() if isinstance(result, Execution)}


def render(root: Path) -> list[str]:
    """Run Jupyter Book with warnings as errors; return what it complains about."""
    shutil.rmtree(root / "book" / "_build", ignore_errors=True)
    code = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", "book", "-W", "-n", "--keep-going", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}  # for book.tools
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + "\n" + done.stderr).replace(f"{root}{os.sep}", "")
    lines = [line.strip() for line in output.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)]
    tail = output.strip().splitlines()[-15:]
    return [f"Jupyter Book: {line}" for line in dict.fromkeys(lines or tail)]
