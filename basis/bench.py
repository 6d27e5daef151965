"""Speed, measured: basis layers, those of a network, and whole training steps, each against its dense twin.

Other work on a machine, its clock and its caches change from one second to the next, so candidates are
never timed one after the other. Every round runs each candidate once, in a fresh random order, and what
is reported is the median over rounds of dense / candidate *within* a round, with its quartiles. A second
dense layer or network runs along as a negative control: the quartiles of its ratio have to enclose 1.
Both sides always have the same shape, batch, precision and memory format.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.complexity import _trace, cost, count_parameters
from basis.conv import MODES, BasisConv2d, Mode, basis_channels_for
from basis.models import build
from basis.runs import RecordError, environment, write_json
from basis.skipping import Parts, Trained
from basis.substitution import plan_of, substitute
from basis.training import (
    DTYPES,
    MemoryFormat,
    Precision,
    Recipe,
    choose_device,
    choose_memory_format,
    choose_precision,
    make_optimizer,
    on_device,
)

VERSION = 1
RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Every 3x3 convolution of the CIFAR ResNet-18 but its first.
RESNET18_SHAPES = ("64@32", "128@16", "256@8", "512@4", "64-128@32/2", "128-256@16/2", "256-512@8/2")
Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# What a training step may train of the basis layers; everything else is always trained.
TRAINED: Mapping[str, Trained] = {
    "both": Trained(basis=True, coefficients=True),
    "basis": Trained(basis=True, coefficients=False),
    "coefficients": Trained(basis=False, coefficients=True),
    "neither": Trained(basis=False, coefficients=False),
}

Step = Callable[[], object]
Timer = Callable[[Step], float]  # runs a step, returns its seconds
Progress = Callable[[str], object]  # is told each row as it is measured


class Shape(NamedTuple):
    """A 3x3 convolution with padding 1 on square images of ``size`` pixels; written ``64-128@32/2``."""

    in_channels: int
    out_channels: int
    size: int
    stride: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``IN-OUT@SIZE/STRIDE``; OUT may be left out where it is IN, STRIDE where it is 1."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?@(\d+)(?:/(\d+))?", text)
        shape = found and cls(int(found[1]), int(found[2] or found[1]), int(found[3]), int(found[4] or 1))
        if not shape or min(shape) < 1:
            raise ValueError(f"shape is {text!r}, but must read IN-OUT@SIZE/STRIDE, like 64@32 or 64-128@32/2")
        return shape

    def __str__(self) -> str:
        out = f"-{self.out_channels}" if self.out_channels != self.in_channels else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels}{out}@{self.size}{stride}"

    def conv(self) -> nn.Conv2d:
        """The dense layer."""
        return nn.Conv2d(self.in_channels, self.out_channels, 3, self.stride, 1, bias=False)

    def macs(self, k: int, mode: str, batch_size: int, passes: Pass) -> int:
        """Multiply-accumulates of one step with ``k`` basis channels; ``mode`` "dense" is ``nn.Conv2d``.

        What is really executed, so with the identity in M = [I; A], which :func:`basis.complexity.cost`
        lists by itself. A backward pass has twice those of its forward pass.
        """
        c, f = self.out_channels, 9 * self.in_channels
        pixels = batch_size * ((self.size - 1) // self.stride + 1) ** 2
        compose = 0 if mode in ("dense", "factorized") else (c - k) * k * f
        dense, thin = pixels * c * f, pixels * k * (f + c)
        forward = thin if mode == "factorized" else dense + compose
        if passes == "forward":
            return forward
        return forward + 2 * (thin if mode in ("factorized", "hybrid") else dense + compose)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a benchmark found: ``kind`` ("bench-layer", "bench-latency", "bench-train"), options, machine, rows.

    Every row has ``ratio`` and ``mode`` ("control" is the second dense one), ``n`` rounds, ``ms`` and
    ``dense_ms`` (medians) with quartiles, and ``speedup``, the median over rounds of dense / candidate, with
    quartiles ``speedup_q1`` and ``speedup_q3``. ``peak_mib`` is the memory that one step takes beyond what
    was resident, on a GPU.
    """

    kind: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def to_frame(self) -> pd.DataFrame:
        """One row per candidate and cell."""
        return pd.DataFrame(list(self.rows))

    def controls(self) -> list[Mapping[str, Any]]:
        """The rows of the second dense one, each measurement once."""
        return [row for row in self.rows if row["mode"] == "control" and not row.get("same_as")]

    def failed_controls(self) -> list[Mapping[str, Any]]:
        """The control rows whose quartiles do not enclose 1; chance alone does it to 6 in 100 at 15 rounds."""
        return [row for row in self.controls() if not row["speedup_q1"] <= 1 <= row["speedup_q3"]]

    def latencies(self, step: str) -> dict[str, dict[int, float]]:
        """The milliseconds that :func:`bench_latency` found: layer -> k -> ms, and dense as k = C_out.

        Raises:
            ValueError: for a report of another kind, or a ``step`` that is no pass of this one.
        """
        if self.kind != "bench-latency":
            raise ValueError(f"latency is a report of kind {self.kind!r}, but it must be one of `basis bench latency`")
        passes = dict.fromkeys(row["pass"] for row in self.rows)
        if step not in passes:
            raise ValueError(f"step is {step!r}, but the latency report has only {', '.join(passes)}")
        found: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row["pass"] == step:
                ms = row["dense_ms" if row["mode"] == "control" else "ms"]
                found.setdefault(row["layer"], {})[row["basis_channels"]] = ms
        return found

    def save(self, path: str | Path) -> None:
        """Write the report as one JSON file, whole or not at all."""
        write_json(Path(path), {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> BenchReport:
        """Read what :meth:`save` wrote; :class:`basis.runs.RecordError` says what is wrong with a bad file."""
        try:
            content = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise RecordError(f"{path} is not a JSON benchmark ({error}); measure it again") from error
        version = content.pop("version", None) if isinstance(content, dict) else None
        if version != VERSION:
            raise RecordError(f"{path} has benchmark version {version!r}, but this package reads version {VERSION}")
        if set(content) != set(cls.__dataclass_fields__):
            raise RecordError(f"{path} lacks one of {', '.join(cls.__dataclass_fields__)}; measure it again")
        return cls(**content)

    def __str__(self) -> str:
        c, e = self.config, self.environment
        head = f"{e['device']}, {c['precision']}, {c['memory_format']}, batch {c['batch_size']}"
        candidate = ("ratio", "mode", "coefficients", "trained", "resolved")
        named = ("layer", "shape", "model", "pass", *candidate, "n", "ms", "dense_ms", "speedup")
        quartiles = ("speedup_q1", "speedup_q3", "mac_ratio", "peak_mib")
        frame = self.to_frame()
        frame = frame[[name for name in (*named, *quartiles) if name in frame and frame[name].notna().any()]]
        table = frame.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}")
        bad, controls = len(self.failed_controls()), len(self.controls())
        verdict = f"dense against itself: 1 is within the quartiles in {controls - bad} of {controls} cells"
        return f"{head}\n{table}\n{verdict}"


# -- timing -----------------------------------------------------------------------------------------


def time_on_cpu(step: Step) -> float:
    """Seconds of one call, by the wall clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_on_gpu(step: Step, *, calls: int = 10) -> float:
    """Seconds per call between two CUDA events around ``calls`` calls, so that the queue stays filled.

    The L2 cache is not flushed between calls; activations of the usual batches do not fit in it.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def interleave(
    steps: Mapping[str, Step], *, timer: Timer, rounds: int, seconds: float | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of every step in every round; a round runs each step once, in a random order of its own.

    After two rounds of warm-up there are ``rounds`` rounds, or fewer, but at least three, once
    ``seconds`` are over.
    """
    order, shuffle = list(steps), random.Random(seed).shuffle
    for _ in range(2):
        for name in order:
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.monotonic()
    for done in range(rounds):
        if seconds is not None and done >= 3 and time.monotonic() - start > seconds:
            break
        shuffle(order)
        for name in order:
            times[name].append(timer(steps[name]))
    return times


def compare(times: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Medians and quartiles of a candidate (ms) and of dense / candidate, round by round."""
    q1, median, q3 = np.quantile(times, (0.25, 0.5, 0.75)) * 1000
    ratios = np.quantile(np.divide(dense, times), (0.25, 0.5, 0.75))
    return {
        "n": len(times), "ms": median, "ms_q1": q1, "ms_q3": q3, "dense_ms": float(np.median(dense)) * 1000,
        "speedup": ratios[1], "speedup_q1": ratios[0], "speedup_q3": ratios[2],
    }  # fmt: skip


# -- the benchmarks ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, in what number format, and for how long a benchmark measures.

    Args:
        device: "cpu", "cuda", "cuda:1" ...; the GPU where there is one unless given.
        precision: "fp32", "bf16" or "fp16", by autocast; "auto": as training chooses.
        memory_format: "contiguous" or "channels_last"; "auto": as training chooses.
        batch_size: images per step.
        rounds: measurements of each candidate, at least 3.
        seconds: no further round of a cell begins after that many, from the third on.
        seed: of the weights, the inputs and the order within rounds.
        timer: runs a step and returns its seconds, instead of the device's own clock.

    Raises:
        ValueError: for an option outside these.
    """

    device: str | None = None
    precision: Precision = "auto"
    memory_format: MemoryFormat = "auto"
    batch_size: int = 64
    rounds: int = 15
    seconds: float | None = None
    seed: int = 0
    timer: Timer | None = None

    def __post_init__(self) -> None:
        if self.where.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device}, but times are taken on cpu and cuda only")
        for name, known in (("precision", get_args(Precision)), ("memory_format", get_args(MemoryFormat))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}")
        for name, least in (("batch_size", 1), ("rounds", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def where(self) -> torch.device:
        """The device itself."""
        return choose_device(self.device)

    def settled(self, model: nn.Module) -> Setting:
        """The same without "auto", as training of ``model`` would choose."""
        precision = choose_precision(self.where) if self.precision == "auto" else self.precision
        layout: Any = self.memory_format
        layout = choose_memory_format(model, self.where, precision) if layout == "auto" else layout
        return replace(self, device=str(self.where), precision=precision, memory_format=layout)

    def place(self, value: Any) -> Any:
        """A tensor of images or a module, on the device and in the memory format."""
        last = self.memory_format == "channels_last"
        return value.to(self.device).to(memory_format=torch.channels_last if last else torch.contiguous_format)

    def autocast(self) -> torch.autocast:
        """The context that a forward pass runs in."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.where.type, dtype, enabled=dtype != torch.float32)

    @contextmanager
    def globals(self) -> Iterator[None]:
        """The device is current and random numbers come from the seed; both are as before afterwards."""
        device = choose_device(self.device)
        with on_device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield

    def measure(self, steps: Mapping[str, Step]) -> dict[str, dict[str, float | None]]:
        """What was measured of each other step against the step "dense"."""
        timer = self.timer or (time_on_gpu if self.where.type == "cuda" else time_on_cpu)
        times = interleave(steps, timer=timer, rounds=self.rounds, seconds=self.seconds, seed=self.seed)
        peaks = {name: self._peak(step) for name, step in steps.items()}
        return {
            name: {**compare(times[name], times["dense"]), "peak_mib": peaks[name], "dense_peak_mib": peaks["dense"]}
            for name in steps
            if name != "dense"
        }

    def _peak(self, step: Step) -> float | None:
        if self.where.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.where)
        before = torch.cuda.memory_allocated(self.where)
        step()
        return (torch.cuda.max_memory_allocated(self.where) - before) / 2**20

    def report(self, kind: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> BenchReport:
        """The rows with the options and the machine they were measured with."""
        machine = {
            **environment(self.where),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_amx": torch.cpu._is_amx_tile_supported(),
        }
        own = {name: value for name, value in vars(self).items() if name != "timer"}
        return BenchReport(kind=kind, config={**options, **own}, environment=machine, rows=rows)


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
    and ``resolved``, the mode that "auto" stands for. ``shapes`` are written as in :class:`Shape`;
    ``progress`` is told one line per row.

    Raises:
        ValueError: for a shape, ratio, mode, pass or setting that makes no sense.
    """
    parsed = [Shape.parse(text) for text in shapes]
    _check(ratios, modes, passes)
    with torch.device("meta"):
        stack = nn.ModuleList([shape.conv() for shape in parsed])
    setting = (setting or Setting()).settled(stack)
    rows = []
    for shape, one, ratio in itertools.product(parsed, passes, ratios):
        k = basis_channels_for(ratio, shape.out_channels)
        with setting.globals():
            layers: dict[str, nn.Module] = {"dense": shape.conv(), "control": shape.conv()}
            for mode in modes:
                layers[mode] = BasisConv2d.shaped_like(shape.conv(), basis_channels=k, mode=mode)
            placed = {name: setting.place(layer) for name, layer in layers.items()}
            steps = _layer_steps(placed, [(shape.in_channels, shape.size, shape.size)], one, setting)
            measured = setting.measure(steps)
        for name, values in measured.items():
            resolved = getattr(layers[name], "resolved_mode", "dense")
            macs = [shape.macs(k, m, setting.batch_size, one) for m in ("dense", resolved)]
            row = {"shape": str(shape), "pass": one, "ratio": ratio, "basis_channels": k, "mode": name}
            rows.append({**row, "resolved": resolved, **values, "mac_ratio": macs[0] / macs[1]})
            _tell(progress, rows[-1], str(shape))
    options = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "modes": list(modes)}
    return setting.report("bench-layer", rows, **options, passes=list(passes))


def _layer_steps(
    layers: Mapping[str, nn.Module],
    inputs: Sequence[tuple[int, ...]],
    one: Pass,
    setting: Setting,
    input_gradient: bool = True,
) -> dict[str, Step]:
    """One step for each layer: a call on images of each of the ``inputs``, (C, H, W), and its backward pass."""
    pairs = []
    for size in inputs:
        x = setting.place(torch.randn(setting.batch_size, *size).to(DTYPES[setting.precision]))
        with torch.no_grad(), setting.autocast():
            dy = torch.randn_like(layers["dense"](x))
        pairs.append((x.requires_grad_(one != "forward" and input_gradient), dy))

    def step(layer: nn.Module) -> None:
        if one == "forward":
            with torch.no_grad(), setting.autocast():
                for x, _ in pairs:
                    layer(x)
            return
        layer.zero_grad()
        for x, dy in pairs:
            x.grad = None
            with setting.autocast():
                y = layer(x)
            y.backward(dy)

    return {name: partial(step, layer) for name, layer in layers.items()}


@dataclass(frozen=True)
class _Timed:
    """A convolution as far as its time depends on it; equal ones are measured once."""

    options: tuple[Any, ...]  # the first arguments of nn.Conv2d, up to padding_mode
    inputs: tuple[tuple[int, ...], ...]  # (C, H, W) of each call in one forward pass
    input_gradient: bool

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


def _timed(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, _Timed]:
    """Every convolution that can be substituted and is called, as it is called in one forward pass."""
    free = {name for name, why in plan_of(model).skipped.items() if why == "left dense"}
    found = {}
    for name, conv, calls in _trace(model, (1, *input_size)):
        if name in free and calls and isinstance(conv, nn.Conv2d):
            padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
            options = (
                conv.in_channels, conv.out_channels, tuple(conv.kernel_size), tuple(conv.stride), padding,
                tuple(conv.dilation), conv.groups, conv.bias is not None, conv.padding_mode,
            )  # fmt: skip
            found[name] = _Timed(options, tuple(call.x[1:] for call in calls), any(call.needs_dx for call in calls))
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
    _check(ratios, (), passes)
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but must be at least 1")
    found = _timed(model, tuple(input_size))
    if not found:
        raise ValueError("the model has no convolution that can be substituted and is called")
    setting = (setting or Setting()).settled(model)
    cells: dict[tuple[_Timed, Pass], list[dict[str, Any]]] = {}
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
    timed: _Timed,
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
        measured = setting.measure(_layer_steps(placed, timed.inputs, one, setting, timed.input_gradient))
    rows = []
    for key, k in ks.items():
        row: dict[str, Any] = {"layer": layer, "shape": str(timed), "pass": one, "ratio": k / width}
        row |= {"basis_channels": k, "mode": "control" if key == "control" else "auto"}
        rows.append(row | {"resolved": getattr(placed[key], "resolved_mode", "dense"), **measured[key]})
        _tell(progress, rows[-1], layer)
    return rows


def bench_training(
    *,
    model: str = "resnet18",
    width: int | None = None,
    ratios: Sequence[float] = RATIOS,
    modes: Sequence[Mode] = ("auto",),
    coefficients: Sequence[str] = ("dense",),
    trained: Sequence[str] = ("both",),
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure whole training steps (forward, loss, backward, SGD) of a network of :func:`basis.models.build`.

    All eligible convolutions are substituted at one ratio; a cell is a ratio, and all its candidates, which
    are those of mode, coefficients and trained parts, are measured together. Images are random, 3x32x32, and
    already on the device. A row also has ``parameters``, ``parameter_ratio`` (dense / candidate) and
    ``images_per_second``.

    Args:
        coefficients: forms of the coefficient matrix, see :class:`basis.coefficients.Form`.
        trained: what a step trains of the basis layers, of :data:`TRAINED`.

    Raises:
        ValueError: for an unknown model, or a ratio, mode, form, part or setting that makes no sense.
    """
    _check(ratios, modes, ())
    for part in trained:
        if part not in TRAINED:
            raise ValueError(f"trained is {part!r}, but must be one of {', '.join(TRAINED)}")
    setting = setting or Setting()
    with torch.device("meta"):
        shape = build(model, width=width)
    for ratio, form in itertools.product(ratios, coefficients):  # what does not fit is refused before all measuring
        substitute(shape, ratio=ratio, init="random", coefficients=form)
    with setting.globals():
        dense = build(model, width=width)
    setting = setting.settled(dense)
    rows = []
    for ratio in ratios:
        with setting.globals():
            kinds = {name: {"mode": name, "coefficients": "", "trained": "both"} for name in ("dense", "control")}
            networks: dict[str, nn.Module] = {name: copy.deepcopy(dense) for name in kinds}
            for mode, form, part in itertools.product(modes, coefficients, trained):
                name = f"{mode} {form} {part}"
                kinds[name] = {"mode": mode, "coefficients": form, "trained": part}
                networks[name] = substitute(dense, ratio=ratio, mode=mode, init="random", coefficients=form)
            sizes = {name: count_parameters(network) for name, network in networks.items()}
            for name, network in networks.items():
                Parts(network).train(TRAINED[kinds[name]["trained"]])
            x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
            labels = torch.randint(10, (setting.batch_size,), device=x.device)
            placed = {name: setting.place(network) for name, network in networks.items()}
            measured = setting.measure({n: _training_step(m, x, labels, setting) for n, m in placed.items()})
        for name, values in measured.items():
            row: dict[str, Any] = {"model": model, "ratio": ratio, **kinds[name], **values, "parameters": sizes[name]}
            row["parameter_ratio"] = sizes["dense"] / sizes[name]
            row["images_per_second"] = setting.batch_size / row["ms"] * 1000
            rows.append(row)
            _tell(progress, row, model)
    options = {"ratios": list(ratios), "modes": list(modes), "coefficients": list(coefficients)}
    return setting.report("bench-train", rows, model=model, width=width, **options, trained=list(trained))


def _training_step(network: nn.Module, x: Tensor, labels: Tensor, setting: Setting) -> Step:
    # A learning rate at which no network diverges: infinities and denormals have other speeds.
    optimiser = make_optimizer(network, Recipe(lr=1e-3), x.device)

    def step() -> None:
        optimiser.zero_grad()
        with setting.autocast():
            logits = network(x)
        F.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return step


def _check(ratios: Sequence[float], modes: Sequence[str], passes: Sequence[str]) -> None:
    for what, values, known in (("mode", modes, MODES), ("pass", passes, PASSES)):
        for value in values:
            if value not in known:
                raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(known)}")
    for ratio in ratios:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense


def _tell(progress: Progress | None, row: Mapping[str, Any], what: str) -> None:
    if progress:
        spread = f"[{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}]"
        parts = (row["mode"], row.get("coefficients", ""), row.get("trained", ""))
        place = f"{what} {row.get('pass', 'training step')} r={row['ratio']:g} {' '.join(filter(None, parts))}"
        progress(f"{place}: {row['speedup']:.2f}x {spread}, {row['ms']:.1f} ms")
