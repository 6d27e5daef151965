"""What the data card says that comes out of the records: its counts, its columns, and its example's output."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from basis.experiments.runs import Record
from basis.experiments.studies import STUDIES
from basis.experiments.tidy import COLUMNS
from basis.figures import table

EXAMPLE = """\
from torch import nn
from basis.models import build
from basis.experiments.scoring import score

layers = [name for name, module in build("resnet18").named_modules() if isinstance(module, nn.Conv2d)]
own = {name: -i for i, name in enumerate(layers)}  # the earlier, the more sensitive?
print(score(own).round(2).to_string(index=False))"""


def card_fragments(records: Sequence[Record]) -> dict[str, str]:
    """The parts of the data card that are included there: file name -> text."""
    return {
        "columns.md": table(("Column", "What it is"), [(f"`{name}`", said) for name, (said, _) in COLUMNS.items()]),
        "varied.md": table(("Study", "Scale", "Variants", "Runs", "Networks", "Devices"), varied(records)),
        "own-score.md": f"```python\n{EXAMPLE}\n```\n\n```text\n{example_output()}\n```",
    }


def card_numbers(records: Sequence[Record]) -> dict[str, str]:
    """Numbers that the data card's sentences name."""
    return {"table_runs": str(len(records))}


def varied(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """For each study and profile with records: its question, how many variants and runs, which networks and devices."""
    rows: list[tuple[str, ...]] = []
    for place in dict.fromkeys((r.config["study"], r.config["profile"]) for r in records):
        own = [r for r in records if (r.config["study"], r.config["profile"]) == place]
        variants = {r.config["variant"] for r in own}
        networks = ", ".join(dict.fromkeys(str(r.config["model"]) for r in own))
        devices = ", ".join(dict.fromkeys(str(r.environment["device"]) for r in own))
        study = STUDIES[place[0]]
        title = f"{study.name}: {{doc}}`{study.title} </notebooks/{study.chapter}>`"
        rows.append((title, place[1], str(len(variants)), str(len(own)), networks, devices))
    return rows


def example_output() -> str:
    """What the example prints, or why it cannot."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(EXAMPLE, {})
    except ValueError as error:  # of a folder without these records
        return str(error)
    return printed.getvalue().rstrip()
