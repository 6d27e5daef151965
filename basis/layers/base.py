"""What all layers that stand for an ``nn.Conv2d`` have in common: its arguments."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class ConvLike(nn.Module):
    """A layer with the arguments and attributes of ``nn.Conv2d``; the subclass sets ``bias``, (C_out,) or None."""

    bias: nn.Parameter | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, padding_mode: PaddingMode = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        # nn.Conv2d checks and normalises the arguments, so that both accept the same.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device="meta",
        )  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, padding_mode
        self._pads: tuple[int, ...] = tuple(conv._reversed_padding_repeated_twice)  # left, right, top, bottom

    @property
    def filter_shape(self) -> tuple[int, int, int]:
        """(C_in/groups, kh, kw), the shape of one filter of the dense convolution."""
        return (self.in_channels // self.groups, *self.kernel_size)  # type: ignore[return-value]

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pad ``x`` where the convolution cannot; also the (height, width) that the convolution still has to pad."""
        left, right, top, bottom = self._pads
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        kind = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._pads, mode=kind), (0, 0)

    def _dense(self, weight: Tensor, *, trains: bool) -> nn.Conv2d:
        """``nn.Conv2d`` of this shape with a copy of ``weight``, in its memory format, and of the bias."""
        conv = nn.Conv2d(*arguments_of(self, weight))
        conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def _shown_arguments(self) -> list[str]:
        """The arguments that matter, as ``nn.Conv2d`` prints them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        return [*parts, "bias=False"] if self.bias is None else parts


def arguments_of(conv: nn.Conv2d | ConvLike, weight: Tensor) -> tuple[Any, ...]:
    """The arguments that make another layer of the shape of ``conv``, with the device and dtype of ``weight``."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None, conv.padding_mode, weight.device, weight.dtype,
    )  # fmt: skip


def autocast_device(tensor: Tensor) -> str:
    """The device type to ask autocast about; the meta device has none of its own."""
    return "cpu" if tensor.is_meta else tensor.device.type


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast: weights are built in full precision and rounded once, where they are applied."""
    return torch.autocast(autocast_device(tensor), enabled=False)
