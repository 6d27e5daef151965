"""Records on their way: packed the same to the byte, checked one by one, and filed where they belong."""

import dataclasses
import errno
import gzip
import io
import tarfile

import pytest

from basis import saving
from basis.cli import main
from basis.experiments.archives import pack, take_in
from basis.experiments.runs import load_records, read_record, record_path
from basis.experiments.studies import check_records
from basis.saving import RecordError, write_json
from tests.experiments.test_runs import DENSE, put_record

RUN = DENSE[0]


@pytest.fixture
def there(tmp_path):
    """The results of another machine: two sound records."""
    for run in DENSE[:2]:
        put_record(tmp_path / "there", run, environment=machine("theirs"))
    return tmp_path / "there"


def machine(name):
    return {"device": name, "device_type": "cpu", "date": "2026-01-02"}


def archive_of(folder, name="records.tar.gz"):
    pack(folder.glob("*/*/*.json"), folder, folder.parent / name)
    return folder.parent / name


def outcomes(archive, folder):
    return [found[1:] for found in take_in(archive, folder)]


def test_an_archive_is_filed_once_and_equal_records_make_equal_bytes(tmp_path, there):
    archive, here = archive_of(there), tmp_path / "here"
    assert archive.read_bytes() == archive_of(there, "again.tar.gz").read_bytes()
    assert outcomes(archive, here) == [("taken", ""), ("taken", "")]
    assert load_records(here) == load_records(there)
    assert check_records(here) == []
    assert outcomes(archive, here) == [("known", ""), ("known", "")]
    assert not [path for path in here.rglob("*") if path.suffix not in ("", ".json")]


def test_all_records_of_a_folder_go_into_one_file_and_into_another_folder(tmp_path, there, capsys):
    write_json(there / "bench" / "tiny" / "a.json", {})
    archive, here = str(tmp_path / "mine.tar.gz"), str(tmp_path / "here")
    assert main(["export", archive, "--results", str(there)]) == 0
    assert main(["import", archive, "--results", here]) == 0
    assert load_records(tmp_path / "here") == load_records(there)
    assert main(["export", archive, "--results", str(tmp_path)]) == 2
    assert "no record" in capsys.readouterr().err


def test_an_archive_that_cannot_be_replaced_stays_as_it_is(tmp_path, there, monkeypatch):
    archive = archive_of(there)
    before = archive.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    put_record(there, DENSE[2])
    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(RecordError, match="could not be written"):
        archive_of(there)
    assert archive.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_of_two_machines_with_the_same_run_the_first_stays(tmp_path, there, capsys):
    here = tmp_path / "here"
    mine = put_record(here, RUN, environment=machine("mine"))
    before = mine.read_bytes()
    assert main(["import", str(archive_of(there)), "--results", str(here)]) == 0
    assert mine.read_bytes() == before
    said = capsys.readouterr().out
    assert "1 taken" in said
    assert "the run has a record here (mine, 2026-01-02)" in said


def test_an_outdated_record_is_renewed_and_a_broken_one_is_named(tmp_path, there):
    here = tmp_path / "here"
    put_record(here, RUN, definition="0" * 16)
    broken = record_path(here, DENSE[1])
    broken.write_text("{")
    found = dict(outcomes(archive_of(there), here))
    assert set(found) == {"renewed", "refused"}
    assert str(broken) in found["refused"]
    assert broken.read_text() == "{"
    assert read_record(record_path(here, RUN)).environment["device"] == "theirs"


def test_records_of_no_study_profile_or_rule_or_that_were_changed_are_refused(tmp_path):
    there, stranger = tmp_path / "there", dataclasses.replace(RUN, seed=99)
    put_record(there, DENSE[0], definition="0" * 16)
    put_record(there, stranger)
    put_record(there, DENSE[1], config=DENSE[1].config | {"seed": 7})
    put_record(there, DENSE[2], config=DENSE[2].config | {"study": "../../outside"})
    put_record(there, DENSE[3], config=DENSE[3].config | {"profile": "../../../outside"})
    record_path(there, DENSE[4]).write_bytes(b"\xff\xfe")
    found = outcomes(archive_of(there), tmp_path / "a" / "here")
    assert [outcome for outcome, _ in found] == ["refused"] * 6
    assert {path.name for path in tmp_path.iterdir()} == {"there", "records.tar.gz"}
    assert main(["import", str(tmp_path / "records.tar.gz"), "--results", str(tmp_path / "here")]) == 1


def test_an_archive_with_a_changed_byte_is_refused(tmp_path, there):
    archive = archive_of(there)
    whole = archive.read_bytes()
    for at in range(10, len(whole), len(whole) // 20):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(RecordError, match=r"records\.tar\.gz is no whole archive"):
            list(take_in(archive, tmp_path / "here"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.DIRTYPE])
def test_what_is_no_plain_file_is_never_read(tmp_path, kind):
    member = tarfile.TarInfo(f"headline/smoke/{RUN.id}.json")
    member.type, member.linkname = kind, "/etc/hostname"
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(RecordError, match="no archive of records"):
        list(take_in(tmp_path / "bad.tar.gz", tmp_path / "here"))


def test_where_a_name_in_an_archive_leads_does_not_matter(tmp_path, there):
    text = record_path(there, RUN).read_bytes()
    with tarfile.open(tmp_path / "moved.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("../../outside.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    assert outcomes(tmp_path / "moved.tar.gz", tmp_path / "a" / "here") == [("taken", "")]
    assert list((tmp_path / "a").rglob("*.json")) == [record_path(tmp_path / "a" / "here", RUN)]


def test_what_is_no_whole_archive_is_refused_and_named(tmp_path, there, capsys):
    cut, text = tmp_path / "cut.tar.gz", tmp_path / "text.tar.gz"
    cut.write_bytes(archive_of(there).read_bytes()[:-100])
    text.write_bytes(gzip.compress(b"not a tar"))
    for bad in (cut, text, tmp_path / "absent.tar.gz"):
        assert main(["import", str(bad), "--results", str(tmp_path / "here")]) == 2
        assert f"{bad} is no whole archive" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
