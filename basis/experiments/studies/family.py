"""Chapter 8: does it hold across the ResNet family?

Each network dense, with all layers at one ratio, and with layers selected by its own sensitivities, the last
two at half of the dense network's parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.experiments.runs import Choice, Ladder, Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.headline import MEASURE
from basis.experiments.studies.study import TEXTS, Study, Verdict, accuracies
from basis.experiments.studies.study import result_of as result_of
from basis.experiments.studies.study import spread as spread
from basis.statistics import Estimate
from basis.training.loop import Recipe

NETWORKS = ("resnet18", "resnet20", "resnet56", "resnet34", "resnet32", "resnet44", "resnet50")  # in order of value
FOUR_STAGE = ("resnet18", "resnet34", "resnet50")
ARMS: Mapping[str, str | None] = {"dense": None, "all layers": "uniform", "selected": "optimal"}
CANDIDATES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
BUDGET, POINTS, NEEDED = 0.5, 0.2, 3
LONG = Recipe(epochs=164, batch_size=128, lr=0.1, weight_decay=1e-4, cutout=0)  # as He et al. train
# Test accuracies of He et al. 2016 (arXiv 1512.03385, table 6), as fractions.
PUBLISHED: Mapping[str, float] = {"resnet20": 0.9125, "resnet32": 0.9249, "resnet44": 0.9283, "resnet56": 0.9303}
SCALES: Mapping[str, str] = dict(TEXTS["family.scales"])


def variant(network: str, kind: str) -> str:
    """The name of a variant, such as ``resnet20, selected``."""
    return f"{network}, {kind}"


def _runs(
    base: Run, *, seeds: int, networks: Sequence[str] = NETWORKS, multiple: int = 1, images: int = 1000, long: int = 0
) -> tuple[Run, ...]:
    """Seed after seed, each network's table before all others; at last those of :data:`LONG`."""

    def one(network: str, kind: str, seed: int, **changes: Any) -> Run:
        return replace(base, model=network, variant=variant(network, kind), seed=seed, **changes)

    tables = {}
    for network in networks:
        # The three-stage networks begin with 16 channels, of which 8 would be the only multiple of 8.
        step = multiple if network in FOUR_STAGE else max(1, multiple // 4)
        ladder = Ladder(measures={MEASURE: CANDIDATES}, multiple=step, images=images, calibration=images)
        # Its seed is not used again: what the table knows of one network's noise helps no variant.
        tables[network] = one(network, "table", 100, test=False, ladder=ladder)

    def compared(network: str, seed: int) -> list[Run]:
        some = Choice(rule="", unit="params", budget=BUDGET, table=tables[network].id, measure=MEASURE)
        choices = {kind: rule and replace(some, rule=rule) for kind, rule in ARMS.items()}
        return [one(network, kind, seed, choice=choice) for kind, choice in choices.items()]

    listed = [run for network in networks for run in (tables[network], *compared(network, 0))]
    listed += [run for seed in range(1, seeds) for network in networks for run in compared(network, seed)]
    pairs = [(network, seed) for seed in range(seeds if long else 0) for network in PUBLISHED]
    return (*listed, *(one(name, "dense, long", seed, validation=0, recipe=LONG) for name, seed in pairs))


def complete(records: Sequence[Record], *, least: int = 1) -> list[str]:
    """The networks of which every variant has at least ``least`` runs, in the order of their depth and kind."""
    found = [n for n in NETWORKS if all(len(accuracies(records, variant(n, kind))) >= least for kind in ARMS)]
    return sorted(found, key=lambda name: (name in FOUR_STAGE, int(name[6:])))


def drop(
    records: Sequence[Record], networks: str | Sequence[str], kind: str = "selected", *, comparisons: int = 1
) -> Estimate:
    """Dense minus the variant of that kind in test accuracy (a fraction), in the mean of the networks."""
    names = [networks] if isinstance(networks, str) else networks
    pairs = [(variant(name, "dense"), variant(name, kind)) for name in names]
    return study.difference_of(records, *pairs, comparisons=comparisons)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C7."""
    networks = complete(records, least=2)
    if len(networks) < NEEDED:
        finding = f"{len(networks)} networks have two runs per variant, and at least {NEEDED} are needed"
        return (Verdict("C7", profile, "not tested", finding if records else "no run has been made yet"),)
    mean, uniform = drop(records, networks), drop(records, networks, "all layers")
    worse = [n for n in networks if 100 * drop(records, n, comparisons=len(networks)).low > POINTS]
    return (study.verdict(
        "C7", profile, study.label_of(100 * mean.high < POINTS and not worse, 100 * mean.low > POINTS),
        -100 * mean.value, lost=mean.text(scale=100), uniform=uniform.text(scale=100), networks=len(networks), n=mean.n,
        scale=SCALES[profile], worse=len(worse), limit=POINTS,
    ),)  # fmt: skip


STUDY = Study.named("family", _runs, judge, budget=BUDGET, points=POINTS, needed=NEEDED)
