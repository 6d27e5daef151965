"""README.md: its snippets run as they stand, and its commands are commands."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from basis.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^basis .*?(?=  #|$)", README, re.MULTILINE)


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    assert {"search.jsonl", "small.onnx"} <= {path.name for path in tmp_path.iterdir()}
    assert len(names["result"].switched["layers"]) > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command, monkeypatch):
    understand = argparse.ArgumentParser.parse_args

    def parse(parser, arguments):
        return argparse.Namespace(**vars(understand(parser, arguments)) | {"command": lambda options: 0})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    assert main(shlex.split(command)[1:]) == 0
