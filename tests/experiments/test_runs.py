"""Runs and records: identities, atomic writing, refusals, resuming, time limits, several processes."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import time

import filelock
import pytest

from basis.cli import main
from basis.data import DataError
from basis.experiments import runs
from basis.experiments.runs import Run, load_records, parse_duration, read_record, record_path, work
from basis.experiments.studies import STUDIES, check_records, find_study, status, valid_records
from basis.saving import RecordError, write_json
from basis.search.table import SensitivityTable
from basis.training.loop import Recipe, TrainingPaused
from book.tools import pages

STUDY = STUDIES["headline"]
DENSE = [run for run in STUDY.runs("smoke") if run.choice is run.ladder is None]
LIKE_DENSE = sum(run.width == DENSE[0].width and run.ladder is None for run in STUDY.runs("smoke"))


def empty_table(measure):
    """The lines of a table of a network without convolutions."""
    parts = {"measure": measure, "layers": (), "cells": (), "skipped": {}, "fingerprint": {}, "baseline": {}}
    return SensitivityTable(**parts, total=dict.fromkeys(("params", "macs", "backward_macs"), 10)).to_lines()


def fake_result(run, accuracy=0.9):
    """What ``run`` might have left, but for the size of its network."""
    epochs, held = run.recipe.epochs, {"loss": 0.5, "accuracy": accuracy, "accuracy_flip": accuracy}
    images = min({"cifar10": 50000, "synthetic": 2000}[run.data] - run.validation, run.images or 50000)
    row = {"train_loss": 0.5, "train_accuracy": accuracy, "seconds": 2.0 / epochs}
    left = {"tables": {name: empty_table(name) for name in run.ladder.measures}} if run.ladder else {}
    return left | {
        "curves": [{"epoch": n, **row} for n in range(1, epochs + 1)],
        "test": None if run.test is False else held,
        "validation": held if run.validation else None,
        "train_seconds": 2.0,
        "steps": epochs * (images // run.recipe.batch_size),
        "images_per_second": 100.0,
        "parameters": 10,
        "macs": 10,
    }


def put_record(folder, run, *, definition=STUDY.definition, **changes):
    record = {
        "version": runs.VERSION,
        "id": run.id,
        "config": run.config,
        "result": fake_result(run),
        "environment": {"device": "test", "device_type": runs.DEVICES.get(run.profile, "cpu")},
        "definition": definition,
    }
    path = record_path(folder, run)
    write_json(path, record | changes)
    return path


@pytest.fixture
def instant(monkeypatch):
    """Runs that finish at once; the list of those that were done."""
    done = []

    def execute(run, **options):
        done.append(run)
        return fake_result(run)

    monkeypatch.setattr(runs, "execute", execute)
    return done


def test_equal_configurations_have_equal_identities_and_any_change_another():
    run = Run(study="headline", profile="smoke", variant="dense", seed=0)
    assert run.id == Run(study="headline", profile="smoke", variant="dense", seed=0).id
    changed = [dataclasses.replace(run, seed=1), dataclasses.replace(run, recipe=Recipe(lr=0.1))]
    assert len({run.id, *(r.id for r in changed)}) == 3
    assert json.loads(json.dumps(run.config)) == run.config
    assert runs.identity(run.config | {"a_later_field": None}) == run.id


def test_all_runs_of_all_studies_differ():
    everything = [run for study in STUDIES.values() for p in runs.PROFILES for run in study.runs(p)]
    assert len({run.id for run in everything}) == len(everything) > 50


def test_seeds_come_before_arms_so_that_unfinished_studies_compare_all():
    table, *first = STUDY.runs("paper")[:11]
    assert table.variant == "table"
    assert [run.seed for run in first] == [0] * 5 + [1] * 5
    assert [run.variant for run in first[:5]] == [run.variant for run in first[5:]]


def test_a_record_is_written_whole_and_read_back(tmp_path):
    run = STUDY.runs("smoke")[0]
    path = put_record(tmp_path, run)
    assert read_record(path).config == run.config
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(load_records(tmp_path)) == 1
    assert load_records(tmp_path, profile="paper") == []


def test_a_full_disk_loses_nothing_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("{}")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"record.json could not be written \(No space left.*make room"):
        write_json(path, {"much": 1})
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{not json", "is not a JSON record"),
        ("[1, 2]", "has record version None, but this package reads version 1"),
        ('{"version": 7}', "has record version 7, but"),
        ('{"version": 1, "id": "x"}', "lacks config, result, environment, definition"),
        (
            '{"version": 1, "id": "x", "config": {}, "result": {}, "environment": {}, "definition": "", "mood": 1}',
            "holds mood, which no record has",
        ),
    ],
)
def test_bad_records_are_refused_in_one_sentence(tmp_path, content, says):
    path = tmp_path / "headline" / "smoke" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RecordError, match=says):
        load_records(tmp_path)
    assert any(re.search(says, problem) for problem in check_records(tmp_path))


def test_records_that_the_book_may_not_show_are_named(tmp_path):
    first, second, third = STUDY.runs("smoke")[:3]
    put_record(tmp_path, first)
    assert check_records(tmp_path) == []
    put_record(tmp_path, second, definition="0" * 16)
    assert "changed its claims or rule" in check_records(tmp_path)[0]
    stranger = dataclasses.replace(third, seed=99)
    put_record(tmp_path, second)
    put_record(tmp_path, stranger)
    assert "does not list" in check_records(tmp_path)[0]
    put_record(tmp_path, stranger, config=stranger.config | {"seed": 5})
    assert "was changed after it was written" in check_records(tmp_path)[0]


def test_the_definition_changes_with_the_rule():
    assert dataclasses.replace(STUDY, rule="another").definition != STUDY.definition


def test_the_committed_records_may_all_be_shown():
    assert check_records() == []


def test_finished_runs_are_not_done_again(tmp_path, instant):
    plan = STUDY.runs("smoke")
    put_record(tmp_path, plan[1])
    steps = list(work(plan, STUDY.definition, folder=tmp_path, device="cpu"))
    assert [s.outcome for s in steps] == ["done"] * (len(plan) - 1)
    assert plan[1] not in instant
    assert list(work(plan, STUDY.definition, folder=tmp_path, device="cpu")) == []
    assert len(load_records(tmp_path)) == len(plan)
    assert not list(tmp_path.rglob("*.lock"))


def test_runs_made_under_another_rule_are_done_again_and_not_shown(tmp_path, instant):
    run = STUDY.runs("smoke")[0]
    put_record(tmp_path, run, definition="0" * 16)
    assert valid_records(STUDY, "smoke", tmp_path) == []
    list(work([run], STUDY.definition, folder=tmp_path, device="cpu"))
    assert instant == [run]
    assert len(valid_records(STUDY, "smoke", tmp_path)) == 1


def test_leftovers_of_a_killed_process_go_when_its_run_is_done(tmp_path, instant):
    run = STUDY.runs("smoke")[0]
    path = record_path(tmp_path, run)
    path.parent.mkdir(parents=True)
    leftover = path.with_name(f"{path.name}.abc.tmp")
    leftover.write_text("half a rec")
    list(work([run], STUDY.definition, folder=tmp_path, device="cpu"))
    assert not leftover.exists()


@pytest.mark.parametrize("error", [DataError("no data"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_would_fail_every_run_stops_the_study(tmp_path, monkeypatch, error):
    begun = []

    def execute(run, **options):
        begun.append(run)
        raise error

    monkeypatch.setattr(runs, "execute", execute)
    with pytest.raises((DataError, RecordError), match=r"no data|No space left"):
        list(work(STUDY.runs("smoke"), STUDY.definition, folder=tmp_path, device="cpu"))
    assert len(begun) == 1


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path, instant):
    plan = STUDY.runs("smoke")[:2]
    path = record_path(tmp_path, plan[0])
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        list(work(plan, STUDY.definition, folder=tmp_path, device="cpu"))
    assert instant == [plan[1]]


@pytest.mark.parametrize("call", ["pathlib.Path.mkdir", "filelock.FileLock.acquire"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(tmp_path, instant, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(call, full)
    with pytest.raises(RecordError, match=r"smoke could not be written \(No space left.*make room"):
        list(work(STUDY.runs("smoke"), STUDY.definition, folder=tmp_path, device="cpu"))
    assert instant == []


def test_nothing_is_begun_after_the_deadline(tmp_path, instant):
    late = time.monotonic() - 1
    assert list(work(STUDY.runs("smoke"), STUDY.definition, folder=tmp_path, device="cpu", deadline=late)) == []
    assert instant == []


def test_failures_and_pauses_are_reported_and_leave_no_record(tmp_path, monkeypatch):
    def execute(run, **options):
        raise ValueError("no such network") if run.seed else TrainingPaused("stopped after epoch 1")

    monkeypatch.setattr(runs, "execute", execute)
    steps = list(work(STUDY.runs("smoke"), STUDY.definition, folder=tmp_path, device="cpu"))
    assert {(s.run.seed, s.outcome) for s in steps} == {(100, "failed"), (0, "paused"), (1, "failed")}
    assert "ValueError: no such network" in steps[-1].message
    assert load_records(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("9m", 540), ("1h", 3600), ("1h30m", 5400), ("2m5s", 125), ("45", 45)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "9x", "m", "-5m"])
def test_wrong_durations_show_a_right_one(text):
    with pytest.raises(ValueError, match="write it like 90s, 9m or 1h30m"):
        parse_duration(text)


def test_status_counts(tmp_path):
    put_record(tmp_path, DENSE[0])
    row = status(tmp_path).set_index(["study", "profile"]).loc[("headline", "smoke")]
    assert (row["done"], row["missing"], row["seconds"]) == (1, len(STUDY.runs("smoke")) - 1, {"cpu": 2.0})
    # The one record tells the time of all that train its network, but not of narrower ones, nor of the measured one.
    assert row["expected"] == {"cpu": pytest.approx(2.0 * (LIKE_DENSE - 1))}
    assert row["unknown"] == row["missing"] - (LIKE_DENSE - 1) > 0


def test_times_of_cpus_and_gpus_are_never_added_up(tmp_path):
    first, second, third = [run for run in STUDY.runs("smoke") if run.width == DENSE[0].width][1:4]
    put_record(tmp_path, first)
    fast = fake_result(second) | {"train_seconds": 0.5, "setup_seconds": 0.25}
    put_record(tmp_path, second, result=fast, environment={"device": "x", "device_type": "cuda", "jobs": 3})
    row = status(tmp_path).set_index(["study", "profile"]).loc[("headline", "smoke")]
    assert row["seconds"] == {"cpu": 2.0, "cuda": 0.25}
    assert row["expected"] == {"cpu": pytest.approx(2.0 * (LIKE_DENSE - 2))}
    assert pages.human_times(row["seconds"]) == "2 s CPU, under 1 s GPU"
    paper = STUDY.runs("paper")[0]
    put_record(tmp_path, paper, environment={"device": "x", "device_type": "cpu"})
    assert "it was made on a cpu device, but the profile paper is for cuda devices" in check_records(tmp_path)[0]
    with pytest.raises(
        ValueError, match="'paper' is for cuda devices, but the device is cpu; it may do smoke, small, cpu"
    ):
        list(work([paper], STUDY.definition, folder=tmp_path, device="cpu"))
    assert record_path(tmp_path, third).parent == tmp_path / "headline" / "smoke"


def test_a_corrupted_record_and_a_foreign_file_stop_no_other_run(tmp_path, instant):
    plan = STUDY.runs("smoke")[:2]
    path = put_record(tmp_path, plan[0])
    path.write_bytes(path.read_bytes()[:100])
    foreign = path.with_name("notes.json")
    foreign.write_text('["mine"]')
    steps = list(work(plan, STUDY.definition, folder=tmp_path, device="cpu"))
    assert [step.outcome for step in steps] == ["failed", "done"]
    assert f"{path} is not a JSON record" in steps[0].message
    assert len(path.read_bytes()) == 100
    assert foreign.exists()
    assert sorted(problem.split()[0] for problem in check_records(tmp_path)) == sorted([str(path), str(foreign)])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["run", "nothing"], "there is no study 'nothing'; there are: cost, headline"),
        (["run", "headline", "--jobs", "0"], "--jobs is 0"),
        (["run", "headline", "--profile", "huge"], "invalid choice: 'huge'"),
        (["run", "headline", "--time-limit", "soon"], "'soon' is not a duration"),
        (["run", "headline", "--device", "gpu"], "'gpu' is no device of this machine"),
        (["bench", "layer", "--device", "cuda:99"], "'cuda:99' is no device of this machine"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(command, says, capsys):
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["book", "sync"])
def test_the_command_says_how_to_get_the_tools_of_the_book(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "book.tools.build", None)
    monkeypatch.setitem(sys.modules, "book.tools.derived", None)
    assert main([command]) == 2
    assert "is not installed; `pip install -e '.[book]'` adds it" in capsys.readouterr().err


def test_find_study_lists_the_known():
    with pytest.raises(ValueError, match="there are: cost, headline"):
        find_study("x")


@pytest.mark.slow
def test_killed_and_shared_studies_lose_nothing(tmp_path):
    """Two real processes on one folder; one is killed; a third call finishes. No run is done twice."""
    command = [sys.executable, "-m", "basis.cli", "run", "skip", "--profile", "smoke", "--results", str(tmp_path)]
    command += ["--jobs", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    study = STUDIES["skip"]
    workers = [subprocess.Popen([*command, "--quiet", "--device", "cpu"], env=env) for _ in range(2)]
    until = time.monotonic() + 120
    while not load_records(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    workers[0].kill()
    assert workers[1].wait(timeout=240) == 0
    before = {r.id: r.environment["date"] for r in load_records(tmp_path)}
    assert main([*command[3:], "--quiet", "--device", "cpu"]) == 0
    records = load_records(tmp_path)
    assert {r.id for r in records} == {run.id for run in study.runs("smoke")}
    assert all(r.environment["date"] == before[r.id] for r in records if r.id in before)
    assert check_records(tmp_path) == []
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.pt"))
    verdicts = study.verdicts(records, "smoke")
    assert [v.claim for v in verdicts] == list(study.claims)
