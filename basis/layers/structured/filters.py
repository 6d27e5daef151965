"""Filters that are combinations of fewer ones: basis convolutions, and a basis that layers share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.layers.structured.layer import LARGEST, New, Product, StructuredConv2d, check_saves, number, whole


class BasisLayer:
    """Makes a ``BasisConv2d`` (Alekseev et al. 2024, arXiv 2408.06024) in mode auto, as ``StructuredConv2d`` does."""

    kind = "basis"
    sizes = "K or RATIO: basis channels, or basis channels / C_out"

    @classmethod
    def _channels(cls, conv: nn.Conv2d, size: str) -> int:
        if size.isdecimal():
            return whole(size, "basis")
        return basis_channels_for(float(number(size, "basis")), conv.out_channels, conv.groups)

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> None:
        """None: nothing is shared."""

    @classmethod
    def shaped_like(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """A freshly initialised layer of the shape of ``conv``."""
        layer = BasisConv2d.shaped_like(conv, basis_channels=cls._channels(conv, str(size)))
        text = f"{cls.kind}:{size}".removesuffix(":")
        check_saves(text, layer.basis.numel() + layer.coefficients.stored, conv.weight.numel())
        return layer

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list[BasisConv2d]:
        """The layers nearest to the convolutions (``fitted``), or newly drawn ones."""
        layers = [cls.shaped_like(conv, size=size) for conv in convs]
        return [BasisConv2d.from_conv(c, basis_channels=cls._channels(c, size)) for c in convs] if fitted else layers


class LFBConv2d(StructuredConv2d):
    """Learning Filter Basis (Li et al., ICCV 2019, arXiv 1908.08932): g groups of p = C_in / g input channels.

    All groups are convolved with ``basis``, m = round(s p) filters (at least one) of (p, kh, kw), which layers of equal
    p and kernel share; ``mixing``, (C_out, g m, 1, 1), mixes the m maps of the first group, then of the next. The
    authors' (m, p) for ResNet-56 are (24, 16), (48, 32), (84, 64). Their bias of the basis is left out. Where the
    weight takes fewer multiplications than its two parts, it is built and convolved with.
    """

    kind = "lfb"
    sizes = "s or s,g: filters in the basis over channels in a group, and groups of input channels (1)"
    shared = ("basis",)

    @classmethod
    def _numbers(cls, size: str, in_channels: int) -> tuple[int, int]:
        """m and g."""
        s, comma, g = size.partition(",")
        splits = whole(g, "lfb") if comma else 1
        if in_channels % splits:
            raise ValueError(f"lfb:{size} splits the input into {splits} groups, but it has {in_channels} channels")
        return max(1, round(number(s, "lfb", most=LARGEST) * (in_channels // splits))), splits

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(p, kernel)."""
        return conv.in_channels // cls._numbers(size, conv.in_channels)[1], conv.kernel_size

    def _build(self, new: New) -> None:
        filters, self.splits = self._numbers(self.size, self.in_channels)
        maps = self.splits * filters
        self.basis = new(filters, self.in_channels // self.splits, *self.kernel_size)
        self.mixing = new(self.out_channels, maps, 1, 1)
        first, last = Product(maps * self.basis[0].numel()), Product(self.mixing.numel(), reads=maps)
        self.composed = first.macs + last.macs >= self.products[0].macs
        if self.composed:
            self.building = self.mixing.numel() * self.basis[0].numel()
        else:
            self.products = (first, last)

    def _draw(self) -> None:
        nn.init.kaiming_normal_(self.basis, nonlinearity="linear")
        nn.init.kaiming_normal_(self.mixing)

    def _weight(self) -> Tensor:
        rows = self.mixing.reshape(-1, len(self.basis)) @ self.basis.flatten(1)
        return rows.view(self.out_channels, *self.filter_shape)

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.composed:
            return super()._convolve(x, padding)
        filters = self.basis.repeat(self.splits, 1, 1, 1) if self.splits > 1 else self.basis
        maps = F.conv2d(x, filters, None, self.stride, padding, self.dilation, self.splits)
        return F.conv2d(maps, self.mixing, self.bias)

    @classmethod
    def _fit_all(cls, layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
        """Fit the basis that the layers hold to the weights of all of them, then each layer's mixing."""
        basis = layers[0].basis
        rows = [weight.double().reshape(-1, basis[0].numel()) for weight in weights]
        basis.copy_(_leading(torch.cat(rows), basis))
        for layer, own in zip(layers, rows, strict=True):
            layer._fit_mixing(own)

    def _fit(self, weight: Tensor) -> None:
        self._fit_all([self], [weight])

    def _fit_mixing(self, rows: Tensor) -> None:
        """Fit by least squares to the rows of the weight, (C_out g, p kh kw) in float64."""
        basis = self.basis.double().flatten(1)
        self.mixing.copy_((rows @ basis.mT @ torch.linalg.pinv(basis @ basis.mT, hermitian=True)).view_as(self.mixing))


def _leading(rows: Tensor, filters: Tensor) -> Tensor:
    """The leading right singular vectors of the rows, shaped as ``filters``, whose own stay where there are too few."""
    count = len(filters)  # an SVD would take several times as long
    if len(rows) >= rows.shape[1]:
        vectors = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count].mT
    else:
        left = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(1)[:, :count]
        vectors = torch.linalg.qr(rows.mT @ left).Q.mT
    return torch.cat([vectors, filters.double().flatten(1)[len(vectors) :]]).view_as(filters)
