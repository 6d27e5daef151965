"""What others have published about structured layers: the results of Gray, Crowley and Storkey, and how they count.

"Separable Layers Enable Structured Efficient Linear Substitutions", arXiv 1906.00859, with the authors'
repository, github.com/BayesWatch/deficient-efficient. :data:`GRAY` holds WRN-28-10 on CIFAR-10, trained
with attention transfer from the dense network. Errors were decoded from the vector figure
``images/wrn-28-10-at.pdf`` there and each point was given its setting by its number of parameters, which
ours equals to the unit. Multiply-adds are theirs, which :func:`mult_adds` counts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from basis.layers.base import ConvLike
from basis.layers.structured import StructuredConv2d
from basis.layers.structured.maps import ACDCConv2d
from basis.layers.structured.separable import TiedConv2d

INCLUDE = "layer?.*.conv?"  # of WRN-28-10: stem, shortcuts and classifier stay dense


@dataclass(frozen=True)
class Published:
    """One network of the table.

    Attributes:
        setting: the authors' name of it.
        layer: the text of our layer; None for the dense network.
        parameters: of the whole network.
        mult_adds: of one image of 32 x 32, to four digits, as the authors count.
        errors: top-1 test error in %, one number per run of the same network; empty where not reported.
    """

    setting: str
    layer: str | None
    parameters: int
    mult_adds: float
    errors: tuple[float, ...] = ()


GRAY: tuple[Published, ...] = (
    Published("Conv (teacher)", None, 36_479_194, 5.246e9, (3.2, 3.3)),
    Published("Sep", "sep", 4_380_138, 6.297e8),
    Published("TensorTrain_0.70", "tensor_train:0.70", 2_413_390, 6.297e8, (3.60,)),
    Published("TensorTrain_0.59", "tensor_train:0.59", 1_840_487, 6.297e8, (3.76,)),
    Published("TensorTrain_0.44", "tensor_train:0.44", 1_181_863, 6.297e8, (4.09,)),
    Published("TensorTrain_0.41", "tensor_train:0.41", 1_075_080, 6.297e8, (4.04,)),
    Published("TensorTrain_0.27", "tensor_train:0.27", 690_465, 6.297e8, (4.50,)),
    Published("TensorTrain_0.23", "tensor_train:0.23", 598_200, 6.297e8, (4.96,)),
    Published("Generic_0.24", "generic:0.24", 2_344_906, 3.380e8, (3.73,)),
    Published("Generic_0.12", "generic:0.12", 1_346_682, 1.939e8, (4.09,)),
    Published("Generic_0.10", "generic:0.10", 1_190_634, 1.712e8, (4.10,)),
    Published("Generic_0.06", "generic:0.06", 851_322, 1.209e8, (4.63,)),
    Published("Generic_0.03", "generic:0.03", 601_162, 8.375e7, (5.73,)),
    Published("Shuffle_1", "shuffle:1", 2_384_154, 3.585e8, (3.86,)),
    Published("Shuffle_2 and Shuffle_3", "shuffle:2", 1_343_834, 1.976e8, (3.99, 4.04)),
    Published("Shuffle_4", "shuffle:4", 823_674, 1.172e8, (4.75,)),
    Published("Shuffle_7", "shuffle:7", 719_994, 1.015e8, (4.88,)),
    Published("SepHashed_0.50", "sep_hashed:0.50", 2_378_218, 6.297e8, (3.91,)),
    Published("SepHashed_0.20", "sep_hashed:0.20", 1_171_690, 6.297e8, (4.06,)),
    Published("SepHashed_0.05", "sep_hashed:0.05", 568_426, 6.297e8, (4.85,)),
    Published("Tucker_0.67", "tucker:0.67", 2_381_200, 6.297e8, (3.94,)),
    Published("Tucker_0.54", "tucker:0.54", 1_703_831, 6.297e8, (4.06,)),
    Published("Tucker_0.41", "tucker:0.41", 1_150_364, 6.297e8, (4.56,)),
    Published("Tucker_0.37", "tucker:0.37", 1_032_744, 6.297e8, (4.60,)),
    Published("Tucker_0.24", "tucker:0.24", 655_095, 6.297e8, (5.38,)),
    Published("Tucker_0.21", "tucker:0.21", 592_947, 6.297e8, (5.37,)),
    Published("ACDC_15", "acdc:15", 609_258, 1.690e9, (5.22,)),
)


def mult_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of one image through ``model`` as Gray et al. count them.

    Those of convolutions and linear layers, and one for each element of a ReLU. :func:`basis.cost` differs
    on principle: it leaves ReLU out, counts what is executed (``acdc`` is one matrix for all
    pixels, where they count transforms of every pixel, and those of the input also with a stride; ``tied``
    is summed over repeated channels first), and adds the MACs of building weights, once per step.

    Args:
        model: left alone; its shapes are traced on the meta device.
        input_size: (C, H, W) of one image.

    Raises:
        ValueError: for basis convolutions, which are not theirs.
    """
    traced = copy.deepcopy(model).to("meta").eval()
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += _layer_mult_adds(module, args[0], output)

    for name, module in traced.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, StructuredConv2d)):
            module.register_forward_hook(count)
        elif isinstance(module, ConvLike):
            raise ValueError(f"{name} is a {type(module).__name__}, but Gray et al. have no such layer to count")
    dtype = next((p.dtype for p in traced.parameters()), None)
    with torch.no_grad(), _Relus() as relus:
        traced(torch.empty((1, *input_size), dtype=dtype, device="meta"))
    return total + relus.elements


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
    if isinstance(module, TiedConv2d):
        return filters + 2 * module.factor.numel() * pixels["output"]
    return sum(product.macs * pixels[product.at] for product in module.products)


class _Relus(TorchDispatchMode):
    """Counts the elements that pass through ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self.elements += output.numel()
        return output
