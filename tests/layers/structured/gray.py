"""Multiply-adds as Gray, Crowley and Storkey count them."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from basis.layers.structured import StructuredConv2d
from basis.layers.structured.maps import ACDCConv2d


def mult_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of one image of (C, H, W) through ``model`` as Gray et al. count them.

    Those of convolutions and linear layers, and one for each element of a ReLU. :func:`basis.cost` counts what is
    executed instead.
    """
    traced = copy.deepcopy(model).to("meta").eval()
    counted = []
    for module in traced.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, StructuredConv2d)):
            module.register_forward_hook(lambda layer, args, out: counted.append(_layer_mult_adds(layer, args[0], out)))
    dtype = next((p.dtype for p in traced.parameters()), None)
    relu = torch.ops.aten.relu
    elements = {op: lambda *_, out_shape, **__: math.prod(out_shape) for op in (relu, torch.ops.aten.relu_)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=elements) as counter:
        traced(torch.empty((1, *input_size), dtype=dtype, device="meta"))
    relus = counter.get_flop_counts()["Global"]
    return sum(counted) + sum(relus.get(op, 0) for op in elements)


def _layer_mult_adds(module: Any, x: Tensor, y: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return module.weight.numel() * (y.numel() // module.out_features)
    pixels = {"input": x.shape[-2] * x.shape[-1], "output": y.shape[-2] * y.shape[-1]}
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * pixels["output"]
    depthwise = getattr(module, "depthwise", None)
    filters = 0 if depthwise is None else depthwise.numel() * pixels["output"]
    if isinstance(module, ACDCConv2d):
        factors, n = module.a.shape
        return filters + round(factors * (4 * n + 5 * n * math.log2(n)) * pixels["input"])
    return sum(product.macs * pixels[product.at] for product in module.products)
