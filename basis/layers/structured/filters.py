"""Filters that are combinations of fewer ones: basis convolutions as structured layers, and bases that are not trained.

:class:`BasisLayer` and :class:`LinearConvLayer` make :class:`~basis.layers.conv.BasisConv2d` from a text.
:class:`FilterBasis` is the base of layers that convolve with a few filters and mix their maps by a 1x1
convolution; those that share these filters are in :mod:`basis.layers.structured.shared`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import jn_zeros, jv
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.layers.structured.layer import Product, StructuredConv2d, check_saves, draw_bias, fraction, whole

# -- basis convolutions by text ---------------------------------------------------------------------


class BasisLayer:
    """``basis:1/4`` and ``basis:16``: a :class:`~basis.layers.conv.BasisConv2d` in mode auto, k by ratio or as it is.

    Not a layer itself: it makes them, as the classes of structured layers do.

    Raises:
        ValueError: (all methods but ``key``) for a size or shape that :class:`~basis.layers.conv.BasisConv2d` does
            not take, or a layer that would store as many numbers as the dense weight or more, as at k = C_out.
    """

    kind: ClassVar[str] = "basis"
    sizes: ClassVar[str] = "K or RATIO: basis channels, or basis channels / C_out"
    source: ClassVar[str] = "Alekseev et al. 2024 (arXiv 2408.06024)"

    @classmethod
    def _options(cls, conv: nn.Conv2d, size: str) -> dict[str, Any]:
        """What :class:`~basis.layers.conv.BasisConv2d` is to be made with."""
        if not size:
            raise ValueError(f"the layer is {cls.kind!r}, but {cls.kind} takes a size, {cls.sizes}")
        if size.isdecimal():
            return {"basis_channels": whole(size, f"the size of {cls.kind}")}
        ratio = float(fraction(size, f"the size of {cls.kind}"))
        return {"basis_channels": basis_channels_for(ratio, conv.out_channels, conv.groups)}

    @classmethod
    def shaped_like(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """A freshly initialised layer of the shape of ``conv``, see ``BasisConv2d.shaped_like``."""
        layer = BasisConv2d.shaped_like(conv, **cls._options(conv, str(size)))
        stored = layer.basis.numel() + layer.coefficients.stored
        check_saves(f"{cls.kind}:{size}" if str(size) else cls.kind, stored, conv.weight.numel())
        return layer

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, size: str | float = "") -> BasisConv2d:
        """The layer nearest to ``conv``, see ``BasisConv2d.from_conv``."""
        cls.shaped_like(conv, size=size)
        return BasisConv2d.from_conv(conv, **cls._options(conv, str(size)))

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """None: nothing is shared."""
        return None

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list[BasisConv2d]:
        """The layers of ``convs``: near their weights (``fitted``) or newly drawn."""
        return [cls.from_conv(conv, size=size) if fitted else cls.shaped_like(conv, size=size) for conv in convs]


class LinearConvLayer(BasisLayer):
    """``linearconv`` and ``linearconv:10``: k = C_out / 2 in composed mode; A dense, or low-rank of that rank.

    The layer of LinearConv, drawn as :class:`~basis.layers.conv.BasisConv2d` draws it (theirs: B Xavier-uniform, A
    from U(-0.1, 0.1)). Its penalty on correlated basis filters belongs to training: ``decorrelation`` of a recipe.

    Raises:
        ValueError: also for an odd number of output channels.
    """

    kind = "linearconv"
    sizes = "the rank of A, or none for a dense A"
    source = "Kahatapitiya and Rodrigo, WACV 2021 (arXiv 1907.11432)"

    @classmethod
    def _options(cls, conv: nn.Conv2d, size: str) -> dict[str, Any]:
        if conv.out_channels % 2:
            raise ValueError(f"linearconv trains half of the filters, but {conv.out_channels} is an odd number of them")
        rank = f"low_rank:{whole(size, 'the size of linearconv')}" if size else "dense"
        return {"basis_channels": conv.out_channels // 2, "mode": "composed", "coefficients": rank}


# -- filters and a 1x1 convolution ------------------------------------------------------------------


class FilterBasis(StructuredConv2d):
    """The base: a convolution with m filters, then a 1x1 one, ``W = mixing filters``.

    The input channels may be split into groups of equal width, each of which is convolved with the same
    filters. Where W takes fewer multiplications than its two parts in training, it is built and convolved with.

    Parameters:
        basis: m filters of C_in / splits channels, (m, C_in / splits, kh, kw).
        mixing: (C_out, splits m, 1, 1), for the m maps of the first group, then of the next.
    """

    splits = 1
    basis: nn.Parameter
    mixing: nn.Parameter

    def _allocate(self, filters: int, factory: dict[str, Any], *, trained: bool = True) -> nn.Parameter:
        """That many filters, not yet drawn."""
        shape = (filters, self.in_channels // self.splits, *self.kernel_size)
        return nn.Parameter(torch.empty(shape, **factory), requires_grad=trained)

    def _allocate_mixing(self, filters: int, factory: dict[str, Any]) -> nn.Parameter:
        return nn.Parameter(torch.empty((self.out_channels, self.splits * filters, 1, 1), **factory))

    @property
    def filters(self) -> Tensor:
        """The filters that each group of the input is convolved with, (m, C_in / splits, kh, kw)."""
        return self.basis

    @property
    def matrix(self) -> Tensor:
        """What mixes their maps, (C_out, splits m)."""
        return self.mixing[:, :, 0, 0]

    @property
    def weight(self) -> Tensor:
        """W[o] = sum of mixing[o, j] filters[j], in each group of input channels."""
        filters = self.filters
        with full_precision(filters):
            rows = self.matrix.reshape(-1, len(filters)) @ filters.flatten(1)
        return rows.view(self.out_channels, *self.filter_shape)

    @property
    def _parts_as_products(self) -> tuple[Product, ...]:
        """The convolution and the mixing."""
        filters, maps = self.in_channels * math.prod(self.kernel_size), self.mixing.shape[1]
        first = Product(filters * maps // self.splits, trained=self.basis.requires_grad)
        return (first, Product(self.mixing.numel(), reads=maps))

    @property
    def _composed(self) -> bool:
        """Whether W is built: where a step of training then multiplies less."""
        dense = 3 * self.out_channels * math.prod(self.filter_shape)
        return sum(product.macs * (2 + product.trained) for product in self._parts_as_products) >= dense

    @property
    def products(self) -> tuple[Product, ...]:
        """The convolution and the mixing, or the convolution with W."""
        return super().products if self._composed else self._parts_as_products

    @property
    def building(self) -> int:
        """The products that make W, where it is built."""
        return self.mixing.numel() * math.prod(self.filter_shape) // self.splits if self._composed else 0

    def _apply_to(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        if self._composed:
            return super()._apply_to(x, padding)
        filters = self.filters.repeat(self.splits, 1, 1, 1) if self.splits > 1 else self.filters
        maps = F.conv2d(x, filters, None, self.stride, padding, self.dilation, self.splits)
        return F.conv2d(maps, self.mixing, self.bias)


class FixedBasisConv2d(FilterBasis):
    """Fixed orthogonal filters and a trained 1x1 convolution: Q = round(r C_out) filters, at least one.

    Drawn at random, the filters are made from :attr:`seed` and never trained, so nothing is stored of them;
    ``fit`` makes them the leading right singular vectors of the weight, and they are stored (``bits``).
    The paper counts Q (C_in kh kw + C_out) numbers as stored in either case, and Q C_out as learnable. The batch
    normalisation that it allows after the filters is left out. The mixing is drawn from N(0, 2 / Q).

    Parameters and buffers:
        basis: (Q, C_in, kh, kw), without gradient, of orthonormal rows.
        mixing: w, (C_out, Q, 1, 1).
        seed: what ``basis`` was drawn by; -1 where it was fitted.

    Raises:
        ValueError: also by ``fit``, where fitted filters would cost more than they save.
    """

    kind = "basisconv"
    sizes = "FRACTION: the number of filters is that fraction of C_out"
    source = "Tayyab and Mahalanobis 2019 (arXiv 1906.04509)"
    seed: Tensor

    def _build(self, factory: dict[str, Any]) -> None:
        filters = max(1, round(fraction(self.size, f"the size of {self.kind}") * self.out_channels))
        self.basis = self._allocate(filters, factory, trained=False)
        self.mixing = self._allocate_mixing(filters, factory)
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=factory["device"]))
        self._seeded = True  # the same in Python, so that nobody waits for a GPU

    def reset_parameters(self) -> None:
        """Random orthonormal filters from a new seed (itself drawn by torch's), and the mixing from N(0, 2 / Q)."""
        self._seeded = True
        if not self.basis.is_meta:
            seed = int(torch.randint(2**31, (), device="cpu"))
            draw_orthonormal(self.basis, torch.Generator().manual_seed(seed))
            self.seed.fill_(seed)
        nn.init.kaiming_normal_(self.mixing)
        draw_bias(self)

    @property
    def factors(self) -> list[nn.Parameter]:
        """The mixing."""
        return [self.mixing]

    def bits(self, name: str) -> int:
        """None of filters that come from a seed and are not trained, else 32 for each number."""
        return 0 if name == "basis" and self._seeded and not self.basis.requires_grad else super().bits(name)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """The best approximation of rank Q: its right singular vectors as filters."""
        numbers = self.basis.numel() + self.mixing.numel()
        check_saves(f"{self.text}, with fitted filters,", numbers, weight.numel())
        rows = weight.double().flatten(1)
        filters = right_singular_vectors(rows, len(self.basis))
        self.basis.copy_(filters.view_as(self.basis))
        self.mixing.copy_((rows @ filters.mT).view_as(self.mixing))
        self.seed.fill_(-1)
        self._seeded = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.seed.is_meta:
            self._seeded = bool(self.seed >= 0)


def right_singular_vectors(rows: Tensor, count: int) -> Tensor:
    """The leading ``count`` of them (n, F), or as many as there are; several times as fast as an SVD."""
    if len(rows) >= rows.shape[1]:
        return torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count].mT
    left = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(1)[:, :count]
    return torch.linalg.qr(rows.mT @ left).Q.mT


@torch.no_grad()
def draw_orthonormal(filters: Tensor, generator: torch.Generator | None = None) -> None:
    """Random orthonormal rows for filters (m, ...); where m is above their length, orthonormal columns.

    Drawn on the CPU in float64, so that a generator gives the same in every dtype and on every device.
    """
    if filters.is_meta:
        return
    rows, columns = len(filters), filters[0].numel()
    drawn = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, device="cpu", generator=generator)
    q, r = torch.linalg.qr(drawn)
    q = q * r.diagonal().sign()  # uniform over all such matrices
    filters.copy_((q.mT if rows <= columns else q).reshape(filters.shape))


# -- fixed functions within each kernel -------------------------------------------------------------


class DCFConv2d(StructuredConv2d):
    """Decomposed convolutional filters: every kernel is a combination of K fixed Fourier-Bessel functions.

    W[o, c] = sum of coefficients[o, c, k] functions[k]. W is built and convolved with (the authors' mode 1).
    Measured on a CPU, their mode 0, which convolves every channel with every function and mixes K C_in maps,
    took up to 2.7 times as long, and less (0.6 times) only for K = 3 with 256 channels on images of 8 x 8.

    Parameters and buffers:
        coefficients: (C_out, C_in, K, 1).
        functions: the K functions of lowest frequency on the kernel's grid, of mean energy 1, (K, kh, kw).

    Raises:
        ValueError: for kernels that are 1x1 or not square, and for more functions than the kernel can tell apart,
            which is 8 for 3x3.
    """

    kind = "dcf"
    sizes = "K: the number of functions"
    source = "Qiu et al., ICML 2018 (arXiv 1802.04145)"
    functions: Tensor

    def _build(self, factory: dict[str, Any]) -> None:
        count, (height, width) = whole(self.size, f"the size of {self.kind}"), self.kernel_size
        if height != width:
            raise ValueError(f"{self.kind} needs a square kernel, and this one is {height}x{width}")
        if width == 1:
            raise ValueError(f"{self.kind} needs a kernel larger than 1x1")
        most = len(fourier_bessel(width))
        if count > most:
            raise ValueError(f"{self.text} asks for {count} functions, but a {height}x{width} kernel has {most}")
        # 4-d, so that it has a memory format
        self.coefficients = nn.Parameter(torch.empty((self.out_channels, self.in_channels, count, 1), **factory))
        self.register_buffer("functions", torch.empty((count, height, width), **factory))

    def reset_parameters(self) -> None:
        """The functions, and coefficients from N(0, 1 / (C_in K))."""
        functions = torch.from_numpy(fourier_bessel(self.functions.shape[1])[: len(self.functions)])
        self.functions.copy_(functions / functions.square().sum((1, 2)).mean().sqrt())
        nn.init.normal_(self.coefficients, std=1 / math.sqrt(self.coefficients[0].numel()))
        draw_bias(self)

    @property
    def weight(self) -> Tensor:
        """The combinations."""
        with full_precision(self.coefficients):
            kernels = self.coefficients[..., 0].flatten(0, 1) @ self.functions.flatten(1)
        return kernels.view(self.out_channels, *self.filter_shape)

    @property
    def building(self) -> int:
        """The products that make W."""
        return self.coefficients.numel() * math.prod(self.kernel_size)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """The least-squares projection of each kernel."""
        coefficients = weight.double().flatten(2) @ torch.linalg.pinv(self.functions.double().flatten(1))
        self.coefficients.copy_(coefficients[..., None])


@lru_cache
def fourier_bessel(size: int) -> np.ndarray:
    """Fourier-Bessel functions on a grid of ``size`` x ``size`` pixels, lowest frequency first: (n, size, size).

    They are J_a(z r) / |J_(a+1)(z)| with z a zero of J_a, times sqrt(2) cos(a t) and sqrt(2) sin(a t) where
    a > 0, within the disc r < 1 that touches the edges of the grid. As in the code of Qiu et al. they are in the
    order of z, up to pi size / 2 times 1.5 (2 for at most 3 pixels), and at most size^2 - 1 in number. Those that
    are combinations of the ones before on this grid are left out here.
    """
    at = (2 * np.arange(size) + 1) / size - 1
    y, x = np.meshgrid(at, at, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    highest = np.pi * size / 2 * (2 if size <= 3 else 1.5)
    zeros = sorted((z, a) for a in range(int(highest)) for z in jn_zeros(a, size + 1) if z <= highest)
    found: list[np.ndarray] = []
    orthonormal = np.empty((0, size * size))
    for z, a in zeros:
        radial = jv(a, z * radius) / abs(jv(a + 1, z)) * (radius < 1)
        waves = [np.cos(a * angle), np.sin(a * angle)] if a else [np.full_like(angle, math.sqrt(0.5))]
        for wave in waves:
            function = math.sqrt(2) * radial * wave
            rest = function.ravel() - orthonormal.T @ (orthonormal @ function.ravel())
            length = np.linalg.norm(rest)
            if length > 1e-6 and len(found) < size * size - 1:
                found.append(function)
                orthonormal = np.vstack([orthonormal, rest / length])
    return np.stack(found)
