"""The hybrid mode of a basis convolution: dense forward pass, factorized backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class HybridConv(torch.autograd.Function):
    """Convolve with W = M B; backward dZ = M^T dY, then a k-channel convolution's gradients; first derivatives only.

    ``mixing``: M as a 1x1 weight; ``rows``: the output channels that are basis channels, None: the first k; ``conv``:
    stride, padding, dilation and groups of the convolution.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, basis: Tensor, mixing: Tensor, rows: Tensor | None, conv: tuple,
        mixing_groups: int,
    ) -> Tensor:  # fmt: skip
        """The dense convolution."""
        y = F.conv2d(x, weight, None, *conv)
        z = y.new_empty(0)
        if mixing.requires_grad:
            # A copy, since a view of y would fail under an in-place activation; in the memory format of y.
            first = y[:, : len(basis)]
            z = torch.empty_like(first).copy_(first if rows is None else y[:, rows])
        ctx.save_for_backward(x, basis, mixing, z)
        ctx.conv, ctx.mixing_groups = conv, mixing_groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, B and M."""
        x, basis, mixing, z = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv
        need_x, _, need_basis, need_mixing, *_ = ctx.needs_input_grad
        mix = ((1, 1), (0, 0), (1, 1), False, (0, 0), ctx.mixing_groups)
        dx = d_basis = d_mixing = None
        if need_mixing:
            _, d_mixing, _ = torch.ops.aten.convolution_backward(dy, z, mixing, None, *mix, (False, True, False))
        if need_x or need_basis:
            z = z if z.numel() else torch.empty_like(dy[:, : len(basis)])
            dz, _, _ = torch.ops.aten.convolution_backward(dy, z, mixing, None, *mix, (True, False, False))
            dx, d_basis, _ = torch.ops.aten.convolution_backward(
                dz, x, basis, None, stride, padding, dilation, False, (0, 0), groups, (need_x, need_basis, False)
            )
        return dx, None, d_basis, d_mixing, None, None, None
