"""The study of chapter 12: trainings that switch on their way, judged against dense ones of the study headline."""

import dataclasses

import pytest
import torch

from basis.bench.timing import Setting
from basis.costs import cost
from basis.experiments.execution import execute
from basis.experiments.records import write_record
from basis.experiments.runs import record_path
from basis.experiments.studies import STUDIES, switch
from basis.experiments.studies.headline import HALF, NARROWER, variant
from basis.experiments.switch_bench import bench_switch
from basis.models import build
from tests.experiments.test_search_studies import record

STUDY = STUDIES["switch"]


@pytest.fixture(autouse=True)
def _no_other_records(tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_three_seeds_of_the_judged_comparison_come_first(profile):
    runs, dense = STUDY.runs(profile), STUDIES["headline"].runs(profile)
    assert [(run.variant, run.seed) for run in runs[:3]] == [(variant(switch.OURS, HALF), seed) for seed in range(3)]
    assert len({run.id for run in runs}) == len(runs)
    base = next(run for run in dense if run.variant == "dense" and run.seed == 0)
    first = runs[0]
    plain = dataclasses.replace(first.recipe, switch=None, decay=None)
    assert dataclasses.replace(first, study=base.study, variant="dense", recipe=plain) == base
    assert {run.recipe.switch.multiple for run in runs if run.recipe.switch} == {1 if profile == "small" else 8}


def test_the_control_decays_the_product_too_and_has_the_selected_layers_of_the_same_seed():
    control = next(run for run in STUDY.runs("small") if run.variant == variant(switch.SCRATCH, HALF))
    selected = next(run for run in STUDIES["headline"].runs("small") if run.variant == variant("selected", HALF))
    assert control.recipe.decay == "product"
    plain = dataclasses.replace(control, study="headline", variant=selected.variant, recipe=selected.recipe)
    assert plain == selected


def outcomes(ours, narrower):
    """Records of made-up accuracies: what each seed loses against the dense network, in points."""
    found, of = [], {"dense": ("headline", [0.0] * 4), variant(NARROWER, HALF): ("headline", narrower)}
    of[variant(switch.OURS, HALF)] = ("switch", ours)
    for name, (study, points) in of.items():
        made = [run for run in STUDIES[study].runs("small") if run.variant == name]
        about = {"parameters": 100 if name == "dense" else 50, "macs": 100, "curves": []}
        about |= {"switched": {"epoch": 5, "seconds": 7.0}} if study == "switch" else {}
        pairs = zip(made, points, strict=False)
        found += [record(run, accuracy=0.9 + 0.001 * run.seed - one / 100, **about) for run, one in pairs]
    return found


@pytest.mark.parametrize(
    ("ours", "narrower", "label"),
    [
        ([0.1, 0.0, 0.1, 0.0], [1.0, 1.1, 0.9, 1.0], "reproduced"),
        ([0.1, 0.0, 0.1, 0.0], [0.1, -0.1, 0.1, 0.0], "inconclusive"),  # as good as dense, but so is the narrower one
        ([0.5, 0.6, 0.4, 0.5], [1.0, 1.1, 0.9, 1.0], "not reproduced"),
        ([0.1, 0.0, 0.1, 0.0], [-1.0, -1.1, -0.9, -1.0], "not reproduced"),
        ([1.0, -1.0, 0.5, 0.0], [1.0, 1.1, 0.9, 1.0], "inconclusive"),
        ([0.1, 0.0], [1.0, 1.1, 0.9, 1.0], "not tested"),
    ],
)
def test_every_label_can_come_out(ours, narrower, label):
    records = outcomes(ours, narrower)
    (verdict,) = STUDY.verdicts(records, "small")
    assert (verdict.claim, verdict.label) == ("H5", label)
    runs = switch.frame(records)
    assert runs.groupby("variant").size()["dense"] == 4
    assert set(runs.loc[runs["variant"] == variant(switch.OURS, HALF), "search"]) == {7.0}
    assert runs.loc[runs["variant"] == "dense", "search"].isna().all()
    assert list(dict.fromkeys(runs["rule"])) == ["dense", NARROWER, switch.OURS]  # the study's own variants last


def test_runs_are_compared_within_a_seed_by_rule_and_budget():
    runs = switch.frame(outcomes([0.1, 0.3], [1.0]))
    assert runs.loc[runs["rule"] == "dense", "budget"].isna().all()
    lost = switch.lost(runs)
    assert lost["name"].tolist() == ["switched on the way"] * 2 + [NARROWER]
    assert lost["gap"].tolist() == pytest.approx([-0.1, -0.3, -1.0])
    assert set(lost["budget"]) == {"1/2 of parameters"}
    assert switch.choices(runs).empty


def test_the_time_of_a_training_follows_from_steps_and_the_search(tmp_path):
    """Measured on a tiny network, whose plans stand in records."""
    plan, setting = {"layer2.0.conv2": 3, "layer3.0.conv2": 6}, Setting(device="cpu", rounds=3)
    with pytest.raises(ValueError, match="no record of selected, 1/2 of parameters and switched"):
        bench_switch(profile="smoke", setting=setting)
    for study, name in (("headline", "selected"), ("switch", switch.OURS)):
        run = next(run for run in STUDIES[study].runs("smoke") if run.variant == variant(name, HALF))
        made = record(run, plan=plan, switched={"epoch": 1, "layers": plan, "seconds": 2.0})
        write_record(record_path(tmp_path, run), dataclasses.replace(made, definition=STUDIES[study].definition))
    report = bench_switch(profile="smoke", setting=setting)
    assert report.rows[0]["mode"] == "control"
    assert report.config["search_seconds"] > 0
    report.save(tmp_path / "bench" / "switch.json")
    times = switch.training_times(tmp_path).set_index("variant")
    ours, row = times.loc[variant(switch.OURS, HALF)], next(r for r in report.rows if r["mode"].startswith("switched"))
    steps = report.config["steps_per_epoch"]  # two epochs, one of them dense
    expected = steps * (row["dense_ms"] + row["ms"]) / 1000 + report.config["search_seconds"]
    assert ours["seconds"] == pytest.approx(expected)
    assert times.loc["control", "seconds"] == pytest.approx(2 * steps * times.loc["control", "ms"] / 1000)
    assert times["search"].count() == 1


def test_without_records_there_are_no_rows():
    assert switch.frame([]).empty
    assert STUDY.verdicts([], "small")[0].label == "not tested"


def test_a_run_keeps_what_the_switch_did():
    run = next(run for run in STUDY.runs("smoke") if run.variant == variant("spectral start", HALF))
    run = dataclasses.replace(run, images=200)
    result = execute(run, device=torch.device("cpu"))
    dense = cost(build(run.model, width=run.width), (3, 32, 32)).total
    assert result["plan"] == result["switched"]["layers"]
    assert result["parameters"] <= 0.5 * dense.parameters
    assert result["macs"] == pytest.approx(result["switched"]["predicted"]["macs"] * dense.forward_macs, rel=1e-6)
    assert result["spectrum"] is None
