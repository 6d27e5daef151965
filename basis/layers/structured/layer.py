"""The interface of structured layers: a convolution whose weight is made from fewer numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import ConvLike, PaddingMode, arguments_of
from basis.modules import is_channels_last

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = 1_000_000  # number in a size
FIT_STEPS = 200  # of L-BFGS, where a structure has no closed solution


@dataclass(frozen=True)
class Product:
    """One linear map within a layer, applied at every pixel.

    Attributes:
        macs: multiply-accumulates per pixel.
        reads: channels that it takes in and keeps for its weight's gradient; 0 for the layer's own input.
        at, reads_at: whose pixels these are, the layer's "output" (after the stride) or its "input".
        trained: whether its weight is trained.
    """

    macs: int
    reads: int = 0
    at: Literal["output", "input"] = "output"
    reads_at: Literal["output", "input"] = "output"
    trained: bool = True


class StructuredConv2d(ConvLike):
    """A drop-in for ``nn.Conv2d`` with a structured weight: the base of all layers in this package.

    Takes every argument of ``nn.Conv2d`` in the same order, but ``groups`` is 1. Input (N, C_in, H, W) or
    (C_in, H, W), output as ``nn.Conv2d`` gives it. All layers are linear: they are convolutions with
    :attr:`weight`, however they are computed.

    A subclass says in ``_build`` what parameters it has, in ``reset_parameters`` how they are drawn, in
    ``weight`` what they make, in ``products`` what is multiplied, and, where it has a faster way than
    convolving with ``weight``, in ``_apply_to`` how. ``fit`` approximates a given weight.

    Args:
        size: the size setting as text, as it stands after the colon in ``tucker:0.41``; see :attr:`sizes`.

    Raises:
        ValueError: for a size that is not one, a shape that the structure cannot take, or a layer that would
            store no numbers, or as many as the dense weight or more.
    """

    kind: ClassVar[str]  # as in "tucker:0.41"
    sizes: ClassVar[str] = ""  # how the text goes on, in words; "" where there is no size
    source: ClassVar[str]  # where the method comes from
    shared: ClassVar[tuple[str, ...]] = ()  # parameters that layers of equal `key` hold together
    shifts: ClassVar[bool] = False  # whether the bias of `to_conv` is not the layer's own

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        size: str | float = "",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.size = str(size)
        if groups != 1:
            raise ValueError(f"{self.kind} is not defined for grouped convolutions, and this one has groups = {groups}")
        if bool(self.size) != bool(self.sizes):
            wanted = f"a size, {self.sizes}" if self.sizes else "no size"
            raise ValueError(f"the layer is {self.text!r}, but {self.kind} takes {wanted}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self._build(factory)
        shared = sum(map(self.bits, self.shared)) // 32
        check_saves(self.text, self.stored - shared, out_channels * math.prod(self.filter_shape))
        self.reset_parameters()

    # -- for subclasses -------------------------------------------------------------------------

    def _build(self, factory: dict[str, Any]) -> None:
        """Read ``self.size`` and allocate the parameters and buffers, with ``device`` and ``dtype`` of ``factory``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw new parameters as the source does, or as this class says."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight of the dense convolution that this layer is, (C_out, C_in, kh, kw)."""
        raise NotImplementedError

    @property
    def products(self) -> tuple[Product, ...]:
        """What the layer multiplies at every pixel, one after the other."""
        return (Product(self.out_channels * math.prod(self.filter_shape)),)

    @property
    def building(self) -> int:
        """Multiply-accumulates that make a weight from its factors, once per step, however many images."""
        return 0

    def bits(self, name: str) -> int:
        """Bits to be stored of the parameter of that name; 32 for each number, none for what a seed gives."""
        return 32 * getattr(self, name).numel()

    def trained(self, name: str) -> int:
        """How many entries of the parameter of that name training changes: all, where no fixed mask hides some."""
        return getattr(self, name).numel()

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """All parameters but the bias, by name."""
        return {name: p for name, p in self.named_parameters(recurse=False) if name != "bias"}

    @property
    def factors(self) -> list[nn.Parameter]:
        """The parameters on which weight decay acts that is scaled by the compression: all but depthwise filters."""
        return list(self.parts.values())

    def fit(self, weight: Tensor) -> None:
        """Bring :attr:`weight` near ``weight`` (C_out, C_in, kh, kw), in the sense of least squares.

        By L-BFGS from the present parameters, in float64; a subclass with a closed solution uses that.
        """
        descend([p for p in self.parts.values() if p.is_floating_point()], lambda: self.weight, weight)

    @classmethod
    def key(cls, conv: nn.Conv2d, size: str) -> Hashable | None:
        """What convolutions have in common that share parameters; None where nothing is shared."""
        return None

    @classmethod
    def together(cls, convs: Sequence[nn.Conv2d], *, size: str, fitted: bool) -> list[Self]:
        """The layers of convolutions with equal :meth:`key`: near their weights (``fitted``) or newly drawn."""
        return [cls.from_conv(conv, size=size) if fitted else cls.shaped_like(conv, size=size) for conv in convs]

    def _apply_to(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """Convolve ``x`` with :attr:`weight` and add the bias; ``padding`` (height, width) is still to be done."""
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)

    # -- the same for all -----------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, (N, C_in, H, W) or (C_in, H, W), as ``nn.Conv2d`` with :attr:`weight` would."""
        return self._apply_to(*self._pad(x))

    @property
    def text(self) -> str:
        """``kind:size``."""
        return f"{self.kind}:{self.size}" if self.size else self.kind

    @property
    def stored(self) -> int:
        """Numbers of 32 bits that have to be stored for the weight (shared ones too), rounded up."""
        return math.ceil(sum(map(self.bits, self.parts)) / 32)

    @classmethod
    def shaped_like(cls, conv: nn.Conv2d, *, size: str | float = "") -> Self:
        """A freshly initialised layer of the shape of ``conv``; keeps device, dtype, memory format and flags."""
        layer = cls(*arguments_of(conv), size=size)
        if is_channels_last(conv.weight):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layer.train(conv.training)
        if not conv.weight.requires_grad:
            layer.requires_grad_(False)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, size: str | float = "") -> Self:
        """The layer nearest to ``conv`` (see :meth:`fit`), with its bias.

        Raises:
            TypeError: when ``conv`` is not an ``nn.Conv2d``; ValueError: as the class itself.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"from_conv takes an nn.Conv2d, not {type(conv).__name__}")
        layer = cls.shaped_like(conv, size=size)
        with torch.no_grad():
            layer.fit(conv.weight.detach())
            if layer.bias is not None:
                layer.bias.zero_() if conv.bias is None else layer.bias.copy_(conv.bias)
        return layer

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the weight :attr:`weight` and a copy of the bias."""
        last = any(_stored_channels_last(p) for p in self.parts.values() if p.dim() == 4)
        memory_format = torch.channels_last if last else torch.contiguous_format
        weight = self.weight.detach().contiguous(memory_format=memory_format)
        return self._dense(weight, trains=any(p.requires_grad for p in self.parts.values()))

    def extra_repr(self) -> str:
        """The arguments that matter, the way ``nn.Conv2d`` prints its own."""
        return ", ".join([*self._shown_arguments(), f"stored={self.stored}", f"layer={self.text}"])


def _stored_channels_last(weight: Tensor) -> bool:
    """Whether the strides of a 4-d weight are those of channels-last alone, also where its depth or kernel is 1."""
    _, c, h, w = weight.shape
    return weight.stride() == (c * h * w, 1, w * c, c) != (c * h * w, h * w, w, 1)


def check_saves(what: str, stored: int, dense: int) -> None:
    """Raise ``ValueError`` where ``what`` would store no numbers, or as many as the dense weights or more."""
    if not stored:
        raise ValueError(f"{what} would have no numbers to train")
    if stored >= dense:
        raise ValueError(f"{what} would store {stored:,} numbers, and the dense weight has {dense:,}: nothing to save")


# -- reading sizes ----------------------------------------------------------------------------------


def number(text: str, what: str) -> Fraction:
    """A positive number such as ``0.41``, ``1/8`` or ``3``; ``ValueError`` names ``what`` should be one."""
    try:
        if re.search(r"e[+-]?\d{4}", text.lower()):  # would take for ever
            raise ValueError
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what} is {text!r}, but it must be a number such as 0.25 or 1/4") from None
    if not 0 < value <= LARGEST:
        raise ValueError(f"{what} is {text}, but it must be above 0" + f" and at most {LARGEST:,}" * (value > 0))
    return value


def fraction(text: str, what: str) -> Fraction:
    """A number in (0, 1]."""
    value = number(text, what)
    if value > 1:
        raise ValueError(f"{what} is {text}, but it is a fraction and must lie in (0, 1]")
    return value


def whole(text: str, what: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 1 <= value <= LARGEST:
        most = f" and at most {LARGEST:,}" * text.isdecimal()
        raise ValueError(f"{what} is {text!r}, but it must be a whole number of at least 1{most}")
    return value


# -- fitting ----------------------------------------------------------------------------------------


def descend(parameters: Sequence[nn.Parameter], value: Callable[[], Tensor], target: Tensor) -> None:
    """Bring ``value()``, made from the parameters, near ``target`` by L-BFGS in float64, from where they are."""
    kept = [(p.dtype, p.requires_grad) for p in parameters]
    goal = target.detach().double()
    with torch.enable_grad():
        for p in parameters:
            p.data = p.data.double()
            p.requires_grad_(True)
        options: dict[str, Any] = {
            "max_iter": FIT_STEPS,
            "line_search_fn": "strong_wolfe",
            "tolerance_change": 1e-12,
        }
        optimizer = torch.optim.LBFGS(parameters, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (value() - goal).square().sum() / goal.square().sum().clamp_min(1e-30)
            loss.backward()
            return loss

        optimizer.step(closure)
    for p, (dtype, trains) in zip(parameters, kept, strict=True):
        p.data, p.grad = p.data.to(dtype), None
        p.requires_grad_(trains)


# -- drawing ----------------------------------------------------------------------------------------


def draw_bias(layer: StructuredConv2d) -> None:
    """The bias as ``nn.Conv2d`` draws it: uniform in +-1 / sqrt(fan-in)."""
    if layer.bias is not None:
        bound = 1 / math.sqrt(math.prod(layer.filter_shape))
        nn.init.uniform_(layer.bias, -bound, bound)
