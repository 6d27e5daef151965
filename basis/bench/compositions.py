"""Structured layers as a newcomer would write them: the simplest composition of torch operations for each.

:mod:`basis.bench.structured` compares the layers with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.conv import BasisConv2d
from basis.layers.structured import StructuredConv2d


class Composition(nn.Module):
    """A function of (N, C_in, H, W) and of the parameters of ``layer``, which it holds: those themselves."""

    def __init__(self, layer: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self._function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_out, H', W')."""
        return self._function(self.layer, x)


def composition(layer: nn.Module) -> Composition:
    """The function of ``layer`` by plain torch operations, with its very parameters.

    Raises:
        TypeError: for a layer that is neither structured nor a basis convolution.
        ValueError: for 1x1 kernels, which need none.
    """
    if isinstance(layer, StructuredConv2d):
        function = COMPOSITIONS[layer.kind]
    elif isinstance(layer, BasisConv2d):
        function = _basis_composed if layer.mode == "composed" else _basis
    else:
        raise TypeError(f"composition takes a structured layer or a basis convolution, not {type(layer).__name__}")
    if layer.kernel_size == (1, 1):
        raise ValueError("the kernel is 1x1, but compositions are for larger ones")
    return Composition(layer, function)


def _conv(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """The convolution that takes the kernel, stride, padding and dilation of the layer."""
    x, padding = layer._pad(x)
    return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, groups)


def _separable(layer: Any, x: Tensor, *filters: Tensor) -> Tensor:
    """Depthwise, then 1x1 convolutions with the filters, (rows, columns) each."""
    x = _conv(layer, x, layer.depthwise, groups=layer.in_channels)
    for matrix in filters[:-1]:
        x = F.conv2d(x, matrix[:, :, None, None])
    return F.conv2d(x, filters[-1][:, :, None, None], layer.bias)


def _sep(layer: Any, x: Tensor) -> Tensor:
    return _separable(layer, x, layer.pointwise[:, :, 0, 0])


def _generic(layer: Any, x: Tensor) -> Tensor:
    return _separable(layer, x, layer.down[:, :, 0, 0], layer.up[:, :, 0, 0])


def _tied(layer: Any, x: Tensor) -> Tensor:
    x = _conv(layer, x, layer.depthwise, groups=layer.in_channels)
    x = x.repeat(1, layer.out_channels // layer.in_channels, 1, 1)
    return F.conv2d(F.conv2d(x, layer.factor), layer.factor.transpose(0, 1), layer.bias)


def _sep_hashed(layer: Any, x: Tensor) -> Tensor:
    return _separable(layer, x, layer.table[layer.indices].view(layer.out_channels, layer.in_channels))


def _tensor_train(layer: Any, x: Tensor) -> Tensor:
    tensor = torch.einsum("ar,rbs,sc->abc", layer.core1, layer.core2, layer.core3)
    return _separable(layer, x, tensor.reshape(layer.out_channels, layer.in_channels))


def _tucker(layer: Any, x: Tensor) -> Tensor:
    core = torch.einsum("ir,rjs,sk->ijk", layer.core1, layer.core2, layer.core3)
    tensor = torch.einsum("ijk,ia,jb,kc->abc", core, layer.factor1, layer.factor2, layer.factor3)
    return _separable(layer, x, tensor.reshape(layer.out_channels, layer.in_channels))


def _tridiagonal(layer: Any, x: Tensor) -> Tensor:
    zeros = layer.entries.new_zeros(layer.out_channels * layer.in_channels)
    matrix = zeros.scatter(0, layer.indices, layer.entries)
    return _separable(layer, x, matrix.view(layer.out_channels, layer.in_channels))


@lru_cache(maxsize=8)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cosine transform of each row of the unit matrix, and the inverse one, columns riffled; (n, n)."""
    i = torch.arange(n, dtype=torch.float64, device=device)
    transform = 2 * torch.cos((2 * i[:, None] + 1) * i * math.pi / (2 * n))
    inverse, riffle = torch.linalg.inv(transform), torch.cat([i[::2], i[1::2]]).long()
    return transform[:, riffle].to(dtype), inverse[:, riffle].to(dtype)


def _acdc(layer: Any, x: Tensor) -> Tensor:
    x = _conv(layer, x, layer.depthwise, groups=layer.in_channels)
    n, c = layer.a.shape[1], layer.in_channels
    if n > c:  # the first channels again until their number divides n, then all of them
        padded = next(k for k in range(c, n + 1) if n % k == 0)
        x = x[:, torch.arange(n, device=x.device) % padded % c]
    transform, inverse = _cosines(n, layer.a.dtype, layer.a.device)
    matrix = torch.eye(n, dtype=layer.a.dtype, device=layer.a.device)
    for a, d in zip(layer.a, layer.d, strict=True):
        matrix = matrix @ (a[:, None] * transform) @ (d[:, None] * inverse)
    y = F.conv2d(x, matrix[:, :, None, None])
    y = y.view(len(y), layer.out_channels, -1, *y.shape[2:]).sum(2)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def _shuffle(layer: Any, x: Tensor) -> Tensor:
    groups = layer.conv_groups
    x = F.conv2d(x, layer.down, groups=groups)
    n, c, h, w = x.shape
    x = x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
    return F.conv2d(_conv(layer, x, layer.depthwise, groups=c), layer.up, layer.bias, groups=groups)


def _hashed(layer: Any, x: Tensor) -> Tensor:
    return _conv(layer, x, layer.table[layer.indices].view(layer.out_channels, *layer.filter_shape), layer.bias)


class _Above(torch.autograd.Function):
    """1 above the median, else 0; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return (scores > scores.median()).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _pemn(layer: Any, x: Tensor) -> Tensor:
    return _conv(layer, x, layer.values * cast(Tensor, _Above.apply(layer.scores.abs())), layer.bias)


def _debut(layer: Any, x: Tensor) -> Tensor:
    product = torch.eye(layer.out_channels, dtype=x.dtype, device=x.device)
    for factor in reversed(list(layer.parts.values())):
        blocks, r, _, t = factor.shape
        product = torch.einsum("nbrt,brst->nbst", product.view(-1, blocks, r, t), factor).flatten(1)
    weight = product.view(layer.out_channels, *layer.kernel_size, layer.in_channels)
    return _conv(layer, x, weight.permute(0, 3, 1, 2), layer.bias)


def _dsf(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(_conv(layer, x, layer.inner * layer.inner_mask), layer.outer * layer.outer_mask, layer.bias)


def _basis(layer: Any, x: Tensor) -> Tensor:
    z = _conv(layer, x, layer.basis)
    y = torch.cat([z, F.conv2d(z, layer.coefficients.matrix()[:, :, None, None])], dim=1)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def _basis_composed(layer: Any, x: Tensor) -> Tensor:
    derived = layer.coefficients.matrix() @ layer.basis.flatten(1)
    return _conv(layer, x, torch.cat([layer.basis, derived.view(-1, *layer.filter_shape)]), layer.bias)


def _basisconv(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(_conv(layer, x, layer.basis), layer.mixing, layer.bias)


def _lfb(layer: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    maps = _conv(layer, x.reshape(-1, c // layer.splits, h, w), layer.basis)
    return F.conv2d(maps.reshape(n, -1, *maps.shape[2:]), layer.mixing, layer.bias)


def _dsfb(layer: Any, x: Tensor) -> Tensor:
    maps = torch.cat([_conv(layer, x, layer.basis), _conv(layer, x, layer.unique)], dim=1)
    return F.conv2d(layer.norm(maps), layer.mixing, layer.bias)


def _dcf(layer: Any, x: Tensor) -> Tensor:
    weight = torch.einsum("ock,khw->ochw", layer.coefficients[..., 0], layer.functions)
    return _conv(layer, x, weight, layer.bias)


# Kind of layer -> the function of a layer and its input.
COMPOSITIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sep": _sep, "generic": _generic, "tied": _tied, "sep_hashed": _sep_hashed, "tensor_train": _tensor_train,
    "tucker": _tucker, "tridiagonal": _tridiagonal, "shuffle": _shuffle, "hashed": _hashed, "pemn": _pemn,
    "debut": _debut, "dsf": _dsf, "acdc": _acdc, "basisconv": _basisconv, "lfb": _lfb, "dsfb": _dsfb, "dcf": _dcf,
}  # fmt: skip
