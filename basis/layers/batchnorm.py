"""Batch normalisation taken through the basis: C channels normalised, k of them looked at.

A basis convolution makes C channels ``y = M z + c`` from k basis channels z (M: the mixing matrix C x k,
c: the bias), and a batch normalisation follows it. Both maps are affine, so the statistics of y follow
from those of z, and the two of them are one affine map of z: y is never made, nor kept for the backward
pass. Kept are z and, where a ReLU follows, the output, which the next layer keeps anyway.

**Forward.** Over the P = N H W pixels let m be the mean of z, S = mean of (z - m)(z - m)^T (k x k), and
s = 1 / sqrt(var + eps) per channel. Then::

    mean of y = M m + c        var of y = diag(M S M^T)
    out = relu(W z + b + residual)    with    W = diag(gamma s) M,    b = beta - W m

so c has no effect but on the running mean, and its gradient is zero.

**Backward.** Let dO be the gradient before the ReLU, t = sum of dO over the pixels (C) and
G = sum of dO (z - m)^T (C x k). With the normalised channels x = s M (z - m) of the ordinary backward
pass, ``dy = gamma s (dO - t / P - x q)`` where ``q = (sum of dO x) / P = s rowsum(G * M) / P``. Since
dz = M^T dy and dM = sum of dy z^T, where dy sums to zero::

    dbeta = t        dgamma = P q        dresidual = dO        dc = 0
    dz = W^T dO - E z + e    with    E = M^T diag(gamma s^2 q) M,    e = E m - W^T t / P
    dM = diag(gamma s) (G - P diag(s q) M S)

The passes over whole maps are four: :func:`moments`, :func:`apply`, :func:`gradient_sums` and
:func:`input_gradient`; all the rest is as small as M. ``basis.layers.kernels`` has the same four for GPUs.

Rounding: normalisation does not see a constant added to z, so where the four are those of this file,
z is first centred on its mean, rounded to the precision of z. b is then small, and W is rounded before
b is made of it, so that low precision shifts no channel. A channel in which M cancels large basis channels
down to a fraction f of their spread loses digits of its variance in float32, where the ordinary pair loses
none: it is off by 1e-7 / f^2 to twice that, 1e-5 at f = 0.1, 1e-3 at 0.01 and all of it at 3e-4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.base import autocast_device
from basis.layers.conv import BasisConv2d
from basis.layers.norm_pairs import Pairs, afterwards, norm_pairs

# -- the four passes over whole maps ---------------------------------------------------------------
#
# Maps of n channels are rows (P, n) or (N, n, H, W) in either memory format. Small tensors are float32,
# or float64 where the maps are.


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k,) and covariance (k, k) of maps z of k channels, centred in two passes, divided by P."""
    z = z.to(accumulated(z.dtype))
    mean = _total(z) / _pixels(z)
    rest, covariance = _moments_about_zero(z - _per_channel(mean, z))
    return mean + rest, covariance


def apply(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(weight z + bias + residual), maps of C channels in the dtype and memory format of z.

    Args:
        z: maps of k channels.
        weight, bias: (C, k) and (C,).
        residual: maps of C channels, or None for none.
        relu: whether the ReLU is taken.
    """
    out = _mix(z, weight, bias)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def gradient_sums(dout: Tensor, out: Tensor | None, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dO (C,) and of dO (z - mean)^T (C, k) over all pixels.

    Args:
        dout: the gradient of the output, maps of C channels.
        out: the output; dO is ``dout`` where it is positive. None: dO is ``dout``.
        z: maps of k channels.
        mean: (k,).
    """
    dout = _before_relu(dout, out)
    total = _total(dout)
    return total, _outer(dout, z).addr(total, mean, alpha=-1)


def input_gradient(
    dout: Tensor, out: Tensor | None, z: Tensor, weight: Tensor, quadratic: Tensor, constant: Tensor
) -> Tensor:
    """dO weight - z quadratic + constant, row by row: maps of k channels in the dtype of z.

    Args:
        dout, out, z: as in :func:`gradient_sums`.
        weight, quadratic, constant: (C, k), (k, k) and (k,).
    """
    return _mix_onto(_mix(z, -quadratic.t(), constant), _before_relu(dout, out), weight.t())


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over maps of ``dtype`` are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pixels(maps: Tensor) -> int:
    return maps.numel() // maps.shape[1]


def _per_channel(values: Tensor, maps: Tensor) -> Tensor:
    return values.view(-1, *[1] * (maps.dim() - 2))


def _moments_about_zero(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of maps whose mean is zero up to rounding."""
    mean = _total(centred) / _pixels(centred)
    return mean, _outer(centred, centred) / _pixels(centred) - torch.outer(mean, mean)


def _before_relu(dout: Tensor, out: Tensor | None) -> Tensor:
    return dout if out is None else torch.ops.aten.threshold_backward(dout, out, 0)


def _by_image(maps: Tensor) -> bool:
    """Whether one product per image is quickest: NCHW and images that are not small (measured on a CPU)."""
    return maps.dim() == 4 and maps.stride(1) == maps.shape[2] * maps.shape[3] >= 64


def _mix(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """weight maps + bias."""
    weight, bias = weight.to(maps.dtype), bias.to(maps.dtype)
    if maps.dim() == 2:
        return F.linear(maps, weight, bias)
    if not _by_image(maps):
        return F.conv2d(maps, weight[:, :, None, None], bias)
    out = torch.baddbmm(bias[:, None], weight.expand(maps.shape[0], *weight.shape), maps.flatten(2))
    # No view: autograd lets nobody write into a view that a Function returns, as an in-place ReLU would.
    return torch.ops.aten._unsafe_view(out, [*out.shape[:2], *maps.shape[2:]])


def _mix_onto(start: Tensor, maps: Tensor, weight: Tensor) -> Tensor:
    """start + weight maps, in place where ``start`` is rows or one product per image is taken."""
    weight = weight.to(maps.dtype)
    if maps.dim() == 2:
        return start.addmm_(maps, weight.t())
    if _by_image(maps):
        start.view(*start.shape[:2], -1).baddbmm_(weight.expand(maps.shape[0], *weight.shape), maps.flatten(2))
        return start
    if (rows := _rows_if_last(start)) is not None:
        rows.addmm_(_rows(maps), weight.t())
        return start
    return start.add_(F.conv2d(maps, weight[:, :, None, None]))


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b^T over all pixels, of maps of the same dtype and memory format."""
    dtype = accumulated(a.dtype)
    if a.dtype == torch.float16:  # whose products come out in float16, where sums over pixels overflow
        a, b = a.to(dtype), b.to(dtype)
    if _by_image(a):
        return torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(0, dtype=dtype)
    if a.dim() == 4:
        a, b = _rows(a), _rows(b)
    # A sum of products over parts: one product over all pixels would round more, all the more in low precision.
    enough = max(256, 4 * b.shape[1])
    parts = next(n for n in (64, 32, 16, 8, 4, 2, 1) if n == 1 or (a.shape[0] % n == 0 and a.shape[0] >= n * enough))
    return torch.bmm(a.view(parts, -1, a.shape[1]).mT, b.view(parts, -1, b.shape[1])).sum(0, dtype=dtype)


def _total(maps: Tensor) -> Tensor:
    return maps.sum([d for d in range(maps.dim()) if d != 1], dtype=accumulated(maps.dtype))


def _rows(maps: Tensor) -> Tensor:
    """Maps (N, n, H, W) as rows (P, n): a view of channels-last ones, else a copy."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


# -- one normalisation -----------------------------------------------------------------------------


def _kernels(rows: Tensor) -> ModuleType | None:
    """``basis.layers.kernels`` where it can be used on these rows; a compiler gets plain operations instead."""
    if torch.compiler.is_compiling():
        return None
    from basis.layers import kernels

    return kernels if kernels.usable(rows) else None


def _rows_if_last(maps: Tensor) -> Tensor | None:
    """The rows (P, n) of maps (N, n, H, W) where they are a view."""
    last = maps.permute(0, 2, 3, 1)
    return last.flatten(0, 2) if last.is_contiguous() else None


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (P, n) as maps (N, n, H, W), channels-last; N, H and W are those of ``like``."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _folded(mixing: Tensor, gamma: Tensor | None, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """W = diag(gamma s) M, rounded to ``dtype`` but kept as it was."""
    scale = inverse if gamma is None else gamma * inverse
    return (scale[:, None] * mixing).to(dtype).to(mixing.dtype)


class _Normalise(torch.autograd.Function):
    """From z and the parameters to the output, by the formulas at the top.

    ``maps`` is what is kept of z: its rows (P, k) for the kernels, else z centred, (N, k, H, W). ``mean``
    (k,) is the mean of ``maps``, ``spread`` is M S (C, k) and ``inverse`` is s (C,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        mixing: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        maps: Tensor,
        mean: Tensor,
        spread: Tensor,
        inverse: Tensor,
        relu: bool,
    ) -> Tensor:
        weight = _folded(mixing, gamma, inverse, z.dtype)
        shift = -(weight @ mean) if beta is None else torch.addmv(beta, weight, mean, alpha=-1)
        if maps.dim() == 4:
            out = apply(maps, weight, shift, residual, relu)
        else:
            from basis.layers import kernels

            out = kernels.apply(maps, weight, shift, None if residual is None else _rows(residual), relu)
            out = out.new_empty(0).set_(_as_maps(out, z))  # type: ignore[call-overload]  # no view, as in _mix
        ctx.memory_format = torch.contiguous_format if out.is_contiguous() else torch.channels_last
        ctx.save_for_backward(maps, out if relu else None, mixing, gamma, bias, mean, spread, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():  # which loses count of autocast contexts in backward passes
            return _gradients(ctx, dout)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "batch normalisation through the basis has first derivatives only, but create_graph=True asks for "
                "a gradient that can be differentiated again; basis.layers.batchnorm.uncouple gives the ordinary layers for that"
            )
        with torch.autocast(autocast_device(dout), enabled=False):
            return _gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of :class:`_Normalise`."""
    maps, out, mixing, gamma, bias, mean, spread, inverse = ctx.saved_tensors
    need_z, need_mixing, need_gamma, need_beta, need_bias, need_residual, *_ = ctx.needs_input_grad
    in_rows = maps.dim() == 2
    sums, to_z = gradient_sums, input_gradient
    if in_rows:
        from basis.layers import kernels

        sums, to_z = kernels.gradient_sums, kernels.input_gradient
    dout = dout.contiguous(memory_format=ctx.memory_format)
    if out is not None and (need_residual or not in_rows):
        dout, out = _before_relu(dout, out), None
    d_residual = dout if need_residual else None

    dz = d_mixing = d_gamma = d_beta = None
    if need_z or need_mixing or need_gamma or need_beta:
        like = dout
        if in_rows:
            dout, out = _rows(dout), None if out is None else _rows(out)
        d_beta, moment = sums(dout, out, maps, mean)
        d_gamma = inverse * (moment * mixing).sum(1)  # P q
        scale = inverse if gamma is None else gamma * inverse
        slope = scale * inverse * d_gamma  # P gamma s^2 q
        if need_mixing:
            d_mixing = torch.addcmul(scale[:, None] * moment, slope[:, None], spread, value=-1)
        if need_z:
            pixels = _pixels(maps)
            weight = _folded(mixing, gamma, inverse, maps.dtype)
            quadratic = mixing.t() @ (slope[:, None] / pixels * mixing)
            quadratic = quadratic.to(maps.dtype).to(mixing.dtype)  # rounded before the constant is made of it
            constant = quadratic @ mean - d_beta @ weight / pixels
            dz = to_z(dout, out, maps, weight, quadratic, constant)
            dz = _as_maps(dz, like) if in_rows else dz
    d_bias = torch.zeros_like(bias) if need_bias else None
    return (
        dz, d_mixing, d_gamma if need_gamma else None, d_beta if need_beta else None, d_bias, d_residual,
        None, None, None, None, None,
    )  # fmt: skip


class BasisBatchNorm2d(nn.BatchNorm2d):
    """An ``nn.BatchNorm2d`` that takes the k basis channels of a :class:`BasisConv2d` and does its mixing too.

    :func:`couple` makes it, in place of an ``nn.BatchNorm2d`` with the same parameters and buffers. Called with
    Z alone it gives what the batch normalisation gave; :func:`activate` has it take residual and ReLU as well.
    """

    _kind: type[nn.BatchNorm2d]  # what it was before
    _conv: BasisConv2d  # whose basis channels come in; not a submodule: it stands elsewhere in the model

    @property
    def conv(self) -> BasisConv2d:
        """The convolution whose basis channels come in."""
        return self._conv

    def forward(self, z: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Normalise M z + c of the basis channels z: (N, k, H, W) to (N, C, H, W).

        Args:
            z: the basis channels, as the convolution gives them.
            residual: added after normalisation, (N, C, H, W), or None for none.
            relu: whether the ReLU is taken at the end.

        Raises:
            ValueError: where z is not 4-d or has not k channels, and in training where it has one pixel only.
            RuntimeError: in a backward pass with ``create_graph=True``.
        """
        self._check_input_dim(z)
        conv = self._conv
        if z.shape[1] != conv.basis_channels:
            raise ValueError(
                f"expected the {conv.basis_channels} basis channels of the convolution before it, got {z.shape[1]} "
                "channels; basis.layers.batchnorm.uncouple gives back an ordinary nn.BatchNorm2d"
            )
        shape = (z.shape[0], self.num_features, *z.shape[2:])
        if residual is not None and (residual.shape != shape or residual.dtype != z.dtype):
            return _added(self.forward(z), residual, relu)  # by PyTorch's rules of broadcasting and of mixed dtypes
        with torch.autocast(autocast_device(z), enabled=False):
            mean, variance = self.running_mean, self.running_var
            if self.training or mean is None or variance is None:
                return self._by_batch(z, residual, relu)
            return self._by_running(z, residual, relu, mean, variance)

    def _parameters_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """M, gamma, beta and the bias of the convolution."""
        gamma, beta, bias = (None if t is None else t.to(dtype) for t in (self.weight, self.bias, self._conv.bias))
        return self._conv.mixing.to(dtype), gamma, beta, bias

    def _by_batch(self, z: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        pixels = z.shape[0] * z.shape[2] * z.shape[3]
        if pixels < 2:  # nothing to normalise, or too little: what PyTorch does, for one pixel an error
            bias = None if self._conv.bias is None else self._conv.bias.to(z.dtype)
            y = F.conv2d(z, self._conv.mixing.to(z.dtype)[:, :, None, None], bias)
            return _added(super().forward(y), residual, relu)
        mixing, gamma, beta, bias = self._parameters_in(accumulated(z.dtype))
        with torch.no_grad():
            rows = _rows_if_last(z)
            kernels = None if rows is None else _kernels(rows)
            if rows is not None and kernels is not None:
                maps = rows
                mean, covariance = kernels.moments(rows)
                mean_of_z = mean
            else:
                mean_of_z = _total(z.to(mixing.dtype)) / pixels
                maps = z - _per_channel(mean_of_z.to(z.dtype), z)
                mean, covariance = _moments_about_zero(maps.to(mixing.dtype))
            spread = mixing @ covariance
            variance = (spread * mixing).sum(1).clamp_min(0)
            if self.training and self.track_running_stats:
                self._track(mixing @ mean_of_z, bias, variance * (pixels / (pixels - 1)))
            inverse = (variance + self.eps).rsqrt()
        return _Normalise.apply(z, mixing, gamma, beta, bias, residual, maps, mean, spread, inverse, relu)

    def _track(self, mean: Tensor, bias: Tensor | None, variance: Tensor) -> None:
        """Move the running statistics towards those of the batch."""
        factor: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1 / self.num_batches_tracked
        mean = mean if bias is None else mean + bias
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None:
                running.copy_((1 - factor) * running + factor * new)

    def _by_running(self, z: Tensor, residual: Tensor | None, relu: bool, mean: Tensor, variance: Tensor) -> Tensor:
        """One mixing into which the running statistics are folded."""
        mixing, gamma, beta, bias = self._parameters_in(accumulated(z.dtype))
        scale = (variance.to(mixing.dtype) + self.eps).rsqrt()
        scale = scale if gamma is None else scale * gamma
        shift = scale * (-mean if bias is None else bias - mean)
        shift = shift if beta is None else shift + beta
        weight = (scale[:, None] * mixing).to(z.dtype)
        out = F.conv2d(z, weight[:, :, None, None], shift.to(z.dtype))
        return _added(out, residual, relu)


class BasisBatchNormAct2d(BasisBatchNorm2d):
    """A :class:`BasisBatchNorm2d` that goes on with the dropout and activation of timm's ``BatchNormAct2d``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, z: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """:meth:`BasisBatchNorm2d.forward`; residual and ReLU come after its own activation."""
        return _added(self.act(self.drop(super().forward(z))), residual, relu)


def _added(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    out = out if residual is None else out + residual
    return torch.relu(out) if relu else out


def activate(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``relu(norm(x) + residual)``, or ``relu(norm(x))``, in one pass where ``norm`` is a :class:`BasisBatchNorm2d`.

    A :class:`BasisBatchNorm2d` with hooks is called alone, so that those on its output see, and those on its input
    may replace, what they always did.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if isinstance(norm, BasisBatchNorm2d) and not any(getattr(norm, kind) for kind in hooks):
        return norm(x, residual, relu=True)
    return _added(norm(x), residual, True)


# -- whole models ----------------------------------------------------------------------------------


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that keep computed tensors (pruning, the older weight_norm).

    Raises ``ValueError`` for a model that is, or has within it, a ``DistributedDataParallel``: that would go on
    sending the gradients of the parameters that it was given, and no others, between the processes.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            what = f"its layer {name}" if name else "the model"
            raise ValueError(
                f"{what} is wrapped in DistributedDataParallel, which knows only the parameters that it was given; "
                "change what it wraps, its .module, and wrap the result"
            )
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


def couplings(model: nn.Module) -> Pairs:
    """Which basis convolutions of ``model`` are, or can be, coupled to the batch normalisation after them.

    Returns:
        ``norms``, the name of the convolution -> that of its batch normalisation, and ``alone``, the name of
        every other basis convolution -> why it cannot be coupled.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, BasisConv2d)}
    norms, alone = {}, {}
    try:
        pairs = norm_pairs(model, both_modes=True)
    except ValueError as error:
        pairs = Pairs({}, dict.fromkeys(layers.values(), str(error)))
    for norm_name, norm in model.named_modules():
        if isinstance(norm, BasisBatchNorm2d) and norm._conv in layers:
            norms[layers[norm._conv]] = norm_name
    for layer, name in layers.items():
        if name in norms:
            continue
        if name not in pairs.norms:
            alone[name] = pairs.alone[name]
        elif reason := _obstacle(layer, model.get_submodule(pairs.norms[name])):
            alone[name] = reason
        else:
            norms[name] = pairs.norms[name]
    return Pairs(norms, alone)


def _obstacle(layer: BasisConv2d, norm: nn.Module) -> str | None:
    """Why this pair cannot be coupled; None where it can."""
    if layer.coefficients.groups > 1:
        return f"its channels are mixed in {layer.coefficients.groups} groups, not all with all"
    if "forward" in vars(layer) or type(layer).forward is not BasisConv2d.forward:
        return f"it is a {type(layer).__name__} with a forward of its own"
    if "forward" in vars(norm) or not (type(norm) is nn.BatchNorm2d or afterwards(norm)):
        return f"its batch normalisation is a {type(norm).__name__} of its own kind"
    return None


def couple(model: nn.Module, layers: Iterable[str] | None = None) -> nn.Module:
    """A copy of ``model`` in which batch normalisation is taken through the basis.

    Basis convolutions that are directly followed by an ``nn.BatchNorm2d`` give their k basis channels alone, and
    the batch normalisation, a :class:`BasisBatchNorm2d`, does the mixing. Output, gradients, running statistics
    and the state are those of ``model``. A hook on such a convolution sees its basis channels. What cannot be
    coupled is left as it is; :func:`couplings` has the reasons. :func:`uncouple` is the way back.

    Args:
        layers: names of the basis convolutions to couple; None: all that can be.

    Raises:
        ValueError: for a name in ``layers`` that is no basis convolution, or one that cannot be coupled.
    """
    return couple_in_place(copy_of(model), layers)


def couple_in_place(model: nn.Module, layers: Iterable[str] | None = None) -> nn.Module:
    """:func:`couple` without the copy; gives back ``model``."""
    found = couplings(model)
    chosen = list(found.norms) if layers is None else list(layers)
    for name in chosen:
        if name not in found.norms:
            reason = found.alone.get(name, "the model has no basis convolution of that name")
            raise ValueError(f"{name!r} cannot be coupled to a batch normalisation: {reason}")
    for name in chosen:
        conv: Any = model.get_submodule(name)
        norm = model.get_submodule(found.norms[name])
        if isinstance(norm, BasisBatchNorm2d):
            continue  # they are coupled already
        conv.mixed_later = True
        # The very module, with its parameters, buffers, hooks and flags; only its forward pass is another.
        object.__setattr__(norm, "_kind", type(norm))
        object.__setattr__(norm, "__class__", BasisBatchNormAct2d if afterwards(norm) else BasisBatchNorm2d)
        object.__setattr__(norm, "_conv", conv)
    return model


def uncouple(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every batch normalisation is an ordinary one again; undoes :func:`couple`."""
    return uncouple_in_place(copy_of(model))


def uncouple_in_place(model: nn.Module) -> nn.Module:
    """:func:`uncouple` without the copy; gives back ``model``."""
    for module in model.modules():
        if isinstance(module, BasisBatchNorm2d):
            module._conv.mixed_later = False
            object.__setattr__(module, "__class__", module._kind)
            object.__delattr__(module, "_conv")
            object.__delattr__(module, "_kind")
        elif isinstance(module, BasisConv2d):  # also where something else has taken the place of its normalisation
            module.mixed_later = False
    return model
