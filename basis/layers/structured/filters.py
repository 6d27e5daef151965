"""Filters that are combinations of fewer ones: basis convolutions as structured layers, fixed bases."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.layers.structured.layer import LARGEST, Kind, New, Product, StructuredConv2d, check_saves, number, whole


class BasisLayer(Kind):
    """Makes a :class:`~basis.layers.conv.BasisConv2d` (Alekseev et al. 2024, arXiv 2408.06024) in mode auto.

    Its methods raise ``ValueError`` for a size or shape that ``BasisConv2d`` does not take, or a layer that would
    store as many numbers as the dense weight or more, as at k = C_out.
    """

    kind = "basis"
    sizes = "K or RATIO: basis channels, or basis channels / C_out"

    @classmethod
    def _options(cls, conv: nn.Conv2d, size: str) -> dict[str, Any]:
        """What the ``BasisConv2d`` is to be made with."""
        if not size:
            raise ValueError(f"the layer is 'basis', but basis takes a size, {cls.sizes}")
        if size.isdecimal():
            return {"basis_channels": whole(size, "basis")}
        ratio = float(number(size, "basis"))
        return {"basis_channels": basis_channels_for(ratio, conv.out_channels, conv.groups)}

    @classmethod
    def shaped_like(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """A freshly initialised layer of the shape of ``conv``."""
        layer = BasisConv2d.shaped_like(conv, **cls._options(conv, str(size)))
        stored = layer.basis.numel() + layer.coefficients.stored
        check_saves(f"{cls.kind}:{size}" if str(size) else cls.kind, stored, conv.weight.numel())
        return layer

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """The layer nearest to ``conv``."""
        cls.shaped_like(conv, size=size)
        return BasisConv2d.from_conv(conv, **cls._options(conv, str(size)))


class LinearConvLayer(BasisLayer):
    """k = C_out / 2 in composed mode, A dense or of low rank: LinearConv (Kahatapitiya and Rodrigo, WACV 2021).

    arXiv 1907.11432. Drawn as ``BasisConv2d`` draws it (theirs: B Xavier-uniform, A from U(-0.1, 0.1)). Their penalty
    on correlated basis filters is ``decorrelation`` of a recipe.
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
    """The base: a convolution with m filters, then a 1x1 one, ``W = mixing filters``.

    The input channels may be split into groups of equal width, each convolved with the same filters. Where W takes
    fewer multiplications than its two parts in training, it is built and convolved with.

    Parameters:
        basis: m filters of C_in / splits channels, (m, C_in / splits, kh, kw).
        mixing: (C_out, splits m, 1, 1), for the m maps of the first group, then of the next.
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
        first = Product(math.prod(shape) * maps, trained=trained)
        parts, dense = (first, Product(self.mixing.numel(), reads=maps)), self.products[0].macs
        self.composed = not own and first.macs * (2 + trained) + 3 * self.mixing.numel() >= 3 * dense
        if self.composed:
            self.building = self.mixing.numel() * math.prod(shape)
        else:
            self.products = parts

    def _filters(self) -> Tensor:
        """All m filters."""
        return self.basis

    def _matrix(self) -> Tensor:
        """What mixes their maps, (C_out, splits m)."""
        return self.mixing[:, :, 0, 0]

    def _weight(self) -> Tensor:
        filters = self._filters()
        rows = self._matrix().reshape(-1, len(filters)) @ filters.flatten(1)
        return rows.view(self.out_channels, *self.filter_shape)

    def _maps(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        filters = self._filters()
        filters = filters.repeat(self.splits, 1, 1, 1) if self.splits > 1 else filters
        return F.conv2d(x, filters, None, self.stride, padding, self.dilation, self.splits)

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self.composed:
            return super()._convolve(x, padding)
        return F.conv2d(self._maps(x, padding), self.mixing, self.bias)


class FixedBasisConv2d(FilterBasis):
    """Fixed orthogonal filters and a trained 1x1 convolution (Tayyab and Mahalanobis 2019, arXiv 1906.04509).

    There are Q = round(r C_out) filters, at least one, never trained. Random ones come from :attr:`seed` and are not
    stored (the paper stores them); ``fit`` makes them the leading right singular vectors of the weight, which are
    stored, and raises ``ValueError`` where they cost more than they save.

    Parameters and buffers:
        basis, mixing: (Q, C_in, kh, kw) of orthonormal rows, without gradient, and (C_out, Q, 1, 1).
        seed: what ``basis`` was drawn by; -1 where it was fitted.
    """

    kind = "basisconv"
    sizes = "FRACTION: the number of filters is that fraction of C_out"
    unscaled = ("basis",)
    seed: Tensor

    def _build(self, new: New) -> None:
        filters = max(1, round(number(self.size, self.kind) * self.out_channels))
        self._build_filters(new, filters, trained=False)
        self.register_buffer("seed", self.basis.new_zeros((), dtype=torch.int64))
        self._seeded = True  # the same in Python, so that nobody waits for a GPU

    def _draw(self) -> None:
        if not self.basis.is_meta:
            seed = int(torch.randint(2**31, (), device="cpu"))
            _draw_orthonormal(self.basis, torch.Generator().manual_seed(seed))
            self.seed.fill_(seed)
        nn.init.kaiming_normal_(self.mixing)

    def _derive(self) -> None:
        self._seeded = self.seed.is_meta or bool(self.seed >= 0)

    def bits(self, name: str) -> int:
        """None of filters that come from a seed and are not trained, else 32 for each number."""
        return 0 if name == "basis" and self._seeded and not self.basis.requires_grad else super().bits(name)

    def _fit(self, weight: Tensor) -> None:
        check_saves(f"{self.text}, with fitted filters,", self.basis.numel() + self.mixing.numel(), weight.numel())
        rows = weight.double().flatten(1)
        filters = _right_singular_vectors(rows, len(self.basis))
        self.basis.copy_(filters.view_as(self.basis))
        self.mixing.copy_((rows @ filters.mT).view_as(self.mixing))
        self.seed.fill_(-1)
        self._derive()


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
        _draw_orthonormal(self.basis)
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
    vectors = _right_singular_vectors(rows, len(filters))
    return torch.cat([vectors, filters.double().flatten(1)[len(vectors) :]]).view_as(filters)


def _combination(rows: Tensor, filters: Tensor) -> Tensor:
    """The coefficients that make the rows of the filters, by least squares."""
    basis = filters.double().flatten(1)
    return rows @ basis.mT @ torch.linalg.pinv(basis @ basis.mT, hermitian=True)


def _right_singular_vectors(rows: Tensor, count: int) -> Tensor:
    """The leading ``count`` of them (n, F), or as many as there are; several times as fast as an SVD."""
    if len(rows) >= rows.shape[1]:
        return torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count].mT
    left = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(1)[:, :count]
    return torch.linalg.qr(rows.mT @ left).Q.mT


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

    ``W[o, c] = sum of coefficients[o, c, k] functions[k]`` is built and convolved with: the authors' mode 1, which is
    nearly always faster than their mode 0. Kernels are square and larger than 1x1.

    Parameters and buffers:
        coefficients: (C_out, C_in, K, 1), so that they have a memory format; drawn from N(0, 1 / (C_in K)).
        functions: the K functions of lowest frequency on the kernel's grid, of mean energy 1, (K, kh, kw).
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

    J_a(z r) / |J_(a+1)(z)| with z a zero of J_a, times sqrt(2) cos(a t) and sqrt(2) sin(a t) where a > 0, within the
    disc r < 1. As in the code of Qiu et al. they are in the order of z, up to pi size / 2 times 1.5 (2 for at most 3
    pixels), and at most size^2 - 1. Combinations of the ones before on this grid are left out.
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
