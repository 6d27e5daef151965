"""Numbers and words as users give them: numbers of numpy become Python's, truth values are none."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def plain_number(name: str, value: Any, *, whole: bool = False, least: float = -math.inf) -> Any:
    """``value`` as an int, or a float where it is not whole by its kind; ``ValueError`` for what is no such number."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real) or not float(value) >= least:
        bound = f" of at least {least}" if least > -math.inf else ""
        raise ValueError(f"{name} is {value!r}, but it must be a {'whole ' if whole else ''}number{bound}")
    return int(value) if isinstance(value, Integral) else float(value)


def one_of(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise ``ValueError`` for a value that is not among those known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(map(str, known))}")


def plain_fields(settings: Any) -> None:
    """:func:`plain_number` for every field of a frozen dataclass that is annotated as int or float, or None."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), str(field.type).removesuffix(" | None")
        if kind in ("int", "float") and (value is not None or kind == field.type):
            object.__setattr__(settings, field.name, plain_number(field.name, value, whole=kind == "int"))
