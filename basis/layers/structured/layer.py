"""The interface of structured layers: a convolution whose weight is made from fewer numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import ConvLike, PaddingMode, arguments_of, as_leaf, check_weight, full_precision
from basis.modules import is_channels_last

LARGEST = 1_000_000  # number in a size
FIT_STEPS = 200  # of L-BFGS, where a structure has no closed solution

New = Callable[..., nn.Parameter]  # shape -> a parameter with the layer's device and dtype, not yet drawn


@dataclass(frozen=True)
class Product:
    """One linear map within a layer, applied at every pixel of the layer's "output" (after the stride) or "input"."""

    macs: int  # multiply-accumulates per pixel
    reads: int = 0  # channels of its input, kept for its weight's gradient; 0 for the layer's own input
    at: Literal["output", "input"] = "output"
    reads_at: Literal["output", "input"] = "output"


class StructuredConv2d(ConvLike):
    """A drop-in for ``nn.Conv2d`` with a structured weight: the base of all layers in this package.

    Takes the arguments of ``nn.Conv2d``, but ``groups`` is 1, and ``size``: the text after the colon in
    ``tucker:0.41``. A subclass allocates its parameters in ``_build`` and makes the weight of them in ``_weight``.

    ``products`` are what the layer multiplies at every pixel, one after the other; ``building`` are the
    multiply-accumulates that make the weight, once per step, however many images.

    Raises ``ValueError`` for a size or shape that the structure cannot take, where it saves no numbers, and for complex
    numbers.
    """

    kind: ClassVar[str]  # as in "tucker:0.41"
    sizes: ClassVar[str] = ""  # what the size says, in words; "" where there is no size
    shared: ClassVar[tuple[str, ...]] = ()  # parameters that layers of equal `key` hold together
    unscaled: ClassVar[tuple[str, ...]] = ()  # parameters that are not among `factors`

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, size: str | float = "",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.size = str(size)
        self.text = f"{self.kind}:{self.size}" if self.size else self.kind
        if groups != 1:
            raise ValueError(f"{self.kind} is not defined for grouped convolutions, and this one has groups = {groups}")
        if bool(self.size) != bool(self.sizes):
            raise ValueError(f"the layer is {self.text!r}, but {self.kind} takes {self.sizes or 'no size'}")

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        dense = out_channels * math.prod(self.filter_shape)
        self.products: tuple[Product, ...] = (Product(dense),)
        self.building = 0
        self.bias = new(out_channels) if bias else None
        self._build(new)
        self._names = tuple(name for name, _ in self.named_parameters(recurse=False) if name != "bias")
        if self._like().is_complex():
            raise ValueError(f"{self.kind} takes no complex numbers, and dtype is {self._like().dtype}")
        check_saves(self.text, self._own, dense)
        self.reset_parameters()

    def _build(self, new: New) -> None:
        """Read ``self.size``, allocate parameters and buffers, and say what is multiplied."""
        raise NotImplementedError

    def _weight(self) -> Tensor:
        """See :attr:`weight`; it may be autocast."""
        raise NotImplementedError

    def _draw(self) -> None:
        """Draw the parameters: filters (rows, columns, kh, kw) from N(0, 2 / (rows kh kw))."""
        for parameter in self.parts.values():
            if parameter.dim() == 4:
                nn.init.normal_(parameter, std=math.sqrt(2 / (len(parameter) * parameter[0, 0].numel())))

    def _like(self) -> Tensor:
        return getattr(self, self._names[0])

    def _fit(self, weight: Tensor) -> None:
        """Bring :attr:`weight` near ``weight`` (least squares): by L-BFGS in float64, if nothing is simpler."""
        wide, goal = copy.deepcopy(self).double().requires_grad_(True), weight.double()
        options: Any = {"max_iter": FIT_STEPS, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-12}
        optimizer = torch.optim.LBFGS(list(wide.parts.values()), **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (wide._computed_weight() - goal).square().sum() / goal.square().sum().clamp_min(1e-30)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.load_state_dict(wide.state_dict())

    def _convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The forward pass; ``padding`` (height, width) is still to be done."""
        return F.conv2d(x, self._computed_weight(), self.bias, self.stride, padding, self.dilation)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters as the source does (or the class says), and the bias as ``nn.Conv2d`` does."""
        self._draw()
        self._place()
        if self.bias is not None:
            draw_uniform(self.bias, math.prod(self.filter_shape))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (N, C_in, H, W) or (C_in, H, W) as ``nn.Conv2d`` with :attr:`weight` would."""
        if (node := as_leaf(self, input)) is not None:
            return node
        return self.forward(input[None])[0] if input.dim() == 3 else self._convolve(*self._pad(input))

    def _computed_weight(self) -> Tensor:
        with full_precision(self._like()):
            return self._weight()

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """All parameters but the bias, by name, also where a tool computes them (pruning, weight norm)."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def factors(self) -> list[nn.Parameter]:
        """The parameters whose weight decay may be scaled by the compression."""
        return [p for name, p in self.parts.items() if name not in self.unscaled]

    @property
    def stored(self) -> int:
        """Numbers that have to be stored for the weight, shared ones too."""
        return sum(p.numel() for p in self.parts.values())

    @property
    def _own(self) -> int:
        return self.stored - sum(getattr(self, name).numel() for name in self.shared)

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """What convolutions have in common that share parameters; None where nothing is shared."""
        return None

    @classmethod
    def shaped_like(cls: Any, conv: nn.Conv2d, *, size: str | float = "") -> Any:
        """A freshly initialised layer of the shape of ``conv``; keeps device, dtype, memory format and flags."""
        check_weight(conv, fitted=False)
        layer = cls(*arguments_of(conv, conv.weight), size=size)
        if is_channels_last(conv.weight):
            layer.to(memory_format=torch.channels_last)
        layer.train(conv.training)
        if not conv.weight.requires_grad:
            layer.requires_grad_(False)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer

    @classmethod
    @torch.no_grad()
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list:
        """The layers of convolutions with equal :meth:`key`: near their weights (``fitted``) or newly drawn."""
        for conv in convs:
            check_weight(conv, fitted=fitted)
        layers = [cls.shaped_like(conv, size=size) for conv in convs]
        for name in cls.shared:
            for layer in layers[1:]:
                setattr(layer, name, getattr(layers[0], name))
            who = f"{layers[0].text}, whose {name} {len(layers)} layer{'s'[: len(layers) > 1]} would share,"
            stored = layers[0].stored + sum(layer._own for layer in layers[1:])
            check_saves(who, stored, sum(conv.weight.numel() for conv in convs))
        if fitted:
            cls._fit_all(layers, [conv.weight.detach() for conv in convs])
            for layer, conv in zip(layers, convs, strict=True):
                if layer.bias is not None:
                    layer.bias.copy_(torch.zeros_like(layer.bias) if conv.bias is None else conv.bias)
        return layers

    @classmethod
    def _fit_all(cls, layers: Sequence[Any], weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(layers, weights, strict=True):
            layer._fit(weight)

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the weight :attr:`weight` and a copy of the bias."""
        last = any(_stored_channels_last(p) for p in self.parts.values() if p.dim() == 4)
        stored = torch.channels_last if last else torch.contiguous_format
        weight = self._computed_weight().detach().contiguous(memory_format=stored)
        return self._dense(weight, trains=any(p.requires_grad for p in self.parts.values()))

    def extra_repr(self) -> str:
        """The arguments that matter, the way ``nn.Conv2d`` prints its own."""
        return ", ".join([*self._shown_arguments(), f"stored={self.stored}", f"layer={self.text}"])


def _stored_channels_last(weight: Tensor) -> bool:
    """Whether the strides of a 4-d weight are those of channels-last alone, also where its depth or kernel is 1."""
    _, c, h, w = weight.shape
    return weight.stride() == (c * h * w, 1, w * c, c) != (c * h * w, h * w, w, 1)


def check_saves(what: str, stored: int, dense: int) -> None:
    """Raise ``ValueError`` where ``what`` would store as many numbers as the dense weights or more."""
    if stored >= dense:
        raise ValueError(f"{what} would store {stored:,} numbers, and the dense weight has {dense:,}: nothing to save")


def number(text: str, kind: str, *, most: int = 1) -> Fraction:
    """The number in (0, most] that ``text`` is, such as ``0.41``, ``1/8`` or ``3``."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= most:
        raise ValueError(f"the size of {kind} is {text!r}, but it must be a number in (0, {most:,}], as 0.25 or 1/4")
    return value


def whole(text: str, kind: str) -> int:
    """The whole number of at least 1 that ``text`` is."""
    value = number(text, kind, most=LARGEST)
    if value.denominator > 1:
        raise ValueError(f"the size of {kind} is {text!r}, but it must be a whole number")
    return int(value)


def draw_uniform(parameter: Tensor, fan_in: int) -> None:
    """Uniform in +-1 / sqrt(fan-in), as PyTorch draws convolutions."""
    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
