"""``basis book``, ``figures`` and ``dev``: what is made of the notebooks, the pages and the records."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from basis.environment import clone, repository_root, stored_results
from basis.experiments.runs import PROFILES
from basis.experiments.tidy import csv, runs_frame, sound_records
from basis.saving import replacing


def add_book(command: argparse.ArgumentParser, *, whole: bool = True) -> None:
    """Which chapters, at which scale; the whole book also as one file."""
    command.add_argument("--chapter", "--only", nargs="+", metavar="CHAPTER", dest="only", help="only these, e.g. 3 5")
    scales = f"scale of the runs to show: {', '.join(PROFILES)} (default: the largest that decides)"
    command.add_argument("--profile", choices=PROFILES, metavar="SCALE", help=scales)
    if whole:
        command.add_argument("--pdf", action="store_true", help="print the pages of the last build, as one PDF")


def add_figures(command: argparse.ArgumentParser) -> None:
    """Which figures, as which files."""
    option = command.add_argument
    option("names", nargs="*", metavar="NAME", help="figures to draw, such as headline (default: all)")
    add_book(command, whole=False)
    option("--out", type=Path, metavar="DIR", help="folder to fill (default: figures, in the folder of --results)")
    kinds = "svg (light and dark), pdf, png (192 dpi), csv (the table behind a figure) (default: all)"
    formats = ("svg", "pdf", "png", "csv")
    option("--format", nargs="+", default=formats, choices=formats, metavar="FORMAT", dest="formats", help=kinds)
    option("--list", action="store_true", help="list name, chapter and title of every figure, and draw none")


def add_dev(command: argparse.ArgumentParser) -> None:
    """The commands of ``basis dev``."""
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    for name, does in (("sync", sync_copies), ("table", write_table)):
        commands.add_parser(name, help=does.__doc__, description=does.__doc__).set_defaults(command=does)
    commands.choices["table"].add_argument("--results", type=Path, metavar="DIR", help="folder of records to read")


def _tool(name: str, results: Path | None = None) -> Any:
    """A module of the checkout's book/tools, for the records named; ``ValueError`` where there is no checkout."""
    if (root := repository_root()) is None:
        raise ValueError(f"the book's notebooks and pages are not installed; run this in a clone: {clone()}")
    sys.path.insert(0, str(root))
    os.environ["BASIS_RESULTS"] = str(stored_results(results).resolve())  # for the notebooks' processes, too
    return import_module(f"book.tools.{name}")  # needs the extra "book"


def do_book(options: argparse.Namespace) -> int:
    """Execute the notebooks and build the pages; prints where the first one is."""
    build = _tool("pdf" if options.pdf else "build", options.results).build
    made = build(profile=options.profile, only=options.only, progress=print)
    print(f"The book is at {made.as_uri()}")
    return 0


def do_figures(options: argparse.Namespace) -> int:
    """Draw figures of the book anew, as files for slides and papers, by executing the notebooks that they are of."""
    build = _tool("build", options.results)
    if options.list:
        print(*(f"{name:22}  {stem[:2]:7}  {title}" for name, stem, title in build.figures_known()), sep="\n")
        return 0
    chosen = {"chapters": options.only or (), "formats": options.formats, "profile": options.profile}
    out = options.out or Path(options.results or "", "figures")  # figures of one's own runs do not replace others
    paths, lacking = build.export_figures(options.names, out, **chosen, progress=print)
    print(*paths, *lacking, sep="\n")
    return 0 if paths else 1


def sync_copies(_: argparse.Namespace) -> int:
    """Renew what README, citation and notebooks repeat from elsewhere."""
    claims = (pages := _tool("pages")).readme_claims(pages.verdicts())
    print(*_tool("derived").sync(repository_root(), claims=claims) or ["nothing to renew"], sep="\n")
    return 0


def write_table(options: argparse.Namespace) -> int:
    """Write all records as one tidy table, runs.csv beside them."""
    with replacing(path := stored_results(options.results) / "runs.csv") as file:
        file.write(csv(runs_frame(sound_records(options.results))))
    print(f"saved {path}")
    return 0
