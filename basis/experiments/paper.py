"""The numbers of the paper, once somebody has entered them in ``book/paper.yml``, beside ours."""

from typing import Any

import pandas as pd

from basis.environment import repository_root
from basis.figures import table
from basis.statistics import mean_estimate

COLUMNS = ("quantity", "network", "chapter", "study", "variant", "table", "page", "value", "unit")


def paper_numbers(chapter: int | None = None) -> pd.DataFrame:
    """The entries of ``book/paper.yml`` with :data:`COLUMNS`, of one chapter or all; none without a checkout.

    ``value`` is NaN until it is entered.
    """
    entries: list[dict[str, Any]] = []
    if root := repository_root():
        import yaml

        entries = yaml.safe_load((root / "book" / "paper.yml").read_text(encoding="utf-8"))
    frame = pd.DataFrame(entries, columns=list(COLUMNS)).astype({"value": float})
    return frame if chapter is None else frame[frame["chapter"] == chapter]


def paper_table(study: str, runs: pd.DataFrame, entries: pd.DataFrame | None = None) -> str:
    """A Markdown table of the paper's numbers that ``study`` compares with, ours beside them; empty without any.

    ``runs`` is the study's frame, a row a run with its ``variant`` and ``model``, and a column for each quantity that we
    have: shares, such as ``parameters``, stand there as fractions, and here in %. ``entries`` replace the file's.
    """
    entries = paper_numbers() if entries is None else entries
    rows = []
    for one in entries[entries["study"] == study].dropna(subset="value").itertuples():
        same = (runs["variant"] == one.variant) & (runs["model"] == one.network)
        values = [*runs.loc[same, one.quantity].dropna()] if one.quantity in runs else []
        scale = 100 if one.unit == "%" and one.quantity != "accuracy" else 1
        said = mean_estimate([scale * x for x in values]).text() if values else "–"
        where = f"table {one.table}, page {one.page}"
        rows.append((one.network, one.variant, f"{one.quantity}, {one.unit}", f"{one.value:g} ({where})", said))
    return table(("Network", "Variant", "Quantity", "The paper", "Ours"), rows) if rows else ""
