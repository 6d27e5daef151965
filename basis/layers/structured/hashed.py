"""Few numbers at places that a hash function chooses: hashed weights, and maps of three diagonals and more entries.

Where Gray, Crowley and Storkey 2019 store random integers, places come from a hash function with a fixed seed here:
nothing but the numbers is stored, and layers of equal shape have equal places.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from basis.layers.structured.acdc import riffle
from basis.layers.structured.layer import New, StructuredConv2d, draw_uniform, number
from basis.layers.structured.separable import Separable

SEED = 0x5EED


def hashes(n: int, device: torch.device | str | None) -> Tensor:
    """(n,) pseudo-random integers in [0, 2^32): those of 0 ... n - 1 by a hash function, on any machine."""
    x = torch.arange(SEED, SEED + n, device=device) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # "lowbias32" of Wellons' hash-prospector
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


class HashedConv2d(StructuredConv2d):
    """A ``table`` of numbers, each used at many places, without signs (Chen et al. 2015, arXiv 1504.04788).

    int(s C_out C_in kh kw) numbers and as many MACs as a dense layer. Always has a bias, as in Gray et al., even with
    ``bias=False``. Their last number is never used; here all are. ``indices`` are the table's entries at each place.
    """

    kind = "hashed"
    sizes = "FRACTION: that fraction of the dense numbers is stored"
    indices: Tensor

    def _build(self, new: New) -> None:
        self._build_table(new, self.out_channels * math.prod(self.filter_shape))

    def _build_table(self, new: New, places: int) -> None:
        budget = int(number(self.size, self.kind) * places)
        if not budget:
            raise ValueError(f"{self.text} stores none of {places} numbers, but it must store at least 1")
        self.table = new(budget)
        self.register_buffer("indices", self.table.new_empty(places, dtype=torch.int64), persistent=False)
        self.bias = new(self.out_channels) if self.bias is None else self.bias

    def _derive(self) -> None:
        self._refill("indices", hashes(len(self.indices), self.table.device) % len(self.table))

    def _draw(self) -> None:
        draw_uniform(self.table, math.prod(self.filter_shape))

    def _weight(self) -> Tensor:
        return self.table.index_select(0, self.indices).view(self.out_channels, *self.filter_shape)

    def _fit(self, weight: Tensor) -> None:
        self._fit_table(weight.double(), torch.ones_like(weight, dtype=torch.float64))

    def _fit_table(self, values: Tensor, squares: Tensor) -> None:
        """The mean of the values at each number's places; ``squares`` are their weights."""
        sums, weights = self.table.new_zeros((2, len(self.table)), dtype=torch.float64)
        sums.index_add_(0, self.indices, (values * squares).flatten())
        weights.index_add_(0, self.indices, squares.flatten())
        self.table.copy_(torch.where(weights > 0, sums / weights, 0))


class SepHashedConv2d(Separable, HashedConv2d):
    """Depthwise and hashed pointwise convolution of int(s C_out C_in) numbers; as many MACs as ``sep``."""

    kind = "sep_hashed"
    rounds = 20

    def _build(self, new: New) -> None:
        super()._build(new)
        self._build_table(new, self.out_channels * self.in_channels)

    def _draw_map(self) -> None:
        draw_uniform(self.table, self.in_channels)

    def _matrix(self) -> Tensor:
        return self.table.index_select(0, self.indices).view(self.out_channels, self.in_channels)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self._fit_table(matrix, scale.square().expand_as(matrix))


class TridiagonalConv2d(Separable):
    """Depthwise convolution and a map with diagonals -p, 0 and +q, and e more entries.

    After Mousavi Janbeh Sarayi and Nikkhah Bahrami 2022 (arXiv 2207.00903), who have such matrices but no
    convolutions. The diagonals go on at the other end, so every output channel (or input channel, where there are
    more) has three. Input channels are riffled first, so that a stack of layers mixes all of them. Saves no MACs.

    Parameters and buffers:
        entries: (3 max(C_in, C_out) + e,), drawn from N(0, 2 / entries in a row).
        indices: their places in the map, row by row; computed, not stored.
    """

    kind = "tridiagonal"
    sizes = "P,Q or P,Q,E: how far the outer diagonals are from the main one, and the number of further entries"
    rounds = 5
    indices: Tensor

    def _build(self, new: New) -> None:
        super()._build(new)
        numbers = self.size.split(",")
        if len(numbers) not in (2, 3) or not all(n.strip().isdecimal() for n in numbers):
            raise ValueError(f"the size of {self.kind} is {self.size!r}, but it must be {self.sizes}")
        p, q, *more = (int(n) for n in numbers)
        period, cells = min(self.in_channels, self.out_channels), self.in_channels * self.out_channels
        self.offsets, count = (-p, 0, q), 3 * max(self.in_channels, self.out_channels) + sum(more)
        if len({offset % period for offset in self.offsets}) < 3:
            raise ValueError(f"the diagonals -{p}, 0 and {q} of {self.text} are not three among {period} channels")
        if count > cells:
            raise ValueError(f"{self.text} has {count:,} entries, but the map has only {cells:,}")
        self.entries = new(count)
        self.register_buffer("indices", self.entries.new_empty(count, dtype=torch.int64), persistent=False)

    def _derive(self) -> None:
        c, o, device = self.in_channels, self.out_channels, self.entries.device
        along = torch.arange(max(c, o), device=device)
        offsets = torch.tensor(self.offsets, device=device)[:, None]
        rows, columns = (along - offsets, along) if c > o else (along, along + offsets)
        diagonals = (rows % o * c + riffle(c, device)[columns % c]).flatten()
        order = hashes(c * o, device).index_fill(0, diagonals, 2**32).argsort(stable=True)
        self._refill("indices", torch.cat([diagonals, order[: len(self.entries) - len(diagonals)]]))

    def _draw_map(self) -> None:
        nn.init.normal_(self.entries, std=math.sqrt(2 * self.out_channels / len(self.entries)))

    def _matrix(self) -> Tensor:
        zeros = self.entries.new_zeros(self.out_channels * self.in_channels)
        return zeros.index_copy(0, self.indices, self.entries).view(self.out_channels, self.in_channels)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self.entries.copy_(matrix.flatten()[self.indices])
