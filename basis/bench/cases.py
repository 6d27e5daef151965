"""Speed, measured: basis layers, blocks with batch normalisation, and whole training steps, against dense twins.

How a time is taken is told in :mod:`basis.bench.timing`; what a user would take instead is measured in
:mod:`basis.bench.rivals`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from basis.bench.timing import (
    PASSES,
    RATIOS,
    RESNET18_SHAPES,
    BenchReport,
    Pass,
    PeakCapture,
    Progress,
    Setting,
    Shape,
    Step,
    check_known,
    check_options,
    compare,
    forget_compiled,
    interleave,
    layer_steps,
    tell,
)
from basis.costs import cost, count_parameters, trace_calls
from basis.layers.batchnorm import activate
from basis.layers.conv import MODES, BasisConv2d, Mode, basis_channels_for
from basis.models import build
from basis.substitution import Plan, plan_of, substitute
from basis.training.loop import Recipe, make_step
from basis.training.skipping import Parts, Trained
from basis.training.stepping import Capture, TrainingStep, means_for
from basis.training.stepping import Step as Stepping

__all__ = [
    "NORMS", "PASSES", "RATIOS", "RESNET18_SHAPES", "STEPS", "TRAINED", "BenchReport", "Setting", "Shape",
    "bench_blocks", "bench_latency", "bench_layers", "bench_training", "compare", "interleave",
]  # fmt: skip

Norms = Literal["ordinary", "through_basis"]
NORMS: tuple[Norms, ...] = get_args(Norms)
STEPS: tuple[Stepping, ...] = get_args(Stepping)
# What a training step may train of the basis layers; everything else is always trained.
TRAINED: Mapping[str, Trained] = {
    "both": Trained(basis=True, coefficients=True),
    "basis": Trained(basis=True, coefficients=False),
    "coefficients": Trained(basis=False, coefficients=True),
    "neither": Trained(basis=False, coefficients=False),
}


def bench_layers(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[Mode] = ("factorized", "composed", "hybrid", "auto"),
    passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure single layers against ``nn.Conv2d``; a cell is a shape, a pass and a ratio.

    "forward" is inference, without gradients; "forward+backward" takes the gradients of the input and of
    all parameters. A row also has ``mac_ratio``, what the multiplications alone would give as speed-up,
    and ``resolved``, the mode that "auto" stands for: where that is measured too, the row of "auto" is the same
    measurement, named in ``same_as``. ``shapes`` are written as in :class:`Shape`; ``progress`` is told one line
    per row.

    Raises:
        ValueError: for a shape, ratio, mode, pass or setting that makes no sense.
    """
    parsed = [Shape.parse(text) for text in shapes]
    check_options(ratios, modes, passes)
    setting = (setting or Setting()).settled_for(parsed)
    rows = []
    for shape, one, ratio in itertools.product(parsed, passes, ratios):
        k = basis_channels_for(ratio, shape.out_channels)
        with setting.globals():
            layers: dict[str, nn.Module] = {"dense": shape.conv(), "control": shape.conv()}
            for mode in modes:
                layers[mode] = BasisConv2d.shaped_like(shape.conv(), basis_channels=k, mode=mode)
            placed = {name: setting.place(layer) for name, layer in layers.items()}
            executed = {name: getattr(layer, "resolved_mode", "dense") for name, layer in placed.items()}
            measured = _measure_modes(placed, executed, shape, one, setting)
        for name, values in measured.items():
            resolved = executed[name]
            apart = resolved == "factorized" and getattr(layers[name], "derives_apart", False)
            macs = [shape.macs(k, m, setting.batch_size, one) for m in ("dense", "cat" if apart else resolved)]
            row = {"shape": str(shape), "pass": one, "ratio": ratio, "basis_channels": k, "mode": name}
            rows.append({**row, "resolved": resolved, **values, "mac_ratio": macs[0] / macs[1]})
            tell(progress, rows[-1], str(shape))
    options = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "modes": list(modes)}
    return setting.report("bench-layer", rows, **options, passes=list(passes))


def _measure_modes(
    placed: Mapping[str, nn.Module],
    executed: Mapping[str, str],
    shape: Shape,
    one: Pass,
    setting: Setting,
    *,
    shortcut: bool = False,
) -> dict[str, dict[str, Any]]:
    """What is measured of each layer but "dense"; of "auto" only where the mode it executes is not measured itself."""
    twin = executed.get("auto")
    twin = twin if twin in MODES and twin in placed else None
    own = {name: layer for name, layer in placed.items() if name != "auto" or not twin}
    steps = layer_steps(own, [(shape.in_channels, shape.size, shape.size)], one, setting, shortcut=shortcut)
    optional = [name for name in own if name not in ("dense", "control")]
    measured = setting.measure(steps, versus={"through_basis": twin or "auto"}, may_fail=optional)
    if twin:
        measured["auto"] = {**measured[twin], "same_as": twin}
    return {name: measured[name] for name in placed if name != "dense"}


class Block(nn.Module):
    """Convolution, batch normalisation, sum with a shortcut where one is given, ReLU; as in the ResNets."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """From (N, C_in, H, W), and a shortcut of the output's shape, to (N, C_out, H', W')."""
        return activate(self.bn, self.conv(x), shortcut)


def bench_blocks(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[Mode] = ("factorized", "composed", "hybrid", "auto"),
    norms: Sequence[Norms] = NORMS,
    residual: bool = False,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure :class:`Block` in training mode, forward and backward, against the one with ``nn.Conv2d``.

    A cell is a shape and a ratio. Gradients are taken of the input, of the shortcut and of all parameters.
    The candidates are the modes with the ordinary batch normalisation, and "through_basis", where it is
    taken from the basis channels (:mod:`basis.layers.batchnorm`); its ``versus_basis`` is against mode auto.

    Args:
        norms: whether to measure the modes ("ordinary"), "through_basis", or both.
        residual: whether a shortcut is added before the ReLU.

    Raises:
        ValueError: for a shape, ratio, mode, norm or setting that makes no sense.
    """
    parsed = [Shape.parse(text) for text in shapes]
    check_options(ratios, modes, ())
    check_known("norms", norms, NORMS)
    setting = (setting or Setting()).settled_for(parsed)
    rows = []
    for shape, ratio in itertools.product(parsed, ratios):
        with setting.globals():
            dense = Block(shape.conv(), nn.BatchNorm2d(shape.out_channels))
            blocks: dict[str, nn.Module] = {"dense": dense, "control": copy.deepcopy(dense)}
            for mode in modes if "ordinary" in norms else ():
                blocks[mode] = substitute(dense, ratio=ratio, mode=mode, init="random")
            if "through_basis" in norms:
                blocks["through_basis"] = substitute(dense, ratio=ratio, init="random", batch_norm="through_basis")
            placed = {name: setting.place(block) for name, block in blocks.items()}
            executed = {name: getattr(block.conv, "resolved_mode", "dense") for name, block in placed.items()}
            measured = _measure_modes(placed, executed, shape, "forward+backward", setting, shortcut=residual)
        for name, values in measured.items():
            row: dict[str, Any] = {"shape": str(shape), "pass": "forward+backward", "ratio": ratio}
            row |= {"basis_channels": basis_channels_for(ratio, shape.out_channels), "mode": name}
            rows.append(row | {"resolved": executed[name], **values})
            tell(progress, rows[-1], f"block {shape}")
    options = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "modes": list(modes)}
    return setting.report("bench-block", rows, **options, norms=list(norms), residual=residual)


@dataclass(frozen=True)
class TimedLayer:
    """A convolution as far as its time depends on it; equal ones are measured once."""

    options: tuple[Any, ...]  # the first arguments of nn.Conv2d, up to padding_mode
    inputs: tuple[tuple[int, ...], ...]  # (C, H, W) of each call in one forward pass
    input_gradient: bool

    @classmethod
    def of(cls, conv: Any, inputs: Iterable[tuple[int, ...]], *, input_gradient: bool) -> TimedLayer:
        """``conv`` on these inputs."""
        padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
        options = (
            conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride), padding,
            tuple(conv.dilation), conv.groups, conv.bias is not None, conv.padding_mode,
        )  # fmt: skip
        return cls(options, tuple(inputs), input_gradient)

    def __str__(self) -> str:
        c_in, c_out, kernel, stride, _, dilation, groups, *_ = self.options
        sizes = "+".join("x".join(map(str, size[1:])) for size in self.inputs)
        text = f"{c_in}-{c_out}@{sizes} {'x'.join(map(str, kernel))}"
        for mark, value in (("/", stride), (" dilation ", dilation)):
            text += f"{mark}{'x'.join(map(str, dict.fromkeys(value)))}" if set(value) != {1} else ""
        return text + (f" groups {groups}" if groups > 1 else "")

    def conv(self) -> nn.Conv2d:
        """The dense layer."""
        return nn.Conv2d(*self.options)


def _timed(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, TimedLayer]:
    """Every convolution that can be substituted and is called, as it is called in one forward pass."""
    free = {name for name, why in plan_of(model).skipped.items() if why == "left dense"}
    found = {}
    for name, conv, calls in trace_calls(model, (1, *input_size)):
        if name in free and calls and isinstance(conv, nn.Conv2d):
            needs_dx = any(call.needs_dx for call in calls)
            found[name] = TimedLayer.of(conv, (call.x[1:] for call in calls), input_gradient=needs_dx)
    return found


def bench_latency(
    model: nn.Module,
    *,
    input_size: Sequence[int] = (3, 32, 32),
    ratios: Sequence[float] = RATIOS,
    multiple: int = 8,
    passes: Sequence[Pass] = PASSES,
    setting: Setting | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> BenchReport:
    """Measure every convolution of ``model`` that can be substituted, alone, dense and in mode auto.

    For :func:`basis.select`. A cell is a layer and a pass; all its candidates are measured together: k
    nearest to each ratio, a multiple of ``multiple`` and of the layer's groups, and below C_out. Layers
    are of the model's shapes but with fresh weights, on the inputs that they get in one forward pass on
    images of ``input_size``; the first layer takes no gradient of its input. Of layers with equal shapes
    the first is measured; the rows of the others say so in ``same_as``.

    Rows also have ``layer``, ``shape``, ``basis_channels`` (C_out in the control row) and ``resolved``.

    Args:
        model: dense, or with layers that are substituted already, which are left out.
        input_size: (C, H, W) of one image.
        multiple: what every k is a multiple of.
        name: what the report calls the model; its class unless given.

    Raises:
        ValueError: for a model without such a layer, or that cannot be run on such images; for a ratio,
            multiple, pass or setting that makes no sense.
    """
    check_options(ratios, (), passes)
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but must be at least 1")
    found = _timed(model, tuple(input_size))
    if not found:
        raise ValueError("the model has no convolution that can be substituted and is called")
    setting = (setting or Setting()).settled(model)
    cells: dict[tuple[TimedLayer, Pass], list[dict[str, Any]]] = {}
    rows = []
    for (layer, timed), one in itertools.product(found.items(), passes):
        cell = cells.get((timed, one))
        if cell is None:
            cell = cells[timed, one] = _latency_rows(layer, timed, one, ratios, multiple, setting, progress)
        first = cell[0]["layer"]
        rows += [{**row, "layer": layer, "same_as": None if layer == first else first} for row in cell]
    options = {"model": name or type(model).__name__, "input_size": list(input_size), "multiple": multiple}
    options["macs"] = cost(model, input_size).total.forward_macs
    return setting.report("bench-latency", rows, **options, ratios=list(ratios), passes=list(passes))


def _latency_rows(
    layer: str,
    timed: TimedLayer,
    one: Pass,
    ratios: Sequence[float],
    multiple: int,
    setting: Setting,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    _, width, *_, groups, _, _ = timed.options
    candidates = {basis_channels_for(r, width, math.lcm(groups, multiple)) for r in ratios}
    ks = {"control": width} | {str(k): k for k in sorted(candidates) if k < width}
    with setting.globals():
        layers: dict[str, nn.Module] = {"dense": timed.conv(), "control": timed.conv()}
        for key, k in ks.items():
            if key != "control":
                layers[key] = BasisConv2d.shaped_like(timed.conv(), basis_channels=k, mode="auto")
        placed = {key: setting.place(module) for key, module in layers.items()}
        steps = layer_steps(placed, timed.inputs, one, setting, input_gradient=timed.input_gradient)
        measured = setting.measure(steps, may_fail=[key for key in ks if key != "control"])
    rows = []
    for key, k in ks.items():
        row: dict[str, Any] = {"layer": layer, "shape": str(timed), "pass": one, "ratio": k / width}
        row |= {"basis_channels": k, "mode": "control" if key == "control" else "auto"}
        rows.append(row | {"resolved": getattr(placed[key], "resolved_mode", "dense"), **measured[key]})
        tell(progress, rows[-1], layer)
    return rows


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

    All eligible convolutions are substituted at one ratio; a cell is a ratio, and all its candidates, which
    are those of mode, coefficients, trained parts, norms and steps, are measured together. Images are random,
    3x32x32, and already on the device. A row also has ``parameters``, ``parameter_ratio`` (dense / candidate),
    ``images_per_second``, ``means``: what its kind of step came to on this device, and ``coupled``: the number of
    layers with batch normalisation through the basis.

    Each candidate is compared with the dense network by the same kind of step; one whose step could be made that
    kind where the dense network's could not, or the other way round, has failed. The rows of mode "dense" are
    that network by the other kinds, compared with itself by the first of ``steps``. The peaks
    of a CUDA graph are those of its capture, which fixes what it takes of the memory.

    Args:
        plans: measured in place of ``ratios``: the share of a budget, which is ``share`` in its rows -> plan. The
            report is of kind "bench-plans" then.
        coefficients: forms of the coefficient matrix, see :class:`basis.layers.coefficients.Form`.
        trained: what a step trains of the basis layers, of :data:`TRAINED`.
        norms: "through_basis" takes batch normalisation from the basis channels (:mod:`basis.layers.batchnorm`).
        steps: how a step is run: "eager", "compiled", "graphed" or "fast" (:mod:`basis.training.stepping`).
        dense_steps: further kinds of step of the dense network alone. With a compiled one among them rows also have
            ``versus_compiled``: that dense network / candidate within a round, with quartiles.

    Raises:
        ValueError: for an unknown model, or a ratio, plan, mode, form, part, norm, step or setting that makes no sense.
    """
    check_options(ratios, modes, ())
    check_known("trained", trained, tuple(TRAINED))
    check_known("norms", norms, NORMS)
    check_known("step", [*steps, *dense_steps], STEPS)
    if not steps:
        raise ValueError("steps is empty, but must name at least one kind of step")
    setting = setting or Setting()
    what = "ratio" if plans is None else "share"
    cells: dict[float, dict[str, Any]] = {r: {"ratio": r} for r in ratios}
    if plans is not None:
        cells = {share: {"plan": plan} for share, plan in plans.items()}
    with torch.device("meta"):
        shape = build(model, width=width)
    for sizes, form, norm in itertools.product(cells.values(), coefficients, norms):  # refused before any is measured
        substitute(shape, **sizes, init="random", coefficients=form, batch_norm=norm)
    with setting.globals():
        dense = build(model, width=width)
    setting = setting.settled(dense)
    kinds = _training_candidates(modes, coefficients, trained, norms, steps, dense_steps)
    rows = []
    for value, sizes in cells.items():
        for values in _training_rows(dense, sizes, kinds, setting):
            rows.append({"model": model, what: value, **values})
            tell(progress, rows[-1], model)
        if {"compiled", "fast"} & {*steps, *dense_steps}:
            forget_compiled()
    listed: dict[str, Iterable[Any]] = {f"{what}s": cells, "modes": modes, "coefficients": coefficients}
    listed |= {"trained": trained, "norms": norms, "steps": steps, "dense_steps": dense_steps}
    options = {name: list(values) for name, values in listed.items()}
    return setting.report(f"bench-{'train' if plans is None else 'plans'}", rows, model=model, width=width, **options)


def _training_rows(
    dense: nn.Module, sizes: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]], setting: Setting
) -> list[dict[str, Any]]:
    """What is measured of the networks of a cell."""
    references = _references(kinds)
    others = (name for name, kind in kinds.items() if kind["mode"] == "dense" and name != "dense")
    compiled = next((name for name in others if kinds[name]["step"] in ("compiled", "fast")), None)
    with setting.globals():
        networks = {name: _candidate(dense, sizes, kind) for name, kind in kinds.items()}
        counts = {name: count_parameters(network) for name, network in networks.items()}
        for name, network in networks.items():
            Parts(network).train(TRAINED[kinds[name]["trained"]])
        x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
        labels = torch.randint(10, (setting.batch_size,), device=x.device)
        captures = {
            name: PeakCapture(setting.where, capture)
            for name, kind in kinds.items()
            if means_for(kind["step"], setting.where).graphed and (capture := setting.new_capture())
        }
        trainers = {
            name: make_trainer(network, setting, kinds[name]["step"], captures.get(name))
            for name, network in networks.items()
        }
        measured = setting.measure(
            {name: training_step(trainer, x, labels) for name, trainer in trainers.items()},
            reference=references,
            versus=dict.fromkeys(kinds, compiled) if compiled else {},
            may_fail=[name for name in kinds if name != "dense"],
        )
    rows = []
    for name, values in measured.items():
        means, other = trainers[name].means, references.get(name, "dense")
        alike = kinds[name]["step"] != kinds[other]["step"] or means.graphed == trainers[other].means.graphed
        if "error" not in values and not alike:
            values = {"error": f"its step is {means}, that of the dense network {trainers[other].means}"}
        row: dict[str, Any] = {**kinds[name], "parameters": counts[name]}
        if compiled and not trainers[compiled].means.compiled:
            values = {key: value for key, value in values.items() if not key.startswith("versus")}
        row |= {key.replace("versus_basis", "versus_compiled"): value for key, value in values.items()}
        row |= {"parameter_ratio": counts["dense"] / counts[name], "means": str(means)}
        row["coupled"] = sum(getattr(module, "mixed_later", False) for module in networks[name].modules())
        if "ms" in row:
            row["images_per_second"] = setting.batch_size / row["ms"] * 1000
        for key, side in (("peak_mib", name), ("dense_peak_mib", other)):
            if key in row and trainers[side].means.graphed:
                row[key] = captures[side].peak / 2**20
        if "timed" in row and means.graphed:
            row["timed"] = "graph"
        rows.append(row)
    return rows


def _training_candidates(
    modes: Sequence[str],
    coefficients: Sequence[str],
    trained: Sequence[str],
    norms: Sequence[str],
    steps: Sequence[str],
    dense_steps: Sequence[str] = (),
) -> dict[str, dict[str, str]]:
    """Name -> what the rows of a candidate say of it; "dense" is what others are compared with."""
    plain = {"coefficients": "", "trained": "both", "norms": "ordinary"}
    found = {name: {"mode": name, **plain, "step": steps[0]} for name in ("dense", "control")}
    others = [step for step in [*steps, *dense_steps] if step != steps[0]]
    found |= {f"dense {step}": {"mode": "dense", **plain, "step": step} for step in others}
    for mode, form, part, norm, step in itertools.product(modes, coefficients, trained, norms, steps):
        kind = {"mode": mode, "coefficients": form, "trained": part, "norms": norm, "step": step}
        found[" ".join(kind.values())] = kind
    return found


def _candidate(dense: nn.Module, sizes: Mapping[str, Any], kind: Mapping[str, Any]) -> nn.Module:
    if kind["mode"] in ("dense", "control"):
        return copy.deepcopy(dense)
    options = {"mode": kind["mode"], "coefficients": kind["coefficients"], "batch_norm": kind["norms"]}
    return substitute(dense, **sizes, init="random", **options)


def _references(kinds: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Candidate -> the dense network by the same kind of step, where that is not "dense" itself."""
    named = {name: f"dense {kind['step']}" for name, kind in kinds.items() if kind["mode"] != "dense"}
    return {name: dense for name, dense in named.items() if dense in kinds}


def make_trainer(
    network: nn.Module, setting: Setting, step: Any = "eager", capture: Capture | None = None
) -> TrainingStep:
    # A learning rate at which no network diverges: infinities and denormals have other speeds.
    recipe = Recipe(lr=1e-3, step=step, precision=setting.precision, memory_format=setting.memory_format)
    return make_step(network, recipe, device=setting.where, capture=capture)


def training_step(trainer: TrainingStep, x: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        trainer(x, labels)
        if not trainer.means.graphed:  # a graph keeps its gradients where it has captured them
            trainer.optimizer.zero_grad()

    return step
