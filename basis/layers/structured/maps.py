"""Pointwise maps of separable layers, built at every step, which saves numbers but no MACs; and hashed weights."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import New, StructuredConv2d, draw_uniform, number, whole
from basis.layers.structured.separable import Separable

SEED = 0x5EED  # of the hash function


def three_dimensions(n: int) -> tuple[int, int, int]:
    """Sizes near the cube root of ``n`` with that product, as in Gray et al.: 160 x 16 gives (16, 16, 10)."""
    target = round(n ** (1 / 3))
    first = next((d for d in range(target, n) if n % d == 0), n)
    rest = n // first
    second = next((d for d in range(target, rest) if rest % d == 0), rest)
    return first, second, rest // second


class TensorTrainConv2d(Separable):
    """A tensor train of ranks max(1, round(s min(d, d'))) between dimensions d and d' (Garipov et al. 2016).

    ``core1`` (d1, R1), ``core2`` (R1, d2, R2) and ``core3`` (R2, d3), at first of a map drawn as PyTorch does.
    """

    kind = "tensor_train"
    sizes = "FRACTION: the ranks are that fraction of the dimensions"
    rounds = 5

    def _build_map(self, new: New) -> None:
        self.dimensions = three_dimensions(self.out_channels * self.in_channels)
        self._allocate(new, number(self.size, self.kind), *self.dimensions)

    def _allocate(self, new: New, size: Fraction, a: int, b: int, c: int) -> None:
        self._allocate_train(new, a, max(1, round(size * min(a, b))), b, max(1, round(size * min(b, c))), c)

    def _allocate_train(self, new: New, a: int, first: int, b: int, last: int, c: int) -> None:
        self.core1, self.core2, self.core3 = new(a, first), new(first, b, last), new(last, c)
        self.building = a * first * b * last + a * b * last * c

    def _tensor(self) -> Tensor:
        """The tensor (a, b, c) of the train."""
        return (self.core1 @ self.core2.flatten(1)).view(len(self.core1), self.core2.shape[1], -1) @ self.core3

    def _map(self) -> Tensor:
        return self._tensor().view(self.out_channels, self.in_channels)

    def _draw(self) -> None:
        super()._draw()
        if not self.core1.is_meta:
            shape, device = (self.out_channels, self.in_channels), self.core1.device
            drawn = torch.empty(shape, dtype=torch.float64, device=device)
            draw_uniform(drawn, self.in_channels)
            self._fit_map(drawn, drawn.new_ones(()))

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self._fit_train(matrix.reshape(self.dimensions))

    def _fit_train(self, tensor: Tensor, turn: Tensor | None = None) -> None:
        """Fit by TT-SVD (Oseledets 2011, algorithm 1) from the last dimension to the first; ``turn`` the first one."""
        (a, b, c), first, last = tensor.shape, len(self.core2), len(self.core3)
        u, s, third = torch.linalg.svd(tensor.reshape(a * b, c), full_matrices=False)
        u, s, second = torch.linalg.svd((u[:, :last] * s[:last]).reshape(a, b * last), full_matrices=False)
        start = u[:, :first] * s[:first]
        self.core1.copy_(start if turn is None else turn @ start)
        self.core2.copy_(second[:first].view(first, b, last))
        self.core3.copy_(third[:last])


class TuckerConv2d(TensorTrainConv2d):
    """A tensor in Tucker form of ranks r = max(1, round(s d)), fitted by HOSVD (De Lathauwer et al. 2000).

    The core (r1, r2, r3) is itself a train, of ranks min(d1, r2 r3) and r3, as in Gray et al., which may be more
    numbers than the core has; ``factor1``, ``factor2`` and ``factor3`` are (r, d) of each dimension.
    """

    kind = "tucker"

    def _allocate(self, new: New, size: Fraction, a: int, b: int, c: int) -> None:
        r1, r2, r3 = (max(1, round(size * d)) for d in (a, b, c))
        self.factor1, self.factor2, self.factor3 = new(r1, a), new(r2, b), new(r3, c)
        self._allocate_train(new, r1, min(a, r2 * r3), r2, r3, r3)
        self.building += r1 * r2 * r3 * a + r2 * r3 * a * b + r3 * a * b * c

    def _tensor(self) -> Tensor:
        tensor = super()._tensor()
        for factor in (self.factor1, self.factor2, self.factor3):  # each takes the first mode away and adds a last
            tensor = torch.tensordot(tensor, factor, dims=([0], [0]))
        return tensor

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        tensor = matrix.reshape(self.dimensions)
        bases = []  # (d, r), of each dimension's leading singular vectors
        for i, factor in enumerate((self.factor1, self.factor2, self.factor3)):
            unfolded = tensor.movedim(i, 0).flatten(1)
            bases.append(torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(1)[:, : len(factor)])
            factor.copy_(bases[i].T)
        self._fit_train(torch.einsum("abc,bi,cj->aij", tensor, bases[1], bases[2]), bases[0].T)


def riffle(n: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) the even numbers below ``n``, then the odd ones."""
    order = torch.arange(n, device=device)
    return torch.cat([order[::2], order[1::2]])


class ACDCConv2d(Separable):
    """Depthwise convolution and a map of n - 1 factors A C P D C^-1 P, each of size N = max(C_in, C_out).

    C is the cosine transform (DCT-II), P a riffle of its columns, A and D are diagonal: ``a`` and ``d``, (n - 1, N),
    drawn from N(1, 0.01^2). The name says n, as in Gray et al., whose code drops the last factor. Input channels are
    repeated up to N, adjacent output channels are summed.
    """

    kind = "acdc"
    sizes = "N: one more than the number of factors"

    def _build_map(self, new: New) -> None:
        factors, n = whole(self.size, self.kind) - 1, max(self.in_channels, self.out_channels)
        if not factors:
            raise ValueError(f"{self.text} has no factors: its size is one more than their number, so at least 2")
        if n % 2 or n % self.out_channels:
            shape = f"{self.in_channels} -> {self.out_channels}"
            raise ValueError(f"acdc needs an even number of channels, and C_out to divide C_in if smaller, not {shape}")
        self.a, self.d = new(factors, n), new(factors, n)
        self.building = factors * 2 * n * n * self.in_channels

    def _draw(self) -> None:
        super()._draw()
        nn.init.normal_(self.a, 1, 0.01)
        nn.init.normal_(self.d, 1, 0.01)

    def _map(self) -> Tensor:
        n, c = self.a.shape[1], self.in_channels
        i = torch.arange(n, dtype=torch.float64, device=self.a.device)
        cosines = ((2 * i[:, None] + 1) * i * (math.pi / (2 * n))).cos()
        order = riffle(n, self.a.device)
        forward = 2 * cosines[:, order].to(self.a)
        inverse = (cosines / torch.where(i > 0, n, 2 * n)).T[:, order].to(self.a)
        # The first channels again until their number divides N, and all of them again until there are N.
        padded = next(k for k in range(min(c, n), n + 1) if n % k == 0)
        repeated = torch.arange(n, device=self.a.device) % padded % c
        matrix = torch.eye(c, dtype=self.a.dtype, device=self.a.device)[repeated]
        for a, d in zip(self.a.flip(0)[:, :, None], self.d.flip(0)[:, :, None], strict=True):
            matrix = a * (forward @ (d * (inverse @ matrix)))
        return matrix.view(self.out_channels, -1, c).sum(1)


def hashes(n: int, device: torch.device | str | None) -> Tensor:
    """(n,) pseudo-random integers in [0, 2^32): those of 0 ... n - 1 by a hash function, on any machine."""
    x = torch.arange(SEED, SEED + n, device=device) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # "lowbias32" of Wellons' hash-prospector
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


class HashedConv2d(StructuredConv2d):
    """A ``table`` of numbers, each used at many places, without signs (Chen et al. 2015, arXiv 1504.04788).

    int(s C_out C_in kh kw) numbers and as many MACs as a dense layer; ``indices`` are the table's entries at each
    place. Always has a bias, as in Gray et al., whose last number is never used; here all are.
    """

    kind = "hashed"
    sizes = "FRACTION: that fraction of the dense numbers is stored"
    _needed = ("indices",)

    def _build(self, new: New) -> None:
        places = self.out_channels * math.prod(self.filter_shape)
        budget = int(number(self.size, self.kind) * places)
        if not budget:
            raise ValueError(f"{self.text} stores none of {places} numbers, but it must store at least 1")
        self.table = new(budget)
        self.bias = new(self.out_channels) if self.bias is None else self.bias

    def _made(self, name: str, like: Tensor) -> Tensor:
        return hashes(self.out_channels * math.prod(self.filter_shape), like.device) % len(self.table)

    def _draw(self) -> None:
        draw_uniform(self.table, math.prod(self.filter_shape))

    def _weight(self) -> Tensor:
        entries = self.table.index_select(0, self.constant("indices", self.table))
        return entries.view(self.out_channels, *self.filter_shape)

    def _fit(self, weight: Tensor) -> None:
        """The mean of the weights at each number's places."""
        indices, sums = self.constant("indices", self.table), self.table.new_zeros(len(self.table), dtype=torch.float64)
        sums.index_add_(0, indices, weight.double().flatten())
        self.table.copy_(sums / indices.bincount(minlength=len(sums)).clamp_min(1))
