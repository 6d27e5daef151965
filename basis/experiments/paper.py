"""The numbers of the paper beside ours, once somebody has entered them in ``book/paper.yml``."""

import pandas as pd

from basis.environment import repository_root
from basis.figures import table
from basis.statistics import mean_estimate


def paper_numbers(chapter: int | None = None) -> pd.DataFrame:
    """The entries of ``book/paper.yml``, of one chapter or all, a column a key; without a checkout it is empty.

    ``value`` is NaN until it is entered.
    """
    columns = ["quantity", "network", "chapter", "study", "variant", "table", "page", "value", "unit"]
    if (root := repository_root()) is None:
        return pd.DataFrame(columns=columns)
    import yaml  # type: ignore[import-untyped]

    frame = pd.DataFrame(yaml.safe_load((root / "book" / "paper.yml").read_text()), columns=columns)
    frame = frame.astype({"value": float})
    return frame if chapter is None else frame[frame["chapter"] == chapter]


def paper_table(study: str, runs: pd.DataFrame, chapter: int | None = None) -> str:
    """A Markdown table of what is entered for a study (and a chapter) beside ours; empty without any entry.

    ``runs`` is the study's frame: a row a run with its ``variant`` and ``model``, and a column for each quantity that
    we have. Shares, such as ``parameters``, stand there as fractions, and in the table in %.
    """
    rows, entries = [], paper_numbers(chapter)
    for one in entries[entries["study"] == study].dropna(subset="value").itertuples():
        ours = "–"
        if one.quantity in runs:
            same = (runs["variant"] == one.variant) & (runs["model"] == one.network)
            scale = 100 if one.unit == "%" and one.quantity != "accuracy" else 1
            values = [scale * x for x in runs.loc[same, one.quantity].dropna()]
            ours = mean_estimate(values).text() if values else ours
        theirs = f"{one.value:g} (table {one.table}, page {one.page})"
        rows.append((one.network, one.variant, f"{one.quantity}, {one.unit}", theirs, ours))
    return table(("Network", "Variant", "Quantity", "The paper", "Ours"), rows) if rows else ""
