"""Chapter 8: does it hold across the ResNet family?

Each network dense, with all layers at one ratio, and with layers selected by its own sensitivities, the last
two at half of the dense network's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.experiments.runs import Choice, Ladder, Record, Run
from basis.experiments.studies.headline import MEASURE
from basis.experiments.studies.study import Label, Study, Verdict, accuracies, matched, spread
from basis.statistics import Estimate
from basis.training.loop import Recipe

NETWORKS = ("resnet18", "resnet20", "resnet56", "resnet34", "resnet32", "resnet44", "resnet50")  # in order of value
FOUR_STAGE = ("resnet18", "resnet34", "resnet50")
ARMS: Mapping[str, str | None] = {"dense": None, "all layers": "uniform", "selected": "optimal"}
CANDIDATES = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
BUDGET, POINTS, NEEDED = 0.5, 0.2, 3
# Test accuracies of He et al. 2016 (arXiv 1512.03385, table 6), as fractions.
PUBLISHED: Mapping[str, float] = {"resnet20": 0.9125, "resnet32": 0.9249, "resnet44": 0.9283, "resnet56": 0.9303}
SCALES: Mapping[str, str] = {
    "smoke": "two tiny networks on synthetic images",
    "cpu": "the thin networks of the CPU scale",
    "colab": "thin networks, briefly trained,",
    "paper": "the networks",
}

RULE = (
    f"C7 is judged by the selected plans at {BUDGET:.0%} of the parameters, each from the sensitivities of its own "
    "network. The drop of a network is the difference in test accuracy (without test-time augmentation) from dense to "
    "selected; intervals use the spread pooled over all variants. Reproduced if the interval of the mean drop over the "
    f"networks lies below {POINTS} percentage points and no network's own interval (all of them hold together with "
    f"95 %, Bonferroni) lies above {POINTS}; not reproduced if the interval of the mean drop lies above {POINTS}; else "
    f"partly. It needs at least 2 runs per variant in at least {NEEDED} networks, else it is not tested."
)


def variant(network: str, kind: str) -> str:
    """The name of a variant, such as ``resnet20, selected``."""
    return f"{network}, {kind}"


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: seed after seed, and the tables that the plans are selected from before all others."""
    if profile == "paper":
        long = Recipe(epochs=164, batch_size=128, lr=0.1, weight_decay=1e-4, cutout=0)
        return _runs(_run(profile, validation=5000), seeds=3, multiple=8, long=long)
    if profile == "colab":
        base = _run(profile, width=8, validation=5000, recipe=Recipe(epochs=3))
        return _runs(base, networks=NETWORKS[:3], seeds=2, multiple=1, images=1000)
    if profile == "cpu":
        recipe = Recipe(epochs=5, batch_size=125, lr=0.1, precision="bf16")
        base = _run(profile, width=8, mode="factorized", images=7250, validation=1000, recipe=recipe)
        return _runs(base, seeds=2, multiple=1, images=1000)
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8)
        base = _run(profile, width=4, data="synthetic", validation=200, recipe=recipe)
        return _runs(base, networks=("resnet18", "resnet20"), seeds=2, multiple=1, images=100)
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="family", profile=profile, variant="", seed=0, **settings)


def _runs(
    base: Run, *, seeds: int, multiple: int, networks: Sequence[str] = NETWORKS, images: int = 2000,
    long: Recipe | None = None,
) -> tuple[Run, ...]:  # fmt: skip
    def ladder(network: str) -> Ladder:
        # The three-stage networks begin with 16 channels, of which 8 would be the only multiple of 8.
        step = multiple if network in FOUR_STAGE else max(1, multiple // 4)
        return Ladder(measures={MEASURE: CANDIDATES}, multiple=step, images=images, calibration=images)

    # Its seed is not used again: what the table knows of one network's noise helps no variant.
    tables = {
        network: replace(
            base, model=network, variant=variant(network, "table"), seed=100, test=False, ladder=ladder(network)
        )
        for network in networks
    }

    def choice(network: str, rule: str | None) -> Choice | None:
        if rule is None:
            return None
        return Choice(rule=rule, unit="params", budget=BUDGET, table=tables[network].id, measure=MEASURE)

    listed: list[Run] = []
    for seed in range(seeds):
        for network in networks:
            listed += [tables[network]] if seed == 0 else []
            listed += [
                replace(base, model=network, variant=variant(network, kind), seed=seed, choice=choice(network, rule))
                for kind, rule in ARMS.items()
            ]
    if long is not None:
        listed += [
            replace(base, model=network, variant=variant(network, "dense, long"), seed=seed, validation=0, recipe=long)
            for seed in range(seeds)
            for network in PUBLISHED
        ]
    return tuple(listed)


# -- from records to a comparison -----------------------------------------------------------------------


def complete(records: Sequence[Record], *, least: int = 1) -> list[str]:
    """The networks of which every variant has at least ``least`` runs, in the order of their depth and kind."""
    found = [n for n in NETWORKS if all(len(accuracies(records, variant(n, kind))) >= least for kind in ARMS)]
    return sorted(found, key=lambda name: (name in FOUR_STAGE, int(name[6:])))


def drop(records: Sequence[Record], network: str, kind: str = "selected", *, comparisons: int = 1) -> Estimate:
    """Dense minus the variant of that kind in test accuracy (a fraction)."""
    return spread(records).difference(
        *matched(records, (variant(network, "dense"), variant(network, kind))), comparisons=comparisons
    )


def mean_drop(records: Sequence[Record], networks: Sequence[str], kind: str = "selected") -> Estimate:
    """The mean over the networks of :func:`drop`."""
    pairs = [matched(records, (variant(n, "dense"), variant(n, kind))) for n in networks]
    variants = [(sign / len(networks), values) for pair in pairs for sign, values in zip((1, -1), pair, strict=True)]
    return spread(records).contrast(variants)


def result_of(records: Sequence[Record], name: str) -> Mapping[str, Any]:
    """The result of a variant's first run: its parameters, MACs and plan are those of all its runs."""
    return next(r.result for r in records if r.config["variant"] == name)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdict on C7 by :data:`RULE`."""
    networks = complete(records, least=2)
    if len(networks) < NEEDED:
        finding = f"{len(networks)} networks have two runs per variant, and at least {NEEDED} are needed"
        return (Verdict("C7", profile, "not tested", finding if records else "no run has been made yet"),)
    mean = mean_drop(records, networks)
    single = {name: drop(records, name, comparisons=len(networks)) for name in networks}
    worse = [name for name in networks if 100 * single[name].low > POINTS]
    label: Label = "partly"
    if 100 * mean.high < POINTS and not worse:
        label = "reproduced"
    elif 100 * mean.low > POINTS:
        label = "not reproduced"
    uniform = mean_drop(records, networks, "all layers")
    finding = (
        f"with half of the parameters selected, {SCALES[profile]} lose {mean.text(scale=100)} percentage points "
        f"of test accuracy in the mean of {len(networks)} networks (n = {mean.n} or more per variant; at one ratio for all "
        f"layers {uniform.text(scale=100)}), and for {len(worse)} of them it is surely above {POINTS} points"
    )
    return (Verdict("C7", profile, label, finding, f"{-100 * mean.value:+.2f} points"),)


STUDY = Study(
    name="family",
    title="Does it hold across the ResNet family?",
    chapter="08_resnet_family",
    claims=("C7",),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
