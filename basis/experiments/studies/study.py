"""What a study is: the runs behind a chapter, the claims it judges, and the rule fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from basis.experiments.runs import Record, Run, digest
from basis.statistics import Spread, pooled_spread

Label = Literal["reproduced", "by construction", "partly", "inconclusive", "not reproduced", "not tested"]

CLAIMS: Mapping[str, str] = {
    "C1": "Basis convolutions make the model smaller.",
    "C2": "They speed up the forward and the backward pass.",
    "C3": "Applied to all layers thoughtlessly, they cost accuracy.",
    "C4": "A fast sensitivity analysis, linear in the number of layers, finds a subset of layers "
    "where the final quality does not degrade.",
    "C5": "The coefficient matrix can be made smaller still.",
    "C6": "A skip-training scheme saves training time.",
    "C7": "This holds across the ResNet family.",
    "H1": "A sensitivity that costs under a twentieth of one training ranks the layers as full training does "
    "(our own hypothesis).",
    "H2": "A basis layer in mode auto is no slower than the dense layer, nor than other layers with as many "
    "parameters (our own hypothesis).",
    "H3": "With batch normalisation taken through the basis, a training step of ResNet-18 is 1.3 times as fast as "
    "the dense one at r = 1/2, and 1.6 times at r = 1/4, with less memory (our own hypothesis).",
    "H4": "At half the parameters, a trained network loses before any repair at most half as much by a selected plan "
    "as by uniform SVD, and after one epoch of fine-tuning it is within 0.3 points of the dense one "
    "(our own hypothesis).",
    "S1": "Structured substitutes of separable layers are Pareto-optimal in accuracy against parameters and mult-adds.",
    "S2": "They train well only with weight decay scaled by the compression ratio.",
}


# What is trained in each profile of the studies of one network.
SCALES: Mapping[str, str] = {
    "smoke": "the smoke test's tiny network on synthetic images",
    "cpu": "the CPU-scale network",
    "colab": "a thin ResNet-18, briefly trained,",
    "paper": "ResNet-18",
}


def accuracies(records: Sequence[Record], variant: str) -> list[float]:
    """Test accuracies (fractions, no test-time augmentation) of a variant's runs, of those that were tested."""
    tests = [r.result["test"] for r in records if r.config["variant"] == variant]
    return [test["accuracy"] for test in tests if test is not None]


def too_few(n: int) -> str:
    """Why a claim is not tested with ``n`` runs per variant, of which two are needed."""
    return f"there are {n} runs per variant, and at least 2 are needed" if n else "no run has been made yet"


def spread(records: Sequence[Record], *, scale: float = 1) -> Spread:
    """The standard deviation of ``scale`` x test accuracy between equal trainings, pooled over variants."""
    names = dict.fromkeys(r.config["variant"] for r in records)
    return pooled_spread([[scale * a for a in accuracies(records, name)] for name in names])


def matched(records: Sequence[Record], variants: Sequence[str]) -> list[list[float]]:
    """Test accuracies of several variants, of the seeds that all of them have; of all seeds where they share none.

    While runs are missing, variants have different seeds, and a seed may be lucky in all variants at once.
    """
    tests = [r for r in records if r.result["test"] is not None]
    by_seed = [
        {r.config["seed"]: r.result["test"]["accuracy"] for r in tests if r.config["variant"] == variant}
        for variant in variants
    ]
    common = set(by_seed[0]).intersection(*by_seed)
    return [[value for seed, value in values.items() if seed in common or not common] for values in by_seed]


@dataclass(frozen=True)
class Verdict:
    """How one claim fared in one profile.

    ``finding`` is a sentence computed from records; ``difference`` is the one that the label follows from, in
    points of accuracy gained, such as ``-0.42 points``.
    """

    claim: str
    profile: str
    label: Label
    finding: str
    difference: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a chapter in order of value, and how its claims are judged.

    Args:
        name: as in ``basis run NAME``; title: the question; chapter: the notebook's name.
        claims: the claims judged here (keys of :data:`CLAIMS`).
        rule: the verdict rule in words, written before any run was looked at. It is part of
            :attr:`definition`, so that a record made under another rule is refused.
        published: the profile whose records the book shows.
        plan: from a profile to its runs, the most valuable first.
        judge: from the records of one profile to the verdicts.
        benches: the kinds of benchmark that the chapter shows, such as "bench-layer".
    """

    name: str
    title: str
    chapter: str
    claims: tuple[str, ...]
    rule: str
    published: str
    plan: Callable[[str], tuple[Run, ...]]
    judge: Callable[[Sequence[Record], str], tuple[Verdict, ...]]
    benches: tuple[str, ...] = ()

    @property
    def definition(self) -> str:
        """A digest of the claims and the rule; every record carries the one it was made under."""
        return digest([self.name, self.claims, self.rule])

    def runs(self, profile: str) -> tuple[Run, ...]:
        """The runs of a profile, the most valuable first; none where the study has no such profile."""
        return self.plan(profile)

    def verdicts(self, records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
        """The verdict on each claim, from the records of ``profile`` among those given."""
        return self.judge([r for r in records if r.config["profile"] == profile], profile)
