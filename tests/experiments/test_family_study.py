"""The study of chapter 8: its networks, what is averaged over them, and the verdict on C7."""

import pytest
import torch

from basis.costs import count_parameters
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import load_records
from basis.experiments.studies import STUDIES, family, headline
from basis.experiments.studies.study import compared, difference
from basis.models import build
from tests.experiments.test_search_studies import record

STUDY = STUDIES["family"]
NOISE = (0.05, -0.05, 0.02, -0.02)  # what the seeds of the selected plan lose more, in points


@pytest.mark.parametrize("network", family.STAGES)
def test_narrower_networks_have_half_of_the_parameters(network):
    with torch.device("meta"):
        thin, dense = (count_parameters(build(network, width=width)) for width in (family.STAGES[network], None))
    assert thin / dense == pytest.approx(0.5, rel=0.003)


@pytest.mark.parametrize(("profile", "networks", "most"), [("small", 2, 42), ("paper", 2, 34)])
def test_a_network_has_its_own_table_and_the_seeds_of_resnet18(profile, networks, most):
    runs = STUDY.runs(profile)
    tables = {run.model: run.id for run in runs if run.ladder}
    assert (len(tables), runs[0].variant) == (networks, "resnet20, table")
    assert {(run.model, run.choice.table) for run in runs if run.choice} == set(tables.items())
    shared = {run.seed for run in headline.STUDY.runs(profile) if run.variant == "dense"}
    assert {run.seed for run in runs if not run.ladder} <= shared
    first = [run.variant for run in runs[1:]]
    kinds = first.index("resnet20, dense", 1)
    assert first[:kinds] == first[kinds : 2 * kinds]  # round after round
    assert len(runs) <= most


def outcomes(seeds=4, networks=("resnet18", "resnet20", "resnet56"), **lost):
    """Records of made-up accuracies: kind -> points that it loses, one number or one for each network."""
    names = {of: name for of, name in STUDY.shared.items() if name.endswith((", dense", ", selected", ", uniform"))}
    runs = [*STUDY.runs("small"), *(run for run in headline.STUDY.runs("small") if run.variant in names)]
    found = []
    for run in runs:
        name, _, kind = names.get(run.variant, run.variant).partition(", ")
        points = {"dense": 0.0, **lost}.get(kind)
        if points is None or run.seed >= seeds or name not in networks:
            continue
        points = points[networks.index(name)] if isinstance(points, tuple) else points
        accuracy = 0.9 - (points + NOISE[run.seed] * (kind == "selected")) / 100
        about = {"parameters": 100, "macs": 100, "curves": []}
        one = record(run, accuracy=accuracy, **about)
        one.config["variant"] = f"{name}, {kind}"
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        ({"selected": 0.2, "uniform": 1.0}, "reproduced"),
        ({"selected": (1.2, 0.2, 0.1), "uniform": 1.0}, "reproduced"),  # ResNet-18, which was known, is not judged
        ({"selected": (0.1, 0.52, 0.1), "uniform": 1.0}, "reproduced"),  # in the mean; one may or may not fail
        ({"selected": (0.1, 0.7, 0.1), "uniform": 1.0}, "inconclusive"),  # a network that fails, hidden in the mean
        ({"selected": 0.2, "uniform": 0.2}, "inconclusive"),  # as good as dense, but so is one ratio
        ({"selected": 0.48, "uniform": 1.0}, "inconclusive"),
        ({"selected": 0.2, "uniform": 0.0}, "not reproduced"),
        ({"selected": 0.8, "uniform": 1.0}, "not reproduced"),
        ({"selected": 0.2, "uniform": 1.0, "seeds": 3}, "not tested"),
        ({"selected": 0.2, "uniform": 1.0, "networks": ("resnet18", "resnet20")}, "not tested"),
        ({"selected": 0.2, "uniform": 1.0, "networks": ("resnet20", "resnet56")}, "reproduced"),
    ],
)
def test_every_label_can_come_out(outcome, label):
    (verdict,) = STUDY.verdicts(outcomes(**outcome), "small")
    assert (verdict.claim, verdict.label) == ("C7", label)


def test_the_finding_names_each_network_and_the_work_that_is_left():
    lost = {"selected": (1.2, 0.2, 0.1), "uniform": 1.0, family.NARROWER: 0.8}
    records = [record(run, test=None, parameters=100) for run in STUDY.runs("small") if run.ladder]
    records += outcomes(**lost)
    for one in records:
        one.result["macs"] = {"selected": 79, family.NARROWER: 49}.get(one.config["variant"].split(", ")[1], 100)
    (verdict,) = STUDY.verdicts(records, "small")
    for part in ("at 79% of the MACs, the narrower at 49%", "ResNet-20 0.20 [", "ResNet-56 0.10 [", "1.20 ["):
        assert part in verdict.finding
    assert verdict.difference.startswith("-0.15 [")


def test_the_mean_takes_seeds_that_all_networks_have():
    records = outcomes(selected=(0.1, 0.2, 0.6), uniform=1.0)
    records = [r for r in records if (r.config["variant"], r.config["seed"]) != ("resnet56, selected", 3)]
    runs = family.frame(records)
    mean = family.mean_of(runs, family.complete(runs))
    gap = difference(mean, "selected", "dense")
    assert (gap.value, gap.n) == (pytest.approx(-0.3 - sum(NOISE[:3]) / 3), 3)
    assert set(runs["network"]) == {"ResNet-18", "ResNet-20", "ResNet-56"}
    assert compared(mean, "dense").set_index("variant").loc["uniform", "n"] == 4


def test_archived_records_are_shown_under_the_same_names():
    table, dense, uniform = (record(run, parameters=9, macs=8, curves=[]) for run in STUDY.runs("small")[:3])
    uniform.config["variant"], uniform.result["macs"] = "resnet20, all layers", 4
    del dense.result["macs"]
    table.result["test"] = None
    dense.config["variant"] = "resnet32, dense"  # not listed any more; dense comes first all the same
    runs = family.frame([table, uniform, dense])
    assert list(zip(runs["variant"], runs["MACs"], strict=True)) == [("dense", 1.0), ("uniform", 0.5)]


def test_the_scale_names_all_networks():
    assert STUDY.scale("small") == "ResNet-18, 20 and 56 of width 16, 16 epochs"


@pytest.mark.weekly
def test_one_seed_of_the_smoke_profile_runs(tmp_path):
    tasks = [Task(run, STUDY.definition) for run in STUDY.runs("smoke") if run.seed != 1]
    steps = list(in_processes(Order(tasks=tasks, folder=tmp_path, device="cpu"), 1))
    assert {step.outcome for step in steps} == {"done"}, [step.message for step in steps]
    assert {record.config["variant"] for record in load_records(tmp_path)} == {task.run.variant for task in tasks}
