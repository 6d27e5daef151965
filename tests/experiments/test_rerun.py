"""The reader's own runs: what is chosen, how long it takes, where it is kept, and what is shown of it."""

import ast
import sys
from types import SimpleNamespace

import nbformat
import pytest

from basis.experiments import rerun as module
from basis.experiments.estimates import epochs_of, estimate
from basis.experiments.records import load_records
from basis.experiments.rerun import chosen_runs, own_folder, rerun
from basis.experiments.studies import STUDIES
from book.tools.gates import tagged
from tests.experiments.test_runs import put_record
from tests.test_house import ROOT

HALVES = ("dense", "uniform, 1/2 of parameters", "narrower dense, 1/2 of parameters")
PUBLISHED = load_records(study="headline", profile="small")


def chapters():
    """Study and variants of every chapter that trains runs of the reader's own."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        called = [cell.source for cell in notebook.cells if cell.source.startswith("rerun(")]
        if called:
            study = ast.literal_eval(ast.parse(called[0]).body[0].value.func.value.args[0])
            lines = ast.parse(tagged(notebook, "parameters")[0].source).body
            given = {line.target.id: ast.literal_eval(line.value) for line in lines}
            yield pytest.param(study, given["own_variants"], given["own_seeds"], id=path.stem)


@pytest.mark.parametrize(("study", "variants", "seeds"), list(chapters()))
def test_a_chapter_compares_two_runs_of_each_variant_in_eight_minutes_of_a_t4(study, variants, seeds):
    runs = chosen_runs(study, variants, seeds, "small")
    assert [sum(run.variant == name for run in runs) for name in variants] == [2] * len(variants)
    assert estimate(runs, "Tesla T4", PUBLISHED) < 8 * 60


def test_times_are_those_of_this_device_or_go_with_the_bandwidth_of_memory():
    runs = chosen_runs("headline", HALVES, 2, "small")
    on_h200, on_t4 = (estimate(runs, name, PUBLISHED) for name in ("NVIDIA H200", "Tesla T4"))
    assert on_t4 == pytest.approx(on_h200 * 4800 / 320)
    assert estimate(runs, "cpu", PUBLISHED) > on_t4
    assert estimate(runs, "cpu", []) is None


def test_epochs_count_what_trains_beside_the_run_itself():
    own, search = (STUDIES[name].runs("small") for name in ("own", "sensitivity"))
    tuned = next(run for run in search if run.variant == "tuned")
    assert epochs_of([tuned]) == 16 + 20 * 2
    same_teacher = [run for run in own if run.seed == 0][:2]
    assert epochs_of(same_teacher) == 16 + 2


def test_sensitivities_are_measured_first_where_none_are_published(tmp_path, monkeypatch):
    runs = chosen_runs("family", ["resnet20, dense", "resnet20, selected"], 1, "small")
    assert [run.variant for run in runs] == ["resnet20, table", "resnet20, dense", "resnet20, selected"]
    assert [run.variant for run in chosen_runs("headline", ["selected, 1/2 of parameters"], 1, "small")] == [
        "selected, 1/2 of parameters"
    ]
    assert [(r.study, r.seed) for r in chosen_runs("switch", ["dense"], 2, "small")] == [
        ("headline", 0),
        ("headline", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((["sparse"], 2), "uniform, 1/2 of parameters"), (([], 2), "variants"), ((["dense"], 0), "seeds")],
)
def test_what_cannot_be_chosen_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        chosen_runs("headline", *arguments, "small")


def test_runs_of_ones_own_stand_beside_the_published_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path / "published"))
    for run in chosen_runs("headline", HALVES, 2, "smoke"):
        put_record(tmp_path / "published", run)
    monkeypatch.setattr(module, "own_folder", lambda **_: tmp_path / "own")
    monkeypatch.setattr(module, "name_of", lambda _: "Tesla T4")
    told, calls = [], []

    def fake(order, jobs):
        """Four runs, then Stop the first time."""
        calls.append(order.tasks)
        for task in order.tasks[:4]:
            put_record(order.folder, task.run)
            yield SimpleNamespace(run=task.run, outcome="done", message="", seconds=1.0)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "in_processes", fake)
    first = rerun("headline", HALVES, profile="smoke", say=told.append)
    assert "6 runs" in told[0]
    assert "4 of 6" in first.note
    assert "Stopped" in first.note
    assert set(first.runs["whose"]) == {"published (smoke)", "yours"}
    second = rerun("headline", HALVES, profile="smoke", say=told.append)
    assert [len(tasks) for tasks in calls] == [6, 2]
    assert "2 of 2" in second.note
    assert "(n = 2)" in second.table().splitlines()[2].split("|")[3]
    third = rerun("headline", HALVES, profile="smoke", say=told.append)
    assert len(calls) == 2
    assert "All 6 runs" in third.note


@pytest.mark.parametrize(("options", "says"), [({"train": False}, "T4"), ({"time_limit": "1m"}, "nothing was trained")])
def test_nothing_is_trained_unasked_or_where_it_could_not_end(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr(module, "own_folder", lambda **_: tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "in_processes", lambda *_: pytest.fail("a training was begun"))
    found = rerun("headline", HALVES, **options)
    assert says in found.note
    assert not found.any
    assert "(n = 8)" in found.table()


@pytest.mark.parametrize(("named", "found"), [("results", "my-results"), ("other", "other"), ("", "my-results")])
def test_ones_own_runs_never_mix_with_the_published_ones(named, found, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", named and str(ROOT / named))
    assert own_folder() == ROOT / found


def test_results_are_kept_in_drive_when_asked_on_colab(monkeypatch):
    with pytest.raises(ValueError, match="BASIS_RESULTS"):
        own_folder(keep_in_drive=True)
    mounted = []
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab.drive", SimpleNamespace(mount=mounted.append))
    folder = own_folder(keep_in_drive=True)
    assert mounted
    assert folder.is_relative_to(mounted[0])
