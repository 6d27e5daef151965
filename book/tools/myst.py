"""From the plain Markdown of a notebook, which reads well on Colab, to the MyST of its page.

$$ ... \\tag{2} $$           a numbered equation, (3.2) in chapter 3
[(2)](#eq-2)                a reference to it; from elsewhere [(3.2)](03_every_layer.ipynb#eq-2)
[Figure](#fig-loss)         a reference to the figure of that name, whichever chapter it is of
[Li et al., 2020](URL)      a citation, where an entry of references.bib has that address
*basis filters*             a link to the glossary, where it has that term
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_CODE = re.compile(r"^(```+|~~~+).*?^\1\s*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_EQUATION = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_TAG = re.compile(r"[ \n]*\\tag\{(\d+)\}")
_TO_EQUATION = re.compile(r"\[\([\d.]+\)\]\((?:(\d\d)_\w+\.ipynb)?#eq-(\d+)\)")
_TO_FIGURE = re.compile(r"\[[Ff]igure\]\((?:\d\d_\w+\.ipynb)?#fig-([a-z0-9-]+)\)")
_LINK = re.compile(r"(\()?\[([^\]\n]+)\]\((https?://[^)\s]+)\)(\))?")
_EMPHASIS = re.compile(r"(?<![*\w\\])\*([A-Za-z][^*\n`]*?)\*(?![*\w])")


@dataclass(frozen=True)
class Targets:
    """What a page may refer to: keys of citations by address, terms of the glossary, names of drawn figures."""

    citations: Mapping[str, str] = field(default_factory=dict)
    terms: Collection[str] = ()
    figures: Collection[str] = ()

    @classmethod
    def read(cls, book: Path, figures: Collection[str]) -> Targets:
        """Those of the book in this folder."""
        entries = (book / "references.bib").read_text(encoding="utf-8")
        found = re.findall(r"^@\w+\{([^,]+),$(.*?)^\}", entries, re.DOTALL | re.MULTILINE)
        urls = {key: re.search(r"^  url = \{([^}]+)\}", fields, re.MULTILINE) for key, fields in found}
        citations = {url[1]: key for key, url in urls.items() if url}
        glossary = (book / "glossary.md").read_text(encoding="utf-8").partition(":::{glossary}")[2]
        terms = re.findall(r"^(\w[^:{\n]*)$", glossary, re.MULTILINE)
        return cls(citations, frozenset(terms), frozenset(figures))


def to_myst(text: str, chapter: str, targets: Targets) -> str:
    """The text with its equations, references, citations and terms as MyST has them; code is left alone.

    ``chapter`` is the chapter's number of two digits, such as "03".
    """
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_converted(text[end : code.start()], chapter, targets), code[0]]
        end = code.end()
    return "".join([*parts, _converted(text[end:], chapter, targets)])


def _converted(text: str, chapter: str, targets: Targets) -> str:
    def equation(match: re.Match[str]) -> str:
        tag = _TAG.search(match[1])
        return f"$${_TAG.sub('', match[1])}$$ (eq-{chapter}-{tag[1]})" if tag else match[0]

    def citation(match: re.Match[str]) -> str:
        opening, said, url, closing = match.groups(default="")
        key = targets.citations.get(url)
        if key is None:
            return match[0]
        if not re.search(r"\d{4}$", said):  # words that are no authors stay
            return f"{opening}{said} {{cite:p}}`{key}`{closing}"
        around = opening and closing
        return f"{{cite:p}}`{key}`" if around else f"{opening}{{cite:t}}`{key}`{closing}"

    def term(match: re.Match[str]) -> str:
        said, lower = match[1], match[1][:1].lower() + match[1][1:]
        known = next((one for one in (said, lower) if one in targets.terms), None)
        return f"{{term}}`{said} <{known}>`" if known else match[0]

    def figure(match: re.Match[str]) -> str:
        return f"{{numref}}`fig-{match[1]}`" if match[1] in targets.figures else "the figure"

    text = _EQUATION.sub(equation, text)
    text = _TO_EQUATION.sub(lambda match: f"{{eq}}`eq-{match[1] or chapter}-{match[2]}`", text)
    text = _TO_FIGURE.sub(figure, text)
    pieces = re.split(r"(\$\$.+?\$\$|\$[^$\n]+\$)", text, flags=re.DOTALL)  # mathematics has stars of its own
    return "".join(p if i % 2 else _EMPHASIS.sub(term, _LINK.sub(citation, p)) for i, p in enumerate(pieces))
