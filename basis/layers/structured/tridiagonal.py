"""Pointwise maps with three diagonals and a few entries more."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.structured.acdc import riffle
from basis.layers.structured.hashed import Indexed, hashes
from basis.layers.structured.separable import Separable


class TridiagonalConv2d(Separable, Indexed):
    """Depthwise convolution and a pointwise map with diagonals -p, 0 and +q, and e more entries.

    A structured mask after arXiv 2207.00903, which has such matrices but no convolutions; not a
    reproduction. The diagonals go on at the other end, so every output channel (or input channel, where
    there are more) has three. Input channels are riffled first, even before odd ones: a stack of layers
    mixes all of them. The further entries are at places that a hash function with a fixed seed
    chooses. Numbers are saved, MACs are not: a dense 1x1 convolution multiplies the zeros too, which
    is faster on a GPU than three diagonals.

    Parameters:
        entries: (3 max(C_in, C_out) + e,), the diagonals and the others; drawn from N(0, 2 / entries in a row).
    """

    kind = "tridiagonal"
    sizes = "P,Q or P,Q,E: how far the outer diagonals are from the main one, and the number of further entries"
    source = "after Mousavi Janbeh Sarayi and Nikkhah Bahrami 2022, arXiv 2207.00903"
    rounds = 5

    def _build_map(self, factory: dict[str, Any]) -> None:
        numbers = self.size.split(",")
        if len(numbers) not in (2, 3) or not all(n.strip().isdecimal() for n in numbers):
            raise ValueError(f"the size of {self.kind} is {self.size!r}, but it must be {self.sizes}")
        p, q, *more = (int(n) for n in numbers)
        period, cells = min(self.in_channels, self.out_channels), self.in_channels * self.out_channels
        self.offsets, self.extra = (-p, 0, q), sum(more)
        if len({offset % period for offset in self.offsets}) < 3:
            raise ValueError(f"the diagonals -{p}, 0 and {q} of {self.text} are not three among {period} channels")
        count = 3 * max(self.in_channels, self.out_channels) + self.extra
        if count > cells:
            raise ValueError(f"{self.text} has {count:,} entries, but the map has only {cells:,}")
        self.entries = nn.Parameter(torch.empty(count, **factory))
        self._hold_indices(factory)

    def _indices(self, device: Any) -> Tensor:
        c, o = self.in_channels, self.out_channels
        along = torch.arange(max(c, o), device=device)
        offsets = torch.tensor(self.offsets, device=device)[:, None]
        rows, columns = (along - offsets, along) if c > o else (along, along + offsets)
        diagonals = (rows % o * c + riffle(c, device)[columns % c]).flatten()
        order = hashes(c * o, device).index_fill(0, diagonals, 2**32).argsort(stable=True)
        return torch.cat([diagonals, order[: self.extra]])

    def _reset_map(self) -> None:
        nn.init.normal_(self.entries, std=math.sqrt(2 * self.out_channels / len(self.entries)))

    @property
    def matrix(self) -> Tensor:
        """The entries at their places, zeros elsewhere."""
        zeros = self.entries.new_zeros(self.out_channels * self.in_channels)
        return zeros.index_copy(0, self.indices, self.entries).view(self.out_channels, self.in_channels)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self.entries.copy_(matrix.flatten()[self.indices])
