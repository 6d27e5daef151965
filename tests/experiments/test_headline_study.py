"""The study of chapters 3 and 5: its variants and its verdicts."""

import pytest
import torch

from basis.costs import cost, count_parameters
from basis.experiments.studies import STUDIES, headline
from basis.experiments.studies.headline import HALF, STAGES, variant
from basis.models import build
from tests.experiments.test_search_studies import record

STUDY = STUDIES["headline"]


@pytest.mark.parametrize("profile", ["small", "paper"])
def test_narrower_networks_have_the_size_that_they_are_compared_at(profile):
    with torch.device("meta"):
        dense = build("resnet18", width=16 if profile == "small" else 64)
        for (unit, share), stages in STAGES[profile].items():
            networks = (build("resnet18", width=stages), dense)
            if unit == "params":
                thin, whole = (count_parameters(net) for net in networks)
            else:
                thin, whole = (cost(net, (3, 32, 32)).total.forward_macs for net in networks)
            assert thin / whole == pytest.approx(share, rel=0.007)


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
def test_any_prefix_of_the_runs_compares_all_variants_from_one_table(profile):
    table, *rest = STUDY.runs(profile)
    assert (table.variant, table.test) == ("table", False)
    half = [run.variant for run in rest if run.variant == "dense" or run.variant.endswith(variant("", HALF)[1:])]
    assert half[:5] == half[5:10]
    assert {run.choice.table for run in rest if run.choice} == {table.id}
    assert table.seed not in {run.seed for run in rest}


def outcomes(**lost):
    """Records of made-up accuracies: rule -> what each seed loses against dense, in points."""
    names = {rule: variant(what, HALF) for rule, what in headline.RULES.items()} | {"dense": "dense"}
    found = []
    for rule, points in {"dense": [0.0] * 4, **lost}.items():
        made = [run for run in STUDY.runs("small") if run.variant == names[rule]]
        about = {"parameters": 100 if rule == "dense" else 50, "macs": 100, "curves": []}
        pairs = zip(made, points, strict=False)
        found += [record(run, accuracy=0.9 + 0.001 * run.seed - one / 100, **about) for run, one in pairs]
    return found


@pytest.mark.parametrize(
    ("uniform", "selected", "c3", "c4"),
    [
        ([1.0, 1.1, 0.9, 1.0], [0.1, 0.0, 0.1, 0.0], "reproduced", "reproduced"),
        ([0.1, -0.1, 0.1, -0.1], [1.0, 1.1, 0.9, 1.0], "not reproduced", "not reproduced"),
        ([0.0, 0.1, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], "not reproduced", "inconclusive"),  # as good, but so is uniform
        ([2.0, -2.0, 1.0, 0.0], [2.0, -2.0, 1.0, 0.5], "inconclusive", "inconclusive"),
        ([1.0, 1.1, 0.9], [0.1, 0.0], "reproduced", "not tested"),
    ],
)
def test_every_label_can_come_out(uniform, selected, c3, c4):
    verdicts = {v.claim: v for v in STUDY.verdicts(outcomes(uniform=uniform, optimal=selected), "small")}
    assert {claim: v.label for claim, v in verdicts.items()} == {"C1": "by construction", "C3": c3, "C4": c4}


def test_without_records_there_are_no_rows_but_the_columns_of_texts():
    assert not STUDY.frame([])["variant"].str.endswith("MACs").any()
