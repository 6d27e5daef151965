"""The roofline of a basis convolution: what each mode computes and moves, and how long that has to take.

A mode is a list of kernels, one after the other. A kernel takes at least max(multiply-accumulates / rate, bytes /
bandwidth) of a machine (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785); its bytes are the
minimum, every operand read and every result written once. On a CPU small maps stay in the caches, and it is no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from basis.bench.report import BenchReport
from basis.bench.shapes import Shape
from basis.bench.timing import Pass, Setting, time_on_cpu, time_on_gpu
from basis.training.loop import DTYPES, choose_precision

ROOFLINE_MODES = ("dense", "factorized", "cat", "composed")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine was measured to do at most, in one number format.

    Attributes:
        macs_per_second: multiply-accumulates of a large matrix product, or of a wide convolution.
        bytes_per_second: bytes read plus bytes written by a copy much larger than the caches.
    """

    device: str
    precision: str
    threads: int
    macs_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """The multiply-accumulates per byte from which on a kernel is bound by arithmetic."""
        return self.macs_per_second / self.bytes_per_second


class Kernel(NamedTuple):
    """One pass over the data: multiply-accumulates, and the least number of values read and written."""

    macs: int
    values: int


def measure_machine(
    setting: Setting | None = None, *, side: int | None = None, copied: int | None = None, rounds: int = 7
) -> Machine:
    """Measure how fast the setting's device multiplies (in its precision) and copies: the quickest of ``rounds``.

    Of a product of square matrices and a wide 3x3 convolution the one of the higher rate counts.

    Args:
        side: of the square matrices; 8192 on a GPU and 1024 on a CPU unless given.
        copied: bytes of the tensor that is copied; 2 GiB on a GPU and 256 MiB on a CPU unless given.
    """
    setting = setting or Setting()
    cuda = setting.where.type == "cuda"
    side = (8192 if cuda else 1024) if side is None else side
    copied = (2**31 if cuda else 2**28) if copied is None else copied
    precision = choose_precision(setting.where) if setting.precision == "auto" else setting.precision
    timer = setting.timer or (time_on_gpu if cuda else time_on_cpu)
    with setting.globals(), torch.no_grad():
        # Random numbers: a GPU multiplies zeros faster.
        a, b = (torch.randn(side, side, device=setting.where).to(DTYPES[precision]) for _ in range(2))
        product, source = torch.empty_like(a), torch.ones(copied, dtype=torch.uint8, device=setting.where)
        target = torch.empty_like(source)

        channels, size = min(512, max(1, side // 4)), 16
        last = torch.contiguous_format if setting.memory_format == "contiguous" else torch.channels_last
        images, filters = (
            torch.randn(shape, device=setting.where).to(a.dtype).contiguous(memory_format=last)
            for shape in ((setting.batch_size, channels, size, size), (channels, channels, 3, 3))
        )

        def seconds(step: Callable[[], object]) -> float:
            step()  # warm-up
            return min(timer(step) for _ in range(rounds))

        product_rate = side**3 / seconds(lambda: torch.mm(a, b, out=product))
        convolving = seconds(lambda: F.conv2d(images, filters, padding=1))
        copying = seconds(lambda: target.copy_(source))
    return Machine(
        device=str(setting.where), precision=precision, threads=torch.get_num_threads(),
        macs_per_second=max(product_rate, images.numel() * 9 * channels / convolving),
        bytes_per_second=2 * copied / copying,
    )  # fmt: skip


def with_machine(report: BenchReport, machine: Machine) -> BenchReport:
    """The report with what the machine can do at most, as the entry ``machine`` of its options."""
    return replace(report, config={**report.config, "machine": asdict(machine)})


def kernels(shape: Shape, k: int, mode: str, *, batch_size: int, passes: Pass) -> list[Kernel]:
    """The kernels of one step, as in chapter 10; with trainable A.

    Args:
        k: basis channels; of no effect in mode "dense".
        mode: "dense", "factorized" (M = [I; A] as one 1x1 convolution), "cat" (Z and A Z are concatenated) or
            "composed".

    Raises ``ValueError`` for a k outside 1 .. C_out.
    """
    if not 1 <= k <= shape.out_channels:
        raise ValueError(f"k is {k}, but must lie between 1 and C_out = {shape.out_channels}")
    c, f, m = shape.out_channels, 9 * shape.in_channels, shape.out_channels - k
    p = batch_size * ((shape.size - 1) // shape.stride + 1) ** 2  # output pixels
    x = batch_size * shape.size**2 * shape.in_channels  # input values

    def conv(n: int) -> Kernel:
        """A 3x3 convolution with n filters, or the gradient of its input or of its filters."""
        return Kernel(p * f * n, x + p * n + f * n)

    def product(rows: int, inner: int, columns: int, values: int) -> Kernel:
        return Kernel(rows * inner * columns, values)

    backward = [conv(k), conv(k)]  # gradients of x and of B, from that of Z
    if mode == "dense":
        forward, backward = [conv(c)], [conv(c), conv(c)]
    elif mode == "factorized":
        mix = product(p, k, c, p * k + p * c + m * k)
        forward, backward = [conv(k), mix], [mix, product(c, p, k, p * c + p * k), *backward]
    elif mode == "cat":
        derive = product(p, k, m, p * k + p * m + m * k)
        # Then [Z, A Z] is copied together, and in the backward pass the two gradients of Z are added.
        forward, backward = [conv(k), derive, Kernel(0, 2 * p * c)], [derive, Kernel(0, 3 * p * k), derive, *backward]
    else:
        compose = product(m, k, f, m * k + k * f + m * f)
        decompose = [product(k, m, f, m * k + c * f + k * f), product(m, f, k, c * f + k * f + m * k)]
        forward, backward = [compose, conv(c)], [conv(c), conv(c), *decompose]
    return forward if passes == "forward" else forward + backward


def predicted(
    shape: Shape, k: int, mode: str, *, batch_size: int, passes: Pass, bytes_per_value: int, machine: Machine
) -> float:
    """The least seconds of one step: a kernel takes the longer of its multiplications and its traffic."""
    steps = kernels(shape, k, mode, batch_size=batch_size, passes=passes)
    rate, bandwidth = machine.macs_per_second, machine.bytes_per_second / bytes_per_value
    return sum(max(one.macs / rate, one.values / bandwidth) for one in steps)
