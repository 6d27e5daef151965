"""The study of chapter 11: its runs, how changes are taken, the verdict on H4, and what is not installed."""

import dataclasses

import pytest

from basis.decompositions import NotInstalled
from basis.experiments import runs
from basis.experiments.runs import Run, execute, work
from basis.experiments.studies import STUDIES
from basis.experiments.studies import own as study_of
from basis.training.loop import choose_device
from tests.experiments.test_search_studies import record

STUDY = STUDIES["own"]
NOISE = (0.0, 0.001, -0.001, 0.0005, -0.0005)  # of the seeds


def outcomes(*, grown=0.1, svd=0.7, tuned=0.0, seeds=5):
    """Records of the CPU profile: growth of loss before repair, and accuracy gained at last, by a selected plan."""
    records = []
    for run in STUDY.runs("cpu"):
        if run.seed >= seeds:
            continue
        growth = {"dense": 0.0, "selected at 50 %": grown, "svd at 50 %": svd}.get(run.variant, 0.3)
        gained = tuned if run.variant == "selected at 50 %" else 0.0
        dense = 0.6 + 0.05 * run.seed  # networks differ, and only what happens to each counts
        own = NOISE[run.seed] if run.variant != "dense" else 0.0
        stages = {
            "made": {"loss": 1.0 - dense + growth + own, "accuracy": dense - growth},
            "recalibrated": {"loss": 1.0, "accuracy": dense - growth / 2},
            "tuned": {"loss": 1.0, "accuracy": dense + gained + own},
        }
        about = {"dense_parameters": 100, "macs": 5, "dense_macs": 10, "seconds": 1.0, "searching": 0.0}
        records.append(record(run, stages=stages, **about))
    return records


@pytest.mark.parametrize("profile", ["smoke", "cpu", "colab", "paper"])
def test_no_run_is_listed_twice_and_the_verdict_comes_first(profile):
    listed = STUDY.runs(profile)
    assert len({run.id for run in listed}) == len(listed) == len({(run.variant, run.seed) for run in listed})
    assert [run.variant for run in listed[:3]] == ["dense", "selected at 50 %", "svd at 50 %"]
    assert len({run.seed for run in listed if run.variant == "dense"}) >= study_of.SEEDS
    for run in listed:
        assert run.variant.startswith(run.compression.method)
        assert run.compression.budget == (1 if run.variant == "dense" else float(run.variant.split()[-2]) / 100)


def test_changes_are_within_a_seed():
    estimate = study_of.mean_change(outcomes(), "selected at 50 %", "made", "loss")
    assert estimate.value == pytest.approx(0.1, abs=1e-3)
    assert estimate.high - estimate.low < 0.005  # although the networks differ by much more
    assert estimate.n == 5


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        ({}, "reproduced"),
        ({"grown": 0.36}, "partly"),
        ({"tuned": -0.004}, "partly"),
        ({"tuned": -0.0025}, "partly"),  # its interval reaches beyond
        ({"grown": 0.36, "tuned": -0.01}, "not reproduced"),
    ],
)
def test_the_rule_for_h4(outcome, label):
    (verdict,) = STUDY.verdicts(outcomes(**outcome), "cpu")
    assert (verdict.claim, verdict.label) == ("H4", label)


def test_fewer_than_three_seeds_judge_nothing():
    (verdict,) = STUDY.verdicts(outcomes(seeds=2), "cpu")
    assert verdict.label == "not tested"
    assert "there are 2 seeds with all three networks, and 3 are needed" in verdict.finding


def test_a_seed_without_its_dense_network_does_not_count():
    records = [r for r in outcomes() if r.config["variant"] != "dense" or r.config["seed"] > 0]
    assert set(study_of.changes(records, "svd at 50 %", "made", "loss")) == {1, 2, 3, 4}


def test_ours_are_named_first_and_the_dense_network_last():
    names = list(study_of.variants(outcomes()))
    assert names[0] == "selected at 50 %"
    assert names[-1] == "dense"
    assert len(names) == 8


def test_a_run_whose_package_is_missing_waits(tmp_path, monkeypatch):
    def lacking(run, **options):
        raise NotInstalled("fasterai is not installed here")

    monkeypatch.setattr(runs, "execute", lacking)
    (step,) = work(STUDY.runs("smoke")[:1], STUDY.definition, folder=tmp_path)
    assert (step.outcome, step.message) == ("paused", "fasterai is not installed here")


def test_networks_of_one_seed_are_made_of_one_trained_network(tmp_path, monkeypatch):
    given = []

    def compare(model, task, data, *, seed, progress):
        given.append(model.state_dict())
        return {}

    monkeypatch.setattr(runs, "compare", compare)
    base = STUDY.runs("smoke")[0]
    recipe = dataclasses.replace(base.recipe, epochs=1, batch_size=200)
    for i, run in enumerate(STUDY.runs("smoke")[:2]):
        short = dataclasses.replace(run, recipe=recipe, width=2, images=200)
        checkpoint = tmp_path / f"{i}.pt"
        execute(short, device=choose_device("cpu"), checkpoint=checkpoint)
    assert len(list(tmp_path.glob("teacher-*.pt"))) == 1
    assert all(bool((given[0][name] == value).all()) for name, value in given[1].items())


def test_compression_goes_alone():
    run = dataclasses.replace(STUDY.runs("smoke")[0], ratio=0.5)
    with pytest.raises(ValueError, match="compression makes the layers itself"):
        execute(run, device=choose_device("cpu"))


def test_older_runs_keep_their_identity():
    run = Run(study="headline", profile="smoke", variant="dense", seed=0)
    assert runs.identity({k: v for k, v in run.config.items() if k != "compression"}) == run.id
