# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels for batch normalisation through the basis: each passes over the C-channel maps once.

The functions are those of :mod:`basis.layers.batchnorm` on matrices: P pixels x channels, as channels-last maps store
them; other arguments are float32, and matrices are rounded to the dtype of z. Check :func:`usable` first.

Sums are accumulated in float32, in chunks of rows, without atomics: equal input gives equal bits. Products run on
tensor cores in the dtype of z; those of float32 are full float32 unless ``torch.backends.cuda.matmul.allow_tf32``. To
``torch.compile`` every function is one opaque operator, without a derivative. CUDA graphs can capture them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor
from torch.library import custom_op

# A pass does about k/2 flop per byte, and GPUs turn compute-bound near 200: above this, a GEMM of cuBLAS and a
# second pass are as fast.
MAX_BASIS_CHANNELS = 256

# Row numbers are int64, since rows times stride may exceed 2^31. All loads are masked, so no size need be a multiple
# of a block.


@triton.jit
def _load(matrix, gate, shift, first, cols, stride, gate_stride, height, width, ROWS: tl.constexpr):
    """Columns ``cols`` of ROWS rows from ``first``, less the shift; 0 outside, and where the gate is not positive."""
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    values = tl.load(matrix + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    if gate is not None:
        gates = tl.load(gate + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0)
        values = tl.where(gates.to(tl.float32) > 0, values, 0.0)
    if shift is not None:
        shifts = tl.load(shift + cols, mask=cols < width, other=0.0)
        values = tl.where(inside, values.to(tl.float32) - shifts[None, :], 0.0)
    return values


@triton.jit
def _outer_sums(
    left, gate, right, shift, partial, P, m, n, left_stride, gate_stride, right_stride, chunk,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, ROWS: tl.constexpr, SAME: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A TILE_M x TILE_N part of partial[p] = [sum l r^T; sum l] over the rows l, r of chunk p."""
    p = tl.program_id(0)
    i = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    j = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
    products = tl.zeros((TILE_M, TILE_N), tl.float32)
    sums = tl.zeros((TILE_M,), tl.float32)
    for first in range(p * chunk, tl.minimum((p + 1) * chunk, P), ROWS):
        a = _load(left, gate, shift, first, i, left_stride, gate_stride, P, m, ROWS)
        b = a if SAME else _load(right, None, shift, first, j, right_stride, 0, P, n, ROWS)
        products = tl.dot(tl.trans(a.to(FACTOR)), b.to(FACTOR), products, input_precision=PRECISION)
        sums += tl.sum(a.to(tl.float32), 0)
    partial += p * m * (n + 1)
    tl.store(partial + i[:, None] * n + j[None, :], products, mask=(i < m)[:, None] & (j < n)[None, :])
    if tl.program_id(2) == 0:
        tl.store(partial + m * n + i, sums, mask=i < m)


@triton.jit
def _product(
    acc, maps, gate, matrix, first, cols, P, inner, width, stride, gate_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (gated maps)[rows, :] matrix[:, cols], for ROWS rows from ``first``."""
    for start in range(0, inner, BLOCK):
        at = start + tl.arange(0, BLOCK)
        left = _load(maps, gate, None, first, at, stride, gate_stride, P, inner, ROWS)
        inside = (at < inner)[:, None] & (cols < width)[None, :]
        right = tl.load(matrix + at[:, None] * width + cols[None, :], mask=inside, other=0.0)
        acc = tl.dot(left.to(FACTOR), right.to(FACTOR), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _affine(
    out, constant, residual, z, matrix, dout, gate, weight, P, n, k, C, residual_stride, stride, dout_stride,
    gate_stride,
    RELU: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A ROWS x TILE part of out (P x n) = relu(constant + residual + z matrix + (gated dout) weight)."""
    tiles = tl.cdiv(n, TILE)  # neighbouring programs share the rows of the maps in the cache
    first = (tl.program_id(0) // tiles) * ROWS
    cols = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    acc = tl.zeros((ROWS, TILE), tl.float32) + tl.load(constant + cols, mask=cols < n, other=0.0)[None, :]
    if residual is not None:
        acc += _load(residual, None, None, first, cols, residual_stride, 0, P, n, ROWS).to(tl.float32)
    acc = _product(acc, z, None, matrix, first, cols, P, k, n, stride, 0, ROWS, BLOCK_K, FACTOR, PRECISION)
    if dout is not None:
        acc = _product(
            acc, dout, gate, weight, first, cols, P, C, n, dout_stride, gate_stride, ROWS, BLOCK_C, FACTOR, PRECISION
        )
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # and NaN stays NaN
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows < P)[:, None] & (cols < n)[None, :]
    tl.store(out + rows[:, None] * n + cols[None, :], acc.to(out.dtype.element_ty), mask=inside)


# Whether TRITON_INTERPRET was set when Triton was imported: the kernels then run on any device, slowly.
_INTERPRETED = not isinstance(_load, triton.JITFunction)


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
    return z.new_empty(matrix.shape).copy_(matrix)


def _stride(maps: Tensor | None) -> int:
    return 0 if maps is None else maps.stride(0)


def _on(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def _sums(
    left: Tensor, gate: Tensor | None, right: Tensor, shift: Tensor | None, tiles: tuple[int, int], rows: int,
    **config: Any,
) -> Tensor:  # fmt: skip
    """[sum l r^T; sum l] over all rows as one vector: by about 256 programs, two per multiprocessor of a large GPU."""
    (P, m), n = left.shape, right.shape[1]
    grid = triton.cdiv(m, tiles[0]), triton.cdiv(n, tiles[1])
    # With so many rows at least, reading the partial sums does not cost more than reading the maps.
    wanted = max((2 if left is right else 4) * n, triton.cdiv(P, max(1, 256 // (grid[0] * grid[1]))))
    chunk = rows * triton.cdiv(wanted, rows)
    partial = left.new_empty((triton.cdiv(P, chunk), m * (n + 1)), dtype=torch.float32)
    with _on(left):
        _outer_sums[len(partial), grid[0], grid[1]](
            left, gate, right, shift, partial, P, m, n, left.stride(0), _stride(gate), right.stride(0), chunk,
            TILE_M=tiles[0], TILE_N=tiles[1], ROWS=rows, SAME=left is right and grid == (1, 1),
            PRECISION=_precision(left.dtype), num_stages=3, **config,
        )  # fmt: skip
    return partial.sum(0)


def _mixed(
    constant: Tensor, z: Tensor, matrix: Tensor, *, residual: Tensor | None = None, dout: Tensor | None = None,
    gate: Tensor | None = None, weight: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(constant + residual + z matrix + (gated dout) weight), in the dtype of z."""
    (P, k), n, C = z.shape, len(constant), 0 if dout is None else dout.shape[1]
    single = z.dtype == torch.float32
    rows, tile, inner = 64 if single or dout is None else 128, _block(n, 64 if single else 128), 32 if single else 64
    out = z.new_empty((P, n))
    with _on(z):
        _affine[(triton.cdiv(P, rows) * triton.cdiv(n, tile),)](
            out, constant.contiguous(), residual, z, _rounded(matrix, z), dout, gate,
            None if weight is None else _rounded(weight, z), P, n, k, C,
            _stride(residual), z.stride(0), _stride(dout), _stride(gate),
            RELU=relu, ROWS=rows, TILE=tile, BLOCK_K=_block(k, inner), BLOCK_C=_block(C, inner),
            FACTOR=_factor(z.dtype), PRECISION=_precision(z.dtype), num_warps=8, num_stages=2,
        )  # fmt: skip
    return out


def usable(z: Tensor) -> bool:
    """Whether these kernels can take z (P, k): rows contiguous, P >= 1, k <= 256, and CUDA capability 8.0 or more."""
    if not _INTERPRETED and not (z.is_cuda and torch.cuda.get_device_properties(z.device).major >= 8):
        return False
    known = z.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = z.dim() == 2 and z.shape[0] >= 1 and 1 <= z.shape[1] <= MAX_BASIS_CHANNELS
    return known and fits and (z.shape[1] == 1 or z.stride(1) == 1)


@custom_op("basis::moments", mutates_args=())
def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k,) and covariance (k, k) of the rows of z (P, k), divided by P, both in float32.

    One pass: the rows are centred on the mean of some of them, and what that leaves is corrected at the end.
    """
    P, k = z.shape
    single = z.dtype == torch.float32
    tile = _block(k, 64 if single or k <= 128 else 128)
    step = max(1, P // 64)
    shift = z[: 64 * step : step].mean(0, dtype=torch.float32).to(z.dtype).float()
    config = {"rows": (2048 if single else 4096) // tile, "FACTOR": tl.float32, "num_warps": 8 if tile == 128 else 4}
    total = (_sums(z, None, z, shift, (tile, tile), **config) / P).view(k + 1, k)
    rest = total[k]
    return shift + rest, torch.addr(total[:k], rest, rest, alpha=-1)


@custom_op("basis::apply", mutates_args=())
def apply(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(z weight^T + bias + residual), (P, C) in the dtype of z, of weight (C, k) and bias (C,)."""
    return _mixed(bias, z, weight.t(), residual=residual, relu=relu)


@custom_op("basis::gradient_sums", mutates_args=())
def gradient_sums(dout: Tensor, out: Tensor | None, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """With dO = dout * (out > 0): the sum of dO (C,), and dO^T (z - mean) (C, k), in float32.

    The mean is subtracted from the sums, which multiplies the rounding errors of float32 by 1 + |mean| / deviation.
    """
    C, k = dout.shape[1], z.shape[1]
    single = z.dtype == torch.float32
    tile_k = _block(k, 64 if single else 256)
    tile_c = _block(C, 64 if single or tile_k == 256 else 128)
    rows = 64 if tile_k <= 64 and not single else 32
    sums = _sums(dout, out, z, None, (tile_c, tile_k), rows, FACTOR=_factor(z.dtype), num_warps=8)
    products, total = sums.split([C * k, C])
    return total.clone(), torch.addr(products.view(C, k), total, mean, alpha=-1)


@custom_op("basis::input_gradient", mutates_args=())
def input_gradient(
    dout: Tensor, out: Tensor | None, z: Tensor, weight: Tensor, quadratic: Tensor, constant: Tensor
) -> Tensor:
    """With dO = dout * (out > 0): dO weight - z quadratic + constant, (P, k) in the dtype of z."""
    return _mixed(constant, z, -quadratic, dout=dout, gate=out, weight=weight)


def _float32(like: Tensor, *shapes: Any) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


moments.register_fake(lambda z: _float32(z, z.shape[1:], 2 * z.shape[1:]))
apply.register_fake(lambda z, weight, *_: z.new_empty((len(z), len(weight))))
gradient_sums.register_fake(lambda dout, out, z, mean: _float32(z, dout.shape[1:], (dout.shape[1], z.shape[1])))
input_gradient.register_fake(lambda dout, out, z, *_: z.new_empty(z.shape))
