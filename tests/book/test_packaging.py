import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def listed(text, key):
    """The strings of one list in pyproject.toml (tomllib is not there on Python 3.10)."""
    return re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1])


def test_conda_users_get_the_same_list():
    pyproject = (ROOT / "pyproject.toml").read_text()
    keys = ("dependencies", "notebooks", "book", "onnx", "vision", "test")
    wanted = [package for key in keys for package in listed(pyproject, key) if "[" not in package]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = re.search(r'requires-python = "(.+)"', pyproject)[1]
    assert f"python{python},<3.14" in conda  # the pins of constraints.txt have no wheels beyond
    assert "pip" in conda
    pip = next(item["pip"] for item in conda if isinstance(item, dict))
    assert "--editable ." in pip
    assert sorted(item for item in pip if not item.startswith("-")) == sorted(wanted)


def test_dependencies_are_floors():
    """A pin would change the torch or numpy that somebody has."""
    for package in listed((ROOT / "pyproject.toml").read_text(), "dependencies"):
        assert re.fullmatch(r"[\w-]+>=[\d.]+", package), package
