"""What studies share: the runs of one network, one comparison, and which scale is shown."""

from dataclasses import replace

import pytest

from basis.experiments.records import write_record
from basis.experiments.studies import STUDIES, gather, records_of, shown_profile
from basis.experiments.studies.headline import HALF, variant
from basis.experiments.studies.study import compared, seen
from tests.experiments.test_search_studies import record

HEADLINE, SWITCH = STUDIES["headline"], STUDIES["switch"]
RULES = {"dense": 0.0, "selected": 0.5, "uniform": 1.0, "largest first": 0.5, "narrower dense": 2.0}


@pytest.fixture
def folder(tmp_path):
    """Made-up records of the headline study: three seeds of each rule at half of the parameters."""
    lost = {name if name == "dense" else variant(name, HALF): points for name, points in RULES.items()}
    for run in HEADLINE.runs("small"):
        if run.seed < 3 and run.variant in lost:
            accuracy = 0.9 - lost[run.variant] / 100 + run.seed / 1000
            about = {"parameters": 100, "macs": 100, "curves": [], "train_seconds": 1.0}
            one = replace(record(run, accuracy=accuracy, **about), definition=HEADLINE.definition)
            write_record(tmp_path / "headline" / "small" / f"{run.id}.json", one)
    return tmp_path


def test_a_study_has_the_runs_that_it_shares_under_its_own_names(folder):
    found = {r.config["variant"] for r in records_of(SWITCH, "small", folder)}
    assert {"dense", variant("narrower dense", HALF)} <= found
    assert gather("switch", "small", folder=folder).wanted > len(SWITCH.runs("small"))


def test_differences_are_paired_by_seed(folder):
    runs = HEADLINE.frame(records_of(HEADLINE, "small", folder))
    rows = compared(runs, "dense").set_index("variant")
    assert rows.loc[variant("uniform", HALF), "difference"].gap() == "1.00 [1.00, 1.00] points below"
    assert seen(runs, "dense", variant("uniform", HALF)) == pytest.approx(0, abs=1e-9)


def test_the_scale_shown_is_the_one_that_decides(folder, tmp_path):
    assert (shown_profile(HEADLINE, folder), shown_profile(SWITCH, folder)) == ("small", "small")
    assert shown_profile(STUDIES["skip"], folder) == "small"
    (archived := tmp_path / "skip" / "cpu").mkdir(parents=True)
    run = STUDIES["skip"].runs("small")[0]
    one = replace(record(run), config={**run.config, "profile": "cpu"})
    write_record(archived / f"{one.id}.json", one)
    assert shown_profile(STUDIES["skip"], folder) == "cpu"
    assert {v.label for v in STUDIES["skip"].verdicts([one], "cpu")} == {"not tested"}
