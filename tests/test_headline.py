"""The front page's figure and sentences, and the claims in README.md."""

import dataclasses

import pytest

from basis import derived, figures, headline, pages
from basis.studies import CLAIMS, STUDIES, selection, valid_records
from basis.studies.study import Verdict


@pytest.fixture(scope="module")
def records():
    return valid_records(STUDIES["selection"], "cpu")


def test_the_sentences_state_what_the_records_say(records):
    brief = headline.collect(records, "cpu")
    text = headline.in_a_minute(brief)
    for rule in ("optimal", "uniform"):
        lost = selection.difference(records, "dense", selection.arm(rule, "params", 0.5))
        assert lost.text(scale=100) in text
    for ratio, row in brief.steps.items():
        assert f"{row['speedup']:.2f} [" in text
        assert f"r = 1/{1 / ratio:.0f}" in text


def test_the_figure_has_a_point_for_every_arm_and_a_bar_for_every_step(records):
    brief = headline.collect(records, "cpu")
    left, right = headline.draw(figures.LIGHT, brief).axes
    assert len(left.containers) == 1 + sum(map(len, brief.chosen.values()))
    bars = [bar.get_width() for bar in right.patches]
    assert bars == [1.0, *(row["speedup"] for _, row in sorted(brief.steps.items(), reverse=True))]
    for text in (headline.caption(brief), headline.alt(brief)):
        assert "nan" not in text


def test_without_steps_nothing_is_said_of_speed(records):
    brief = dataclasses.replace(headline.collect(records, "cpu"), steps={}, device="")
    assert "No training step is measured yet" in headline.in_a_minute(brief)
    assert "Right: measured" not in headline.caption(brief)


def test_without_records_there_is_no_headline():
    assert headline.collect([], "cpu") is None
    assert "not made yet" in headline.in_a_minute(None)


def test_the_readme_has_every_claim_with_its_verdict_and_a_link():
    found = {claim: [(STUDIES["naive"], Verdict(claim, "cpu", "partly", f"finding of {claim}"))] for claim in CLAIMS}
    table = pages.readme_claims(found)
    assert len(table.splitlines()) == len(CLAIMS) + 2
    for claim in CLAIMS:
        assert f"Finding of {claim}." in table
    assert table.count("[partly](https://") == len(CLAIMS)
    assert "/notebooks/03_every_layer.html)" in table


def test_claims_in_the_readme_are_renewed_only_where_they_are_given():
    text = "<!-- basis:links -->\n<!-- /basis:links -->\n<!-- basis:claims -->\nold\n<!-- /basis:claims -->\n"
    here = pages.address()
    assert derived.block(derived.readme(text, here), "claims") == "old\n"
    assert derived.block(derived.readme(text, here, claims="| new |"), "claims") == "| new |\n"
