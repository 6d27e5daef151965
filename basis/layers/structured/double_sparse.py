"""Double sparse factorization (Boza and Macko 2024, arXiv 2409.18850): a weight as a product of two sparse matrices."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import StructuredConv2d, draw_bias, fraction

ROUNDS = 40  # in which each factor is solved for once
STEPS = 5  # of ADMM for one factor
DAMPING = 1e-2  # of the mean diagonal of the Gram matrix


class DsfConv2d(StructuredConv2d):
    """A convolution whose weight is ``outer inner``, two matrices with most entries zero.

    The weight as a matrix of n rows and m columns is the product of a square factor of the smaller size, on the
    side of the outputs where C_out <= kh kw C_in, and one of n x m. Together they have density n m entries
    that are not zero. The square one has the fraction max(0.05, density / 2) of its entries, as in the authors'
    ResNets, but at least as many as it has rows, so that thin layers lose no outputs.

    ``fit`` is the method of the paper, without data; afterwards the entries are trained and the zeros stay. From
    scratch the paper has no scheme: here the zeros are drawn at random, the same number in each row, but for the
    diagonal of the square factor (with which the paper's fit starts).

    It is executed as the dense convolution with the weight, as both factors with their zeros are together more work
    than that at every pixel; :attr:`algebra` counts what is not zero.

    Parameters:
        inner: (min(C_out, kh kw C_in), C_in, kh, kw).
        outer: (C_out, min(C_out, kh kw C_in), 1, 1).

    Buffers:
        inner_mask, outer_mask: of the same shapes, bool, stored as one bit each.
    """

    kind = "dsf"
    sizes = "FRACTION: the numbers that are not zero in both factors, of those of the dense weight"
    source = "Boza and Macko 2024, Double Sparse Factorization"

    inner: nn.Parameter
    outer: nn.Parameter
    inner_mask: Tensor
    outer_mask: Tensor

    def _build(self, factory: dict[str, Any]) -> None:
        rows, columns = self.out_channels, math.prod(self.filter_shape)
        middle = min(rows, columns)
        density = fraction(self.size, f"the size of {self.kind}")
        square = max(middle, int(max(Fraction(1, 20), density / 2) * middle**2))
        other = int(density * rows * columns) - square
        if other < middle:
            raise ValueError(
                f"{self.text} leaves {max(other, 0)} numbers for a factor of {middle} x {max(rows, columns)} beside "
                f"the {square} of the square one, but it needs at least {middle}"
            )
        self.kept = {"outer": square, "inner": other} if rows <= columns else {"outer": other, "inner": square}
        shapes = {"inner": (middle, *self.filter_shape), "outer": (rows, middle, 1, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            self.register_buffer(f"{name}_mask", torch.empty(shape, dtype=torch.bool, device=factory["device"]))

    def reset_parameters(self) -> None:
        """Random masks; normal entries, so that those of the weight have He's variance, 2 / (kh kw C_in)."""
        for name, gain in (("inner", 2), ("outer", 1)):
            parameter, mask = getattr(self, name), getattr(self, f"{name}_mask")
            mask.copy_(_spread(self.kept[name], parameter.flatten(1)).view(parameter.shape))
            nn.init.normal_(parameter, std=math.sqrt(gain * len(parameter) / self.kept[name]))
            parameter.data.mul_(mask)
        draw_bias(self)

    @property
    def weight(self) -> Tensor:
        """``outer inner``, with zeros where the masks have them."""
        outer, inner = (self.outer * self.outer_mask).flatten(1), (self.inner * self.inner_mask).flatten(1)
        with full_precision(self.outer):
            return (outer @ inner).view(self.out_channels, *self.filter_shape)

    @property
    def building(self) -> int:
        """The product of both factors as it is executed, with the zeros."""
        return self.outer.numel() * math.prod(self.filter_shape)

    @property
    def algebra(self) -> int:
        """Multiply-accumulates per pixel with what is not zero, as the paper counts."""
        return sum(self.kept.values())

    def bits(self, name: str) -> int:
        """32 for what is not zero, and one for every entry to say whether it is."""
        return 32 * self.kept[name] + getattr(self, name).numel()

    def trained(self, name: str) -> int:
        """Those that are not zero."""
        return self.kept[name]

    def fit(self, weight: Tensor) -> None:
        """Alternate between the factors: ADMM steps for one of a fixed number of entries, with the other fixed."""
        matrix = weight.detach().flatten(1).float()
        if not matrix.any():  # of zeros nothing is found, but the drawn factor can still learn
            self.outer.data.zero_()
            return
        if len(self.outer) <= matrix.shape[1]:
            outer, inner = factorize(matrix, self.kept["outer"], self.kept["inner"])
        else:
            inner, outer = (factor.T for factor in factorize(matrix.T, self.kept["inner"], self.kept["outer"]))
        with torch.no_grad():
            for name, factor in (("inner", inner), ("outer", outer)):
                parameter = getattr(self, name)
                parameter.copy_(factor.reshape(parameter.shape))
                getattr(self, f"{name}_mask").copy_(_largest(parameter, self.kept[name]))


def factorize(matrix: Tensor, square: int, other: int) -> tuple[Tensor, Tensor]:
    """Sparse factors A (n, n), with ``square`` entries, and B (n, m), with ``other``, and A B near ``matrix`` (n, m).

    The columns of A and the rows of B are scaled to equal norms.
    """
    a, b = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), _largest(matrix, other) * matrix
    dual_a, dual_b = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(ROUNDS):
        start = min(1.0, i / (ROUNDS - 3)) ** 3
        a, dual_a = (x.T for x in _solve(b.T, matrix.T, a.T, dual_a.T, square, start))
        b, dual_b = _solve(a, matrix, b, dual_b, other, start)
    scale = (b.norm(dim=1) / a.norm(dim=0)).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1)
    return a * scale, b / scale[:, None]


def _solve(
    left: Tensor, target: Tensor, sparse: Tensor, dual: Tensor, count: int, start: float
) -> tuple[Tensor, Tensor]:
    """ADMM for a matrix of ``count`` entries so that ``left`` times it is near ``target``; it and its dual."""
    norms = left.norm(dim=0)[:, None] + 1e-8
    left, sparse, dual = left / norms.T, sparse * norms, dual * norms
    gram, eye = left.T @ left, torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    gram = gram + (DAMPING * gram.diagonal().mean()).clamp_min(1e-8) * eye
    right = left.T @ target
    inverse = torch.linalg.inv(gram + eye)
    dense = torch.linalg.solve(gram + start * eye, right + start * (sparse - dual))
    for step in range(STEPS):
        both = dense + dual
        if step < 2:
            mask = _largest(both, count)
        sparse = both * mask
        dual = both - sparse
        if step < STEPS - 1:
            dense = inverse @ (right + sparse - dual)
    return sparse / norms, dual / norms


def _largest(matrix: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` entries of largest absolute value."""
    mask = torch.zeros(matrix.numel(), dtype=torch.bool, device=matrix.device)
    mask[matrix.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view(matrix.shape)


def _spread(count: int, like: Tensor) -> Tensor:
    """A random mask of ``count`` entries, equally many in each row (up to 1); of a square matrix the diagonal first."""
    order = torch.rand(like.shape, device=like.device).argsort(1).float()
    order += torch.rand(like.shape, device=like.device)
    if like.shape[0] == like.shape[1]:
        order.fill_diagonal_(-1)
    return _largest(order.max() - order, count)
