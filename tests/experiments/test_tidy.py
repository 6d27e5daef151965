"""The table for others, the data card, and the scores of one's own ranking."""

import math

import pandas as pd
import pytest

from basis.cli import main
from basis.environment import results_folder
from basis.experiments.runs import load_records
from basis.experiments.scoring import score
from basis.experiments.studies import sensitivity as study_of
from basis.experiments.tidy import COLUMNS, csv, runs_frame, sound_records
from book.tools import card
from tests.experiments.test_search_studies import RANK, networks


@pytest.fixture(scope="module")
def committed():
    return sound_records()


# -- the table ---------------------------------------------------------------------------------------------


def test_the_table_in_results_is_that_of_the_records(committed):
    """After `basis run` or `basis import`, `basis dev table` writes it anew."""
    assert (results_folder() / "runs.csv").read_bytes() == csv(runs_frame(committed)), "run `basis dev table`"


def test_every_run_is_one_row_and_reads_back_as_its_record_says(committed):
    frame = pd.read_csv(results_folder() / "runs.csv").set_index("id")
    assert list(frame.columns) == list(COLUMNS)[1:]
    assert frame.index.is_unique
    assert len(frame) == len(committed) > 100
    assert set(frame["data"]) == {"cifar10"}
    assert not [name for name in frame if frame[name].isna().all()]
    for record in committed[:: len(committed) // 20]:
        row, test = frame.loc[record.id], record.result["test"]
        assert row["variant"] == record.config["variant"]
        assert row["parameters"] == record.result["parameters"]
        assert row["test_accuracy"] == pytest.approx(test["accuracy"] if test else math.nan, abs=1e-6, nan_ok=True)


def test_without_records_the_table_has_its_columns_and_no_rows(tmp_path, capsys):
    assert main(["dev", "table", "--results", str(tmp_path)]) == 0
    assert f"saved {tmp_path / 'runs.csv'}" in capsys.readouterr().out
    assert (tmp_path / "runs.csv").read_text() == ",".join(COLUMNS) + "\n"
    (tmp_path / "file").write_text("mine")
    assert main(["dev", "table", "--results", str(tmp_path / "file")]) == 2


# -- the data card --------------------------------------------------------------------------------------


def test_the_data_card_counts_the_records(committed):
    rows = card.varied(committed)
    assert sum(int(row[3]) for row in rows) == len(committed) == int(card.card_numbers(committed)["table_runs"])


@pytest.mark.weekly
def test_the_data_card_runs_its_example(committed):
    parts = card.card_fragments(committed)
    assert all(f"`{name}`" in parts["columns.md"] for name in COLUMNS)
    assert " yours " in parts["own-score.md"]


# -- scoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["layers", "layers and ratios"])
def test_the_truth_scores_one_in_every_form_and_its_reverse_minus_one(form):
    for sign in (1, -1):
        scores = {name: sign * float(i) for name, i in RANK.items()} | {"fc": 3.0}
        if form == "layers and ratios":
            scores = {(name, ratio): value for name, value in scores.items() for ratio in study_of.RATIOS}
        row = score(scores, records=networks(float, count=2), beside=False).iloc[0]
        assert row["measure"] == "yours"
        assert row["spearman"] == pytest.approx(sign)
        assert row["layers"] == len(RANK)


def test_a_measure_of_ours_given_as_ones_own_scores_what_it_scores_beside():
    records = load_records(study="sensitivity", profile="cpu")
    means = study_of.means(study_of.cells(records), "oneshot_bn")
    own = {(name, ratio): means.loc[ratio, name] for ratio in means.index for name in means}
    frame = score(own, records=records).set_index("measure")
    assert list(frame.loc["yours"]) == pytest.approx(list(frame.loc["oneshot_bn"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: {k: v for k, v in own.items() if k != "conv1"}, r"lack 1 of 20 layers: conv1"),
        (lambda own: own | {"conv1": math.nan}, "conv1 is nan"),
        (lambda own: {(name, 0.3): 1.0 for name in own}, "lack 20 of 20 layers"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        score(change(dict.fromkeys(RANK, 1.0)), records=networks(float, count=1))


def test_a_truth_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(ValueError, match="truth of the profile 'auto' holds 0 layers"):
        score({"conv1": 1.0}, records=[])
    with pytest.raises(ValueError, match="profile is 'huge'"):
        score({"conv1": 1.0}, profile="huge")
    monkeypatch.setenv("BASIS_RESULTS", "nowhere")
    with pytest.raises(ValueError, match="git clone"):
        score({"conv1": 1.0})
