"""Studies as chapters use them: gathering records with an honest note, and the verdict on measured speed."""

import dataclasses

import pytest

from basis.bench.report import BenchReport
from basis.experiments.studies import CLAIMS, STUDIES, cost, gather
from basis.saving import RecordError
from tests.experiments.test_runs import put_record

HEADLINE = STUDIES["headline"]


def test_every_study_judges_claims_that_are_listed():
    for study in STUDIES.values():
        assert set(study.claims) <= set(CLAIMS)
        verdicts = study.verdicts([], "smoke")
        assert {v.claim for v in verdicts} == set(study.claims)
        assert {v.label for v in verdicts} == {"not tested"}


def test_gathering_says_how_many_runs_are_shown(tmp_path):
    put_record(tmp_path, HEADLINE.runs("smoke")[1])
    gathered = gather("headline", "smoke", folder=tmp_path)
    assert (len(gathered.records), gathered.complete) == (1, False)
    assert f"1 of {len(HEADLINE.runs('smoke'))}" in gathered.note


@pytest.mark.parametrize(("arguments", "says"), [(("headline", "big"), "profile"), (("none", "smoke"), "study")])
def test_gathering_refuses_unknown_names(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        gather(*arguments, folder=tmp_path)


def bench(*quartiles):
    rows = [
        {
            "shape": "128@16",
            "mode": "auto",
            "ratio": 0.5,
            "speedup": (a + b) / 2,
            "speedup_q1": a,
            "speedup_q3": b,
            "n": 15,
        }
        for a, b in quartiles
    ]
    ignored = [
        {"shape": "64@32", "mode": "auto", "ratio": 0.5},
        {"shape": "128@16", "mode": "composed", "ratio": 0.5},
        {"shape": "128@16", "mode": "auto", "ratio": 0.75},
    ]
    machine = {"device_type": "cpu", "device": "a processor"}
    return BenchReport(kind="bench-layer", config={}, environment=machine, rows=[*rows, *ignored])


@pytest.mark.parametrize(
    ("first", "label"), [((1.1, 1.2), "reproduced"), ((0.95, 1.2), "inconclusive"), ((0.8, 0.9), "not reproduced")]
)
def test_the_rule_for_c2(first, label, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    bench(first, (1.3, 1.5)).save(tmp_path / "bench" / "a.json")
    (verdict,) = cost.judge([], "cpu")
    assert (verdict.label, verdict.n, verdict.scale) == (label, 15, "a processor")
    assert verdict.difference == f"{sum(first) / 2:.2f} to 1.40 times"
    assert cost.judge([], "paper")[0].label == "not tested"


def test_a_damaged_benchmark_is_refused(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.json").write_text("{")
    with pytest.raises(RecordError, match="not a JSON benchmark"):
        cost.load_benches("cpu", folder=tmp_path)


def test_the_definition_holds_the_rule():
    assert dataclasses.replace(HEADLINE, claims=("C1",)).definition != HEADLINE.definition
