"""The coefficient matrix A of a basis convolution in several forms: dense, low-rank, grouped, sparse, ...

A derived filter combines the ``columns`` = k / groups basis filters of its mixing group: a group of the convolution or,
in the form ``grouped``, a part of one. A is (rows, columns), rows = C_out - k, one block per group, stacked by rows.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.copies import makes_weights
from basis.layers.base import Constants, Fact, full_precision, mask_of

_SIZED = {"low_rank": "RANK", "grouped": "GROUPS", "sparse": "ENTRIES"}
_PLAIN = ("dense", "shared", "frozen", "repeat")


@dataclass(frozen=True)
class Form:
    """A form of A; :meth:`parse` reads its text, ``str`` writes it.

    - ``dense``: every entry is trained; ``shared``: the same, one A for all layers of equal shape;
    - ``frozen``: drawn at random and never trained;
    - ``low_rank:10``, ``low_rank:1/8``: A = U V of this rank, or this fraction of the columns, in each group;
    - ``grouped:4``: each group of the convolution mixes within 4 groups of its own;
    - ``sparse:8``, ``sparse:1/8``: so many entries, or this fraction of the columns, in each row;
    - ``repeat``: no A; derived filter i of a group repeats basis filter i mod columns.

    Raises ``ValueError`` for an unknown kind, or a size that the kind does not take.
    """

    kind: str
    size: int | Fraction | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, numbers.Integral) and not isinstance(self.size, bool):  # such as numpy's
            object.__setattr__(self, "size", int(self.size))
        size, problem = self.size, ""
        fraction = self.kind != "grouped" and isinstance(size, Fraction) and 0 < size < 1
        if self.kind not in (*_PLAIN, *_SIZED):
            problem = f"it must be one of {', '.join([*_PLAIN, *(f'{kind}:{size}' for kind, size in _SIZED.items())])}"
        elif self.kind in _PLAIN and size is not None:
            problem = f"{self.kind} takes no size"
        elif self.kind in _SIZED and not fraction and not (type(size) is int and size >= 1):
            problem = "its size must be a whole number of at least 1" + " or a fraction" * (self.kind != "grouped")
        if problem:
            raise ValueError(f"coefficients is {str(self)!r}, but {problem}")

    @classmethod
    def parse(cls, text: str | Form) -> Form:
        """The form that ``text`` names; a form is returned as it is."""
        if isinstance(text, Form):
            return text
        kind, colon, number = str(text).partition(":")
        size: Any = number if colon else None
        if number.isdecimal():
            size = int(number)
        elif colon:
            with contextlib.suppress(ValueError, ArithmeticError):
                size = Fraction(number) if 0 < Fraction(number) < 1 else number
        return cls(kind, size)

    def __str__(self) -> str:
        return self.kind if self.size is None else f"{self.kind}:{self.size}"

    def count(self, columns: int) -> int:
        """The size as a number, where it may be a fraction of the columns."""
        return self.size if isinstance(self.size, int) else max(1, round((self.size or 0) * columns))

    def make(self, out_channels: int, basis_channels: int, groups: int = 1, **factory: Any) -> Coefficients:
        """A of this form, allocated but not yet drawn; ``ValueError`` for a size that does not fit the shape."""
        out_channels, basis_channels, groups = int(out_channels), int(basis_channels), int(groups)
        rows, columns = out_channels - basis_channels, basis_channels // groups
        size, height = self.count(columns), rows // groups
        problem = ""
        if self.kind == "grouped":
            if columns % size or height % size:
                problem = f"{columns} basis and {height} derived filters cannot both be split into {size} groups"
            groups, columns = groups * size, columns // size
        elif self.kind == "low_rank" and rows and size > min(height, columns):
            problem = f"A is {height} x {columns}, and no rank is above {min(height, columns)}"
        elif self.kind == "sparse" and rows and size > columns:
            problem = f"a row of A has only {columns} entries"
        if problem:
            raise ValueError(f"coefficients is {str(self)!r}, but {problem}")
        kind = {"low_rank": LowRank, "sparse": Sparse, "repeat": Repeat}.get(self.kind, Coefficients)
        return kind(self, rows, columns, groups, **factory)


class Coefficients(nn.Module):
    """A of one layer or of several that share it; this class: dense, shared or grouped, ``weight`` (rows, columns)."""

    mixes = True  # the maps are made by one 1x1 convolution with M = [I; A]; else by :meth:`derive`
    free = True  # every dense A can be held
    fits = True  # A can be chosen, by :meth:`fit`
    weight: Tensor

    def __init__(self, form: Form, rows: int, columns: int, groups: int, **factory: Any) -> None:
        super().__init__()
        self.form, self.rows, self.columns, self.groups = form, rows, columns, groups
        self.stored = rows * columns  # trained numbers
        self.products: tuple[int, ...] = (rows * columns,)  # MACs of each factor, for one pixel of maps or one weight
        self._allocate(**factory)

    @property
    def trains(self) -> bool:
        """Whether any of its numbers is trained now."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def _allocate(self, **factory: Any) -> None:
        weight = torch.empty((self.rows, self.columns), **factory)
        if self.form.kind == "frozen":
            self.register_buffer("weight", weight)
            self.free, self.fits, self.stored = False, False, 0
        else:
            self.weight = nn.Parameter(weight)

    def reset_parameters(self) -> None:
        """Draw new values (uniform), so that every row of A B has the variance of a row of B."""
        _draw(self.weight, self.columns)

    def fit(self, dense: Tensor, basis: Tensor) -> None:
        """Take values near to a dense A (groups, rows / groups, columns), for B (groups, columns, F); float64."""
        self.weight.copy_(dense.reshape(self.weight.shape))

    def factors(self) -> tuple[Tensor, ...]:
        """A as a product, the last factor first."""
        return (self.matrix(),)

    def matrix(self) -> Tensor:
        """A, (rows, columns)."""
        return self.weight

    def blocks(self) -> Tensor:
        """A by mixing groups, (groups, rows / groups, columns)."""
        return self._by_groups(self.matrix())

    def combine(self, filters: Tensor) -> Tensor:
        """The derived filters, (groups, rows / groups, F), of basis filters (groups, columns, F)."""
        for factor in self.factors():  # of one group a plain product, not a batch of one
            filters = (factor @ filters[0])[None] if self.groups == 1 else self._by_groups(factor) @ filters
        return filters

    def derive(self, z: Tensor) -> Tensor:
        """The derived maps (N, rows, H, W) of the basis maps z (N, k, H, W), group by group."""
        for factor in self.factors():
            z = F.conv2d(z, factor[:, :, None, None], groups=self.groups)
        return z

    def present(self) -> Coefficients:
        """Itself; hooks that compute a parameter, as pruning's do, wait for a call and are run now."""
        if self._forward_pre_hooks and any(name in self.__dict__ for name in ("weight", "left", "right")):
            for hook in filter(makes_weights, self._forward_pre_hooks.values()):
                hook(self, ())
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "values" in state_dict:  # as ``weight`` was called up to version 0.1
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "values")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_groups(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.groups, len(rows) // self.groups))


class LowRank(Coefficients):
    """A = U V per group, ``left`` U (rows, rank), ``right`` V (groups * rank, columns); LinearConv (WACV 2021)."""

    mixes = free = False

    def _allocate(self, **factory: Any) -> None:
        self.rank = min(self.form.count(self.columns), self.columns, self.rows // self.groups)
        self.left = nn.Parameter(torch.empty((self.rows, self.rank), **factory))
        self.right = nn.Parameter(torch.empty((self.groups * self.rank, self.columns), **factory))
        self.products = (self.right.numel(), self.left.numel())
        self.stored = sum(self.products)

    def reset_parameters(self) -> None:
        """Uniform."""
        _draw(self.right, self.columns)
        _draw(self.left, max(1, self.rank))

    def fit(self, dense: Tensor, basis: Tensor) -> None:
        """The best of this rank: A B truncated by SVD. U and V get the same singular values."""
        left, right = _truncated(dense @ basis, self.rank)
        left, right = _truncated(left @ (right @ torch.linalg.pinv(basis)), self.rank)
        self.left.copy_(left.reshape(self.left.shape))
        self.right.copy_(right.reshape(self.right.shape))

    def matrix(self) -> Tensor:
        """U V, in full precision even under autocast."""
        with full_precision(self.left):
            return (self._by_groups(self.left) @ self._by_groups(self.right)).flatten(0, 1)

    def factors(self) -> tuple[Tensor, ...]:
        """V and U."""
        return self.right, self.left


class Sparse(Coefficients, Constants):
    """A = ``weight`` * ``mask``, which keeps the largest entries of every row; after LinearConv's sparse variant.

    Until :meth:`settle` the mask is that of the current weight, and all of the weight gets the gradient of A as if
    nothing were masked (straight through), so that dropped entries can come back. ``mask`` and ``settled`` are in the
    state, but no buffers.
    """

    free = False
    mask = Fact()
    settled = Fact()

    def _allocate(self, **factory: Any) -> None:
        super()._allocate(**factory)
        self.entries = min(self.form.count(self.columns), self.columns)
        self.stored = self.rows * self.entries
        self._know({"settled": np.array(False)})

    def _like(self) -> Tensor:
        return self.weight

    def _fact(self, name: str) -> Tensor:
        return super()._fact(name) if self._settled or name == "settled" else self._largest()

    def _checked(self, name: str, value: Tensor) -> np.ndarray:
        if name == "settled":
            return mask_of(value, ())
        return mask_of(value, (self.rows, self.columns), self.entries, axis=1)

    def _know(self, facts: Mapping[str, np.ndarray]) -> None:
        known = {**self._known, **facts}
        self._settled = bool(known["settled"]) and "mask" in known
        self._known = {"mask": known["mask"]} if self._settled else {}  # an older mask counts no more
        self._needed = ("mask",) * self._settled
        super()._know({"settled": np.array(self._settled)})

    def reset_parameters(self) -> None:
        """Uniform, so wide that the entries that are kept have mean square 1 / entries."""
        n, s = self.columns, self.entries
        # The squares of the s largest of n numbers from U(0, 1) have this mean, summed up.
        total = n / 3 * (1 - math.prod(n - s + i for i in range(3)) / math.prod(n + i for i in range(3)))
        nn.init.uniform_(self.weight, -1 / math.sqrt(total), 1 / math.sqrt(total))
        self._know({"settled": np.array(False)})

    def fit(self, dense: Tensor, basis: Tensor) -> None:
        """Keep the largest |a_ij| |b_j| of each row; the least-squares solution for these entries."""
        kept = (dense.abs() * basis.norm(dim=2)[:, None]).topk(self.entries, dim=2).indices
        gram = basis @ basis.mT
        values = torch.zeros_like(dense)
        for a, b, g, at in zip(values, dense, gram, kept, strict=True):
            right = (b @ g).gather(1, at)[:, :, None]
            a.scatter_(1, at, (torch.linalg.pinv(g[at[:, :, None], at[:, None]], hermitian=True) @ right)[:, :, 0])
        super().fit(values, basis)
        self._know({"settled": np.array(False)})

    def settle(self) -> None:
        """Keep the mask of the present weight for good; what becomes of its other entries has no effect."""
        if not self._settled:
            mask = self._largest()
            self._know({"mask": mask_of(mask, mask.shape), "settled": np.array(True)})
            with torch.no_grad():
                self.weight.mul_(mask)

    def _largest(self) -> Tensor:
        size = self.weight.detach().abs()
        largest = size.topk(self.entries, dim=1, sorted=False).indices
        return torch.zeros_like(size, dtype=torch.bool).scatter(1, largest, True)

    def matrix(self) -> Tensor:
        """``weight`` * ``mask``."""
        if self._settled:
            return self.weight * self.constant("mask", self.weight)
        detached = self.weight.detach()
        return self.weight + (detached * self._largest() - detached)


class Repeat(Coefficients):
    """No numbers at all: derived filter i of a group is its basis filter i mod columns."""

    mixes = free = fits = False
    _like: Tensor

    def _allocate(self, **factory: Any) -> None:
        self.register_buffer("_like", torch.empty(0, **factory), persistent=False)  # knows device and dtype
        self.stored, self.products = 0, ()

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def matrix(self) -> Tensor:
        """Rows of the identity."""
        eye = torch.eye(self.columns, dtype=self._like.dtype, device=self._like.device)
        return self.derive(eye.repeat(self.groups, 1), 0)

    def combine(self, filters: Tensor) -> Tensor:
        """Copies."""
        return self._by_groups(self.derive(filters.flatten(0, 1), 0))

    def derive(self, z: Tensor, dim: int = -3) -> Tensor:
        """Copies of the basis maps of each group, which stand in dimension ``dim``."""
        copies, rest = divmod(self.rows // self.groups, self.columns)
        parts: list[Tensor] = []
        for own in z.split(self.columns, dim):
            parts += [own] * copies + [own.narrow(dim, 0, rest)] * (rest > 0)
        return torch.cat(parts, dim) if parts else z.narrow(dim, 0, 0)


def _draw(values: Tensor, terms: int) -> None:
    """Uniform with variance 1 / terms."""
    nn.init.uniform_(values, -math.sqrt(3 / terms), math.sqrt(3 / terms))


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank, (..., n, rank) times (..., rank, m), balanced."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
