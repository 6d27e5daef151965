"""How progress is shown: decided here, drawn by tqdm."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from tqdm.std import tqdm


class Lines(tqdm):
    """Plain lines, at most one in half a minute and a last one, where nobody watches a bar move."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.said = time.monotonic()
        form = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(*args, bar_format=form, **options)  # type: ignore[call-overload]

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if it is time for one, or the last."""
        if self.disable or time.monotonic() - self.said >= 30:
            self.said = time.monotonic()
            self.fp.write(f"{self}\n")

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self.disable = True
            self.display()


def kernel_is_watched() -> bool | None:
    """Whether a person runs this notebook's cells: papermill says that it answers no question; None outside."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return None
    request: Any = getattr(shell.kernel, "get_parent", dict)()
    return request.get("content", {}).get("allow_stdin") is not False or "google.colab" in sys.modules


def bar(iterable: Iterable[Any] | None = None, *, leave: bool = False, shown: bool = True, **options: Any) -> tqdm:
    """A bar in a terminal, a widget in a notebook (text without ipywidgets), else :class:`Lines`; ``shown`` or none.

    ``leave``: whether it stays when it is done; ``options``: total, desc, unit, initial, as of tqdm.
    """
    watched = kernel_is_watched()
    options |= {"dynamic_ncols": True} if watched is None else {"file": sys.stdout, "ncols": 100}  # stderr looks red
    kind: Any = tqdm if watched or (watched is None and sys.stderr.isatty()) else Lines
    if watched and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as kind
    return kind(iterable, leave=leave, disable=not shown, **options)
