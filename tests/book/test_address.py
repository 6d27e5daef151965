from pathlib import Path

import pytest

from book.tools.address import Address, address, parse_source, source_url

ROOT = Path(__file__).resolve().parents[2]
HERE = Address("someone", "thing", "main")


def test_address_is_the_one_in_pyproject():
    url = source_url((ROOT / "pyproject.toml").read_text())
    here = address()
    assert url == f"https://github.com/{here.owner}/{here.name}/tree/{here.branch}"


def test_links_follow_from_the_address():
    assert HERE.repository == "https://github.com/someone/thing"
    assert HERE.blob("a/b.py") == "https://github.com/someone/thing/blob/main/a/b.py"
    assert HERE.tree("a") == "https://github.com/someone/thing/tree/main/a"
    assert HERE.colab("n.ipynb") == "https://colab.research.google.com/github/someone/thing/blob/main/n.ipynb"
    assert Address("SomeOne", "thing", "main").pages == "https://someone.github.io/thing/"


def test_branch_may_contain_a_slash():
    assert parse_source("https://github.com/a/b/tree/feature/x").branch == "feature/x"


@pytest.mark.parametrize("url", ["", "https://github.com/a/b", "https://example.org/a/b/tree/main"])
def test_other_urls_are_refused_by_name(url):
    with pytest.raises(ValueError, match="OWNER/NAME/tree/BRANCH"):
        parse_source(url)


def test_a_pyproject_without_source_is_refused():
    with pytest.raises(ValueError, match="no Source"):
        source_url("[project.urls]\nHomepage = 'x'\n")


def test_the_address_is_written_nowhere_else():
    """Owner and name together may stand in pyproject.toml and in what `basis dev sync` writes."""
    here = address()
    needle = f"{here.owner}/{here.name}"
    derived = {ROOT / "README.md", ROOT / "CITATION.cff", *(ROOT / "notebooks").glob("*.ipynb")}
    files = [
        path
        for pattern in ("basis/**/*.py", "book/*.*", "book/_ext/*.py", "tests/*.py", "*.*", ".github/**/*.*")
        for path in ROOT.glob(pattern)
        if path.is_file() and path.name != "pyproject.toml" and path not in derived
    ]
    assert [path for path in files if needle in path.read_text(errors="replace")] == []
