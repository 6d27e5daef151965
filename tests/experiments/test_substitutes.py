"""The study of chapter 9: its runs, the curve of narrower dense networks, and the verdicts on S1 and S2."""

import dataclasses
import math

import pytest
import torch

from basis import count_parameters, substitute
from basis.costs import cost
from basis.environment import repository_root
from basis.experiments.studies import STUDIES, headline, records_of
from basis.experiments.studies import substitutes as study_of
from basis.experiments.studies.headline import NARROWER
from basis.experiments.studies.substitutes import PLAIN, SEPARABLE, SHARED
from basis.models import build
from tests.experiments.test_search_studies import record

STUDY = STUDIES["substitutes"]
NOISE = (-0.1, 0.2, 0.0, -0.1)  # points that a seed adds to every structured network


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_every_layer_fits_and_lies_within_the_curve_of_narrower_dense_networks(profile):
    runs = {run.variant: run for run in STUDY.runs(profile) if run.seed == 0}
    with torch.device("meta"):
        first = next(iter(runs.values()))
        dense = build(first.model, width=16 if profile == "small" else None)
        size, macs = count_parameters(dense), cost(dense, (3, 32, 32)).total.forward_macs
        for variant, run in runs.items():
            model = build(run.model, width=run.width)
            if run.layer:
                convs = [n for n, _ in model.named_modules() if ".conv" in n]
                assert len(convs) == 16
                model = substitute(model, dict.fromkeys(convs, run.layer), init="random")  # raises unless all fit
            share = count_parameters(model) / size
            if variant.startswith(NARROWER):
                assert share == pytest.approx(1 / int(variant.partition("/")[2]), rel=0.03)
            else:
                assert min(share, cost(model, (3, 32, 32)).total.forward_macs / macs) > 1 / 16
                assert share < 1 / 7
    assert {run.recipe.decay for name, run in runs.items() if name in SEPARABLE} == {"scaled"}
    assert {run.recipe.decay for name, run in runs.items() if name not in SEPARABLE} == {None}


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
def test_the_first_rounds_compare_all_that_is_judged_and_the_last_ones_the_rest(profile):
    runs = STUDY.runs(profile)
    names, seeds = [run.variant for run in runs], max(run.seed for run in runs) + 1
    judged = [name for name in dict.fromkeys(names) if name.split(", ")[0] in (*SEPARABLE, NARROWER)]
    assert names == judged * seeds + [name for name in dict.fromkeys(names) if name not in judged] * seeds
    assert len(names) <= 60


def outcomes(*, above=0.0, gain=0.0, macs=1 / 8, seeds=4):
    """Made-up records of dense networks that lose 2 points an octave, and of others ``above`` those of 1/8 in size."""
    found = []
    for run in (*headline.STUDY.runs("small"), *(run for run in STUDY.runs("small") if run.seed < seeds)):
        name = SHARED.get(run.variant, run.variant)
        thin, _, size = name.partition(", 1/")
        if thin in ("dense", NARROWER) and size in ("", "2", "4", "7", "16"):
            share, accuracy = 1 / int(size or 1), 90 + 2 * math.log2(1 / int(size or 1))
            costs = {"parameters": 112e3 * share, "macs": 112e3 * share}
        elif run.study == STUDY.name:
            accuracy = 84 + above + NOISE[run.seed] - gain * run.variant.endswith(PLAIN)
            costs = {"parameters": 112e3 / 8, "macs": 112e3 * macs}
        else:
            continue
        renamed = dataclasses.replace(run, variant=name)
        found.append(record(renamed, accuracy=(accuracy + run.seed) / 100, curves=[], **costs))
    return found


def test_the_curve_is_interpolated_in_the_logarithm_for_each_seed():
    records = [r for r in outcomes(above=1.0) if (r.config["variant"], r.config["seed"]) != (f"{NARROWER}, 1/7", 3)]
    runs = study_of.frame(records)
    own = runs[runs["variant"] == "Tucker"].set_index("seed")
    assert list(own["same parameters"].dropna().round(6)) == [84, 85, 86]  # the fourth lacks a narrower network
    one = study_of.gap(runs, ["Tucker"], "parameters")
    assert (one.value, one.n) == (pytest.approx(1 + sum(NOISE[:3]) / 3), 3)


@pytest.mark.parametrize(
    ("above", "macs", "label"),
    [
        (1.0, 1 / 8, "reproduced"),
        (1.0, 1 / 4, "not reproduced"),  # better than dense networks as small, worse than those of as many MACs
        (-1.0, 1 / 8, "not reproduced"),
        (0.1, 1 / 8, "inconclusive"),
        (1.0, 1 / 32, "not tested"),  # no dense network has so few MACs
    ],
)
def test_the_rule_for_s1(above, macs, label):
    verdict, _ = STUDY.verdicts(outcomes(above=above, macs=macs), "small")
    assert (verdict.claim, verdict.label) == ("S1", label)
    assert (f"{above:+.2f} [" in verdict.difference) == (verdict.n == 4) == (label != "not tested")
    assert ("ResNet-18 of width 16" in verdict.scale) == (label != "not tested")


def test_s1_names_the_layers_that_the_mean_hides():
    records = outcomes(above=1.0)
    for r in records:
        r.result["test"]["accuracy"] -= 0.02 * (r.config["variant"] == "ACDC")
    verdict, _ = STUDY.verdicts(records, "small")
    above = "low rank, tensor train, Tucker, shuffle, below: ACDC"
    assert f"{above}; above at equal MACs: {above}" in verdict.finding


@pytest.mark.parametrize(
    ("gain", "seeds", "label"),
    [(1.0, 4, "reproduced"), (0.2, 4, "not reproduced"), (0.5, 4, "inconclusive"), (1.0, 3, "not tested")],
)
def test_the_rule_for_s2(gain, seeds, label):
    records = outcomes(gain=gain, seeds=seeds)
    for r in records:
        if r.config["variant"].endswith(PLAIN):  # seeds gain differently
            r.result["test"]["accuracy"] -= 0.001 * r.config["seed"] * (label == "inconclusive")
    _, verdict = STUDY.verdicts(records, "small")
    assert (verdict.claim, verdict.label, verdict.n) == ("S2", label, seeds)


def test_archived_runs_have_the_names_of_today_and_decide_nothing():
    records = records_of(STUDY, "cpu", repository_root() / "results")
    runs = study_of.frame(records)
    today = {run.variant for run in STUDY.runs("small")}
    assert len(runs) == len(records) > 0
    assert set(runs["variant"]) - today == {"dense", f"{NARROWER}, 1/4", f"ACDC{PLAIN}"}
    assert {v.label for v in STUDY.verdicts(records, "cpu")} == {"not tested"}
