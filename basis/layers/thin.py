# mypy: allow-untyped-defs, allow-incomplete-defs
"""A Triton kernel for the backward pass of a 3x3 convolution with few basis filters: C_in channels to k.

cuDNN takes as long for 16 filters as for 64, since a convolution as a product of matrices reads its C_in channels nine
times. Only the forward pass has to. The gradient of the input, ``dx[p] = sum over nine taps of dz[p - tap] B[tap]``,
and that of the filters, ``dB[tap] = sum over pixels p of dz[p - tap]^T x[p]``, take the k channels of dz nine times,
and x once. It was measured on Hopper GPUs alone; else what holds for :mod:`basis.layers.kernels` holds here.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from basis.layers.kernels import INTERPRETED, added, block, factor, load, on, rows_of, store


@triton.jit
def _shifted(dz, first, tap, j, P, H, W, K: tl.constexpr, ROWS: tl.constexpr):
    """Channels j of dz at p - tap, for ROWS pixels p from ``first``; 0 outside the image."""
    p = first + tl.arange(0, ROWS)
    up, left = (tap // 3 - 1)[None, :], (tap % 3 - 1)[None, :]
    h, w = ((p // W) % H)[:, None] - up, (p % W)[:, None] - left
    inside = (p < P)[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = p.to(tl.int64)[:, None] - up * W - left
    return tl.load(dz + at * K + j[None, :], mask=inside, other=0.0)


@triton.jit
def _both_gradients(
    dx, partial, x, dz, filters, P, H, W, C, chunk,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """dx of the pixels of a chunk, and what they add to dB, (9 k, C); ``filters`` are (k, 9, C).

    Eight taps are one matrix and the ninth another, since blocks have to be powers of two.
    """
    cols, one, eight = tl.arange(0, TILE), tl.arange(0, K), tl.arange(0, 8 * K)
    tap, j = eight // K, eight % K
    inside = (cols < C)[None, :]
    eight_taps = tl.load(filters + (j * 9 * C + tap * C)[:, None] + cols[None, :], mask=inside, other=0.0).to(FACTOR)
    ninth_tap = tl.load(filters + (one * 9 * C + 8 * C)[:, None] + cols[None, :], mask=inside, other=0.0).to(FACTOR)
    to_eight = tl.zeros((8 * K, TILE), tl.float32)
    to_ninth = tl.zeros((K, TILE), tl.float32)
    for first in range(tl.program_id(0) * chunk, tl.minimum((tl.program_id(0) + 1) * chunk, P), ROWS):
        taps = _shifted(dz, first, tap, j, P, H, W, K, ROWS).to(FACTOR)
        last = _shifted(dz, first, one * 0 + 8, one, P, H, W, K, ROWS).to(FACTOR)
        maps = load(x, first, cols, C, P, C, ROWS).to(FACTOR)
        to_eight = tl.dot(tl.trans(taps), maps, to_eight)
        to_ninth = tl.dot(tl.trans(last), maps, to_ninth)
        store(dx, tl.dot(last, ninth_tap, tl.dot(taps, eight_taps)), first, cols, C, P, C, ROWS)
    partial += tl.program_id(0) * 9 * K * C
    store(partial, to_eight, 0, cols, C, 8 * K, C, 8 * K)
    store(partial + 8 * K * C, to_ninth, 0, cols, C, K, C, K)


# The fastest of those tried on one H200, with 1024 images of 32 x 32 pixels.
ROWS, WARPS, STAGES, PROGRAMS = 64, 4, 2, 264
BASIS_CHANNELS = 16  # with 32 the backward pass of cuDNN was as fast


def suits(x: Tensor, filters: Tensor) -> bool:
    """Whether the kernel is made for x (N, C_in, H, W), with a gradient, and filters (16, C_in, 3, 3), on this GPU."""
    if not (INTERPRETED or torch.cuda.get_device_capability(x.device) >= (9, 0)):
        return False
    small = filters.shape[0] == BASIS_CHANNELS and filters.shape[1] <= 64
    return small and filters.shape[2:] == (3, 3) and x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad


def gradients(dz: Tensor, x: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the filters in float32; all channels-last."""
    (P, C), k = rows_of(x).shape, len(filters)
    chunk = ROWS * triton.cdiv(P, PROGRAMS * ROWS)
    partial = torch.empty((triton.cdiv(P, chunk), 9 * k * C), device=x.device)
    dx = torch.empty_like(x)
    with on(x):
        _both_gradients[(len(partial),)](
            dx, partial, x, dz, filters, P, x.shape[2], x.shape[3], C, chunk,
            K=k, ROWS=ROWS, TILE=block(C, 64), FACTOR=factor(x.dtype), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        total = added(partial)
    return dx, total.view(3, 3, k, C).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
