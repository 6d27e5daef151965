"""Batch normalisation in training by the kernels of :mod:`basis.layers.kernels`, with derivatives.

They need maps that are channels-last in float32, bfloat16 or float16, a GPU of CUDA capability 8.0 or more, and Triton.
A compiler gets PyTorch's own operations instead. There are no second derivatives (``RuntimeError``).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

kernels: Any = None  # where there is no GPU, importing Triton would only take time
mixing_kernels: Any = None
thin: Any = None
if torch.cuda.device_count() or os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # Triton has no build for this platform
        from basis.layers import kernels, mixing_kernels, thin


def suits(
    norm: nn.BatchNorm2d, maps: Tensor, residual: Tensor | None = None, *, basis_channels: int | None = None
) -> bool:
    """Whether the kernels can do what ``norm`` does with these maps now; ``basis_channels``: with their mixture."""
    if kernels is None or not isinstance(maps, Tensor) or torch.compiler.is_compiling() or not kernels.usable(maps):
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    channels, narrow = norm.num_features, True
    if basis_channels is not None:
        channels, narrow = basis_channels, basis_channels <= mixing_kernels.MAX_BASIS_CHANNELS
    return (
        narrow
        and maps.shape[1] == channels
        and maps[:, 0].numel() > 1
        and norm.momentum is not None
        and (norm.training or norm.running_mean is None)
        and all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)
        and (residual is None or (residual.shape == maps.shape and residual.dtype == maps.dtype))
    )


def _statistics(norm: nn.BatchNorm2d) -> Any:
    if not norm.training or not norm.track_running_stats:
        return kernels.Statistics()
    return kernels.Statistics(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum or 0.0)


def _last(maps: Tensor | None) -> Tensor | None:
    return None if maps is None else maps.contiguous(memory_format=torch.channels_last)


def normalise(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """relu(norm(x) + residual); x and the residual are (N, C, H, W) of one dtype, and :func:`suits` holds."""
    return _Normalise.apply(x, norm.weight, norm.bias, _last(residual), norm, relu)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None,
        norm: nn.BatchNorm2d, relu: bool,
    ) -> Tensor:  # fmt: skip
        options = {"statistics": _statistics(norm), "eps": norm.eps, "relu": relu}
        out, state = kernels.normalise(x, gamma, beta, residual, **options)
        ctx.save_for_backward(x, state, out if relu and residual is not None else None)
        ctx.options = {"relu": relu, "residual": residual is not None}
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, state, out = ctx.saved_tensors
        dx, d_residual, d_gamma, d_beta = kernels.gradients(_last(dout), out, x, state, **ctx.options)
        with_gamma, with_beta = ctx.needs_input_grad[1:3]
        return dx, d_gamma if with_gamma else None, d_beta if with_beta else None, d_residual, None, None


def mix_and_normalise(
    norm: nn.BatchNorm2d, z: Tensor, mixing: Tensor, bias: Tensor | None, residual: Tensor | None = None, *,
    relu: bool = False,
) -> Tensor:  # fmt: skip
    """relu(norm(mixing z + bias) + residual), (N, C, H, W), of z (N, k, H, W), and :func:`suits` holds."""
    return _MixAndNormalise.apply(z, mixing, norm.weight, norm.bias, bias, _last(residual), norm, relu)


class _MixAndNormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, mixing: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, norm: nn.BatchNorm2d, relu: bool,
    ) -> Tensor:  # fmt: skip
        options = {"statistics": _statistics(norm), "eps": norm.eps, "relu": relu}
        out, mixed = mixing_kernels.mix_and_normalise(z, mixing.contiguous(), gamma, beta, bias, residual, **options)
        ctx.save_for_backward(z, mixing, gamma, bias, out if relu else None, *mixed)
        ctx.residual = residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, mixing, gamma, bias, out, *mixed = ctx.saved_tensors
        dz, d_residual, d_mixing, d_gamma, d_beta = mixing_kernels.mixing_gradients(
            _last(dout), out, z, mixing.contiguous(), gamma, mixing_kernels.Mixed(*mixed), residual=ctx.residual
        )
        d_bias = None if bias is None else torch.zeros_like(bias)
        with_gamma, with_beta = ctx.needs_input_grad[2:4]
        d_gamma, d_beta = d_gamma if with_gamma else None, d_beta if with_beta else None
        return dz, d_mixing, d_gamma, d_beta, d_bias, d_residual, None, None


def convolve(x: Tensor, filters: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """``F.conv2d`` without a bias; the backward pass of few filters by the kernels of :mod:`basis.layers.thin`."""
    known = kernels is not None and not torch.compiler.is_compiling()
    if known and (stride, padding, dilation, groups) == ((1, 1), (1, 1), (1, 1), 1):
        cast = filters.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if cast and kernels.usable(x) and thin.suits(x, filters):
            return _ThinConvolution.apply(x, filters)
    return F.conv2d(x, filters, None, stride, padding, dilation, groups)


class _ThinConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        rounded = filters.to(x.dtype, memory_format=torch.channels_last)
        ctx.save_for_backward(x, rounded)
        return F.conv2d(x, rounded, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        return thin.gradients(_last(dz), *ctx.saved_tensors)
