"""Weights of few trained numbers or bits: masks over random values, and products of two sparse matrices."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from basis.layers.base import Fact, mask_of
from basis.layers.structured.layer import New, StructuredConv2d, number

ROUNDS = 40  # of the double sparse factorization, in which each factor is solved for once
STEPS = 5  # of ADMM for one factor
DAMPING = 1e-2  # of the mean diagonal of the Gram matrix


class PemnConv2d(StructuredConv2d):
    """Fixed random values, of which a trained mask keeps half (Bai et al. 2022, arXiv 2210.06699, RP).

    The mask keeps the values whose absolute ``scores`` are above their median; its gradient goes straight through to
    those (edge-popup, Ramanujan et al. 2020). ``values`` of N(0, 2 / fan-in) come from ``seed``, so that only the mask
    is stored, one bit for each weight. A fraction below 1 is the paper's padding.
    """

    kind = "pemn"
    sizes = "FRACTION: that part of the weight's random values is drawn and repeated, 1 for all of them"
    seed = Fact()
    _needed = ("values",)

    def _build(self, new: New) -> None:
        self.fraction = number(self.size, self.kind)
        self.scores = new(self.out_channels, *self.filter_shape)
        self._known["seed"] = np.array(0)

    def _draw(self) -> None:
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        if not self.scores.is_meta:
            self._know({"seed": torch.randint(2**62, (), device="cpu").numpy()})

    def _made(self, name: str, like: Tensor) -> Tensor:
        length, shape = self.scores.numel(), self.scores.shape
        if like.is_meta:
            return torch.empty(shape, dtype=like.dtype, device="meta")
        drawn = min(length, int(self.fraction * length) + 1)  # as the authors round
        generator = torch.Generator("cpu").manual_seed(int(self._known["seed"]))  # the same ones on every device
        values = torch.randn(drawn, generator=generator, dtype=torch.float32, device="cpu")
        values = values.mul_(math.sqrt(2 / math.prod(self.filter_shape))).repeat(math.ceil(length / drawn))
        return values[:length].view(shape).to(like.device, like.dtype)

    def _weight(self) -> Tensor:
        size = self.scores.abs()
        kept = size.detach() > size.detach().median()
        return self.constant("values", self.scores) * (kept + (size - size.detach()))  # adds 0, with a gradient

    def bits(self, name: str) -> int:
        """One for each score: what remains of them is the mask."""
        return getattr(self, name).numel()

    def _fit(self, weight: Tensor) -> None:
        """Keep the half of the values that is nearest to the weight; the scores change places."""
        values = self.constant("values", self.scores)
        gain = (2 * weight - values) * values  # w^2 - (w - v)^2
        order = gain.flatten().argsort()
        scores = torch.empty_like(order, dtype=self.scores.dtype)
        scores[order] = self.scores.abs().flatten().sort().values
        self.scores.copy_(scores.view(self.scores.shape))


class DsfConv2d(StructuredConv2d):
    """A weight ``outer inner`` of two sparse matrices (Boza and Macko 2024, arXiv 2409.18850).

    The weight as a matrix of n rows and m columns is the product of a square factor of the smaller size and one of
    n x m, together with density n m entries that are not zero; the square one has the fraction max(0.05, density / 2)
    of its own, as in the authors' ResNets, but at least one for each row. ``inner`` is (min(n, m), C_in, kh, kw),
    ``outer`` (C_out, min(n, m), 1, 1); their masks are stored as one bit each. The paper only fits; new layers have
    random zeros, equally many in each row, but none on the diagonal of the square factor, and He's variance.
    """

    inner_mask = Fact()
    outer_mask = Fact()
    _needed = ("inner_mask", "outer_mask")

    kind = "dsf"
    sizes = "FRACTION: the numbers that are not zero in both factors, of those of the dense weight"

    def _build(self, new: New) -> None:
        rows, columns = self.out_channels, math.prod(self.filter_shape)
        middle, density = min(rows, columns), number(self.size, self.kind)
        square = max(middle, int(max(Fraction(1, 20), density / 2) * middle**2))
        other = int(density * rows * columns) - square
        if other < middle:
            raise ValueError(f"{self.text} leaves {max(other, 0)} numbers for a factor that needs at least {middle}")
        self.kept = {"outer": square, "inner": other} if rows <= columns else {"inner": square, "outer": other}
        self.inner, self.outer = new(middle, *self.filter_shape), new(rows, middle, 1, 1)
        for name in self.facts:
            self._known[name] = np.zeros(getattr(self, name[:5]).shape, bool)
        self.building = self.outer.numel() * columns

    def _draw(self) -> None:
        for name, gain in (("inner", 2), ("outer", 1)):
            parameter = getattr(self, name)
            mask = _spread(self.kept[name], parameter.flatten(1)).view(parameter.shape)
            nn.init.normal_(parameter, std=math.sqrt(gain * len(parameter) / self.kept[name]))
            self._mask(name, mask)

    def _mask(self, name: str, mask: Tensor) -> None:
        """From now on this is the mask of the parameter of that name."""
        if not mask.is_meta:
            self._know({f"{name}_mask": mask.cpu().numpy()})
        getattr(self, name).mul_(mask)

    def _checked(self, name: str, value: Tensor) -> np.ndarray:
        return mask_of(value, self._known[name].shape, self.kept[name[:5]])

    def _weight(self) -> Tensor:
        outer, inner = (
            (factor * self.constant(f"{name}_mask", factor)).flatten(1)
            for name, factor in (("outer", self.outer), ("inner", self.inner))
        )
        return (outer @ inner).view(self.out_channels, *self.filter_shape)

    def bits(self, name: str) -> int:
        """32 for what is not zero, and one for every entry to say whether it is."""
        return 32 * self.kept[name] + getattr(self, name).numel()

    def trained(self, name: str) -> int:
        """Those that are not zero."""
        return self.kept[name]

    def _fit(self, weight: Tensor) -> None:
        matrix = weight.flatten(1).float()
        if not matrix.any():  # of zeros nothing is found, but the drawn factor can still learn
            self.outer.zero_()
            return
        wide = len(self.outer) <= matrix.shape[1]
        factors = factorize(matrix if wide else matrix.T, *self.kept.values())
        for (name, count), factor in zip(self.kept.items(), factors, strict=True):
            parameter = getattr(self, name)
            parameter.copy_((factor if wide else factor.T).reshape(parameter.shape))
            self._mask(name, _largest(parameter, count))


def factorize(matrix: Tensor, square: int, other: int) -> tuple[Tensor, Tensor]:
    """Sparse factors A (n, n), with ``square`` entries, and B (n, m), with ``other``, and A B near ``matrix`` (n, m).

    Alternates between steps of ADMM for either factor; the columns of A and the rows of B get equal norms.
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


def _solve(left: Tensor, target: Tensor, sparse: Tensor, dual: Tensor, count: int, start: float) -> tuple[Tensor, ...]:
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
