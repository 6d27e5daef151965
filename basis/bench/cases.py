"""Speed of single layers and blocks against dense twins: one function, and a table of kinds with their candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import util
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from basis.bench.cells import Cell, measure_cells, with_pytorchs_norms
from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS, RESNET18_SHAPES, WRN_SHAPES, Shape
from basis.bench.timing import PASSES, Pass, Progress, Setting
from basis.costs import count_parameters
from basis.decompositions import tensorly_conv
from basis.layers.batchnorm import activate
from basis.layers.conv import MODES, BasisConv2d, basis_channels_for
from basis.layers.structured import LAYERS, Structure
from basis.substitution import substitute

ABOVE = 0.01  # a baseline may have that part more parameters than the basis layer, where its rank is coarse


class Block(nn.Module):
    """Convolution, batch normalisation, ReLU; as in the ResNets."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        """From (N, C_in, H, W) to (N, C_out, H', W')."""
        return activate(self.bn, self.conv(x))


def svd_pair(shape: Shape, parameters: int) -> nn.Sequential:
    """A 3x3 convolution C_in -> q, then one q -> C_out of 1x1, as a truncated SVD of the weight gives them.

    q is the largest with at most 1 % more weights than ``parameters`` (X. Zhang et al. 2016, arXiv 1505.06798).
    """
    conv = shape.conv()
    q = int((1 + ABOVE) * parameters / (conv.weight[0].numel() + conv.out_channels))
    if q < 1:
        raise ValueError(f"no pair of convolutions has as few as {parameters} parameters")
    first = nn.Conv2d(conv.in_channels, q, 3, shape.stride, 1, bias=False)
    return nn.Sequential(first, nn.Conv2d(q, conv.out_channels, 1, bias=False))


def tucker_conv(shape: Shape, parameters: int, *, implementation: str = "factorized") -> nn.Module:
    """tensorly-torch's Tucker convolution with at most 1 % more parameters than ``parameters``, new weights."""
    conv = shape.conv()
    layer: Any = tensorly_conv(conv, (1 + ABOVE) * parameters, implementation=implementation, fitted=False)
    layer.reset_parameters(std=(3 * conv.weight[0].numel()) ** -0.5)  # the spread of nn.Conv2d's own weights
    return layer


# What a user would take instead, with as many parameters as the basis layer.
BASELINES: Mapping[str, Callable[[Shape, int], nn.Module]] = {
    "dense": lambda shape, parameters: shape.conv(),
    "svd": svd_pair,
    "tucker": tucker_conv,
    "tucker reconstructed": lambda shape, n: tucker_conv(shape, n, implementation="reconstructed"),
}


def layer_of(name: str, shape: Shape, ratio: float) -> nn.Module:
    """The layer of a candidate: a mode, "basis" (mode auto), a baseline, or the text of a structured layer."""
    k = basis_channels_for(ratio, shape.out_channels)
    if name in (*MODES, "basis"):
        mode: Any = "auto" if name == "basis" else name
        return BasisConv2d.shaped_like(shape.conv(), basis_channels=k, mode=mode)
    if name in BASELINES:
        return BASELINES[name](shape, count_parameters(BasisConv2d.shaped_like(shape.conv(), basis_channels=k)))
    structure = Structure.parse(name)
    return LAYERS[structure.kind].shaped_like(shape.conv(), size=structure.size)


def block_of(name: str, shape: Shape, ratio: float) -> nn.Module:
    """The block of a candidate: a mode, or "through_basis" (batch normalisation through the basis).

    Or "dense", or "ordinary": the dense one whose normalisation is PyTorch's own, which is fused nowhere.
    """
    block = Block(shape.conv(), nn.BatchNorm2d(shape.out_channels))
    if name in ("dense", "ordinary"):
        return with_pytorchs_norms(block) if name == "ordinary" else block
    norm: Any = "through_basis" if name == "through_basis" else "ordinary"
    mode: Any = "auto" if name == "through_basis" else name
    return substitute(block, ratio=ratio, mode=mode, init="random", batch_norm=norm)


class Case(NamedTuple):
    """A kind of benchmark: how its candidates are made, which there are by default, and where."""

    make: Callable[[str, Shape, float], nn.Module]
    candidates: Sequence[str]
    shapes: Sequence[str]
    passes: Sequence[Pass]


CASES: Mapping[str, Case] = {
    "layer": Case(layer_of, MODES, RESNET18_SHAPES, PASSES),
    "rivals": Case(layer_of, ("basis", "svd", "tucker", "tucker reconstructed"), RESNET18_SHAPES, PASSES),
    "block": Case(block_of, (*MODES, "through_basis"), RESNET18_SHAPES, PASSES[1:]),
    "structured": Case(layer_of, (), WRN_SHAPES, PASSES[1:]),
}
Kind = Literal["layer", "rivals", "block", "structured"]


def bench_layers(
    kind: Kind = "layer", *, shapes: Sequence[str] | None = None, ratios: Sequence[float] = RATIOS,
    passes: Sequence[Pass] | None = None, candidates: Sequence[str] | None = None, setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:  # fmt: skip
    """Measure layers or blocks against the one with ``nn.Conv2d``; a cell is a shape, a pass and a ratio.

    "forward" is inference; "forward+backward" takes the gradients of the input and of all parameters.
    ``versus_basis`` is basis / candidate within a round, and "through_basis" against mode auto. ``left_out`` in the
    options names what is not installed.

    Args:
        kind: of :data:`CASES`, which gives what else is not given.
        shapes: 3x3 convolutions, see :class:`Shape`.
        candidates: see :func:`layer_of` and :func:`block_of`. One that cannot be made in a shape or run has ``error``.

    Raises ``ValueError`` for a shape, ratio, layer or setting that makes no sense.
    """
    case = CASES[kind]
    passes, given = passes or case.passes, case.candidates if candidates is None else candidates
    for name in given if kind != "block" else ():
        if name not in (*MODES, "basis", *BASELINES):
            Structure.parse(name)  # refuses what is no candidate
    parsed = [Shape.parse(text) for text in shapes or case.shapes]
    with torch.device("meta"):
        setting = (setting or Setting()).settled(nn.ModuleList([shape.conv() for shape in parsed]))
    installed = all(map(util.find_spec, ("tltorch", "tensorly")))  # the one does not ask for the other
    left_out = {} if installed else {n: "tensorly-torch is not installed" for n in given if "tucker" in n}
    names = [name for name in given if name not in left_out]
    each_ratio = ratios if kind != "structured" else (1.0,)
    cells = [_cell(kind, names, *place) for place in itertools.product(parsed, passes, each_ratio)]
    rows = measure_cells(cells, setting, progress)
    options = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "passes": list(passes)}
    return setting.report(f"bench-{kind}", rows, **options, candidates=list(given), left_out=left_out)


def _cell(kind: Kind, names: Sequence[str], shape: Shape, one: Pass, ratio: float) -> Cell:
    about: dict[str, Any] = {"shape": str(shape), "pass": one, "resolved": "dense"}
    rows: dict[str, dict[str, Any]] = {}
    if kind == "structured":
        rows = {"control": {"layer": "dense"}, **{name: {"layer": name, "mode": "layer"} for name in names}}
    else:
        about |= {"ratio": ratio, "basis_channels": basis_channels_for(ratio, shape.out_channels)}
    makes = {name: partial(CASES[kind].make, name, shape, ratio) for name in ("dense", *names)}
    versus = {"through_basis": "auto", **{name: "basis" for name in names if name != "basis" and "basis" in names}}
    inputs = ((shape.in_channels, shape.size, shape.size),)
    return Cell(about=about, candidates=makes, rows=rows, inputs=inputs, versus=versus)
