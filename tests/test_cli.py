"""The command line: help at once and in words, and one sentence on what is missing."""

import re
import subprocess
import sys

import pytest

import basis
from basis.cli import COMMANDS, main


@pytest.mark.parametrize("arguments", [[], ["--version"]])
def test_help_and_version_need_no_torch(arguments):
    code = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); from basis.cli import main; "
    done = subprocess.run([sys.executable, "-c", f"{code} main({arguments})"], capture_output=True, text=True)
    said, _, loaded = done.stdout.strip().rpartition("\n")
    assert (done.returncode, loaded) == (0, "False")
    assert arguments or all(f"    {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("words", [*COMMANDS, "dev table", "bench train", "bench budget", "bench gpu"])
def test_every_option_is_explained(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*words.split(), "--help"])
    assert not re.findall(r"^  -(?:(?!  ).)*\n(?! {9})", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("words", ["status", "dev table", "export a.tar.gz", "book", "figures --list", "dev sync"])
def test_outside_a_checkout_a_command_says_what_to_do(words, tmp_path, monkeypatch, capsys):
    for module in ("basis.environment", "basis.commands.book"):
        monkeypatch.setattr(f"{module}.repository_root", lambda: None)
    monkeypatch.delenv("BASIS_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert "git clone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_public_names_are_imported_when_they_are_asked_for():
    everything = {}
    exec("from basis import *", everything)
    assert set(basis.__all__) <= set(everything) & set(dir(basis))
    assert basis.train is sys.modules["basis.training.loop"].train
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        basis.trian  # noqa: B018
