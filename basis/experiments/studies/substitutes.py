"""Chapter 9: how do basis convolutions compare with other structured layers?

Every structured layer of :mod:`basis.layers.structured` in all convolutions of the residual blocks, at up to three
sizes, trained from scratch by one recipe, beside the dense network and narrower dense ones. Weight decay on
structured factors is scaled by the compression ratio, as Gray et al. do; at one size each is trained without
that scaling too. Layers with a fit also start from a trained dense network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from basis.experiments.runs import Record, Run
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.study import Label, Study, Verdict, accuracies, matched, spread, too_few
from basis.statistics import Estimate
from basis.text import few
from basis.training.loop import Recipe

BLOCKS = "layer?.*.conv?"  # the convolutions of the residual blocks: not the stem, nor the shortcuts
DENSE = "dense"
# Kind -> what figures call it, and its sizes, from large to small. The second of three is the judged one.
SEPARABLE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "generic": ("low rank", ("0.5", "0.25", "0.12")),
    "tied": ("tied low rank", ("0.5", "0.25", "0.12")),
    "tensor_train": ("tensor train", ("0.7", "0.44", "0.23")),
    "tucker": ("Tucker", ("0.67", "0.41", "0.21")),
    "sep_hashed": ("separable hashed", ("0.5", "0.2", "0.05")),
    "shuffle": ("shuffle", ("1", "2", "4")),
    "acdc": ("ACDC", ("30", "15", "8")),
}
OTHERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "basis": ("basis convolution", ("1/8", "1/16", "1/32")),
    "sep": ("separable", ("",)),
    "tridiagonal": ("tridiagonal mask", ("1,3,128", "1,3,32", "1,3")),
    "hashed": ("hashed", ("0.12", "0.06", "0.03")),
    "debut": ("deformable butterfly", ("0.2", "0.12", "0.08")),
    "pemn": ("random masked", ("1",)),
    "linearconv": ("LinearConv", ("",)),
    "lfb": ("learned filter basis", ("1,4", "0.5,4", "0.25,4")),
    "dsfb": ("deeply shared bases", ("1/8,1/32", "1/16,1/64", "1/32,1/64")),
    "basisconv": ("fixed random basis", ("1", "1/2", "1/4")),
    "dcf": ("Fourier-Bessel", ("3", "2", "1")),
}
KINDS = {**SEPARABLE, **OTHERS}
# What has one size only is trained in narrower networks too: the stem's width as a fraction.
NARROWER = (3 / 4, 1 / 2)
THIN_DENSE = (1 / 2, 3 / 8, 1 / 4)
# S2: those of which Gray et al. say that they need the scaling (hashed layers do not).
SCALED = ("generic", "tensor_train", "tucker", "shuffle", "acdc")
UNSCALED = (*SCALED, "tied", "sep_hashed", "basis")
# What the sources add to the loss. They weigh the orthogonality with 10, which diverges where a layer has few filters.
TERMS: Mapping[str, Mapping[str, Any]] = {"linearconv": {"decorrelation": 0.01}, "dsfb": {"orthogonality": 0.1}}
FITTED = (
    "dsf:0.12", "basis:1/8", "generic:0.5", "tucker:0.67", "tensor_train:0.7", "sep_hashed:0.5", "hashed:0.12",
    "debut:0.12",
)  # fmt: skip
AXES: Mapping[str, str] = {"parameters": "stored parameters", "macs": "multiply-accumulates"}
POINTS = 0.2

RULE = (
    "The separable structured layers are low rank, tied low rank, tensor train, Tucker, separable hashed, shuffle and "
    "ACDC; accuracy is test accuracy without test-time augmentation, differences have intervals from the spread "
    "pooled over all variants of a network, and all that are compared on one axis hold together with 95 % (Bonferroni). "
    "S1, with scaled decay, on the network with the most variants: on an axis (stored parameters, or multiply-accumulates "
    "of a forward pass) the claim holds if some separable structured layer is surely better (interval above 0) than a "
    "narrower dense network that costs at least as much, and at none of its sizes surely worse than any variant of "
    "another kind that costs at most as much. It fails if every separable structured layer is surely worse than some "
    "such variant at one of its sizes or more. Reproduced if it holds on both axes; not reproduced if it fails on both; "
    "else partly. S2: of low rank, tensor train, Tucker, shuffle and ACDC at their judged size, the gain is the "
    "difference in accuracy from plain to scaled weight decay. Reproduced if the interval of the mean gain lies above "
    f"{POINTS} percentage points; not reproduced if it lies below {POINTS}; else partly. Both need at least 2 runs per "
    "variant, else they are not tested."
)


@dataclass(frozen=True)
class Variant:
    """What a variant's name says: ``wrn-16-4 tucker:0.41, plain decay``.

    Attributes:
        network: a name of :func:`basis.models.build`.
        text: the structured layer, or "dense".
        width: of the stem where it is not the network's own.
        how: "" (scaled decay, from scratch), "plain decay", "fitted" or "attention".
    """

    network: str
    text: str
    width: int | None = None
    how: str = ""

    def __str__(self) -> str:
        width = f"width {self.width}" if self.width else ""
        return ", ".join(filter(None, (f"{self.network} {self.text}", width, self.how)))

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant of that name."""
        first, *rest = name.split(", ")
        network, _, text = first.partition(" ")
        width = next((int(part.removeprefix("width ")) for part in rest if part.startswith("width ")), None)
        return cls(network, text, width, next((part for part in rest if not part.startswith("width ")), ""))

    @property
    def kind(self) -> str:
        """The kind of layer."""
        return self.text.partition(":")[0]


def judged(kind: str) -> str:
    """The text of a kind at its judged size: the middle one."""
    sizes = KINDS[kind][1]
    return _text(kind, sizes[len(sizes) // 2])


def _text(kind: str, size: str) -> str:
    return f"{kind}:{size}" if size else kind


def plan(profile: str) -> tuple[Run, ...]:
    """The runs of a profile: all variants from scratch, seed by seed; then those with a teacher; then other networks."""
    if profile == "paper":
        base = _run(profile, model="wrn-16-4", recipe=Recipe(decay="scaled"))
        more = [replace(base, model=name) for name in ("resnet18", "wrn-28-10")]
        return _runs(base, widths=16, seeds=3, others=more)
    if profile == "colab":
        return _runs(_run(profile, model="wrn-16-2", recipe=Recipe(epochs=4, decay="scaled")), widths=16, seeds=2)
    if profile == "cpu":
        recipe = Recipe(epochs=4, batch_size=100, lr=0.1, precision="fp32", decay="scaled")
        return _runs(_run(profile, model="wrn-10-1", images=5000, recipe=recipe), widths=16, seeds=2)
    if profile == "smoke":
        recipe = Recipe(epochs=2, batch_size=100, translate=2, cutout=8, decay="scaled")
        base = _run(profile, model="wrn-10-1", data="synthetic", recipe=recipe)
        return _runs(base, widths=16, seeds=2, kinds=("generic", "shuffle", "basis"), fitted=FITTED[:1])
    return ()


def _run(profile: str, **settings: Any) -> Run:
    return Run(study="substitutes", profile=profile, variant="", seed=0, include=BLOCKS, **settings)


def _runs(
    base: Run, *, widths: int, seeds: int, kinds: Iterable[str] = tuple(KINDS), fitted: Sequence[str] = FITTED,
    others: Sequence[Run] = (),
) -> tuple[Run, ...]:  # fmt: skip
    """``widths`` is the width of the stem that narrower ones are fractions of; ``others`` get a few variants each."""
    plain = replace(base.recipe, decay=None)
    short = replace(base.recipe, epochs=max(1, base.recipe.epochs // 4), lr=base.recipe.lr / 5)

    def one(like: Run, seed: int, text: str, how: str = "", width: int | None = None, **settings: Any) -> Run:
        name = str(Variant(like.model, text, width, how))
        recipe = plain if text == DENSE else replace(like.recipe, **TERMS.get(text.partition(":")[0], {}))
        layer = None if text == DENSE else text
        return replace(like, variant=name, seed=seed, layer=layer, width=width, **{"recipe": recipe, **settings})

    def from_scratch(like: Run, seed: int, kind: str) -> list[Run]:
        sizes = KINDS[kind][1]
        narrow = NARROWER if len(sizes) == 1 else ()
        return [one(like, seed, _text(kind, size)) for size in sizes] + [
            one(like, seed, _text(kind, sizes[0]), width=round(part * widths)) for part in narrow
        ]

    def of_seed(seed: int) -> list[Run]:
        runs = [one(base, seed, DENSE), *(one(base, seed, DENSE, width=round(f * widths)) for f in THIN_DENSE)]
        judged_first = [kind for kind in ("basis", *SEPARABLE) if kind in kinds]
        runs += [run for kind in judged_first for run in from_scratch(base, seed, kind)]
        runs += [one(base, seed, judged(kind), "plain decay", recipe=plain) for kind in UNSCALED if kind in kinds]
        return runs + [run for kind in kinds if kind not in judged_first for run in from_scratch(base, seed, kind)]

    def taught(seed: int) -> list[Run]:
        attention = replace(base.recipe, attention=1000.0)
        runs = [one(base, seed, text, "fitted", teacher=plain, fitted=True, recipe=short) for text in fitted]
        taught = [kind for kind in ("generic", "shuffle", "basis") if kind in kinds]
        return runs + [one(base, seed, judged(k), "attention", teacher=plain, recipe=attention) for k in taught]

    def few(like: Run, seed: int) -> list[Run]:
        return [one(like, seed, DENSE), *(one(like, seed, judged(kind)) for kind in ("basis", *SEPARABLE, "sep"))]

    listed = [run for part in (of_seed, taught) for seed in range(seeds) for run in part(seed)]
    return tuple(listed + [run for seed in range(seeds) for like in others for run in few(like, seed)])


# -- from records to a comparison -----------------------------------------------------------------------


def of_network(records: Sequence[Record], network: str) -> list[Record]:
    """The records of one network."""
    return [r for r in records if r.config["model"] == network]


def main_network(records: Sequence[Record]) -> str:
    """The network with the most variants."""
    names = [network for network, _ in dict.fromkeys((r.config["model"], r.config["variant"]) for r in records)]
    return max(dict.fromkeys(names), key=names.count)


def variants(records: Sequence[Record], *, how: str = "", least: int = 1) -> list[Variant]:
    """The variants trained that way, with at least ``least`` runs, in the order of the records' study."""
    found = dict.fromkeys(Variant.parse(r.config["variant"]) for r in records)
    return [a for a in found if a.how == how and len(accuracies(records, str(a))) >= least]


def cost_of(records: Sequence[Record], one: Variant, axis: str) -> float:
    """What a variant's network costs: a key of :data:`AXES`, or "trained", which all numbers of a dense one are."""
    result = next(r.result for r in records if r.config["variant"] == str(one))
    return float(result["parameters" if axis == "trained" and one.text == DENSE else axis])


def difference(records: Sequence[Record], better: Variant, worse: Variant, *, comparisons: int = 1) -> Estimate:
    """Test accuracy (a fraction) of the first variant minus that of the second."""
    return spread(records).difference(*matched(records, (str(better), str(worse))), comparisons=comparisons)


@dataclass(frozen=True)
class Standing:
    """How the separable structured layers stand on one axis, by :data:`RULE`.

    Attributes:
        beaten: kind -> (its variant, a variant of another kind that costs at most as much and is surely better).
        ahead: kinds that are surely better than a narrower dense network that costs at least as much.
        holds, fails: the axis's part of the rule.
    """

    beaten: Mapping[str, tuple[Variant, Variant]]
    ahead: tuple[str, ...]
    holds: bool
    fails: bool


def standing(records: Sequence[Record], axis: str) -> Standing:
    """Compare every separable structured variant with every variant of another kind, where costs allow."""
    known = [a for a in variants(records, least=2)]
    mine = [a for a in known if a.kind in SEPARABLE and a.width is None]
    rivals = [a for a in known if a.kind not in SEPARABLE]
    costs = {a: cost_of(records, a, axis) for a in known}
    worse = [(a, b) for a in mine for b in rivals if costs[b] <= costs[a]]
    better = [(a, b) for a in mine for b in rivals if b.text == DENSE and b.width and costs[b] >= costs[a]]
    n = len({*worse, *better})  # of equal costs, one interval answers both questions
    beaten: dict[str, tuple[Variant, Variant]] = {}
    for a, b in worse:
        if difference(records, b, a, comparisons=n).low > 0:
            beaten.setdefault(a.kind, (a, b))
    ahead = {a.kind for a, b in better if difference(records, a, b, comparisons=n).low > 0}
    kinds = {a.kind for a in mine}
    return Standing(beaten, tuple(k for k in SEPARABLE if k in ahead), bool(ahead - set(beaten)), kinds <= set(beaten))


@dataclass(frozen=True)
class StepTime:
    """Median milliseconds of a training step, and the dense network's time / this (median and quartiles)."""

    ms: float
    speedup: float
    low: float
    high: float
    device: str

    @property
    def text(self) -> str:
        """Such as ``1.42 [1.37, 1.48]``."""
        return f"{self.speedup:.2f} [{self.low:.2f}, {self.high:.2f}]"


def step_times(profile: str) -> dict[tuple[str, int | None], StepTime]:
    """Measured time of a training step of this profile's network, by structured layer (or "dense") and width.

    From the stored benchmark on its kind of device; empty where there is none.
    """
    runs = plan(profile)
    wanted = {"model": runs[0].model, "batch_size": runs[0].recipe.batch_size} if runs else {}
    found = {}
    for report in load_benches(profile, kind="bench-structured-train"):
        if all(report.config[key] == value for key, value in wanted.items()):
            device = report.environment["device"]
            for row in report.rows:
                if row["mode"] != "control" and "ms" in row:
                    speed = row["speedup"], row["speedup_q1"], row["speedup_q3"]
                    found[row["layer"], row["width"]] = StepTime(row["ms"], *speed, device)
    return found


def gain(records: Sequence[Record], kinds: Sequence[str] = SCALED) -> Estimate:
    """Mean over the kinds of what scaled decay gains over plain decay in test accuracy (a fraction)."""
    network = main_network(records)
    pairs = [
        matched(records, [str(Variant(network, judged(k), None, how)) for how in ("", "plain decay")]) for k in kinds
    ]
    parts = [(sign / len(kinds), values) for pair in pairs for sign, values in zip((1, -1), pair, strict=True)]
    return spread(records).contrast(parts)


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on S1 and S2 by :data:`RULE`."""
    if not records:
        return tuple(Verdict(claim, profile, "not tested", too_few(0)) for claim in ("S1", "S2"))
    return (_judge_pareto(records, profile), _judge_decay(records, profile))


def _judge_pareto(records: Sequence[Record], profile: str) -> Verdict:
    network = main_network(records)
    records = of_network(records, network)
    compared = [
        variant for variant in map(Variant.parse, dict.fromkeys(r.variant for r in plan(profile) if r.model == network))
    ]
    lacking = [str(a) for a in compared if not a.how and len(accuracies(records, str(a))) < 2]
    if lacking:
        return Verdict("S1", profile, "not tested", f"two runs per variant are missing of {few(lacking, '; ')}")
    there = {a.kind for a in variants(records, least=2)}
    found = {axis: standing(records, axis) for axis in AXES}
    label: Label = "partly"
    if all(s.holds for s in found.values()):
        label = "reproduced"
    elif all(s.fails for s in found.values()):
        label = "not reproduced"
    parts = []
    for axis, s in found.items():
        best = [KINDS[kind][0] for kind in s.ahead if kind not in s.beaten]
        parts.append(
            f"by {AXES[axis]}, {', '.join(best) or 'none'} surely beat a narrower dense network and are not surely "
            f"beaten by a variant of another kind that costs no more, and {len(s.beaten)} of "
            f"{len(there & set(SEPARABLE))} are so beaten"
        )
    n = min(len(accuracies(records, str(a))) for a in variants(records, least=2))
    finding = f"with {network} {'; '.join(parts)} (n = {n} or more per variant)"
    return Verdict("S1", profile, label, finding)


def _judge_decay(records: Sequence[Record], profile: str) -> Verdict:
    records = of_network(records, main_network(records))
    network = main_network(records)
    pairs = {k: [str(Variant(network, judged(k), None, how)) for how in ("", "plain decay")] for k in SCALED}
    kinds = [k for k, names in pairs.items() if min(len(accuracies(records, name)) for name in names) >= 2]
    if len(kinds) < (2 if profile == "smoke" else len(SCALED)):
        return Verdict("S2", profile, "not tested", "two runs with and without scaled decay are missing")
    mean = gain(records, kinds)
    label: Label = "partly"
    if 100 * mean.low > POINTS:
        label = "reproduced"
    elif 100 * mean.high < POINTS:
        label = "not reproduced"
    finding = (
        f"with {network} weight decay scaled by the compression ratio gains {mean.text(scale=100)} percentage points "
        f"of test accuracy in the mean of {len(kinds)} structured layers (n = {mean.n} or more per variant)"
    )
    return Verdict("S2", profile, label, finding, f"{100 * mean.value:+.2f} points")


STUDY = Study(
    name="substitutes",
    title="How do basis convolutions compare with other structured layers?",
    chapter="09_other_structured_layers",
    claims=("S1", "S2"),
    rule=RULE,
    published="cpu",
    plan=plan,
    judge=judge,
    benches=("bench-structured", "bench-structured-train"),
)


def bench_variants(profile: str, model: str | None = None) -> list[tuple[str, int | None]]:
    """Text and width of each variant that a profile trains from scratch, but the dense network's, for ``basis bench``."""
    found = [Variant.parse(run.variant) for run in plan(profile)]
    found = [one for one in found if not one.how and model in (None, one.network)]
    return list(dict.fromkeys((one.text, one.width) for one in found if one.text != DENSE or one.width))
