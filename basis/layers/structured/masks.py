"""Masks over frozen random values: Parameter-Efficient Masking Networks (Bai et al. 2022, arXiv 2210.06699)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from basis.layers.structured.layer import StructuredConv2d, draw_bias, fraction


class PemnConv2d(StructuredConv2d):
    """A convolution with fixed random values, of which a trained mask keeps half and sets the others to zero.

    The mask keeps the values whose scores have absolute values above the median of the layer; its gradient goes
    straight through to the absolute scores, as in Ramanujan et al. 2020 (edge-popup).

    A fraction below 1 is the paper's random vector with padding: that part of the values is kept and repeated.
    Here every layer has its own values, which come from a seed, so that nothing is stored but the mask, one bit
    for each weight, whatever the fraction. The paper counts the values of one vector for all layers too, 32 bits
    for each, and stores none of the scores either.

    Parameters:
        scores: (C_out, C_in, kh, kw); they are trained, and stored as one bit each.

    Buffers:
        seed: () of int64, from which the values are drawn again when a state is loaded.
        values: (C_out, C_in, kh, kw), not part of the state.
    """

    kind = "pemn"
    sizes = "FRACTION: that part of the weight's random values is drawn and repeated, 1 for all of them"
    source = "Bai et al. 2022, Parameter-Efficient Masking Networks (RP)"

    seed: Tensor
    values: Tensor

    def _build(self, factory: dict[str, Any]) -> None:
        self._fraction = fraction(self.size, f"the size of {self.kind}")
        shape = self.out_channels, *self.filter_shape
        self.scores = nn.Parameter(torch.empty(shape, **factory))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=factory["device"]))
        self.register_buffer("values", torch.empty(shape, **factory), persistent=False)

    def reset_parameters(self) -> None:
        """Scores as ``nn.Conv2d`` draws its weight, uniform in +-1 / sqrt(fan-in); a new seed for the values."""
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        if not self.seed.is_meta:
            self.seed.copy_(torch.randint(2**62, (), device="cpu"))
        self._draw_values()
        draw_bias(self)

    def _draw_values(self) -> None:
        """Values of N(0, 2 / fan-in), drawn on the CPU so that a seed gives the same ones on every device."""
        if self.seed.is_meta or self.values.is_meta:
            return
        length = self.values.numel()
        drawn = min(length, int(self._fraction * length) + 1)  # as the authors round
        generator = torch.Generator("cpu").manual_seed(int(self.seed))
        values = torch.randn(drawn, generator=generator, dtype=torch.float32, device="cpu")
        values = values.mul_(math.sqrt(2 / math.prod(self.filter_shape))).repeat(math.ceil(length / drawn))
        self.values.copy_(values[:length].view(self.values.shape))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        if self.values.is_meta:  # and the scores no more, by load_state_dict(..., assign=True)
            self.values = torch.empty_like(self.scores.detach())
        self._draw_values()

    @property
    def weight(self) -> Tensor:
        """The values where the mask is 1, and 0 elsewhere."""
        size = self.scores.abs()
        kept = size.detach() > size.detach().median()
        return self.values * (kept + (size - size.detach()))  # adds 0, with the gradient of ``size``

    def bits(self, name: str) -> int:
        """One for each score: what remains of them is the mask."""
        return getattr(self, name).numel()

    def fit(self, weight: Tensor) -> None:
        """Keep the half of the values that lies nearest to ``weight``, of all halves, by least squares.

        The scores keep their absolute values and change places.
        """
        gain = (2 * weight.detach() - self.values) * self.values  # w^2 - (w - v)^2
        order = gain.flatten().argsort()
        scores = torch.empty_like(order, dtype=self.scores.dtype)
        scores[order] = self.scores.detach().abs().flatten().sort().values
        with torch.no_grad():
            self.scores.copy_(scores.view(self.scores.shape))
