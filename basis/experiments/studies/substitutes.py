"""Chapter 9: how do basis convolutions compare with other structured layers?

Every structured layer in all convolutions of the residual blocks, at up to three sizes, trained from scratch by one
recipe, beside the dense network and narrower dense ones. Weight decay on structured factors is scaled by the
compression ratio, as Gray et al. do; at one size also not. Layers with a fit also start from a trained dense network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from basis.experiments.runs import Record, Run
from basis.experiments.studies import study
from basis.experiments.studies.cost import load_benches
from basis.experiments.studies.study import TEXTS, Study, Verdict, accuracies
from basis.experiments.studies.study import spread as spread
from basis.statistics import Estimate
from basis.text import few

BLOCKS = "layer?.*.conv?"  # the convolutions of the residual blocks: not the stem, nor the shortcuts
DENSE = "dense"


def _kinds(section: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind -> what figures call it, and its sizes, from large to small. The second of three is the judged one."""
    parts = {kind: text.partition(" |") for kind, text in TEXTS[section].items()}
    return {kind: (name, tuple(sizes.split()) or ("",)) for kind, (name, _, sizes) in parts.items()}


SEPARABLE, OTHERS = _kinds("substitutes.separable"), _kinds("substitutes.others")
KINDS = {**SEPARABLE, **OTHERS}
WIDTH = 16  # of the stem; in narrower networks it is these fractions of it
NARROWER, THIN_DENSE = (3 / 4, 1 / 2), (1 / 2, 3 / 8, 1 / 4)  # of what has one size only, and of dense networks
# S2: those of which Gray et al. say that they need the scaling (hashed layers do not).
SCALED = ("generic", "tensor_train", "tucker", "shuffle", "acdc")
UNSCALED = (*SCALED, "tied", "sep_hashed", "basis")
# What the sources add to the loss. They weigh the orthogonality with 10, which diverges where a layer has few filters.
TERMS: Mapping[str, Mapping[str, Any]] = {"linearconv": {"decorrelation": 0.01}, "dsfb": {"orthogonality": 0.1}}
FITTED = tuple(TEXTS["substitutes"]["fitted"].split())  # these also start from a trained dense network
AXES: Mapping[str, str] = {"parameters": "stored parameters", "macs": "multiply-accumulates"}
POINTS = 0.2


@dataclass(frozen=True)
class Variant:
    """What a variant's name says: ``wrn-16-4 tucker:0.41, plain decay``.

    ``text`` is the structured layer, or "dense"; ``width`` that of the stem where it is not the network's own;
    ``how`` is "" (scaled decay, from scratch), "plain decay", "fitted" or "attention".
    """

    network: str
    text: str
    width: int | None = None
    how: str = ""

    def __str__(self) -> str:
        width = f", width {self.width}" if self.width else ""
        return f"{self.network} {self.text}{width}{', ' * bool(self.how)}{self.how}"

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """The variant of that name."""
        first, *rest = name.replace(", width ", " width ", 1).split(", ")
        network, text, *width = first.split(" ")
        return cls(network, text, int(width[1]) if width else None, *rest)

    @property
    def kind(self) -> str:
        """The kind of layer."""
        return self.text.partition(":")[0]


def _texts(kind: str) -> list[str]:
    return [f"{kind}:{size}" if size else kind for size in KINDS[kind][1]]


def judged(kind: str) -> str:
    """The text of a kind at its judged size: the middle one."""
    return _texts(kind)[len(KINDS[kind][1]) // 2]


def _runs(
    base: Run, *, seeds: int, kinds: Sequence[str] = tuple(KINDS), fitted: Sequence[str] = FITTED,
    others: Sequence[str] = (),
) -> tuple[Run, ...]:  # fmt: skip
    """All variants from scratch, seed by seed; then those with a teacher; then a few variants of ``others``."""
    plain = replace(base.recipe, decay=None)
    short = replace(base.recipe, epochs=max(1, base.recipe.epochs // 4), lr=base.recipe.lr / 5)
    attention = replace(base.recipe, attention=1000.0)

    def one(seed: int, text: str, how: str = "", part: float = 0, model: str = base.model, **settings: Any) -> Run:
        narrower = round(part * WIDTH) or None
        recipe = plain if text == DENSE else replace(base.recipe, **TERMS.get(text.partition(":")[0], {}))
        settings = {"layer": None if text == DENSE else text, "recipe": recipe, **settings}
        name = str(Variant(model, text, narrower, how))
        return replace(base, variant=name, seed=seed, model=model, width=narrower or base.width, **settings)

    def from_scratch(seed: int, kind: str) -> list[Run]:
        texts = _texts(kind)
        narrower = [one(seed, texts[0], part=part) for part in NARROWER if len(texts) == 1]
        return [*(one(seed, text) for text in texts), *narrower]

    def of_seed(seed: int) -> list[Run]:
        first = [kind for kind in ("basis", *SEPARABLE) if kind in kinds]
        runs = [one(seed, DENSE), *(one(seed, DENSE, part=part) for part in THIN_DENSE)]
        runs += [run for kind in first for run in from_scratch(seed, kind)]
        runs += [one(seed, judged(kind), "plain decay", recipe=plain) for kind in UNSCALED if kind in kinds]
        return runs + [run for kind in kinds if kind not in first for run in from_scratch(seed, kind)]

    def taught(seed: int) -> list[Run]:
        runs = [one(seed, text, "fitted", teacher=plain, fitted=True, recipe=short) for text in fitted]
        kept = [kind for kind in ("generic", "shuffle", "basis") if kind in kinds]
        return runs + [one(seed, judged(k), "attention", teacher=plain, recipe=attention) for k in kept]

    few = (DENSE, *(judged(kind) for kind in ("basis", *SEPARABLE, "sep")))
    listed = [run for part in (of_seed, taught) for seed in range(seeds) for run in part(seed)]
    return (*listed, *(one(s, text, model=model) for s in range(seeds) for model in others for text in few))


def of_main_network(records: Sequence[Record]) -> list[Record]:
    """The records of the network with the most variants."""
    names = [network for network, _ in dict.fromkeys((r.config["model"], r.config["variant"]) for r in records)]
    main = max(dict.fromkeys(names), key=names.count, default="")
    return [r for r in records if r.config["model"] == main]


def variants(records: Sequence[Record], *, how: str = "", least: int = 1) -> list[Variant]:
    """The variants trained that way, with at least ``least`` runs, in the order of the records' study."""
    found = dict.fromkeys(Variant.parse(r.config["variant"]) for r in records)
    return [a for a in found if a.how == how and len(accuracies(records, str(a))) >= least]


def cost_of(records: Sequence[Record], one: Variant, axis: str) -> float:
    """What a variant's network costs: a key of :data:`AXES`, or "trained", which all numbers of a dense one are."""
    return float(study.result_of(records, str(one))["parameters" if axis == "trained" and one.text == DENSE else axis])


def difference(records: Sequence[Record], better: Variant, worse: Variant, *, comparisons: int = 1) -> Estimate:
    """Test accuracy (a fraction) of the first variant minus that of the second."""
    return study.difference_of(records, (str(better), str(worse)), comparisons=comparisons)


def standing(records: Sequence[Record], axis: str) -> tuple[set[str], set[str]]:
    """Kinds of separable structured layers that are beaten, and that are ahead, on one axis by the rule of S1.

    Beaten by a variant of another kind that costs at most as much and is surely better; ahead of a narrower dense
    network that costs at least as much.
    """
    costs = {a: cost_of(records, a, axis) for a in variants(records, least=2)}
    mine = [a for a in costs if a.kind in SEPARABLE and a.width is None]
    rivals = [a for a in costs if a.kind not in SEPARABLE]
    worse = [(a, b) for a in mine for b in rivals if costs[b] <= costs[a]]
    better = [(a, b) for a in mine for b in rivals if b.text == DENSE and b.width and costs[b] >= costs[a]]
    n = len({*worse, *better})  # of equal costs, one interval answers both questions
    beaten = {a.kind for a, b in worse if difference(records, b, a, comparisons=n).low > 0}
    return beaten, {a.kind for a, b in better if difference(records, a, b, comparisons=n).low > 0}


def step_times(profile: str) -> dict[tuple[str, int | None], Mapping[str, Any]]:
    """The measured training step of this profile's network, by layer (or "dense") and width of the stem.

    A row of the benchmark (``ms`` is its median, ``speedup`` the dense network's time / this) and its ``device``.
    """
    found: dict[tuple[str, int | None], Mapping[str, Any]] = {}
    for first in STUDY.runs(profile)[:1]:
        wanted = {"model": first.model, "batch_size": first.recipe.batch_size}
        for report in load_benches(profile, kind="bench-structured-train"):
            for row in report.rows if wanted.items() <= report.config.items() else ():
                if row["mode"] != "control" and "ms" in row:
                    found[row["layer"], row["width"]] = {**row, "device": report.environment["device"]}
    return found


def gain(records: Sequence[Record], kinds: Sequence[str] = SCALED) -> Estimate:
    """Mean over the kinds of what scaled decay gains over plain decay in test accuracy (a fraction)."""
    return study.difference_of(records, *(_decays(records, kind) for kind in kinds))


def _decays(records: Sequence[Record], kind: str) -> tuple[str, str]:
    """The variants of a kind at its judged size with scaled and with plain decay."""
    scaled = Variant(records[0].config["model"], judged(kind))
    return str(scaled), str(replace(scaled, how="plain decay"))


def judge(records: Sequence[Record], profile: str) -> tuple[Verdict, ...]:
    """The verdicts on S1 and S2."""
    if not records:
        return study.untested("S1", profile, 0), study.untested("S2", profile, 0)
    records = of_main_network(records)
    return _judge_pareto(records, profile), _judge_decay(records, profile)


def _judge_pareto(records: Sequence[Record], profile: str) -> Verdict:
    network = records[0].config["model"]
    compared = dict.fromkeys(run.variant for run in STUDY.runs(profile) if run.model == network)
    lacking = [name for name in compared if not Variant.parse(name).how and len(accuracies(records, name)) < 2]
    if lacking:
        return Verdict("S1", profile, "not tested", f"two runs per variant are missing of {few(lacking, '; ')}")
    there = variants(records, least=2)
    separable = {a.kind for a in there} & set(SEPARABLE)
    found = {axis: standing(records, axis) for axis in AXES}
    good = all(ahead - beaten for beaten, ahead in found.values())
    label = study.label_of(good, all(separable <= beaten for beaten, _ in found.values()))
    parts = []
    for axis, (beaten, ahead) in found.items():
        best = ", ".join(SEPARABLE[kind][0] for kind in SEPARABLE if kind in ahead - beaten) or "none"
        counts = {"beaten": len(beaten), "kinds": len(separable)}
        parts.append(study.say("findings", "S1", axis=AXES[axis], best=best, **counts))
    n = min(len(accuracies(records, str(a))) for a in there)
    return Verdict("S1", profile, label, f"with {network} {'; '.join(parts)} (n = {n} or more per variant)")


def _judge_decay(records: Sequence[Record], profile: str) -> Verdict:
    kinds = [k for k in SCALED if min(len(accuracies(records, name)) for name in _decays(records, k)) >= 2]
    if len(kinds) < (2 if profile == "smoke" else len(SCALED)):
        return Verdict("S2", profile, "not tested", "two runs with and without scaled decay are missing")
    mean = gain(records, kinds)
    label = study.label_of(100 * mean.low > POINTS, 100 * mean.high < POINTS)
    texts = {"network": records[0].config["model"], "gained": mean.text(scale=100), "kinds": len(kinds), "n": mean.n}
    return study.verdict("S2", profile, label, 100 * mean.value, **texts)


STUDY = Study.named("substitutes", _runs, judge, dict(include=BLOCKS), points=POINTS)


def bench_variants(profile: str, model: str | None = None) -> list[tuple[str, int | None]]:
    """Text and width of each variant that a profile trains from scratch, but the dense one, for ``basis bench``."""
    found = [Variant.parse(run.variant) for run in STUDY.runs(profile)]
    found = [one for one in found if not one.how and model in (None, one.network)]
    return list(dict.fromkeys((one.text, one.width) for one in found if one.text != DENSE or one.width))
