"""Run by a Python that has fasterai, and not imported by this package: decompose the weights in a file.

    PYTHON -I fasterai_worker.py dense.safetensors decomposed.safetensors

The first file holds weights of convolutions by name and, as JSON in its metadata, their geometry, the method and
the number of parameters that they may have together afterwards. The second gets the weights of the convolutions
in a row that fasterai puts in their place, `NAME/0`, `NAME/1`, ..., and their geometry. It needs torch,
safetensors and fasterai (whose decomposer itself needs einops alone).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS = 14  # of bisection
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def decompose(
    weights: Mapping[str, Tensor], layers: Mapping[str, Any], method: str, removed: float, *, iterations: int
) -> nn.ModuleList:
    """The convolutions in a list, as fasterai leaves them with that part of the ranks removed."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer  # here, so that the package's tools can read this file

    model = nn.ModuleList()
    for name, weight in weights.items():
        geometry: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in layers[name].items()}
        conv = nn.Conv2d(**geometry, bias=False)
        conv.weight = nn.Parameter(weight)
        model.append(conv)
    made: nn.ModuleList = Conv_Decomposer().decompose(model, percent_removed=removed, method=method, n_iter=iterations)
    return made


def count(weights: Mapping[str, Tensor], layers: Mapping[str, Any], method: str, removed: float) -> int:
    """The parameters that are left, from shapes alone."""
    with torch.device("meta"):
        shapes = {name: weight.to("meta") for name, weight in weights.items()}
        made = decompose(shapes, layers, method, removed, iterations=0)
    return sum(p.numel() for p in made.parameters())


def main(source: str, target: str) -> int:
    """Read, bisect, decompose, write."""
    with safe_open(source, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        request = json.loads(file.metadata()["request"])
    layers, method, wanted = request["layers"], request["method"], request["parameters"]
    low, high = 0.0, 1.0 - 1e-9  # parts removed; all of it is not allowed
    if count(weights, layers, method, high) > wanted:
        sys.stderr.write(f"fasterai cannot go down to {wanted:,} parameters by {method}\n")
        return 3
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if count(weights, layers, method, middle) <= wanted else (middle, high)
    made = decompose(weights, layers, method, high, iterations=10)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[dict[str, Any]]] = {}
    for name, layer in zip(weights, made, strict=True):
        parts: list[Any] = list(layer) if isinstance(layer, nn.Sequential) else [layer]
        shapes[name] = [{key: getattr(conv, key) for key in GEOMETRY} for conv in parts]
        tensors |= {f"{name}/{i}": conv.weight.detach().contiguous() for i, conv in enumerate(parts)}
    save_file(tensors, target, {"answer": json.dumps({"layers": shapes, "removed": high})})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
