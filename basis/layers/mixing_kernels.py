# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels for batch normalisation through the basis: of y = M z + c, from the basis channels z alone.

The formulas are at the top of :mod:`basis.layers.batchnorm`; what holds for :mod:`basis.layers.kernels` holds here.
Products run on tensor cores in the dtype of the maps; those of float32 are full float32 unless PyTorch is told
otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from basis.layers.kernels import (
    Statistics,
    added,
    block,
    factor,
    first_mean,
    load,
    numbers,
    on,
    rows_of,
    store,
    track,
)

# A pass does about k/2 flop per byte, and GPUs turn compute-bound near 200: above this, a GEMM of cuBLAS and a
# second pass are as fast.
MAX_BASIS_CHANNELS = 256


@triton.jit
def _outer_sums(
    left, gate, right, gated, partial, P, m, n, chunk,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, SAME: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A TILE_M x TILE_N part of partial[p] = [sum l r^T; sum l] over the rows l, r of chunk p.

    l is 0 where its gate is not positive, and then written to ``gated``. Where CENTRED, both
    are the same maps, less the mean of their first rows.
    """
    p = tl.program_id(0)
    i = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    j = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
    products = tl.zeros((TILE_M, TILE_N), tl.float32)
    sums = tl.zeros((ROWS, TILE_M), tl.float32)
    if CENTRED:
        left_mean, right_mean = first_mean(left, i, m, P), first_mean(right, j, n, P)
    for first in range(p * chunk, tl.minimum((p + 1) * chunk, P), ROWS):
        a = load(left, first, i, m, P, m, ROWS)
        if gate is not None:
            a = tl.where(load(gate, first, i, m, P, m, ROWS).to(tl.float32) > 0, a, 0.0).to(a.dtype)
        if gated is not None:  # noqa: SIM102 (as in track)
            if tl.program_id(2) == 0:
                store(gated, a, first, i, m, P, m, ROWS)
        if CENTRED:
            inside = (first + tl.arange(0, ROWS) < P)[:, None]
            a = tl.where(inside, a.to(tl.float32) - left_mean[None, :], 0.0)
        if SAME:
            b = a
        else:
            b = load(right, first, j, n, P, n, ROWS)
            if CENTRED:
                b = tl.where(inside, b.to(tl.float32) - right_mean[None, :], 0.0)
        products = tl.dot(tl.trans(a.to(FACTOR)), b.to(FACTOR), products, input_precision=PRECISION)
        sums += a.to(tl.float32)
    partial += p * m * (n + 1)
    tl.store(partial + i[:, None] * n + j[None, :], products, mask=(i < m)[:, None] & (j < n)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial + m * n + i, tl.sum(sums, 0), mask=i < m)


@triton.jit
def _finish_mixing(
    total, z, mixing, gamma, beta, bias, running_mean, running_var, seen, momentum,
    mean, spread, inverse, weight, shift, P, k, C, eps, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean m, spread M S, 1 / deviation, W, beta - W m: of [sum u u^T; sum u], u = z - (the mean of its first rows)."""
    first = tl.program_id(0) * ROWS
    c = first + tl.arange(0, ROWS)
    variance = tl.zeros((ROWS,), tl.float32)
    centre = tl.zeros((ROWS,), tl.float32)
    for start in range(0, k, TILE):
        j = start + tl.arange(0, TILE)
        rest = numbers(total + k * k, j, k, 0.0) / P
        product = tl.zeros((ROWS, TILE), tl.float32)
        for begin in range(0, k, TILE):
            i = begin + tl.arange(0, TILE)
            others = numbers(total + k * k, i, k, 0.0) / P
            covariance = load(total, begin, j, k, k, k, TILE) / P - others[:, None] * rest[None, :]
            product = tl.dot(load(mixing, first, i, k, C, k, ROWS), covariance, product, input_precision="ieee")
        store(spread, product, first, j, k, C, k, ROWS)
        own = load(mixing, first, j, k, C, k, ROWS)
        rest += first_mean(z, j, k, P)
        variance += tl.sum(product * own, 1)
        centre += tl.sum(own * rest[None, :], 1)
        if tl.program_id(0) == 0:
            tl.store(mean + j, rest, mask=j < k)
    variance = tl.where(variance < 0, 0.0, variance)  # and NaN stays NaN
    deviation = tl.rsqrt(variance + eps)
    scale = numbers(gamma, c, C, 1.0) * deviation
    moved = numbers(beta, c, C, 0.0)
    for start in range(0, k, TILE):
        j = start + tl.arange(0, TILE)
        # Rounded before the shift is made of it, so that low precision shifts no channel.
        rounded = (scale[:, None] * load(mixing, first, j, k, C, k, ROWS)).to(weight.dtype.element_ty)
        store(weight, rounded, first, j, k, C, k, ROWS)
        middle = numbers(total + k * k, j, k, 0.0) / P + first_mean(z, j, k, P)
        moved -= tl.sum(rounded.to(tl.float32) * middle[None, :], 1)
    tl.store(inverse + c, deviation, mask=c < C)
    tl.store(shift + c, moved, mask=c < C)
    track(running_mean, running_var, seen, momentum, centre + numbers(bias, c, C, 0.0), variance, P, c, C)


@triton.jit
def _finish_mixing_gradients(
    sums, mixing, mean, spread, inverse, gamma, weight, d_gamma, d_beta, d_mixing, quadratic, constant, P, k, C,
    TILE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of [sum dO z^T; sum dO]: the gradients of gamma, beta and M, -E and e, for dz = dO W - z E + e.

    Each program makes TILE columns of E from all channels; every programs-th block of the other gradients is its own.
    """
    own, all_of = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    middle = numbers(mean, all_of, k, 0.0)
    curve = tl.zeros((TILE, WIDTH), tl.float32)
    back = tl.zeros((TILE,), tl.float32)
    for first in range(0, C, ROWS):
        c = first + tl.arange(0, ROWS)
        total = numbers(sums + C * k, c, C, 0.0)
        moment = load(sums, first, all_of, k, C, k, ROWS) - total[:, None] * middle[None, :]
        rows = load(mixing, first, all_of, k, C, k, ROWS)
        deviation = numbers(inverse, c, C, 0.0)
        scale = numbers(gamma, c, C, 1.0) * deviation
        to_gamma = deviation * tl.sum(moment * rows, 1)
        slope = scale * deviation * to_gamma / P
        if (first // ROWS) % tl.num_programs(0) == tl.program_id(0):
            tl.store(d_gamma + c, to_gamma, mask=c < C)
            tl.store(d_beta + c, total, mask=c < C)
            spreads = load(spread, first, all_of, k, C, k, ROWS)
            to_mixing = scale[:, None] * moment - (slope * P)[:, None] * spreads
            store(d_mixing, to_mixing, first, all_of, k, C, k, ROWS)
        left = tl.trans(load(mixing, first, own, k, C, k, ROWS))
        curve = tl.dot(left, rows * slope[:, None], curve, input_precision="ieee")
        back += tl.sum(load(weight, first, own, k, C, k, ROWS).to(tl.float32) * total[:, None], 0)
    rounded = (-curve).to(quadratic.dtype.element_ty)
    store(quadratic, rounded, tl.program_id(0) * TILE, all_of, k, k, k, TILE)
    tl.store(constant + own, -tl.sum(rounded.to(tl.float32) * middle[None, :], 1) - back / P, mask=own < k)


@triton.jit
def _product(
    acc, maps, gate, matrix, first, cols, P, inner, width, down, across,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (gated maps)[rows, :] matrix[:, cols], for ROWS rows from ``first``."""
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        left = load(maps, first, at, inner, P, inner, ROWS)
        if gate is not None:
            left = tl.where(load(gate, first, at, inner, P, inner, ROWS).to(tl.float32) > 0, left, 0.0)
        inside = (at < inner)[:, None] & (cols < width)[None, :]
        right = tl.load(matrix + at[:, None] * down + cols[None, :] * across, mask=inside, other=0.0)
        acc = tl.dot(left.to(FACTOR), right.to(FACTOR), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _affine(
    out, constant, residual, z, matrix, dout, gate, weight, P, n, k, C, down, across,
    RELU: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A ROWS x TILE part of out (P x n) = relu(constant + residual + z matrix + (gated dout) weight)."""
    tiles = tl.cdiv(n, TILE)  # neighbouring programs share the rows of the maps in the cache
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    cols = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((ROWS, TILE), tl.float32) + numbers(constant, cols, n, 0.0)[None, :]
    acc = _product(acc, z, None, matrix, first, cols, P, k, n, down, across, ROWS, BLOCK_K, FACTOR, PRECISION)
    if dout is not None:
        acc = _product(acc, dout, gate, weight, first, cols, P, C, n, n, 1, ROWS, BLOCK_C, FACTOR, PRECISION)
    if residual is not None:
        acc += load(residual, first, cols, n, P, n, ROWS).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # and NaN stays NaN
    store(out, acc, first, cols, n, P, n, ROWS)


class Mixed(NamedTuple):
    """What :func:`mixing_gradients` takes of :func:`mix_and_normalise`."""

    mean: Tensor  # of z, (k,)
    spread: Tensor  # M S, (C, k)
    inverse: Tensor  # 1 / deviation of y, (C,)
    weight: Tensor  # W, (C, k) in the dtype of z


def mix_and_normalise(
    z: Tensor, mixing: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    *, statistics: Statistics, eps: float, relu: bool,
) -> tuple[Tensor, Mixed]:  # fmt: skip
    """relu(normalised (M z + c) + residual), (N, C, H, W) in the dtype of z, of M (C, k) and c, the ``bias``."""
    (P, k), C = rows_of(z).shape, len(mixing)
    total = _sums(z, None, z, None, (block(k, 64), block(k, 64)), centred=True)
    mean, spread, inverse, shift = (total.new_empty(shape) for shape in ((k,), (C, k), (C,), (C,)))
    mixed = Mixed(mean, spread, inverse, z.new_empty((C, k)))
    with on(z):
        _finish_mixing[(triton.cdiv(C, 16),)](
            total, z, mixing, gamma, beta, bias, *statistics, *mixed, shift, P, k, C, eps,
            ROWS=16, TILE=block(k, 32), num_warps=8,
        )  # fmt: skip
    return _mixed(shift, z, mixed.weight, (1, k), residual=residual, relu=relu), mixed


def mixing_gradients(
    dout: Tensor, out: Tensor | None, z: Tensor, mixing: Tensor, gamma: Tensor | None, mixed: Mixed, *, residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Of :func:`mix_and_normalise`: the gradients of z, the residual (None without), M, gamma and beta.

    ``dout`` is channels-last; ``out`` is what came out where there was a ReLU, else None.
    """
    (P, k), C = rows_of(z).shape, len(mixing)
    gated = torch.empty_like(dout) if residual and out is not None else None
    tile = block(k, 64 if z.dtype == torch.float32 else 256)
    sums = _sums(dout, out, z, gated, (block(C, 64 if tile == 256 or z.dtype == torch.float32 else 128), tile))
    d_gamma, d_beta, d_mixing, constant = (sums.new_empty(shape) for shape in ((C,), (C,), (C, k), (k,)))
    quadratic = z.new_empty((k, k))
    with on(z):
        _finish_mixing_gradients[(triton.cdiv(k, 16),)](
            sums, mixing, *mixed[:3], gamma, mixed.weight, d_gamma, d_beta, d_mixing, quadratic, constant, P, k, C,
            TILE=16, WIDTH=block(k, 256), ROWS=32 if k <= 64 else 16, num_warps=8,
        )  # fmt: skip
    if gated is not None:
        dout, out = gated, None
    dz = _mixed(constant, z, quadratic, (k, 1), dout=dout, gate=out, weight=mixed.weight)
    return dz, dout if residual else None, d_mixing, d_gamma, d_beta


def _sums(
    left: Tensor, gate: Tensor | None, right: Tensor, gated: Tensor | None, tiles: tuple[int, int], *,
    centred: bool = False,
) -> Tensor:  # fmt: skip
    """[sum l r^T; sum l] over all rows as one vector: by about 256 programs, two per multiprocessor of a large GPU."""
    (P, m), n = rows_of(left).shape, right.shape[1]
    single = left.dtype == torch.float32
    rows = 32 if single else max(16, min(64, 4096 // max(tiles)))
    grid = triton.cdiv(m, tiles[0]), triton.cdiv(n, tiles[1])
    # With so many rows at least, reading the partial sums does not cost more than reading the maps.
    wanted = max((2 if centred else 4) * n, triton.cdiv(P, max(1, 256 // (grid[0] * grid[1]))))
    chunk = rows * triton.cdiv(wanted, rows)
    partial = torch.empty((triton.cdiv(P, chunk), m * (n + 1)), device=left.device)
    with on(left):
        _outer_sums[len(partial), grid[0], grid[1]](
            left, gate, right, gated, partial, P, m, n, chunk,
            TILE_M=tiles[0], TILE_N=tiles[1], ROWS=rows, CENTRED=centred, SAME=centred and grid == (1, 1),
            FACTOR=factor(left.dtype), PRECISION=_precision(left.dtype),
            num_warps=8 if single or tiles[0] * tiles[1] >= 16384 else 4, num_stages=3,
        )  # fmt: skip
        return added(partial)


def _mixed(
    constant: Tensor, z: Tensor, matrix: Tensor, strides: tuple[int, int], *, residual: Tensor | None = None,
    dout: Tensor | None = None, gate: Tensor | None = None, weight: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(constant + residual + z matrix + (gated dout) weight), in the dtype of z."""
    (P, k), n, C = rows_of(z).shape, len(constant), 0 if dout is None else dout.shape[1]
    single = z.dtype == torch.float32
    tile = block(n, 64 if single or k <= 32 else 128)
    shape = (z.shape[0], n, *z.shape[2:])
    out = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    with on(z):
        _affine[(triton.cdiv(P, 64) * triton.cdiv(n, tile),)](
            out, constant, residual, z, matrix, dout, gate, weight, P, n, k, C, *strides,
            RELU=relu, ROWS=64, TILE=tile, BLOCK_K=block(k, 32 if single else 64),
            BLOCK_C=32 if single or C <= 64 else 64, FACTOR=factor(z.dtype), PRECISION=_precision(z.dtype),
            num_warps=8 if single else 4, num_stages=2 if dout is None else 3,
        )  # fmt: skip
    return out


def _precision(dtype: torch.dtype) -> str:
    """How float32 factors are multiplied: those of float32 maps as PyTorch is told to, others on tensor cores."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where allow_tf32 may refuse to be read
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "ieee" if dtype == torch.float32 and not allowed else "tf32"
