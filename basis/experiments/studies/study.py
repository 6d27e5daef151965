"""What a study is: its runs, the claims it judges by a rule fixed beforehand, and what all judges share."""

import configparser
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from basis.experiments.runs import ARCHIVED, Record, Run, digest, load_records
from basis.statistics import Estimate, detectable, mean_estimate, paired_difference
from basis.training.loop import Recipe

SMOKE: Mapping[str, int] = {"epochs": 2, "batch_size": 100, "translate": 2, "cutout": 8}
TEXTS = configparser.ConfigParser(interpolation=None)
TEXTS.optionxform = str  # type: ignore[assignment,method-assign]
TEXTS.read(Path(__file__).with_name("studies.ini"), encoding="utf-8")
LABELS = ("reproduced", "by construction", "not reproduced", "inconclusive", "not tested")
# Points of test accuracy within which two networks count as equally good: what eight seeds can tell at that scale.
MARGIN: Mapping[str, float] = {"smoke": 0.5, "small": 0.5, "paper": 0.2}


def say(section: str, key: str, **values: object) -> str:
    """A text of ``studies.ini`` with these values."""
    return " ".join(TEXTS[section][key].split()).format(**values)


CLAIMS: Mapping[str, str] = {name: say("claims", name) for name in TEXTS["claims"]}


@dataclass(frozen=True)
class Verdict:
    """How one claim fared in one profile.

    ``label`` is one of :data:`LABELS`. ``difference`` is the one it was judged by, with its 95 % interval, over ``n``
    seeds; ``scale`` says what was trained or measured, ``change`` what would change the verdict.
    """

    claim: str
    profile: str
    label: str
    finding: str
    difference: str = ""
    n: int = 0
    scale: str = ""

    @property
    def change(self) -> str:
        """What would change the verdict."""
        return say("changes", self.claim) if self.claim in TEXTS["changes"] else ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a chapter, and how its claims (keys of :data:`CLAIMS`) are judged by its ``rule``.

    ``runs`` gives those of a profile, the most valuable first, or none; ``judge`` the verdicts, from the records of a
    profile. Runs of the study ``headline`` that are ``shared``, by their variant there, are called otherwise here. The
    book shows the profile ``published`` ("auto": the largest that decides), and benchmarks of the kinds ``benches``.
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
    shared: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def named(
        cls, name: str, runs: Callable[..., tuple[Run, ...]], judge: Callable[..., tuple[Verdict, ...]],
        fixed: Mapping[str, Any] | None = None, shared: Mapping[str, str] | None = None, **limits: object,
    ) -> "Study":  # fmt: skip
        """The study of ``studies.ini``, whose rule states the ``limits``.

        ``runs(base, **options)`` lists a profile's runs, from one with its settings and those ``fixed`` in all.
        """
        texts = TEXTS[name]

        def listed(profile: str) -> tuple[Run, ...]:
            if profile not in texts:
                return ()
            settings, smoke = json.loads(texts[profile]), profile == "smoke"
            options, recipe = settings.pop("options", {}), settings.pop("recipe", {})
            settings |= {"recipe": Recipe(**{**(SMOKE if smoke else {}), **recipe})}
            settings |= {"study": name, "profile": profile, "data": "synthetic" if smoke else "cifar10"}
            return runs(Run(**{"variant": "", "seed": 0, **(fixed or {}), **settings}), **options)

        claims, benches = (tuple(texts.get(key, "").split()) for key in ("claims", "benches"))
        about = {key: texts[key] for key in ("title", "chapter")} | {"published": texts.get("published", "auto")}
        rule = say(name, "rule", **limits)
        return cls(
            name=name, claims=claims, rule=rule, runs=listed, judge=judge, benches=benches, shared=shared or {}, **about
        )

    @property
    def definition(self) -> str:
        """A digest of the claims and the rule; every record carries the one it was made under."""
        return digest([self.name, self.claims, self.rule])

    def verdicts(self, records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
        """The verdict on each claim, from the records of ``profile`` among those given.

        The archived profile was too small and too short to decide anything: of it there are none.
        """
        if profile == ARCHIVED and self.runs("small"):
            return tuple(untested(claim, profile, 0) for claim in self.claims)
        return self.judge([r for r in records if r.config["profile"] == profile], profile)

    def scale(self, profile: str, records: Sequence[Record] = ()) -> str:
        """What a profile trains, such as ``ResNet-18 of width 16, 16 epochs``; of archived runs from a record."""
        configs = [*(run.config for run in self.runs(profile)[:1]), *(record.config for record in records[:1])]
        return describe(configs[0]) if configs else profile

    def frame(
        self, records: Sequence[Record], more: Mapping[str, Callable[[Record], Any]] | None = None
    ) -> pd.DataFrame:
        """A row a tested run: ``variant``, ``seed``, ``model``, ``accuracy`` and ``accuracy_flip`` (%), and costs.

        Those are ``parameters`` and ``MACs``, as shares of the same network's when dense, the training's ``seconds``
        on its ``device``. Also the curve of the ``validation`` accuracy, and ``more`` columns. Variants come in the
        study's order.
        """
        dense = {r.config["model"]: r.result for r in records if _last(r) in ("dense", "table")}
        order = dict.fromkeys(["dense", *self.shared.values(), *(run.variant for run in self.runs("small"))])
        place = {name: i for i, name in enumerate(order)}
        tested = [r for r in records if r.config["model"] in dense and r.result["test"]]
        tested.sort(key=lambda r: place.get(r.config["variant"], len(place)))
        columns: dict[str, Callable[[Record], Any]] = {
            "variant": lambda r: r.config["variant"],
            "seed": lambda r: r.config["seed"],
            "model": lambda r: r.config["model"],
            "accuracy": lambda r: 100 * r.result["test"]["accuracy"],
            "accuracy_flip": lambda r: 100 * r.result["test"]["accuracy_flip"],
            "parameters": lambda r: r.result["parameters"] / dense[r.config["model"]]["parameters"],
            "MACs": lambda r: r.result["macs"] / dense[r.config["model"]]["macs"],
            "seconds": lambda r: r.result["train_seconds"],
            "device": lambda r: r.environment["device"],
            "validation": lambda r: [100 * row.get("validation_accuracy", math.nan) for row in r.result["curves"]],
        }
        columns |= more or {}
        kind = None if tested else object  # an empty column of texts is one, too
        return pd.DataFrame({name: [of(r) for r in tested] for name, of in columns.items()}, dtype=kind)


def _last(record: Record) -> str:
    return str(record.config["variant"]).split(", ")[-1]


def describe(config: Mapping[str, Any], network: str = "") -> str:
    """What a run trains, such as ``ResNet-18 of width 16, 16 epochs``; ``network`` instead of the model's name."""
    width, images = config.get("width"), config.get("images")
    name = network or config["model"].replace("resnet", "ResNet-").replace("wrn", "WRN")
    parts = [f"{name} of width {width}" if width else name]
    parts += [f"{images:,} images"] if images else []
    parts += ["synthetic images"] if config["data"] == "synthetic" else []
    return ", ".join([*parts, f"{config['recipe']['epochs']} epochs"])


@lru_cache(maxsize=64)
def listed(study: Study, profile: str) -> Mapping[str, Run]:
    """The runs of a profile by their identities, in the study's order."""
    return {run.id: run for run in study.runs(profile)}


def valid_records(study: Study, profile: str, folder: Path | None = None) -> list[Record]:
    """The records of the runs that ``study`` lists for ``profile``, made under its present definition.

    Of the archived profile, which is not listed any more, all that there are.
    """
    records = load_records(folder, study=study.name, profile=profile)
    if profile == ARCHIVED:
        return records
    wanted = listed(study, profile) if records else {}
    return [r for r in records if r.id in wanted and r.definition == study.definition]


def result_of(records: Sequence[Record], name: str) -> Mapping[str, Any]:
    """The result of a variant's first run: its parameters, MACs and plan are those of all its runs."""
    return next(r.result for r in records if r.config["variant"] == name)


def renamed(record: Record, variant: str) -> Record:
    """The record under another name of its variant."""
    return replace(record, config={**record.config, "variant": variant})


def images_of(config: Mapping[str, Any]) -> int:
    """The training images of a run."""
    return config["images"] or {"cifar10": 50000, "synthetic": 2000}[config["data"]] - config["validation"]


def training_cost(config: Mapping[str, Any]) -> float:
    """Forward passes of one image that a training takes; a backward pass counts as two."""
    return 3.0 * images_of(config) * config["recipe"]["epochs"]


def by_seed(runs: pd.DataFrame, name: str, column: str = "accuracy") -> pd.Series:
    """A column of a variant of a :meth:`Study.frame`, by seed, without what is not known."""
    return runs[runs["variant"] == name].set_index("seed")[column].dropna()


def difference(runs: pd.DataFrame, first: str, second: str, *, comparisons: int = 1) -> Estimate:
    """Test accuracy of variant ``first`` minus ``second`` in points, paired by seed: Student's 95 % interval.

    ``runs`` is a :meth:`Study.frame`. With ``comparisons`` > 1 it is one of as many intervals that hold together with
    95 % (Bonferroni).
    """
    return paired_difference(by_seed(runs, first), by_seed(runs, second), comparisons=comparisons)


def compared(
    runs: pd.DataFrame, baseline: str, variants: Sequence[str] | None = None, *, comparisons: int = 1
) -> pd.DataFrame:
    """A row a variant (all, in their order, unless named): what it costs and how it compares with the ``baseline``.

    ``n``, ``accuracy`` (mean with interval, %), ``parameters`` and ``MACs`` (shares of the dense network's), and
    ``difference`` (:func:`difference` from the baseline; of itself and without a common seed its value is NaN).
    """
    rows = []
    for name, own in runs.groupby("variant", sort=False):
        if variants is None or name in variants:
            gap = Estimate(math.nan, math.nan, math.nan, 0)
            gap = gap if name == baseline else difference(runs, str(name), baseline, comparisons=comparisons)
            costs = own[["parameters", "MACs"]].iloc[0]
            rows.append((name, len(own), mean_estimate(list(own["accuracy"])), *costs, gap))
    return pd.DataFrame(rows, columns=["variant", "n", "accuracy", "parameters", "MACs", "difference"])


def seen(runs: pd.DataFrame, first: str, second: str, *, comparisons: int = 1) -> float:
    """The true difference in points between two variants that the seeds they share show with 80 % power.

    See :func:`basis.statistics.detectable`; NaN below two seeds.
    """
    gaps = (by_seed(runs, first) - by_seed(runs, second)).dropna()
    return detectable(float(gaps.std()), len(gaps), comparisons=comparisons) if len(gaps) > 1 else math.nan


def label_of(good: bool, bad: bool) -> str:
    """The label of a claim that holds, that fails, or of which the intervals leave both open."""
    return "reproduced" if good else "not reproduced" if bad else "inconclusive"


def verdict(
    claim: str, profile: str, label: str, judged: Estimate | None = None, *, scale: str = "", **texts: object
) -> Verdict:
    """The verdict with the finding that ``studies.ini`` has for the claim; ``judged``: the difference, in points.

    It is ``{gap}`` in the finding, as :meth:`Estimate.gap` says it; so are all estimates among the ``texts``.
    """
    said = {key: value.gap() if isinstance(value, Estimate) else value for key, value in texts.items()}
    if judged is None:
        return Verdict(claim, profile, label, say("findings", claim, **said), scale=scale)
    finding, text = say("findings", claim, gap=judged.gap(), **said), f"{judged.text(signed=True)} points"
    return Verdict(claim, profile, label, finding, text, judged.n, scale)


def untested(claim: str, profile: str, n: int, needed: int = 0) -> Verdict:
    """The verdict on a claim that ``needed`` seeds are needed for and ``n`` are there."""
    finding = (
        f"{n} of the {needed} seeds that the rule needs are there" if n else "no seed has all the runs that it compares"
    )
    return Verdict(claim, profile, "not tested", finding, n=n)
