"""Progress: bars where somebody watches, a few plain lines where nobody does."""

import io
import sys
from types import SimpleNamespace

import pytest

from basis import progress
from basis.progress import Lines, bar


@pytest.fixture
def place(monkeypatch):
    """Makes the process look like one in a notebook, a terminal, or with a log file; gives what is written there."""

    def make(*, allow_stdin=None, terminal=False, widgets=False):
        err, out = io.StringIO(), io.StringIO()
        err.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "stdout", out)
        kernel = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": allow_stdin}})
        shell = None if allow_stdin is None else SimpleNamespace(kernel=kernel)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        monkeypatch.setattr(progress, "find_spec", lambda name: widgets or None)
        return out if shell else err

    return make


@pytest.mark.parametrize(
    ("where", "plain"),
    [
        ({}, True), ({"terminal": True}, False), ({"allow_stdin": False}, True),
        ({"allow_stdin": False, "terminal": True, "widgets": True}, True), ({"allow_stdin": True}, False),
    ],
    ids=["log", "terminal", "papermill", "papermill in a terminal", "notebook"],
)  # fmt: skip
def test_a_bar_moves_only_where_somebody_watches(place, where, plain):
    written = place(**where)
    assert list(bar([1, 2], shown=False)) == [1, 2]  # nor anywhere where nothing is to be shown
    with bar(total=3, desc="training", unit="step") as shown:
        shown.update(3)
        shown.write("a word between")
    text = written.getvalue()
    assert ("\r" not in text) == plain
    assert ("step 3 of 3" in text) == plain
    assert text.count("\n") - text.count("a word between") == plain


def test_watched_notebooks_with_ipywidgets_get_widgets(place, monkeypatch):
    place(allow_stdin=True, widgets=True)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", SimpleNamespace(tqdm=lambda *a, **options: options["total"]))
    assert bar(total=7) == 7


def test_lines_are_few_and_the_last_one_says_where_it_ended(place, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    written = place()
    shown = bar(total=100, desc="run 3 of 22", unit="step")
    assert isinstance(shown, Lines)
    for _ in range(90):  # a minute and a half
        now[0] += 1
        shown.update()
        shown.set_postfix_str("accuracy 12 %")
    shown.close()
    lines = written.getvalue().splitlines()
    assert ["step 30 of 100" in lines[0], len(lines)] == [True, 4]
    assert "run 3 of 22: step 90 of 100" in lines[-1]
    assert "accuracy 12 %" in lines[-1]
