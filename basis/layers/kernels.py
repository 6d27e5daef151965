# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels for training: batch normalisation, ReLU and the sum with a residual in few passes over the maps.

Maps are channels-last, (N, n, H, W), and matrices to the kernels: P pixels x channels; parameters and statistics are
float32. Those through the basis are in :mod:`basis.layers.mixing_kernels`. Check :func:`usable` first.

Each direction is a pass that sums over pixels, in chunks of rows and without atomics, so that equal input gives equal
bits; a small kernel that finishes what follows from the sums; and a pass that writes the maps. Sums are accumulated in
float32. CUDA graphs can capture all of it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

# Rows times stride are int64, since they may exceed 2^31; numbers of pixels are below. All loads are masked, so no size
# need be a multiple of a block. Sums are of differences from the mean of the first rows, so that they lose nothing
# where the mean is large.
FIRST = tl.constexpr(64)


@triton.jit
def load(matrix, first, cols, stride, height, width, ROWS: tl.constexpr):
    """Columns ``cols`` of ROWS rows from ``first``; 0 outside."""
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    return tl.load(matrix + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store(matrix, values, first, cols, stride, height, width, ROWS: tl.constexpr):
    """Write there."""
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    tl.store(matrix + rows[:, None] * stride + cols[None, :], values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def numbers(vector, at, width, other):
    """Numbers ``at`` of a vector in float32; ``other`` where there is no vector."""
    values = tl.full(at.shape, other, tl.float32)
    if vector is not None:
        values = tl.load(vector + at, mask=at < width, other=0.0).to(tl.float32)
    return values


@triton.jit
def first_mean(maps, at, width, P):
    """The mean of the first rows of maps, columns ``at``."""
    return tl.sum(load(maps, 0, at, width, P, width, FIRST).to(tl.float32), 0) / tl.minimum(P, FIRST)


@triton.jit
def track(running_mean, running_var, seen, momentum, mean, variance, P, at, width):
    """Move the running statistics towards those of the batch, the variance without bias; count the batch."""
    if running_mean is not None:
        new = (1 - momentum) * numbers(running_mean, at, width, 0.0) + momentum * mean
        tl.store(running_mean + at, new, mask=at < width)
        new = (1 - momentum) * numbers(running_var, at, width, 0.0) + momentum * variance * (P / (P - 1))
        tl.store(running_var + at, new, mask=at < width)
    if seen is not None:  # noqa: SIM102 (Triton compiles the inner condition only where there is one)
        if tl.program_id(0) == 0:
            tl.store(seen, tl.load(seen) + 1)


@triton.jit
def _total(partial, total, chunks, width, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The sum of the rows of ``partial``."""
    cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((BLOCK, TILE), tl.float32)
    for first in range(0, chunks, BLOCK):
        sums += load(partial, first, cols, width, chunks, width, BLOCK)
    tl.store(total + cols, tl.sum(sums, 0), mask=cols < width)


# Whether TRITON_INTERPRET was set when Triton was imported: the kernels then run on any device, slowly.
INTERPRETED = not isinstance(load, triton.JITFunction)


class Statistics(NamedTuple):
    """What a batch normalisation does with the statistics of a batch besides normalising; None: nothing."""

    mean: Tensor | None = None  # running mean and variance, (C,)
    variance: Tensor | None = None
    seen: Tensor | None = None  # the number of batches, ()
    momentum: float = 0.0


def usable(maps: Tensor) -> bool:
    """Whether the kernels can take these maps, (N, n, H, W): channels-last, on a GPU of CUDA capability 8.0 or more."""
    known = maps.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = known and maps.dim() == 4 and maps.numel() > 0 and maps.permute(0, 2, 3, 1).is_contiguous()
    return fits and (INTERPRETED or (maps.is_cuda and _run_on(maps.device)))


@functools.cache
def _run_on(device: torch.device) -> bool:
    """Whether this GPU is one that runs them, and one does run: Triton needs a C compiler."""
    if torch.version.hip or torch.cuda.get_device_properties(device).major < 8:
        return False
    try:
        with torch.cuda.device(device):
            added(torch.zeros(1, 1, device=device))
    except Exception as error:  # of Triton, the driver or a compiler
        warnings.warn(f"basis trains without its Triton kernels, which do not run here: {error}", stacklevel=2)
        return False
    return True


def added(partial: Tensor) -> Tensor:
    """The sum of the rows of a float32 matrix."""
    total = torch.empty_like(partial[0])
    _total[(triton.cdiv(len(total), 64),)](partial, total, len(partial), len(total), BLOCK=64, TILE=64)
    return total


def rows_of(maps: Tensor) -> Tensor:
    """Maps (N, n, H, W) as rows (P, n), a view."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def block(size: int, largest: int) -> int:
    """The power of two that holds ``size``, from 16, the least tensor cores take, to ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def factor(dtype: torch.dtype) -> Any:
    """What the factors of a product are held in: their own dtype, but the interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and INTERPRETED):
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def on(maps: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context that launches kernels on the device of the maps."""
    return torch.cuda.device(maps.device) if maps.is_cuda else contextlib.nullcontext()


# -- ordinary batch normalisation: C channels, rows next to each other -------------------------------


@triton.jit
def _column_sums(
    x, centre, dout, out, scale, shift, gated, partial, P, C, chunk, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """partial[p] = [sum u, sum u v] over the rows of chunk p, with v = x - centre, or less the mean of its first rows.

    u is v; or dout where it is given, gated by out > 0 or else by scale x + shift > 0, and written to ``gated``.
    """
    p = tl.program_id(0)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    middle = first_mean(x, cols, C, P) if centre is None else numbers(centre, cols, C, 0.0)
    sums = tl.zeros((ROWS, TILE), tl.float32)
    products = tl.zeros((ROWS, TILE), tl.float32)
    for first in range(p * chunk, tl.minimum((p + 1) * chunk, P), ROWS):
        v = load(x, first, cols, C, P, C, ROWS).to(tl.float32)
        if dout is None:
            rows = first + tl.arange(0, ROWS)
            v = tl.where((rows < P)[:, None], v - middle[None, :], 0.0)
            sums += v
            products += v * v
        else:
            u = load(dout, first, cols, C, P, C, ROWS).to(tl.float32)
            if out is not None:
                u = tl.where(load(out, first, cols, C, P, C, ROWS).to(tl.float32) > 0, u, 0.0)
            elif scale is not None:
                before = v * numbers(scale, cols, C, 0.0)[None, :] + numbers(shift, cols, C, 0.0)[None, :]
                u = tl.where(before > 0, u, 0.0)
            if gated is not None:
                store(gated, u, first, cols, C, P, C, ROWS)
            sums += u
            products += u * (v - middle[None, :])
    partial += p * 2 * C
    tl.store(partial + cols, tl.sum(sums, 0), mask=cols < C)
    tl.store(partial + C + cols, tl.sum(products, 0), mask=cols < C)


@triton.jit
def _both_totals(partial, chunks, C, cols, BLOCK: tl.constexpr):
    """The two sums over all chunks."""
    sums = tl.zeros((BLOCK, cols.shape[0]), tl.float32)
    products = tl.zeros((BLOCK, cols.shape[0]), tl.float32)
    for first in range(0, chunks, BLOCK):
        sums += load(partial, first, cols, 2 * C, chunks, C, BLOCK)
        products += load(partial + C, first, cols, 2 * C, chunks, C, BLOCK)
    return tl.sum(sums, 0), tl.sum(products, 0)


@triton.jit
def _finish_sums(
    partial, x, gamma, beta, running_mean, running_var, seen, momentum, state, chunks, P, C, eps,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """state = [mean, 1 / deviation, scale, shift], of the sums of x less the mean of its first rows."""
    cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sums, squares = _both_totals(partial, chunks, C, cols, BLOCK)
    rest = sums / P
    mean = first_mean(x, cols, C, P) + rest
    variance = squares / P - rest * rest
    variance = tl.where(variance < 0, 0.0, variance)  # and NaN stays NaN
    inverse = tl.rsqrt(variance + eps)
    scale = numbers(gamma, cols, C, 1.0) * inverse
    tl.store(state + cols, mean, mask=cols < C)
    tl.store(state + C + cols, inverse, mask=cols < C)
    tl.store(state + 2 * C + cols, scale, mask=cols < C)
    tl.store(state + 3 * C + cols, numbers(beta, cols, C, 0.0) - scale * mean, mask=cols < C)
    track(running_mean, running_var, seen, momentum, mean, variance, P, cols, C)


@triton.jit
def _finish_gradient_sums(partial, state, result, chunks, P, C, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """result = [d beta, d gamma, slope, constant], for dx = scale dO + slope x + constant."""
    cols = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total, moment = _both_totals(partial, chunks, C, cols, BLOCK)
    mean, inverse = numbers(state, cols, C, 0.0), numbers(state + C, cols, C, 0.0)
    scale = numbers(state + 2 * C, cols, C, 0.0)
    slope = -scale * inverse * inverse * moment / P
    tl.store(result + cols, total, mask=cols < C)
    tl.store(result + C + cols, inverse * moment, mask=cols < C)
    tl.store(result + 2 * C + cols, slope, mask=cols < C)
    tl.store(result + 3 * C + cols, -scale * total / P - slope * mean, mask=cols < C)


@triton.jit
def _scaled(
    y, x, residual, dout, state, result, P, C,
    RELU: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A ROWS x TILE part of y: relu(scale x + shift + residual), or of dx, with dout, gated where RELU."""
    tiles = tl.cdiv(C, TILE)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    cols = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    scale, shift = numbers(state + 2 * C, cols, C, 0.0)[None, :], numbers(state + 3 * C, cols, C, 0.0)[None, :]
    x_part = load(x, first, cols, C, P, C, ROWS).to(tl.float32)
    if dout is None:
        value = x_part * scale + shift
        if residual is not None:
            value += load(residual, first, cols, C, P, C, ROWS).to(tl.float32)
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # and NaN stays NaN
    else:
        u = load(dout, first, cols, C, P, C, ROWS).to(tl.float32)
        if RELU:
            u = tl.where(x_part * scale + shift > 0, u, 0.0)
        slope, constant = numbers(result + 2 * C, cols, C, 0.0), numbers(result + 3 * C, cols, C, 0.0)
        value = scale * u + slope[None, :] * x_part + constant[None, :]
    store(y, value, first, cols, C, P, C, ROWS)


def normalise(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, *,
    statistics: Statistics, eps: float, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """relu(normalised x * gamma + beta + residual), as x, and the state that :func:`gradients` takes, (4, C)."""
    P, C = rows_of(x).shape
    state = torch.empty((4, C), device=x.device)
    with on(x):
        partial = _sums(x, None, None, None, None, None, None)
        _finish_sums[(triton.cdiv(C, 8),)](
            partial, x, gamma, beta, *statistics, state, len(partial), P, C, eps, BLOCK=512, TILE=8
        )
        return _write(torch.empty_like(x), x, residual, None, state, None, relu=relu), state


def gradients(
    dout: Tensor, out: Tensor | None, x: Tensor, state: Tensor, *, relu: bool, residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Of :func:`normalise`: the gradients of x, of the residual (None unless there was one), of gamma and of beta.

    ``dout`` in the memory format of x; ``out`` is needed only where there was a residual and a ReLU.
    """
    P, C = rows_of(x).shape
    result = torch.empty_like(state)
    gated = torch.empty_like(dout) if relu and residual else None
    gate = (None, state[2], state[3]) if relu and not residual else (out, None, None)
    with on(x):
        partial = _sums(x, state, dout, *gate, gated)
        _finish_gradient_sums[(triton.cdiv(C, 8),)](partial, state, result, len(partial), P, C, BLOCK=512, TILE=8)
        dout = dout if gated is None else gated
        dx = _write(torch.empty_like(x), x, None, dout, state, result, relu=relu and not residual)
    return dx, dout if residual else None, result[1], result[0]


# The sizes of blocks and the numbers of warps here and in basis.layers.mixing_kernels were the fastest, or nearly, of
# those tried on one H200 with 1024 images in bfloat16.


def _sums(x: Tensor, centre: Tensor | None, *rest: Any) -> Tensor:
    """The sums of :func:`_column_sums` over chunks of rows, (chunks, 2, C)."""
    (P, C), forward = rows_of(x).shape, centre is None
    tile = block(C, 64)
    rows, columns = (8192 if forward else 4096) // tile, triton.cdiv(C, tile)
    chunk = rows * triton.cdiv(P, rows * max(1, 512 // columns))
    partial = torch.empty((triton.cdiv(P, chunk), 2, C), device=x.device)
    _column_sums[len(partial), columns](
        x, centre, *rest, partial, P, C, chunk, ROWS=rows, TILE=tile, num_warps=4 if forward else 8
    )
    return partial


def _write(maps: Tensor, *rest: Any, relu: bool) -> Tensor:
    """``maps`` as :func:`_scaled` fills them."""
    P, C = rows_of(maps).shape
    tile = block(C, 128)
    rows = 4096 // tile
    _scaled[(triton.cdiv(P, rows) * triton.cdiv(C, tile),)](maps, *rest, P, C, RELU=relu, ROWS=rows, TILE=tile)
    return maps
