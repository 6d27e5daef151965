"""How things are said in messages and reports."""

from __future__ import annotations

import re
from collections.abc import Iterable

ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-_])")  # of terminals: colours and the like
# What exporters and data loaders put around a reason.
AROUND = re.compile(r"Failed to \w+ the (model|exported program)[^.]*\.|torch\.export\.|"
                    r"This is step .* Next steps:(?s:.*)|<class '[^']*'>: ")  # fmt: skip
TRACEBACK, SUMMARY = "Traceback (most recent call last):", "## Exception summary"


def few(items: Iterable[str], separator: str = ", ") -> str:
    """The first four items of a list, and how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - 4} more" if len(items) > 4 else ""
    return separator.join(items[:4]) + more


def first_line(error: BaseException) -> str:
    """What an exception says in one line, and in brackets what its innermost cause says; or its kind.

    Without escapes of terminals, tracebacks, and what exporters say around the cause.
    """
    chain = [error]
    while inner := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        if inner in chain:
            break
        chain.append(inner)
    own, *below = map(_reason, chain)
    innermost = next(filter(None, reversed(below)), "")
    if own and innermost and innermost not in own:
        return f"{own:.150} ({innermost:.150})"
    return f"{own or innermost or type(error).__name__:.300}"


def _reason(error: BaseException) -> str:
    """The first paragraph of the reason that an exception gives; "" for none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = ESCAPES.sub("", str(error)).rpartition(SUMMARY)[2].partition("⬆")[0]
    before, found, after = text.rpartition(TRACEBACK)
    if found:  # frames are indented, and what was raised is not
        raised = [line for line in after.splitlines() if line.strip() and not line[0].isspace()]
        text = "\n".join(raised) or before
    text = AROUND.sub("", text).strip()
    text = " ".join(re.split(r"\n\s*\n", text)[0].split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) and text else text


def shown_name(name: str) -> str:
    """The name of a layer as it is printed; the model itself has none."""
    return name or "(the model itself)"
