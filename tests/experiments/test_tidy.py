"""The tables for others, the data card, and the scores of one's own ranking."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from basis.cli import main
from basis.experiments import tidy
from basis.experiments.runs import Record
from basis.experiments.scoring import score
from basis.experiments.studies import STUDIES
from basis.experiments.studies import sensitivity as study_of
from basis.experiments.tidy import (
    COLUMNS,
    SENSITIVITY_COLUMNS,
    runs_frame,
    sensitivities_frame,
    sound_records,
    write_tables,
)
from book.tools import card

STUDY = STUDIES["sensitivity"]
LAYERS = {variant.split()[0] for variant in (run.variant for run in STUDY.runs("smoke") if run.plan)} - {"short"}


@pytest.fixture(scope="module")
def committed():
    return sound_records()


def truth(loss, seeds=(0, 1)):
    """Records of the smoke truth in which ``layer`` alone loses ``loss(layer, ratio)``, without noise."""
    records = []
    for run in STUDY.runs("smoke"):
        if run.variant == "dense" or (run.plan and not run.variant.startswith("short") and run.seed in seeds):
            lost = 0.0 if run.variant == "dense" else loss(*next(iter(run.plan.items())))
            result = {"validation": {"loss": 1.0 + lost}, "train_seconds": 1.0}
            records.append(Record(run.id, run.config, result, {}, STUDY.definition))
    return records


def place(layer, k):
    """A loss that orders the layers by their names, more at fewer filters."""
    return sorted(LAYERS).index(layer) + 1 / (1 + k)


# -- tables ---------------------------------------------------------------------------------------------


def test_every_run_is_one_row_and_reads_back_as_its_record_says(tmp_path, committed):
    paths = write_tables(tmp_path, committed)
    assert {"runs.csv.gz", "sensitivities.csv.gz"} <= {path.name for path in paths}
    frame = pd.read_csv(tmp_path / "runs.csv.gz").set_index("id")
    assert list(frame.columns) == list(COLUMNS)[1:]
    assert frame.index.is_unique
    assert len(frame) == len(committed) > 100
    assert set(frame["data"]) == {"cifar10"}
    for record in committed[:: len(committed) // 20]:
        row = frame.loc[record.id]
        assert row["variant"] == record.config["variant"]
        assert row["parameters"] == record.result["parameters"]
        if record.result["test"]:
            assert row["test_accuracy"] == pytest.approx(record.result["test"]["accuracy"], abs=1e-12)
        else:
            assert math.isnan(row["test_accuracy"])


def test_equal_records_make_equal_bytes(tmp_path, committed):
    once, again = (write_tables(tmp_path / name, committed[:20]) for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_sensitivities_are_those_of_the_records(committed):
    frame = sensitivities_frame(committed)
    assert list(frame.columns) == list(SENSITIVITY_COLUMNS)
    measured = [record for record in committed if record.result.get("tables")]
    assert set(frame["id"]) == {record.id for record in measured}
    one = frame[(frame["id"] == measured[0].id) & (frame["measure"] == "oneshot_bn")]
    (table,) = study_of.tables(measured[:1], "oneshot_bn") or [None]
    if table is not None:
        assert list(one["value"]) == [cell.value for cell in table.cells]


def test_without_records_the_tables_have_their_columns_and_no_rows(tmp_path, capsys):
    assert main(["table", "--results", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 0
    assert f"saved {tmp_path / 'out' / 'runs.csv.gz'}" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "out" / "runs.csv.gz").columns) == list(COLUMNS)
    assert runs_frame([]).empty


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file", "which is a file, but it must be a folder for the tables"),
        ("file/in/it", "nothing can be written to the folder"),
        ("folder", "runs.csv.gz is a folder, but must be the name of a file"),
    ],
)
def test_tables_that_cannot_be_written_there_are_refused_in_one_sentence(tmp_path, capsys, out, says):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "runs.csv.gz").mkdir(parents=True)
    assert main(["table", "--results", str(tmp_path / "none"), "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_every_column_is_described_and_filled_somewhere(committed):
    frame = runs_frame(committed)
    empty = {name for name in COLUMNS if frame[name].isna().all()}
    assert empty <= {"layer", "jobs"}  # of runs that no record holds yet
    assert all(said for said, _ in COLUMNS.values())


# -- the data card --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_data_card_counts_the_records_and_runs_its_example(committed):
    parts = card.card_fragments(committed)
    rows = card.varied(committed)
    assert sum(int(row[3]) for row in rows) == len(committed) == int(card.card_numbers(committed)["table_runs"])
    assert all(f"`{name}`" in parts["columns.md"] for name in COLUMNS)
    assert " yours " in parts["own-score.md"]
    assert "oneshot_bn" in parts["own-score.md"]


def test_the_example_says_why_it_cannot_score(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    assert card.example_output() == "the truth 'scratch' of the profile 'cpu' holds 0 layers, too few to rank"


# -- scoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["layers", "layers and ratios", "ranking", "series", "series of both", "names"])
def test_the_truth_scores_one_in_every_form_and_its_reverse_minus_one(form):
    records = truth(place)
    own = {name: float(sorted(LAYERS).index(name)) for name in LAYERS}
    for sign in (1, -1):
        scores = {name: sign * value for name, value in own.items()} | {"fc": 3.0}
        if form in ("layers and ratios", "series of both"):
            scores = {(name, ratio): value for name, value in scores.items() for ratio in study_of.RATIOS}
        elif form in ("ranking", "names"):
            scores = sorted(own, key=lambda name: sign * own[name])
        if form in ("series", "series of both", "names"):
            scores = pd.Series(scores)
        row = score(scores, records=records, beside=False).iloc[0]
        assert row["measure"] == "yours"
        assert (row["spearman"], row["kendall"]) == (pytest.approx(sign), pytest.approx(sign))
        assert row["layers"] == len(LAYERS)


def test_a_measure_of_ours_given_as_ones_own_scores_what_it_scores_beside(committed):
    records = [record for record in committed if record.config["study"] == "sensitivity"]
    tables = study_of.tables(records, "oneshot_bn")
    own = {
        (name, ratio): value
        for ratio in study_of.RATIOS
        for name, value in study_of.mean_values([study_of.values(table, ratio) for table in tables]).items()
    }
    frame = score(own, records=records).set_index("measure")
    kept = ["spearman", "spearman_low", "spearman_high", "kendall", "kendall_low", "kendall_high", "layers"]
    assert list(frame.loc["yours", kept]) == pytest.approx(list(frame.loc["oneshot_bn", kept]))
    alone = score(tables[0], records=records, beside=False)
    assert np.isfinite(alone["spearman"]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: {k: v for k, v in own.items() if k != "conv1"}, r"lack 1 of 4 layers: conv1"),
        (lambda own: own | {"conv1": math.nan}, "score of conv1 is nan"),
        (lambda own: [*own, "conv1"], "names every layer once"),
        (lambda own: {(name, 0.3): 1.0 for name in own}, "lack 4 of 4 layers"),
        (set, "are a set, which has no order; give a list"),
        (frozenset, "are a set, which has no order; give a list"),
        (lambda own: pd.Series(own).drop("conv1"), r"lack 1 of 4 layers: conv1"),
        (lambda own: pd.Series([1.0, *own.values()], ["conv1", *own]), "has conv1 more than once"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(change, says):
    own = dict.fromkeys(sorted(LAYERS), 1.0)
    with pytest.raises(ValueError, match=says):
        score(change(own), records=truth(place))


def test_a_truth_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="truth 'scratch' of the profile 'cpu' holds 0 layers"):
        score({"conv1": 1.0}, records=[])
    with pytest.raises(ValueError, match="truth is 'x', but it must be one of scratch, tuned"):
        score({"conv1": 1.0}, truth="x")
    with pytest.raises(ValueError, match="profile is 'huge'"):
        score({"conv1": 1.0}, profile="huge")


def test_the_records_of_a_run_whose_network_was_fitted_keep_their_columns():
    """A record of every study makes a row, whatever its run sets."""
    rows = []
    for study in STUDIES.values():
        for run in study.runs("smoke")[:1]:
            result = {"curves": [{"epoch": 1}], "test": None, "validation": None, "train_seconds": 1.0}
            rows.append(Record(run.id, dataclasses.replace(run).config, result, {}, ""))
    assert len(runs_frame(rows)) == len(rows)
    assert tidy.runs_frame(rows)["study"].is_unique
