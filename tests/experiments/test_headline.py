"""The front page's figure and sentences, and the claims in README.md."""

import dataclasses

import pytest

from basis import figures
from basis.experiments import front_page as headline
from basis.experiments.runs import Record
from basis.experiments.studies import CLAIMS, STUDIES
from basis.experiments.studies import headline as study
from basis.experiments.studies.study import Verdict
from book.tools import derived, pages

LOST = {"selected": 0.1, "uniform": 1.2, "largest first": 0.5, "narrower dense": 1.5, "threshold": 0.8, "dense": 0.0}


def record(run):
    """What a run would leave: each rule loses its points, more at a quarter, and each seed has its own luck."""
    rule, _, budget = run.variant.partition(", ")
    share = 1.0 if not budget else 0.25 if "1/4" in budget else 0.5
    accuracy = 0.9 - LOST.get(rule, 0.0) / share / 200 + 0.001 * run.seed + 0.0001 * (len(run.variant) * run.seed % 7)
    result = {
        "test": {"accuracy": accuracy, "accuracy_flip": accuracy} if run.test is not False else None,
        "parameters": int(1000 * share), "macs": int(1000 * share), "train_seconds": 1.0,
        "curves": [{"validation_accuracy": accuracy}],
    }  # fmt: skip
    config = {"variant": run.variant, "seed": run.seed, "profile": run.profile}
    return Record(id=run.id, config=config, result=result, environment={"device": "a CPU"}, definition="")


@pytest.fixture(scope="module")
def records():
    return [record(run) for run in STUDIES["headline"].runs("small")]


@pytest.fixture
def brief(records, monkeypatch):
    row = {"speedup_q1": 1.3, "speedup_q3": 1.5, "peak_mib": 50, "dense_peak_mib": 100, "n": 9, "step": "eager"}
    steps = {r: {**row, "speedup": 1.5 - r / 4} for r in (0.5, 0.25)}
    monkeypatch.setattr(headline, "load_benches", lambda *_, **__: [])
    monkeypatch.setattr(headline, "step_rows", lambda _: steps)
    return headline.collect(records, "small")


def test_the_sentences_state_what_the_records_say(records, brief):
    text = headline.in_a_minute(brief)
    runs = study.frame(records)
    for rule in headline.RULES:
        lost = study.difference(runs, "dense", study.variant(rule, study.HALF))
        assert lost.n == study.SEEDS
        assert lost.text() in text
        assert lost.text() in headline.caption(brief)
    for ratio, row in brief.steps.items():
        assert f"{row['speedup']:.2f} [" in text
        assert f"r = 1/{1 / ratio:.0f}" in text


@pytest.mark.filterwarnings("ignore:Calling float on a single element Series")
def test_the_figure_has_a_point_for_every_variant_and_a_bar_for_every_step(brief):
    left, right = headline.draw(figures.LIGHT, brief).axes
    assert len(left.containers) == 1 + len(headline.RULES)  # one error bar container a rule
    assert {text.get_text() for text in left.get_legend().get_texts()} == {"dense", *headline.RULES}
    bars = [bar.get_width() for bar in right.patches]
    assert bars == [1.0, *(row["speedup"] for _, row in sorted(brief.steps.items(), reverse=True))]
    for text in (headline.caption(brief), headline.alt(brief)):
        assert "nan" not in text


def test_without_steps_nothing_is_said_of_speed(brief):
    brief = dataclasses.replace(brief, steps={}, device="")
    assert "No training step is measured yet." in headline.in_a_minute(brief)
    assert "Right: measured" not in headline.caption(brief)


def test_without_records_there_is_no_headline(records):
    assert headline.collect([], "small") is None
    assert headline.collect([r for r in records if not r.config["variant"].startswith("selected")], "small") is None
    assert "not made yet" in headline.in_a_minute(None)


def test_the_readme_has_every_claim_with_its_verdict_and_a_link():
    found = {
        claim: [(STUDIES["headline"], Verdict(claim, "small", "reproduced", f"finding of {claim}"))] for claim in CLAIMS
    }
    table = pages.readme_claims(found)
    assert len(table.splitlines()) == len(CLAIMS) + 2
    for claim in CLAIMS:
        assert f"Finding of {claim}." in table
    assert table.count("[reproduced](https://") == len(CLAIMS)
    assert "/notebooks/05_choosing_layers.html)" in table


def test_claims_in_the_readme_are_renewed_only_where_they_are_given():
    text = "<!-- basis:links -->\n<!-- /basis:links -->\n<!-- basis:claims -->\nold\n<!-- /basis:claims -->\n"
    here = pages.address()
    assert derived.block(derived.readme(text, here), "claims") == "old\n"
    assert derived.block(derived.readme(text, here, claims="| new |"), "claims") == "| new |\n"
