"""How speed is measured: settings, interleaved rounds and peak memory.

Other work on a machine, its clock and its caches change from one second to the next, so candidates are never
timed one after the other. Every round runs each candidate once, in a fresh random order, and what is reported is
the median over rounds of dense / candidate *within* a round, with its quartiles. A second dense layer or network
runs along as a negative control: the quartiles of its ratio have to enclose 1.

On a GPU a layer is timed as a CUDA graph, so that the work of the GPU counts and not that of the host which
launches it, on several sets of inputs in rotation, too many for the L2 cache.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy, profiler_legacy

from basis.bench.report import BenchReport
from basis.environment import environment
from basis.inputs import Inputs, arguments, mapped, tensors_in, with_samples
from basis.numbers import one_of, plain_number
from basis.text import first_line
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

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = get_args(Pass)
# In rotation on a GPU, whose L2 cache holds 50 MB; the most keep the step of a small layer from taking seconds.
ROTATED_BYTES, LEAST_SETS, MOST_SETS = 150e6, 4, 32

Step = Callable[[], object]  # leaves nothing behind but what the next call needs: no gradients
Timer = Callable[[Step], float]  # runs a step, returns its seconds
Progress = Callable[[str], object]  # is told each row as it is measured


def time_on_cpu(step: Step) -> float:
    """Seconds of one call, by the wall clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def time_on_gpu(step: Step, *, seconds: float = 0.01) -> float:
    """Seconds per call between two CUDA events around as many calls as fill ``seconds``, at most 50."""
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

    Two rounds of warm-up, then ``rounds`` rounds, or at least three once ``seconds`` are over.
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

    A library's own scratch memory (oneDNN's) is not among them.
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
    """A step of a layer that can be captured, once on each of its ``sets`` of inputs."""

    sets: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where, in what number format, and for how long a benchmark measures.

    Args:
        device: "cpu", "cuda", "cuda:1" ...; the GPU where there is one unless given.
        precision: "fp32", "bf16" or "fp16", by autocast; memory_format: "contiguous" or "channels_last"; both as
            training chooses where "auto".
        batch_size: images per step.
        rounds: measurements of each candidate, at least 3; none begins after ``seconds``, from the third on.
        seed: of the weights, the inputs and the order within rounds.
        timer: runs a step and returns its seconds, instead of the device's own clock.
        capture: runs a function so that what it returns repeats it; a CUDA graph on a GPU unless given.

    Raises ``ValueError`` for an option outside these.
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
        for name, least in (("batch_size", 1), ("rounds", 3), ("seed", 0), ("seconds", 0)):
            if (value := getattr(self, name)) is not None or name != "seconds":
                object.__setattr__(self, name, plain_number(name, value, whole=name != "seconds", least=least))

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
        """A tensor or a module, on the device and, tensors of images and weights, in the memory format."""
        value = value.to(self.device)
        if isinstance(value, Tensor) and value.dim() != 4:
            return value
        last = self.memory_format == "channels_last"
        return value.to(memory_format=torch.channels_last if last else torch.contiguous_format)

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

    @property
    def captures(self) -> bool:
        """Whether steps are captured."""
        return self.capture is not None or self.where.type == "cuda"

    def new_capture(self) -> Capture:
        """What captures a step."""
        return self.capture or CudaCapture(self.where)

    def measure(
        self, steps: Mapping[str, Step], *, reference: Mapping[str, str] | None = None,
        versus: Mapping[str, str] | None = None, may_fail: Collection[str] = (),
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """What was measured of each other step against the step "dense", or against the one that ``reference`` names.

        ``versus`` names the step of a basis layer that a step is compared with as well. A step of ``may_fail``
        that raises an error, or is a layer's and cannot be captured, has ``error`` in place of all else.
        """
        timer = self.timer or (time_on_gpu if self.where.type == "cuda" else time_on_cpu)
        errors = {name: error for name, step in steps.items() if name in may_fail and (error := _error_of(step))}
        graphs: dict[str, Step] = {}
        peaks: dict[str, int] = {}

        def capture(name: str, step: LayerStep) -> None:
            # A capture of its own for each: one that fails may leave its memory unusable.
            recorder = PeakCapture(self.where, self.new_capture())
            with on_side_stream(self.where):
                for _ in range(WARM_UPS):
                    step()
            graphs[name] = recorder(step)
            peaks[name] = recorder.peak

        for name, step in steps.items():
            if not isinstance(step, LayerStep) or not self.captures or name in errors:
                continue
            if name not in may_fail:
                capture(name, step)
            elif error := _error_of(partial(capture, name, step)):
                errors[name] = f"could not be captured: {error}"
        running = {name: graphs.get(name, step) for name, step in steps.items() if name not in errors}
        times = interleave(running, timer=timer, rounds=self.rounds, seconds=self.seconds, seed=self.seed)
        times = {name: [one / getattr(steps[name], "sets", 1) for one in own] for name, own in times.items()}
        peaks |= {name: peak_bytes(step, self.where) for name, step in running.items() if name not in peaks}
        found: dict[str, dict[str, Any]] = {}
        for name, step in steps.items():
            dense = (reference or {}).get(name, "dense")
            if name in errors or dense in errors:
                found[name] = {"error": errors.get(name, f"{dense}, which it is compared with, failed")}
            elif name != "dense":
                found[name] = compare(times[name], times[dense], times.get((versus or {}).get(name, "")))
                found[name] |= {"peak_mib": peaks[name] / 2**20, "dense_peak_mib": peaks[dense] / 2**20}
                if self.captures:
                    found[name] |= {"timed": "graph" if name in graphs else "host-bound"}
                    found[name] |= {"sets": step.sets} if isinstance(step, LayerStep) else {}
        return found

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
        return f"{type(error).__name__}: {first_line(error)}"[:300]
    return None


def layer_steps(
    layers: Mapping[str, nn.Module], inputs: Sequence[Inputs], one: Pass, setting: Setting, *,
    input_gradient: bool = True, rotated: bool = True,
) -> dict[str, LayerStep]:  # fmt: skip
    """One step for each layer: a call on each of the ``inputs``, and its backward pass.

    Each is a size, (C, H, W) or (images per sample, C, H, W), of random images, or a batch as the layer takes it, whose
    samples come round again. The gradients are set free after each call, so that they count as memory that it takes.
    Where steps are captured there are several sets of inputs, unless they are not to be ``rotated``. Where the dense
    layer changes its inputs in place, all get copies of them.
    """
    one_of("the pass", one, PASSES)
    train, dtype, changed = one != "forward", DTYPES[setting.precision], list[bool]()

    def make(given: Any) -> tuple[Inputs, list[Tensor]]:
        if tensors_in(given):
            given = with_samples(given, setting.batch_size)
        else:
            given = torch.randn(setting.batch_size, *given, device=setting.where).flatten(0, -len(given[-3:]) - 1)
        x = mapped(lambda t: setting.place(t.to(dtype) if t.is_floating_point() else t).clone(), given)
        args, kwargs = arguments(copied := mapped(Tensor.clone, x))
        with torch.no_grad(), setting.autocast():
            y = layers["dense"](*args, **kwargs)
        changed.extend(tensor._version > 0 for tensor in tensors_in(copied))
        dy = [torch.randn_like(tensor) for tensor in tensors_in(y) if train and tensor.is_floating_point()]
        return mapped(lambda t: t.requires_grad_(train and input_gradient and t.is_floating_point()), x), dy

    def call(layer: nn.Module, x: Inputs, dy: list[Tensor]) -> None:
        args, kwargs = arguments(mapped(Tensor.clone, x) if copies else x)
        with torch.set_grad_enabled(train), setting.autocast():
            y = layer(*args, **kwargs)
        if train:
            pairs = zip(filter(torch.is_floating_point, tensors_in(y)), dy, strict=True)
            recorded = [(own, gradient) for own, gradient in pairs if own.requires_grad]
            torch.autograd.backward([own for own, _ in recorded], [gradient for _, gradient in recorded])
            layer.zero_grad()
            for tensor in tensors_in(x):
                tensor.grad = None

    calls, sets = [make(given) for given in inputs], 1
    if rotated and setting.captures:
        moved = sum(t.nbytes * (1 + t.requires_grad) for t in tensors_in(calls))
        sets = min(max(LEAST_SETS, math.ceil(ROTATED_BYTES / moved)), MOST_SETS)
        calls += [make(given) for _ in range(sets - 1) for given in inputs]
    copies = any(changed)

    def step(layer: nn.Module) -> None:
        for x, dy in calls:
            call(layer, x, dy)

    steps = {name: LayerStep(step, layer) for name, layer in layers.items()}
    for one_step in steps.values():
        one_step.sets = sets
    return steps


def tell(progress: Progress | None, row: Mapping[str, Any]) -> None:
    """One line about a row, for whoever wants to see the progress."""
    if not progress:
        return
    named = ("model", "layer", "shape", "pass", "ratio", "share", "mode", "coefficients", "trained", "norms", "step",
             "resolved", "batch_size")  # fmt: skip
    place = " ".join(f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in named if row.get(key))
    if "error" in row:
        progress(f"{place}: failed, {row['error']}")
    else:
        spread = f"[{row['speedup_q1']:.2f}, {row['speedup_q3']:.2f}]"
        progress(f"{place}: {row['speedup']:.2f}x {spread}, {row['ms']:.3g} ms")
