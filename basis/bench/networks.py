"""Speed of whole training steps: networks of basis and other structured layers against the dense one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS
from basis.bench.timing import PeakCapture, Progress, Setting, Step, check_known, forget_compiled, tell
from basis.costs import count_parameters, count_trained
from basis.layers.conv import MODES, Mode, basis_channels_for
from basis.layers.structured import Structure
from basis.models import build
from basis.substitution import Plan, plan_of, substitute
from basis.training.loop import Recipe, make_step
from basis.training.skipping import Parts, Trained
from basis.training.stepping import Step as Stepping
from basis.training.stepping import TrainingStep, means_for

STEPS: tuple[Stepping, ...] = get_args(Stepping)
Norms = Literal["ordinary", "through_basis"]
NORMS: tuple[Norms, ...] = get_args(Norms)
# What a training step may train of the basis layers; everything else is always trained.
TRAINED: Mapping[str, Trained] = {
    "both": Trained(basis=True, coefficients=True),
    "basis": Trained(basis=True, coefficients=False),
    "coefficients": Trained(basis=False, coefficients=True),
    "neither": Trained(basis=False, coefficients=False),
}
Kind = Mapping[str, Any]  # mode, coefficients, trained, norms and step of a candidate
PLAIN = {"coefficients": "", "trained": "both", "norms": "ordinary"}
TOGETHER = 4  # structured networks that are measured in one cell, beside the dense one and its control


def bench_training(
    *,
    model: str = "resnet18",
    width: int | None = None,
    ratios: Sequence[float] = RATIOS,
    plans: Mapping[float, Plan] | None = None,
    modes: Sequence[Mode] = ("auto",),
    coefficients: Sequence[str] = ("dense",),
    trained: Sequence[str] = ("both",),
    norms: Sequence[Norms] = ("ordinary",),
    steps: Sequence[Stepping] = ("eager",),
    dense_steps: Sequence[Stepping] = (),
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure whole training steps (forward, loss, backward, SGD) of a network of :func:`basis.models.build`.

    A cell is a ratio, at which all eligible convolutions are substituted; its candidates are the combinations of
    mode, coefficients, trained parts, norms and steps. Images are random, 3x32x32, on the device. Rows have
    ``parameters``, ``parameter_ratio`` (dense / candidate), ``images_per_second``, ``means`` (what the kind of step
    came to on this device) and ``coupled``, the number of layers with batch normalisation through the basis.

    Each candidate is compared with the dense network by the same kind of step; where only one of the two could be
    made that kind, it has failed. The peak of a CUDA graph is that of its capture.

    Args:
        plans: in place of ``ratios``: the share of a budget -> plan; the report is of kind "bench-plans" then.
        coefficients: forms of the coefficient matrix, see :class:`basis.layers.coefficients.Form`.
        trained: what a step trains of the basis layers, of :data:`TRAINED`.
        steps: "eager", "compiled", "graphed" or "fast" (:mod:`basis.training.stepping`).
        dense_steps: further kinds of step of the dense network. With a compiled one among them rows also have
            ``versus_compiled``: that dense network / candidate within a round.

    Raises:
        ValueError: for an unknown model, or a ratio, plan, mode, form, part, norm, step or setting that makes no sense.
    """
    check_known("mode", modes, MODES)
    check_known("trained", trained, TRAINED)
    check_known("norms", norms, NORMS)
    check_known("step", [*steps, *dense_steps], STEPS)
    what = "ratio" if plans is None else "share"
    cells: dict[float, dict[str, Any]] = {r: {"ratio": r} for r in ratios if basis_channels_for(r, 1)}
    if plans is not None:
        cells = {share: {"plan": plan} for share, plan in plans.items()}
    setting = setting or Setting()
    with torch.device("meta"):
        shape = build(model, width=width)
    for sizes, form, norm in itertools.product(cells.values(), coefficients, norms):  # refused before any is measured
        substitute(shape, **sizes, init="random", coefficients=form, batch_norm=norm)
    with setting.globals():
        dense = build(model, width=width)
    setting = setting.settled(dense)
    kinds: dict[str, Kind] = {name: {"mode": name, **PLAIN, "step": steps[0]} for name in ("dense", "control")}
    others = [step for step in [*steps, *dense_steps] if step != steps[0]]
    kinds |= {f"dense {step}": {"mode": "dense", **PLAIN, "step": step} for step in others}
    for kind in itertools.product(modes, coefficients, trained, norms, steps):
        kinds[" ".join(kind)] = dict(zip(("mode", *PLAIN, "step"), kind, strict=True))
    rows = []
    for value, sizes in cells.items():
        networks = {name: partial(_candidate, dense, sizes, kind) for name, kind in kinds.items()}
        for found in measure_steps(networks, kinds, setting):
            rows.append({"model": model, what: value, **found})
            tell(progress, rows[-1], model)
        if {"compiled", "fast"} & {*steps, *dense_steps}:
            forget_compiled()
    listed: dict[str, Iterable[Any]] = {f"{what}s": cells, "modes": modes, "coefficients": coefficients}
    listed |= {"trained": trained, "norms": norms, "steps": steps, "dense_steps": dense_steps}
    options = {name: list(values) for name, values in listed.items()}
    return setting.report(f"bench-{'train' if plans is None else 'plans'}", rows, model=model, width=width, **options)


def bench_structured_training(
    *,
    layers: Sequence[tuple[str, int | None]],
    include: str,
    model: str = "wrn-10-1",
    width: int | None = None,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure training steps of a network whose convolutions are structured layers against the dense one.

    A few networks at a time are measured together, each few beside the dense network of ``width``. Rows have
    ``layer``, ``width``, ``parameters`` (stored numbers), ``trained`` ones, and ``substituted``, a number of layers.

    Args:
        layers: pairs of a text and a width of the stem; ("dense", width) is a narrower dense network.
        include: pattern of the convolutions that are substituted where they can; others stay dense.

    Raises:
        ValueError: for an unknown model or kind of layer, or a pattern or setting that makes no sense.
    """
    pairs = [(text if text == "dense" else str(Structure.parse(text)), its_width) for text, its_width in layers]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair != ("dense", width)]
    with torch.device("meta"):
        dense = build(model, width=width)
    Plan.uniform(dense, ratio=1, include=include)  # refuses a pattern that none matches
    setting = (setting or Setting()).settled(dense)
    rows = []
    for start in range(0, len(pairs), TOGETHER):
        wanted: dict[str, tuple[str, int | None]] = {"control": ("dense", width)}
        wanted |= {f"{text}@{its_width}" if its_width else text: (text, its_width)
                   for text, its_width in pairs[start : start + TOGETHER]}  # fmt: skip
        networks = {name: partial(_structured, model, *pair, include) for name, pair in wanted.items()}
        networks["dense"] = partial(_structured, model, "dense", width, include)
        kinds = {name: {"mode": name, **PLAIN, "step": "eager"} for name in ("dense", *wanted)}
        for found in measure_steps(networks, kinds, setting):
            text, its_width = wanted[found["mode"]]
            mode = "control" if found["mode"] == "control" else "dense" if text == "dense" else "layer"
            left = (*PLAIN, "step", "coupled", "means", "trained_numbers")
            kept = {key: value for key, value in found.items() if key not in left}
            kept |= {"trained": found["trained_numbers"]} if "trained_numbers" in found else {}
            rows.append({"model": model, "layer": text, "width": its_width, **kept, "mode": mode})
            tell(progress, rows[-1], f"{model} {text}")
    options = {"model": model, "width": width, "include": include, "layers": [list(pair) for pair in pairs]}
    return setting.report("bench-structured-train", rows, **options)


def measure_steps(
    networks: Mapping[str, Callable[[], nn.Module]], kinds: Mapping[str, Kind], setting: Setting
) -> list[dict[str, Any]]:
    """A row for each network but "dense", by turns: ``networks`` makes them, ``kinds`` says how each is trained."""
    references = {name: f"dense {kind['step']}" for name, kind in kinds.items() if kind["mode"] != "dense"}
    references = {name: other for name, other in references.items() if other in kinds}
    compiled = next((name for name in kinds if name in ("dense compiled", "dense fast")), None)
    made: dict[str, nn.Module] = {}
    errors: dict[str, str] = {}
    with setting.globals():
        for name, make in networks.items():
            try:
                made[name] = make()
            except ValueError as error:
                errors[name] = str(error)
        counts = {name: _counts(network) for name, network in made.items()}
        for name, network in made.items():
            Parts(network).train(TRAINED[kinds[name]["trained"]])
        x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
        labels = torch.randint(10, (setting.batch_size,), device=x.device)
        captures = {
            name: PeakCapture(setting.where, capture)
            for name in made
            if means_for(kinds[name]["step"], setting.where).graphed and (capture := setting.new_capture())
        }
        trainers = {name: _trainer(net, setting, kinds[name]["step"], captures.get(name)) for name, net in made.items()}
        measured = setting.measure(
            {name: _step(trainer, x, labels) for name, trainer in trainers.items()},
            reference=references,
            versus=dict.fromkeys(kinds, compiled) if compiled else {},
            may_fail=[name for name in made if name != "dense"],
        )
    rows = []
    for name in (name for name in kinds if name != "dense"):
        if name in errors:
            rows.append({**kinds[name], "error": errors[name]})
            continue
        found = measured[name]
        other = references.get(name, "dense")
        peaks = {key: captures[side].peak / 2**20 for key, side in (("peak_mib", name), ("dense_peak_mib", other))
                 if trainers[side].means.graphed}  # fmt: skip
        row = _row(found, kinds[name], kinds[other], trainers[name].means, trainers[other].means, peaks)
        if compiled and not trainers[compiled].means.compiled:
            row = {key: value for key, value in row.items() if not key.startswith("versus")}
        row = {key.replace("versus_basis", "versus_compiled"): value for key, value in row.items()}
        row |= counts[name] | {"parameter_ratio": counts["dense"]["parameters"] / counts[name]["parameters"]}
        row |= {"images_per_second": setting.batch_size / row["ms"] * 1000} if "ms" in row else {}
        rows.append(row)
    return rows


def _row(found: dict[str, Any], kind: Kind, other: Kind, means: Any, others: Any, peaks: Any) -> dict[str, Any]:
    """The measurement of a candidate with what its step was made of; an error where the dense one's was another."""
    if "error" not in found and kind["step"] == other["step"] and means.graphed != others.graphed:
        found = {"error": f"its step is {means}, that of the dense network {others}"}
    row = {**kind, **found, "means": str(means)}
    row |= {key: peak for key, peak in peaks.items() if key in row}
    if "timed" in row and means.graphed:
        row["timed"] = "graph"
    return row


def _candidate(dense: nn.Module, sizes: Mapping[str, Any], kind: Kind) -> nn.Module:
    if kind["mode"] in ("dense", "control"):
        return copy.deepcopy(dense)
    options: Any = {"mode": kind["mode"], "coefficients": kind["coefficients"], "batch_norm": kind["norms"]}
    return substitute(dense, **sizes, init="random", **options)


def _structured(model: str, text: str, width: int | None, include: str) -> nn.Module:
    dense = build(model, width=width)
    if text == "dense":
        return dense
    chosen = Plan.uniform(dense, layer=text, include=include)
    if not chosen.layers:
        reasons = [why for why in chosen.skipped.values() if not why.startswith("not among")]
        raise ValueError(f"no convolution can become {text}: {reasons[0]}")
    return substitute(dense, chosen, init="random")


def _counts(network: nn.Module) -> dict[str, int]:
    coupled = sum(getattr(module, "mixed_later", False) for module in network.modules())
    substituted = len(plan_of(network).layers)
    numbers = {"parameters": count_parameters(network), "trained_numbers": count_trained(network)}
    return numbers | {"coupled": coupled, "substituted": substituted}


def _trainer(network: nn.Module, setting: Setting, step: Any, capture: Any) -> TrainingStep:
    # A learning rate at which no network diverges: infinities and denormals have other speeds.
    recipe = Recipe(lr=1e-3, step=step, precision=setting.precision, memory_format=setting.memory_format)
    return make_step(network, recipe, device=setting.where, capture=capture)


def _step(trainer: TrainingStep, x: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        trainer(x, labels)
        if not trainer.means.graphed:  # a graph keeps its gradients where it has captured them
            trainer.optimizer.zero_grad()

    return step
