"""Deformable butterflies (Lin, Ran, Chiu, Chesi and Wong 2021, arXiv 2203.13556).

The weight as a matrix of C_out rows and kh kw C_in columns, kernel positions outside and channels inside, is a
product R_N ... R_1. A factor (r, s, t) is block diagonal, and each block is an r x s grid of t x t diagonal matrices.
With t the product of all r before, each entry of the weight is a product of N numbers, one of each factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import New, StructuredConv2d, number

Chain = tuple[tuple[int, int, int, int], ...]  # (blocks, r, s, t) of each factor, the first to be applied first

SWEEPS = 5  # of alternating least squares


class DebutConv2d(StructuredConv2d):
    """A deformable butterfly of ``factor_1``, ``factor_2``, ..., (blocks, r, s, t) each, executed as a convolution.

    Entries are drawn from N(0, 2^(1/N) / s) for He's variance; the paper's N(0, 1 / 2) lets outputs grow for s > 2.
    """

    kind = "debut"
    sizes = "FRACTION of the dense weight's numbers that a chain may have"

    def _build(self, new: New) -> None:
        shape = self.out_channels, math.prod(self.filter_shape)
        limit = int(number(self.size, self.kind) * math.prod(shape))
        self.chain = largest_chain(*shape, math.prod(self.kernel_size), limit)
        for i, factor in enumerate(self.chain, start=1):
            self.register_parameter(f"factor_{i}", new(*factor))

    def _draw(self) -> None:
        for factor in self.parts.values():
            nn.init.normal_(factor, std=math.sqrt(2 ** (1 / len(self.chain)) / factor.shape[2]))

    def _weight(self) -> Tensor:
        matrix = _multiply(list(self.parts.values()))
        return matrix.view(self.out_channels, *self.kernel_size, self.in_channels).permute(0, 3, 1, 2).contiguous()

    def _fit(self, weight: Tensor) -> None:
        """Split off one factor after the other (Zheng et al. 2021, arXiv 2110.01230), then alternate least squares."""
        target = weight.double().permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        factors = _split(target, self.chain)
        for i in [*range(len(factors))] * SWEEPS:
            factors[i] = _solve(target, factors, i)
        for parameter, factor in zip(self.parts.values(), factors, strict=True):
            parameter.copy_(factor)


def _multiply(factors: Sequence[Tensor]) -> Tensor:
    """R_N ... R_1, (rows, columns)."""
    product = factors[-1][0]  # (r, s, t) of R_N ... R_i: rows of equal remainder by t, columns likewise, t
    for factor in reversed(factors[:-1]):
        blocks, r, s, t = factor.shape
        rows = product.view(-1, blocks, r, t).transpose(1, 2).unsqueeze(3)
        product = (rows * factor.transpose(0, 1)).reshape(-1, blocks * s, t)
    return product.squeeze(-1)


def _split(matrix: Tensor, chain: Chain) -> list[Tensor]:
    """Factors whose product is near ``matrix``, by matrices of rank 1; equal to it if it is such a product."""
    factors, rest = [], matrix.unsqueeze(-1)
    for blocks, r, s, t in chain[:-1]:
        parts = rest.view(-1, r, blocks, s, t).permute(2, 1, 4, 0, 3)  # (blocks, r, t) matrices of s columns
        left, sizes, right = torch.linalg.svd(parts, full_matrices=False)
        root = sizes[..., :1].sqrt()
        factors.append((right[..., 0, :] * root.where(root > 0, 1)).transpose(2, 3))  # zero weights can still learn
        rest = (left[..., 0] * root).permute(3, 0, 1, 2).reshape(-1, blocks, r * t)
    return [*factors, rest.unsqueeze(0)]


def _solve(target: Tensor, factors: Sequence[Tensor], i: int) -> Tensor:
    """The i-th factor that brings the product nearest to ``target``: each of its entries stands alone."""
    blocks, r, s, t = factors[i].shape
    others = _multiply([torch.ones_like(f) if j == i else f for j, f in enumerate(factors)])
    others, target = (m.view(-1, r, t, blocks, s, m.shape[1] // (blocks * s)) for m in (others, target))
    inner, squares = (m.sum((0, 5)).permute(2, 0, 3, 1) for m in (others * target, others.square()))
    return (inner / squares.clamp_min(1e-30)).where(squares > 0, factors[i])


@lru_cache(maxsize=256)
def largest_chain(rows: int, columns: int, positions: int, limit: int) -> Chain:
    """The chain of most parameters, at most ``limit``, of a small family; ``ValueError`` if none is so small.

    The family is made as the paper makes its chains: a first factor that takes whole kernels (``positions``), a last
    one, and between them as many factors as possible, the larger ones last. Chains whose sizes shrink from the first
    factor on to C_out (backwards, where C_out is larger than kh kw C_in), and so of full rank, go before all others.
    """
    chains = {_chain(pairs) for pairs in _family(rows, columns // positions, positions)}
    counts = {chain: sum(map(math.prod, chain)) for chain in chains}
    fitting = [chain for chain in chains if counts[chain] <= limit]
    if not fitting:
        smallest = min(counts.values(), default=rows * columns)
        least = math.ceil(10_000 * smallest / (rows * columns)) / 10_000
        raise ValueError(f"no chain for {rows} x {columns} has only {limit:,} numbers; the least fraction is {least}")

    def merit(chain: Chain) -> tuple[bool, int, int, list[tuple[int, ...]]]:
        pairs = [(r, s) for _, r, s, _ in chain] if columns >= rows else [(s, r) for _, r, s, _ in reversed(chain)]
        shrinks = all(s > 1 for _, s in pairs) and all(s >= r for r, s in pairs[1:])
        rank = min(columns, *(blocks * r * t for blocks, r, _, t in chain))
        return shrinks, rank, counts[chain], [shape[1:] for shape in chain]

    return max(fitting, key=merit)


def _family(rows: int, channels: int, positions: int) -> Iterator[list[tuple[int, int]]]:
    """(r, s) of the factors of each chain."""
    for first in _divisors(rows):
        for last in _divisors(rows // first):
            for taken in _divisors(channels):
                for inputs in _divisors(channels // taken)[1:]:
                    middle = _small(rows // first // last, channels // taken // inputs)
                    yield [(first, positions * taken), *middle, (last, inputs)]


def _small(r: int, s: int) -> list[tuple[int, int]]:
    """As many factors as possible with products ``r`` and ``s``, all above 1 where both are, the larger ones last."""
    if (r, s) == (1, 1):
        return []
    many = [_primes(r) or [1], _primes(s) or [1]]
    length = min(map(len, many))
    grouped = [[math.prod(p[len(p) * i // length : len(p) * (i + 1) // length]) for i in range(length)] for p in many]
    return list(zip(*grouped, strict=True))


def _chain(pairs: Sequence[tuple[int, int]]) -> Chain:
    """As many blocks as the s of all later factors give, and t the product of the r of all earlier ones."""
    outputs, inputs = zip(*pairs, strict=True)
    return tuple((math.prod(inputs[i + 1 :]), r, s, math.prod(outputs[:i])) for i, (r, s) in enumerate(pairs))


@lru_cache
def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _primes(n: int) -> list[int]:
    """The prime factors of n, in descending order."""
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [*_primes(n // smallest), smallest] if smallest else []
