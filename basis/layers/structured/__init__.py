"""Other structured layers to set beside basis convolutions: one interface, one text for each and its size."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from basis.layers.base import ConvLike
from basis.layers.structured.butterfly import DebutConv2d
from basis.layers.structured.filters import (
    BasisLayer,
    DCFConv2d,
    DSFBConv2d,
    FixedBasisConv2d,
    LFBConv2d,
    LinearConvLayer,
)
from basis.layers.structured.layer import Product, StructuredConv2d
from basis.layers.structured.maps import (
    ACDCConv2d,
    HashedConv2d,
    SepHashedConv2d,
    TensorTrainConv2d,
    TridiagonalConv2d,
    TuckerConv2d,
)
from basis.layers.structured.separable import GenericConv2d, SepConv2d, ShuffleConv2d, TiedConv2d
from basis.layers.structured.sparse import DsfConv2d, PemnConv2d

__all__ = ["LAYERS", "Product", "Structure", "StructuredConv2d"]

# Each layer by the text that names it; all are made by `shaped_like`, `from_conv` and `together`.
_ALL: tuple[Any, ...] = (
    BasisLayer, LinearConvLayer, SepConv2d, GenericConv2d, TiedConv2d, SepHashedConv2d, HashedConv2d,
    TensorTrainConv2d, TuckerConv2d, ShuffleConv2d, ACDCConv2d, TridiagonalConv2d, LFBConv2d, DSFBConv2d,
    FixedBasisConv2d, DCFConv2d, DebutConv2d, PemnConv2d, DsfConv2d,
)  # fmt: skip
LAYERS: Mapping[str, Any] = {one.kind: one for one in _ALL}


@dataclass(frozen=True)
class Structure:
    """A kind of layer and its size: ``parse`` reads a text such as ``tucker:0.41``, ``str`` writes it.

    Raises:
        ValueError: for a kind that is not one of :data:`LAYERS`.
    """

    kind: str
    size: str = ""

    def __post_init__(self) -> None:
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
        try:
            self.check(conv)
        except ValueError as error:
            return str(error)
        return None

    def obstacle_together(self, convs: Sequence[nn.Conv2d]) -> str | None:
        """Why convolutions of equal :meth:`key` cannot share parameters; None where they can, or share nothing."""
        try:
            if self.key(convs[0]) is not None:
                LAYERS[self.kind].together([_on_meta(conv) for conv in convs], size=self.size, fitted=False)
        except ValueError as error:
            return str(error)
        return None

    def key(self, conv: nn.Conv2d) -> Hashable | None:
        """What convolutions have in common that would share parameters; None where nothing is shared."""
        return LAYERS[self.kind].key(conv, self.size)

    def make(self, convs: Sequence[nn.Conv2d], *, fitted: bool) -> list[ConvLike]:
        """The layers for convolutions of equal :meth:`key`: near their weights (``fitted``) or newly drawn."""
        return LAYERS[self.kind].together(convs, size=self.size, fitted=fitted)


def _on_meta(conv: nn.Conv2d) -> nn.Conv2d:
    """``conv`` with a weight that is a shape only."""
    weight, like = conv.weight, copy.copy(conv)
    like._parameters = dict(conv._parameters, weight=nn.Parameter(weight.to("meta"), weight.requires_grad))
    return like
