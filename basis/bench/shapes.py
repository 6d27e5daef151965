"""Which convolutions are timed: 3x3 layers by their shape, and the layers of a network as it calls them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from basis.inputs import Inputs, example_inputs, samples_in
from basis.layers.base import arguments_of
from basis.layers.calls import trace
from basis.layers.conv import BasisConv2d

RATIOS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Every 3x3 convolution of the CIFAR ResNet-18 but its first.
RESNET18_SHAPES = ("64@32", "128@16", "256@8", "512@4", "64-128@32/2", "128-256@16/2", "256-512@8/2")
# The 3x3 ones of ResNet-50 on images of 224 pixels, and of the stages of WRN-28-10.
RESNET50_SHAPES = ("64@56", "128@28", "256@14", "512@7")
WRN28_SHAPES = ("160@32", "320@16", "640@8")
# Those of the blocks of WRN-16-4.
WRN_SHAPES = ("16-64@32", "64@32", "64-128@32/2", "128@16", "128-256@16/2", "256@8")


class Shape(NamedTuple):
    """A 3x3 convolution with padding 1 on square images of ``size`` pixels; written ``64-128@32/2``."""

    in_channels: int
    out_channels: int
    size: int
    stride: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``IN-OUT@SIZE/STRIDE``; OUT may be left out where it is IN, STRIDE where it is 1."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?@(\d+)(?:/(\d+))?", text)
        shape = found and cls(int(found[1]), int(found[2] or found[1]), int(found[3]), int(found[4] or 1))
        if not shape or min(shape) < 1:
            raise ValueError(f"shape is {text!r}, but must read IN-OUT@SIZE/STRIDE, like 64@32 or 64-128@32/2")
        return shape

    def __str__(self) -> str:
        out = f"-{self.out_channels}" if self.out_channels != self.in_channels else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.in_channels}{out}@{self.size}{stride}"

    def conv(self) -> nn.Conv2d:
        """The dense layer."""
        return nn.Conv2d(self.in_channels, self.out_channels, 3, self.stride, 1, bias=False)


@dataclass(frozen=True)
class TimedLayer:
    """A convolution as far as its time depends on it; equal ones are measured once."""

    options: tuple[Any, ...]  # the first arguments of nn.Conv2d, up to padding_mode
    # (C, H, W) of each call in one forward pass, behind the number of images where a sample is several.
    inputs: tuple[tuple[int, ...], ...]
    input_gradient: bool

    @classmethod
    def of(cls, conv: Any, inputs: Iterable[tuple[int, ...]], *, input_gradient: bool) -> TimedLayer:
        """``conv`` on these inputs."""
        return cls(arguments_of(conv, torch.empty(0))[:9], tuple(inputs), input_gradient)

    def __str__(self) -> str:
        c_in, c_out, kernel, stride, _, dilation, groups, *_ = self.options
        sizes = "+".join("x".join(map(str, (*size[:-3], *size[-2:]))) for size in self.inputs)
        text = f"{c_in}-{c_out}@{sizes} {'x'.join(map(str, kernel))}"
        for mark, value in (("/", stride), (" dilation ", dilation)):
            text += f"{mark}{'x'.join(map(str, dict.fromkeys(value)))}" if set(value) != {1} else ""
        return text + (f" groups {groups}" if groups > 1 else "")

    def conv(self) -> nn.Conv2d:
        """The dense layer."""
        return nn.Conv2d(*self.options)

    def basis(self, k: int) -> BasisConv2d:
        """A basis layer of that shape with ``k`` basis channels, in mode auto."""
        return BasisConv2d.shaped_like(self.conv(), basis_channels=k, mode="auto")


def timed_layers(model: nn.Module, inputs: Inputs, names: Collection[str]) -> dict[str, TimedLayer]:
    """Those of the layers named, two-dimensional convolutions, that a forward pass on ``inputs`` calls.

    Raises ``ValueError`` for a model that cannot be run on such inputs.
    """
    samples = samples_in(inputs)

    def size(x: tuple[int, ...]) -> tuple[int, ...]:
        images = math.ceil(math.prod(x[:-3]) / samples)
        return x[-3:] if images == 1 else (images, *x[-3:])

    return {
        name: TimedLayer.of(layer, [size(call.x) for call in calls], input_gradient=any(c.needs_dx for c in calls))
        for name, layer, calls in trace(model, inputs).layers
        if name in names and calls
    }


def example(model: nn.Module, input_size: Iterable[int] | None, inputs: Inputs | None) -> Inputs:
    """``inputs``, or one sample of ``input_size``; of (3, 32, 32) where neither is given."""
    return example_inputs(model, (3, 32, 32) if input_size is None and inputs is None else input_size, inputs)
