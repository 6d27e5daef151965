"""How speed is measured: settings, interleaved rounds, peak memory, and the report that a benchmark leaves.

Other work on a machine, its clock and its caches change from one second to the next, so candidates are
never timed one after the other. Every round runs each candidate once, in a fresh random order, and what
is reported is the median over rounds of dense / candidate *within* a round, with its quartiles. A second
dense layer or network runs along as a negative control: the quartiles of its ratio have to enclose 1.
Both sides always have the same shape, batch, precision and memory format.

On a GPU a layer or network is timed as a CUDA graph, so that what counts is the work of the GPU, not that of
the host which launches it, and on several sets of inputs in rotation, too many for the L2 cache to hold.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy, profiler_legacy

from basis.environment import environment
from basis.layers.conv import MODES, basis_channels_for
from basis.saving import RecordError, write_json
from basis.training.loop import (
    DTYPES,
    MemoryFormat,
    Precision,
    choose_device,
    choose_memory_format,
    choose_precision,
    on_device,
)
from basis.training.stepping import WARM_UPS, Capture, CudaCapture, on_side_stream

VERSION = 1
RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Every 3x3 convolution of the CIFAR ResNet-18 but its first.
RESNET18_SHAPES = ("64@32", "128@16", "256@8", "512@4", "64-128@32/2", "128-256@16/2", "256-512@8/2")
Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# In rotation on a GPU, whose L2 cache holds 50 MB; the most keep the step of a small layer from taking seconds.
ROTATED_BYTES, LEAST_SETS, MOST_SETS = 150e6, 4, 32

Step = Callable[[], object]  # leaves nothing behind but what the next call needs: no gradients
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

        What is really executed, so with the identity in M = [I; A], which :func:`basis.costs.cost`
        lists by itself; mode "cat" is factorized without it, [Z; A Z]. A backward pass has twice those of
        its forward pass.
        """
        c, f, m = self.out_channels, 9 * self.in_channels, self.out_channels - k
        pixels = batch_size * ((self.size - 1) // self.stride + 1) ** 2
        compose = 0 if mode == "dense" else m * k * f
        full, thin = pixels * c * f + compose, pixels * k * (f + (m if mode == "cat" else c))
        forward = thin if mode in ("factorized", "cat") else full
        if passes == "forward":
            return forward
        return forward + 2 * (thin if mode in ("factorized", "cat", "hybrid") else full)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a benchmark found: ``kind`` ("bench-layer", "bench-train", ...), options, machine, rows.

    Every row has ``ratio`` (or ``layer``, the text of a structured layer, or ``share``, a budget) and ``mode``
    ("control" is the second dense one), ``n`` rounds, ``ms`` and ``dense_ms`` (medians) with quartiles, and
    ``speedup``, the median over rounds of dense / candidate, with quartiles ``speedup_q1`` and ``speedup_q3``.
    ``peak_mib`` is the memory that one step takes beyond what was resident (:func:`peak_bytes`); older records have
    it on GPUs only. A candidate that failed has ``error``, its message, and no times. On a GPU ``timed`` is "graph"
    (replays of a CUDA graph) or "host-bound" (eager: the host may take longer to launch a step than the GPU to run
    it), the dense side being timed the same way; ``sets`` of inputs were in rotation, and the times are those of one.
    ``reason`` says why a layer is host-bound.

    Rivals and blocks also have ``versus_basis``: basis / candidate within a round, above 1 where the
    candidate is faster than the basis layer that it is compared with, with quartiles. Structured layers have
    ``versus_composition``, see :func:`basis.bench.structured.bench_structured`.
    """

    kind: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def to_frame(self) -> pd.DataFrame:
        """One row per candidate and cell."""
        return pd.DataFrame(list(self.rows))

    def controls(self) -> list[Mapping[str, Any]]:
        """The rows of the second dense one that was timed, each measurement once."""
        rows = [row for row in self.rows if row["mode"] == "control" and not row.get("same_as")]
        return [row for row in rows if not row.get("error")]

    def failed_controls(self) -> list[Mapping[str, Any]]:
        """The control rows whose quartiles do not enclose 1; chance alone does it to 6 in 100 at 15 rounds."""
        return [row for row in self.controls() if not row["speedup_q1"] <= 1 <= row["speedup_q3"]]

    def faster_than_basis(self) -> list[Mapping[str, Any]]:
        """The rows of candidates that beat the basis layer: the lower quartile of ``versus_basis`` is above 1."""
        return [row for row in self.rows if (row.get("versus_basis_q1") or 0) > 1]

    def latencies(self, step: str) -> dict[str, dict[int, float]]:
        """The milliseconds that :func:`bench_latency` found: layer -> k -> ms, and dense as k = C_out.

        Raises:
            ValueError: for a report of another kind, or a ``step`` that is no pass of this one; where some layers
                are graph-timed and some host-bound, which do not add up.
        """
        if self.kind != "bench-latency":
            raise ValueError(f"latency is a report of kind {self.kind!r}, but it must be one of `basis bench latency`")
        passes = dict.fromkeys(row["pass"] for row in self.rows)
        if step not in passes:
            raise ValueError(f"step is {step!r}, but the latency report has only {', '.join(passes)}")
        rows = [row for row in self.rows if row["pass"] == step and not row.get("error")]
        if len({row.get("timed") for row in rows}) > 1:
            raise ValueError("some layers of the latency report are host-bound and some are not; measure it again")
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            ms = row["dense_ms" if row["mode"] == "control" else "ms"]
            found.setdefault(row["layer"], {})[row["basis_channels"]] = ms
        return found

    def save(self, path: str | Path) -> None:
        """Write the report as one JSON file, whole or not at all."""
        write_json(Path(path), {"version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> BenchReport:
        """Read what :meth:`save` wrote; :class:`basis.experiments.runs.RecordError` says what is wrong with a bad file."""
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
        candidate = (
            "width",
            "ratio",
            "share",
            "mode",
            "coefficients",
            "trained",
            "norms",
            "step",
            "timed",
            "resolved",
            "parameters",
            "predicted",
        )
        named = ("layer", "shape", "model", "pass", *candidate, "n", "ms", "dense_ms", "speedup")
        quartiles = ("speedup_q1", "speedup_q3", "versus_basis", "versus_composition", "versus_compiled")
        shown = (*named, *quartiles, "mac_ratio", "peak_mib", "dense_peak_mib")
        frame = self.to_frame()
        frame = frame[[name for name in shown if name in frame and frame[name].notna().any()]]
        table = frame.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}")
        bad, controls = len(self.failed_controls()), len(self.controls())
        verdict = f"dense against itself: 1 is within the quartiles in {controls - bad} of {controls} cells"
        wrong = [row for row in self.rows if row.get("error")]
        failed = [f"{row.get('layer', '')} {row['mode']} failed: {row['error']}".lstrip() for row in wrong]
        others = [f"{row['step']} was {row['means']}" for row in self.rows if "(" in row.get("means", "")]
        bound = [(row.get("shape", row["mode"]), row["reason"]) for row in self.rows if row.get("reason")]
        others += [f"{what} was host-bound, not graph-timed ({why})" for what, why in bound]
        return "\n".join([head, table, *dict.fromkeys(failed + others), verdict])


def check_place(path: Path) -> None:
    """Make the folder of ``path``, and raise ``ValueError`` where no file could be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"nothing can be written to the folder {path.parent} ({error.strerror})") from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but must be the name of a file")


# -- timing --


def time_on_cpu(step: Step) -> float:
    """Seconds of one call, by the wall clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_on_gpu(step: Step, *, seconds: float = 0.01) -> float:
    """Seconds per call between two CUDA events around as many calls as fill ``seconds``, at most 50.

    One call before them tells how many, so that the queue stays filled. The L2 cache is not flushed between calls.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    calls, each = 1, 0.0
    for _ in range(2):
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        each = start.elapsed_time(end) / 1000 / calls
        calls = math.ceil(seconds / max(each, seconds / 50))
    return each


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


def compare(times: Sequence[float], dense: Sequence[float], basis: Sequence[float] | None = None) -> dict[str, float]:
    """Medians and quartiles of a candidate (ms), of dense / candidate and of basis / candidate, round by round."""
    q1, median, q3 = np.quantile(times, (0.25, 0.5, 0.75)) * 1000
    row = {"n": len(times), "ms": median, "ms_q1": q1, "ms_q3": q3, "dense_ms": float(np.median(dense)) * 1000}
    for name, other in (("speedup", dense), ("versus_basis", basis)):
        if other is not None:
            low, middle, high = np.quantile(np.divide(other, times), (0.25, 0.5, 0.75))
            row |= {name: middle, f"{name}_q1": low, f"{name}_q3": high}
    return row


def peak_bytes(step: Step, device: torch.device) -> int:
    """Bytes that one call of ``step`` takes beyond what was resident, as PyTorch's allocator sees it.

    On a CPU the highest minus the lowest running sum of the allocations and releases within the call; a
    library's own scratch memory (oneDNN's) is not among them. On a GPU ``max_memory_allocated`` minus what
    was allocated before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # The older profiler: torch.profiler writes lines to stderr, which a notebook must not have.
    _enable_profiler_legacy(profiler_legacy.profile(profile_memory=True).config())
    try:
        step()
    finally:
        records = _disable_profiler_legacy()
    sizes = (event.cpu_memory_usage() for thread in records for event in thread if event.kind() == "memory_alloc")
    sums = list(itertools.accumulate(sizes, initial=0))
    return max(sums) - min(sums)


class PeakCapture:
    """Captures by ``capture``; ``peak`` is what the last one took of the memory, in bytes, see :func:`peak_bytes`."""

    def __init__(self, device: torch.device, capture: Capture) -> None:
        self._device, self._capture, self.peak = device, capture, 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """What repeats the function."""
        replays: list[Callable[[], None]] = []
        gc.collect()  # not while the memory is watched
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of the graphs of an earlier cell
        self.peak = peak_bytes(lambda: replays.append(self._capture(function)), self._device)
        return replays[0]


class LayerStep(partial[None]):
    """A step of a layer: it can be captured, and runs once on each of its ``sets`` of inputs."""

    sets: int


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
        capture: runs a function so that what it returns repeats it, see :class:`basis.training.stepping.TrainingStep`; a CUDA
            graph on a GPU, and nothing is captured on a CPU, unless given.

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
    capture: Capture | None = None

    def __post_init__(self) -> None:
        if self.where.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device}, but times are taken on cpu and cuda only")
        for name, known in (("precision", get_args(Precision)), ("memory_format", get_args(MemoryFormat))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}")
        for name, least in (("batch_size", 1), ("rounds", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"seconds is {self.seconds}, but must be at least 0")

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

    def settled_for(self, shapes: Sequence[Shape]) -> Setting:
        """:meth:`settled` for the layers of these shapes, together."""
        with torch.device("meta"):
            return self.settled(nn.ModuleList([shape.conv() for shape in shapes]))

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

    def new_capture(self) -> Capture | None:
        """What captures a step; None where none are captured."""
        return self.capture or (CudaCapture(self.where) if self.where.type == "cuda" else None)

    def measure(
        self,
        steps: Mapping[str, Step],
        *,
        reference: Mapping[str, str] | None = None,
        versus: Mapping[str, str] | None = None,
        may_fail: Collection[str] = (),
    ) -> dict[str, dict[str, Any]]:
        """What was measured of each other step against the step "dense", or against the one that ``reference`` names.

        ``versus`` names the step of a basis layer that a step is compared with as well. A step of ``may_fail``
        that raises an error, or cannot be captured where the others can, has ``error`` in place of all else. Where
        any other cannot be captured all are timed eagerly, so that like is compared with like.
        """
        reference, versus = reference or {}, versus or {}
        timer = self.timer or (time_on_gpu if self.where.type == "cuda" else time_on_cpu)
        errors = {name: error for name, step in steps.items() if name in may_fail and (error := _error_of(step))}
        graphs, peaks, failed = self._graphs({name: step for name, step in steps.items() if name not in errors})
        reason = next((f"{name}: {why}" for name, why in failed.items() if name not in may_fail), None)
        if reason:
            graphs, peaks = {}, {}
        else:
            errors |= {name: f"could not be captured: {why}" for name, why in failed.items()}
        running = {name: graphs.get(name, step) for name, step in steps.items() if name not in errors}
        times = interleave(running, timer=timer, rounds=self.rounds, seconds=self.seconds, seed=self.seed)
        times = {name: [one / getattr(steps[name], "sets", 1) for one in own] for name, own in times.items()}
        peaks |= {name: peak_bytes(step, self.where) for name, step in running.items() if name not in peaks}
        found: dict[str, dict[str, Any]] = {}
        for name, step in steps.items():
            dense = reference.get(name, "dense")
            if name in errors or dense in errors:
                found[name] = {"error": errors.get(name, f"{dense}, which it is compared with, failed")}
            elif name != "dense":
                found[name] = compare(times[name], times[dense], times.get(versus.get(name, "")))
                found[name] |= {"peak_mib": peaks[name] / 2**20, "dense_peak_mib": peaks[dense] / 2**20}
                if self.capture or self.where.type == "cuda":
                    found[name] |= {"timed": "graph" if name in graphs else "host-bound"}
                    found[name] |= {"sets": step.sets} if isinstance(step, LayerStep) else {}
                found[name] |= {"reason": reason} if reason else {}
        return found

    def _graphs(self, steps: Mapping[str, Step]) -> tuple[dict[str, Step], dict[str, int], dict[str, str]]:
        """What repeats each step of a layer, its peak of memory, and why some could not be captured."""
        graphs: dict[str, Step] = {}
        peaks: dict[str, int] = {}

        def prepare(name: str, step: LayerStep, capture: Capture) -> None:
            recorder = PeakCapture(self.where, capture)
            with on_side_stream(self.where):
                for _ in range(WARM_UPS):
                    step()
            graphs[name] = recorder(step)
            peaks[name] = recorder.peak

        failed = {
            name: error
            for name, step in steps.items()
            # A capture of its own for each: one that fails may leave its memory unusable.
            if isinstance(step, LayerStep) and (capture := self.new_capture())
            if (error := _error_of(partial(prepare, name, step, capture)))
        }
        return graphs, peaks, failed

    def report(self, kind: str, rows: Sequence[Mapping[str, Any]], **options: Any) -> BenchReport:
        """The rows with the options and the machine they were measured with."""
        machine = {
            **environment(self.where),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_amx": torch.cpu._is_amx_tile_supported(),
        }
        own = {name: value for name, value in vars(self).items() if name not in ("timer", "capture")}
        return BenchReport(kind=kind, config={**options, **own}, environment=machine, rows=rows)


def _error_of(step: Step) -> str | None:
    """The first line of what a step raises, None where it runs."""
    try:
        step()
    except Exception as error:  # compilers and other people's layers raise anything
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"[:300]
    return None


def forget_compiled() -> None:
    """Drop what ``torch.compile`` keeps of the networks of a cell: it gives up in silence after a few of a class."""
    import torch._dynamo  # slow to import

    torch._dynamo.reset()


def layer_steps(
    layers: Mapping[str, nn.Module],
    inputs: Sequence[tuple[int, ...]],
    one: Pass,
    setting: Setting,
    *,
    input_gradient: bool = True,
    shortcut: bool = False,
) -> dict[str, LayerStep]:
    """One step for each layer: a call on images of each of the ``inputs``, (C, H, W), and its backward pass.

    The gradients are set free after each call, so that they count as memory that it takes. With ``shortcut`` the
    second argument is a tensor of the output's shape. Where steps are captured there are several sets of inputs.
    """
    train = one != "forward"

    def make(size: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        x = setting.place(torch.randn(setting.batch_size, *size, device=setting.where).to(DTYPES[setting.precision]))
        with torch.no_grad(), setting.autocast():
            dy = torch.randn_like(layers["dense"](x))
        given = [x, torch.randn_like(dy)] if shortcut else [x]
        return [tensor.requires_grad_(train and input_gradient) for tensor in given], dy

    def call(layer: nn.Module, given: Sequence[Tensor], dy: Tensor) -> None:
        with torch.set_grad_enabled(train), setting.autocast():
            y = layer(*given)
        if train:
            y.backward(dy)
            layer.zero_grad()
            for tensor in given:
                tensor.grad = None

    calls = [make(size) for size in inputs]
    sets = 1
    if setting.new_capture():
        tensors = [tensor for given, dy in calls for tensor in [*given, *([dy] if train else [])]]
        moved = sum(tensor.nbytes * (1 + tensor.requires_grad) for tensor in tensors)
        sets = min(max(LEAST_SETS, math.ceil(ROTATED_BYTES / moved)), MOST_SETS)
        calls += [make(size) for _ in range(sets - 1) for size in inputs]

    def step(layer: nn.Module) -> None:
        for given, dy in calls:
            call(layer, given, dy)

    steps = {name: LayerStep(step, layer) for name, layer in layers.items()}
    for one_step in steps.values():
        one_step.sets = sets
    return steps


def check_known(what: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``ValueError`` for a value that is not among the known ones."""
    for value in values:
        if value not in known:
            raise ValueError(f"{what} is {value!r}, but must be one of {', '.join(known)}")


def check_options(ratios: Sequence[float], modes: Sequence[str], passes: Sequence[str]) -> None:
    """Raise ``ValueError`` for a ratio, mode or pass that makes no sense."""
    check_known("mode", modes, MODES)
    check_known("pass", passes, PASSES)
    for ratio in ratios:
        basis_channels_for(ratio, 1)  # refuses a ratio that makes no sense


def tell(progress: Progress | None, row: Mapping[str, Any], what: str) -> None:
    """One line about a row, for whoever wants to see the progress."""
    if not progress:
        return
    parts = (row["mode"], *(row.get(key) for key in ("coefficients", "trained", "norms", "step")))
    cell = f"r={row['ratio']:g}" if "ratio" in row else f"in {row['share']:.0%} of the time"
    place = f"{what} {row.get('pass', 'training step')} {cell} {' '.join(filter(None, parts))}"
    if "error" in row:
        progress(f"{place}: failed, {row['error']}")
        return
    spread = f"[{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}]"
    progress(f"{place}: {row['speedup']:.2f}x {spread}, {row['ms']:.3g} ms")
