"""Figures as files: which there are, which are wanted, what is missing. Nothing is executed here."""

import pytest

from basis import figures
from basis.cli import main
from book.tools import build


@pytest.fixture
def executed(monkeypatch):
    """The notebooks that would be executed: chapter 3 draws its figures, chapter 7 fails, others lack records."""
    asked = []

    def execute_all(sources, profile, root, folder):
        asked.extend(sources)
        for name in ("every-layer", "every-layer-curves") if "03_every_layer" in sources else ():
            figures.save(lambda theme: figures.canvas(), name=name, folder=folder)
        if "07_skip_training" in sources:
            raise build.BookError(["07_skip_training.ipynb fails in the cell"])

    monkeypatch.setattr(build, "execute_all", execute_all)
    monkeypatch.setenv("BASIS_RESULTS", "")
    return asked


@pytest.mark.parametrize(
    ("words", "notebooks", "files"),
    [
        ("every-layer --format svg png", ["03_every_layer"], 3),
        ("--chapter 3", ["03_every_layer"], 8),
        ("structured-gaps every-layer", ["03_every_layer", "09_other_structured_layers"], 4),
    ],
)
def test_only_what_is_wanted_is_executed_and_kept(words, notebooks, files, tmp_path, executed, capsys):
    assert main(["figures", *words.split(), "--out", str(tmp_path)]) == 0
    assert executed == notebooks
    assert len(list(tmp_path.iterdir())) == files == capsys.readouterr().out.count(str(tmp_path))


def test_what_cannot_be_drawn_is_named_with_what_makes_it(tmp_path, executed, capsys):
    names = ["every-layer", "selection-seconds", "cost-measured", "skip-trade", "--profile", "small"]
    assert main(["figures", *names, "--out", str(tmp_path / "out"), "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"selection-seconds is not drawn: {tmp_path} lacks records" in said
    assert f"basis run headline --profile small --results {tmp_path}" in said
    assert "basis bench" in said
    assert "07_skip_training.ipynb fails" in said
    assert "skip-trade is not" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [("every-layers", "mean every-layer"), ("--chapter 77", "'77'"), ("every-layer --format csv", "no table")],
)
def test_a_figure_chapter_or_table_that_is_not_there_is_named(words, said, tmp_path, executed, capsys):
    assert main(["figures", *words.split(), "--out", str(tmp_path / "out")]) > 0
    assert said in "".join(capsys.readouterr())


def test_all_figures_are_listed_with_chapter_and_title(executed, capsys):
    assert main(["figures", "--list"]) == 0
    assert ["every-layer", "03", "What"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert executed == []
