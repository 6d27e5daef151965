"""Networks made ready for inference: batch normalisation folded away, and the faster form of each layer measured.

Batch normalisation goes into the weight and bias of the convolution before it (Jacob et al. 2018, arXiv 1712.05877,
section 3.2): of a basis convolution into M = [I; A], so that B and M stay a pair, or into the dense weight M B.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from basis.bench.cells import Cell, measure_cells
from basis.bench.report import BenchReport
from basis.bench.shapes import TimedLayer, example, timed_layers
from basis.bench.timing import Progress, Setting
from basis.copies import copy_of, keep_attributes, refuse_lazy, unnoticed, without_hooks, without_pruning
from basis.inputs import Inputs, mapped, run, tensors_in
from basis.layers.base import ConvLike, arguments_of
from basis.layers.batchnorm import uncouple
from basis.layers.conv import BasisConv2d
from basis.layers.norm_pairs import Pairs, afterwards, norm_pairs
from basis.layers.structured import StructuredConv2d
from basis.models import build
from basis.modules import is_channels_last
from basis.plan import Plan
from basis.substitution import keep_interface, plan_of, replace_modules, substitute
from basis.text import few
from basis.training.loop import DTYPES


def fold(model: nn.Module, *, factorized: Iterable[str] = (), inputs: Inputs | None = None) -> nn.Module:
    """A copy of ``model`` for inference, of plain ``torch.nn`` layers, with batch normalisation folded away.

    Every basis convolution or structured layer becomes one dense ``nn.Conv2d``. The ``nn.BatchNorm2d`` that directly
    follows a convolution (:func:`basis.layers.norm_pairs.norm_pairs`) goes into its weight and bias, computed in
    float64 on the CPU and rounded once. Others stay, and so do those with statistics of each batch alone, with hooks,
    or after a convolution whose forward pass or weight is made by somebody else. The copy is in evaluation mode, takes
    no gradients, and keeps device, dtype, memory format, hooks, and the attributes of the layers. It has to give what
    the model gives; if it does not, or the model cannot be run, a warning says so, and all batch normalisation stays.

    Args:
        factorized: names of the basis convolutions that become ``nn.Sequential`` pairs of B (C_in -> k) and
            M = [I; A] (k -> C_out, 1x1), such as :func:`measure_fold` finds; not where the model uses their parameters.
        inputs: a batch as the model takes it; None: two random images, see
            :func:`basis.layers.norm_pairs.norm_pairs`.

    Raises ``ValueError`` for a name in ``factorized`` that is no basis convolution, for ``inputs`` on which the model
    cannot be run, on the meta device, and for lazy layers.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device and has no values to fold; load its values first")
    refuse_lazy(model)
    plain = uncouple(model).eval()
    bases = {name: m for name, m in plain.named_modules(remove_duplicate=False) if isinstance(m, BasisConv2d)}
    names = [factorized] if isinstance(factorized, str) else list(factorized)
    if unknown := [name for name in names if name not in bases]:
        raise ValueError(f"factorized has {unknown[0]!r}, but it must name basis convolutions ({few(bases) or 'none'})")
    first = {module: name for name, module in plain.named_modules()}
    problem, found = "", Pairs({}, {})
    try:
        found = norm_pairs(plain, inputs=inputs)
    except ValueError as error:
        if inputs is not None:
            raise
        problem = str(error) * (bool(names) or any(isinstance(module, nn.BatchNorm2d) for module in first))
    norms = {c: n for c, n in found.norms.items() if _fit(plain.get_submodule(c), plain.get_submodule(n))}
    pairs = set() if problem else {first[bases[name]] for name in names} - found.read
    folded = _folded(uncouple(model).eval(), norms, pairs)
    if (norms or pairs) and not _alike(folded, plain, found.inputs):
        problem = "the folded model does not give what the model gives"
        folded = _folded(uncouple(model).eval(), {}, ())
    if problem:
        warnings.warn(f"batch normalisation stays, and no layer becomes a pair: {problem}", stacklevel=2)
    return folded


def _folded(model: nn.Module, norms: Mapping[str, str], pairs: Collection[str]) -> nn.Module:
    """``model`` itself with these normalisations folded and all layers of this package plain, some as ``pairs``."""
    new: dict[nn.Module, nn.Module] = {}
    with unnoticed(model):  # new layers draw weights before they get theirs
        for name, layer in model.named_modules():
            if (isinstance(layer, ConvLike) and _knows_forward(layer)) or name in norms:
                norm = model.get_submodule(norms[name]) if name in norms else None
                new[layer] = _plain(without_pruning(layer), norm, pair=name in pairs)
                keep_attributes(nn.Conv2d(*arguments_of(layer, torch.empty(0, device="meta"))), new[layer])
                keep_interface(layer, new[layer])
    for name in norms.values():
        norm = model.get_submodule(name)
        parts = [part for part in afterwards(norm) or () if type(part) is not nn.Identity]
        new[norm] = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
        keep_attributes(norm, new[norm])
    folded = replace_modules(model, new).eval()
    for parameter in folded.parameters():  # scripted modules have no requires_grad_()
        parameter.requires_grad_(False)
    return folded


@torch.no_grad()
def _alike(folded: nn.Module, model: nn.Module, inputs: Any) -> bool:
    """Whether both give the same numbers, but for rounding, for noise like ``inputs``."""
    with unnoticed(model):
        noise = mapped(lambda x: torch.randn_like(x) if x.is_floating_point() else x, inputs)
        after, before = (tensors_in(run(without_hooks(copy_of(one)), noise)) for one in (folded, model))
    coarse = any(p.dtype.itemsize < 4 for p in model.parameters()) or torch.is_autocast_enabled()
    for a, b in zip(after, before, strict=True):
        largest = b[b.isfinite()].abs().max() if b.isfinite().any() else 1.0
        bound = float(largest) * (0.1 if coarse else 0.01)
        if a.shape != b.shape or not torch.isclose(a.to(b), b, rtol=0, atol=bound, equal_nan=True).all():
            return False
    return True


def _knows_forward(layer: nn.Module) -> bool:
    """Whether the forward pass of ``layer`` is that of this package."""
    return "forward" not in vars(layer) and type(layer).forward.__module__.startswith("basis.layers.")


def _fit(conv: Any, norm: Any) -> bool:
    """Whether ``norm`` can be folded into ``conv``."""
    if norm.training or norm.running_mean is None or norm.running_var is None or norm._forward_hooks:
        return False  # such as one that does not heed ``eval()``
    plain = type(conv) is nn.Conv2d and not {"forward", "_conv_forward"} & set(vars(conv))
    return _knows_forward(conv) if isinstance(conv, ConvLike) else plain and set(conv._parameters) == {"weight", "bias"}


@torch.no_grad()
def _plain(layer: Any, norm: Any, *, pair: bool) -> nn.Module:
    """The plain form of ``layer`` and ``norm`` after it, by way of float64 on the CPU."""
    source = copy.deepcopy(layer).to("cpu", torch.float64)
    if isinstance(layer, StructuredConv2d):
        layer, source = layer.to_conv(), source.to_conv()
    like: Tensor = layer.basis if isinstance(layer, BasisConv2d) else layer.weight
    weight, bias = source.mixing[:, :, None, None] if pair else source.weight, source.bias
    if norm is not None:
        norm = copy.deepcopy(norm).to("cpu", torch.float64)
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(weight, bias, *statistics)
    spatial = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    if not pair:
        return _conv(like, weight, bias, layer.groups, **spatial)
    thin = _conv(like, source.basis, None, layer.groups, **spatial)
    return nn.Sequential(thin, _conv(like, weight, bias, layer.coefficients.groups))


def _conv(like: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **options: Any) -> nn.Conv2d:
    """A convolution with these values, in the device, dtype and memory format of ``like``."""
    out_channels, width, *kernel = weight.shape
    options |= {"groups": groups, "bias": bias is not None, "device": like.device, "dtype": like.dtype}
    conv = nn.utils.skip_init(nn.Conv2d, width * groups, out_channels, kernel, **options)
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv.to(memory_format=torch.channels_last) if is_channels_last(like) else conv


# -- which form is faster ---------------------------------------------------------------------------


def measure_fold(
    model: nn.Module, *, input_size: Sequence[int] | None = None, inputs: Inputs | None = None,
    setting: Setting | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The basis convolutions whose forward pass is faster as a pair than dense, for :func:`fold`, by turns.

    Faster is a lower quartile of dense / pair above 1. Each layer alone, on inputs as for
    :func:`basis.bench.tuning.bench_latency`; of layers with equal shapes the first. Weights are in the setting's
    precision. Raises ``ValueError`` for a model without a basis convolution that is called, on the meta device, or that
    cannot be run on such inputs.
    """
    source = uncouple(model).eval()
    layers = {name: module for name, module in source.named_modules() if isinstance(module, BasisConv2d)}
    setting = (setting or Setting()).settled(source)
    given, cells = example(source, input_size, inputs), []
    forms = [deployed(model, setting, pairs, inputs=given) for pairs in ((), layers)]
    for name, called in timed_layers(source, given, layers).items():
        dense, pair = (form.get_submodule(name) for form in forms)
        timed = TimedLayer.of(dense, called.inputs, input_gradient=False)
        cells += [Cell(
            about={"layer": name, "pass": "forward"}, inputs=timed.inputs,
            candidates={"dense": partial(copy.deepcopy, dense), "pair": partial(copy.deepcopy, pair)},
            key=(timed, layers[name].basis_channels, layers[name].coefficients.groups),
        )]  # fmt: skip
    if not cells:
        raise ValueError("the model has no basis convolution that is called, so there is nothing to measure")
    rows = [row for row in measure_cells(cells, setting) if row["mode"] == "pair"]
    return tuple(row["layer"] for row in rows if row.get("speedup_q1", 0) > 1)


def deployed(
    model: nn.Module, setting: Setting, pairs: Iterable[str] = (), *, inputs: Inputs | None = None
) -> nn.Module:
    """``model`` folded, its weights in the precision of ``setting``: no pass has to cast them."""
    return fold(model, factorized=pairs, inputs=inputs).to(DTYPES[setting.precision])


def bench_inference(
    *, model: str = "resnet18", width: int | None = None, ratios: Sequence[float] = (1 / 4, 1 / 2),
    plans: Mapping[float, Plan] | None = None,
    setting: Setting | None = None, progress: Progress | None = None,
) -> BenchReport:  # fmt: skip
    """Measure the forward pass, in evaluation mode, of a network of :func:`basis.models.build` and its folded forms.

    Modes, on random images 3x32x32: "dense folded"; "auto", substituted at a ratio; "folded", that one as dense
    convolutions; "folded, pairs", with the pairs that :func:`measure_fold` finds faster (``pairs`` of ``layers``).
    Folded ones hold their weights in the precision, "auto" and the dense one get there by autocast. All are compared
    with the dense network. Where steps are captured, they are compared with "dense folded", the dense network is a
    candidate, "dense plain", and so is "program", the pairs exported by ``torch.export``. Rows have ``batch_size``.

    Args:
        plans: the share of a budget -> plan, measured after the ``ratios``; rows have ``share`` then.
    """
    setting = setting or Setting()
    with setting.globals():
        dense = build(model, width=width).eval()
    setting = setting.settled(dense)

    def cell(about: Mapping[str, float]) -> Cell:
        size: dict[str, Any] = {"plan": plans[about["share"]]} if plans and "share" in about else dict(about)
        with setting.globals():
            basis = setting.place(substitute(dense, **size, init="random").eval())
        layers = plan_of(basis).layers
        pairs = measure_fold(basis, setting=setting) if layers else ()
        plain, folded = partial(copy.deepcopy, dense), partial(deployed, dense, setting)
        return Cell(
            about={"model": model, "pass": "forward", "batch_size": setting.batch_size, **about},
            candidates={
                "dense": folded if setting.captures else plain,
                **({"dense plain": plain} if setting.captures else {"dense folded": folded}),
                "auto": partial(copy.deepcopy, basis), "folded": partial(deployed, basis, setting),
                "folded, pairs": (best := partial(deployed, basis, setting, pairs)),
                **({"program": lambda: _program(best(), setting)} if setting.captures else {}),
            },
            rows={"folded, pairs": {"pairs": len(pairs), "layers": len(layers)}}, rotated=False,
        )  # fmt: skip

    sizes = [*({"ratio": ratio} for ratio in ratios), *({"share": share} for share in plans or ())]
    rows = measure_cells(map(cell, sizes), setting, progress)
    options = {"model": model, "width": width, "ratios": list(ratios), "shares": list(plans or ())}
    return setting.report("bench-inference", rows, **options)


def _program(model: nn.Module, setting: Setting) -> nn.Module:
    """``model`` as an exported program for such batches."""
    images = setting.place(torch.randn(setting.batch_size, 3, 32, 32)).to(next(model.parameters()).dtype)
    return torch.export.export(setting.place(model), (images,)).module()
