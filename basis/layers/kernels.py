# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels for batch normalisation through the basis: each passes over the C-channel maps once.

Maps are matrices here: P pixels (of all images) x channels, as a channels-last tensor stores them; rows may be
further apart than they are wide. With z the k basis channels, a layer and its batch normalisation are
``out = relu(z weight^T + bias + residual)``, where weight (C x k) and bias follow from the mean and covariance
of z, so that the C channels before normalisation are never stored. :func:`moments` and :func:`apply` are the
forward pass, :func:`gradient_sums` and :func:`input_gradient` the backward pass; Ioffe and Szegedy 2015
(arXiv 1502.03167) give the derivatives, which become these with y = M z.

Sums are accumulated in float32, first within a chunk of rows and then over the chunks, always in the same order
and without atomics: equal input gives equal bits. Products run on the tensor cores in the dtype of z; those of
float32 are full float32 unless ``torch.backends.cuda.matmul.allow_tf32``. The float32 matrices ``weight`` and
``quadratic`` are rounded to the dtype of z on the way, so a bias or constant that is to cancel against them
should be computed from the rounded matrix: otherwise every row is off by the rounding times the mean of z.

To ``torch.compile`` every function is one opaque operator, without a derivative. None waits for the device, so
a CUDA graph can capture them once a first call has compiled them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:  # Triton has no build for this platform
    triton = tl = None

# A pass does about k/2 flop per byte, and GPUs turn compute-bound near 200: above this, a GEMM of cuBLAS and a
# second pass are as fast.
MAX_BASIS_CHANNELS = 256


def _jit(kernel) -> Any:
    return kernel if triton is None else triton.jit(kernel)


# -- kernels ------------------------------------------------------------------------------------------------
# Row numbers are int64, since rows times stride may exceed 2^31. All loads are masked, so no size need be a multiple
# of a block.


@_jit
def _inside(first, cols, height, width, ROWS: tl.constexpr):
    return (first + tl.arange(0, ROWS).to(tl.int64) < height)[:, None] & (cols < width)[None, :]


@_jit
def _load(matrix, first, cols, stride, height, width, ROWS: tl.constexpr):
    """Columns ``cols`` of ROWS rows from ``first``, and 0 outside height x width."""
    at = matrix + (first + tl.arange(0, ROWS).to(tl.int64))[:, None] * stride + cols[None, :]
    return tl.load(at, mask=_inside(first, cols, height, width, ROWS), other=0.0)


@_jit
def _load_gated(matrix, gate, first, cols, stride, gate_stride, height, width, ROWS: tl.constexpr):
    """The same where the gate, if any, is positive, and 0 elsewhere."""
    values = _load(matrix, first, cols, stride, height, width, ROWS)
    if gate is not None:
        values = tl.where(_load(gate, first, cols, gate_stride, height, width, ROWS).to(tl.float32) > 0, values, 0.0)
    return values


@_jit
def _load_centred(z, shift, first, cols, stride, height, width, ROWS: tl.constexpr):
    """The same less the shift, in float32, and 0 outside."""
    values = _load(z, first, cols, stride, height, width, ROWS).to(tl.float32) - shift[None, :]
    return tl.where(_inside(first, cols, height, width, ROWS), values, 0.0)


@_jit
def _sample_mean(z, cols, stride, height, width, ROWS: tl.constexpr):
    """The mean of ROWS rows spread over all of z, as a number of the dtype of z."""
    at = z + (tl.arange(0, ROWS).to(tl.int64) * (height // ROWS))[:, None] * stride + cols[None, :]
    values = tl.load(at, mask=(cols < width)[None, :], other=0.0).to(tl.float32)
    return (tl.sum(values, 0) / ROWS).to(z.dtype.element_ty).to(tl.float32)


@_jit
def _moments(
    z, shift, partial, P, k, stride, chunk,
    TILE: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A TILE x TILE part of partial[p] = [sum d d^T; sum d^T] over chunk p, with d = z - shift."""
    p = tl.program_id(0)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = tl.program_id(2) * TILE + tl.arange(0, TILE)
    shift_j = _sample_mean(z, j, stride, P, k, ROWS)
    shift_i = shift_j if ONE else _sample_mean(z, i, stride, P, k, ROWS)
    products = tl.zeros((TILE, TILE), tl.float32)
    sums = tl.zeros((TILE,), tl.float32)
    for first in range(p * chunk, tl.minimum((p + 1) * chunk, P), ROWS):
        right = _load_centred(z, shift_j, first, j, stride, P, k, ROWS)
        left = right if ONE else _load_centred(z, shift_i, first, i, stride, P, k, ROWS)
        products = tl.dot(tl.trans(left), right, products, input_precision=PRECISION)
        sums += tl.sum(right, 0)
    partial += p * k * (k + 1)
    tl.store(partial + i[:, None] * k + j[None, :], products, mask=(i < k)[:, None] & (j < k)[None, :])
    if tl.program_id(1) == 0:
        tl.store(partial + k * k + j, sums, mask=j < k)
        tl.store(shift + j, shift_j, mask=j < k)  # all programs of a tile store the same


@_jit
def _gradient_sums(
    dout, out, z, partial, P, C, k, dout_stride, out_stride, stride, chunk,
    TILE_C: tl.constexpr, TILE_K: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A TILE_C x TILE_K part of partial[p] = [sum dO z^T; sum dO^T] over chunk p."""
    p = tl.program_id(0)
    i = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    j = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)
    products = tl.zeros((TILE_C, TILE_K), tl.float32)
    sums = tl.zeros((TILE_C,), tl.float32)
    for first in range(p * chunk, tl.minimum((p + 1) * chunk, P), ROWS):
        left = _load_gated(dout, out, first, i, dout_stride, out_stride, P, C, ROWS)
        right = _load(z, first, j, stride, P, k, ROWS)
        products = tl.dot(tl.trans(left.to(FACTOR)), right.to(FACTOR), products, input_precision=PRECISION)
        sums += tl.sum(left.to(tl.float32), 0)
    partial += p * C * (k + 1)
    tl.store(partial + i[:, None] * k + j[None, :], products, mask=(i < C)[:, None] & (j < k)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial + C * k + i, sums, mask=i < C)


@_jit
def _sum_chunks(partial, columns, mask, size, chunks, CHUNKS: tl.constexpr):
    """The sum of partial[:, columns] over its chunks, each of the given size."""
    p = tl.arange(0, CHUNKS)
    inside = (p < chunks)[:, None] & mask[None, :]
    return tl.sum(tl.load(partial + p[:, None] * size + columns[None, :], mask=inside, other=0.0), 0)


@_jit
def _finish_moments(
    partial, shift, mean, covariance, P, k, chunks, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """From the partial sums of d = z - shift: mean = shift + E d and covariance = E d d^T - E d E d^T."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < k * k
    products = _sum_chunks(partial, at, inside, k * (k + 1), chunks, CHUNKS) / P
    left = _sum_chunks(partial, k * k + at // k, inside, k * (k + 1), chunks, CHUNKS) / P
    right = _sum_chunks(partial, k * k + at % k, inside, k * (k + 1), chunks, CHUNKS) / P
    tl.store(covariance + at, products - left * right, mask=inside)
    tl.store(mean + at, tl.load(shift + at, mask=at < k, other=0.0) + right, mask=at < k)


@_jit
def _finish_gradient_sums(
    partial, mean, total, moment, C, k, chunks, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """From the partial sums: total = sum dO and moment = sum dO z^T - total mean^T."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < C * k
    products = _sum_chunks(partial, at, inside, C * (k + 1), chunks, CHUNKS)
    sums = _sum_chunks(partial, C * k + at // k, inside, C * (k + 1), chunks, CHUNKS)
    tl.store(moment + at, products - sums * tl.load(mean + at % k, mask=inside, other=0.0), mask=inside)
    tl.store(total + at // k, sums, mask=inside & (at % k == 0))


@_jit
def _product(
    acc, maps, gate, matrix, first, cols, P, inner, width, stride, gate_stride, row_stride, col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (gated maps)[rows, :] matrix[:, cols], for ROWS rows from ``first``."""
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        left = _load_gated(maps, gate, first, at, stride, gate_stride, P, inner, ROWS)
        inside = (at < inner)[:, None] & (cols < width)[None, :]
        right = tl.load(matrix + at[:, None] * row_stride + cols[None, :] * col_stride, mask=inside, other=0.0)
        acc = tl.dot(left.to(FACTOR), right.to(FACTOR), acc, input_precision=PRECISION)
    return acc


@_jit
def _apply(
    z, weight, bias, residual, out, P, k, C, stride, residual_stride,
    RELU: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A ROWS x TILE part of out = relu(z weight^T + bias + residual)."""
    tiles = tl.cdiv(C, TILE)  # neighbouring programs share the rows of z in the cache
    first = (tl.program_id(0) // tiles) * ROWS
    cols = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((ROWS, TILE), tl.float32) + tl.load(bias + cols, mask=cols < C, other=0.0)[None, :]
    if residual is not None:
        acc += _load(residual, first, cols, residual_stride, P, C, ROWS).to(tl.float32)
    acc = _product(acc, z, None, weight, first, cols, P, k, C, stride, 0, 1, k, ROWS, BLOCK, FACTOR, PRECISION)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # and NaN stays NaN
    at = out + (first + tl.arange(0, ROWS).to(tl.int64))[:, None] * C + cols[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=_inside(first, cols, P, C, ROWS))


@_jit
def _input_gradient(
    dout, out, z, weight, quadratic, constant, dz, P, C, k, dout_stride, out_stride, stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A ROWS x TILE part of dz = dO weight - z quadratic + constant."""
    tiles = tl.cdiv(k, TILE)
    first = (tl.program_id(0) // tiles) * ROWS
    cols = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((ROWS, TILE), tl.float32)
    acc = _product(acc, z, None, quadratic, first, cols, P, k, k, stride, 0, k, 1, ROWS, BLOCK_K, FACTOR, PRECISION)
    acc = tl.load(constant + cols, mask=cols < k, other=0.0)[None, :] - acc
    acc = _product(
        acc, dout, out, weight, first, cols, P, C, k, dout_stride, out_stride, k, 1, ROWS, BLOCK_C, FACTOR, PRECISION
    )
    at = dz + (first + tl.arange(0, ROWS).to(tl.int64))[:, None] * k + cols[None, :]
    tl.store(at, acc.to(dz.dtype.element_ty), mask=_inside(first, cols, P, k, ROWS))


# Whether TRITON_INTERPRET was set when Triton was imported: the kernels then run on any device, slowly.
_INTERPRETED = triton is not None and not isinstance(_load, triton.JITFunction)


# -- launches -----------------------------------------------------------------------------------------------


def _block(size: int, largest: int) -> int:
    """The power of two that holds ``size``, from 16, the least tensor cores take, to ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def _precision(dtype: torch.dtype) -> str:
    """How float32 factors are multiplied: those of float32 maps as PyTorch is told to, others on tensor cores."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # since torch 2.9, where allow_tf32 may refuse to be read
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "ieee" if dtype == torch.float32 and not allowed else "tf32"


def _factor(dtype: torch.dtype) -> Any:
    """What the factors of a product are held in: their own dtype, but the interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and _INTERPRETED):
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _rounded(matrix: Tensor, z: Tensor) -> Tensor:
    """In the dtype of z: half the traffic, since every program reads the matrix."""
    return matrix.to(z.dtype).contiguous()


def _on(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def _chunks(rows: int, tiles: int, least: int, block: int) -> tuple[int, int]:
    """Rows per chunk and number of chunks: about 256 programs, which is two per multiprocessor of a large GPU.

    With the ``least`` rows per chunk, reading the partial sums does not cost more than reading the maps.
    """
    wanted = max(least, triton.cdiv(rows, max(1, 256 // tiles)))
    chunk = block * triton.cdiv(wanted, block)
    return chunk, triton.cdiv(rows, chunk)


def _finish(kernel: Any, *args: Any, size: int, chunks: int) -> None:
    """Launch a kernel that sums ``size`` numbers over the chunks."""
    padded = triton.next_power_of_2(chunks)
    columns = max(16, 4096 // padded)
    kernel[(triton.cdiv(size, columns),)](*args, chunks, CHUNKS=padded, COLUMNS=columns)


@custom_op("basis::moments", mutates_args=(), schema="(Tensor z) -> (Tensor, Tensor)")
def _moments_op(z: Tensor) -> tuple[Tensor, Tensor]:
    P, k = z.shape
    tile = _block(k, 64 if z.dtype == torch.float32 or k <= 128 else 128)
    rows = (2048 if z.dtype == torch.float32 else 4096) // tile
    tiles = triton.cdiv(k, tile)
    chunk, chunks = _chunks(P, tiles**2, 2 * k, rows)
    partial, shift, mean, covariance = (
        z.new_empty(shape, dtype=torch.float32) for shape in ((chunks, k + 1, k), (k,), (k,), (k, k))
    )
    with _on(z):
        _moments[(chunks, tiles, tiles)](
            z, shift, partial, P, k, z.stride(0), chunk, TILE=tile, ROWS=rows, ONE=tiles == 1,
            PRECISION=_precision(z.dtype), num_warps=8 if tile == 128 else 4, num_stages=3,
        )  # fmt: skip
        _finish(_finish_moments, partial, shift, mean, covariance, P, k, size=k * k, chunks=chunks)
    return mean, covariance


@custom_op(
    "basis::gradient_sums",
    mutates_args=(),
    schema="(Tensor dout, Tensor? out, Tensor z, Tensor mean) -> (Tensor, Tensor)",
)
def _gradient_sums_op(dout: Tensor, out: Tensor | None, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    (P, C), k = dout.shape, z.shape[1]
    single = z.dtype == torch.float32
    tile_k = _block(k, 64 if single else 256)
    tile_c = _block(C, 64 if single or tile_k == 256 else 128)
    rows = 64 if tile_k <= 64 and not single else 32
    tiles_c, tiles_k = triton.cdiv(C, tile_c), triton.cdiv(k, tile_k)
    chunk, chunks = _chunks(P, tiles_c * tiles_k, 4 * k, rows)
    partial, total, moment = (z.new_empty(shape, dtype=torch.float32) for shape in ((chunks, C, k + 1), (C,), (C, k)))
    with _on(z):
        _gradient_sums[chunks, tiles_c, tiles_k](
            dout, out, z, partial, P, C, k, dout.stride(0), 0 if out is None else out.stride(0), z.stride(0), chunk,
            TILE_C=tile_c, TILE_K=tile_k, ROWS=rows, FACTOR=_factor(z.dtype), PRECISION=_precision(z.dtype),
            num_warps=8, num_stages=3,
        )  # fmt: skip
        _finish(_finish_gradient_sums, partial, mean.contiguous(), total, moment, C, k, size=C * k, chunks=chunks)
    return total, moment


@custom_op(
    "basis::apply",
    mutates_args=(),
    schema="(Tensor z, Tensor weight, Tensor bias, Tensor? residual, bool relu) -> Tensor",
)
def _apply_op(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    (P, k), C = z.shape, len(weight)
    single = z.dtype == torch.float32
    tile = _block(C, 64 if single else 128)
    out = z.new_empty((P, C))
    with _on(z):
        _apply[(triton.cdiv(P, 64) * triton.cdiv(C, tile),)](
            z, _rounded(weight, z), bias.contiguous(), residual, out, P, k, C,
            z.stride(0), 0 if residual is None else residual.stride(0),
            RELU=relu, ROWS=64, TILE=tile, BLOCK=_block(k, 32 if single else 64),
            FACTOR=_factor(z.dtype), PRECISION=_precision(z.dtype), num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


@custom_op(
    "basis::input_gradient",
    mutates_args=(),
    schema="(Tensor dout, Tensor? out, Tensor z, Tensor weight, Tensor quadratic, Tensor constant) -> Tensor",
)
def _input_gradient_op(
    dout: Tensor, out: Tensor | None, z: Tensor, weight: Tensor, quadratic: Tensor, constant: Tensor
) -> Tensor:
    (P, C), k = dout.shape, z.shape[1]
    single = z.dtype == torch.float32
    rows, tile, inner = (64, _block(k, 64), 32) if single else (128, _block(k, 128), 64)
    dz = z.new_empty((P, k))
    with _on(z):
        _input_gradient[(triton.cdiv(P, rows) * triton.cdiv(k, tile),)](
            dout, out, z, _rounded(weight, z), _rounded(quadratic, z), constant.contiguous(), dz, P, C, k,
            dout.stride(0), 0 if out is None else out.stride(0), z.stride(0),
            ROWS=rows, TILE=tile, BLOCK_C=_block(C, inner), BLOCK_K=_block(k, inner),
            FACTOR=_factor(z.dtype), PRECISION=_precision(z.dtype), num_warps=8, num_stages=2,
        )  # fmt: skip
    return dz


@_moments_op.register_fake
def _(z):
    k = z.shape[1]
    return z.new_empty((k,), dtype=torch.float32), z.new_empty((k, k), dtype=torch.float32)


@_gradient_sums_op.register_fake
def _(dout, out, z, mean):
    C, k = dout.shape[1], z.shape[1]
    return z.new_empty((C,), dtype=torch.float32), z.new_empty((C, k), dtype=torch.float32)


@_apply_op.register_fake
def _(z, weight, bias, residual, relu):
    return z.new_empty((z.shape[0], weight.shape[0]))


@_input_gradient_op.register_fake
def _(dout, out, z, weight, quadratic, constant):
    return z.new_empty(z.shape)


# -- what others call ---------------------------------------------------------------------------------------


def usable(z: Tensor) -> bool:
    """Whether these kernels can take z (P, k).

    That is: Triton is here; z is on a CUDA device of compute capability 8.0 or more (Triton has no tensor cores
    below), or TRITON_INTERPRET=1 was set before Triton was imported; float32, bfloat16 or float16; at least one
    row; k between 1 and 256, since above that cuBLAS is as good; and a row is contiguous.
    """
    return _obstacle(z) is None


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k,) and covariance (k, k) of the rows of z (P, k), divided by P, both in float32.

    One pass: the rows are centred on a shift, the mean of some rows spread over z, and what that leaves is
    corrected at the end. This multiplies rounding errors by 1 + (mean - shift)^2 / variance, which is near 1,
    where sums that are not centred have 1 + mean^2 / variance. The centred numbers are multiplied as float32, or
    as tf32 where z is bfloat16 or float16, which are hardly finer.

    Raises:
        ValueError: where :func:`usable` is false.
    """
    _check(z)
    return _moments_op(z)


def apply(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """``relu(z weight^T + bias + residual)``, (P, C) in the dtype of z.

    Args:
        z: (P, k).
        weight: (C, k), float32; rounded to the dtype of z.
        bias: (C,), float32.
        residual: (P, C) in the dtype of z, or None.
        relu: whether to set what is negative to 0.

    Raises:
        ValueError: where :func:`usable` is false, or an argument has the wrong shape, dtype or device.
    """
    _check(z)
    C = weight.shape[0] if weight.dim() else 0
    _check_matrix("weight", weight, (C, z.shape[1]), z)
    _check_matrix("bias", bias, (C,), z)
    _check_maps("residual", residual, C, z)
    return _apply_op(z, weight, bias, residual, relu)


def gradient_sums(dout: Tensor, out: Tensor | None, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """With dO = dout * (out > 0): ``total`` (C,) = sum of dO and ``moment`` (C, k) = dO^T (z - mean), in float32.

    One pass. The mean is subtracted from the sums, which multiplies the rounding errors of float32 by
    1 + |mean| / deviation: no square here, unlike in a covariance.

    Args:
        dout: (P, C), the gradient of the output, in the dtype of z.
        out: (P, C), the output where it went through ReLU, in the dtype of z; None where it did not.
        z: (P, k).
        mean: (k,), float32, of z.

    Raises:
        ValueError: where :func:`usable` is false, or an argument has the wrong shape, dtype or device.
    """
    _check(z)
    C = dout.shape[-1] if dout.dim() else 0
    _check_maps("dout", dout, C, z)
    _check_maps("out", out, C, z)
    _check_matrix("mean", mean, (z.shape[1],), z)
    return _gradient_sums_op(dout, out, z, mean)


def input_gradient(
    dout: Tensor, out: Tensor | None, z: Tensor, weight: Tensor, quadratic: Tensor, constant: Tensor
) -> Tensor:
    """With dO = dout * (out > 0): ``dO weight - z quadratic + constant``, (P, k) in the dtype of z.

    Args:
        dout: (P, C), the gradient of the output, in the dtype of z.
        out: (P, C), the output where it went through ReLU, in the dtype of z; None where it did not.
        z: (P, k).
        weight: (C, k), float32; rounded to the dtype of z.
        quadratic: (k, k), float32; rounded to the dtype of z.
        constant: (k,), float32.

    Raises:
        ValueError: where :func:`usable` is false, or an argument has the wrong shape, dtype or device.
    """
    _check(z)
    C, k = dout.shape[-1] if dout.dim() else 0, z.shape[1]
    _check_maps("dout", dout, C, z)
    _check_maps("out", out, C, z)
    _check_matrix("weight", weight, (C, k), z)
    _check_matrix("quadratic", quadratic, (k, k), z)
    _check_matrix("constant", constant, (k,), z)
    return _input_gradient_op(dout, out, z, weight, quadratic, constant)


def _obstacle(z: Tensor) -> str | None:
    """Why these kernels cannot take z, if they cannot."""
    if triton is None:
        return "Triton is not installed"
    if not z.is_cuda and not _INTERPRETED:
        return f"z is on {z.device}, but it must be on a CUDA device"
    if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"z is {z.dtype}, but it must be float32, bfloat16 or float16"
    if z.is_cuda and not _INTERPRETED:
        major = torch.cuda.get_device_properties(z.device).major
        if major < 8:
            return f"z is on a GPU of compute capability {major}.x, but Triton uses tensor cores from 8.0 on"
    if z.dim() != 2 or z.shape[0] < 1 or not 1 <= z.shape[1] <= MAX_BASIS_CHANNELS:
        return f"z is {tuple(z.shape)}, but it must be (P, k) with P >= 1 and 1 <= k <= {MAX_BASIS_CHANNELS}"
    if z.shape[1] > 1 and z.stride(1) != 1:
        return f"z has strides {z.stride()}, but the second must be 1: channels-last maps as rows"
    return None


def _check(z: Tensor) -> None:
    obstacle = _obstacle(z)
    if obstacle is not None:
        raise ValueError(obstacle)


def _check_matrix(name: str, matrix: Tensor, shape: tuple[int, ...], z: Tensor) -> None:
    if matrix.shape != shape or matrix.dtype != torch.float32 or matrix.device != z.device or 0 in shape:
        raise ValueError(
            f"{name} is {tuple(matrix.shape)}, {matrix.dtype} on {matrix.device}, "
            f"but it must be {shape}, torch.float32 on {z.device}"
        )


def _check_maps(name: str, maps: Tensor | None, channels: int, z: Tensor) -> None:
    shape = (z.shape[0], channels)
    if maps is None:
        return
    if maps.shape != shape or maps.dtype != z.dtype or maps.device != z.device or channels < 1:
        raise ValueError(
            f"{name} is {tuple(maps.shape)}, {maps.dtype} on {maps.device}, "
            f"but it must be {shape}, {z.dtype} on {z.device}"
        )
    if channels > 1 and maps.stride(1) != 1:
        raise ValueError(f"{name} has strides {maps.stride()}, but the second must be 1: channels-last maps as rows")
