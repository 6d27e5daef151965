"""Other structured layers to set beside basis convolutions: one interface, one text for each and its size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from basis.layers.base import ConvLike, arguments_of
from basis.layers.structured import filters, maps, separable
from basis.layers.structured.layer import Product, StructuredConv2d

__all__ = ["LAYERS", "Product", "Structure", "StructuredConv2d"]

# Each layer by the text that names it; all are made by `shaped_like` and `together`.
_ALL: tuple[Any, ...] = (
    filters.BasisLayer, separable.SepConv2d, separable.GenericConv2d, maps.TensorTrainConv2d, maps.TuckerConv2d,
    separable.ShuffleConv2d, maps.ACDCConv2d, maps.HashedConv2d, filters.LFBConv2d,
)  # fmt: skip
LAYERS: Mapping[str, Any] = {one.kind: one for one in _ALL}


@dataclass(frozen=True)
class Structure:
    """A kind of :data:`LAYERS` and its size: ``parse`` reads a text such as ``tucker:0.41``, ``str`` writes it."""

    kind: str
    size: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", str(self.size))
        if self.kind not in LAYERS:
            raise ValueError(f"layer is {str(self)!r}, but its kind must be one of {', '.join(LAYERS)}")

    @classmethod
    def parse(cls, text: str | Structure) -> Structure:
        """The structure that ``text`` names; a structure is returned as it is."""
        kind, _, size = str(text).partition(":")
        return cls(kind.strip(), size.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else self.kind

    def check(self, conv: nn.Conv2d) -> ConvLike:
        """The layer on the meta device; ``ValueError`` says why ``conv`` cannot become one."""
        return LAYERS[self.kind].shaped_like(_on_meta(conv), size=self.size)

    def obstacle(self, conv: nn.Conv2d) -> str | None:
        """Why ``conv`` cannot become this layer; None where it can."""
        return _reason(lambda: self.check(conv))

    def obstacle_together(self, convs: Sequence[nn.Conv2d]) -> str | None:
        """Why convolutions of equal :meth:`key` cannot share parameters; None where they can, or share nothing."""
        shared = self.key(convs[0]) is not None
        return _reason(lambda: self.make([_on_meta(conv) for conv in convs], fitted=False)) if shared else None

    def key(self, conv: nn.Conv2d) -> Hashable | None:
        """What convolutions have in common that would share parameters; None where nothing is shared."""
        return LAYERS[self.kind].key(conv, self.size)

    def make(self, convs: Sequence[nn.Conv2d], *, fitted: bool) -> list[ConvLike]:
        """The layers for convolutions of equal :meth:`key`: near their weights (``fitted``) or newly drawn."""
        return LAYERS[self.kind].together(convs, size=self.size, fitted=fitted)


def _reason(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def _on_meta(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution of the shape of ``conv``, without values."""
    return nn.Conv2d(*arguments_of(conv, conv.weight.to("meta")))
