"""Filters that are combinations of fewer ones: basis convolutions as structured layers, shared and fixed bases."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import Fact, full_precision
from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.layers.structured.layer import LARGEST, New, Product, StructuredConv2d, check_saves, number, whole


class BasisLayer:
    """Makes a ``BasisConv2d`` (Alekseev et al. 2024, arXiv 2408.06024) in mode auto, as ``StructuredConv2d`` does."""

    kind = "basis"
    sizes = "K or RATIO: basis channels, or basis channels / C_out"

    @classmethod
    def _options(cls, conv: nn.Conv2d, size: str) -> dict[str, Any]:
        """What the ``BasisConv2d`` is to be made with."""
        if size.isdecimal():
            return {"basis_channels": whole(size, "basis")}
        return {"basis_channels": basis_channels_for(float(number(size, "basis")), conv.out_channels, conv.groups)}

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> None:
        """None: nothing is shared."""

    @classmethod
    def shaped_like(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """A freshly initialised layer of the shape of ``conv``."""
        layer = BasisConv2d.shaped_like(conv, **cls._options(conv, str(size)))
        text = f"{cls.kind}:{size}".removesuffix(":")
        check_saves(text, layer.basis.numel() + layer.coefficients.stored, conv.weight.numel())
        return layer

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list[BasisConv2d]:
        """The layers nearest to the convolutions (``fitted``), or newly drawn ones."""
        layers = [cls.shaped_like(conv, size=size) for conv in convs]
        return [BasisConv2d.from_conv(conv, **cls._options(conv, size)) for conv in convs] if fitted else layers


class LinearConvLayer(BasisLayer):
    """k = C_out / 2 in composed mode, A dense or of low rank (Kahatapitiya and Rodrigo 2021, arXiv 1907.11432).

    Their penalty on correlated filters is ``decorrelation`` of a recipe.
    """

    kind = "linearconv"
    sizes = "the rank of A, or none for a dense A"

    @classmethod
    def _options(cls, conv: nn.Conv2d, size: str) -> dict[str, Any]:
        if conv.out_channels % 2:
            raise ValueError(f"linearconv trains half of the filters, but {conv.out_channels} is an odd number of them")
        form = f"low_rank:{whole(size, 'linearconv')}" if size else "dense"
        return {"basis_channels": conv.out_channels // 2, "mode": "composed", "coefficients": form}


class FilterBasis(StructuredConv2d):
    """The base: a convolution with ``basis``, m filters, then a 1x1 one, ``mixing``: ``W = mixing basis``.

    The input channels may be split into groups of equal width, each convolved with the same filters: ``basis`` is
    (m, C_in / splits, kh, kw), ``mixing`` (C_out, splits m, 1, 1), for the m maps of the first group, then the next.
    Where W takes fewer multiplications than its two parts in training, it is built and convolved with.
    """

    splits = 1
    composed = False

    def _build_filters(self, new: New, filters: int, *, own: int = 0, trained: bool = True) -> None:
        """Allocate, and decide whether W is built; ``own`` are further filters, in ``unique``."""
        shape, maps = (self.in_channels // self.splits, *self.kernel_size), self.splits * (filters + own)
        self.basis = new(filters, *shape).requires_grad_(trained)
        if own:
            self.unique = new(own, *shape)
        self.mixing = new(self.out_channels, maps, 1, 1)
        first, dense = Product(math.prod(shape) * maps, trained=trained), self.products[0].macs
        self.composed = not own and first.macs * (2 + trained) + 3 * self.mixing.numel() >= 3 * dense
        if self.composed:
            self.building = self.mixing.numel() * math.prod(shape)
        else:
            self.products = (first, Product(self.mixing.numel(), reads=maps))

    def _pair(self) -> tuple[Tensor, Tensor]:
        """All m filters, and what mixes their maps, (C_out, splits m)."""
        return self.basis, self.mixing[:, :, 0, 0]

    def _weight(self) -> Tensor:
        filters, matrix = self._pair()
        rows = matrix.reshape(-1, len(filters)) @ filters.flatten(1)
        return rows.view(self.out_channels, *self.filter_shape)

    def _maps(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        filters = self.basis.repeat(self.splits, 1, 1, 1) if self.splits > 1 else self.basis
        return F.conv2d(x, filters, None, self.stride, padding, self.dilation, self.splits)

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.composed:
            return super()._convolve(x, padding)
        return F.conv2d(self._maps(x, padding), self.mixing, self.bias)

    @classmethod
    def _fit_all(cls, layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
        """Fit the basis that the layers hold to the weights of all of them, then the rest of each layer."""
        basis = layers[0].basis
        rows = [weight.double().reshape(-1, basis[0].numel()) for weight in weights]
        basis.copy_(_leading(torch.cat(rows), basis))
        for layer, own in zip(layers, rows, strict=True):
            layer._fit_rest(own)

    def _fit(self, weight: Tensor) -> None:
        self._fit_all([self], [weight])

    def _fit_rest(self, rows: Tensor) -> None:
        """Fit all but the basis to the rows of the weight, (C_out splits, C_in / splits kh kw) in float64."""
        self.mixing.copy_(_combination(rows, self._pair()[0]).view_as(self.mixing))


class FixedBasisConv2d(FilterBasis):
    """Q = round(r C_out) orthonormal filters, never trained, and ``mixing`` (Tayyab and Mahalanobis, arXiv 1906.04509).

    Random filters come from :attr:`seed` and are not stored (the paper stores them); fitted ones, the leading right
    singular vectors of the weight, are (``seed`` -1): ``ValueError`` where this saves nothing.
    """

    kind = "basisconv"
    sizes = "FRACTION: the number of filters is that fraction of C_out"
    unscaled = ("basis",)
    seed = Fact()

    def _build(self, new: New) -> None:
        filters = max(1, round(number(self.size, self.kind) * self.out_channels))
        self._build_filters(new, filters, trained=False)
        self._known["seed"] = np.array(0)

    def _draw(self) -> None:
        if not self.basis.is_meta:
            seed = int(torch.randint(2**31, (), device="cpu"))
            _draw_orthonormal(self.basis, torch.Generator().manual_seed(seed))
            self._known["seed"] = np.array(seed)
        nn.init.kaiming_normal_(self.mixing)

    def bits(self, name: str) -> int:
        """None of filters that come from a seed and are not trained, else 32 for each number."""
        seeded = name == "basis" and self._known["seed"] >= 0 and not self.basis.requires_grad
        return 0 if seeded else super().bits(name)

    def _fit_rest(self, rows: Tensor) -> None:
        check_saves(f"{self.text}, with fitted filters,", self.basis.numel() + self.mixing.numel(), rows.numel())
        super()._fit_rest(rows)
        self._known["seed"] = np.array(-1)


class LFBConv2d(FilterBasis):
    """Learning Filter Basis (Li et al., ICCV 2019, arXiv 1908.08932): g groups of p = C_in / g input channels.

    All groups are convolved with one basis of m = round(s p) filters (at least one), which layers of equal p and kernel
    share. The authors' (m, p) for ResNet-56 are (24, 16), (48, 32), (84, 64). Their bias of the basis is left out.
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
        self._build_filters(new, filters)

    def _draw(self) -> None:
        nn.init.kaiming_normal_(self.basis, nonlinearity="linear")
        nn.init.kaiming_normal_(self.mixing)


class DSFBConv2d(FilterBasis):
    """Deeply Shared Filter Bases (Kang and Kim, NeurIPS 2021, arXiv 2006.05066), with a normalisation inside.

    Layers of equal C_in, C_out and kernel share ``basis``, s C_out filters, and each has ``unique``, u C_out filters;
    ``norm`` normalises their maps, ``mixing`` mixes them. :attr:`weight`, ``to_conv`` (with a bias) and fits are of
    evaluation mode; ``stored`` is without ``norm``. The authors add 10 times :meth:`penalty` to the loss
    (``Recipe(orthogonality=10)``); their S8U1 of ResNet-32 is ``dsfb:1/2,1/16``.
    """

    kind = "dsfb"
    sizes = "s,u: shared filters over C_out, and own filters over C_out"
    shared = ("basis",)
    shifts = True

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """(C_in, C_out, kernel)."""
        return conv.in_channels, conv.out_channels, conv.kernel_size

    def _build(self, new: New) -> None:
        sizes = self.size.split(",")
        if len(sizes) != 2:
            raise ValueError(f"{self.text} has not two numbers, but dsfb takes two, as in dsfb:1/2,1/16")
        ratios = (number(size, self.kind, most=LARGEST) for size in sizes)
        shared, own = (max(1, round(ratio * self.out_channels)) for ratio in ratios)
        self._build_filters(new, shared, own=own)
        self.norm = nn.BatchNorm2d(shared + own, device=self.basis.device, dtype=self.basis.dtype)

    def _draw(self) -> None:
        _draw_orthonormal(self.basis)
        nn.init.kaiming_normal_(self.unique, mode="fan_out")
        nn.init.kaiming_normal_(self.mixing, mode="fan_out")
        self.norm.reset_parameters()

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The normalisation in evaluation mode, (m,) each."""
        norm: Any = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - scale * norm.running_mean

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.basis, self.unique]), self.mixing[:, :, 0, 0] * self._scale_and_shift()[0]

    def _maps(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        filters = torch.cat([self.basis, self.unique])
        return self.norm(F.conv2d(x, filters, None, self.stride, padding, self.dilation))

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
        rows = torch.cat([self.basis, self.unique]).flatten(1)
        with full_precision(rows):
            return (rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()


def _leading(rows: Tensor, filters: Tensor) -> Tensor:
    """The leading right singular vectors of the rows, shaped as ``filters``, whose own stay where there are too few."""
    count = len(filters)  # an SVD would take several times as long
    if len(rows) >= rows.shape[1]:
        vectors = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count].mT
    else:
        left = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(1)[:, :count]
        vectors = torch.linalg.qr(rows.mT @ left).Q.mT
    return torch.cat([vectors, filters.double().flatten(1)[len(vectors) :]]).view_as(filters)


def _combination(rows: Tensor, filters: Tensor) -> Tensor:
    """The coefficients that make the rows of the filters, by least squares."""
    basis = filters.double().flatten(1)
    return rows @ basis.mT @ torch.linalg.pinv(basis @ basis.mT, hermitian=True)


def _draw_orthonormal(filters: Tensor, generator: torch.Generator | None = None) -> None:
    """Random orthonormal rows for filters (m, ...), or columns; the same ones in every dtype and on every device."""
    if filters.is_meta:
        return
    rows, columns = len(filters), filters[0].numel()
    drawn = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, device="cpu", generator=generator)
    q, r = torch.linalg.qr(drawn)
    q = q * r.diagonal().sign()  # uniform over all such matrices
    filters.copy_((q.mT if rows <= columns else q).reshape(filters.shape))


class DCFConv2d(StructuredConv2d):
    """Every kernel is a combination of K fixed Fourier-Bessel functions (Qiu et al., ICML 2018, arXiv 1802.04145).

    ``W[o, c] = sum of coefficients[o, c, k] functions[k]`` is built and convolved with, as in the authors' mode 1:
    ``coefficients`` (C_out, C_in, K, 1), from N(0, 1 / (C_in K)), and ``functions`` (K, kh, kw), of mean energy 1.
    """

    kind = "dcf"
    sizes = "K: the number of functions"
    functions: Tensor

    def _build(self, new: New) -> None:
        count, (height, width) = whole(self.size, self.kind), self.kernel_size
        if height != width or width == 1:
            raise ValueError(f"dcf needs a square kernel larger than 1x1, and this one is {height}x{width}")
        most = len(fourier_bessel(width))
        if count > most:
            raise ValueError(f"{self.text} asks for {count} functions, but a {height}x{width} kernel has {most}")
        self.coefficients = new(self.out_channels, self.in_channels, count, 1)
        self.register_buffer("functions", self.coefficients.new_empty((count, height, width)))
        self.building = self.coefficients.numel() * math.prod(self.kernel_size)

    def _draw(self) -> None:
        functions = torch.from_numpy(fourier_bessel(self.functions.shape[1])[: len(self.functions)])
        self.functions.copy_(functions / functions.square().sum((1, 2)).mean().sqrt())
        nn.init.normal_(self.coefficients, std=1 / math.sqrt(self.coefficients[0].numel()))

    def _weight(self) -> Tensor:
        kernels = self.coefficients[..., 0].flatten(0, 1) @ self.functions.flatten(1)
        return kernels.view(self.out_channels, *self.filter_shape)

    def _fit(self, weight: Tensor) -> None:
        coefficients = weight.double().flatten(2) @ torch.linalg.pinv(self.functions.double().flatten(1))
        self.coefficients.copy_(coefficients[..., None])


@lru_cache
def fourier_bessel(size: int) -> np.ndarray:
    """Fourier-Bessel functions on a grid of ``size`` x ``size`` pixels, lowest frequency first: (n, size, size).

    J_a(z r) with z a zero of J_a, times cos(a t) and sin(a t), normalised on the disc r < 1. As in the code of Qiu et
    al. z is at most pi size / 2 times 1.5 (2 for at most 3 pixels), and combinations of functions before are left out.
    """
    from scipy.special import jn_zeros, jv

    at = (2 * np.arange(size) + 1) / size - 1
    y, x = np.meshgrid(at, at, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    highest = np.pi * size / 2 * (2 if size <= 3 else 1.5)
    zeros = sorted((z, a) for a in range(int(highest)) for z in jn_zeros(a, size + 1) if z <= highest)
    found: list[np.ndarray] = []
    for z, a in zeros:
        radial = jv(a, z * radius) / abs(jv(a + 1, z)) * (radius < 1)
        waves = [np.cos(a * angle), np.sin(a * angle)] if a else [np.full_like(angle, math.sqrt(0.5))]
        for wave in waves:
            more = [*found, math.sqrt(2) * radial * wave]
            if np.linalg.matrix_rank(np.reshape(more, (len(more), -1)), tol=1e-6) == len(more) < size * size:
                found = more
    return np.stack(found)
