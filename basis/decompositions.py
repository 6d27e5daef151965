"""What other tools make of a trained convolution: factorisations with fitted weights, for whole networks.

They are what a user would take instead of basis convolutions, at a number of parameters that is given:

- two convolutions in a row by the truncated SVD of the weight (Zhang et al. 2016, arXiv 1505.06798: C_in -> q of
  the kernel, then q -> C_out of 1x1), written here;
- the Tucker ``FactorizedConv`` of tensorly-torch;
- ``Conv_Decomposer`` of fasterai, which runs in an environment of its own (:data:`FASTERAI`).

Each gives all its layers one common size, the largest that meets the budget.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from basis.costs import count_parameters

FASTERAI = "BASIS_FASTERAI"  # environment variable: a Python that has torch, safetensors and fasterai
WORKER = Path(__file__).with_name("fasterai_worker.py")
STEPS = 20  # of bisection
SECONDS = 1800  # that the other environment may take


class NotInstalled(RuntimeError):
    """A package of somebody else that is not here; the message says how to bring it."""


def pair_of(conv: nn.Conv2d, q: int) -> nn.Sequential:
    """The two convolutions that the SVD of the weight of ``conv``, truncated to rank q, gives.

    The first takes kernel, stride, padding and dilation, the second the bias.

    Raises:
        ValueError: for grouped convolutions, and for a q that is no rank of the weight.
    """
    if conv.groups != 1:
        raise ValueError(f"the pair is for convolutions without groups, and this one has groups = {conv.groups}")
    rows, columns = conv.weight.flatten(1).shape
    if not 1 <= q <= min(rows, columns):
        raise ValueError(f"q is {q}, but it must lie between 1 and {min(rows, columns)}")
    place: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    padding: Any = conv.padding
    first = nn.Conv2d(
        conv.in_channels, q, conv.kernel_size, conv.stride, padding, conv.dilation,  # type: ignore[arg-type]
        bias=False, padding_mode=conv.padding_mode, **place,
    )  # fmt: skip
    second = nn.Conv2d(q, conv.out_channels, 1, bias=conv.bias is not None, **place)
    with torch.no_grad():
        left, values, right = torch.linalg.svd(conv.weight.double().flatten(1), full_matrices=False)
        root = values[:q].sqrt()
        first.weight.copy_((root[:, None] * right[:q]).view_as(first.weight))
        second.weight.copy_((left[:, :q] * root)[:, :, None, None])
        if conv.bias is not None and second.bias is not None:
            second.bias.copy_(conv.bias)
    return nn.Sequential(first, second)


def tucker_ranks(conv: nn.Conv2d, parameters: float) -> tuple[int, int]:
    """Ranks (of the output channels, of the input channels) of the largest Tucker convolution of that size.

    They are in the proportion of the channels; the spatial modes are left whole.

    Raises:
        ValueError: where not even ranks 1 and 1 have so few.
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


def tucker_size(conv: nn.Conv2d, out: int, into: int) -> int:
    """Weights of the Tucker convolution of these ranks: the core, and a factor for each of the four modes."""
    c_out, c_in, *kernel = conv.weight.shape
    core = out * into * kernel[0] * kernel[1]
    return core + c_out * out + c_in * into + sum(side * side for side in kernel)


def tensorly_conv(
    conv: nn.Conv2d, parameters: float, *, implementation: str = "factorized", fitted: bool = True
) -> nn.Module:
    """The Tucker ``FactorizedConv`` of tensorly-torch, with the ranks of :func:`tucker_ranks`.

    It applies the padding and the stride of ``conv``, of which it takes the first entry.

    Args:
        implementation: "factorized" convolves three times, "reconstructed" builds the dense weight first.
        fitted: whether the weight of ``conv`` is decomposed, or the layer keeps what memory holds.

    Raises:
        NotInstalled: where tensorly-torch is not installed.
        ValueError: as :func:`tucker_ranks`.
    """
    rank = (*tucker_ranks(conv, parameters), *conv.kernel_size)
    if not all(map(util.find_spec, ("tltorch", "tensorly"))):  # the one does not ask for the other
        raise NotInstalled("tensorly-torch is not installed here; `pip install tensorly tensorly-torch` brings it")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints and warns on import
        warnings.simplefilter("ignore")
        return importlib.import_module("tltorch").FactorizedConv.from_conv(
            conv, rank=rank, factorization="tucker", implementation=implementation, decompose_weights=fitted,
            fixed_rank_modes="spatial",
        )  # fmt: skip


# -- whole networks ---------------------------------------------------------------------------------


def svd_pairs(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` whose convolutions are pairs (:func:`pair_of`), all at one fraction of the full rank.

    The fraction is the largest at which the network has at most ``parameters``. Convolutions that a pair would not
    make smaller stay as they are, and so do grouped ones and those in ``exclude``.

    Raises:
        ValueError: where no fraction is small enough.
    """

    def rank(conv: nn.Conv2d, ratio: float) -> int:
        rows, columns = conv.weight.flatten(1).shape
        q = max(1, int(ratio * min(rows, columns)))
        return q if q * (rows + columns) < rows * columns else 0

    def size(conv: nn.Conv2d, ratio: float) -> int:
        rows, columns = conv.weight.flatten(1).shape
        return rank(conv, ratio) * (rows + columns) or rows * columns

    convs = _convolutions(model, exclude)
    ratio = _common(convs, count_parameters(model), parameters, size)
    return _replaced(model, {name: pair_of(conv, q) for name, conv in convs.items() if (q := rank(conv, ratio))})


def tensorly_network(model: nn.Module, parameters: int, exclude: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` with fitted :func:`tensorly_conv` layers, each with one common share of its parameters.

    Args and errors are those of :func:`svd_pairs`, and :class:`NotInstalled`.
    """
    convs = _convolutions(model, exclude)
    least = {name: tucker_size(conv, 1, 1) for name, conv in convs.items()}
    convs = {name: conv for name, conv in convs.items() if least[name] < conv.weight.numel()}

    def ranks(conv: nn.Conv2d, share: float) -> tuple[int, int]:
        return tucker_ranks(conv, max(tucker_size(conv, 1, 1), share * conv.weight.numel()))

    share = _common(convs, count_parameters(model), parameters, lambda conv, s: tucker_size(conv, *ranks(conv, s)))
    sizes = {name: tucker_size(conv, *ranks(conv, share)) for name, conv in convs.items()}
    return _replaced(model, {name: tensorly_conv(conv, sizes[name]) for name, conv in convs.items()})


def _common(
    convs: Mapping[str, nn.Conv2d], dense: int, parameters: int, size: Callable[[nn.Conv2d, float], int]
) -> float:
    """The largest setting in (0, 1) at which a network of ``dense`` parameters has at most ``parameters``.

    ``size`` gives the weights that a convolution has at a setting.

    Raises:
        ValueError: where there is none.
    """
    others = dense - sum(conv.weight.numel() for conv in convs.values())

    def count(setting: float) -> int:
        return others + sum(size(conv, setting) for conv in convs.values())

    low, high = 0.0, 1.0
    if count(low) > parameters:
        raise ValueError(f"{count(low):,} parameters are the fewest that one setting for all layers leaves, "
                         f"which is above {parameters:,}")  # fmt: skip
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return low


def _convolutions(model: nn.Module, exclude: Iterable[str]) -> dict[str, Any]:
    """The convolutions without groups by name, but those in ``exclude``."""
    left = set(exclude)
    convs = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    missing = sorted(left - set(convs))
    if missing:
        raise ValueError(f"exclude has {', '.join(missing)}, but no convolution has such a name")
    return {name: conv for name, conv in convs.items() if name not in left and conv.groups == 1}


def _replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of ``model`` with these modules in place of those of their names."""
    copied = copy.deepcopy(model)
    for name, module in new.items():
        old = copied.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, module.train(old.training))
    return copied


# -- fasterai, in its own environment ---------------------------------------------------------------


def fasterai_python() -> str:
    """The Python that has fasterai: the one that :data:`FASTERAI` names, else this one.

    Raises:
        NotInstalled: where there is none.
    """
    named = os.environ.get(FASTERAI)
    if named:
        if not Path(named).is_file():
            raise NotInstalled(f"{FASTERAI} names {named}, which is no file; it must be a Python that has fasterai")
        return named
    if util.find_spec("fasterai") is None:
        raise NotInstalled(
            f"fasterai is not installed here; make it an environment of its own (python -m venv fasterai; "
            f"fasterai/bin/pip install fasterai safetensors) and set {FASTERAI}=fasterai/bin/python"
        )
    return sys.executable


def fasterai_network(
    model: nn.Module, parameters: int, exclude: Iterable[str] = (), *, method: str = "tucker"
) -> nn.Module:
    """A copy of ``model`` as fasterai's ``Conv_Decomposer`` decomposes it, at most ``parameters`` large.

    Its one setting, the part of the ranks that is removed from every layer, is found by bisection. The weights go
    to :func:`fasterai_python` and come back as safetensors. It leaves 1x1 and grouped convolutions alone, and
    knows zero padding only.

    Args:
        method: of fasterai, "tucker" (its default) or "svd". Its others are no approximations of the weight.

    Raises:
        NotInstalled: where fasterai is not installed; ValueError: where no setting is small enough.
        RuntimeError: where fasterai fails; the message has its last lines.
    """
    convs = {name: conv for name, conv in _convolutions(model, exclude).items() if _plain(conv)}
    about = {name: _geometry(conv) for name, conv in convs.items()}
    others = count_parameters(model) - sum(conv.weight.numel() for conv in convs.values())
    request = {"layers": about, "method": method, "parameters": parameters - others}
    tensors = {name: conv.weight.detach().cpu().contiguous() for name, conv in convs.items()}
    made, told = _ask_fasterai(tensors, request)
    new = {}
    for name, shapes in told["layers"].items():
        parts = [nn.Conv2d(**shape, bias=False) for shape in shapes]
        for index, part in enumerate(parts):
            part.weight = nn.Parameter(made[f"{name}/{index}"].to(convs[name].weight))
        if convs[name].bias is not None:
            parts[-1].bias = nn.Parameter(convs[name].bias.detach().clone())
        new[name] = nn.Sequential(*parts)
    return _replaced(model, new)


def _plain(conv: Any) -> bool:
    return min(conv.kernel_size) > 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(conv, name) for name in names}


def _ask_fasterai(
    tensors: Mapping[str, Tensor], request: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The decomposed weights, and what the worker says of them."""
    python = fasterai_python()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "dense.safetensors", Path(folder) / "decomposed.safetensors"
        safetensors.torch.save_file(dict(tensors), source, {"request": json.dumps(request)})
        # -I: neither this package's folder nor this environment's variables reach the other one.
        command = [python, "-I", str(WORKER), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 3:
            raise ValueError(done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"fasterai failed: {' '.join(done.stderr.strip().splitlines()[-2:])}")
        with safe_open(target, framework="pt") as file:
            made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return made, json.loads(file.metadata()["answer"])
