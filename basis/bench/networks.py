"""Speed of whole training steps: networks of basis and other structured layers against the dense one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
TOGETHER = 4  # structured networks that are measured in one cell, beside the dense one and its control


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A network whose training steps are timed: what makes it, what its row says, what is trained, and how."""

    make: Callable[[], nn.Module]
    row: Mapping[str, Any]
    trained: str = "both"
    step: Stepping = "eager"


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
    rows = []
    for value, sizes in cells.items():
        about = {"model": model, what: value, "coefficients": "", "trained": "both", "norms": "ordinary"}
        wanted: list[tuple[str, Stepping]] = [("dense", steps[0]), ("control", steps[0])]
        wanted += [("dense", step) for step in [*steps, *dense_steps] if step != steps[0]]
        trials = {
            mode if step == steps[0] else f"{mode} {step}": Trial(
                make=partial(copy.deepcopy, dense), row={**about, "mode": mode, "step": step}, step=step
            )
            for mode, step in wanted
        }
        for mode, form, part, norm, step in itertools.product(modes, coefficients, trained, norms, steps):
            options: dict[str, Any] = {"mode": mode, "coefficients": form, "batch_norm": norm}
            row = {**about, "mode": mode, "coefficients": form, "trained": part, "norms": norm, "step": step}
            make = partial(substitute, dense, **sizes, init="random", **options)
            trials[f"{mode} {form} {part} {norm} {step}"] = Trial(make=make, row=row, trained=part, step=step)
        rows += measure_steps(trials, setting, progress)
    listed: dict[str, Iterable[Any]] = {f"{what}s": cells, "modes": modes, "coefficients": coefficients}
    listed |= {"trained": trained, "norms": norms, "steps": steps, "dense_steps": dense_steps}
    lists = {name: list(values) for name, values in listed.items()}
    return setting.report(f"bench-{'train' if plans is None else 'plans'}", rows, model=model, width=width, **lists)


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

    def trial(text: str, its_width: int | None, mode: str) -> Trial:
        row = {"model": model, "layer": text, "width": its_width, "mode": mode}
        return Trial(make=partial(_structured, model, text, its_width, include), row=row)

    rows = []
    for start in range(0, len(pairs), TOGETHER):
        trials = {mode: trial("dense", width, mode) for mode in ("dense", "control")}
        for text, its_width in pairs[start : start + TOGETHER]:
            trials[f"{text}@{its_width}"] = trial(text, its_width, "dense" if text == "dense" else "layer")
        rows += measure_steps(trials, setting, progress)
    rows = [{**row, "trained": row.get("trained_numbers")} for row in rows]
    options = {"model": model, "width": width, "include": include, "layers": [list(pair) for pair in pairs]}
    return setting.report("bench-structured-train", rows, **options)


def measure_steps(
    trials: Mapping[str, Trial], setting: Setting, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A row for each network but "dense", by turns; "dense graphed" is what graphed ones are compared with, if given.

    Rows have ``parameters``, ``trained_numbers``, the numbers of layers ``coupled`` and ``substituted``,
    ``parameter_ratio``, ``images_per_second`` and ``means``. A network that cannot be made or run has ``error``.
    """
    references = {name: f"dense {trial.step}" for name, trial in trials.items() if f"dense {trial.step}" in trials}
    references |= {name: "dense" for name in trials if name.startswith("dense")}
    compiled = next((name for name in trials if name in ("dense compiled", "dense fast")), None)
    made: dict[str, nn.Module] = {}
    measured: dict[str, dict[str, Any]] = {}
    with setting.globals():
        for name, trial in trials.items():
            try:
                made[name] = trial.make()
            except ValueError as error:
                measured[name] = {"error": str(error)}
        counts = {name: _counts(network) for name, network in made.items()}
        for name, network in made.items():
            Parts(network).train(TRAINED[trials[name].trained])
        x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
        labels = torch.randint(10, (setting.batch_size,), device=x.device)
        captures = {
            name: PeakCapture(setting.where, capture)
            for name in made
            if means_for(trials[name].step, setting.where).graphed and (capture := setting.new_capture())
        }
        trainers = {name: _trainer(net, setting, trials[name].step, captures.get(name)) for name, net in made.items()}
        measured |= setting.measure(
            {name: _step(trainer, x, labels) for name, trainer in trainers.items()},
            reference=references,
            versus=dict.fromkeys(trials, compiled) if compiled else {},
            may_fail=[name for name in made if name != "dense"],
        )
    rows = []
    for name, trial in trials.items():
        if name == "dense":
            continue
        found, other = measured[name], references.get(name, "dense")
        if name in made:
            sides = {"peak_mib": name, "dense_peak_mib": other}
            peaks = {key: captures[one].peak / 2**20 for key, one in sides.items() if trainers[one].means.graphed}
            means, others = trainers[name].means, trainers[other].means
            if trial.step == trials[other].step and means.graphed != others.graphed and "error" not in found:
                found = {"error": f"its step is {means}, that of the dense network {others}"}
            if compiled and not trainers[compiled].means.compiled:
                found = {key: value for key, value in found.items() if not key.startswith("versus")}
            found = {key.replace("versus_basis", "versus_compiled"): value for key, value in found.items()}
            if "ms" in found:
                found |= {**peaks, "images_per_second": setting.batch_size / found["ms"] * 1000}
                found |= {"timed": "graph"} if "timed" in found and means.graphed else {}
            found |= {**counts[name], "means": str(means)}
            found["parameter_ratio"] = counts["dense"]["parameters"] / counts[name]["parameters"]
        rows.append({**trial.row, **found})
        tell(progress, rows[-1])
    if {"compiled", "fast"} & {trial.step for trial in trials.values()}:
        forget_compiled()
    return rows


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
