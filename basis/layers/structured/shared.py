"""Bases of filters that several layers share: Learning Filter Basis and Deeply Shared Filter Bases.

``substitute`` calls ``together`` with all layers of equal ``key`` and equal size in one model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.filters import FilterBasis, draw_orthonormal, right_singular_vectors
from basis.layers.structured.layer import LARGEST, New, check_saves, number, whole


class _SharedBasis(FilterBasis):
    """Layers of which :meth:`together` makes those of equal :meth:`key`, which hold one ``basis``."""

    shared = ("basis",)

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list:
        """The layers, with one basis; ``ValueError`` also where all together save nothing."""
        layers = [cls.shaped_like(conv, size=size) for conv in convs]
        for layer in layers[1:]:
            layer.basis = layers[0].basis
        stored = layers[0].basis.numel() + sum(layer.stored - layer.basis.numel() for layer in layers)
        who = f"{layers[0].text}, whose basis {len(layers)} layer{'s'[: len(layers) > 1]} would share,"
        check_saves(who, stored, sum(conv.weight.numel() for conv in convs))
        if fitted:
            _fit_shared(layers, [conv.weight.detach() for conv in convs])
            for layer, conv in zip(layers, convs, strict=True):
                if conv.bias is not None:
                    layer._take_bias(conv)
        return layers

    def _fit(self, weight: Tensor) -> None:
        _fit_shared([self], [weight])

    def _fit_rest(self, rows: Tensor) -> None:
        """Fit all but the basis to the rows of the weight, (C_out splits, C_in / splits kh kw) in float64."""
        self.mixing.copy_(_combination(rows, self._filters()).view_as(self.mixing))


@torch.no_grad()
def _fit_shared(layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
    """Fit the basis that the layers hold to the weights of all of them, then the rest of each layer."""
    basis = layers[0].basis
    rows = [weight.double().reshape(-1, basis[0].numel()) for weight in weights]
    basis.copy_(_leading(torch.cat(rows), basis))
    for layer, own in zip(layers, rows, strict=True):
        layer._fit_rest(own)


class LFBConv2d(_SharedBasis):
    """Learning Filter Basis (Li et al., ICCV 2019, arXiv 1908.08932): g groups of p = C_in / g input channels.

    All groups are convolved with one basis of m = round(s p) filters (at least one), then mixed. Layers of equal p and
    kernel share it. The authors' (m, p) for ResNet-56 are (24, 16), (48, 32), (84, 64): sizes 1.5, 1.5 and 84/64.
    Their bias of the basis is left out. Kaiming's normal initialisation, for the basis with gain 1.
    """

    kind = "lfb"
    sizes = "s or s,g: filters in the basis over channels in a group, and groups of input channels (1)"

    @classmethod
    def _numbers(cls, size: str, in_channels: int) -> tuple[int, int]:
        """m and g."""
        s, comma, g = size.partition(",")
        splits = whole(g.strip(), "lfb") if comma else 1
        if in_channels % splits:
            raise ValueError(f"lfb:{size} splits the input into {splits} groups, but it has {in_channels} channels")
        return max(1, round(number(s.strip(), "lfb", most=LARGEST) * (in_channels // splits))), splits

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(p, kernel)."""
        return conv.in_channels // cls._numbers(size, conv.in_channels)[1], conv.kernel_size

    def _build(self, new: New) -> None:
        filters, self.splits = self._numbers(self.size, self.in_channels)
        self._build_filters(new, filters)

    def _draw(self) -> None:
        nn.init.kaiming_normal_(self.basis, nonlinearity="linear")
        nn.init.kaiming_normal_(self.mixing)


class DSFBConv2d(_SharedBasis):
    """Deeply Shared Filter Bases (Kang and Kim, NeurIPS 2021, arXiv 2006.05066), with a normalisation inside.

    Layers of equal C_in, C_out and kernel share s C_out filters (rounded, at least one), and each has u C_out of its
    own; their maps are normalised, then mixed. S8U1 of ResNet-32 is ``dsfb:1/2,1/16``. The authors add 10 times
    :meth:`penalty` to the loss (``Recipe(orthogonality=10)``).

    :attr:`weight` and ``to_conv``, which has a bias, are the layer in evaluation mode; ``fit`` makes the normalisation
    the identity there. ``stored`` is without the numbers of the normalisation, a module of its own.

    Parameters and modules:
        basis: (round(s C_out), C_in, kh, kw), shared.
        unique: (round(u C_out), C_in, kh, kw).
        mixing: (C_out, m, 1, 1).
        norm: ``nn.BatchNorm2d`` of all m maps.
    """

    kind = "dsfb"
    sizes = "s,u: shared filters over C_out, and own filters over C_out"
    shifts = True

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(C_in, C_out, kernel)."""
        return conv.in_channels, conv.out_channels, conv.kernel_size

    def _build(self, new: New) -> None:
        sizes = self.size.split(",")
        if len(sizes) != 2:
            raise ValueError(f"{self.text} has not two numbers, but dsfb takes two, as in dsfb:1/2,1/16")
        ratios = (number(size.strip(), self.kind, most=LARGEST) for size in sizes)
        shared, own = (max(1, round(ratio * self.out_channels)) for ratio in ratios)
        self._build_filters(new, shared, own=own)
        self.norm = nn.BatchNorm2d(shared + own, device=self.basis.device, dtype=self.basis.dtype)

    def _draw(self) -> None:
        draw_orthonormal(self.basis)
        nn.init.kaiming_normal_(self.unique, mode="fan_out")
        nn.init.kaiming_normal_(self.mixing, mode="fan_out")
        self.norm.reset_parameters()

    def _filters(self) -> Tensor:
        return torch.cat([self.basis, self.unique])

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalisation in evaluation mode, (m,) each."""
        norm: Any = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - scale * norm.running_mean

    def _matrix(self) -> Tensor:
        return self.mixing[:, :, 0, 0] * self._scale_and_shift()[0]

    def _maps(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        return self.norm(super()._maps(x, padding))

    def _fit_rest(self, rows: Tensor) -> None:
        """Own filters: the leading right singular vectors of what the shared ones leave."""
        left = rows - _combination(rows, self.basis) @ self.basis.double().flatten(1)
        self.unique.copy_(_leading(left, self.unique))
        self.norm.reset_parameters()
        super()._fit_rest(rows)
        self.mixing.mul_(math.sqrt(1 + self.norm.eps))

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution that the layer is in evaluation mode, with a bias."""
        conv, shift = super().to_conv(), self._scale_and_shift()[1].detach()
        trains = self.norm.bias.requires_grad if self.bias is None else self.bias.requires_grad
        with full_precision(shift), torch.no_grad():
            bias = self.mixing[:, :, 0, 0] @ shift
            conv.bias = nn.Parameter(bias if self.bias is None else bias + self.bias, requires_grad=trains)
        return conv

    def penalty(self) -> Tensor:
        """mean((B B^T - I)^2) of all filters B of the layer, shared and own; a scalar that can be differentiated."""
        rows = self._filters().flatten(1)
        with full_precision(rows):
            return (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()


def _leading(rows: Tensor, filters: Tensor) -> Tensor:
    """The leading right singular vectors of the rows, shaped as ``filters``, whose own stay where there are too few."""
    vectors = right_singular_vectors(rows, len(filters))
    return torch.cat([vectors, filters.double().flatten(1)[len(vectors) :]]).view_as(filters)


def _combination(rows: Tensor, filters: Tensor) -> Tensor:
    """The coefficients that make the rows of the filters, by least squares."""
    basis = filters.double().flatten(1)
    return rows @ basis.mT @ torch.linalg.pinv(basis @ basis.mT, hermitian=True)
