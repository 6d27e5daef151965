"""Sensitivity tables: what each layer loses at each number of basis channels, and what it would save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Unit = Literal["params", "macs", "backward_macs"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution that can be substituted, its candidates, and what any k would cost.

    Attributes:
        name: as in ``model.named_modules()``.
        out_channels, groups: C_out and g of the convolution.
        fan_in: F = C_in/groups x kh x kw.
        bias: number of bias parameters, C_out or 0.
        positions: how often the weight is applied for one image (output pixels, summed over calls);
            None where no image was seen.
        input_gradient: whether training computes the gradient of the layer's input (not for the first).
        candidates: the numbers of basis channels k below C_out that are measured, descending.
    """

    name: str
    out_channels: int
    groups: int
    fan_in: int
    bias: int
    positions: int | None
    input_gradient: bool
    candidates: tuple[int, ...]

    def cost(self, k: int) -> dict[str, int | None]:
        """``params``, ``macs`` and ``backward_macs`` (per image, factorized mode) with k basis channels.

        Equal to :func:`basis.cost` of the substituted layer; k = C_out is the dense layer.
        """
        mix = (self.out_channels - k) * k // self.groups
        thin = k * self.fan_in + mix
        n = self.positions
        backward = thin + mix + self.input_gradient * k * self.fan_in
        return {
            "params": thin + self.bias,
            "macs": None if n is None else n * thin,
            "backward_macs": None if n is None else n * backward,
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer with k basis channels, all others dense.

    Attributes:
        value: the sensitivity, in the unit of the table's measure; NaN where it was not finite.
        low, high: its 95 % interval, NaN where there is none.
        n: the images or seeds that the interval rests on, 0 where there is none.
        kl: mean Kullback-Leibler divergence from the dense network's predictions, in nats; NaN where
            not measured.
        forward, backward: passes through the whole network that this cell took, in images (the suffix
            of a network counts for its share of MACs). A pass that scores many cells is shared evenly.
        seconds: wall-clock time, shared in the same way.
    """

    layer: str
    basis_channels: int
    value: float
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    kl: float = float("nan")
    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """What :func:`basis.sensitivity` returns.

    Attributes:
        measure: its name, one of ``basis.analysis.MEASURES``.
        layers: every convolution that can be substituted, in the order of the model.
        cells: what has been measured so far, layer after layer.
        skipped: name of every other convolution -> why it cannot be substituted. It has no sensitivity.
        total: ``params``, ``macs`` and ``backward_macs`` of the whole dense network (MACs per image;
            None where no image was seen).
        fingerprint: what the cells were measured on; tables of equal fingerprint can be merged.
        baseline: what was measured of the dense network, such as its ``loss``.
    """

    measure: str
    layers: tuple[Layer, ...]
    cells: tuple[Cell, ...]
    skipped: Mapping[str, str]
    total: Mapping[str, int | None]
    fingerprint: Mapping[str, str]
    baseline: Mapping[str, float]
