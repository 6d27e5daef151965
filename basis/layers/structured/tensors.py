"""Depthwise separable layers whose pointwise map is a decomposed tensor (Gray, Crowley and Storkey 2019).

The C_out x C_in numbers of the map, row by row, are the entries of a tensor with three dimensions of about
equal size. It is built from its factors at every step, so parameters are saved, but no multiplications.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import fraction
from basis.layers.structured.separable import Separable


def three_dimensions(n: int) -> tuple[int, int, int]:
    """Sizes near the cube root of ``n`` with that product, as in Gray et al.: 160 x 16 gives (16, 16, 10)."""
    target = round(n ** (1 / 3))
    if target**3 == n:
        return target, target, target
    first = _divisor(n, target)
    second = _divisor(n // first, target)
    return first, second, n // first // second


def _divisor(n: int, least: int) -> int:
    """The smallest divisor of ``n`` that is at least ``least``; ``n`` where none is."""
    return next((d for d in range(least, n) if n % d == 0), n)


def train_of(tensor: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor (a, b, c) as a train of cores (a, first), (first, b, last), (last, c), by singular values (TT-SVD).

    Oseledets 2011, algorithm 1, from the last dimension to the first: only the first core has a scale.
    """
    a, b, c = tensor.shape
    u, s, third = _truncated_svd(tensor.reshape(a * b, c), last)
    u, s, second = _truncated_svd((u * s).reshape(a, b * last), first)
    return u * s, second.view(first, b, last), third


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def tensor_of(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """The tensor (a, b, c) of a train of cores."""
    return (first @ second.flatten(1)).view(len(first), second.shape[1], -1) @ third


def _train_macs(a: int, first: int, b: int, last: int, c: int) -> int:
    return a * first * b * last + a * b * last * c


class _Decomposed(Separable):
    """What both layers have in common: a tensor of :attr:`dimensions`, drawn and then decomposed."""

    rounds = 5

    def _build_map(self, factory: dict[str, Any]) -> None:
        self.dimensions = three_dimensions(self.out_channels * self.in_channels)
        self._build_factors(fraction(self.size, f"the size of {self.kind}"), factory)

    def _build_factors(self, size: Any, factory: dict[str, Any]) -> None:
        """Allocate the factors."""
        raise NotImplementedError

    def _tensor(self) -> Tensor:
        """The tensor that they make."""
        raise NotImplementedError

    @torch.no_grad()
    def _reset_map(self) -> None:
        factor = next(iter(self.factors))
        if not factor.is_meta:
            bound = 1 / math.sqrt(self.in_channels)
            drawn = torch.empty(self.out_channels, self.in_channels, dtype=torch.float64, device=factor.device)
            self._fit_map(drawn.uniform_(-bound, bound), drawn.new_ones(()))

    @property
    def matrix(self) -> Tensor:
        """The tensor with its entries row by row."""
        with full_precision(next(iter(self.factors))):
            return self._tensor().view(self.out_channels, self.in_channels)


class TensorTrainConv2d(_Decomposed):
    """Depthwise convolution and a pointwise map that is a tensor train.

    The ranks are max(1, round(s min(d, d'))) between dimensions of sizes d and d'. Initially the
    best such train near (TT-SVD) a map that is drawn uniformly, as PyTorch does.

    Parameters:
        core1, core2, core3: (d1, R1), (R1, d2, R2) and (R2, d3).
    """

    kind = "tensor_train"
    sizes = "FRACTION: the ranks are that fraction of the dimensions"
    source = "Gray et al. 2019; Oseledets 2011; Garipov et al. 2016"

    def _build_factors(self, size: Any, factory: dict[str, Any]) -> None:
        a, b, c = self.dimensions
        first, last = (max(1, round(size * min(pair))) for pair in ((a, b), (b, c)))
        self.core1 = nn.Parameter(torch.empty((a, first), **factory))
        self.core2 = nn.Parameter(torch.empty((first, b, last), **factory))
        self.core3 = nn.Parameter(torch.empty((last, c), **factory))

    def _tensor(self) -> Tensor:
        return tensor_of(self.core1, self.core2, self.core3)

    @property
    def building(self) -> int:
        """The products of the cores, from the first to the last."""
        a, b, c = self.dimensions
        return _train_macs(a, len(self.core2), b, len(self.core3), c)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        cores = train_of(matrix.reshape(self.dimensions), len(self.core2), len(self.core3))
        for core, value in zip((self.core1, self.core2, self.core3), cores, strict=True):
            core.copy_(value)


class TuckerConv2d(_Decomposed):
    """Depthwise convolution and a pointwise map that is a tensor in Tucker form.

    The ranks are r = max(1, round(s d)). The core (r1, r2, r3) is itself a train, of ranks min(d1, r2 r3)
    and r3, as in Gray et al., which may be more numbers than the core has. Initially the best near
    (HOSVD) a map that is drawn uniformly, as PyTorch does.

    Parameters:
        factor1, factor2, factor3: (r, d) of each dimension.
        core1, core2, core3: (r1, R1), (R1, r2, R2) and (R2, r3).
    """

    kind = "tucker"
    sizes = "FRACTION: the ranks are that fraction of the dimensions"
    source = "Gray et al. 2019; Tucker 1966; De Lathauwer et al. 2000"

    def _build_factors(self, size: Any, factory: dict[str, Any]) -> None:
        ranks = [max(1, round(size * d)) for d in self.dimensions]
        first = min(self.dimensions[0], ranks[1] * ranks[2])
        factors = (nn.Parameter(torch.empty(shape, **factory)) for shape in zip(ranks, self.dimensions, strict=True))
        self.factor1, self.factor2, self.factor3 = factors
        self.core1 = nn.Parameter(torch.empty((ranks[0], first), **factory))
        self.core2 = nn.Parameter(torch.empty((first, ranks[1], ranks[2]), **factory))
        self.core3 = nn.Parameter(torch.empty((ranks[2], ranks[2]), **factory))

    def _tensor(self) -> Tensor:
        tensor = tensor_of(self.core1, self.core2, self.core3)
        for factor in (self.factor1, self.factor2, self.factor3):  # each takes the first mode away and adds a last
            tensor = torch.tensordot(tensor, factor, dims=([0], [0]))
        return tensor

    @property
    def building(self) -> int:
        """The core from its train, then one factor after the other."""
        (r1, r2, r3), (d1, d2, d3) = (len(self.factor1), len(self.factor2), len(self.factor3)), self.dimensions
        core = _train_macs(r1, len(self.core2), r2, r3, r3)
        return core + r1 * r2 * r3 * d1 + r2 * r3 * d1 * d2 + r3 * d1 * d2 * d3

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        tensor = matrix.reshape(self.dimensions)
        bases = []  # (d, r), of each dimension's leading singular vectors
        for i, factor in enumerate((self.factor1, self.factor2, self.factor3)):
            unfolded = tensor.movedim(i, 0).flatten(1)
            bases.append(torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors.flip(1)[:, : len(factor)])
            factor.copy_(bases[i].T)
        smaller = torch.einsum("abc,bi,cj->aij", tensor, bases[1], bases[2])
        first, second, third = train_of(smaller, len(self.core2), len(self.core3))
        for core, value in zip((self.core1, self.core2, self.core3), (bases[0].T @ first, second, third), strict=True):
            core.copy_(value)
