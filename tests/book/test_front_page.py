"""The front page's figure and sentences, and the claims in README.md."""

import dataclasses

import pandas as pd
import pytest

from basis import figures
from basis.experiments import paper
from basis.experiments.studies import CLAIMS, STUDIES, Verdict
from basis.experiments.studies import headline as study
from basis.experiments.studies.study import difference
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


def test_the_caption_and_the_numbers_state_what_the_records_say(records, brief):
    numbers, caption, runs = front_page.numbers(brief), front_page.caption(brief), STUDIES["headline"].frame(records)
    selected, narrower = (study.variant(rule, study.HALF) for rule in ("selected", study.NARROWER))
    lost, won = (difference(runs, selected, rival) for rival in ("dense", narrower))
    assert lost.n == study.SEEDS
    assert f"**{lost.text(signed=True)}** points" in numbers
    assert f"**{won.text(signed=True)}** points" in numbers
    assert f"end {won.gap()} a narrower" in caption
    assert "**1.44 [1.30, 1.50] ×** the speed" in numbers
    assert "r = 1/4 and 50% of the memory, against the fastest dense one (Z1)" in numbers
    assert "nan" not in caption + numbers + front_page.alt(brief)
    assert "×" not in front_page.numbers(dataclasses.replace(brief, steps={}))


def test_the_figure_has_a_point_for_every_variant_in_both_panels(brief):
    for axes in front_page.draw(figures.LIGHT, brief).axes:
        assert len(axes.containers) == 1 + len(front_page.RULES)  # one error bar container a rule


def test_without_records_there_is_no_headline(records):
    assert front_page.collect([], "small") is None
    assert front_page.collect([r for r in records if not r.config["variant"].startswith("selected")], "small") is None
    assert "not made yet" in front_page.numbers(None)


@pytest.mark.parametrize(
    ("claim", "profile", "label", "n", "says"),
    [
        ("C1", "small", "by construction", 0, "So it is. | X |"),
        ("C4", "small", "not reproduced", 8, "So it is. | X, n = 8 seeds |"),
        ("C2", "cpu", "inconclusive", 9, "So it is. | X, 9 or more rounds |"),
        ("C7", "small", "not tested", 0, "Not known yet: 0 of RUNS runs at this scale are made. | SCALE |"),
    ],
)
def test_a_claim_says_what_was_found_by_what_and_the_verdict(claim, profile, label, n, says, tmp_path, monkeypatch):
    monkeypatch.setenv("BASIS_RESULTS", str(tmp_path))
    study = next(study for study in STUDIES.values() if claim in study.claims)
    says = says.replace("RUNS", str(len(study.runs("small")))).replace("SCALE", study.scale("small"))
    found = {claim: [(study, Verdict(claim, profile, label, "so it is", n=n, scale="X"))]}
    mark = f"[{label}]{{.basis-verdict .{label.replace(' ', '-')}}}"
    assert f"| **{claim}** {CLAIMS[claim]} | {says} {mark}<br>{{doc}}`" in pages.claims_table(found)
    assert f"/{pages.CHAPTERS.get(claim, study.chapter)}.html)) |" in pages.readme_claims(found)


def test_scales_are_told_by_their_runs_and_the_dense_accuracy():
    facts = {name: said for name, *said in (line[2:-2].split(" | ") for line in pages.setups().splitlines())}
    assert facts["Parameters"] == ["17,326", "701,466", "11,173,962"]
    assert facts["Steps"] == ["36", "1,440", "2,340"]
    assert facts["Dense accuracy"][1].endswith("% (n = 8)")


def test_what_is_entered_of_the_paper_stands_beside_ours(tmp_path, monkeypatch):
    assert set(paper.paper_numbers()["study"]) <= set(STUDIES)
    monkeypatch.setattr(paper, "repository_root", lambda: tmp_path)
    (tmp_path / "book").mkdir()
    entry = "- {study: headline, variant: dense, network: resnet18, unit: '%', table: 2, page: 7, chapter: 3, "
    entries = (f"{entry}quantity: {q}, value: {v}}}" for q, v in (("accuracy", 95), ("MACs", 50.5), ("size", "null")))
    (tmp_path / "book" / "paper.yml").write_text("\n".join(entries))
    runs = pd.DataFrame({"variant": ["dense"] * 2, "model": "resnet18", "accuracy": [90.0, 91.0]})
    assert paper.paper_table("headline", runs).splitlines()[2:] == [
        "| resnet18 | dense | accuracy, % | 95 (table 2, page 7) | 90.50 [84.15, 96.85] |",
        "| resnet18 | dense | MACs, % | 50.5 (table 2, page 7) | – |",
    ]
    assert paper.paper_table("headline", runs, chapter=5) == paper.paper_table("family", runs) == ""
    monkeypatch.setattr(paper, "repository_root", lambda: None)
    assert paper.paper_numbers().empty
