"""A campaign: the order of value, how many processes, the command, and records on their way between machines."""

import dataclasses
import errno
import gzip
import io
import json
import signal
import tarfile

import filelock
import pytest
import torch

from basis import saving as files
from basis.cli import main
from basis.costs import count_parameters
from basis.experiments import archives, executors, runs
from basis.experiments.archives import pack, take_in
from basis.experiments.campaign import LEGS, by_leg, in_order
from basis.experiments.executors import jobs_for
from basis.experiments.runs import PROFILES, load_records, record_path
from basis.experiments.studies import STUDIES, check_records
from basis.experiments.studies.plausible import doubts, wrong_size
from basis.models import build
from basis.saving import RecordError
from basis.substitution import substitute
from tests.experiments.test_runs import DENSE, STUDY, fake_result, instant, put_record  # noqa: F401

RUN = DENSE[0]


# -- order and processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_a_campaign_does_every_run_once_and_measures_before_it_selects(profile):
    tasks = in_order(profile)
    listed = {run.id for study in STUDIES.values() for run in study.runs(profile)}
    assert len(tasks) == len(listed)
    place = {task.run.id: i for i, task in enumerate(tasks)}
    assert set(place) == listed
    assert all(place[task.run.choice.table] < place[task.run.id] for task in tasks if task.run.choice)


def test_every_leg_of_the_paper_campaign_has_runs_and_all_studies_begin_before_any_long_tail():
    legs = list(by_leg("paper", list(STUDIES)))
    assert all(tasks for _, tasks in legs[: len(LEGS)])
    assert [task.run for task in legs[0][1]] == list(STUDY.runs("paper"))
    first_round = [tasks for leg, tasks in legs[:9] for tasks in tasks]
    assert {task.run.study for task in first_round} == {n for n, study in STUDIES.items() if study.runs("paper")}
    assert len(first_round) < len(in_order("paper")) / 3


def test_a_campaign_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no study of cost has runs in the profile 'paper'"):
        in_order("paper", ["cost"])
    with pytest.raises(ValueError, match="there is no study 'x'"):
        in_order("paper", ["x"])


def test_on_a_cpu_there_are_as_many_processes_as_cores_and_runs(monkeypatch):
    monkeypatch.setattr(executors, "cores", lambda: 4)
    todo, cpu = STUDY.runs("smoke"), torch.device("cpu")
    assert jobs_for(todo, cpu) == 4
    assert jobs_for(todo[:2], cpu) == 2
    assert jobs_for([], cpu) == 1


# -- the command --------------------------------------------------------------------------------------


def campaign(tmp_path, *more):
    command = ["campaign", "--studies", "headline", "--device", "cpu", "--jobs", "1", "--quiet"]
    return main([*command, "--results", str(tmp_path / "here"), "--archive", str(tmp_path / "new.tar.gz"), *more])


def test_a_campaign_skips_what_is_recorded_and_packs_what_is_new(tmp_path, instant, capsys):  # noqa: F811
    for run in STUDY.runs("smoke")[:3]:
        put_record(tmp_path / "here", run)
    assert campaign(tmp_path) == 0
    said = capsys.readouterr().out
    assert "24 of 27 runs are missing" in said
    assert f"24 new records, packed into {tmp_path / 'new.tar.gz'}" in said
    assert len(instant) == 24
    with tarfile.open(tmp_path / "new.tar.gz") as tar:
        assert set(tar.getnames()) == {f"headline/smoke/{run.id}.json" for run in instant}
    (tmp_path / "new.tar.gz").unlink()
    assert campaign(tmp_path) == 0
    assert "0 new records" in capsys.readouterr().out
    assert not (tmp_path / "new.tar.gz").exists()


def test_an_interrupted_campaign_packs_what_it_has(tmp_path, monkeypatch, capsys):
    done = []

    def execute(run, **options):
        if done:
            signal.raise_signal(signal.SIGTERM)
        done.append(run)
        return fake_result(run)

    monkeypatch.setattr(runs, "execute", execute)
    assert campaign(tmp_path) == 130
    said = capsys.readouterr()
    assert "1 new records, packed into" in said.out
    assert "26 are missing; next is dense, seed 0: the same command goes on" in said.out
    assert "interrupted; what is finished is kept" in said.err


def names_in(archive):
    with tarfile.open(archive) as tar:
        return {name.rsplit("/")[-1].removesuffix(".json") for name in tar.getnames()}


def interrupted_after(number, monkeypatch):
    """Runs that finish at once, the next one after so many being interrupted."""
    done = []

    def execute(run, **options):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(run)
        return fake_result(run)

    monkeypatch.setattr(runs, "execute", execute)


def test_the_same_command_again_adds_to_the_archive(tmp_path, monkeypatch, capsys):
    archive, planned = tmp_path / "new.tar.gz", STUDY.runs("smoke")
    put_record(tmp_path / "here", planned[0])
    for number, said in ((3, f"3 new records, packed into {archive}, 23 are missing"),
                         (2, f"2 new records, packed into {archive} beside 3 others, 21 are missing")):  # fmt: skip
        interrupted_after(number, monkeypatch)
        assert campaign(tmp_path) == 130
        assert said in capsys.readouterr().out
    assert len(names_in(archive)) == 5
    interrupted_after(99, monkeypatch)
    assert campaign(tmp_path) == 0
    assert names_in(archive) == {run.id for run in planned[1:]}  # the first was neither made here nor in the archive
    before = archive.read_bytes()
    assert campaign(tmp_path) == 0
    assert archive.read_bytes() == before


def test_an_archive_keeps_what_it_holds_but_takes_the_records_that_are_here_now(tmp_path, instant):  # noqa: F811
    archive, (first, second, third) = tmp_path / "new.tar.gz", STUDY.runs("smoke")[:3]
    other = STUDIES["skip"].runs("smoke")[0]
    there, here = tmp_path / "there", tmp_path / "here"
    put_record(there, other)
    for run in (first, second):  # both were renewed since, the second in this call
        put_record(there, run, definition="0" * 16)
    pack(there.glob("*/*/*.json"), there, archive)
    put_record(here, first)
    put_record(here, third)
    assert campaign(tmp_path) == 0
    assert names_in(archive) == {other.id, *(run.id for run in STUDY.runs("smoke") if run != third)}
    packed = archives.packed_records(archive)
    for run in (first, second):
        path = record_path(here, run)
        assert packed[path.relative_to(here).as_posix()] == path.read_bytes()


def foreign_tar(path):
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("photos/me.jpg"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_text("precious"), "is no whole archive of records (not a gzip file); give --archive"),
        (lambda path: path.touch(), "is no whole archive of records ("),
        (foreign_tar, "holds 'photos/me.jpg', so it is no archive of records that others could be added to; give"),
        (lambda path: path.mkdir(), "is a folder, but must be the name of a file"),
    ],
)
def test_what_is_no_archive_is_refused_before_any_run(tmp_path, instant, capsys, spoil, says):  # noqa: F811
    path = tmp_path / "new.tar.gz"
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    assert campaign(tmp_path) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert len(said.err.splitlines()) == 1
    assert not instant
    assert before == (path.read_bytes() if path.is_file() else None)


def test_an_archive_that_cannot_be_written_is_refused_before_any_run(tmp_path, instant, capsys):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    assert campaign(tmp_path, "--archive", str(tmp_path / "file" / "new.tar.gz")) == 2
    assert "nothing can be written to the folder" in capsys.readouterr().err
    assert not instant


def test_an_archive_that_cannot_be_replaced_stays_as_it_is(tmp_path, there, monkeypatch):
    archive = archive_of(there)
    before = archive.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    put_record(there, STUDY.runs("smoke")[2])
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(runs.Unwritable, match="could not be written"):
        archive_of(there)
    assert archive.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_run_is_no_record_and_the_status_says_so(tmp_path, monkeypatch, capsys):
    def execute(run, **options):
        raise ValueError("no such network")

    monkeypatch.setattr(runs, "execute", execute)
    assert campaign(tmp_path) == 1
    assert "failed in 0 s, ValueError: no such network" in capsys.readouterr().out


def test_the_paper_profile_is_refused_without_a_gpu_before_anything_is_begun(tmp_path, capsys):
    assert campaign(tmp_path, "--profile", "paper") == 2
    assert "the profile 'paper' is for cuda devices, but the device is cpu" in capsys.readouterr().err


def test_status_shows_hours_spent_and_expected(tmp_path, capsys):
    dense = STUDY.runs("small")[1]
    put_record(tmp_path, dense, result=fake_result(dense) | {"train_seconds": 3600.0})
    assert main(["status", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "study",
        "profile",
        "planned",
        "done",
        "missing",
        "started",
        "spent",
        "expected",
        "device",
    ]
    row = next(line for line in lines if line.split()[:2] == ["headline", "small"])
    assert "1.00 h CPU" in row
    assert "67.00 h CPU, unknown for 21" in row


# -- records from elsewhere ---------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path):
    """The results of another machine: two sound records."""
    for run in DENSE[:2]:
        put_record(tmp_path / "there", run, result=sound_result(run), environment=machine("theirs"))
    return tmp_path / "there"


def machine(name):
    return {"device": name, "device_type": "cpu", "date": "2026-01-02"}


def sound_result(run, **changes):
    network = build(run.model, width=run.width)
    size = count_parameters(network if run.ratio is None else substitute(network, ratio=run.ratio, init="random"))
    return fake_result(run) | {"parameters": size} | changes


def archive_of(folder, name="records.tar.gz"):
    pack(folder.glob("*/*/*.json"), folder, folder.parent / name)
    return folder.parent / name


def outcomes(archive, folder):
    return [(one.outcome, one.reason) for one in take_in(archive, folder)]


def test_an_archive_is_filed_once_and_equal_records_make_equal_bytes(tmp_path, there):
    archive, here = archive_of(there), tmp_path / "here"
    assert archive.read_bytes() == archive_of(there, "again.tar.gz").read_bytes()
    assert outcomes(archive, here) == [("taken", ""), ("taken", "")]
    assert load_records(here) == load_records(there)
    assert check_records(here) == []
    assert outcomes(archive, here) == [("known", ""), ("known", "")]
    assert not [path for path in here.rglob("*") if path.suffix not in ("", ".json")]


def test_of_two_machines_with_the_same_run_the_first_stays(tmp_path, there, capsys):
    here = tmp_path / "here"
    mine = put_record(here, RUN, result=sound_result(RUN), environment=machine("mine"))
    before = mine.read_bytes()
    assert main(["import", str(archive_of(there)), "--results", str(here)]) == 0
    assert mine.read_bytes() == before
    said = capsys.readouterr().out
    assert "1 taken, 1 left out, since the run is there already" in said
    assert "the run has a record here (mine, 2026-01-02), which stays" in said


def test_an_outdated_record_is_renewed_and_a_broken_one_is_named(tmp_path, there):
    here = tmp_path / "here"
    put_record(here, RUN, definition="0" * 16)
    broken = record_path(here, DENSE[1])
    broken.write_text("{")
    found = dict(outcomes(archive_of(there), here))
    assert set(found) == {"renewed", "refused"}
    assert f"{broken} is not a JSON record" in found["refused"]
    assert broken.read_text() == "{"
    assert [record.environment["device"] for record in [runs.read_record(record_path(here, RUN))]] == ["theirs"]


def test_a_run_that_is_being_done_is_left_alone(tmp_path, there):
    path = record_path(tmp_path / "here", RUN)
    path.parent.mkdir(parents=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        found = outcomes(archive_of(there), tmp_path / "here")
    assert ("other", "another process is doing this run right now") in found
    assert not path.exists()


def test_the_size_of_the_network_is_checked(tmp_path):
    put_record(tmp_path / "there", RUN)
    ((outcome, reason),) = outcomes(archive_of(tmp_path / "there"), tmp_path / "here")
    assert outcome == "refused"
    assert reason.startswith("it has 10 parameters, but its network has")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": {"loss": 0.1, "accuracy": 1.2}}, "accuracy of test is 1.2, but it is a fraction"),
        ({"test": {"loss": float("nan"), "accuracy": 0.9}}, "loss of test is nan"),
        ({"test": {"loss": 0.1}}, "incomplete or malformed"),
        ({"test": None}, "lacks an accuracy on test images"),
        ({"validation": None}, "lacks an accuracy on validation images"),
        ({"curves": []}, "its curves hold 0 epochs, but the recipe has 2"),
        ({"train_seconds": 0.0}, "train_seconds is 0.0"),
        ({"train_seconds": 5.0}, "do not add up to train_seconds"),
        ({"steps": 1}, "it took 1 steps, but the recipe takes 36"),
        ({"images_per_second": float("inf")}, "images_per_second is inf"),
        ({"parameters": -3}, "parameters is -3"),
    ],
)
def test_what_a_run_cannot_have_left_is_refused_everywhere(tmp_path, changes, says):
    path = put_record(tmp_path / "there", RUN, result=sound_result(RUN, **changes))
    ((outcome, reason),) = outcomes(archive_of(tmp_path / "there"), tmp_path / "here")
    assert outcome == "refused"
    assert says in reason
    assert not (tmp_path / "here").exists() or not load_records(tmp_path / "here")
    problems = check_records(tmp_path / "there")
    assert problems
    assert all(problem.startswith(f"{path} cannot be what its run left: ") for problem in problems)


def test_a_run_that_must_not_look_at_the_test_images_has_not_done_so(tmp_path):
    table = STUDY.runs("smoke")[0]
    result = fake_result(table)
    path = put_record(tmp_path, table, result=result)
    assert check_records(tmp_path) == []
    put_record(tmp_path, table, result=result | {"test": result["validation"]})
    assert check_records(tmp_path) == [f"{path} cannot be what its run left: it has an accuracy on test images"]


def test_every_committed_record_has_the_size_of_its_network():
    """One record of every study, model and kind of plan."""
    seen = {}
    for record in load_records():
        seen.setdefault((record.config["study"], record.config["model"], record.config["variant"].split()[0]), record)
    by_id = {run.id: run for study in STUDIES.values() for profile in PROFILES for run in study.runs(profile)}
    for record in seen.values():
        assert wrong_size(by_id[record.id], record) is None, record.config["variant"]
        assert doubts(by_id[record.id], record) == []


def test_records_of_no_study_of_another_rule_or_place_are_refused(tmp_path, there):
    one, other = DENSE[2:4]
    put_record(there, one, definition="0" * 16)
    put_record(there, dataclasses.replace(other, seed=99))
    moved = record_path(there, RUN)
    moved.rename(moved.with_name("0" * 16 + ".json"))
    refused = [reason for outcome, reason in outcomes(archive_of(there), tmp_path / "here") if outcome == "refused"]
    assert sorted(reason.split(" 'headline'")[0] for reason in refused) == [
        "holds a run that the study", "holds a run that the study", "was made before the study",
    ]  # fmt: skip


def hostile(members, path):
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "entry",
    [
        member("../../outside.json"),
        member("/outside.json"),
        member("headline/smoke/../../../outside.json"),
        member(f"headline/smoke/{RUN.id}.json", tarfile.SYMTYPE, "/etc/hostname"),
        member(f"headline/smoke/{RUN.id}.json", tarfile.LNKTYPE, "elsewhere"),
        member(f"headline/smoke/{RUN.id}.json", tarfile.FIFOTYPE),
        member("headline/smoke", tarfile.DIRTYPE),
        member(f"bench/smoke/{RUN.id}.JSON"),
    ],
    ids=lambda entry: f"{entry.name} {entry.type!r}",
)
def test_an_archive_writes_nothing_but_records(tmp_path, there, entry):
    sound = record_path(there, DENSE[1])
    name = sound.relative_to(there).as_posix()
    archive = hostile([(entry, b""), (member(name), sound.read_bytes())], tmp_path / "bad.tar.gz")
    found = list(take_in(archive, tmp_path / "a" / "b" / "here"))
    assert [one.outcome for one in found] == ["refused", "taken"]
    assert [path.name for path in (tmp_path / "a").rglob("*.json")] == [sound.name]
    assert not list(tmp_path.rglob("outside*"))


def test_an_archive_with_a_huge_member_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 1000)
    archive = hostile([(member(f"headline/smoke/{RUN.id}.json"), b" " * 1001)], tmp_path / "bad.tar.gz")
    with pytest.raises(RecordError, match="of 1001 bytes, after 0 others; no campaign packs so much"):
        list(take_in(archive, tmp_path / "here"))


def test_a_cut_archive_is_refused_and_what_came_before_is_whole(tmp_path, there, capsys):
    archive = archive_of(there)
    archive.write_bytes(archive.read_bytes()[:-100])
    assert main(["import", str(archive), str(tmp_path / "absent.tar.gz"), "--results", str(tmp_path / "here")]) == 2
    assert "is no whole archive of records" in capsys.readouterr().err
    assert check_records(tmp_path / "here") == []
    archive.write_bytes(gzip.compress(b"not a tar"))
    with pytest.raises(RecordError, match="is no whole archive"):
        list(take_in(archive, tmp_path / "here"))


def test_after_an_archive_that_is_cut_the_others_are_read(tmp_path, there, capsys):
    """What the archive held before the cut is counted."""
    content = gzip.decompress(archive_of(there).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        second = tar.getmembers()[1].offset
    cut, absent, names = tmp_path / "cut.tar.gz", tmp_path / "absent.tar.gz", sorted(there.glob("*/*/*.json"))
    cut.write_bytes(gzip.compress(content[: second + 700]))
    pack(names[1:], there, tmp_path / "whole.tar.gz")
    command = ["import", str(cut), str(absent), str(tmp_path / "whole.tar.gz"), "--results", str(tmp_path / "here")]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{cut}: 1 taken, and was not read to its end",
        f"{absent}: nothing taken, and was not read to its end",
        f"{tmp_path / 'whole.tar.gz'}: 1 taken",
    ]
    assert [line.split(" is no whole archive")[0] for line in said.err.splitlines()] == [
        f"basis: {cut}", f"basis: {absent}",
    ]  # fmt: skip
    assert load_records(tmp_path / "here") == load_records(there)


def test_where_nothing_can_be_written_no_further_archive_is_read(tmp_path, there, capsys):
    archive = str(archive_of(there))
    (tmp_path / "file").write_text("mine")
    assert main(["import", archive, archive, "--results", str(tmp_path / "file")]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(said.err.splitlines()) == 1
    assert "could not be written" in said.err


def test_a_record_that_is_no_json_is_refused(tmp_path):
    contents = [b"{", b"[]", b"\xff\xfe", json.dumps({"version": 1}).encode()]
    contents.append(
        json.dumps({"version": 1, "id": "x", "config": 1, "result": 1, "environment": 1, "definition": 1}).encode()
    )
    names = [member(f"headline/smoke/{n:016x}.json") for n in range(len(contents))]
    found = outcomes(hostile(zip(names, contents, strict=True), tmp_path / "bad.tar.gz"), tmp_path / "here")
    assert [outcome for outcome, _ in found] == ["refused"] * len(contents)
    for name, (_, reason) in zip(names, found, strict=True):
        assert reason.startswith(f"{name.name} in the archive ")
        assert "delete it" not in reason
    assert found[0][1].endswith("; pack it anew where its run was done")
