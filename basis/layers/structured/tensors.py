"""Pointwise maps that are tensors of three dimensions in tensor-train or Tucker form (Gray et al. 2019).

The map is built from its factors at every step, which saves parameters but no multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from basis.layers.structured.layer import New, draw_uniform, number
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


class _Decomposed(Separable):
    """A map with the entries of a tensor (d1, d2, d3); at first the decomposition of one drawn as PyTorch does.

    The tensor, or the core of it, is a train ``core1 core2 core3`` of sizes (a, first), (first, b, last), (last, c).
    """

    sizes = "FRACTION: the ranks are that fraction of the dimensions"
    rounds = 5

    def _build(self, new: New) -> None:
        super()._build(new)
        self.dimensions = three_dimensions(self.out_channels * self.in_channels)

    def _build_train(self, new: New, a: int, first: int, b: int, last: int, c: int) -> None:
        self.core1, self.core2, self.core3 = new(a, first), new(first, b, last), new(last, c)
        self.building = a * first * b * last + a * b * last * c

    def _train(self) -> Tensor:
        """The tensor (a, b, c) of the train."""
        return (self.core1 @ self.core2.flatten(1)).view(len(self.core1), self.core2.shape[1], -1) @ self.core3

    def _fit_train(self, tensor: Tensor, turn: Tensor | None = None) -> None:
        """Fit by TT-SVD (Oseledets 2011, algorithm 1) from the last dimension to the first; ``turn`` the first one."""
        (a, b, c), first, last = tensor.shape, len(self.core2), len(self.core3)
        u, s, third = torch.linalg.svd(tensor.reshape(a * b, c), full_matrices=False)
        u, s, second = torch.linalg.svd((u[:, :last] * s[:last]).reshape(a, b * last), full_matrices=False)
        start = u[:, :first] * s[:first]
        self.core1.copy_(start if turn is None else turn @ start)
        self.core2.copy_(second[:first].view(first, b, last))
        self.core3.copy_(third[:last])

    def _draw_map(self) -> None:
        if not self.core1.is_meta:
            shape = self.out_channels, self.in_channels
            drawn = torch.empty(shape, dtype=torch.float64, device=self.core1.device)
            draw_uniform(drawn, self.in_channels)
            self._fit_map(drawn, drawn.new_ones(()))

    def _matrix(self) -> Tensor:
        return self._tensor().view(self.out_channels, self.in_channels)

    def _tensor(self) -> Tensor:
        return self._train()


class TensorTrainConv2d(_Decomposed):
    """A tensor train of ranks max(1, round(s min(d, d'))) between dimensions d and d' (Garipov et al. 2016)."""

    kind = "tensor_train"

    def _build(self, new: New) -> None:
        super()._build(new)
        size, (a, b, c) = number(self.size, self.kind), self.dimensions
        first, last = (max(1, round(size * min(pair))) for pair in ((a, b), (b, c)))
        self._build_train(new, a, first, b, last, c)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self._fit_train(matrix.reshape(self.dimensions))


class TuckerConv2d(_Decomposed):
    """Depthwise convolution and a tensor in Tucker form of ranks r = max(1, round(s d)), fitted by HOSVD.

    The core (r1, r2, r3) is itself a train, of ranks min(d1, r2 r3) and r3, as in Gray et al., which may be more
    numbers than the core has. De Lathauwer et al. 2000.

    Parameters:
        factor1, factor2, factor3: (r, d) of each dimension.
    """

    kind = "tucker"

    def _build(self, new: New) -> None:
        super()._build(new)
        size, (d1, d2, d3) = number(self.size, self.kind), self.dimensions
        r1, r2, r3 = (max(1, round(size * d)) for d in self.dimensions)
        self.factor1, self.factor2, self.factor3 = new(r1, d1), new(r2, d2), new(r3, d3)
        self._build_train(new, r1, min(d1, r2 * r3), r2, r3, r3)
        self.building += r1 * r2 * r3 * d1 + r2 * r3 * d1 * d2 + r3 * d1 * d2 * d3

    def _tensor(self) -> Tensor:
        tensor = self._train()
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
