"""What a study is: its runs, and the claims it judges by a rule fixed beforehand; and what all judges share."""

import configparser
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from basis.experiments.runs import Record, Run, digest, load_records
from basis.statistics import Estimate, Spread, pooled_spread
from basis.training.loop import Recipe

SMOKE: Mapping[str, int] = {"epochs": 2, "batch_size": 100, "translate": 2, "cutout": 8}
TEXTS = configparser.ConfigParser(interpolation=None)
TEXTS.optionxform = str  # type: ignore[assignment,method-assign]
TEXTS.read(Path(__file__).with_name("studies.ini"), encoding="utf-8")


def say(section: str, key: str, **values: object) -> str:
    """A text of ``studies.ini`` with these values."""
    return " ".join(TEXTS[section][key].split()).format(**values)


CLAIMS: Mapping[str, str] = {name: say("claims", name) for name in TEXTS["claims"]}
SCALES: Mapping[str, str] = dict(TEXTS["scales"])  # what is trained in each profile of the studies of one network


@dataclass(frozen=True)
class Verdict:
    """How one claim fared in one profile; ``difference`` is in points of accuracy gained.

    ``label`` is "reproduced", "by construction", "partly", "inconclusive", "not reproduced" or "not tested".
    """

    claim: str
    profile: str
    label: str
    finding: str
    difference: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a chapter, and how its claims (keys of :data:`CLAIMS`) are judged by its ``rule``.

    ``runs`` gives those of a profile, the most valuable first, or none; ``judge`` the verdicts, from the records of a
    profile. The book shows the profile ``published``, and benchmarks of the kinds ``benches``.
    """

    name: str
    title: str
    chapter: str
    claims: tuple[str, ...]
    rule: str
    published: str
    runs: Callable[[str], tuple[Run, ...]]
    judge: Callable[[Sequence[Record], str], tuple[Verdict, ...]]
    benches: tuple[str, ...]

    @classmethod
    def named(
        cls, name: str, runs: Callable[..., tuple[Run, ...]], judge: Callable[..., tuple[Verdict, ...]],
        fixed: Mapping[str, Any] | None = None, **limits: object,
    ) -> "Study":  # fmt: skip
        """The study of ``studies.ini``, whose rule states the ``limits``.

        ``runs(base, **options)`` lists a profile's runs, from one with its settings and those ``fixed`` in all.
        """
        texts = TEXTS[name]

        def listed(profile: str) -> tuple[Run, ...]:
            if profile not in texts:
                return ()
            settings, smoke = json.loads(texts[profile]), profile == "smoke"
            options, recipe = settings.pop("options"), settings.pop("recipe", {})
            settings |= {"recipe": Recipe(**{**(SMOKE if smoke else {}), **recipe})}
            settings |= {"study": name, "profile": profile, "data": "synthetic" if smoke else "cifar10"}
            return runs(Run(**{"variant": "", "seed": 0, **(fixed or {}), **settings}), **options)

        claims, benches = (tuple(texts.get(key, "").split()) for key in ("claims", "benches"))
        about = {key: texts[key] for key in ("title", "chapter", "published")}
        rule = say(name, "rule", **limits)
        return cls(name=name, claims=claims, rule=rule, runs=listed, judge=judge, benches=benches, **about)

    @property
    def definition(self) -> str:
        """A digest of the claims and the rule; every record carries the one it was made under."""
        return digest([self.name, self.claims, self.rule])

    def verdicts(self, records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
        """The verdict on each claim, from the records of ``profile`` among those given."""
        return self.judge([r for r in records if r.config["profile"] == profile], profile)


@lru_cache(maxsize=64)
def listed(study: Study, profile: str) -> Mapping[str, Run]:
    """The runs of a profile by their identities, in the study's order."""
    return {run.id: run for run in study.runs(profile)}


def valid_records(study: Study, profile: str, folder: Path | None = None) -> list[Record]:
    """The records of the runs that ``study`` lists for ``profile``, made under its present definition."""
    records = load_records(folder, study=study.name, profile=profile)
    wanted = listed(study, profile) if records else {}
    return [r for r in records if r.id in wanted and r.definition == study.definition]


def result_of(records: Sequence[Record], name: str) -> Mapping[str, Any]:
    """The result of a variant's first run: its parameters, MACs and plan are those of all its runs."""
    return next(r.result for r in records if r.config["variant"] == name)


def matched(records: Sequence[Record], variants: Sequence[str]) -> list[list[float]]:
    """Test accuracies of several variants, of the seeds that all of them have; of all seeds where they share none.

    While runs are missing, variants have different seeds, and a seed may be lucky in all variants at once.
    """
    tested = [(r.config, r.result["test"]["accuracy"]) for r in records if r.result["test"] is not None]
    by_seed = [{c["seed"]: accuracy for c, accuracy in tested if c["variant"] == name} for name in variants]
    common = set.intersection(*map(set, by_seed))
    return [[x for seed, x in one.items() if seed in common or not common] for one in by_seed]


def accuracies(records: Sequence[Record], variant: str) -> list[float]:
    """Test accuracies (fractions, no test-time augmentation) of a variant's runs, of those that were tested."""
    return matched(records, [variant])[0]


def spread(records: Sequence[Record], *, scale: float = 1) -> Spread:
    """The standard deviation of ``scale`` x test accuracy between equal trainings, pooled over variants."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.result["test"] is not None:
            found.setdefault(r.config["variant"], []).append(scale * r.result["test"]["accuracy"])
    return pooled_spread(found.values())


def difference_of(records: Sequence[Record], *pairs: tuple[str, str], comparisons: int = 1) -> Estimate:
    """Test accuracy (a fraction) of one variant minus another's, in the mean of pairs; an interval by pooled spread."""
    values = [(sign, one) for pair in pairs for sign, one in zip((1, -1), matched(records, pair), strict=True)]
    return spread(records).contrast([(sign / len(pairs), one) for sign, one in values], comparisons=comparisons)


def label_of(good: bool, bad: bool, between: str = "partly") -> str:
    """The label of a claim that holds, fails, or neither."""
    return "reproduced" if good else "not reproduced" if bad else between


def verdict(claim: str, profile: str, label: str, points: float | None = None, **texts: object) -> Verdict:
    """The verdict with the finding that ``studies.ini`` has for the claim; ``points`` of accuracy gained."""
    difference = "" if points is None else f"{points:+.2f} points"
    return Verdict(claim, profile, label, say("findings", claim, **texts), difference)


def untested(claim: str, profile: str, n: int, needed: str = "runs per variant, and at least 2") -> Verdict:
    """The verdict on a claim for which there are ``n`` of what is ``needed``."""
    finding = f"there are {n} {needed} are needed" if n else "no run has been made yet"
    return Verdict(claim, profile, "not tested", finding)
