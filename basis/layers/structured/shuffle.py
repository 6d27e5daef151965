"""Bottlenecks of grouped 1x1 convolutions, a channel shuffle and a depthwise convolution, all linear."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import full_precision
from basis.layers.structured.layer import Product, StructuredConv2d, draw_bias, whole


class ShuffleConv2d(StructuredConv2d):
    """1x1 in g groups to C_out // 4 channels, channel shuffle, depthwise with the stride, 1x1 in g groups to C_out.

    g is lowered until it divides C_in, C_out and C_out // 4. Without the depthwise convolution for 1x1 kernels; the
    first one then takes the stride.

    Parameters:
        down: (C_out // 4, C_in / g, 1, 1).
        depthwise: (C_out // 4, 1, kh, kw), or None for 1x1 kernels.
        up: (C_out, C_out // 4 / g, 1, 1).
    """

    kind = "shuffle"
    sizes = "N: the number of groups, lowered until it divides the channels"
    source = "Gray et al. 2019; Zhang et al. 2017 (ShuffleNet)"

    def _build(self, factory: dict[str, Any]) -> None:
        wanted, inner = whole(self.size, f"the size of {self.kind}"), self.out_channels // 4
        if not inner:
            raise ValueError(f"{self.kind} needs at least 4 output channels, and there are {self.out_channels}")
        common = math.gcd(self.in_channels, self.out_channels, inner)
        self.conv_groups = next(g for g in range(min(wanted, common), 0, -1) if common % g == 0)
        self.down = nn.Parameter(torch.empty((inner, self.in_channels // self.conv_groups, 1, 1), **factory))
        empty = torch.empty((inner, 1, *self.kernel_size), **factory)
        self.depthwise = None if self.kernel_size == (1, 1) else nn.Parameter(empty)
        self.up = nn.Parameter(torch.empty((self.out_channels, inner // self.conv_groups, 1, 1), **factory))

    def reset_parameters(self) -> None:
        """Each from N(0, 2 / (kh kw its output channels))."""
        for p in self.parts.values():
            nn.init.normal_(p, std=math.sqrt(2 / (len(p) * p[0, 0].numel())))
        draw_bias(self)

    def _shuffled(self, x: Tensor) -> Tensor:
        """The channels of x, (N, C_out // 4, H, W): the first of every group, the second of every group, ..."""
        return torch.channel_shuffle(x, self.conv_groups) if self.conv_groups > 1 else x

    @property
    def weight(self) -> Tensor:
        """``up`` depthwise shuffled ``down``, with zeros between the groups."""
        with full_precision(self.down):
            down, up = (torch.block_diag(*p[:, :, 0, 0].chunk(self.conv_groups)) for p in (self.down, self.up))
            down = self._shuffled(down[None, :, :, None])[0, :, :, 0]
            if self.depthwise is None:
                return (up @ down)[:, :, None, None]
            return torch.einsum("om,mhw,mc->ochw", up, self.depthwise[:, 0], down)

    @property
    def products(self) -> tuple[Product, ...]:
        """The first at the input's pixels (for 1x1 kernels at the output's), the others at the output's."""
        inner, up = len(self.down), self.up.numel()
        if self.depthwise is None:
            return Product(self.down.numel()), Product(up, inner)
        first = Product(self.down.numel(), at="input")
        return first, Product(self.depthwise.numel(), inner, reads_at="input"), Product(up, inner)

    def _apply_to(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        x = x[None] if (single := x.dim() == 3) else x
        if self.depthwise is None:
            x = self._shuffled(F.conv2d(x, self.down, None, self.stride, padding, groups=self.conv_groups))
        else:
            x = self._shuffled(F.conv2d(x, self.down, groups=self.conv_groups))
            x = F.conv2d(x, self.depthwise, None, self.stride, padding, self.dilation, len(self.depthwise))
        x = F.conv2d(x, self.up, self.bias, groups=self.conv_groups)
        return x[0] if single else x
