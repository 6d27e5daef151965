"""Every chapter runs as its readers run it: with its first exercise done, without records, and training.

That every chapter runs as published is checked by `make book`.
"""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from basis.environment import repository_root
from basis.experiments.studies import STUDIES
from book.tools import gates
from book.tools.build import execute, known_parameters

ROOT = repository_root()
FIRST_EXERCISE = {
    "00_start_here": {"budget": 0.25},
    "01_what_is_a_basis_convolution": {"profile": "small", "basis_channels": 64},
    "02_what_does_it_cost": {"ratio": 0.25},
    "03_every_layer": {"profile": "small", "budget": 0.25},
    "04_which_layers": {"measure": "spectrum"},
    "05_choosing_layers": {"profile": "small", "budget": 0.25},
    "06_smaller_coefficients": {"spoken": 0.25},
    "07_skip_training": {"schedule": "B frozen at half"},
    "08_resnet_family": {"network": "resnet56"},
    "09_other_structured_layers": {"layer": "shuffle:2"},
    "10_making_it_fast": {"ratio": 0.5},
    "11_your_own_network": {"budget": 0.25},
    "12_switch_on_the_way": {"profile": "small", "after": 0.7},
}


def run(stem, **parameters):
    """The executed notebook; anything that a page may not show is a failure."""
    source = ROOT / "notebooks" / f"{stem}.ipynb"
    notebook = execute(source, parameters, ROOT).notebook
    assert gates.executed_problems(notebook, source.name) == []
    return notebook


def run_all(parameters):
    """All chapters, two at a time, each as the future of its notebook."""

    def parameters_of(stem):
        lacks = {"profile", "run_missing"} - known_parameters(ROOT / "notebooks" / f"{stem}.ipynb")
        return {name: value for name, value in {**parameters(stem), "run_missing": False}.items() if name not in lacks}

    with ThreadPoolExecutor(max_workers=2) as pool:
        return {stem: pool.submit(run, stem, **parameters_of(stem)) for stem in FIRST_EXERCISE}


@pytest.fixture(scope="module")
def exercised() -> dict[str, Future]:
    return run_all(FIRST_EXERCISE.get)


@pytest.fixture(scope="module")
def without_records(tmp_path_factory) -> dict[str, Future]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASIS_RESULTS", str(tmp_path_factory.mktemp("empty")))
        return run_all(lambda stem: {"profile": "paper"})


def texts(notebook):
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "\n".join(o.data.get("text/markdown", "") for o in outputs if "data" in o)


def test_without_records_the_third_chapter_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    text = texts(run("03_every_layer", profile="paper", run_missing=False))
    assert "Not known yet" in text
    assert f"0 of {len(STUDIES['headline'].runs('paper'))} runs of the profile `paper`" in text


def test_every_chapter_has_its_first_exercise_here():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(FIRST_EXERCISE)


@pytest.mark.weekly
@pytest.mark.parametrize("stem", FIRST_EXERCISE)
def test_the_first_exercise_works(stem, exercised):
    assert texts(exercised[stem].result())


@pytest.mark.weekly
@pytest.mark.parametrize("stem", FIRST_EXERCISE)
def test_without_records_a_chapter_says_what_is_missing(stem, without_records):
    text = texts(without_records[stem].result())
    assert stem.startswith(("00", "01", "02")) or "Not known yet" in text


@pytest.mark.weekly
def test_a_chapter_without_a_gpu_says_what_its_runs_would_take(tmp_path, monkeypatch):
    source = ROOT / "notebooks" / "03_every_layer.ipynb"
    notebook = execute(source, {"profile": "small", "run_missing": True, "time_limit": "8s"}, ROOT).notebook
    assert "6 runs would take" in texts(notebook)


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("stem", "said"),
    [
        ("02_what_does_it_cost", "No benchmark of a GPU is stored."),
        ("10_making_it_fast", "on a GPU nothing was measured"),
    ],
)
def test_where_a_gpu_record_is_missing_the_page_says_so(stem, said, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    shutil.copytree(ROOT / "results" / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("*-cuda-*"))
    assert said in texts(run(stem))
