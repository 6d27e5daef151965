"""The repository's public address, read from the one place that holds it.

`[project.urls] Source` in pyproject.toml says owner, name and branch. Badges, launch buttons,
citations and the Colab cell are made from the `Address` returned here, and from nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "basis-convolutions"
_SOURCE = re.compile(r"https://github\.com/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)/tree/(?P<branch>[\w./-]+)")
_ENTRY = re.compile(r'^Source\s*=\s*"(?P<url>[^"]*)"', re.MULTILINE)


@dataclass(frozen=True)
class Address:
    """Where the repository lives, and every link that follows from that."""

    owner: str
    name: str
    branch: str

    @property
    def repository(self) -> str:
        """The repository's front page."""
        return f"https://github.com/{self.owner}/{self.name}"

    @property
    def pages(self) -> str:
        """The published book."""
        return f"https://{self.owner.lower()}.github.io/{self.name}/"

    def blob(self, path: str) -> str:
        """A file as the repository's site shows it."""
        return f"{self.repository}/blob/{self.branch}/{path}"

    def tree(self, path: str) -> str:
        """A folder as the repository's site shows it."""
        return f"{self.repository}/tree/{self.branch}/{path}"

    def colab(self, path: str) -> str:
        """A notebook, opened in Google Colab."""
        return f"https://colab.research.google.com/github/{self.owner}/{self.name}/blob/{self.branch}/{path}"


def parse_source(url: str) -> Address:
    """Take owner, name and branch out of a `Source` url."""
    match = _SOURCE.fullmatch(url)
    if match is None:
        raise ValueError(
            f"the Source url {url!r} in [project.urls] is not of the form https://github.com/OWNER/NAME/tree/BRANCH"
        )
    return Address(match["owner"], match["name"], match["branch"])


def source_url(pyproject: str) -> str:
    """Find the `Source` entry in the text of a pyproject.toml."""
    entry = _ENTRY.search(pyproject)
    if entry is None:
        raise ValueError("pyproject.toml has no Source entry in [project.urls]")
    return entry["url"]


def address() -> Address:
    """Return the address: from the checkout this package runs in, else from the installed metadata."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if pyproject.is_file():
        text = pyproject.read_text(encoding="utf-8")
        if f'name = "{DISTRIBUTION}"' in text:
            return parse_source(source_url(text))
    for entry in metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []:
        label, _, url = entry.partition(", ")
        if label == "Source":
            return parse_source(url)
    raise ValueError(f"the installed {DISTRIBUTION} names no Source url")
