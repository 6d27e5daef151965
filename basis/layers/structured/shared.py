"""Bases of filters that several layers share: Learning Filter Basis and Deeply Shared Filter Bases.

:meth:`SharedBasis.together` makes the layers that hold one basis, the very same parameter; ``substitute``
calls it with all layers of equal ``key`` and equal size in one model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.filters import FilterBasis, draw_orthonormal, right_singular_vectors
from basis.layers.structured.layer import check_saves, draw_bias, number, whole

if TYPE_CHECKING:
    from typing_extensions import Self


class SharedBasis(FilterBasis):
    """The base: layers of equal :meth:`key` hold one ``basis``.

    A single layer may store more than its dense weight, where only sharing makes it worth while.
    """

    shared = ("basis",)

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list[Self]:
        """The layers of convolutions with equal :meth:`key`, with one basis.

        Raises:
            ValueError: as the class, and where they would store as many numbers together as their dense
                weights or more.
        """
        layers = [cls.shaped_like(conv, size=size) for conv in convs]
        for layer in layers[1:]:
            layer.basis = layers[0].basis
        stored = layers[0].basis.numel() + sum(layer.stored - layer.basis.numel() for layer in layers)
        who = f"{layers[0].text}, whose basis {len(layers)} layer{'s'[: len(layers) > 1]} would share,"
        check_saves(who, stored, sum(conv.weight.numel() for conv in convs))
        if fitted:
            cls._fit_all(layers, [conv.weight.detach() for conv in convs])
            with torch.no_grad():
                for layer, conv in zip(layers, convs, strict=True):
                    if layer.bias is not None and conv.bias is not None:
                        layer.bias.copy_(conv.bias)
        return layers

    def fit(self, weight: Tensor) -> None:
        """By the leading right singular vectors; ``together`` fits the basis to all layers at once."""
        self._fit_all([self], [weight])

    @classmethod
    @torch.no_grad()
    def _fit_all(cls, layers: Sequence[Self], weights: Sequence[Tensor]) -> None:
        """Fit layers that hold one basis, which is fitted to the weights of all of them."""
        first = layers[0]
        rows = [weight.double().reshape(-1, first.basis[0].numel()) for weight in weights]
        first.basis.copy_(_leading(torch.cat(rows), first.basis))
        for layer, own in zip(layers, rows, strict=True):
            layer._fit_rest(own)

    def _fit_rest(self, rows: Tensor) -> None:
        """Fit all but the basis to the rows of the weight, (C_out splits, C_in / splits kh kw) in float64."""
        self.mixing.copy_(_combination(rows, self.filters).view_as(self.mixing))


def _leading(rows: Tensor, filters: Tensor) -> Tensor:
    """The leading right singular vectors of the rows, shaped as ``filters``, whose own stay where there are too few."""
    vectors = right_singular_vectors(rows, len(filters))
    return torch.cat([vectors, filters.double().flatten(1)[len(vectors) :]]).view_as(filters)


def _combination(rows: Tensor, filters: Tensor) -> Tensor:
    """The coefficients that make the rows of the filters, by least squares."""
    basis = filters.double().flatten(1)
    return rows @ basis.mT @ torch.linalg.pinv(basis @ basis.mT, hermitian=True)


class LFBConv2d(SharedBasis):
    """Learning Filter Basis: g groups of p = C_in / g input channels, all convolved with one basis, then mixed.

    The basis has m = round(s p) filters (at least one) of p channels. All layers of equal p and kernel share it
    in one call of ``substitute``. For ResNet-56 the authors take (m, p) = (24, 16), (48, 32) and (84, 64) in the
    three stages, where the first convolution of a stage has the basis of the stage before: sizes 1.5, 1.5 and
    84/64 with g = 1. They give the basis and the 1x1 convolution a bias each, of which here the second is left,
    and always convolve twice; here W is built where that is cheaper, as in that ResNet-56.

    Drawn by Kaiming's normal initialisation, for the basis with gain 1, since no ReLU follows it.

    Parameters:
        basis: (m, p, kh, kw), shared.
        mixing: (C_out, g m, 1, 1).
    """

    kind = "lfb"
    sizes = "s or s,g: filters in the basis over channels in a group, and groups of input channels (1)"
    source = "Li, Gu, Van Gool and Timofte, ICCV 2019 (arXiv 1908.08932)"

    @classmethod
    def _numbers(cls, size: str, in_channels: int) -> tuple[int, int]:
        """m and g."""
        s, comma, g = size.partition(",")
        splits = whole(g.strip(), f"the number of groups in {cls.kind}:{size}") if comma else 1
        if in_channels % splits:
            raise ValueError(
                f"{cls.kind}:{size} splits the input into {splits} groups, but it has {in_channels} channels"
            )
        return max(1, round(number(s.strip(), f"s in {cls.kind}:{size}") * (in_channels // splits))), splits

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(p, kernel)."""
        return conv.in_channels // cls._numbers(size, conv.in_channels)[1], conv.kernel_size

    def _build(self, factory: dict[str, Any]) -> None:
        filters, self.splits = self._numbers(self.size, self.in_channels)
        self.basis = self._allocate(filters, factory)
        self.mixing = self._allocate_mixing(filters, factory)

    def reset_parameters(self) -> None:
        """Kaiming's normal initialisation."""
        nn.init.kaiming_normal_(self.basis, nonlinearity="linear")
        nn.init.kaiming_normal_(self.mixing)
        draw_bias(self)


class DSFBConv2d(SharedBasis):
    """Deeply Shared Filter Bases: shared and own filters, batch normalisation of their maps, then a 1x1 convolution.

    s C_out filters (rounded, at least one) are shared by the layers of equal C_in, C_out and kernel in one call of
    ``substitute``, and u C_out are the layer's own. In the authors' names S8U1 of ResNet-32 and -56 is
    ``dsfb:1/2,1/16`` and S16U1 is ``dsfb:1,1/16``; the first block of every stage stays dense there. They add
    10 times :meth:`penalty` to the loss (``Recipe(orthogonality=10)``).

    In training mode the batch normalisation takes the statistics of the batch, and the layer is no convolution:
    :attr:`weight` and ``to_conv`` are the layer in evaluation mode, with the running statistics. ``to_conv`` has
    a bias, whether the layer has one or not. ``fit`` makes the normalisation the identity in evaluation mode; the
    first step in training mode rescales the maps all the same.

    Drawn as the authors do: shared filters orthonormal, the others by Kaiming's normal initialisation, fan-out.
    ``stored`` is without the 2 m numbers of the normalisation, which is a module of its own where models are counted.

    Parameters and modules:
        basis: (round(s C_out), C_in, kh, kw), shared.
        unique: (round(u C_out), C_in, kh, kw).
        mixing: (C_out, m, 1, 1).
        norm: ``nn.BatchNorm2d`` of all m maps.
    """

    kind = "dsfb"
    sizes = "s,u: shared filters over C_out, and own filters over C_out"
    shifts = True
    source = "Kang and Kim, NeurIPS 2021 (arXiv 2006.05066)"

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(C_in, C_out, kernel)."""
        return conv.in_channels, conv.out_channels, conv.kernel_size

    def _build(self, factory: dict[str, Any]) -> None:
        sizes = self.size.split(",")
        if len(sizes) != 2:
            raise ValueError(f"{self.text} has not two numbers, but {self.kind} takes two, as in dsfb:1/2,1/16")
        shared, own = (
            max(1, round(number(size.strip(), f"{name} in {self.text}") * self.out_channels))
            for name, size in zip("su", sizes, strict=True)
        )
        self.basis = self._allocate(shared, factory)
        self.unique = self._allocate(own, factory)
        self.mixing = self._allocate_mixing(shared + own, factory)
        self.norm = nn.BatchNorm2d(shared + own, **factory)

    def reset_parameters(self) -> None:
        """As the class says; the normalisation forgets its statistics."""
        draw_orthonormal(self.basis)
        nn.init.kaiming_normal_(self.unique, mode="fan_out")
        nn.init.kaiming_normal_(self.mixing, mode="fan_out")
        self.norm.reset_parameters()
        draw_bias(self)

    @property
    def _composed(self) -> bool:
        return False  # the normalisation stands between

    @property
    def filters(self) -> Tensor:
        """Shared and own filters, (m, C_in, kh, kw)."""
        return torch.cat([self.basis, self.unique])

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalisation in evaluation mode, (m,) each."""
        norm: Any = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - scale * norm.running_mean

    @property
    def matrix(self) -> Tensor:
        """The mixing with the running statistics, (C_out, m)."""
        return self.mixing[:, :, 0, 0] * self._scale_and_shift()[0]

    def _apply_to(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        maps = F.conv2d(x, self.filters, None, self.stride, padding, self.dilation)
        maps = self.norm(maps) if maps.dim() == 4 else self.norm(maps[None])[0]
        return F.conv2d(maps, self.mixing, self.bias)

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
        rows = self.filters.flatten(1)
        with full_precision(rows):
            return (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()
