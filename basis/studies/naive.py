"""Chapter 3: what happens if every convolution is replaced, at one ratio for all?

Dense against r in {3/4, 1/2, 1/4, 1/8} on every convolution (the stem and the 1x1 shortcuts too),
trained from scratch by one recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

from basis.runs import Record, Run
from basis.statistics import Estimate, difference_estimate
from basis.studies.study import Label, Study, Verdict, accuracies, too_few
from basis.training import Recipe

ARMS: dict[str, float | None] = {"dense": None, "r=3/4": 0.75, "r=1/2": 0.5, "r=1/4": 0.25, "r=1/8": 0.125}
NETWORKS = {
    "smoke": "the smoke test's tiny network on synthetic images",
    "cpu": "the CPU-scale network",
    "colab": "ResNet-18, briefly trained,",
    "paper": "ResNet-18",
}
JUDGED = "r=1/2"
SIZE, POINTS = 0.6, 0.2

RULE = (
    f"C1 is reproduced if the network at {JUDGED} has at most {SIZE:.0%} of the dense network's parameters, "
    "partly if it has fewer than the dense network, else not reproduced. "
    f"C3 is judged by the drop in test accuracy (without test-time augmentation) from dense to {JUDGED}: "
    "reproduced if its 95 % Welch interval lies above 0; not reproduced if the interval reaches 0 and lies "
    f"below {POINTS} percentage points; else partly. Both need at least 2 runs per arm, else they are not tested."
)


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: seed after seed, so that an unfinished study compares all arms."""
    if profile == "paper":
        return _arms(profile, range(8))
    if profile == "colab":
        arms = ("dense", "r=1/2", "r=1/4")
        return _arms(profile, range(2), arms, recipe=Recipe(epochs=8))
    if profile == "cpu":
        recipe = Recipe(epochs=5, batch_size=125, lr=0.1)
        return _arms(profile, range(3), width=16, mode="factorized", images=20000, validation=5000, recipe=recipe)
    if profile == "smoke":
        recipe = Recipe(epochs=3, batch_size=100, translate=2, cutout=8)
        return _arms(profile, range(2), model="resnet20", width=4, data="synthetic", recipe=recipe)
    return ()


def _arms(profile: str, seeds: range, arms: Sequence[str] = tuple(ARMS), **settings: object) -> tuple[Run, ...]:
    return tuple(
        Run(study="naive", profile=profile, arm=arm, seed=seed, ratio=ARMS[arm], **settings)  # type: ignore[arg-type]
        for seed in seeds
        for arm in arms
    )


def drop(records: Sequence[Record], arm: str) -> Estimate:
    """Dense minus ``arm`` in test accuracy (a fraction), with Welch's 95 % interval."""
    return difference_estimate(accuracies(records, "dense"), accuracies(records, arm))


def size(records: Sequence[Record], arm: str) -> float:
    """The parameters of an arm's network as a fraction of the dense network's."""
    counts = {r.config["arm"]: r.result["parameters"] for r in records}
    return counts[arm] / counts["dense"]


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """Verdicts on C1 and C3 by :data:`RULE`."""
    n = min(len(accuracies(records, arm)) for arm in ("dense", JUDGED))
    if n < 2:
        finding = too_few(n)
        return tuple(Verdict(claim, profile, "not tested", finding) for claim in ("C1", "C3"))
    fraction, lost = size(records, JUDGED), drop(records, JUDGED)
    smaller: Label = "reproduced" if fraction <= SIZE else "partly" if fraction < 1 else "not reproduced"
    if lost.low > 0:
        costs: Label = "reproduced"
    else:
        costs = "not reproduced" if 100 * lost.high < POINTS else "partly"
    network = NETWORKS[profile]
    return (
        Verdict("C1", profile, smaller, f"at {JUDGED} {network} has {fraction:.1%} of the dense parameters"),
        Verdict(
            "C3", profile, costs,
            f"at {JUDGED} on every layer {network} loses {lost.text(scale=100)} percentage points "
            f"of test accuracy ({lost.support} per arm)",
        ),
    )  # fmt: skip


STUDY = Study(
    name="naive",
    title="What happens if every layer is replaced?",
    chapter="03_every_layer",
    claims=("C1", "C3"),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
)
