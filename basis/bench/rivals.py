"""What a user would take instead of a basis convolution: the same layer by other means, at equal parameters.

Dense layers, eager and compiled; two convolutions in a row, as a truncated SVD of the weight gives them
(Zhang et al. 2016, arXiv 1505.06798: C_in -> q, 3x3, then q -> C_out, 1x1); and the Tucker convolutions of
tensorly-torch, the other package with factorized convolutions, where it is installed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, util
from typing import Any

from torch import nn

from basis.bench.timing import (
    PASSES,
    RATIOS,
    RESNET18_SHAPES,
    BenchReport,
    Pass,
    Progress,
    Setting,
    Shape,
    check_known,
    check_options,
    forget_compiled,
    layer_steps,
    tell,
)
from basis.costs import count_parameters
from basis.decompositions import tensorly_conv
from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.training.stepping import compiled

ABOVE = 0.01  # a rival may have that part more parameters than the basis layer, where its rank is coarse


def svd_pair(conv: nn.Conv2d, parameters: int) -> nn.Sequential:
    """A convolution C_in -> q of the kernel, stride and padding of ``conv``, then one q -> C_out of 1x1.

    New weights, no bias; q is the largest with at most 1 % more than ``parameters`` weights.

    Raises:
        ValueError: where not even q = 1 has so few.
    """
    each = conv.weight[0].numel() + conv.out_channels
    q = int((1 + ABOVE) * parameters / each)
    if q < 1:
        raise ValueError(f"a pair of convolutions has at least {each} parameters, which is above {parameters}")
    padding: Any = conv.padding
    first = nn.Conv2d(conv.in_channels, q, conv.kernel_size, conv.stride, padding, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(first, nn.Conv2d(q, conv.out_channels, 1, bias=False))


def tucker_conv(conv: nn.Conv2d, parameters: int, *, implementation: str = "factorized") -> nn.Module:
    """:func:`basis.decompositions.tensorly_conv` with new weights, at most 1 % more than ``parameters``.

    Raises:
        NotInstalled: where tensorly-torch is not installed.
        ValueError: where not even ranks 1 and 1 have so few.
    """
    layer: Any = tensorly_conv(conv, (1 + ABOVE) * parameters, implementation=implementation, fitted=False)
    layer.reset_parameters(std=(3 * conv.weight[0].numel()) ** -0.5)  # the spread of nn.Conv2d's own weights
    return layer


# Name -> the layer like a dense one, with as many parameters as a basis layer has.
RIVALS: Mapping[str, Callable[[nn.Conv2d, int], nn.Module]] = {
    "dense": lambda conv, parameters: conv,
    "svd": svd_pair,
    "tucker": tucker_conv,
    "tucker reconstructed": lambda conv, n: tucker_conv(conv, n, implementation="reconstructed"),
}
# "X compiled" is X after torch.compile(fullgraph=True).
CANDIDATES = tuple(f"{name}{how}" for name in ("basis", *RIVALS) for how in ("", " compiled") if name + how != "dense")
USUAL = ("dense compiled", "basis", "basis compiled", "svd", "tucker", "tucker reconstructed")


def bench_rivals(
    *,
    shapes: Sequence[str] = RESNET18_SHAPES,
    ratios: Sequence[float] = RATIOS,
    passes: Sequence[Pass] = PASSES,
    candidates: Sequence[str] = USUAL,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure basis layers in mode auto and their rivals against ``nn.Conv2d``; a cell is a shape, a pass and a ratio.

    Each row has ``parameters`` (weights; those of the basis layer, of its rivals at most 1 % more and as near
    as their ranks allow) and ``versus_basis``, basis / candidate within a round: above 1 where the candidate
    is the faster. Compiled candidates are compared with the compiled basis layer, where it is among them.
    A candidate that cannot be made or run has ``error`` and no times. ``left_out`` in the options says what
    was not measured at all, because it is not installed.

    Args:
        candidates: of :data:`CANDIDATES`, beside the dense layer and its control. Compiling takes seconds each.

    Raises:
        ValueError: for a shape, ratio, pass, candidate or setting that makes no sense.
    """
    parsed = [Shape.parse(text) for text in shapes]
    check_options(ratios, (), passes)
    check_known("candidate", candidates, CANDIDATES)
    installed = all(map(util.find_spec, ("tltorch", "tensorly")))  # the one does not ask for the other
    left_out = {} if installed else {n: "tensorly-torch is not installed" for n in candidates if "tucker" in n}
    setting = (setting or Setting()).settled_for(parsed)
    rows = []
    for shape, one, ratio in itertools.product(parsed, passes, ratios):
        k = basis_channels_for(ratio, shape.out_channels)
        with setting.globals():
            layers, errors = _layers(shape, k, [n for n in candidates if n not in left_out])
            sizes = {name: count_parameters(layer) for name, layer in layers.items()}
            placed: dict[str, nn.Module] = {name: setting.place(layer) for name, layer in layers.items()}
            for name in placed:
                if name.endswith("compiled"):
                    placed[name] = compiled(placed[name], setting.memory_format == "channels_last", fullgraph=True)
            steps = layer_steps(placed, [(shape.in_channels, shape.size, shape.size)], one, setting)
            optional = [name for name in steps if name not in ("dense", "control")]
            measured = setting.measure(steps, versus=_versus(steps), may_fail=optional)
        for name in ("control", *(n for n in candidates if n not in left_out)):
            row: dict[str, Any] = {"shape": str(shape), "pass": one, "ratio": ratio, "basis_channels": k, "mode": name}
            row |= {"parameters": sizes.get(name), **(measured.get(name) or {"error": errors.get(name)})}
            rows.append(row)
            tell(progress, row, str(shape))
        if any(name.endswith("compiled") for name in placed):
            forget_compiled()
    options: dict[str, Any] = {"shapes": [str(s) for s in parsed], "ratios": list(ratios), "passes": list(passes)}
    options |= {"candidates": list(candidates), "left_out": left_out}
    options["tltorch"] = metadata.version("tensorly-torch") if installed else None
    return setting.report("bench-rivals", rows, **options)


def _layers(shape: Shape, k: int, candidates: Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers by name, with "dense" and "control", and the errors of those that cannot be made."""
    layers: dict[str, nn.Module] = {"dense": shape.conv(), "control": shape.conv()}
    errors = {}
    parameters = count_parameters(BasisConv2d.shaped_like(shape.conv(), basis_channels=k))
    for name in candidates:
        kind = name.removesuffix(" compiled")
        try:
            if kind == "basis":
                layers[name] = BasisConv2d.shaped_like(shape.conv(), basis_channels=k, mode="auto")
            else:
                layers[name] = RIVALS[kind](shape.conv(), parameters)
        except Exception as error:  # another package's layer may raise anything
            errors[name] = f"{type(error).__name__}: {error}"
    return layers, errors


def _versus(names: Mapping[str, object]) -> dict[str, str]:
    """Candidate -> the basis layer that it is compared with: compiled with compiled."""
    found = {}
    for name in names:
        like = "basis compiled" if name.endswith("compiled") and "basis compiled" in names else "basis"
        if like in names and name not in (like, "dense", "control"):
            found[name] = like
    return found
