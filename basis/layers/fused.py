"""The Triton kernels with derivatives: batch normalisation in training, and convolutions with few filters.

They take maps that are channels-last in float32, bfloat16 or float16, on a GPU of CUDA capability 8.0 or more. What
compiles, traces or transforms the model, or watches its operations, gets PyTorch's own instead; so does everything
where the environment variable ``BASIS_KERNELS`` is 0 when this is imported. There are no second derivatives.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from basis.layers.base import transformed

kernels: Any = None  # where there is no GPU, importing Triton would only take time
mixing_kernels: Any = None
thin: Any = None
if os.environ.get("BASIS_KERNELS") != "0" and (torch.cuda.device_count() or os.environ.get("TRITON_INTERPRET") == "1"):
    with contextlib.suppress(ImportError):  # Triton has no build for this platform
        from basis.layers import kernels, mixing_kernels, thin


def _take(maps: Tensor) -> bool:
    """Whether the kernels can take these maps now."""
    return (
        kernels is not None
        and not transformed()
        and type(maps) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and kernels.usable(maps)
    )


def suits(
    norm: nn.BatchNorm2d, maps: Tensor, residual: Tensor | None = None, *, basis_channels: int | None = None,
    bias: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether the kernels can do what ``norm`` does with these maps now; or with their mixture plus a bias."""
    if not _take(maps):
        return False
    tensors = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var, bias) if t is not None]
    channels, narrow = norm.num_features, True
    if basis_channels is not None:
        channels, narrow = basis_channels, basis_channels <= mixing_kernels.MAX_BASIS_CHANNELS
    return (
        narrow
        and maps.shape[1] == channels
        and maps[:, 0].numel() > 1
        and norm.momentum is not None
        and norm.eps > 0
        and (norm.running_mean is None) == (norm.running_var is None)
        and (norm.training or norm.running_mean is None)
        and all(t.dtype == torch.float32 and t.is_contiguous() and t.device == maps.device for t in tensors)
        and all(t.numel() == norm.num_features for t in tensors)
        and (residual is None or (residual.shape == maps.shape and residual.dtype == maps.dtype))
    )


def _first_derivative() -> None:
    if torch.is_grad_enabled():
        text = "the Triton kernels of basis have no second derivatives; set BASIS_KERNELS=0 in the environment"
        raise RuntimeError(text)


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
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _first_derivative()
        x, state, out = ctx.saved_tensors  # hooks may have changed their memory format
        dx, d_residual, d_gamma, d_beta = kernels.gradients(_last(dout), _last(out), _last(x), state, **ctx.options)
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
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _first_derivative()
        z, mixing, gamma, bias, out, *mixed = ctx.saved_tensors
        maps = _last(dout), _last(out), _last(z)
        dz, d_residual, d_mixing, d_gamma, d_beta = mixing_kernels.mixing_gradients(
            *maps, mixing.contiguous(), gamma, mixing_kernels.Mixed(*mixed), residual=ctx.residual
        )
        d_bias = None if bias is None else torch.zeros_like(bias)
        with_gamma, with_beta = ctx.needs_input_grad[2:4]
        d_gamma, d_beta = d_gamma if with_gamma else None, d_beta if with_beta else None
        return dz, d_mixing, d_gamma, d_beta, d_bias, d_residual, None, None


def convolve(x: Tensor, filters: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """``F.conv2d`` without a bias; the backward pass of few filters by the kernels of :mod:`basis.layers.thin`."""
    plain = (stride, padding, dilation, groups) == ((1, 1), (1, 1), (1, 1), 1)
    if plain and _take(x):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else filters.dtype
        if x.dtype == dtype and thin.suits(x, filters):
            return _ThinConvolution.apply(x, filters)
    return F.conv2d(x, filters, None, stride, padding, dilation, groups)


class _ThinConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        rounded = filters.to(x.dtype).contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, rounded)
        return F.conv2d(x, rounded, padding=1)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        _first_derivative()
        return thin.gradients(_last(dz), *map(_last, ctx.saved_tensors))
