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
    assert "1 of 27" in gathered.note


@pytest.mark.parametrize(("arguments", "says"), [(("headline", "big"), "profile"), (("none", "smoke"), "study")])
def test_gathering_refuses_unknown_names(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        gather(*arguments, folder=tmp_path)


def bench(*quartiles, device_type="cpu"):
    rows = [
        {"shape": "128@16", "mode": "auto", "ratio": 0.5, "speedup": q + 0.1, "speedup_q1": q, "n": 15}
        for q in quartiles
    ]
    ignored = [
        {"shape": "64@32", "mode": "auto", "ratio": 0.5, "speedup": 0.5, "speedup_q1": 0.4, "n": 15},
        {"shape": "128@16", "mode": "composed", "ratio": 0.5, "speedup": 0.5, "speedup_q1": 0.4, "n": 15},
        {"shape": "128@16", "mode": "auto", "ratio": 0.75, "speedup": 0.5, "speedup_q1": 0.4, "n": 15},
    ]
    machine = {"device_type": device_type, "device": "a processor"}
    return BenchReport(kind="bench-layer", config={}, environment=machine, rows=[*rows, *ignored])


@pytest.mark.parametrize(
    ("quartiles", "label"), [((1.2, 1.5), "reproduced"), ((0.9, 1.5), "partly"), ((0.9, 0.8), "not reproduced")]
)
def test_the_rule_for_c2(quartiles, label, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    bench(*quartiles).save(tmp_path / "bench" / "a.json")
    (verdict,) = cost.judge([], "cpu")
    assert verdict.label == label
    assert cost.judge([], "paper")[0].label == "not tested"


def test_cpu_and_gpu_times_are_never_mixed(tmp_path):
    bench(1.2).save(tmp_path / "bench" / "a.json")
    bench(1.4, device_type="cuda").save(tmp_path / "bench" / "b.json")
    assert [r.environment["device_type"] for r in cost.load_benches("cpu", folder=tmp_path)] == ["cpu"]
    assert [r.environment["device_type"] for r in cost.load_benches("paper", folder=tmp_path)] == ["cuda"]


def test_a_damaged_benchmark_is_refused(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.json").write_text("{")
    with pytest.raises(RecordError, match="not a JSON benchmark"):
        cost.load_benches("cpu", folder=tmp_path)


def test_the_definition_holds_the_rule():
    assert dataclasses.replace(HEADLINE, claims=("C1",)).definition != HEADLINE.definition
