"""Separable layers (Gray, Crowley and Storkey 2019, arXiv 1906.00859): depthwise filters, then a pointwise map.

A 1x1 convolution becomes the map alone. Their repository (BayesWatch/deficient-efficient) decides open questions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import New, Product, StructuredConv2d, number, whole

TINY = 1e-30  # below any squared norm that is divided by


class Separable(StructuredConv2d):
    """The base: ``W[o, c] = map[o, c] depthwise[c]``, with a pointwise map that subclasses give.

    ``depthwise`` (C_in, 1, kh, kw) is None for 1x1 kernels; a fit gives its filters a sum that is not negative.
    """

    depthwise: nn.Parameter | None
    rounds: ClassVar[int] = 0  # of fitting map and filters in turn; 0 where the map has no closed solution
    inner: tuple[int, ...] = ()  # channels on the way, where the map is executed as several
    unscaled = ("depthwise",)

    def _build(self, new: New) -> None:
        self.depthwise = new(self.in_channels, 1, *self.kernel_size) if self.kernel_size != (1, 1) else None
        self._build_map(new)
        widths = (self.in_channels, *self.inner, self.out_channels)
        first, *others = (Product(a * b, reads=a) for a, b in pairwise(widths))
        if self.depthwise is None:
            self.products = (replace(first, reads=0), *others)
        else:
            self.products = (Product(self.depthwise.numel()), first, *others)

    def _build_map(self, new: New) -> None:
        """Allocate the map's parameters."""
        raise NotImplementedError

    def _map(self) -> Tensor:
        """The pointwise map, (C_out, C_in)."""
        raise NotImplementedError

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        """Bring ``matrix`` near that given in float64, (C_out, C_in); errors of column c count ``scale[c]`` times."""
        raise NotImplementedError

    def _pointwise(self) -> tuple[Tensor, ...]:
        """The filters of the 1x1 convolutions that execute the map."""
        with full_precision(self.factors[0]):
            return (self._map()[:, :, None, None],)

    def _weight(self) -> Tensor:
        matrix = self._map()[:, :, None, None]
        return matrix if self.depthwise is None else matrix * self.depthwise[:, 0]

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        where: dict[str, Any] = {"stride": self.stride, "padding": padding}
        if self.depthwise is not None:
            x = F.conv2d(x, self.depthwise, dilation=self.dilation, groups=self.in_channels, **where)
            where = {}
        *inner, last = self._pointwise()
        for filters in inner:
            x, where = F.conv2d(x, filters, **where), {}
        return F.conv2d(x, last, self.bias, **where)

    def _fit(self, weight: Tensor) -> None:
        """Begin with the filters of the best separable weight; then fit map and filters in turn, or by descent."""
        slices = weight.double().transpose(0, 1).flatten(2)  # (C_in, C_out, kh kw)
        filters = torch.linalg.eigh(slices.mT @ slices).eigenvectors[..., -1]  # first right singular vectors
        filters = torch.where(filters.sum(1, keepdim=True) < 0, -filters, filters)
        if self.depthwise is not None:
            self.depthwise.copy_(filters.view_as(self.depthwise))
        if not self.rounds:
            return super()._fit(weight)
        for _ in range(1 if self.depthwise is None else self.rounds):
            squares = filters.square().sum(1)
            projected = (slices @ filters[:, :, None])[:, :, 0] / squares.clamp_min(TINY)[:, None]
            self._fit_map(projected.T, squares.sqrt())
            columns = self._map().double().T  # (C_in, C_out)
            squares = columns.square().sum(1, keepdim=True)
            fitted = (columns[:, None] @ slices)[:, 0] / squares.clamp_min(TINY)
            filters = torch.where(squares > TINY, fitted, filters)  # where the map is zero, it can still learn
        if self.depthwise is not None:
            self.depthwise.copy_(filters.view_as(self.depthwise))


class SepConv2d(Separable):
    """Depthwise and full ``pointwise`` convolution, (C_out, C_in, 1, 1) (MobileNets, Howard et al. 2017)."""

    kind = "sep"
    rounds = 1

    def _build_map(self, new: New) -> None:
        self.pointwise = new(self.out_channels, self.in_channels, 1, 1)

    def _map(self) -> Tensor:
        return self.pointwise.flatten(1)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self.pointwise.copy_(matrix.view_as(self.pointwise))


class GenericConv2d(Separable):
    """Depthwise convolution, ``down`` (rank, C_in, 1, 1), ``up`` (C_out, rank, 1, 1): "RF" in figures of Gray et al."""

    kind = "generic"
    sizes = "FRACTION: the rank is that fraction of the larger number of channels"
    rounds = 5

    def _build_map(self, new: New) -> None:
        rank = int(number(self.size, self.kind) * max(self.in_channels, self.out_channels))
        if not rank:
            raise ValueError(f"{self.text} gives rank 0 with {self.in_channels} -> {self.out_channels} channels")
        self.inner = (rank,)
        self.down, self.up = new(rank, self.in_channels, 1, 1), new(self.out_channels, rank, 1, 1)

    def _pointwise(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def _map(self) -> Tensor:
        return self.up[:, :, 0, 0] @ self.down[:, :, 0, 0]

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        u, s, vh = torch.linalg.svd(matrix * scale, full_matrices=False)
        rank = min(len(self.down), len(s))
        root = s[:rank].sqrt()
        self.up.zero_()[:, :rank, 0, 0] = u[:, :rank] * root
        root = torch.where(root > TINY, root, 1)  # a zero map can still learn
        self.down.zero_()[:rank, :, 0, 0] = root[:, None] * vh[:rank] / scale.clamp_min(TINY)


class ShuffleConv2d(StructuredConv2d):
    """``down`` in g groups to C_out // 4 channels, channel shuffle, ``depthwise`` with the stride, ``up`` in g groups.

    g is lowered until it divides C_in, C_out and C_out // 4. For 1x1 kernels ``depthwise`` is None, and ``down`` takes
    the stride. Gray et al. after ShuffleNet (Zhang et al. 2017), here without nonlinearities.
    """

    kind = "shuffle"
    sizes = "N: the number of groups, lowered until it divides the channels"

    def _build(self, new: New) -> None:
        inner, wanted = self.out_channels // 4, whole(self.size, self.kind)
        if not inner:
            raise ValueError(f"shuffle needs at least 4 output channels, and there are {self.out_channels}")
        common = math.gcd(self.in_channels, self.out_channels, inner)
        self.conv_groups = g = next(g for g in range(min(wanted, common), 0, -1) if common % g == 0)
        self.down = new(inner, self.in_channels // g, 1, 1)
        self.depthwise = new(inner, 1, *self.kernel_size) if self.kernel_size != (1, 1) else None
        self.up = new(self.out_channels, inner // g, 1, 1)
        first, last = self.down.numel(), Product(self.up.numel(), inner)
        self.products = (Product(first), last)
        if self.depthwise is not None:
            middle = Product(self.depthwise.numel(), inner, reads_at="input")
            self.products = (Product(first, at="input"), middle, last)

    def _weight(self) -> Tensor:
        down, up = (torch.block_diag(*p[:, :, 0, 0].chunk(self.conv_groups)) for p in (self.down, self.up))
        down = down.unflatten(0, (self.conv_groups, -1)).transpose(0, 1).flatten(0, 1)
        if self.depthwise is None:
            return (up @ down)[:, :, None, None]
        return torch.einsum("om,mhw,mc->ochw", up, self.depthwise[:, 0], down)

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        groups: int = self.conv_groups
        where: dict[str, Any] = {"stride": self.stride, "padding": padding}
        x = F.conv2d(x, self.down, groups=groups, **(where if self.depthwise is None else {}))
        x = torch.channel_shuffle(x, groups) if groups > 1 else x
        if self.depthwise is not None:
            x = F.conv2d(x, self.depthwise, dilation=self.dilation, groups=len(self.depthwise), **where)
        return F.conv2d(x, self.up, self.bias, groups=groups)
