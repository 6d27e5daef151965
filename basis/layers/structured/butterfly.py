"""Deformable butterflies (Lin, Ran, Chiu, Chesi and Wong 2021, arXiv 2203.13556).

The weight as a matrix of C_out rows and kh kw C_in columns, kernel positions outside and channels inside, is a
product R_N ... R_1. A factor (r, s, t) is block diagonal, and each block is an r x s grid of t x t diagonal matrices.
With t the product of all r before, each entry of the weight is a product of N numbers, one of each factor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import New, StructuredConv2d, number

Chain = tuple[tuple[int, int, int], ...]  # (r, s, t) of each factor, the first to be applied first

SWEEPS = 5  # of alternating least squares


class DebutConv2d(StructuredConv2d):
    """A convolution whose weight is a deformable butterfly; executed as the dense convolution, which is faster.

    Entries are drawn from N(0, 2^(1/N) / s), so that the weight has He's variance, 2 / (kh kw C_in); the paper has
    N(0, 1 / 2), which lets outputs grow for s above 2.

    Parameters:
        factor_1, factor_2, ...: (blocks, r, s, t) each, ``factor_1`` is the first to be applied.
    """

    kind = "debut"
    sizes = "FRACTION of the dense weight's numbers that a chain may have, or a chain such as (4,6,1)(2,3,4)(8,32,8)"

    def _build(self, new: New) -> None:
        shape = self.out_channels, math.prod(self.filter_shape)
        if self.size.startswith("("):
            self.chain = read_chain(self.size, *shape)
        else:
            limit = int(number(self.size, self.kind) * math.prod(shape))
            self.chain = largest_chain(*shape, math.prod(self.kernel_size), limit)
        for i, factor in enumerate(_shapes(self.chain), start=1):
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
        for _ in range(SWEEPS):
            for i in range(len(factors)):
                factors[i] = _solve(target, factors, i)
        for parameter, factor in zip(self.parts.values(), factors, strict=True):
            parameter.copy_(factor)


def _shapes(chain: Chain) -> list[tuple[int, int, int, int]]:
    """(blocks, r, s, t) of each factor: there are as many blocks as the s of all later factors give."""
    return [(math.prod(s for _, s, _ in chain[i + 1 :]), *one) for i, one in enumerate(chain)]


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
    for blocks, r, s, t in _shapes(chain)[:-1]:
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


def read_chain(text: str, rows: int, columns: int) -> Chain:
    """The chain in ``text``, such as ``(8,9,1)(2,4,8)``; ``ValueError`` says why it is not one of that shape."""
    if not re.fullmatch(r"(\(\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*){2}\)\s*)+", text):
        raise ValueError(f"the chain is {text!r}, but it must be whole numbers (r,s,t), such as (8,9,1)(2,4,8)")
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    pairs = list(zip(numbers[::3], numbers[1::3], strict=True))
    outputs, inputs = (math.prod(side) for side in zip(*pairs, strict=True))
    if (outputs, inputs) != (rows, columns):
        raise ValueError(f"the chain {text} is for {outputs} x {inputs} matrices, but the weight is {rows} x {columns}")
    chain = _chain(pairs)
    if numbers[2::3] != [t for *_, t in chain]:
        raise ValueError(f"the chain is {text}, but each t must be the product of the r before it, as in {chain}")
    return chain


def largest_chain(rows: int, columns: int, positions: int, limit: int) -> Chain:
    """The chain of most parameters, at most ``limit``, of a small family; ``ValueError`` if none is so small.

    The family is made as the paper makes its chains: a first factor that takes whole kernels (``positions``
    divides its s), a last one, and between them as many factors as possible, with the larger ones last. The first
    factor may have more outputs than inputs, but from there on the sizes shrink to C_out, so that the rank is full;
    where C_out is larger than kh kw C_in, this holds backwards. Only if all these have too many parameters are the
    others taken, those of highest rank.
    """
    known = _chains(rows, columns, positions)
    fitting = [one for one in known if one[2] <= limit]
    if not fitting:
        smallest = min((count for *_, count, _ in known), default=rows * columns)
        least = math.ceil(10_000 * smallest / (rows * columns)) / 10_000
        raise ValueError(
            f"no chain for {rows} x {columns} has at most {limit:,} numbers; the least fraction is {least}"
        )
    return max(fitting)[3]


@lru_cache(maxsize=256)
def _chains(rows: int, columns: int, positions: int) -> list[tuple[bool, int, int, Chain]]:
    """All chains: whether their sizes shrink, the rank that these allow, the number of parameters, the chain."""
    found = []
    for chain in {_chain(pairs) for pairs in _family(rows, columns // positions, positions)}:
        shapes = _shapes(chain)
        pairs = [(r, s) for r, s, _ in chain] if columns >= rows else [(s, r) for r, s, _ in reversed(chain)]
        shrinks = all(s > 1 for _, s in pairs) and all(s >= r for r, s in pairs[1:])
        rank = min(columns, *(blocks * r * t for blocks, r, _, t in shapes))
        found.append((shrinks, rank, sum(map(math.prod, shapes)), chain))
    return found


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
    """The factors with their t."""
    return tuple((r, s, math.prod(before for before, _ in pairs[:i])) for i, (r, s) in enumerate(pairs))


@lru_cache(maxsize=1024)
def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@lru_cache(maxsize=1024)
def _primes(n: int) -> list[int]:
    """The prime factors of n, in descending order."""
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [*_primes(n // smallest), smallest] if smallest else []
