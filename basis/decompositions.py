"""What a user would take instead of basis convolutions: other factorisations of trained convolutions.

Two convolutions in a row by the truncated SVD of the weight (Zhang et al. 2016, arXiv 1505.06798), and the Tucker
``FactorizedConv`` of tensorly-torch. Whole networks have one setting for all layers, the largest that meets a budget.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from basis.costs import count_parameters

STEPS = 20  # of bisection


def pair_of(conv: nn.Conv2d, q: int) -> nn.Sequential:
    """The convolutions C_in -> q -> C_out (1x1) of the SVD of the weight; ``ValueError`` where q is no rank of it."""
    ranks = min(conv.weight.flatten(1).shape)
    if conv.groups != 1 or not 1 <= q <= ranks:
        raise ValueError(f"groups is {conv.groups} and q is {q}, but they must be 1 and a rank from 1 to {ranks}")
    options: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    spatial: dict[str, Any] = {name: getattr(conv, name) for name in names}
    first = nn.Conv2d(conv.in_channels, q, **spatial, bias=False, **options)
    second = nn.Conv2d(q, conv.out_channels, 1, bias=conv.bias is not None, **options)
    with torch.no_grad():
        left, values, right = torch.linalg.svd(conv.weight.double().flatten(1), full_matrices=False)
        root = values[:q].sqrt()
        first.weight.copy_((root[:, None] * right[:q]).view_as(first.weight))
        second.weight.copy_((left[:, :q] * root)[:, :, None, None])
        if conv.bias is not None and second.bias is not None:
            second.bias.copy_(conv.bias)
    return nn.Sequential(first, second)


def tucker_size(conv: nn.Conv2d, out: int, into: int) -> int:
    """Weights of the Tucker convolution of these ranks: the core, and a factor for each of the four modes."""
    c_out, c_in, *kernel = conv.weight.shape
    return out * into * kernel[0] * kernel[1] + c_out * out + c_in * into + sum(side * side for side in kernel)


def tucker_ranks(conv: nn.Conv2d, parameters: float) -> tuple[int, int]:
    """Ranks (output, input channels) of the largest Tucker convolution of that size; ``ValueError`` where none is."""
    c_out, c_in, *_ = conv.weight.shape
    total = c_out + c_in

    def ranks(both: int) -> tuple[int, int]:
        out = min(max(1, round(both * c_out / total)), both - 1)
        return out, both - out

    found = bisect.bisect_right(range(2, total + 1), parameters, key=lambda both: tucker_size(conv, *ranks(both)))
    if not found:
        least = tucker_size(conv, 1, 1)
        raise ValueError(f"a Tucker convolution has at least {least} parameters, which is above {parameters:.0f}")
    return ranks(found + 1)


def tensorly_conv(
    conv: nn.Conv2d, parameters: float, *, implementation: str = "factorized", fitted: bool = True
) -> nn.Module:
    """The Tucker ``FactorizedConv`` of tensorly-torch, with the ranks of :func:`tucker_ranks`; kernels stay whole.

    ``implementation``: "factorized" convolves three times, "reconstructed" builds the dense weight first. Where not
    ``fitted``, the layer keeps what memory holds. Raises ``ModuleNotFoundError`` without tensorly-torch, and what
    :func:`tucker_ranks` raises.
    """
    rank = (*tucker_ranks(conv, parameters), *conv.kernel_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints and warns on import
        warnings.simplefilter("ignore")
        factorized = importlib.import_module("tltorch").FactorizedConv
        return factorized.from_conv(
            conv, rank=rank, factorization="tucker", implementation=implementation, decompose_weights=fitted,
            fixed_rank_modes="spatial",
        )  # fmt: skip


def svd_pairs(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` whose convolutions are pairs (:func:`pair_of`), all at one fraction of the full rank.

    The fraction is the largest at which the network has at most ``parameters``; ``ValueError`` where there is none.
    Convolutions that would not get smaller stay as they are, as do grouped ones and those in ``exclude``.
    """

    def rank(conv: nn.Conv2d, ratio: float) -> int:
        return max(1, int(ratio * min(conv.weight.flatten(1).shape)))

    def size(conv: nn.Conv2d, ratio: float) -> int:
        return rank(conv, ratio) * sum(conv.weight.flatten(1).shape)

    return _shrunk(model, parameters, exclude, size, lambda conv, ratio: pair_of(conv, rank(conv, ratio)))


def tensorly_network(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """:func:`svd_pairs` with fitted :func:`tensorly_conv` layers, each with one common share of its parameters."""

    def size(conv: nn.Conv2d, share: float) -> int:
        wanted = max(tucker_size(conv, 1, 1), share * conv.weight.numel())
        return tucker_size(conv, *tucker_ranks(conv, wanted))

    return _shrunk(model, parameters, exclude, size, lambda conv, share: tensorly_conv(conv, size(conv, share)))


def _shrunk(
    model: nn.Module, parameters: int, exclude: Iterable[str], size: Callable[[nn.Conv2d, float], int],
    make: Callable[[nn.Conv2d, float], nn.Module],
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` with what ``make`` gives, where it is smaller by ``size``, its number of weights.

    All at one setting, the largest in [0, 1) that fits.
    """
    left = set(exclude)
    convs: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    if missing := sorted(left - set(convs)):
        raise ValueError(f"exclude has {', '.join(missing)}, but no convolution has such a name")
    convs = {name: conv for name, conv in convs.items() if name not in left and conv.groups == 1}
    whole = count_parameters(model)

    def count(at: float) -> int:
        return whole - sum(max(0, conv.weight.numel() - size(conv, at)) for conv in convs.values())

    low, high = 0.0, 1.0
    if count(low) > parameters:
        raise ValueError(f"one setting for all layers leaves at least {count(low):,}, which is above {parameters:,}")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    copied = copy.deepcopy(model)
    for name, conv in convs.items():
        if size(conv, low) < conv.weight.numel():
            copied.set_submodule(name, make(conv, low).train(conv.training))
    return copied
