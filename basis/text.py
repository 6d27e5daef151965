"""How things are said in messages and reports."""

from __future__ import annotations

from collections.abc import Iterable


def few(items: Iterable[str], separator: str = ", ") -> str:
    """The first four items of a list, and how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - 4} more" if len(items) > 4 else ""
    return separator.join(items[:4]) + more


def first_line(error: Exception) -> str:
    """The first line of what an exception says that is not empty, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown_name(name: str) -> str:
    """The name of a layer as it is printed; the model itself has none."""
    return name or "(the model itself)"
