"""Pointwise maps that are products of diagonal and cosine-transform matrices (Moczulski et al. 2015, 1511.05946)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import New, whole
from basis.layers.structured.separable import Separable


def riffle(n: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) the even numbers below ``n``, then the odd ones."""
    order = torch.arange(n, device=device)
    return torch.cat([order[::2], order[1::2]])


def _transforms(n: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine transform (DCT-II, not normalised) and its inverse, (n, n), with columns riffled."""
    order, i = riffle(n, like.device), torch.arange(n, device=like.device)[:, None]
    angles = torch.arange(4 * n, dtype=torch.float64, device=like.device) * (math.pi / (2 * n))
    cosines = angles.cos().to(like.dtype)
    inverse = cosines[i * (2 * order + 1) % (4 * n)] / n
    return 2 * cosines[(2 * i + 1) * order % (4 * n)], torch.cat([inverse[:1] / 2, inverse[1:]])


class ACDCConv2d(Separable):
    """Depthwise convolution and a map of n - 1 factors A C P D C^-1 P, each of size N = max(C_in, C_out).

    C is the cosine transform, P a riffle of its columns, A and D are diagonal; the name says n, as in Gray et
    al., whose code drops the last. Input channels are repeated up to N, adjacent output channels are summed.

    Parameters:
        a, d: (n - 1, N), the diagonals; drawn from N(1, 0.01^2).
    """

    kind = "acdc"
    sizes = "N: one more than the number of factors"

    def _build(self, new: New) -> None:
        super()._build(new)
        factors, n = whole(self.size, self.kind) - 1, max(self.in_channels, self.out_channels)
        if not factors:
            raise ValueError(f"{self.text} has no factors: its size is one more than their number, so at least 2")
        if n % 2 or n % self.out_channels:
            shape = f"{self.in_channels} -> {self.out_channels}"
            raise ValueError(f"acdc needs an even number of channels, and C_out to divide C_in if smaller, not {shape}")
        self.a, self.d = new(factors, n), new(factors, n)
        self.building = factors * 2 * n * n * self.in_channels

    def _draw_map(self) -> None:
        nn.init.normal_(self.a, 1, 0.01)
        nn.init.normal_(self.d, 1, 0.01)

    def _matrix(self) -> Tensor:
        n, c = self.a.shape[1], self.in_channels
        # The first channels again until their number divides N, and all of them again until there are N.
        padded = next(k for k in range(min(c, n), n + 1) if n % k == 0)
        repeated = torch.arange(n, device=self.a.device) % padded % c
        forward, inverse = _transforms(n, like=self.a)
        matrix = torch.eye(c, dtype=self.a.dtype, device=self.a.device)[repeated]
        for a, d in zip(reversed(self.a[:, :, None].unbind()), reversed(self.d[:, :, None].unbind()), strict=True):
            matrix = a * (forward @ (d * (inverse @ matrix)))
        return matrix.view(self.out_channels, -1, c).sum(1)
