"""Moments of what convolutions give on data, and the subspaces that keep most of it.

With y the outputs of a convolution over all images and pixels, and U_k the k leading eigenvectors of their covariance,
``W_k = U_k U_k^T W`` with the bias ``b + (I - U_k U_k^T) (mean of y - b)`` is nearest of rank k (X. Zhang et al. 2016,
arXiv 1505.06798, section 2.1). Where no bias or batch normalisation can hold a constant, the second moment about zero
takes the place of the covariance.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from basis.batches import outputs_of
from basis.inputs import Inputs
from basis.layers.norm_pairs import norms_after
from basis.modules import evaluating, hooked

CHUNK = 2**23  # numbers of a layer's output that are looked at together


class Moments:
    """Mean and scatter of a layer's outputs by groups, merged as Chan, Golub and LeVeque (1979) do, in float64.

    ``n`` counts outputs (pixels of images), ``mean`` is (groups, C_out / groups, 1), and ``scatter`` the sum of
    (y - mean)(y - mean)^T, (groups, C_out / groups, C_out / groups).
    """

    def __init__(self) -> None:
        self.n, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def add_maps(self, y: Tensor, groups: int) -> None:
        """``y``: maps (N, C_out, H, W) or (C_out, H, W)."""
        maps = y.detach() if y.dim() == 4 else y.detach()[None]
        for part in maps.split(max(1, CHUNK // max(1, maps[:1].numel()))):
            rows = part.movedim(1, 0).reshape(groups, maps.shape[1] // groups, -1)
            if rows.numel():
                self._add(rows if rows.dtype == torch.float64 else rows.float())

    def _add(self, rows: Tensor) -> None:
        n, mean = rows.shape[-1], rows.mean(-1, keepdim=True)
        centred = rows - mean
        scatter, mean = (centred @ centred.mT).double(), mean.double()
        if self.n:
            apart = mean - self.mean
            scatter = self.scatter + scatter + apart @ apart.mT * (self.n * n / (self.n + n))
            mean = self.mean + apart * (n / (self.n + n))
        self.n, self.mean, self.scatter = self.n + n, mean, scatter

    @property
    def finite(self) -> bool:
        """Whether every output was finite."""
        return bool(self.scatter.isfinite().all())

    def centred(self) -> Moments:
        """The moments of the same outputs less their mean."""
        other = copy.copy(self)
        other.mean = torch.zeros_like(self.mean)
        return other

    def second(self, *, about_mean: bool, groups: int | None = None) -> Tensor:
        """The covariance, or the second moment about zero: (groups, width, width); ``groups`` may split those of y."""
        moment = self.scatter / self.n
        if not about_mean:
            moment = moment + self.mean @ self.mean.mT
        parts = (groups or len(moment)) // len(moment)
        width = moment.shape[1] // parts
        cut = moment.view(len(moment), parts, width, parts, width).diagonal(dim1=1, dim2=3)  # (g, width, width, parts)
        return cut.movedim(-1, 1).reshape(-1, width, width)


@torch.no_grad()
def output_moments(model: nn.Module, layers: Sequence[str], inputs: Iterable[Inputs]) -> dict[str, Moments]:
    """The moments of the outputs of these convolutions, in one forward pass in evaluation mode."""
    moments = {name: Moments() for name in layers}

    def add(own: Moments, module: Any, args: tuple, y: Tensor) -> None:
        own.add_maps(y, module.groups)

    with hooked(model, {name: partial(add, own) for name, own in moments.items()}), evaluating(model):
        for x in inputs:
            outputs_of(model, x)
    return moments


def taking_means(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Name of a convolution without bias -> name of the batch normalisation that takes what its mean loses."""
    pairs = norms_after(model, inputs)
    return {conv: norm for conv, norm in pairs.items() if model.get_submodule(conv).bias is None}


def untied(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Those of the layers whose bias, if they have one, belongs to no other module too."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return [name for name in layers if owners[id(model.get_submodule(name).bias)] < 2]


@torch.no_grad()
def directions(second: Tensor, weight: Tensor) -> Tensor:
    """Orthonormal directions, columns of (groups, width, width), from most to least of ``second``, of equal shape.

    Directions in which the outputs do not vary are those of the SVD of the rest of ``weight``, (groups, width, F).
    """
    second, weight = second.double(), weight.double()
    energies, vectors = (values.flip(-1) for values in torch.linalg.eigh(second))
    bound = energies[:, :1].clamp_min(0) * second.shape[1] * torch.finfo(torch.float32).eps
    ranks = (energies > bound).sum(1).tolist()  # of what is more than rounding in the products of float32
    turned = []
    for own, rank, block in zip(vectors, ranks, weight, strict=True):
        rest = own[:, rank:]
        seen = rest.mT @ block
        if rest.shape[1] > 1:
            rest = rest @ torch.linalg.eigh(seen @ seen.mT)[1].flip(-1)
        turned.append(torch.cat([own[:, :rank], rest], dim=1))
    return torch.stack(turned)


def lost_mean(mixing: Tensor, mean: Tensor) -> Tensor:
    """What outputs of mean ``mean`` (g, width, 1) lose by projection on the columns of ``mixing`` (g, width, k)."""
    mixing, mean = mixing.double(), mean.double()
    return mean - mixing @ (torch.linalg.pinv(mixing) @ mean)
