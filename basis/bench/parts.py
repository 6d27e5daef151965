"""Where the time of a training step goes: the kernels of a step, by what they are for."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from basis.bench.cells import with_pytorchs_norms
from basis.bench.networks import trainer_of
from basis.bench.report import BenchReport
from basis.bench.timing import Progress, Setting
from basis.layers.batchnorm import couple
from basis.models import build
from basis.substitution import substitute

PARTS = ("convolution", "mixing", "normalisation", "optimizer", "other")
WARM_UPS, STEPS = 3, 3
# A kernel and the operations that it is launched in, from the inside out; the first rule that fits counts. Kernels that
# have the names of Python functions are Triton's, those of :mod:`basis.layers`.
RULES = (
    ("convolution", re.compile(r"^kernel _both_gradients")),
    ("normalisation", re.compile(r"^kernel _[a-z]")),
    ("optimizer", re.compile(r"^Optimizer\.|^aten::_fused_sgd", re.M)),
    ("mixing", re.compile(r"^aten::.*conv(.|\n)*^_Normalise|^aten::(mm|bmm|baddbmm)$(?!(.|\n)*(addmm|Addmm))", re.M)),
    ("convolution", re.compile(r"^(aten::.*conv|Convolution)", re.M)),
    ("normalisation", re.compile(r"batch_norm|BatchNorm|^_Normalise|^basis::|relu|Relu|threshold|^aten::add\Z", re.M)),
)


def bench_parts(
    *, model: str = "resnet18", width: int | None = None, ratios: Sequence[float] = (1 / 2, 1 / 4),
    setting: Setting | None = None, progress: Progress | None = None,
) -> BenchReport:  # fmt: skip
    """Sum up what the kernels of one eager training step take on a GPU, or its operations on a CPU, by part.

    Of the dense network with PyTorch's batch normalisation ("ordinary") and ours ("fused"), and of those at each of the
    ``ratios``, "fused" and "through_basis". Rows have ``mode`` ("dense" or "auto"), ``ratio`` (1 for the dense one),
    ``norms``, ``part``, ``ms``, ``share`` of ``step_ms``, the sum of all parts. Casts of its operands belong to a
    "convolution"; "mixing" are the products of matrices of basis layers and of normalisation by the basis; ReLU, the
    addition of shortcuts and every other Triton kernel of :mod:`basis.layers` belong to "normalisation".

    Raises ``ValueError`` for an unknown model, a ratio or a setting that makes no sense.
    """
    setting = setting or Setting()
    with setting.globals():
        dense = build(model, width=width)
        setting = setting.settled(dense)
        plain, rows = with_pytorchs_norms(copy.deepcopy(dense)), []
        networks = {("dense", 1.0, "ordinary"): plain, ("dense", 1.0, "fused"): dense}
        for ratio in ratios:
            basis = substitute(dense, ratio=ratio, init="random")
            networks |= {("auto", ratio, "fused"): basis, ("auto", ratio, "through_basis"): couple(basis)}
        for (mode, ratio, norms), network in networks.items():
            sums = step_parts(network, setting)
            whole = sum(sums.values())
            about = {"model": model, "mode": mode, "ratio": ratio, "norms": norms, "step_ms": whole}
            rows += [{**about, "part": part, "ms": sums[part], "share": sums[part] / whole} for part in PARTS]
            if progress:
                told = ", ".join(f"{part} {sums[part]:.3g}" for part in PARTS)
                progress(f"{model} {mode} {ratio:g} {norms}: {whole:.3g} ms: {told}")
    return setting.report("bench-parts", rows, model=model, width=width, ratios=list(ratios))


def step_parts(network: nn.Module, setting: Setting) -> dict[str, float]:
    """Milliseconds of each of :data:`PARTS` in a step that trains ``network`` (on random images 3x32x32)."""
    step = trainer_of(setting.place(network), setting)
    x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
    labels = torch.randint(10, (setting.batch_size,), device=x.device)
    for _ in range(WARM_UPS):
        step(x, labels)
    gpu = setting.where.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        for _ in range(STEPS):
            step(x, labels)
        if gpu:
            torch.cuda.synchronize()  # so that all that was launched is seen
    sums = by_part(profiler.events() or (), gpu=gpu)
    return {part: sums[part] / 1000 / STEPS for part in PARTS}


def by_part(events: Iterable[Any], *, gpu: bool) -> Counter[str]:
    """Microseconds of each part: of kernels, by the operation that launched them, or of the operations themselves."""
    events = list(events)
    marks = {e.name for e in events if getattr(e, "is_user_annotation", False)}  # spans on a GPU, no kernels
    sums: Counter[str] = Counter()
    alone: Counter[str] = Counter()  # kernels -> the time in which no known operation launched them
    for event in events:
        if event.device_type != DeviceType.CPU:
            alone[event.name] += event.time_range.elapsed_us()
        elif gpu:
            for kernel in event.kernels:
                sums[_part([f"kernel {kernel.name}", *_chain(event)])] += kernel.duration * (kernel.name not in marks)
                alone[kernel.name] -= kernel.duration
        else:
            sums[_part(_chain(event))] += event.self_cpu_time_total
    for name, rest in alone.items():
        sums[_part([f"kernel {name}"])] += max(0, rest) * (name not in marks)
    return sums


def _chain(event: Any) -> list[str]:
    """The name of an operation and of those that it runs within; autograd's own sums of gradients belong to none."""
    if event is None:
        return []
    return ["autograd" if event.name.startswith("autograd::") else event.name, *_chain(event.cpu_parent)]


def _part(names: Sequence[str]) -> str:
    text = "\n".join(names)
    return next((part for part, rule in RULES if rule.search(text)), "other")
