"""The study of chapter 11: its runs, how changes are taken, and the verdict on H4."""

import dataclasses

import pytest

from basis.experiments import execution
from basis.experiments.execution import execute
from basis.experiments.studies import STUDIES
from basis.experiments.studies import own as study_of
from basis.training.loop import choose_device
from tests.experiments.test_search_studies import record

STUDY = STUDIES["own"]
NOISE = (0.0, 0.001, -0.001, 0.0005, -0.0005)  # of the seeds
SELECTED = "selected at 50 %"


def outcomes(*, grown=0.1, svd=0.7, tuned=0.0, seeds=5):
    """Records of the CPU profile: growth of loss before repair, and accuracy gained at last, by a selected plan."""
    records = []
    for run in (run for run in STUDY.runs("cpu") if run.seed < seeds):
        growth = {"dense": 0.0, SELECTED: grown, "svd at 50 %": svd}.get(run.variant, 0.3)
        dense = 0.6 + 0.05 * run.seed  # networks differ, and only what happens to each counts
        noise = NOISE[run.seed] if run.variant != "dense" else 0.0
        stages = {
            "made": {"loss": 1.0 - dense + growth + noise, "accuracy": dense - growth},
            "tuned": {"loss": 1.0, "accuracy": dense + tuned * (run.variant == SELECTED) + noise},
        }
        records.append(record(run, stages=stages))
    return records


@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_the_verdict_comes_first(profile):
    listed = STUDY.runs(profile)
    assert [run.variant for run in listed[:3]] == ["dense", SELECTED, "svd at 50 %"]
    assert len({run.seed for run in listed if run.variant == "dense"}) >= study_of.SEEDS


def test_changes_are_within_a_seed_whose_dense_network_was_tested():
    estimate = study_of.mean_change(outcomes(), SELECTED, "made", "loss")
    assert estimate.value == pytest.approx(0.1, abs=1e-3)
    assert estimate.high - estimate.low < 0.005  # although the networks differ by much more
    records = [r for r in outcomes() if r.config["variant"] != "dense" or r.config["seed"] > 0]
    assert set(study_of.changes(records, "svd at 50 %", "made", "loss")) == {1, 2, 3, 4}
    names = list(study_of.variants(outcomes()))
    assert (names[0], names[-1], len(names)) == (SELECTED, "dense", 7)


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        ({}, "reproduced"),
        ({"grown": 0.36}, "partly"),
        ({"tuned": -0.0025}, "partly"),  # its interval reaches beyond
        ({"grown": 0.36, "tuned": -0.01}, "not reproduced"),
        ({"seeds": 2}, "not tested"),
    ],
)
def test_the_rule_for_h4(outcome, label):
    (verdict,) = STUDY.verdicts(outcomes(**outcome), "cpu")
    assert (verdict.claim, verdict.label) == ("H4", label)


def test_networks_of_one_seed_are_made_of_one_trained_network(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(execution, "compare", lambda model, *_, **__: given.append(model.state_dict()) or {})
    base = STUDY.runs("smoke")[0]
    recipe = dataclasses.replace(base.recipe, epochs=1, batch_size=200)
    for i, run in enumerate(STUDY.runs("smoke")[:2]):
        short = dataclasses.replace(run, recipe=recipe, width=2, images=200)
        execute(short, device=choose_device("cpu"), checkpoint=tmp_path / f"{i}.pt")
    assert len(list(tmp_path.glob("teacher-*.pt"))) == 1
    assert all(bool((given[0][name] == value).all()) for name, value in given[1].items())
