"""Separable layers (Gray, Crowley and Storkey 2019, arXiv 1906.00859): depthwise filters, then a pointwise map.

A 1x1 convolution becomes the map alone. Their repository (BayesWatch/deficient-efficient) decides open questions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import New, Product, StructuredConv2d, draw_normal, number, whole

TINY = 1e-30  # below any squared norm that is divided by


class Separable(StructuredConv2d):
    """The base: ``depthwise`` filters (C_in, 1, kh, kw), None for 1x1 kernels, and a map that subclasses give.

    ``W[o, c] = matrix[o, c] depthwise[c]``. The filters have N(0, 2 / (kh kw C_in)) at first. The scale and sign of
    each filter do not matter to W; :meth:`fit` starts with filters of norm 1 and of a sum that is not negative.
    """

    depthwise: nn.Parameter | None
    rounds: ClassVar[int] = 0  # of fitting map and filters in turn; 0 where the map has no closed solution
    unscaled = ("depthwise",)

    def _build(self, new: New) -> None:
        self.depthwise = new(self.in_channels, 1, *self.kernel_size) if self.kernel_size != (1, 1) else None
        self._set_products(Product(self.out_channels * self.in_channels, self.in_channels))

    def _set_products(self, first: Product, *others: Product) -> None:
        """The products of the map."""
        if self.depthwise is None:
            self.products = (replace(first, reads=0), *others)
        else:
            self.products = (Product(self.depthwise.numel()), first, *others)

    def _matrix(self) -> Tensor:
        raise NotImplementedError

    def _draw_map(self) -> None:
        """Draw the map's parameters."""
        for parameter in self.factors:
            draw_normal(parameter)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        """Bring ``matrix`` near that given in float64, (C_out, C_in); errors of column c count ``scale[c]`` times."""
        raise NotImplementedError

    def _map(self, x: Tensor) -> Tensor:
        """Apply the map to x, (N, C_in, H, W) or (C_in, H, W), and add the bias."""
        return F.conv2d(x, self.matrix[:, :, None, None], self.bias)

    @property
    def matrix(self) -> Tensor:
        """The pointwise map, (C_out, C_in); never autocast."""
        with full_precision(self.factors[0]):
            return self._matrix()

    def _draw(self) -> None:
        if self.depthwise is not None:
            draw_normal(self.depthwise)
        self._draw_map()

    def _weight(self) -> Tensor:
        matrix = self._matrix()[:, :, None, None]
        return matrix if self.depthwise is None else matrix * self.depthwise[:, 0]

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.depthwise is not None:
            x = F.conv2d(x, self.depthwise, None, self.stride, padding, self.dilation, self.in_channels)
        else:
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
            x = x[..., :: self.stride[0], :: self.stride[1]]
        return self._map(x)

    def _fit(self, weight: Tensor) -> None:
        """Begin with the filters of the best separable weight; then fit map and filters in turn, or by descent."""
        slices = weight.double().transpose(0, 1).flatten(2)  # (C_in, C_out, kh kw)
        if self.depthwise is not None:
            filters = torch.linalg.eigh(slices.mT @ slices).eigenvectors[..., -1]  # first right singular vectors
            filters = torch.where(filters.sum(1, keepdim=True) < 0, -filters, filters)
            self.depthwise.copy_(filters.view_as(self.depthwise))
        if not self.rounds:
            super()._fit(weight)
        elif self.depthwise is None:
            self._fit_map(slices[:, :, 0].T, slices.new_ones(self.in_channels))
        else:
            for _ in range(self.rounds):
                squares = filters.square().sum(1)
                projected = (slices @ filters[:, :, None])[:, :, 0] / squares.clamp_min(TINY)[:, None]
                self._fit_map(projected.T, squares.sqrt())
                columns = self.matrix.double().T  # (C_in, C_out)
                squares = columns.square().sum(1, keepdim=True)
                fitted = (columns[:, None] @ slices)[:, 0] / squares.clamp_min(TINY)
                filters = torch.where(squares > TINY, fitted, filters)  # where the map is zero, it can still learn
            self.depthwise.copy_(filters.view_as(self.depthwise))


class SepConv2d(Separable):
    """Depthwise and full ``pointwise`` convolution, (C_out, C_in, 1, 1) (MobileNets, Howard et al. 2017)."""

    kind = "sep"
    rounds = 1

    def _build(self, new: New) -> None:
        super()._build(new)
        self.pointwise = new(self.out_channels, self.in_channels, 1, 1)

    def _matrix(self) -> Tensor:
        return self.pointwise[:, :, 0, 0]

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self.pointwise.copy_(matrix.view_as(self.pointwise))

    def _map(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.pointwise, self.bias)


class GenericConv2d(Separable):
    """Depthwise convolution, then 1x1 ones of C_in -> rank -> C_out ("generic low rank", "RF" in the figures).

    Parameters:
        down, up: (rank, C_in, 1, 1) and (C_out, rank, 1, 1), with rank = int(s max(C_in, C_out)).
    """

    kind = "generic"
    sizes = "FRACTION: the rank is that fraction of the larger number of channels"
    rounds = 5

    def _build(self, new: New) -> None:
        super()._build(new)
        rank = int(number(self.size, self.kind) * max(self.in_channels, self.out_channels))
        if not rank:
            raise ValueError(f"{self.text} gives rank 0 with {self.in_channels} -> {self.out_channels} channels")
        self._set_products(Product(rank * self.in_channels, self.in_channels), Product(rank * self.out_channels, rank))
        self._allocate(new, rank)

    def _allocate(self, new: New, rank: int) -> None:
        self.down, self.up = new(rank, self.in_channels, 1, 1), new(self.out_channels, rank, 1, 1)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up

    def _matrix(self) -> Tensor:
        down, up = self._pair()
        return up[:, :, 0, 0] @ down[:, :, 0, 0]

    def _map(self, x: Tensor) -> Tensor:
        down, up = self._pair()
        return F.conv2d(F.conv2d(x, down), up, self.bias)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        u, s, vh = torch.linalg.svd(matrix * scale, full_matrices=False)
        rank = min(len(self.down), len(s))
        root = s[:rank].sqrt()
        self.up.zero_()[:, :rank, 0, 0] = u[:, :rank] * root
        root = torch.where(root > TINY, root, 1)  # a zero map can still learn
        self.down.zero_()[:rank, :, 0, 0] = root[:, None] * vh[:rank] / scale.clamp_min(TINY)


class TiedConv2d(GenericConv2d):
    """A map of low rank whose two factors are one, ``V' V`` ("low rank" of Gray et al.).

    They repeat the channels C_out / C_in times before V; here V is summed over the copies, which gives the same.

    Parameters:
        factor: V, (rank, C_out, 1, 1).
    """

    kind = "tied"
    rounds = 0

    def _allocate(self, new: New, rank: int) -> None:
        if self.out_channels % self.in_channels:
            raise ValueError(f"tied needs C_in to divide C_out, not {self.in_channels} -> {self.out_channels} channels")
        self.factor = new(rank, self.out_channels, 1, 1)

    def _pair(self) -> tuple[Tensor, Tensor]:
        return self.factor.unflatten(1, (-1, self.in_channels)).sum(1), self.factor.transpose(0, 1)


class ShuffleConv2d(StructuredConv2d):
    """1x1 in g groups to C_out // 4 channels, channel shuffle, depthwise with the stride, 1x1 in g groups to C_out.

    g is lowered until it divides C_in, C_out and C_out // 4. For 1x1 kernels there is no depthwise convolution, and
    the first one takes the stride. Gray et al. after ShuffleNet (Zhang et al. 2017), here without nonlinearities.

    Parameters:
        down, up: (C_out // 4, C_in / g, 1, 1) and (C_out, C_out // 4 / g, 1, 1).
        depthwise: (C_out // 4, 1, kh, kw), or None for 1x1 kernels.
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

    def _shuffled(self, x: Tensor) -> Tensor:
        """The channels of x, (N, C_out // 4, H, W): the first of every group, the second of every group, ..."""
        return torch.channel_shuffle(x, self.conv_groups) if self.conv_groups > 1 else x

    def _weight(self) -> Tensor:
        down, up = (torch.block_diag(*p[:, :, 0, 0].chunk(self.conv_groups)) for p in (self.down, self.up))
        down = self._shuffled(down[None, :, :, None])[0, :, :, 0]
        if self.depthwise is None:
            return (up @ down)[:, :, None, None]
        return torch.einsum("om,mhw,mc->ochw", up, self.depthwise[:, 0], down)

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.depthwise is None:
            x = self._shuffled(F.conv2d(x, self.down, None, self.stride, padding, groups=self.conv_groups))
        else:
            x = self._shuffled(F.conv2d(x, self.down, groups=self.conv_groups))
            x = F.conv2d(x, self.depthwise, None, self.stride, padding, self.dilation, len(self.depthwise))
        return F.conv2d(x, self.up, self.bias, groups=self.conv_groups)
