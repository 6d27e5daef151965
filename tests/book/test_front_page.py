"""The front page's figure and sentences, and the claims in README.md."""

import dataclasses

import pytest

from basis import figures
from basis.experiments.studies import CLAIMS, STUDIES, Verdict
from basis.experiments.studies import headline as study
from book.tools import front_page, pages
from tests.experiments.test_search_studies import record

LOST = {"selected": 0.1, "uniform": 1.2, "largest first": 0.5, "narrower dense": 1.5}


def outcome(run):
    """What a run would leave: each rule loses its points, more at a quarter, and each seed has its own luck."""
    rule, _, budget = run.variant.partition(", ")
    share = 1.0 if not budget else 0.25 if "1/4" in budget else 0.5
    accuracy = 0.9 - LOST.get(rule, 0.0) / share / 200 + 0.001 * run.seed + 0.0001 * (len(run.variant) * run.seed % 7)
    test = None if run.test is False else {"accuracy": accuracy, "accuracy_flip": accuracy}
    return record(run, test=test, parameters=int(1000 * share), macs=int(1000 * share), curves=[])


@pytest.fixture(scope="module")
def records():
    return [outcome(run) for run in STUDIES["headline"].runs("small")]


@pytest.fixture
def brief(records, monkeypatch):
    row = {"speedup_q1": 1.3, "speedup_q3": 1.5, "peak_mib": 50, "dense_peak_mib": 100, "n": 9, "device": "Z1"}
    steps = {r: {**row, "speedup": 1.5 - r / 4} for r in (0.5, 0.25)}
    monkeypatch.setattr(front_page, "load_benches", lambda *_, **__: [])
    monkeypatch.setattr(front_page, "step_rows", lambda _: steps)
    return front_page.collect(records, "small")


def test_the_sentences_state_what_the_records_say(records, brief):
    text, caption = front_page.in_a_minute(brief), front_page.caption(brief)
    for rule in front_page.RULES:
        lost = study.difference(study.frame(records), "dense", study.variant(rule, study.HALF))
        assert lost.n == study.SEEDS
        assert lost.text() in text
        assert lost.text() in caption
    assert "1.44 [1.30, 1.50] times as fast at r = 1/4, with 50% of the memory" in text
    assert "against the fastest dense one (Z1)" in text
    assert "(Z1; medians and quartiles of 9 or more" in caption
    assert "nan" not in caption + front_page.alt(brief)
    still = dataclasses.replace(brief, steps={})
    assert "No training step is measured yet." in front_page.in_a_minute(still)
    assert "Right: measured" not in front_page.caption(still)
    told, silent = (Verdict("H5", "small", label, "it costs 1.3 points") for label in ("inconclusive", "not tested"))
    assert "It costs 1.3 points. The verdict so far: inconclusive. {doc}" in front_page.in_a_minute(brief, [told])
    assert front_page.in_a_minute(brief, [silent]) == text


def test_the_figure_has_a_point_for_every_variant_and_a_bar_for_every_step(brief):
    left, right = front_page.draw(figures.LIGHT, brief).axes
    assert len(left.containers) == 1 + len(front_page.RULES)  # one error bar container a rule
    bars = [bar.get_width() for bar in right.patches]
    assert bars == [1.0, *(row["speedup"] for _, row in sorted(brief.steps.items(), reverse=True))]


def test_without_records_there_is_no_headline(records):
    assert front_page.collect([], "small") is None
    assert front_page.collect([r for r in records if not r.config["variant"].startswith("selected")], "small") is None
    assert "not made yet" in front_page.in_a_minute(None)


def test_the_readme_has_every_claim_with_its_verdict_and_a_link():
    found = {
        claim: [(STUDIES["headline"], Verdict(claim, "small", "reproduced", f"finding of {claim}"))] for claim in CLAIMS
    }
    table = pages.readme_claims(found)
    assert len(table.splitlines()) == len(CLAIMS) + 2
    assert all(f"Finding of {claim}." in table for claim in CLAIMS)
    assert table.count("[reproduced](https://") == len(CLAIMS)
