"""What other tools make of a trained convolution: factorisations with fitted weights, for whole networks.

They are what a user would take instead of basis convolutions, at a number of parameters that is given: two
convolutions in a row by the truncated SVD of the weight (Zhang et al. 2016, arXiv 1505.06798), the Tucker
``FactorizedConv`` of tensorly-torch, and the ``Conv_Decomposer`` of fasterai. Each gives all its layers one common
setting, the largest that meets the budget.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from basis.costs import count_parameters

STEPS = 20  # of bisection


class NotInstalled(RuntimeError):
    """A package of somebody else that is not here; the message says how to bring it."""


def pair_of(conv: nn.Conv2d, q: int) -> nn.Sequential:
    """The two convolutions C_in -> q -> C_out (1x1) of the SVD of the weight of ``conv``, truncated to rank q.

    Raises ``ValueError`` for grouped convolutions, and for a q that is no rank of the weight.
    """
    rows, columns = conv.weight.flatten(1).shape
    if conv.groups != 1:
        raise ValueError(f"the pair is for convolutions without groups, and this one has groups = {conv.groups}")
    if not 1 <= q <= min(rows, columns):
        raise ValueError(f"q is {q}, but it must lie between 1 and {min(rows, columns)}")
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
    """Ranks (output channels, input channels) of the largest Tucker convolution of that size, in their proportion.

    Raises ``ValueError`` where not even ranks 1 and 1 have so few.
    """
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

    Args:
        implementation: "factorized" convolves three times, "reconstructed" builds the dense weight first.
        fitted: whether the weight of ``conv`` is decomposed, or the layer keeps what memory holds.

    Raises :class:`NotInstalled`, and ``ValueError`` as :func:`tucker_ranks`.
    """
    rank = (*tucker_ranks(conv, parameters), *conv.kernel_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints and warns on import
        warnings.simplefilter("ignore")
        return _needed("tltorch", "tensorly tensorly-torch").FactorizedConv.from_conv(
            conv, rank=rank, factorization="tucker", implementation=implementation, decompose_weights=fitted,
            fixed_rank_modes="spatial",
        )  # fmt: skip


def _needed(module: str, packages: str) -> ModuleType:
    """A module of somebody else; ``NotInstalled`` says which ``packages`` bring it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalled(f"{module} cannot be imported here; `pip install {packages}` brings it") from error


# -- whole networks ---------------------------------------------------------------------------------


def svd_pairs(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` whose convolutions are pairs (:func:`pair_of`), all at one fraction of the full rank.

    The fraction is the largest at which the network has at most ``parameters``; ``ValueError`` where there is none.
    Convolutions that would not get smaller stay as they are, and so do grouped ones and those in ``exclude``.
    """

    def rank(conv: nn.Conv2d, ratio: float) -> int:
        rows, columns = conv.weight.flatten(1).shape
        q = max(1, int(ratio * min(rows, columns)))
        return q if q * (rows + columns) < rows * columns else 0

    def size(conv: nn.Conv2d, ratio: float) -> int:
        rows, columns = conv.weight.flatten(1).shape
        return rank(conv, ratio) * (rows + columns) or rows * columns

    def make(conv: nn.Conv2d, ratio: float) -> nn.Module:
        return pair_of(conv, q) if (q := rank(conv, ratio)) else conv

    return _shrunk(model, parameters, exclude, size, make)


def tensorly_network(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` with fitted :func:`tensorly_conv` layers, each with one common share of its parameters.

    Args and errors are those of :func:`svd_pairs`, and :class:`NotInstalled`.
    """

    def size(conv: nn.Conv2d, share: float) -> int:
        least, dense = tucker_size(conv, 1, 1), conv.weight.numel()
        return dense if least >= dense else tucker_size(conv, *tucker_ranks(conv, max(least, share * dense)))

    def make(conv: nn.Conv2d, share: float) -> nn.Module:
        return tensorly_conv(conv, size(conv, share)) if tucker_size(conv, 1, 1) < conv.weight.numel() else conv

    return _shrunk(model, parameters, exclude, size, make)


def fasterai_network(
    model: nn.Module, parameters: int, exclude: Iterable[str] = (), *, method: str = "tucker"
) -> nn.Module:
    """A copy of ``model`` as fasterai's ``Conv_Decomposer`` decomposes it, at most ``parameters`` large.

    Its one setting is the part of the ranks that is removed from every layer; ``method`` is "tucker" or "svd". It
    leaves 1x1 and grouped convolutions alone, and knows zero padding only. Raises :class:`NotInstalled` where fasterai
    cannot be imported, and ``ValueError`` where no setting is small enough.
    """
    decomposer = _needed("fasterai.misc.conv_decomposer", "fasterai").Conv_Decomposer()
    convs = {
        name: conv
        for name, conv in _convolutions(model, exclude).items()
        if min(conv.kernel_size) > 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    }
    bare = nn.ModuleList(copy.deepcopy(list(convs.values())))
    for conv in bare:
        conv.register_parameter("bias", None)
    shapes, others = copy.deepcopy(bare).to("meta"), count_parameters(model) - count_parameters(bare)

    def decompose(layers: nn.Module, kept: float, iterations: int) -> Any:
        removed = min(1 - kept, 1 - 1e-9)  # all of it is not allowed
        return decomposer.decompose(copy.deepcopy(layers), percent_removed=removed, method=method, n_iter=iterations)

    kept = _common(lambda kept: others + count_parameters(decompose(shapes, kept, 0)), parameters)
    made = dict(zip(convs, decompose(bare, kept, 10), strict=True))
    for name, conv in convs.items():
        last = made[name][-1] if isinstance(made[name], nn.Sequential) else made[name]
        last.bias = copy.deepcopy(conv.bias)
    return _replaced(model, made)


def _shrunk(
    model: nn.Module,
    parameters: int,
    exclude: Iterable[str],
    size: Callable[[nn.Conv2d, float], int],
    make: Callable[[nn.Conv2d, float], nn.Module],
) -> nn.Module:
    """``model`` with what ``make`` gives for each convolution, whose weights ``size`` counts, at one setting."""
    convs = _convolutions(model, exclude)
    others = count_parameters(model) - sum(conv.weight.numel() for conv in convs.values())
    setting = _common(lambda at: others + sum(size(conv, at) for conv in convs.values()), parameters)
    return _replaced(model, {name: make(conv, setting) for name, conv in convs.items()})


def _common(count: Callable[[float], int], parameters: int) -> float:
    """The largest setting in [0, 1) at which ``count`` is at most ``parameters``."""
    low, high = 0.0, 1.0
    if count(low) > parameters:
        fewest = f"{count(low):,} parameters are the fewest that one setting for all layers leaves"
        raise ValueError(f"{fewest}, which is above {parameters:,}")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return low


def _convolutions(model: nn.Module, exclude: Iterable[str]) -> dict[str, Any]:
    """The convolutions without groups by name, but those in ``exclude``."""
    left = set(exclude)
    convs = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    if missing := sorted(left - set(convs)):
        raise ValueError(f"exclude has {', '.join(missing)}, but no convolution has such a name")
    return {name: conv for name, conv in convs.items() if name not in left and conv.groups == 1}


def _replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of ``model`` with these modules in place of those of their names."""
    copied = copy.deepcopy(model)
    for name, module in new.items():
        if model.get_submodule(name) is not module:
            copied.set_submodule(name, module.train(copied.get_submodule(name).training))
    return copied
