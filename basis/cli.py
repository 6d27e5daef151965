"""Basis convolutions: make a network of your own smaller, train and draw what the book shows, build the book."""

from __future__ import annotations

import argparse
import inspect
import io
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

from basis.text import first_line

# Command -> its module in basis.commands, what it does, and what with the records of --results, if it takes that.
COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "compress": ("compress", "make a trained network of your own smaller", ""),
    "run": ("run", "train the runs behind the book's figures", "to add to; runs that are there are not done again"),
    "status": ("run", "say which runs are done and which are missing", "to count"),
    "figures": ("book", "draw figures of the book as files: SVG, PDF, PNG, CSV", "to draw"),
    "bench": ("bench", "measure speed against dense layers and networks", ""),
    "book": ("book", "execute the notebooks and build the HTML book", "to show"),
    "export": ("run", "pack records into one file, to bring them elsewhere", "to pack"),
    "import": ("run", "check and file the records of such a file", "to add to"),
    "dev": ("book", "for authors of the book: sync, table", ""),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status is 0, 1 (a part failed) or 2 (it cannot be done)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # whose encoding may lack what is in a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parse(typed)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        said, status = "interrupted; what is finished is kept, and the same command goes on", 130
    except ModuleNotFoundError as error:  # the book's tools and Ray are extras
        extra = {"ray": "ray", "nbformat": "notebooks", "papermill": "notebooks"}.get(str(error.name), "book")
        said, status = f"{error.name} is not installed; `pip install -e '.[{extra}]'` adds it", 2
    except OSError as error:
        said, status = f"a file could not be read or written ({first_line(error)}); what is finished is kept", 2
    except Exception as error:
        if not isinstance(error, ValueError) and type(error).__module__.split(".")[0] not in ("basis", "book"):
            raise  # our own errors say what was wrong
        said, status = str(error), 2
    print(f"basis: {said}", file=sys.stderr)
    return status


def _parse(typed: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="basis", description=__doc__)
    version = next((one.version for one in distributions(name="basis-convolutions")), "not installed")
    parser.add_argument("--version", action="version", version=f"basis {version}")
    parser.set_defaults(typed=typed)  # for reports and hints
    commands = parser.add_subparsers(metavar="COMMAND")
    named = next((text for text in typed if not text.startswith("-")), None)
    for name, (module, about, use) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name == named:
            found = vars(import_module(f"basis.commands.{module}"))
            command.set_defaults(command=found.get(f"do_{name}"))
            command.description = inspect.getdoc(found.get(f"do_{name}")) or about
            if options := found.get(f"add_{name}"):
                options(command)
            if use:
                where = "default: $BASIS_RESULTS, or the published ones, in results of the clone"
                command.add_argument("--results", type=Path, metavar="DIR", help=f"folder of records {use} ({where})")
    return parser.parse_args(typed or ["--help"])


if __name__ == "__main__":
    sys.exit(main())
