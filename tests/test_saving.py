"""Files on any file system and in any encoding, and foreign errors in one sentence."""

import errno
import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from basis.export import export_onnx, export_program
from basis.saving import LOST, Unwritable, plain, replacing, write_json
from basis.text import first_line
from tests.unusual import Of


def refusing(code):
    def refuse(*_, **__):
        raise OSError(code, "not here") if code else OSError("not here")

    return refuse


# -- file systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, None, *LOST])
def test_a_file_system_may_refuse_modes_and_syncing_but_not_lose_anything(tmp_path, monkeypatch, code):
    write_json(tmp_path / "a.json", 1)
    for name in ("chmod", "fsync")[code in LOST :]:
        monkeypatch.setattr(os, name, refusing(code))
    with pytest.raises(Unwritable, match=r"a\.json could not be written") if code in LOST else nullcontext():
        write_json(tmp_path / "a.json", 2)
    assert json.loads((tmp_path / "a.json").read_text()) == 1 + (code not in LOST)
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_mode_is_that_of_the_file_before_or_follows_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        for before, mode in ((None, 0o640), (0o604, 0o604)):
            if before:
                (tmp_path / "new.json").chmod(before)
            write_json(tmp_path / "new.json", 1)
            assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == mode
    finally:
        os.umask(former)


def test_names_may_be_as_long_as_the_file_system_takes_them_and_of_any_bytes(tmp_path):
    for name in ("n" * 255, "é" * 127, os.fsdecode(b"caf\xe9.json")):
        with replacing(tmp_path / name) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    with pytest.raises(Unwritable, match="name a shorter one"):
        write_json(tmp_path / ("n" * 256), 1)


@pytest.mark.parametrize(
    ("code", "says", "silent"),
    [
        (errno.ENOSPC, "make room", "allow"), (errno.EDQUOT, "make room", "allow"), (errno.EROFS, "allow", "room"),
        (errno.EACCES, "allow", "room"), (errno.ENOLCK, "run the command again", "room"), (None, "not here", "None"),
    ],
)  # fmt: skip
def test_what_helps_depends_on_what_is_wrong(tmp_path, monkeypatch, code, says, silent):
    monkeypatch.setattr(os, "replace", refusing(code))
    with pytest.raises(Unwritable, match=says) as caught:
        write_json(tmp_path / "a.json", 1)
    assert silent not in str(caught.value).partition("could not")[2]


def test_numbers_of_numpy_and_paths_and_odd_names_are_plain(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    value = {odd: [np.int64(3), np.float32(0.5), np.bool_(True), np.arange(2), Path("a")], "nan": np.float32("nan")}
    write_json(tmp_path / "a.json", value)
    read = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert read[odd] == [3, 0.5, True, [0, 1], "a"]
    assert plain(value)["nan"] is None


# -- errors of others -------------------------------------------------------------------------------


def raised(*texts, explicit=True):
    """The first of these errors, each raised because of, or while handling, the next."""
    inner = None
    for text in reversed(texts):
        error = RuntimeError(text)
        error.__cause__, error.__context__ = (inner, None) if explicit else (None, inner)
        error.__suppress_context__, inner = explicit, error
    return inner


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("one\n  two\n\nthree"), "one two"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("stem"), "KeyError: 'stem'"),
        (FileNotFoundError(2, "No such file", "a.pt"), "No such file: a.pt"),
        (RuntimeError("\x1b[31mred\x1b[0m reason"), "red reason"),
        (raised("outer", "inner"), "outer (inner)"),
        (raised("outer", "inner", explicit=False), "outer (inner)"),
        (raised("", "middle", ""), "middle"),
        (raised("all of it: inner", "inner"), "all of it: inner"),
        (raised("Failed to export the model. \x1b[96mThis is step 1/3\x1b[0m of it. Next steps:\n- Debug", "a branch"),
         "a branch"),
        (RuntimeError("Caught one.\nTraceback (most recent call last):\n  File\n    x\nValueError: why"),
         "ValueError: why"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_with_its_innermost_cause(error, says):
    assert first_line(error) == says


@pytest.mark.parametrize(
    ("step", "export", "says"),
    [
        (lambda y: y * 2 if y.sum() > 0 else y, export_onnx, "data-dependent"),
        (lambda y: y * 2 if y.sum() > 0 else y, export_program, "data-dependent"),
        (torch.special.bessel_j0, export_onnx, "No ONNX function found.*bessel_j0"),
    ],
)
def test_the_reasons_of_real_exporters_come_through(tmp_path, step, export, says):
    with pytest.raises(RuntimeError, match=says) as caught:
        export(Of(lambda m, x: step(m.fc(x)), fc=nn.Linear(3, 2)), tmp_path / "file", (3,))
    assert not any(bad in str(caught.value) for bad in ("\x1b", "\n", "Next steps", "Traceback", "step 1/3", "⬆"))
