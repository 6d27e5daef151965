"""Depthwise separable layers with a structured pointwise map (Gray, Crowley and Storkey 2019, arXiv 1906.00859).

A convolution of a kernel larger than 1x1 becomes a depthwise one, which takes the stride, and a map of the
channels at every pixel, with nothing in between; a 1x1 convolution becomes the map alone. Their
repository (BayesWatch/deficient-efficient) decides what the paper leaves open.

In a weight that is given, each input channel's filter has a scale and sign of its own, which do not matter to
W. :meth:`Separable.fit` starts with filters of norm 1 and of a sum that is not negative.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import Product, StructuredConv2d, draw_bias, fraction

TINY = 1e-30  # below any squared norm that is divided by


class Separable(StructuredConv2d):
    """The base: ``depthwise`` filters and a pointwise map, which subclasses say.

    Parameters:
        depthwise: (C_in, 1, kh, kw), or None for 1x1 kernels.
    """

    depthwise: nn.Parameter | None
    rounds: ClassVar[int] = 0  # of fitting map and filters in turn; 0 where the map has no closed solution

    def _build(self, factory: dict[str, Any]) -> None:
        spatial = self.kernel_size != (1, 1)
        empty = torch.empty((self.in_channels, 1, *self.kernel_size), **factory)
        self.depthwise = nn.Parameter(empty) if spatial else None
        self._build_map(factory)

    def _build_map(self, factory: dict[str, Any]) -> None:
        """Allocate the parameters of the pointwise map."""
        raise NotImplementedError

    def _reset_map(self) -> None:
        """Draw them."""
        raise NotImplementedError

    @property
    def matrix(self) -> Tensor:
        """The pointwise map, (C_out, C_in)."""
        raise NotImplementedError

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        """Bring ``matrix`` near that given in float64, (C_out, C_in); errors of column c count ``scale[c]`` times."""
        raise NotImplementedError

    def _map(self, x: Tensor) -> Tensor:
        """Apply the pointwise map to x, (N, C_in, H, W) or (C_in, H, W), and add the bias."""
        return F.conv2d(x, self.matrix[:, :, None, None], self.bias)

    @property
    def _map_products(self) -> tuple[Product, ...]:
        return (Product(self.in_channels * self.out_channels, reads=self.in_channels),)

    def reset_parameters(self) -> None:
        """Depthwise filters from N(0, 2 / (kh kw C_in)), as Gray et al.; the map as its class says."""
        if self.depthwise is not None:
            nn.init.normal_(self.depthwise, std=math.sqrt(2 / self.depthwise.numel()))
        self._reset_map()
        draw_bias(self)

    @property
    def weight(self) -> Tensor:
        """W[o, c] = P[o, c] D[c]."""
        matrix = self.matrix[:, :, None, None]
        return matrix if self.depthwise is None else matrix * self.depthwise[:, 0]

    @property
    def products(self) -> tuple[Product, ...]:
        """The depthwise filters and the products of the map."""
        if self.depthwise is None:  # the map takes the layer's own input
            first, *others = self._map_products
            return (replace(first, reads=0), *others)
        return (Product(self.depthwise.numel()), *self._map_products)

    @property
    def factors(self) -> list[nn.Parameter]:
        """All parameters but the depthwise filters, as in Gray et al."""
        return [p for name, p in self.parts.items() if name != "depthwise"]

    def fit(self, weight: Tensor) -> None:
        """Begin with the filters of the best separable approximation, then fit map and filters in turn.

        By L-BFGS, together, where the map has no closed solution (``rounds`` is 0).
        """
        slices = weight.detach().double().transpose(0, 1).flatten(2)  # (C_in, C_out, kh kw)
        if self.depthwise is not None:
            filters = torch.linalg.eigh(slices.mT @ slices).eigenvectors[..., -1]  # first right singular vectors
            filters = torch.where(filters.sum(1, keepdim=True) < 0, -filters, filters)
            self.depthwise.copy_(filters.view_as(self.depthwise))
        if not self.rounds:
            super().fit(weight)
        elif self.depthwise is None:
            self._fit_map(slices[:, :, 0].T, slices.new_ones(self.in_channels))
        else:
            for _ in range(self.rounds):
                squares = filters.square().sum(1)
                projected = (slices @ filters[:, :, None])[:, :, 0] / squares.clamp_min(TINY)[:, None]
                self._fit_map(projected.T, squares.sqrt())
                columns = self.matrix.detach().double().T  # (C_in, C_out)
                squares = columns.square().sum(1, keepdim=True)
                fitted = (columns[:, None] @ slices)[:, 0] / squares.clamp_min(TINY)
                filters = torch.where(squares > TINY, fitted, filters)  # where the map is zero, it can still learn
            self.depthwise.copy_(filters.view_as(self.depthwise))

    def _apply_to(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.depthwise is not None:
            x = F.conv2d(x, self.depthwise, None, self.stride, padding, self.dilation, self.in_channels)
        else:
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
            x = x[..., :: self.stride[0], :: self.stride[1]]
        return self._map(x)


class SepConv2d(Separable):
    """Depthwise and full pointwise convolution.

    Parameters:
        pointwise: (C_out, C_in, 1, 1).
    """

    kind = "sep"
    rounds = 1
    source = "Gray et al. 2019; Sifre 2014; Howard et al. 2017 (MobileNets)"

    def _build_map(self, factory: dict[str, Any]) -> None:
        self.pointwise = nn.Parameter(torch.empty((self.out_channels, self.in_channels, 1, 1), **factory))

    def _reset_map(self) -> None:
        nn.init.normal_(self.pointwise, std=math.sqrt(2 / self.out_channels))

    @property
    def matrix(self) -> Tensor:
        """The pointwise filters."""
        return self.pointwise[:, :, 0, 0]

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self.pointwise.copy_(matrix.view_as(self.pointwise))

    def _map(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.pointwise, self.bias)


class GenericConv2d(Separable):
    """Depthwise convolution, then 1x1 ones of C_in -> rank -> C_out with rank = int(s max(C_in, C_out)).

    "Generic" low rank in Gray et al., "RF" in their figures.

    Parameters:
        down: (rank, C_in, 1, 1).
        up: (C_out, rank, 1, 1).
    """

    kind = "generic"
    rounds = 5
    sizes = "FRACTION: the rank is that fraction of the larger number of channels"
    source = "Gray et al. 2019, generic low rank"

    def _build_map(self, factory: dict[str, Any]) -> None:
        rank = int(fraction(self.size, f"the size of {self.kind}") * max(self.in_channels, self.out_channels))
        if not rank:
            raise ValueError(f"{self.text} gives rank 0 with {self.in_channels} -> {self.out_channels} channels")
        self.down = nn.Parameter(torch.empty((rank, self.in_channels, 1, 1), **factory))
        self.up = nn.Parameter(torch.empty((self.out_channels, rank, 1, 1), **factory))

    def _reset_map(self) -> None:
        for factor in (self.down, self.up):
            nn.init.normal_(factor, std=math.sqrt(2 / len(factor)))

    @property
    def matrix(self) -> Tensor:
        """``up down``."""
        with full_precision(self.up):
            return self.up[:, :, 0, 0] @ self.down[:, :, 0, 0]

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        u, s, vh = torch.linalg.svd(matrix * scale, full_matrices=False)
        rank = min(len(self.down), len(s))
        root = s[:rank].sqrt()
        for factor in (self.up, self.down):
            factor.zero_()
        self.up[:, :rank, 0, 0].copy_(u[:, :rank] * root)
        root = torch.where(root > TINY, root, 1)  # a zero map can still learn
        self.down[:rank, :, 0, 0].copy_(root[:, None] * vh[:rank] / scale.clamp_min(TINY))

    def _map(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.down), self.up, self.bias)

    @property
    def _map_products(self) -> tuple[Product, ...]:
        return (Product(self.down.numel(), self.in_channels), Product(self.up.numel(), len(self.down)))


class TiedConv2d(Separable):
    """Depthwise convolution, then a map of rank int(s max(C_in, C_out)) whose two factors are one: V' V.

    "Low rank" (LR) in Gray et al. Channels are repeated C_out / C_in times before V. Repeating is left
    out here: V is summed over the copies instead, which gives the same with fewer multiplications.

    Parameters:
        factor: V, (rank, C_out, 1, 1).
    """

    kind = "tied"
    sizes = "FRACTION: the rank is that fraction of the larger number of channels"
    source = "Gray et al. 2019, low rank"

    def _build_map(self, factory: dict[str, Any]) -> None:
        if self.out_channels % self.in_channels:
            raise ValueError(
                f"{self.kind} repeats input channels, so their number must divide that of the output channels, "
                f"but there are {self.in_channels} -> {self.out_channels}"
            )
        rank = int(fraction(self.size, f"the size of {self.kind}") * self.out_channels)
        if not rank:
            raise ValueError(f"{self.text} gives rank 0 with {self.in_channels} -> {self.out_channels} channels")
        self.factor = nn.Parameter(torch.empty((rank, self.out_channels, 1, 1), **factory))

    def _reset_map(self) -> None:
        nn.init.normal_(self.factor, std=math.sqrt(2 / len(self.factor)))

    @property
    def _down(self) -> Tensor:
        """V applied to repeated channels, (rank, C_in, 1, 1)."""
        return self.factor.unflatten(1, (-1, self.in_channels)).sum(1)

    @property
    def matrix(self) -> Tensor:
        """``V' V``, summed over the copies of each input channel."""
        with full_precision(self.factor):
            return self.factor[:, :, 0, 0].T @ self._down[:, :, 0, 0]

    def _map(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self._down), self.factor.transpose(0, 1), self.bias)

    @property
    def _map_products(self) -> tuple[Product, ...]:
        rank = len(self.factor)
        return (Product(rank * self.in_channels, self.in_channels), Product(self.factor.numel(), rank))
