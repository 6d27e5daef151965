"""Hashed weights: few numbers, each used at many places that a hash function chooses.

Chen et al. 2015 (HashedNets, arXiv 1504.04788), here without signs, as Gray, Crowley and Storkey 2019 use
them. Where they store random integers, places here come from a hash function with a fixed seed: nothing but
the numbers is stored, and layers of equal shape have equal places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import StructuredConv2d, draw_bias, fraction
from basis.layers.structured.separable import Separable

SEED = 0x5EED


def hashes(n: int, device: torch.device | str | None) -> Tensor:
    """(n,) pseudo-random integers in [0, 2^32): those of 0 ... n - 1 by a hash function, on any machine."""
    x = torch.arange(SEED, SEED + n, device=device) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # "lowbias32" of Wellons' hash-prospector
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


class Indexed(StructuredConv2d):
    """A layer with a table of indices, which is computed and not stored.

    Attributes:
        indices: int64; a buffer outside of the state dict.
    """

    indices: Tensor

    def _indices(self, device: Any) -> Tensor:
        """The table."""
        raise NotImplementedError

    def _hold_indices(self, factory: dict[str, Any]) -> None:
        self.register_buffer("indices", self._indices(factory.get("device")), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        had_none = self.indices.is_meta
        super()._apply(fn, recurse)
        if had_none and not self.indices.is_meta:  # by to_empty
            self.indices = self._indices(self.indices.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        device = next(self.parameters()).device
        if self.indices.is_meta and device.type != "meta":  # by load_state_dict(..., assign=True)
            self.indices = self._indices(device)


class _Hashed(Indexed):
    """What both hashed layers have in common.

    Parameters:
        table: (budget,), the numbers.
    """

    sizes = "FRACTION: that fraction of the dense numbers is stored"

    def _build_table(self, places: int, factory: dict[str, Any]) -> None:
        budget = int(fraction(self.size, f"the size of {self.kind}") * places)
        if not budget:
            raise ValueError(f"{self.text} stores none of {places} numbers, but it must store at least 1")
        self.places = places
        self.table = nn.Parameter(torch.empty(budget, **factory))
        self._hold_indices(factory)
        if self.bias is None:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **factory))

    def _indices(self, device: Any) -> Tensor:
        return hashes(self.places, device) % len(self.table)

    def _look_up(self, *shape: int) -> Tensor:
        return self.table.index_select(0, self.indices).view(shape)

    def _fit_table(self, values: Tensor, squares: Tensor) -> None:
        """The mean of the values at each number's places; ``squares`` are their weights."""
        sums, weights = self.table.new_zeros((2, len(self.table)), dtype=torch.float64)
        sums.index_add_(0, self.indices, (values * squares).flatten())
        weights.index_add_(0, self.indices, squares.flatten())
        self.table.copy_(torch.where(weights > 0, sums / weights, 0))


class HashedConv2d(_Hashed):
    """A convolution with a hashed weight: int(s C_out C_in kh kw) numbers, as many MACs as a dense one.

    Always has a bias, as in Gray et al., even with ``bias=False``. Their last number is never used; here all are.

    Parameters:
        table: (budget,), the numbers; uniform in +-1 / sqrt(C_in kh kw).
        bias: (C_out,).
    """

    kind = "hashed"
    source = "Gray et al. 2019; Chen et al. 2015 (HashedNets)"

    def _build(self, factory: dict[str, Any]) -> None:
        self._build_table(self.out_channels * math.prod(self.filter_shape), factory)

    def reset_parameters(self) -> None:
        """As PyTorch draws the weight and bias of a convolution."""
        bound = 1 / math.sqrt(math.prod(self.filter_shape))
        nn.init.uniform_(self.table, -bound, bound)
        draw_bias(self)

    @property
    def weight(self) -> Tensor:
        """The number at each place."""
        return self._look_up(self.out_channels, *self.filter_shape)

    def fit(self, weight: Tensor) -> None:
        """The mean of the weights at each number's places, which is the best."""
        values = weight.detach().double()
        self._fit_table(values, torch.ones_like(values))


class SepHashedConv2d(Separable, _Hashed):
    """Depthwise and hashed pointwise convolution of int(s C_out C_in) numbers; as many MACs as ``sep``.

    Always has a bias, as in Gray et al., even with ``bias=False``. Their last number is never used; here all are.

    Parameters:
        table: (budget,), the numbers; uniform in +-1 / sqrt(C_in).
        bias: (C_out,).
    """

    kind = "sep_hashed"
    source = "Gray et al. 2019, hashed separable"
    rounds = 20

    def _build_map(self, factory: dict[str, Any]) -> None:
        self._build_table(self.out_channels * self.in_channels, factory)

    def _reset_map(self) -> None:
        bound = 1 / math.sqrt(self.in_channels)
        nn.init.uniform_(self.table, -bound, bound)

    @property
    def matrix(self) -> Tensor:
        """The number at each place."""
        return self._look_up(self.out_channels, self.in_channels)

    def _fit_map(self, matrix: Tensor, scale: Tensor) -> None:
        self._fit_table(matrix, scale.square().expand_as(matrix))
