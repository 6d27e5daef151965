"""The tables of a chapter as Markdown: what its variants cost and reach, and how its claims fare."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from basis.experiments.runs import ARCHIVED
from basis.experiments.studies import Gathered, find_study, gather
from basis.experiments.studies.study import compared
from basis.figures import table


def summary(runs: pd.DataFrame, baseline: str = "dense", variants: Sequence[str] | None = None) -> str:
    """A row a variant of a :meth:`Study.frame`: n, size, accuracy, and the difference from the ``baseline``.

    Brackets hold Student's 95 % intervals; differences are paired by seed. Empty without runs.
    """
    rows = [
        (
            str(row["variant"]), str(row["n"]), f"{row['parameters']:.1%}", f"{row['MACs']:.1%}",
            row["accuracy"].text(), f"{gap.text(signed=True)} ({gap.n})" if (gap := row["difference"]).n else "",
        )
        for row in compared(runs, baseline, variants).to_dict("records")
    ]  # fmt: skip
    head = ("Variant", "n", "Parameters", "MACs", "Test accuracy, %", f"Against {baseline}, points (pairs)")
    return table(head, rows) if rows else "There are no runs to tabulate."


def verdict_table(study: str, gathered: Gathered, claims: Sequence[str] = ()) -> str:
    """The verdicts on the claims of a study, or some of them, at the scale shown and at paper scale.

    Archived runs decide nothing: in their place stands what there is of ``small``.
    """
    judge, shown = find_study(study), [gather(study, "small") if gathered.profile == ARCHIVED else gathered]
    shown += [gather(study, "paper")] if gathered.profile != "paper" else []
    found = [(one.scale, v) for one in shown for v in judge.verdicts(one.records, one.profile)]
    found = [(scale, v) for scale, v in found if not claims or v.claim in claims]
    rows = [(v.claim, scale, v.finding, v.difference, str(v.n or ""), f"**{v.label}**") for scale, v in found]
    changes = dict.fromkeys(f"What would change {v.claim}: {v.change}" for _, v in found)
    return "\n\n".join([table(("Claim", "Scale", "Finding", "Difference", "n", "Verdict"), rows), *changes])
