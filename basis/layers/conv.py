"""The basis convolution: a layer that trains k of its C_out filters and mixes the others from them.

The layer convolves with ``W = [B; A B]``, B the k basis filters and A the coefficient matrix, (C_out - k) x k
(Alekseev et al. 2024, arXiv 2408.06024; LinearConv, Kahatapitiya and Rodrigo, WACV 2021, is k = C_out / 2 in composed
mode). Each group, or mixing group of the form ``grouped``, has basis filters of its own; A holds one block per group.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import (
    ConvLike,
    Fact,
    PaddingMode,
    arguments_of,
    as_leaf,
    autocast_device,
    check_weight,
    full_precision,
    whole_numbers,
)
from basis.layers.coefficients import Coefficients, Form
from basis.layers.factorize import fit, principal_directions
from basis.layers.fused import convolve
from basis.layers.moments import Moments, lost_mean
from basis.modules import is_channels_last
from basis.numbers import one_of, plain_number

Mode = Literal["auto", "factorized", "composed"]
ExplicitMode = Literal["factorized", "composed"]
MODES: tuple[str, ...] = get_args(Mode)


def basis_channels_for(ratio: float, out_channels: int, groups: int = 1) -> int:
    """The k nearest to ``ratio * out_channels``, a multiple of ``groups``; ``ratio`` lies in (0, 1]."""
    ratio = plain_number("ratio", ratio)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}, but it is k / C_out and must be a number in (0, 1]")
    return int(groups) * max(1, round(ratio * int(out_channels) / int(groups)))


def check_basis_channels(basis_channels: int, out_channels: int, groups: int = 1) -> None:
    """Raise ``ValueError`` where ``basis_channels`` cannot be the k of such a layer."""
    whole = isinstance(basis_channels, numbers.Integral) and not isinstance(basis_channels, bool)
    if not whole or not 1 <= basis_channels <= out_channels or basis_channels % groups:
        what = f"lie between 1 and out_channels = {out_channels} and be a whole number, a multiple of groups = {groups}"
        raise ValueError(f"basis_channels is {basis_channels!r}, but it must {what}")


def resolve_mode(
    mode: Mode, *, device: torch.device, fan_in: int, out_channels: int, basis_channels: int, groups: int = 1,
    apart: bool = False,
) -> ExplicitMode:  # fmt: skip
    """What ``mode`` stands for on this device and shape; all but ``"auto"`` stand for themselves.

    ``"auto"``, until :func:`basis.bench.tuning.tune` has timed the layer: factorized on a CPU where it saves at least
    110 multiplications per output value (``fan_in``: those of the dense layer); on a GPU where it saves at least 300
    and k, rounded up to a multiple of 8, is at most half of at least 128 output channels; else composed. ``apart``:
    see :func:`derives_apart`.
    """
    if mode != "auto":
        return mode
    width, k = out_channels // groups, basis_channels // groups  # a grouped convolution is that many narrow ones
    saved = ((width - k) * fan_in - (width - k if apart else width) * k) / width
    pays = saved >= 110
    if device.type != "cpu":
        pays = saved >= 300 and width >= 128 and 2 * 8 * math.ceil(k / 8) <= width
    return "factorized" if pays else "composed"


def derives_apart(device: torch.device, *, out_channels: int, basis_channels: int) -> bool:
    """Whether factorized mode convolves Z with A alone and joins both, which on a CPU pays from k = C_out / 2 on."""
    return device.type == "cpu" and out_channels <= 2 * basis_channels < 2 * out_channels


def uses_tensor_cores(x: Tensor) -> bool:
    """Whether factorized mode fills k up to a multiple of 8 and mixes channels-last maps as the rows of a matrix."""
    device = autocast_device(x)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return device == "cuda" and dtype.itemsize == 2


class BasisConv2d(ConvLike):
    """A drop-in for ``nn.Conv2d`` that trains ``basis_channels`` filters and mixes the rest from them.

    Takes every argument of ``nn.Conv2d`` in the same order. Input (N, C_in, H, W) or (C_in, H, W). torch.jit.script
    takes no basis convolution (merge them first), torch.jit.trace does. Networks can be stacked for torch.func.vmap if
    ``order`` is the same in all: copies of one network, or new ones.

    Args:
        basis_channels: k, 1 <= k <= out_channels and a multiple of ``groups``; or give ``ratio``, k / out_channels.
        mode: both modes give the same numbers. ``"factorized"`` convolves with B and mixes with M = [I; A] as a 1x1
            convolution; ``"composed"`` builds W; ``"auto"`` picks by device and shape (:attr:`resolved_mode`).
        coefficients: the form of A, a :class:`Form` or its text, e.g. ``"low_rank:10"``; or the :class:`Coefficients`
            of another layer of the same shape, which both layers then share.

    Attributes:
        basis: B, (k, C_in/groups, kh, kw); bias: (C_out,) or None.
        coefficients: the module that holds A; ``coefficients.matrix()`` is A, (C_out - k, k/groups).
        order: (C_out,), where output channel c stands among the rows of [B; A B], group by group. In the state, but
            no buffer; reading gives a copy, and only permutations can be set.
        measured_mode: (type of device, mode) as :func:`basis.bench.tuning.use_modes` sets it, or None.
        mixed_later: the forward pass gives Z alone, for :mod:`basis.layers.batchnorm` to mix.

    Raises ``ValueError`` for a ratio, basis_channels, mode or form of A that is unknown or does not fit the shape.
    """

    order = Fact()

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        basis_channels: int | None = None, ratio: float | None = None, mode: Mode = "auto",
        coefficients: str | Form | Coefficients = "dense",
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if (basis_channels is None) == (ratio is None):
            raise ValueError("give one of basis_channels (k) and ratio (k / out_channels)")
        if basis_channels is None:
            basis_channels = basis_channels_for(ratio, out_channels, groups)  # type: ignore[arg-type]
        check_basis_channels(basis_channels, out_channels, groups)
        self.basis_channels = int(basis_channels)
        self.mode = mode
        self.measured_mode: tuple[str, ExplicitMode] | None = None
        self.mixed_later = False

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = self.out_channels, self.basis_channels, self.groups
        self.coefficients = _coefficients_for(coefficients, shape, **factory)
        self.basis = nn.Parameter(torch.empty((self.basis_channels, *self.filter_shape), **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self._draw(coefficients=self.coefficients is not coefficients)

    @property
    def mode(self) -> Mode:
        """One of ``"auto"``, ``"factorized"`` and ``"composed"``; may be set at any time."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        one_of("mode", mode, MODES)
        self._mode = mode

    @property
    def ratio(self) -> float:
        """r = k / C_out."""
        return self.basis_channels / self.out_channels

    def reset_parameters(self) -> None:
        """Draw B and the bias as ``nn.Conv2d`` does, A so that filters keep their variance; ``order``: identity."""
        self._draw(coefficients=True)

    def _draw(self, *, coefficients: bool) -> None:
        bound = 1 / math.sqrt(self.basis[0].numel())
        nn.init.uniform_(self.basis, -bound, bound)
        if coefficients:
            self.coefficients.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._know({"order": np.arange(self.out_channels)})

    def _like(self) -> Tensor:
        return self.basis

    def _made(self, name: str, like: Tensor) -> Tensor:
        """Beside ``order`` the I of M, and which of all basis maps, then all derived ones, each output channel is."""
        a, k = self.coefficients, self.coefficients.columns
        if name == "identity":  # made anew at each call it would cost a GPU two more kernels
            return torch.eye(k, dtype=like.dtype, device=like.device)
        order = super()._made("order", like)
        if name == "order":
            return order
        width = self.out_channels // a.groups
        group, row = order // width, order % width
        return torch.where(row < k, group * k + row, (a.groups - group - 1) * k + order)

    def _checked(self, name: str, value: Tensor) -> np.ndarray:
        order, groups = whole_numbers(value), self.coefficients.groups
        start = np.arange(self.out_channels).reshape(groups, -1)
        if order.shape != (self.out_channels,) or not np.array_equal(np.sort(order.reshape(groups, -1)), start):
            raise ValueError(f"is not a permutation of the {self.out_channels} output channels, each within its group")
        return order

    def _know(self, facts: Mapping[str, np.ndarray]) -> None:
        order = {**self._known, **facts}["order"]
        self._permuted = not np.array_equal(order, np.arange(self.out_channels))
        self._scattered = not self.coefficients.mixes and (self._permuted or self.coefficients.groups > 1)
        self._needed = ("identity", *["order"] * self._permuted, *["sources"] * self._scattered)
        super()._know(facts)

    @property
    def mixing(self) -> Tensor:
        """M = [I; A] per mixing group, rows in the order of the output channels: (C_out, columns of A)."""
        a = self.coefficients.present()
        matrix = a.matrix() if a.groups == 1 else a.blocks()
        eye = self.constant("identity", matrix).expand(*matrix.shape[:-2], -1, -1)
        return self._ordered(torch.cat([eye, matrix], dim=-2).flatten(0, -2))

    def _computed_weight(self) -> Tensor:
        """W = [B; A B] per mixing group."""
        last = is_channels_last(self.basis)  # flattened in their own order, so that no copy is needed
        b = self.basis.permute(0, 2, 3, 1) if last else self.basis
        a = self.coefficients.present()
        flat = b.reshape(a.groups, a.columns, -1)
        with full_precision(b):
            rows = torch.cat([flat, a.combine(flat)], dim=1).flatten(0, 1)
        weight = self._ordered(rows).view(self.out_channels, *b.shape[1:])
        return weight.permute(0, 3, 1, 2) if last else weight

    def _ordered(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.constant("order", self.basis)) if self._permuted else rows

    @property
    def resolved_mode(self) -> ExplicitMode:
        """The mode that a forward pass uses now: the measured one for ``"auto"``, else by :func:`resolve_mode`."""
        mode: Mode = "factorized" if self.mixed_later else self.mode
        if mode == "auto" and self.measured_mode and self.measured_mode[0] == self.basis.device.type:
            return self.measured_mode[1]
        return resolve_mode(
            mode, device=self.basis.device, fan_in=self.basis[0].numel(), out_channels=self.out_channels,
            basis_channels=self.basis_channels, groups=self.groups, apart=self.derives_apart,
        )  # fmt: skip

    @property
    def derives_apart(self) -> bool:
        """Whether factorized mode multiplies Z with A alone, here and now; see the function of that name."""
        in_order = self.coefficients.groups == 1 and not self._permuted
        shape = {"out_channels": self.out_channels, "basis_channels": self.basis_channels}
        return in_order and derives_apart(self.basis.device, **shape)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve as ``nn.Conv2d`` with W would; with :attr:`mixed_later` the output is Z, without the bias."""
        if (node := as_leaf(self, input)) is not None:
            return node
        x, padding = self._pad(input)
        conv = (self.stride, padding, self.dilation, self.groups)
        if self.mixed_later:
            return convolve(x, self.basis, *conv)
        if self.resolved_mode == "factorized":
            return self._factorized(x, conv)
        return F.conv2d(x, self._computed_weight(), self.bias, *conv)

    def _factorized(self, x: Tensor, conv: tuple) -> Tensor:
        a = self.coefficients
        if not a.mixes or self.derives_apart:
            z = F.conv2d(x, self.basis, None, *conv)
            y = torch.cat([z, a.present().derive(z)], dim=-3) if a.rows else z
            y = _channels(y, self.constant("sources", self.basis)) if self._scattered else y
            return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
        basis: Tensor = self.basis
        mixing = self.mixing
        suited = a.groups == 1 and uses_tensor_cores(x)
        if extra := -self.basis_channels % 8 * suited:
            basis, mixing = F.pad(basis, (0, 0, 0, 0, 0, 0, 0, extra)), F.pad(mixing, (0, extra))
        z = convolve(x, basis, *conv)
        if suited and z.dim() == 4:
            rows = z.permute(0, 2, 3, 1)
            if rows.is_contiguous():  # channels-last, asked in a way that vmap knows
                return F.linear(rows, mixing, self.bias).permute(0, 3, 1, 2)
        return F.conv2d(z, mixing[:, :, None, None], self.bias, groups=a.groups)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, coefficients: str | Form | Coefficients = "dense", moments: Moments | None = None,
        **options: Any,
    ) -> BasisConv2d:  # fmt: skip
        """The basis convolution nearest to ``conv``: the best approximation of rank k, exact at k = C_out.

        By SVD, group by group; with ``moments`` of the outputs of ``conv`` on data, their k principal components are
        kept instead (:mod:`basis.layers.moments`), and a bias takes the mean of what that loses. Pivoted QR picks the
        rows that become B, which costs no accuracy and keeps A small; for an A that cannot hold every matrix, B is the
        least-squares solution. ``options``: ``basis_channels`` or ``ratio``, and ``mode``. Keeps what
        :meth:`shaped_like` keeps, and copies the bias.

        Raises ``TypeError`` when ``conv`` is not an ``nn.Conv2d``; ``ValueError`` as the class, for a weight that is
        complex, not finite or without values (meta), and for moments of another layer or of outputs not finite.
        """
        return cls.from_convs([conv], coefficients=coefficients, moments=[moments], **options)[0]

    @classmethod
    def from_convs(
        cls, convs: Sequence[nn.Conv2d], *, coefficients: str | Form | Coefficients = "shared",
        moments: Sequence[Moments | None] = (), **options: Any,
    ) -> list[BasisConv2d]:  # fmt: skip
        """:meth:`from_conv` of several convolutions (of equal C_out and groups) that are to hold one A.

        The sum of their relative errors is least; the inputs of a layer without moments count as white.
        """
        for conv in convs:
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"from_conv takes an nn.Conv2d, not {type(conv).__name__}")
            check_weight(conv, fitted=True)
        first = cls.shaped_like(convs[0], coefficients=coefficients, **options)
        a = first.coefficients
        layers = [first, *(cls.shaped_like(conv, coefficients=a, **options) for conv in convs[1:])]
        weights = [conv.weight.detach().reshape(a.groups, -1, conv.weight[0].numel()) for conv in convs]
        given = isinstance(coefficients, Coefficients)
        seen = [m if m is not None and m.n else None for m in moments] or [None] * len(convs)
        left = principal_directions(convs, weights, seen) if any(seen) else None
        basis, order = fit(torch.cat(weights, dim=2), a, given=given, left=left)
        parts = basis.split([weight.shape[2] for weight in weights], dim=2)
        with torch.no_grad():
            for layer, conv, part, own in zip(layers, convs, parts, seen, strict=True):
                layer.basis.copy_(part.reshape(layer.basis.shape))
                layer.order = order
                if layer.bias is not None and conv.bias is not None:
                    layer.bias.copy_(conv.bias)
                    if own is not None:
                        layer.bias.copy_(layer.bias.double() + layer.lost_mean(own))
        return layers

    @classmethod
    def shaped_like(
        cls, conv: nn.Conv2d, *, coefficients: str | Form | Coefficients = "dense", **options: Any
    ) -> BasisConv2d:
        """A freshly initialised basis convolution of the shape of ``conv``, with the ``options`` of the class.

        Keeps device, dtype, memory format, ``training`` and ``requires_grad``; a given module of coefficients stays.
        Raises ``ValueError`` as the class, and for a complex convolution.
        """
        check_weight(conv, fitted=False)
        layer = cls(*arguments_of(conv, conv.weight), **options, coefficients=coefficients)
        if is_channels_last(conv.weight):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        layer.training = conv.training
        layer.basis.requires_grad_(conv.weight.requires_grad)
        if not isinstance(coefficients, Coefficients):
            layer.coefficients.train(conv.training).requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer

    @torch.no_grad()
    def lost_mean(self, moments: Moments) -> Tensor:
        """What the mean of the outputs of the layer that this was fitted to loses in this one, (C_out,), float64."""
        mean = moments.mean.flatten()
        mean = mean if self.bias is None else mean - self.bias.double()
        position = torch.argsort(self.order).view(self.coefficients.groups, -1)  # of each row of [I; A], its channel
        rows = self.mixing.double()[position]
        lost = torch.zeros_like(mean)
        lost[position.flatten()] = lost_mean(rows, mean[position][..., None]).flatten()
        return lost

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the weight ``[B; A B]`` and a copy of the bias."""
        return self._dense(self._computed_weight(), trains=self.basis.requires_grad or self.coefficients.trains)

    def extra_repr(self) -> str:
        """As ``nn.Conv2d`` prints its arguments."""
        text = f"basis_channels={self.basis_channels} (r={self.ratio:.4g}), mode={self.mode}"
        if self.mode == "auto" and self.measured_mode:
            text += " (measured on {}: {})".format(*self.measured_mode)
        if self.coefficients.form.kind != "dense":
            text += f", coefficients={self.coefficients.form}"
        return ", ".join([*self._shown_arguments(), text])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line: not the module inside


def _coefficients_for(given: str | Form | Coefficients, shape: tuple[int, int, int], **factory: Any) -> Coefficients:
    """A new module of this form for (C_out, k, groups), or the one given where it fits."""
    if not isinstance(given, Coefficients):
        return Form.parse(given).make(*shape, **factory)
    wanted = given.form.make(*shape, device="meta")
    theirs, ours = ((a.rows, a.columns, a.groups) for a in (given, wanted))
    if theirs != ours:
        raise ValueError(f"shared coefficients have rows, columns and groups {theirs}, but this layer needs {ours}")
    return given


def _channels(maps: Tensor, index: Tensor) -> Tensor:
    """``maps[:, index]``, (N, C, H, W) or (C, H, W), in the memory format of ``maps``."""
    if is_channels_last(maps):  # not index_select, which is slow there on a CPU
        return maps.permute(0, 2, 3, 1)[..., index].permute(0, 3, 1, 2)
    return maps.index_select(-3, index)
