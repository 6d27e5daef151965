"""A convolution whose number of basis channels can be set without any change of shape.

``W = T B`` with B padded to C_out filters and T, (C_out x C_out), made of the identity and of A: beyond the
first k filters B is masked, and outside the (C_out - k) x k entries of A so are the coefficients. Where k ends
is a number on the device. So a network that is compiled or captured once (:mod:`basis.training.stepping`) serves every
plan of a sensitivity search, at the price of one small product per layer more than the dense network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from basis.data import Data
from basis.layers.conv import BasisConv2d, check_basis_channels
from basis.modules import is_channels_last
from basis.substitution import hand_over, replace_modules, substitute
from basis.training.loop import Recipe, Result, make_step, train


class StaticBasisConv2d(nn.Conv2d):
    """A basis convolution with dense A in composed mode, whose k may be set at any time; k = C_out is dense.

    Takes the arguments of ``nn.Conv2d``, and is the same function until another k is set.

    Parameters and buffers:
        weight: B, (C_out, C_in/groups, kh, kw); of each group the first k / groups filters count.
        coefficients: (C_out, C_out/groups); row by row as [I; A] is, and of each group the columns of the
            first k / groups filters in the rows below the identity count.
        bias: (C_out,) or None.
        order: (C_out,), where output channel c stands among the rows of [B; A B], as in :class:`BasisConv2d`.
        count: k / groups, on the device.

    What does not count gets a gradient of zero and never reaches an output, whatever its value.
    """

    count: Tensor
    order: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        width = self.out_channels // self.groups
        self.coefficients = nn.Parameter(self.weight.new_zeros(self.out_channels, width))
        self.register_buffer("order", torch.arange(self.out_channels, device=self.weight.device))
        self.register_buffer("count", torch.tensor(width, device=self.weight.device))

    @classmethod
    def of(cls, layer: nn.Conv2d | BasisConv2d) -> StaticBasisConv2d:
        """A layer of the shape, device, dtype, memory format, flags and values of ``layer``."""
        weight = layer.basis if isinstance(layer, BasisConv2d) else layer.weight
        padding: Any = layer.padding
        made = cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, weight.device, weight.dtype,
        )  # fmt: skip
        if is_channels_last(weight):
            made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made.weight.requires_grad_(weight.requires_grad)
        made.coefficients.requires_grad_(weight.requires_grad)
        if made.bias is not None and layer.bias is not None:
            made.bias.requires_grad_(layer.bias.requires_grad)
        made.train(layer.training).load(layer)
        return made

    @property
    def basis_channels(self) -> int:
        """k. Reading it waits for the device."""
        return int(self.count) * self.groups

    def set_basis_channels(self, basis_channels: int) -> None:
        """Set k; nothing else changes.

        Raises:
            ValueError: for a k that this layer cannot have.
        """
        check_basis_channels(basis_channels, self.out_channels, self.groups)
        self.count.fill_(basis_channels // self.groups)

    @torch.no_grad()
    def load(self, layer: nn.Conv2d | BasisConv2d) -> None:
        """Take k and all values of ``layer``, in place.

        Raises:
            ValueError: where its shape is another, or its A is not dense.
        """
        k, weight = layer.out_channels, layer.basis if isinstance(layer, BasisConv2d) else layer.weight
        shape = (layer.out_channels, layer.groups, *weight.shape[1:])
        if shape != (self.out_channels, self.groups, *self.weight.shape[1:]):
            raise ValueError(f"{layer} has another shape than {self}")
        self.weight.zero_()
        self.coefficients.zero_()
        self.order.copy_(torch.arange(self.out_channels))
        if isinstance(layer, BasisConv2d):
            if layer.coefficients.form.kind not in ("dense", "shared"):
                raise ValueError(f"the coefficients are {layer.coefficients.form}, but a static layer holds dense ones")
            k = layer.basis_channels
            self._block(k).copy_(layer.coefficients.blocks())
            self.order.copy_(layer.order)
        self.set_basis_channels(k)
        self._by_groups(self.weight)[:, : k // self.groups].copy_(self._by_groups(weight))
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias)

    @torch.no_grad()
    def to_basis(self) -> BasisConv2d:
        """The :class:`BasisConv2d` of the same k and values."""
        k = self.basis_channels
        layer = BasisConv2d.shaped_like(self, basis_channels=k)
        layer.basis.copy_(self._by_groups(self.weight)[:, : k // self.groups].reshape(layer.basis.shape))
        values: Any = layer.coefficients.values
        values.copy_(self._block(k).reshape(values.shape))
        layer.order.copy_(self.order)
        layer._order_changed(permuted=not torch.equal(self.order.cpu(), torch.arange(self.out_channels)))
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer

    def _by_groups(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.groups, len(rows) // self.groups))

    def _block(self, k: int) -> Tensor:
        """Where A is at this k: (groups, (C_out - k) / groups, k / groups)."""
        return self._by_groups(self.coefficients)[:, k // self.groups :, : k // self.groups]

    def composed(self) -> Tensor:
        """W = [B; A B] per group, (C_out, C_in/groups, kh, kw), in the memory format of B."""
        last = is_channels_last(self.weight)  # flattened in its own order, so that no copy is needed
        b = self.weight.permute(0, 2, 3, 1) if last else self.weight
        width = self.out_channels // self.groups
        # In full precision even under autocast, which rounds the finished weight once.
        with torch.autocast(b.device.type, enabled=False):
            kept = torch.arange(width, device=b.device) < self.count
            eye = torch.eye(width, dtype=b.dtype, device=b.device)
            # Below the first k rows the identity's ones meet filters that are masked.
            mixing = torch.where(kept & ~kept[:, None], self._by_groups(self.coefficients), eye)
            mixing = self._by_groups(mixing.flatten(0, 1).index_select(0, self.order))
            filters = torch.where(kept[:, None], self._by_groups(b).flatten(2), 0.0)
            weight = (mixing @ filters).view(b.shape)
        return weight.permute(0, 3, 1, 2) if last else weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, (N, C_in, H, W) or (C_in, H, W), with W."""
        return self._conv_forward(x, self.composed(), self.bias)


def static(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of ``model`` in which these convolutions can have any number of basis channels, and are dense."""
    copied = substitute(model, {})
    convs: list[Any] = [copied.get_submodule(name) for name in names]
    return replace_modules(copied, {conv: hand_over(conv, StaticBasisConv2d.of(conv)) for conv in convs})


def load(network: nn.Module, other: nn.Module) -> None:
    """Give ``network``, made by :func:`static`, the numbers of basis channels and all values of ``other``, in place.

    ``other`` is the model that it was made of after :func:`basis.substitute` by any plan for its static layers.
    """
    layers = {name: m for name, m in network.named_modules(remove_duplicate=False) if isinstance(m, StaticBasisConv2d)}
    for name, layer in layers.items():
        source: Any = other.get_submodule(name)
        layer.load(source)
    inside = tuple(f"{name}." if name else "" for name in layers)
    rest = {key: value for key, value in other.state_dict().items() if not key.startswith(inside)}
    network.load_state_dict(rest, strict=False)


class StaticTraining:
    """:func:`basis.train` for networks that differ in the basis channels of some layers, by one step for all.

    Called like :func:`basis.train`, it trains a network of its own that takes the values of the one given,
    which is left as it is.

    Args:
        model: the dense network.
        names: of the layers that may be basis convolutions.
        recipe, device: of all trainings.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], recipe: Recipe, *, device: torch.device) -> None:
        self.network = static(model, names)
        self.step = make_step(self.network, recipe, device=device)

    def __call__(self, network: nn.Module, data: Data, recipe: Recipe, **options: Any) -> Result:
        """Train as ``network`` would be trained."""
        load(self.network, network)
        return train(self.network, data, recipe, **options, step=self.step)
