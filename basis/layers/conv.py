"""The basis convolution: a layer that trains k of its C_out filters and mixes the others from them.

With ``B`` the basis filters (k x C_in/groups x kh x kw) and ``A`` the coefficient matrix
((C_out - k) x k), the layer is a convolution with the weight ``W = [B; A B]``. The form is the one
of Alekseev et al. 2024 (arXiv 2408.06024); LinearConv (Kahatapitiya and Rodrigo, WACV 2021) is the
special case k = C_out / 2 in composed mode. ``A`` may also be low-rank, sparse, shared, ...; see
:mod:`basis.layers.coefficients`.

With ``groups`` > 1 every group has k / groups basis filters of its own, since filters of different
groups see different input channels; ``A`` then holds one block per group, stacked by rows, just as
``nn.Conv2d.weight`` stacks its groups. The form ``grouped`` splits these groups further, for the mixing
alone: W is [B; A B] in each of these mixing groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from basis.layers.base import ConvLike, PaddingMode, arguments_of, autocast_device
from basis.layers.coefficients import Coefficients, Form
from basis.layers.moments import Moments, directions, lost_mean
from basis.modules import is_channels_last

Mode = Literal["auto", "factorized", "composed", "hybrid"]
ExplicitMode = Literal["factorized", "composed", "hybrid"]
MODES: tuple[str, ...] = get_args(Mode)


def basis_channels_for(ratio: float, out_channels: int, groups: int = 1) -> int:
    """The number of basis channels k nearest to ``ratio * out_channels``.

    k is a multiple of ``groups`` and at least ``groups``. Raises ``ValueError`` for a ratio outside
    (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio}, but it is k / C_out and must lie in (0, 1]")
    return groups * max(1, round(ratio * out_channels / groups))


def check_basis_channels(basis_channels: int, out_channels: int, groups: int = 1) -> None:
    """Raise ``ValueError`` where ``basis_channels`` cannot be the k of such a layer."""
    if isinstance(basis_channels, bool) or not isinstance(basis_channels, int):
        raise ValueError(f"basis_channels is {basis_channels!r}, but it must be a whole number of filters")
    if not 1 <= basis_channels <= out_channels:
        raise ValueError(
            f"basis_channels is {basis_channels}, but it must lie between 1 and out_channels = {out_channels}"
        )
    if basis_channels % groups:
        raise ValueError(
            f"basis_channels is {basis_channels}, but it must be a multiple of groups = {groups}, "
            "because filters of different groups cannot be mixed"
        )


def resolve_mode(
    mode: Mode,
    *,
    device: torch.device,
    fan_in: int,
    out_channels: int,
    basis_channels: int,
    groups: int = 1,
    apart: bool = False,
) -> ExplicitMode:
    """What ``mode`` stands for on this device and shape; all but ``"auto"`` stand for themselves.

    Factorized mode saves multiplications and pays with a second pass over the activations, which costs
    about the same everywhere. So ``"auto"`` is

    - on a CPU: factorized where it saves at least 110 multiplications per output value, else composed
      (measured, ``basis bench layer``: float32 and bfloat16, both memory formats);
    - on a GPU: factorized where it saves at least 300, with at least 128 output channels and with k, rounded up to
      a multiple of 8, at most half of them, else composed (the faster of both for every layer of ResNet-18 at
      r = 1/2 and 1/4, measured on an H200: bfloat16, channels-last, forward and backward, CUDA graphs).

    This rule is for layers that nobody has timed; :func:`basis.bench.tuning.tune` does.

    Args:
        fan_in: C_in/groups * kh * kw, the multiplications of one output value of the dense layer.
        apart: whether factorized mode would multiply Z with A alone, see :func:`derives_apart`.
    """
    if mode != "auto":
        return mode
    # Per group: a grouped convolution is that many narrow ones.
    width, k = out_channels // groups, basis_channels // groups
    mixed = (width - k if apart else width) * k
    saved = ((width - k) * fan_in - mixed) / width
    pays = saved >= 110
    if device.type != "cpu":
        pays = saved >= 300 and width >= 128 and 2 * 8 * math.ceil(k / 8) <= width
    return "factorized" if pays else "composed"


def derives_apart(device: torch.device, *, out_channels: int, basis_channels: int) -> bool:
    """Whether factorized mode convolves Z with A alone and joins both, rather than with M = [I; A].

    That saves k of C_out rows and costs one more pass over the output. On a CPU it pays from
    k = C_out / 2 on (measured); on a GPU, where the pass costs more than the rows, it never should.
    """
    return device.type == "cpu" and out_channels <= 2 * basis_channels < 2 * out_channels


def padded_channels(device: torch.device, dtype: torch.dtype, basis_channels: int) -> int:
    """How many basis channels factorized mode computes with; zero filters and coefficients fill up.

    On a GPU in half precision, rows of maps that are no multiple of 16 bytes keep a convolution from the
    tensor cores or are copied (cuDNN developer guide, "tensor core operations"), so k is rounded up to a
    multiple of 8 there; elsewhere it is k. Not yet measured.
    """
    half = device.type == "cuda" and dtype.itemsize == 2
    return 8 * math.ceil(basis_channels / 8) if half else basis_channels


def mixes_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether factorized mode mixes channels-last maps as the rows of a matrix, rather than by a 1x1 convolution.

    On a GPU in half precision (not yet measured). In float32 PyTorch uses TF32 for convolutions only, unless it
    is told otherwise.
    """
    return device.type == "cuda" and dtype.itemsize == 2


class _HybridConv(torch.autograd.Function):
    """Dense forward with W = M B, factorized backward: dZ = M^T dY, then k-channel gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        basis: Tensor,
        mixing: Tensor,
        rows: Tensor | None,
        conv: tuple,
        mixing_groups: int,
    ) -> Tensor:
        y = F.conv2d(x, weight, None, *conv)
        # The basis channels are copied out: a view of y would fail under an in-place activation. The
        # copy keeps the memory format of y (index_select would give NCHW, dear in the backward pass).
        z = y.new_empty(0)
        if mixing.requires_grad:
            first = y[:, : len(basis)]
            z = torch.empty_like(first).copy_(first if rows is None else y[:, rows])
        ctx.save_for_backward(x, basis, mixing, z)
        ctx.conv, ctx.mixing_groups = conv, mixing_groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, basis, mixing, z = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv
        need_x, _, need_basis, need_mixing, *_ = ctx.needs_input_grad
        mix = ((1, 1), (0, 0), (1, 1), False, (0, 0), ctx.mixing_groups)
        dx = d_basis = d_mixing = None
        if need_mixing:
            _, d_mixing, _ = torch.ops.aten.convolution_backward(dy, z, mixing, None, *mix, (False, True, False))
        if need_x or need_basis:
            z = z if z.numel() else torch.empty_like(dy[:, : len(basis)])
            dz, _, _ = torch.ops.aten.convolution_backward(dy, z, mixing, None, *mix, (True, False, False))
            dx, d_basis, _ = torch.ops.aten.convolution_backward(
                dz, x, basis, None, stride, padding, dilation, False, (0, 0), groups, (need_x, need_basis, False)
            )
        return dx, None, d_basis, d_mixing, None, None, None


class BasisConv2d(ConvLike):
    """A drop-in for ``nn.Conv2d`` that trains ``basis_channels`` filters and mixes the rest from them.

    Takes every argument of ``nn.Conv2d`` in the same order. Input (N, C_in, H, W) or (C_in, H, W),
    output as ``nn.Conv2d`` gives it.

    Args:
        basis_channels: k, the number of filters trained as filters; 1 <= k <= out_channels and a
            multiple of ``groups``. Give this or ``ratio``.
        ratio: r = k / out_channels in (0, 1].
        mode: how the layer is computed; all modes give the same numbers.
            ``"factorized"`` convolves with B and mixes with M = [I; A] as a 1x1 convolution;
            ``"composed"`` builds W = [B; A B] and convolves once; ``"hybrid"`` does the forward pass
            composed and the backward pass factorized (first derivatives only); ``"auto"`` picks by
            device and shape (see :attr:`resolved_mode`). Low-rank A is applied as two 1x1 convolutions
            in factorized mode, and repeated filters by copying maps.
        coefficients: the form of A as text or as a :class:`Form`, e.g. ``"low_rank:10"``; or the
            :class:`Coefficients` of another layer of the same shape, which both layers then share.

    Parameters, buffers and modules:
        basis: B, (k, C_in/groups, kh, kw).
        coefficients: the module that holds A; ``coefficients.matrix()`` is A, (C_out - k, k/groups).
        bias: (C_out,) or None.
        order: (C_out,), where output channel c stands among the rows of [B; A B] (mixing group by
            mixing group). The identity at random initialisation; :meth:`from_conv` chooses other rows
            as the basis.

    Raises:
        ValueError: for a ratio or basis_channels that make no sense, an unknown mode, or a form of A
            that is unknown or does not fit the shape.
    """

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
        basis_channels: int | None = None,
        ratio: float | None = None,
        mode: Mode = "auto",
        coefficients: str | Form | Coefficients = "dense",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if (basis_channels is None) == (ratio is None):
            raise ValueError("give one of basis_channels (k) and ratio (k / out_channels)")
        if basis_channels is None:
            basis_channels = basis_channels_for(ratio or 0.0, out_channels, groups)
        check_basis_channels(basis_channels, out_channels, groups)
        self.basis_channels = basis_channels
        self.mode = mode
        self.measured_mode: tuple[str, ExplicitMode] | None = None  # (type of device, mode); see basis.bench.tuning
        self.mixed_later = (
            False  # the forward pass gives Z alone, for a batch normalisation that mixes; see basis.layers.batchnorm
        )

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.coefficients = _coefficients_for(coefficients, (out_channels, basis_channels, groups), **factory)
        self.basis = nn.Parameter(torch.empty((basis_channels, *self.filter_shape), **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.register_buffer("order", torch.arange(out_channels, device=device))
        self.register_buffer("_sources", None, persistent=False)
        self.register_buffer("_identity", torch.eye(self.coefficients.columns, **factory), persistent=False)
        self.order: Tensor
        self._sources: Tensor | None
        self._identity: Tensor  # the I of M; made anew at each call it would cost a GPU two more kernels
        self._draw(coefficients=self.coefficients is not coefficients)

    @property
    def mode(self) -> Mode:
        """One of ``"auto"``, ``"factorized"``, ``"composed"``, ``"hybrid"``; may be set at any time."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, but it must be one of {', '.join(MODES)}")
        self._mode = mode

    @property
    def ratio(self) -> float:
        """r = k / C_out."""
        return self.basis_channels / self.out_channels

    def reset_parameters(self) -> None:
        """Draw new parameters so that activations keep the variance that ``nn.Conv2d`` gives.

        B and the bias are drawn as ``nn.Conv2d`` draws them (Kaiming-uniform with a = sqrt(5), which
        is U(-1, 1) / sqrt(fan_in)). A is drawn so that every row of A B has the variance of a row of B
        (dense: uniform with variance groups / k), for all layers that share it. ``order`` becomes the
        identity.
        """
        self._draw(coefficients=True)

    def _draw(self, *, coefficients: bool) -> None:
        bound = 1 / math.sqrt(self.basis[0].numel())
        nn.init.uniform_(self.basis, -bound, bound)
        if coefficients:
            self.coefficients.reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        with torch.no_grad():
            self.order.copy_(torch.arange(self.out_channels, device=self.order.device))
        self._order_changed(permuted=False)

    def _order_changed(self, *, permuted: bool) -> None:
        """Keep what follows from ``order``."""
        self._permuted = permuted
        a = self.coefficients
        in_order = a.groups == 1 and not permuted
        self._sources = None if a.mixes or in_order else a.sources(self.order)

    # -- the weight and its parts ---------------------------------------------------------------

    @property
    def mixing(self) -> Tensor:
        """M = [I; A] per mixing group, rows in the order of the output channels: (C_out, columns of A)."""
        a = self.coefficients.matrix() if self.coefficients.groups == 1 else self.coefficients.blocks()
        eye = self._identity.to(a).expand(*a.shape[:-2], -1, -1)
        return self._ordered(torch.cat([eye, a], dim=-2).flatten(0, -2))

    @property
    def weight(self) -> Tensor:
        """W = [B; A B] per mixing group, (C_out, C_in/groups, kh, kw), in the memory format of B."""
        # Channels-last filters are flattened in their own order, so that no copy is needed.
        last = is_channels_last(self.basis)
        b = self.basis.permute(0, 2, 3, 1) if last else self.basis
        flat = b.reshape(self.coefficients.groups, self.coefficients.columns, -1)
        # In full precision even under autocast, which rounds the finished weight once.
        with torch.autocast(autocast_device(b), enabled=False):
            rows = torch.cat([flat, self.coefficients.combine(flat)], dim=1).flatten(0, 1)
        weight = self._ordered(rows).view(self.out_channels, *b.shape[1:])
        return weight.permute(0, 3, 1, 2) if last else weight

    def _ordered(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.order) if self._permuted else rows

    def _basis_rows(self) -> Tensor:
        """The output channels that are the basis filters themselves, in the order of B: (k,)."""
        position = torch.argsort(self.order) if self._permuted else self.order
        return position.view(self.coefficients.groups, -1)[:, : self.coefficients.columns].reshape(-1)

    # -- forward --------------------------------------------------------------------------------

    @property
    def resolved_mode(self) -> ExplicitMode:
        """The mode that a forward pass uses now; differs from :attr:`mode` where that is ``"auto"``.

        That one is the fastest by measurement, where :func:`basis.bench.tuning.use_modes` has set it for this type
        of device, else what the rule says.
        """
        mode: Mode = "factorized" if self.mixed_later else self.mode
        if mode == "auto" and self.measured_mode and self.measured_mode[0] == self.basis.device.type:
            return self.measured_mode[1]
        return resolve_mode(
            mode,
            device=self.basis.device,
            fan_in=self.basis[0].numel(),
            out_channels=self.out_channels,
            basis_channels=self.basis_channels,
            groups=self.groups,
            apart=self.derives_apart,
        )

    @property
    def derives_apart(self) -> bool:
        """Whether factorized mode multiplies Z with A alone, here and now; see the function of that name."""
        in_order = self.coefficients.groups == 1 and not self._permuted
        shape = {"out_channels": self.out_channels, "basis_channels": self.basis_channels}
        return in_order and derives_apart(self.basis.device, **shape)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x``, (N, C_in, H, W) or (C_in, H, W), as ``nn.Conv2d`` with W = [B; A B] would.

        Where :attr:`mixed_later` is set, the output is Z, the k basis channels without the bias.
        """
        mode = self.resolved_mode
        x, padding = self._pad(x)
        conv = (self.stride, padding, self.dilation, self.groups)
        if mode == "factorized":
            return self._factorized(x, conv)
        if mode == "hybrid" and torch.is_grad_enabled():
            return self._hybrid(x, conv)
        return F.conv2d(x, self.weight, self.bias, *conv)

    def _factorized(self, x: Tensor, conv: tuple) -> Tensor:
        a, k = self.coefficients, self.basis_channels
        mixes_all = a.mixes and a.groups == 1 and not self.mixed_later
        extra = padded_channels(x.device, self._computed_in(x), k) - k if mixes_all else 0
        basis = F.pad(self.basis, (0, 0, 0, 0, 0, 0, 0, extra)) if extra else self.basis
        z = F.conv2d(x, basis, None, *conv)
        if self.mixed_later:
            return z
        if a.mixes and not self.derives_apart:
            mixing = F.pad(self.mixing, (0, extra)) if extra else self.mixing
            if a.groups == 1 and z.dim() == 4 and mixes_rows(z.device, z.dtype):
                rows = z.permute(0, 2, 3, 1)
                if rows.is_contiguous():  # channels-last, asked in a way that vmap knows
                    return F.linear(rows, mixing, self.bias).permute(0, 3, 1, 2)
            return F.conv2d(z, mixing[:, :, None, None], self.bias, groups=a.groups)
        y = torch.cat([z, F.conv2d(z, a.matrix()[:, :, None, None])], dim=-3) if a.mixes else a.derive(z)
        if self._sources is not None:
            y = _channels(y, self._sources)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    @staticmethod
    def _computed_in(x: Tensor) -> torch.dtype:
        device = autocast_device(x)
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def _hybrid(self, x: Tensor, conv: tuple) -> Tensor:
        if x.dim() == 3:
            return self._hybrid(x[None], conv)[0]
        with torch.no_grad():
            weight = self.weight
        mixing = self.mixing[:, :, None, None]
        basis: Tensor = self.basis
        if torch.is_autocast_enabled(autocast_device(x)):
            dtype = self._computed_in(x)
            x, weight, basis, mixing = x.to(dtype), weight.to(dtype), basis.to(dtype), mixing.to(dtype)
        groups = self.coefficients.groups
        rows = self._basis_rows() if self._permuted or groups > 1 else None  # None: the first k
        y = _HybridConv.apply(x, weight, basis, mixing, rows, conv, groups)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    # -- from and to a dense convolution --------------------------------------------------------

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        basis_channels: int | None = None,
        ratio: float | None = None,
        mode: Mode = "auto",
        coefficients: str | Form | Coefficients = "dense",
        moments: Moments | None = None,
    ) -> BasisConv2d:
        """The basis convolution nearest to ``conv``: the best approximation of rank k, exact at k = C_out.

        The weight is truncated by SVD, group by group; or, with ``moments``, its outputs are projected on their
        k principal components (see :mod:`basis.layers.moments`), and a bias takes the mean of what that loses.
        Without a bias the components are those about zero: the layer never gets a parameter that ``conv``
        has not. Pivoted QR on the left singular vectors, or the components, then
        picks k rows whose truncated filters become B, and all other rows are combinations of them:
        ``[I; T] B`` equals the truncated matrix, so this gauge costs no accuracy (and the pivoting
        keeps it well conditioned). Keeps device, dtype, memory format, ``training`` and
        ``requires_grad`` of ``conv``; copies its bias.

        Low-rank and sparse A are fitted to that dense one (see their ``fit``), or to the one with the
        first k rows as B where that halves the squared error, as it does for a weight that had this form;
        B is then the least-squares solution for this A. Where A is not for the layer to choose (frozen,
        repeat, or a module that is given), B is the least-squares solution for the rows in their order.

        Args:
            moments: of the outputs of ``conv`` on data, as :func:`basis.layers.moments.output_moments` takes them.

        Raises:
            TypeError: when ``conv`` is not an ``nn.Conv2d``.
            ValueError: for a ratio, basis_channels or form of A that make no sense; for moments of another
                layer, or of outputs that were not finite.
        """
        options: dict[str, Any] = {"basis_channels": basis_channels, "ratio": ratio, "mode": mode}
        return cls.from_convs([conv], coefficients=coefficients, moments=[moments], **options)[0]

    @classmethod
    def from_convs(
        cls,
        convs: Sequence[nn.Conv2d],
        *,
        basis_channels: int | None = None,
        ratio: float | None = None,
        mode: Mode = "auto",
        coefficients: str | Form | Coefficients = "shared",
        moments: Sequence[Moments | None] = (),
    ) -> list[BasisConv2d]:
        """The basis convolutions nearest to ``convs`` that hold one A: :meth:`from_conv` of all at once.

        The convolutions have equal C_out and groups; their filters are laid end to end. With ``moments``, one
        for each, what is least is the sum of their relative errors; where one is None or was never called, its
        inputs count as white.
        """
        for conv in convs:
            if not isinstance(conv, nn.Conv2d):
                raise TypeError(f"from_conv takes an nn.Conv2d, not {type(conv).__name__}")
        layers: list[BasisConv2d] = []
        for conv in convs:
            a = layers[0].coefficients if layers else coefficients
            layers.append(cls.shaped_like(conv, basis_channels=basis_channels, ratio=ratio, mode=mode, coefficients=a))
        a = layers[0].coefficients
        weights = [conv.weight.detach().reshape(a.groups, -1, conv.weight[0].numel()) for conv in convs]
        given = isinstance(coefficients, Coefficients)
        seen = [m if m is not None and m.n else None for m in moments]
        left = _principal(convs, weights, seen) if any(seen) else None
        basis, order = _fit(torch.cat(weights, dim=2), a, given=given, left=left)
        parts = basis.split([weight.shape[2] for weight in weights], dim=2)
        with torch.no_grad():
            for layer, conv, part in zip(layers, convs, parts, strict=True):
                layer.basis.copy_(part.reshape(layer.basis.shape))
                layer.order.copy_(order)
                layer._order_changed(permuted=a.fits and not given)
                if conv.bias is not None and layer.bias is not None:
                    layer.bias.copy_(conv.bias)
            for layer, own in zip(layers, seen, strict=False):
                if own is not None and layer.bias is not None:
                    layer.bias.copy_(layer.bias.double() + layer.lost_mean(own))
        return layers

    @classmethod
    def shaped_like(
        cls,
        conv: nn.Conv2d,
        *,
        basis_channels: int | None = None,
        ratio: float | None = None,
        mode: Mode = "auto",
        coefficients: str | Form | Coefficients = "dense",
    ) -> BasisConv2d:
        """A freshly initialised basis convolution of the shape of ``conv``.

        Keeps device, dtype, memory format, ``training`` and ``requires_grad``; none of its values.
        Coefficients that are given as a module stay as they are.
        """
        options: dict[str, Any] = {"basis_channels": basis_channels, "ratio": ratio, "mode": mode}
        layer = cls(*arguments_of(conv), **options, coefficients=coefficients)
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
        """What the mean of a dense layer's outputs (of these ``moments``) loses in this one, (C_out,), float64.

        For a layer with B nearest to the dense weight for its A, as :meth:`from_conv` makes it.
        """
        mean = moments.mean.flatten()
        mean = mean if self.bias is None else mean - self.bias.double()
        a = self.coefficients
        position = torch.argsort(self.order).view(a.groups, -1)  # of each row of [I; A], its channel
        rows = self.mixing.double()[position]
        lost = torch.zeros_like(mean)
        lost[position.flatten()] = lost_mean(rows, mean[position][..., None]).flatten()
        return lost

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the weight ``[B; A B]`` and a copy of the bias."""
        weight = self.weight.detach()
        if is_channels_last(self.basis):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return self._dense(weight, trains=self.basis.requires_grad or self.coefficients.trains)

    # -- bookkeeping ----------------------------------------------------------------------------

    def _apply(self, *args: Any, **kwargs: Any) -> BasisConv2d:
        super()._apply(*args, **kwargs)
        nn.init.eye_(self._identity)  # in place, for CUDA graphs; to_empty leaves it without values
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.order.is_meta:
            if self._identity.is_meta:  # by load_state_dict(..., assign=True)
                self._identity = torch.eye(len(self._identity), dtype=self.basis.dtype, device=self.basis.device)
            self._order_changed(permuted=not torch.equal(self.order.cpu(), torch.arange(self.out_channels)))

    def extra_repr(self) -> str:
        """The arguments that matter, the way ``nn.Conv2d`` prints its own."""
        parts = self._shown_arguments()
        parts.append(f"basis_channels={self.basis_channels} (r={self.ratio:.4g}), mode={self.mode}")
        if self.mode == "auto" and self.measured_mode:
            parts[-1] += " (measured on {}: {})".format(*self.measured_mode)
        if self.coefficients.form.kind != "dense":
            parts.append(f"coefficients={self.coefficients.form}")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line: not the module inside


def _coefficients_for(
    coefficients: str | Form | Coefficients, shape: tuple[int, int, int], **factory: Any
) -> Coefficients:
    """A new module of this form for (C_out, k, groups), or the one given where it fits."""
    if not isinstance(coefficients, Coefficients):
        return Form.parse(coefficients).make(*shape, **factory)
    wanted = coefficients.form.make(*shape, device="meta")
    theirs, ours = ((a.rows, a.columns, a.groups) for a in (coefficients, wanted))
    if theirs != ours:
        raise ValueError(
            "shared coefficients between layers of different shape: rows, columns and groups are "
            f"{theirs} in the coefficients given, but {ours} in this layer"
        )
    return coefficients


def _channels(maps: Tensor, index: Tensor) -> Tensor:
    """``maps[:, index]``, (N, C, H, W) or (C, H, W), in the memory format of ``maps``."""
    if maps.dim() == 4 and is_channels_last(maps):  # not index_select, which is slow there on a CPU
        return maps.permute(0, 2, 3, 1)[..., index].permute(0, 3, 1, 2)
    return maps.index_select(-3, index)


@torch.no_grad()
def _principal(convs: Sequence[nn.Conv2d], weights: Sequence[Tensor], moments: Sequence[Moments | None]) -> Tensor:
    """The directions that keep most of the outputs of these layers: (mixing groups, width, width)."""
    if len(moments) != len(convs):
        raise ValueError(f"there are moments of {len(moments)} layers for {len(convs)} convolutions; give one for each")
    total = torch.zeros((), dtype=torch.float64)
    for conv, weight, own in zip(convs, weights, moments, strict=True):
        shape = (conv.groups, conv.out_channels // conv.groups, 1)
        if own is None:
            second = weight.double() @ weight.double().mT
        elif tuple(own.mean.shape) != shape:
            raise ValueError(
                f"the moments are those of outputs (groups, channels of a group) = {tuple(own.mean.shape[:2])}, but "
                f"the convolution's are {shape[:2]}"
            )
        elif not own.finite:
            raise ValueError("the outputs on the calibration data are not finite, so they have no principal components")
        else:
            second = own.second(about_mean=conv.bias is not None, groups=len(weight)).to(weight.device)
        trace = second.diagonal(dim1=1, dim2=2).sum()
        total = total.to(second.device) + second / (trace if trace > 0 else 1)
    return directions(total, torch.cat(list(weights), dim=2))


def _fit(weight: Tensor, a: Coefficients, *, given: bool, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit ``a``, unless it is given, to a weight (mixing groups, C_out / groups, F).

    ``left`` are the directions to keep, from most to least; those of the SVD unless given.

    Returns B (mixing groups, columns, F) and ``order`` (C_out,).
    """
    groups, width, _ = weight.shape
    if given or not a.fits:
        order = torch.arange(groups * width, device=weight.device)
        return _least_squares_basis(weight, a, order[:width].expand(groups, width)), order
    if a.free:
        return _fit_from(weight, a, pivot=True, left=left)

    @torch.no_grad()
    def error(pivot: bool) -> Tensor:
        basis, order = _fit_from(weight, a, pivot=pivot, left=left)
        rows = torch.cat([basis, a.blocks().double() @ basis], dim=1).flatten(0, 1)
        return (rows[order] - weight.double().flatten(0, 1)).square().sum()

    rounding = 1e-12 * weight.double().square().sum()
    return _fit_from(weight, a, pivot=bool(error(True) <= 2 * error(False) + rounding), left=left)


@torch.no_grad()
def _fit_from(weight: Tensor, a: Coefficients, *, pivot: bool, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`_fit` for A that is learned, from one dense factorization."""
    parts: Sequence[Tensor | None] = [None] * len(weight) if left is None else list(left)
    factors = [
        factorize(block.double(), a.columns, pivot=pivot, left=own) for block, own in zip(weight, parts, strict=True)
    ]
    basis, dense, order = (torch.stack(parts) for parts in zip(*factors, strict=True))
    a.fit(dense, basis)
    if not a.free:
        basis = _least_squares_basis(weight, a, order)
    start = torch.arange(len(weight), device=weight.device)[:, None] * weight.shape[1]
    return basis, (start + torch.argsort(order)).flatten()


@torch.no_grad()
def _least_squares_basis(weight: Tensor, a: Coefficients, order: Tensor) -> Tensor:
    """B nearest to ``weight`` for this A, where row i of [B; A B] is row ``order[i]`` of its group, in float64."""
    blocks = a.blocks().double()
    eye = torch.eye(a.columns, dtype=blocks.dtype, device=blocks.device).expand(a.groups, -1, -1)
    rows = weight.double().gather(1, order[:, :, None].expand(weight.shape))
    return torch.linalg.lstsq(torch.cat([eye, blocks], dim=1), rows).solution


def factorize(
    matrix: Tensor, k: int, *, pivot: bool = True, left: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the best rank-k approximation of ``matrix`` (C_out x F) as ``[I; A] B`` in a row order.

    Returns B (k x F), A ((C_out - k) x k) and ``p`` (C_out,), such that row ``p[i]`` of the
    approximation is row i of ``[B; A B]``: with ``pivot`` the rows that keep A small come first, else
    the order is that of ``matrix``. At k = C_out the rows are returned as they are. Computed
    in float64 and returned in the dtype of ``matrix``. Where the rank of ``matrix`` is below k, the
    rows that are left over get coefficients of the pseudo-inverse.

    With ``left`` (C_out x C_out, orthonormal columns) the approximation is the projection on its first k columns.
    """
    rows, dtype = matrix.shape[0], matrix.dtype
    identity = torch.arange(rows, device=matrix.device)
    if k >= rows:
        return matrix, matrix.new_empty((0, k)), identity
    if left is None:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = min(k, s.shape[0])
        left, right = u[:, :rank], s[:rank, None] * vh[:rank]
    else:
        rank, left = k, left[:, :k].double()
        right = left.mT @ matrix.double()
    order = _pivots(left) if pivot else identity[:k]
    if len(order) < k:  # fewer singular vectors than basis filters: F < k, the matrix is already exact
        order = torch.cat([order, identity[~torch.isin(identity, order)][: k - rank]])
    rest = identity[~torch.isin(identity, order)]
    coefficients = left[rest] @ torch.linalg.pinv(left[order])
    return (
        (left @ right)[order].to(dtype),
        coefficients.to(dtype),
        torch.cat([order, rest]),
    )


def _pivots(left: Tensor) -> Tensor:
    """Indices of the rows of ``left`` (C x k, orthonormal columns) that pivoted QR of its transpose picks."""
    _, pivots = scipy.linalg.qr(left.T.cpu().numpy(), mode="r", pivoting=True)
    return torch.from_numpy(pivots[: left.shape[1]].astype("int64")).to(left.device)
