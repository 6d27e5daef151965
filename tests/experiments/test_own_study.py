"""The study of chapter 11: its runs, what is paired within a seed, and the verdict on H4."""

import dataclasses

import pytest

from basis.experiments import execution
from basis.experiments.execution import execute
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import checkpoint_path
from basis.experiments.studies import STUDIES, own
from basis.experiments.studies.study import MARGIN, difference
from basis.training.loop import TrainingPaused, choose_device
from tests.experiments.test_search_studies import record

STUDY = STUDIES["own"]
NOISE = (0.0, 0.1, -0.1, 0.05, -0.05, 0.02, -0.02, 0.0)  # of the seeds, in points


def outcomes(*, grown=0.1, svd=0.7, lost=0.1, seeds=8):
    """Records of the small profile: growth of loss before repair, and points that the selected plan loses at last."""
    records = []
    for run in (run for run in STUDY.runs("small") if run.seed < seeds):
        growth = {"dense": 0.0, own.OURS: grown, own.SVD: svd}.get(run.variant, 0.3)
        given = 0.6 + 0.05 * run.seed  # networks differ, and only what happens to each counts
        change = 0.01 if run.variant == "dense" else 0.01 - (lost + NOISE[run.seed]) / 100  # an epoch helps all
        stages = {
            "made": {
                "loss": 1.0 - given + growth * (1 + (run.variant == own.OURS) * NOISE[run.seed] / 10),
                "accuracy": given - growth,
            },
            "recalibrated": {"loss": 1.0, "accuracy": given - growth / 2},
            "tuned": {"loss": 1.0, "accuracy": given + change},
        }
        about = {"parameters": 100, "macs": 100, "curves": [], "test": stages["tuned"]}
        records.append(record(run, stages=stages, **about))
    return records


@pytest.mark.parametrize(("profile", "methods"), [("small", 7), ("paper", 5)])
def test_eight_trainings_side_by_side_begin_with_eight_networks(profile, methods):
    runs = STUDY.runs(profile)
    assert {(run.variant, run.compression.budget) for run in runs[:8]} == {("dense", 1.0)}
    assert [run.seed for run in runs] == list(range(8)) * methods
    assert [run.variant for run in runs[8:24:8]] == [own.OURS, own.SVD]  # what is judged
    assert {run.compression.budget for run in runs[8:]} == {0.5}


def test_differences_are_from_the_dense_network_of_the_seed_that_was_fine_tuned_as_long():
    runs = own.frame(outcomes())
    kept = difference(runs, own.OURS, own.DENSE)
    assert (kept.value, kept.n) == (pytest.approx(-0.1), 8)
    assert kept.high - kept.low < 0.2  # although the networks differ by much more
    assert own.by_seed(runs, own.OURS, "grown").mean() == pytest.approx(0.1)
    assert own.by_seed(runs, own.OURS, "recalibrated").mean() == pytest.approx(-5)
    assert own.by_seed(runs, own.DENSE, "given")[7] == pytest.approx(95)


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        ({}, "reproduced"),
        ({"grown": 0.349}, "inconclusive"),
        ({"grown": 0.36}, "not reproduced"),
        ({"lost": MARGIN["small"] - 0.02}, "inconclusive"),  # its interval reaches beyond
        ({"lost": MARGIN["small"] + 0.1}, "not reproduced"),
        ({"grown": 0.36, "lost": MARGIN["small"] - 0.02}, "not reproduced"),
        ({"seeds": 7}, "not tested"),
    ],
)
def test_every_label_can_come_out(outcome, label):
    (verdict,) = STUDY.verdicts(outcomes(**outcome), "small")
    assert (verdict.claim, verdict.label) == ("H4", label)


def test_both_parts_of_the_claim_and_the_control_are_stated():
    (verdict,) = STUDY.verdicts(outcomes(), "small")
    assert verdict.difference.startswith("-0.10 [")
    assert "; -0.250 [" in verdict.difference  # 0.1 less half of 0.7
    assert "by 0.300 [" in verdict.finding  # one ratio for all layers
    before = [one for one in outcomes() if one.config["variant"] != "uniform"]
    assert STUDY.verdicts(before, "small")[0].label == "reproduced"  # the control is not judged


@pytest.mark.parametrize(("loss", "n"), [(0.4, 8), (0.4 * (1 + 1e-6), 8), (0.41, 7)])
def test_a_network_that_was_trained_again_is_not_paired_with_the_one_before(loss, n):
    records = outcomes()
    for one in records:
        again = (one.config["variant"], one.config["seed"]) == (own.OURS, 3)
        one.result["given"] = {"loss": loss if again else 0.4, "accuracy": 0.9}
    runs = own.frame(records)
    assert difference(runs, own.OURS, own.DENSE).n == n
    assert len(runs) == len(records) - (8 - n)


def test_archived_records_are_shown_under_the_same_names():
    archived = {name: old for old, name in own.OLD.items()} | {"largest first": "uniform, fitted to weights at 50 %"}
    records = outcomes()
    for one in records:
        one.config["variant"] = archived.get(one.config["variant"], one.config["variant"])
    assert list(dict.fromkeys(own.frame(records)["variant"])) == [m for m in own.METHODS if m != "largest first"]


def test_the_network_is_the_same_trained_at_once_kept_or_interrupted(tmp_path):
    run = next(run for run in STUDY.runs("smoke") if run.variant == "dense")
    recipe = dataclasses.replace(run.recipe, epochs=1, batch_size=50)
    run = dataclasses.replace(run, recipe=recipe, width=2, images=100)
    device = choose_device("cpu")
    options = {"device": device, "checkpoint": checkpoint_path(tmp_path, run, device)}
    with pytest.raises(TrainingPaused):
        execute(run, **options, should_stop=lambda: True)
    tested = [execute(run, **options)["stages"]["made"] for _ in range(2)]  # after an interruption, and kept
    assert tested[0] == tested[1] == execute(run, device=device)["stages"]["made"]
    (kept,) = tmp_path.glob("**/dense-*.pt")
    kept.write_bytes(kept.read_bytes()[:2000])
    (step,) = in_processes(Order(tasks=[Task(run, "")], folder=tmp_path, device="cpu"), 1)
    assert (step.outcome, str(kept) in step.message) == ("failed", True)


def test_networks_of_one_seed_are_made_of_one_trained_network(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(execution, "compare", lambda model, *_, **__: given.append(model.state_dict()) or {})
    runs = [run for run in STUDY.runs("smoke") if run.seed == 0][:2]
    recipe = dataclasses.replace(runs[0].recipe, epochs=1, batch_size=200)
    for i, run in enumerate(runs):
        short = dataclasses.replace(run, recipe=recipe, width=2, images=200)
        execute(short, device=choose_device("cpu"), checkpoint=tmp_path / f"{i}.pt")
    assert len(list(tmp_path.glob("dense-*.pt"))) == 1
    assert all(bool((given[0][name] == value).all()) for name, value in given[1].items())
