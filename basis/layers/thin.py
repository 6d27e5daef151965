# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels for the 3x3 convolution with few basis filters, in training: C_in channels to k.

cuDNN takes as long for 16 filters as for 64: a convolution as a product of matrices reads its C_in channels nine times.
Only the forward pass has to. Here the gradient of the input, ``dx[p] = sum over the nine taps of dz[p - tap] B[tap]``,
and that of the filters, ``dB[tap] = sum over pixels p of dz[p - tap]^T x[p]``, read the k channels of dz nine times and
touch those of x once. What holds for :mod:`basis.layers.kernels` holds here.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from basis.layers.kernels import INTERPRETED, added, block, load, on, rows_of, store


@triton.jit
def _input_gradient(
    dx, dz, filters, P, H, W, C, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, FACTOR: tl.constexpr
):
    """ROWS pixels of dx; ``filters`` (k, 3, 3, C)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    h, w = (rows // W) % H, rows % W
    cols, j = tl.arange(0, TILE), tl.arange(0, K)
    acc = tl.zeros((ROWS, TILE), tl.float32)
    for tap in tl.static_range(9):
        up, left = tap // 3 - 1, tap % 3 - 1
        inside = (rows < P) & (h >= up) & (h - up < H) & (w >= left) & (w - left < W)
        at = rows - up * W - left
        maps = tl.load(dz + at[:, None] * K + j[None, :], mask=inside[:, None], other=0.0)
        matrix = tl.load(filters + j[:, None] * 9 * C + tap * C + cols[None, :], mask=(cols < C)[None, :], other=0.0)
        acc = tl.dot(maps.to(FACTOR), matrix.to(FACTOR), acc)
    store(dx, acc, first, cols, C, P, C, ROWS)


@triton.jit
def _filter_gradient(
    partial, x, dz, P, H, W, C, chunk,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAPS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """TAPS rows of partial[p] (9 k, C): the gradients of the filters, tap by tap, of the pixels of chunk p."""
    row = tl.program_id(1) * TAPS + tl.arange(0, TAPS)  # of the gradient: of channel j, tap by tap
    tap, j = row // K, row % K
    up, left = tap // 3 - 1, tap % 3 - 1
    cols = tl.arange(0, TILE)
    acc = tl.zeros((TAPS, TILE), tl.float32)
    for first in range(tl.program_id(0) * chunk, tl.minimum((tl.program_id(0) + 1) * chunk, P), ROWS):
        p = first + tl.arange(0, ROWS)
        h, w = ((p // W) % H)[:, None] - up[None, :], (p % W)[:, None] - left[None, :]
        inside = (p < P)[:, None] & (tap < 9)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = p.to(tl.int64)[:, None] - (up * W + left)[None, :]
        maps = tl.load(dz + at * K + j[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(maps.to(FACTOR)), load(x, first, cols, C, P, C, ROWS).to(FACTOR), acc)
    store(partial + tl.program_id(0) * 9 * K * C, acc, tl.program_id(1) * TAPS, cols, C, 9 * K, C, TAPS)


def suits(x: Tensor, filters: Tensor) -> bool:
    """Whether the kernels can take x (N, C_in, H, W) and filters (k, C_in, 3, 3), at stride 1 and with padding 1."""
    small = filters.shape[0] in (16, 32) and filters.shape[1] <= 64
    return small and filters.shape[2:] == (3, 3) and x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad


def gradients(dz: Tensor, x: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the filters in float32; all channels-last."""
    (P, C), k = rows_of(x).shape, len(filters)
    shape = {"P": P, "H": x.shape[2], "W": x.shape[3], "C": C, "K": k, "TILE": block(C, 64)}
    shape["FACTOR"] = tl.float32 if INTERPRETED else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    dx, taps, rows = torch.empty_like(x), 256 if k == 16 else 128, 64
    chunk = rows * triton.cdiv(P, 264 * rows)
    partial = torch.empty((triton.cdiv(P, chunk), 9 * k * C), device=x.device)
    with on(x):
        _input_gradient[(triton.cdiv(P, 128),)](dx, dz, filters, ROWS=128, num_warps=4, **shape)
        grid = len(partial), triton.cdiv(9 * k, taps)
        _filter_gradient[grid](partial, x, dz, chunk=chunk, ROWS=rows, TAPS=taps, num_warps=8, **shape)
        total = added(partial)
    return dx, total.view(3, 3, k, C).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
