"""How progress is shown: decided here, drawn by tqdm."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tqdm.std import tqdm

EVERY = 30.0  # seconds between two lines of a log


class Lines(tqdm):
    """Plain lines, at most one in ``EVERY`` seconds and a last one, where nobody watches a bar move."""

    said = 0.0  # when the last one was written; monotonic time

    def __init__(self, *args: Any, **options: Any) -> None:
        self.said = time.monotonic()
        form = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(*args, bar_format=form, **options)  # type: ignore[call-overload]

    def display(self, msg: str | None = None, pos: int | None = None, *, last: bool = False) -> None:
        """Write a line if it is time for one."""
        if last or time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            self.fp.write(f"{self}\n")

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self.disable = True
            self.display(last=True)


def kernel_is_watched() -> bool | None:
    """Whether a person looks at the notebook that runs this; None outside notebooks.

    papermill and everything else that executes notebooks by nbclient says with each cell that nobody can answer it.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return None
    asks = kernel.get_parent().get("content", {}).get("allow_stdin", True)
    return bool(asks) or "google.colab" in sys.modules


def bar(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, desc: str | None = None, unit: str = "it",
    initial: int = 0, leave: bool = False, shown: bool = True,
) -> tqdm:  # fmt: skip
    """A tqdm of the kind that suits the place: a bar in a terminal, in a notebook a widget, or text without ipywidgets.

    In a log file and in notebooks that nobody watches it writes a few plain lines (:class:`Lines`).

    Args:
        iterable, total, desc, unit, initial: as of tqdm.
        leave: whether the bar stays when it is done.
        shown: whether there is a bar at all.
    """
    watched = kernel_is_watched()
    how: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "leave": leave}
    how |= {"dynamic_ncols": True} if watched is None else {"file": sys.stdout, "ncols": 100}  # stderr is painted red
    kind: Any = tqdm if watched or (watched is None and sys.stderr.isatty()) else Lines
    if watched and find_spec("ipywidgets"):
        kind = import_module("tqdm.notebook").tqdm
    made: tqdm = kind(iterable, disable=not shown, **how)
    return made
