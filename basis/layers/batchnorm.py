"""Batch normalisation through the basis: the statistics of all C channels from the k basis channels (chapter 10).

``y = M z + c`` (M: C x k, c: the bias) and batch normalisation are one affine map of z, so y is never made. Over P
pixels let m be the mean of z, S its covariance, s = 1 / sqrt(var + eps), dO the gradient before the ReLU, t its sum,
G = sum of dO (z - m)^T and q = s rowsum(G * M) / P (Ioffe and Szegedy 2015, arXiv 1502.03167)::

    mean of y = M m + c    var of y = diag(M S M^T)    W = diag(gamma s) M    out = relu(W (z - m) + beta + residual)
    dbeta = t    dgamma = P q    dresidual = dO    dc = 0    dM = diag(gamma s) (G - P diag(s q) M S)
    dz = W^T dO - E z + e    with    E = M^T diag(gamma s^2 q) M,    e = E m - W^T t / P

The four passes over whole maps are :func:`moments`, :func:`apply`, :func:`gradient_sums` and :func:`input_gradient`;
GPUs have kernels of their own (:mod:`basis.layers.fused`). Here z is first centred, and matrices are rounded before
biases are made of them, so that low precision shifts no channel. A channel in which M cancels large basis channels down
to a fraction f of their spread is off by 1e-7 / f^2 to twice that in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from basis.copies import copy_of
from basis.inputs import Inputs
from basis.layers import fused
from basis.layers.base import as_leaf, full_precision
from basis.layers.conv import BasisConv2d
from basis.layers.norm_pairs import Pairs, afterwards, norm_pairs

# The four passes: maps are (N, n, H, W) in either memory format; small tensors are of ``accumulated`` dtype.


def moments(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (k,) and covariance (k, k) of maps whose mean is zero up to rounding, divided by P."""
    mean = _total(centred) / _pixels(centred)
    return mean, _outer(centred, centred) / _pixels(centred) - torch.outer(mean, mean)


def apply(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(weight z + bias + residual), maps of C channels in the dtype and memory format of z."""
    out = _mix(z, weight, bias)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def gradient_sums(dout: Tensor, z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dO (C,) and of dO (z - mean)^T (C, k)."""
    total = _total(dout)
    return total, _outer(dout, z).addr(total, mean, alpha=-1)


def input_gradient(dout: Tensor, z: Tensor, weight: Tensor, quadratic: Tensor, constant: Tensor) -> Tensor:
    """weight^T dO - quadratic^T z + constant, maps of k channels in the dtype of z."""
    return _mix(z, -quadratic.t(), constant).add_(_mix(dout, weight.t()))


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over maps of ``dtype`` are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pixels(maps: Tensor) -> int:
    """P of maps (N, n, H, W)."""
    return maps.numel() // maps.shape[1]


def _total(maps: Tensor) -> Tensor:
    return maps.sum((0, 2, 3), dtype=accumulated(maps.dtype))


def _before_relu(dout: Tensor, out: Tensor | None) -> Tensor:
    return dout if out is None else torch.ops.aten.threshold_backward(dout, out, 0)


def _mix(maps: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight maps + bias, in the dtype of the maps."""
    weight, bias = weight.to(maps.dtype), None if bias is None else bias.to(maps.dtype)
    if not _by_image(maps):
        return F.conv2d(maps, weight[:, :, None, None], bias)
    weight, flat = weight.expand(len(maps), *weight.shape), maps.flatten(2)
    out = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias[:, None], weight, flat)
    # No view: autograd lets nobody write into a view that a Function returns, as an in-place ReLU would.
    return torch.ops.aten._unsafe_view(out, [*out.shape[:2], *maps.shape[2:]])


def _by_image(maps: Tensor) -> bool:
    """Whether one product per image is quickest: NCHW and images that are not small (measured on a CPU)."""
    return maps.stride(1) == maps.shape[2] * maps.shape[3] >= 64


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b^T over all pixels, of maps of the same dtype and memory format."""
    dtype = accumulated(a.dtype)
    if a.dtype == torch.float16:  # whose products come out in float16, where sums over pixels overflow
        a, b = a.to(dtype), b.to(dtype)
    if _by_image(a):
        return torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(0, dtype=dtype)
    a, b = _rows(a), _rows(b)
    # A sum of products over parts: one product over all pixels would round more, all the more in low precision.
    enough = max(256, 4 * b.shape[1])
    parts = next(n for n in (64, 32, 16, 8, 4, 2, 1) if n == 1 or (a.shape[0] % n == 0 and a.shape[0] >= n * enough))
    return torch.bmm(a.view(parts, -1, a.shape[1]).mT, b.view(parts, -1, b.shape[1])).sum(0, dtype=dtype)


def _rows(maps: Tensor) -> Tensor:
    """Maps (N, n, H, W) as rows (P, n): a view of channels-last ones, else a copy."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to ``dtype`` but kept as it was."""
    return matrix.to(dtype).to(matrix.dtype)


class _Normalise(torch.autograd.Function):
    """The formulas at the top; ``maps``: z centred, (N, k, H, W)."""

    @staticmethod  # mean: of maps, (k,); spread: M S, (C, k); inverse: s, (C,)
    def forward(
        ctx: Any, z: Tensor, mixing: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None,
        residual: Tensor | None, maps: Tensor, mean: Tensor, spread: Tensor, inverse: Tensor, relu: bool,
    ) -> Tensor:  # fmt: skip
        weight = _rounded((gamma * inverse)[:, None] * mixing, z.dtype)
        shift = torch.addmv(beta, weight, mean, alpha=-1)
        out = apply(maps, weight, shift, residual, relu)
        ctx.memory_format = torch.contiguous_format if out.is_contiguous() else torch.channels_last
        ctx.save_for_backward(maps, out if relu else None, mixing, gamma, bias, mean, spread, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():  # which loses count of autocast contexts in backward passes
            return _gradients(ctx, dout)
        if torch.is_grad_enabled():
            raise RuntimeError("batch normalisation through the basis has no second derivatives; uncouple the model")
        with full_precision(dout):
            return _gradients(ctx, dout)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of :class:`_Normalise`."""
    maps, out, mixing, gamma, bias, mean, spread, inverse = ctx.saved_tensors
    need_z, need_mixing, need_gamma, need_beta, need_bias, need_residual, *_ = ctx.needs_input_grad
    dout = _before_relu(dout.contiguous(memory_format=ctx.memory_format), out)
    d_residual = dout if need_residual else None

    dz = d_mixing = d_gamma = d_beta = None
    if need_z or need_mixing or need_gamma or need_beta:
        d_beta, moment = gradient_sums(dout, maps, mean)
        d_gamma = inverse * (moment * mixing).sum(1)  # P q
        scale = gamma * inverse
        slope = scale * inverse * d_gamma  # P gamma s^2 q
        if need_mixing:
            d_mixing = torch.addcmul(scale[:, None] * moment, slope[:, None], spread, value=-1)
        if need_z:
            pixels = _pixels(maps)
            weight = _rounded(scale[:, None] * mixing, maps.dtype)
            quadratic = _rounded(mixing.t() @ (slope[:, None] / pixels * mixing), maps.dtype)
            constant = quadratic @ mean - d_beta @ weight / pixels
            dz = input_gradient(dout, maps, weight, quadratic, constant)
    d_gamma, d_beta = d_gamma if need_gamma else None, d_beta if need_beta else None
    d_bias = torch.zeros_like(bias) if need_bias else None
    return dz, d_mixing, d_gamma, d_beta, d_bias, d_residual, None, None, None, None, None


class BasisBatchNorm2d(nn.BatchNorm2d):
    """An ``nn.BatchNorm2d`` made by :func:`couple`: takes the k basis channels of a convolution and mixes them too."""

    _kind: type[nn.BatchNorm2d]  # what it was before
    conv: BasisConv2d  # whose basis channels come in; not a submodule: it stands elsewhere in the model

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:  # noqa: A002
        """relu(normalised (M z + c) + residual), (N, C, H, W), of the basis channels z = ``input``, (N, k, H, W).

        Raises ``ValueError`` for another shape, complex numbers and, in training, one pixel; ``RuntimeError`` for
        second derivatives, replicas of DataParallel, and where FSDP shards the convolution but not this.
        """
        if (node := as_leaf(self, input, residual, relu=relu)) is not None:
            return node
        z = input
        if z.is_complex():
            raise ValueError("batch normalisation through the basis takes no complex numbers")
        if "_is_replica" in vars(self):
            raise RuntimeError("DataParallel cannot copy a coupled model; use DistributedDataParallel, or uncouple it")
        if hasattr(self.conv.basis, "placements") and not hasattr(z, "placements"):  # of a DTensor
            what = "shard both in one group, as fully_shard of a module that holds them does, or uncouple the model"
            raise RuntimeError(f"the convolution that is normalised here is sharded apart from it: {what}")
        self._check_input_dim(z)
        if z.shape[1] != self.conv.basis_channels:
            raise ValueError(f"expected {self.conv.basis_channels} basis channels, got {z.shape[1]} channels")
        shape = (z.shape[0], self.num_features, *z.shape[2:])
        if residual is not None and (residual.shape != shape or residual.dtype != z.dtype):
            return _added(self.forward(z), residual, relu)  # by PyTorch's rules of broadcasting and of mixed dtypes
        with full_precision(z):
            mixing = self.conv.mixing.to(accumulated(z.dtype))
            if fused.suits(self, z, basis_channels=self.conv.basis_channels, bias=self.conv.bias):
                return fused.mix_and_normalise(self, z, mixing, self.conv.bias, residual, relu=relu)
            gamma = mixing.new_ones(self.num_features) if self.weight is None else self.weight.to(mixing)
            beta = mixing.new_zeros(self.num_features) if self.bias is None else self.bias.to(mixing)
            bias = None if self.conv.bias is None else self.conv.bias.to(mixing)
            if self.training or self.running_mean is None or self.running_var is None:
                return self._by_batch(z, mixing, gamma, beta, bias, residual, relu)
            scale = (self.running_var.to(mixing.dtype) + self.eps).rsqrt() * gamma
            shift = beta - scale * (self.running_mean if bias is None else self.running_mean - bias)
            return _added(_mix(z, scale[:, None] * mixing, shift), residual, relu)

    def _by_batch(
        self, z: Tensor, mixing: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None,
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        pixels = _pixels(z)
        if pixels < 2:  # nothing to normalise, or too little: what PyTorch does, for one pixel an error
            return _added(super().forward(_mix(z, mixing, bias)), residual, relu)
        with torch.no_grad():
            mean_of_z = _total(z) / pixels
            maps = z - mean_of_z.to(z.dtype)[:, None, None]
            mean, covariance = moments(maps.to(mixing.dtype))
            spread = mixing @ covariance
            variance = (spread * mixing).sum(1).clamp_min(0)
            if self.training and self.track_running_stats:
                self._track(mixing @ mean_of_z, bias, variance * (pixels / (pixels - 1)))
            inverse = (variance + self.eps).rsqrt()
        return _Normalise.apply(z, mixing, gamma, beta, bias, residual, maps, mean, spread, inverse, relu)

    def _track(self, mean: Tensor, bias: Tensor | None, variance: Tensor) -> None:
        """Move the running statistics towards those of the batch."""
        factor: float | Tensor = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1 / self.num_batches_tracked if self.momentum is None else factor
        for running, new in ((self.running_mean, mean if bias is None else mean + bias), (self.running_var, variance)):
            if running is not None:
                running.copy_((1 - factor) * running + factor * new)


class BasisBatchNormAct2d(BasisBatchNorm2d):
    """It goes on with the dropout and activation of timm's ``BatchNormAct2d``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:  # noqa: A002
        """Residual and ReLU come after its own activation."""
        if (node := as_leaf(self, input, residual, relu=relu)) is not None:
            return node
        return _added(self.act(self.drop(super().forward(input))), residual, relu)


def _added(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    out = out if residual is None else out + residual
    return torch.relu(out) if relu else out


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def activate(norm: nn.Module, x: Tensor, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """``relu(norm(x) + residual)``, together where nothing else looks at ``norm`` (hooks, a forward of its own).

    An ``nn.BatchNorm2d`` in training goes through the kernels of :mod:`basis.layers.fused` where they can do it.
    """
    watched = _has_any_global_hook() or "forward" in vars(norm) or any(getattr(norm, kind) for kind in _HOOKS)
    if not watched:
        if isinstance(norm, BasisBatchNorm2d):
            return norm(x, residual, relu=relu)
        if type(norm) is nn.BatchNorm2d and fused.suits(norm, x, residual):
            return fused.normalise(norm, x, residual, relu=relu)
    return _added(norm(x), residual, relu)


def couplings(model: nn.Module, *, inputs: Inputs | None = None) -> Pairs:
    """Which basis convolutions are, or can be, coupled to the batch normalisation after them, and why others cannot.

    ``inputs``: a batch as the model takes it, see :func:`basis.layers.norm_pairs.norm_pairs`. A model that cannot be
    run gives a warning, and no pairs but those that are coupled.
    """
    layers = {module: name for name, module in model.named_modules() if isinstance(module, BasisConv2d)}
    coupled = {layers.get(norm.conv): n for n, norm in model.named_modules() if isinstance(norm, BasisBatchNorm2d)}
    norms, alone = {}, {}
    try:
        pairs = norm_pairs(uncouple(model) if coupled else model, inputs=inputs, both_modes=True)
    except ValueError as error:
        warnings.warn(f"no batch normalisation can be taken through the basis: {error}", stacklevel=3)
        pairs = Pairs({}, dict.fromkeys(layers.values(), str(error)))
    for layer, name in layers.items():
        norm = coupled.get(name) or pairs.norms.get(name)
        reason = None if name in coupled else _obstacle(layer, model.get_submodule(norm)) if norm else pairs.alone[name]
        if norm and not reason:
            norms[name] = norm
        else:
            alone[name] = str(reason)
    return Pairs(norms, alone)


def _obstacle(layer: BasisConv2d, norm: nn.Module) -> str | None:
    """Why this pair cannot be coupled; None where it can."""
    if layer.coefficients.groups > 1:
        return f"its channels are mixed in {layer.coefficients.groups} groups, not all with all"
    known = type(norm) is nn.BatchNorm2d or afterwards(norm)
    for module, usual in ((layer, type(layer).forward is BasisConv2d.forward), (norm, known)):
        if "forward" in vars(module) or not usual:
            return f"{type(module).__name__} has methods of its own"
    return None


def couple(model: nn.Module, layers: Iterable[str] | None = None, *, inputs: Inputs | None = None) -> nn.Module:
    """A copy of ``model`` in which batch normalisation is taken through the basis; :func:`uncouple` is the way back.

    Basis convolutions that are directly followed by an ``nn.BatchNorm2d`` give their k basis channels alone, and the
    batch normalisation, then a :class:`BasisBatchNorm2d`, does the mixing. Output, gradients, running statistics and
    state stay the same; memory is saved. Time was saved on an H200 up to about k = 64 and C_out = 256, on a CPU hardly
    (chapter 10); :func:`basis.bench.tuning.tune` measures it. ``layers``: names of the convolutions, ``ValueError``
    where one cannot be coupled; None: all that can; :func:`couplings`, which takes the same ``inputs``, says why others
    cannot.
    """
    return couple_in_place(copy_of(model), layers, inputs=inputs)


def couple_in_place(
    model: nn.Module, layers: Iterable[str] | None = None, *, inputs: Inputs | None = None
) -> nn.Module:
    """:func:`couple` without the copy; gives back ``model``."""
    chosen = None if layers is None else list(layers)
    found = Pairs({}, {}) if chosen == [] else couplings(model, inputs=inputs)
    chosen = list(found.norms) if chosen is None else chosen
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
        object.__setattr__(norm, "conv", conv)
    return model


def uncouple(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every batch normalisation is an ordinary one again; undoes :func:`couple`."""
    return uncouple_in_place(copy_of(model))


def uncouple_in_place(model: nn.Module) -> nn.Module:
    """:func:`uncouple` without the copy; gives back ``model``."""
    for module in model.modules():
        if isinstance(module, BasisBatchNorm2d):
            module.conv.mixed_later = False
            object.__setattr__(module, "__class__", module._kind)
            object.__delattr__(module, "conv")
            object.__delattr__(module, "_kind")
        elif isinstance(module, BasisConv2d):  # also where something else has taken the place of its normalisation
            module.mixed_later = False
    return model
