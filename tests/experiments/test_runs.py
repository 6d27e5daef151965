"""Runs and records: identities, writing whole, refusals, finished runs, failures, durations."""

import dataclasses
import errno
import json
import time

import filelock
import pytest

from basis.data import DataError
from basis.experiments import runner, runs
from basis.experiments.execution import TableMissing, choose
from basis.experiments.records import VERSION, identity
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import Choice, Run, duration, load_records, read_record, record_path
from basis.experiments.studies import STUDIES, check_records, valid_records
from basis.saving import RecordError, write_json
from basis.search.table import SensitivityTable
from basis.training.loop import Recipe, TrainingPaused

STUDY = STUDIES["headline"]
SMOKE = STUDY.runs("smoke")
DENSE = [run for run in SMOKE if run.choice is run.ladder is None]


def empty_table(measure):
    """The lines of a table of a network without convolutions."""
    parts = {"measure": measure, "layers": (), "cells": (), "skipped": {}, "fingerprint": {}, "baseline": {}}
    return SensitivityTable(**parts, total=dict.fromkeys(("params", "macs", "backward_macs"), 10)).to_lines()


def fake_result(run, accuracy=0.9):
    """What ``run`` might have left, but for the size of its network."""
    epochs, held = run.recipe.epochs, {"loss": 0.5, "accuracy": accuracy, "accuracy_flip": accuracy}
    row = {"train_loss": 0.5, "train_accuracy": accuracy, "seconds": 2.0 / epochs}
    left = {"tables": {name: empty_table(name) for name in run.ladder.measures}} if run.ladder else {}
    return left | {
        "curves": [{"epoch": n, **row} for n in range(1, epochs + 1)],
        "test": None if run.test is False else held,
        "validation": held if run.validation else None,
        "train_seconds": 2.0, "steps": 10, "images_per_second": 100.0, "parameters": 10, "macs": 10,
    }  # fmt: skip


def put_record(folder, run, *, definition=STUDY.definition, **changes):
    environment = {"device": "test", "device_type": runs.DEVICES.get(run.profile, "cpu")}
    record = {"version": VERSION, "id": run.id, "config": run.config, "result": fake_result(run)}
    path = record_path(folder, run)
    write_json(path, record | {"environment": environment, "definition": definition} | changes)
    return path


@pytest.fixture
def instant(monkeypatch):
    """Runs that finish at once; the list of those that were done."""
    done = []

    def execute(run, **options):
        done.append(run)
        return fake_result(run)

    monkeypatch.setattr(runner, "execute", execute)
    return done


def do(some, folder, **options):
    tasks = [Task(run, STUDY.definition) for run in some]
    return list(in_processes(Order(tasks=tasks, folder=folder, device="cpu", **options), 1))


# -- identities ---------------------------------------------------------------------------------------


def test_an_identity_is_what_was_done_not_where_it_belongs():
    run = Run(study="headline", profile="smoke", variant="dense", seed=0)
    same = [dataclasses.replace(run), dataclasses.replace(run, study="skip"), dataclasses.replace(run, profile="paper")]
    assert {one.id for one in same} == {run.id}
    others = [dataclasses.replace(run, seed=1), dataclasses.replace(run, recipe=Recipe(lr=0.1))]
    others.append(dataclasses.replace(run, variant="another"))
    assert len({one.id for one in (run, *others)}) == 4
    assert json.loads(json.dumps(run.config)) == run.config
    assert identity(run.config | {"a_later_field": None}) == run.id


def test_an_identity_stays_for_ever():
    default = Run(study="s", profile="p", variant="v", seed=0, recipe=Recipe(epochs=1))
    assert default.id == "2c62f0152f503e8c"


# -- records ------------------------------------------------------------------------------------------


def test_a_record_is_written_whole_and_read_back(tmp_path):
    path = put_record(tmp_path, SMOKE[0])
    assert read_record(path).config == SMOKE[0].config
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert len(load_records(tmp_path)) == 1
    assert load_records(tmp_path, profile="paper") == []


@pytest.mark.parametrize(
    "content", ["{not json", "[1]", '{"version": 7}', '{"version": 1, "id": "x"}', '{"version": 1, "mood": 1}']
)
def test_bad_records_are_refused_by_name(tmp_path, content):
    path = tmp_path / "headline" / "smoke" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RecordError, match=r"x\.json is not a"):
        load_records(tmp_path)
    assert str(path) in check_records(tmp_path)[0]


def test_records_that_the_book_may_not_show_are_named(tmp_path):
    first, second, third = SMOKE[:3]
    put_record(tmp_path, first)
    assert check_records(tmp_path) == []
    put_record(tmp_path, second, definition="0" * 16)
    assert "rule" in check_records(tmp_path)[0]
    put_record(tmp_path, second)
    stranger = dataclasses.replace(third, seed=99)
    put_record(tmp_path, stranger)
    assert "does not list" in check_records(tmp_path)[0]
    put_record(tmp_path, stranger, config=stranger.config | {"seed": 5})
    assert "was changed" in check_records(tmp_path)[0]


def test_the_committed_records_may_all_be_shown():
    assert check_records() == []


# -- doing runs ---------------------------------------------------------------------------------------


def test_finished_runs_are_not_done_again_but_those_of_another_rule_are(tmp_path, instant):
    put_record(tmp_path, SMOKE[1])
    put_record(tmp_path, SMOKE[2], definition="0" * 16)
    assert len(valid_records(STUDY, "smoke", tmp_path)) == 1
    leftover = record_path(tmp_path, SMOKE[3]).with_suffix(".json.abc.tmp")
    leftover.write_text("of a process that was killed")
    assert [s.outcome for s in do(SMOKE, tmp_path)] == ["done"] * (len(SMOKE) - 1)
    assert SMOKE[1] not in instant
    assert do(SMOKE, tmp_path) == []
    assert len(valid_records(STUDY, "smoke", tmp_path)) == len(SMOKE)
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".json"}


@pytest.mark.parametrize("error", [DataError("no data"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_would_fail_every_run_stops_the_study(tmp_path, monkeypatch, error):
    begun = []

    def execute(run, **options):
        begun.append(run)
        raise error

    monkeypatch.setattr(runner, "execute", execute)
    with pytest.raises((DataError, RecordError), match=r"no data|No space left"):
        do(SMOKE, tmp_path)
    assert len(begun) == 1


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path, instant):
    path = record_path(tmp_path, DENSE[0])
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        do(DENSE[:2], tmp_path)
    assert instant == [DENSE[1]]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_stops_nothing(tmp_path, instant, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "broken")

    monkeypatch.setattr("fcntl.flock", refuse)
    if code == errno.EIO:  # which is no missing lock
        with pytest.raises(RecordError, match=r"could not be written \(broken.*run the command again"):
            do(DENSE[:2], tmp_path)
        return
    with pytest.warns(UserWarning, match="lock"):
        steps = [*do(DENSE[:2], tmp_path), *do(DENSE[:2], tmp_path)]
    assert [step.outcome for step in steps] == ["done", "done"]
    assert instant == DENSE[:2]


def test_nothing_is_begun_after_the_deadline(tmp_path, instant):
    assert do(SMOKE, tmp_path, deadline=time.time() - 1) == []
    assert instant == []


def test_failures_and_pauses_are_reported_and_leave_no_record(tmp_path, monkeypatch):
    def execute(run, **options):
        raise ValueError("no such network") if run.seed else TrainingPaused("stopped after epoch 1")

    monkeypatch.setattr(runner, "execute", execute)
    steps = do(SMOKE, tmp_path)
    assert {(s.run.seed, s.outcome) for s in steps} == {(100, "failed"), (0, "paused"), (1, "failed")}
    assert all(("no such network" in step.message) == bool(step.run.seed == 1) for step in steps[1:])
    assert load_records(tmp_path) == []


def test_a_corrupted_record_and_a_foreign_file_stop_no_other_run(tmp_path, instant):
    path = put_record(tmp_path, DENSE[0])
    path.write_bytes(path.read_bytes()[:100])
    foreign = path.with_name("notes.json")
    foreign.write_text('["mine"]')
    steps = do(DENSE[:2], tmp_path)
    assert [step.outcome for step in steps] == ["failed", "done"]
    assert str(path) in steps[0].message
    assert len(path.read_bytes()) == 100
    assert foreign.read_text() == '["mine"]'


def test_a_profile_is_for_its_kind_of_device():
    assert runs.device_for("cpu").type == "cpu"
    with pytest.raises(ValueError, match="'paper' is for cuda"):
        runs.device_for("paper", "cpu")


def test_what_a_run_needs_and_is_not_there_is_named(tmp_path):
    choice = Choice(rule="optimal", unit="params", budget=0.5, table="0" * 16, measure="spectrum")
    with pytest.raises(TableMissing, match="0" * 16):
        choose(choice, tmp_path)


def test_durations():
    texts = {"90s": 90, "9m": 540, "1h": 3600, "1h30m": 5400, "2m5s": 125, "45": 45}
    assert {text: duration(text) for text in texts} == texts
    for text in ("", "soon", "9x", "m", "-5m"):
        with pytest.raises(ValueError, match="write it like 90s, 9m or 1h30m"):
            duration(text)
