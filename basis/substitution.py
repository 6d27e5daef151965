"""Put basis convolutions, and other structured layers, into a copy of a model by plan, and take them out again.

Everything but the layers themselves (device, dtype, memory format, flags, hooks, sharing) is kept.
"""

from __future__ import annotations

import difflib
import itertools
import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from basis.batches import Batches, calibration_inputs
from basis.copies import copy_of, keep_attributes, without_pruning
from basis.inputs import Inputs
from basis.layers.base import arguments_of
from basis.layers.batchnorm import couple_in_place, couplings, uncouple_in_place
from basis.layers.coefficients import Form
from basis.layers.conv import MODES, BasisConv2d, Mode, check_basis_channels
from basis.layers.moments import Moments, output_moments, taking_means, untied
from basis.layers.structured import Structure, StructuredConv2d
from basis.numbers import one_of
from basis.plan import Plan, Size, as_patterns, convolutions, left_out, meant, obstacle, plan_of, size_text, tied  # noqa: F401
from basis.text import few, shown_name

# Every attribute in which nn.Module keeps hooks, with their kwargs / always-call flags.
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def substitute(
    model: nn.Module, plan: Plan | Mapping[str, Size] | None = None, *, ratio: float | None = None,
    layer: str | Structure | None = None, mode: Mode = "auto", init: Literal["svd", "random"] = "svd",
    calibration: Batches | None = None, coefficients: str | Form = "dense",
    batch_norm: Literal["ordinary", "through_basis"] = "ordinary", include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> nn.Module:  # fmt: skip
    """A copy of ``model`` in which the convolutions that the plan names are basis convolutions or structured layers.

    A convolution with several names is replaced once, and any of them will do; so do names with or without what
    DataParallel or torch.compile put before them. A bare ``nn.Conv2d`` gives one layer.

    Args:
        plan: a :class:`Plan`, or a mapping of names to basis channels, or to texts such as ``"tucker:0.41"``. What it
            names is done, also where a layer grows by it.
        ratio, layer: in place of a plan, one of them for every convolution that does not grow by it, see
            :meth:`Plan.uniform`, whose ``include`` and ``exclude`` go with it.
        mode: the mode of the new basis layers, see :class:`BasisConv2d`.
        init: ``"svd"`` approximates each weight; ``"random"`` draws new ones for training from scratch.
        calibration: fit basis layers to the outputs of the dense ones (:mod:`basis.layers.moments`) on this: batches,
            read once, of images or of (images, labels); one tensor (N, C, H, W); ``Images`` or ``Data`` of
            :mod:`basis.data`. The lost mean goes into the bias, or else a running mean of the normalisation after it.
        coefficients: the form of A (:class:`Form`); with ``"shared"``, layers of equal C_out, k and groups hold one.
        batch_norm: ``"through_basis"`` couples each new layer to the batch normalisation that directly follows it,
            where there is one (:func:`basis.layers.batchnorm.couple`): the same function, trained with less memory
            and, where layers are narrow, faster on a GPU.

    Raises ``ValueError`` for a layer that is not there or cannot be substituted (with the reason), a plan of another
    model, a k or form that does not fit, weights that are not finite, another argument out of range, and calibration
    data that are empty or give no finite outputs. Warns where ``ratio`` or ``layer`` finds nothing to substitute.
    """
    if [plan, ratio, layer].count(None) != 2:
        raise ValueError("give one of plan, ratio and layer")
    one_of("mode", mode, MODES)
    one_of("init", init, ("svd", "random"))
    one_of("batch_norm", batch_norm, ("ordinary", "through_basis"))
    if calibration is not None and init == "random":
        raise ValueError("calibration data fit layers to outputs, but init='random' fits nothing; leave one out")
    form = Form.parse(coefficients)
    if plan is None:
        plan = Plan.uniform(model, ratio=ratio, layer=layer, coefficients=form, include=include, exclude=exclude)
        if not plan.layers:
            traced = "the model is scripted or traced: substitute before that"
            none = traced if isinstance(model, torch.jit.ScriptModule) else "the model has no convolution"
            why = few(dict.fromkeys(plan.skipped.values()), "; ") or none
            warnings.warn(f"nothing was substituted: {why}", stacklevel=2)
    elif as_patterns(include) or as_patterns(exclude):
        raise ValueError("include and exclude go with a ratio or a layer; a plan names its layers itself")
    chosen = _resolve(model, plan if isinstance(plan, Plan) else Plan(plan))
    texts = [size for size in chosen.values() if isinstance(size, str)]
    if texts and len(texts) == len(chosen) and (mode != "auto" or form.kind != "dense"):
        raise ValueError(f"mode and coefficients are for basis channels k, but every layer of the plan is a {texts[0]}")
    copied = copy_of(model)
    new, example = _new_layers(copied, chosen, calibration, init=init, form=form, mode=mode)
    copied = replace_modules(copied, new)
    if batch_norm == "through_basis":
        names_made = {name for name, module in copied.named_modules() if module in new.values()}
        can = couplings(copied, inputs=example).norms.keys()
        couple_in_place(copied, names_made & can, inputs=example)
    return copied


def substitute_in_place(model: nn.Module, layers: Mapping[str, Size], *, calibration: Batches | None = None) -> None:
    """:func:`substitute` by such a plan, without the copy; ``ValueError`` where the model itself is the convolution."""
    chosen = _resolve(model, Plan(layers))
    new, _ = _new_layers(model, chosen, calibration, init="svd", form=Form("dense"), mode="auto")
    if replace_modules(model, new) is not model:
        raise ValueError("the model is one convolution, which cannot be replaced in place")


def merge(model: nn.Module) -> nn.Module:
    """A copy of ``model`` of plain ``nn.Conv2d`` and batch normalisation; the way back from :func:`substitute`."""
    copied = uncouple_in_place(copy_of(model))
    layers: list[Any] = [m for m in copied.modules() if isinstance(m, (BasisConv2d, StructuredConv2d))]
    return replace_modules(copied, {m: hand_over(without_pruning(m), m.to_conv()) for m in layers})


def _resolve(model: nn.Module, plan: Plan) -> dict[str, Size]:
    """The layers to substitute, each module once, after checking all that ``plan`` says."""
    module_of = {name: module for module, names in convolutions(model).items() for name in names}
    names = meant(plan.layers, module_of)
    chosen: dict[Any, tuple[str, Size]] = {}
    for given, size in plan.layers.items():
        if given not in names:
            near = few(difflib.get_close_matches(given, module_of, n=3) or list(module_of)) or "none: it has none"
            raise ValueError(f"the plan names {given}, which is no convolution of the model; near it are {near}")
        name = names[given]
        module = module_of[name]
        here = getattr(module, "out_channels", None)
        if (there := plan.out_channels.get(given, here)) != here:
            other = f"C_out of {shown_name(name)} is {there} there and {here} here"
            raise ValueError(f"the plan is of another model: {other}; make one of this model")
        if isinstance(module, nn.Conv2d) and size == here:
            continue
        if reason := obstacle(model, module):
            raise ValueError(f"the plan names {shown_name(name)}, which cannot be substituted: {reason}")
        try:
            if isinstance(size, str):
                Structure.parse(size).check(module)
            else:
                check_basis_channels(size, module.out_channels, module.groups)
        except ValueError as error:
            raise ValueError(f"the plan for {shown_name(name)}: {error}") from error
        other, first = chosen.setdefault(module, (name, size))
        if first != size:
            both = f"{shown_name(other)} {size_text(first)} and {shown_name(name)} {size_text(size)}"
            raise ValueError(f"the plan gives {both}, but they are one shared layer")
    return dict(chosen.values())


def _new_layers(
    model: nn.Module, chosen: Mapping[str, Size], calibration: Batches | None, *, init: str, form: Form, mode: Mode
) -> tuple[dict[nn.Module, nn.Module], Inputs | None]:
    """Convolution of ``model`` -> the layer for its place, those that share parameters made together; a batch."""
    for name in chosen if init == "svd" else ():
        check_values(name, model.get_submodule(name))
    moments, norms, example = ({}, {}, None) if calibration is None else _calibrated(model, chosen, calibration)
    options: dict[str, Any] = {"mode": mode}
    new: dict[nn.Module, nn.Module] = {}
    for names in tied(model, chosen, form):
        convs: list[Any] = [model.get_submodule(name) for name in names]
        size = chosen[names[0]]
        layers: list[Any] = []
        try:
            if isinstance(size, str):
                layers += Structure.parse(size).make(convs, fitted=init == "svd")
            elif init == "svd":
                seen = [moments[name].centred() if name in norms else moments.get(name) for name in names]
                options |= {"basis_channels": size, "coefficients": form}
                layers += BasisConv2d.from_convs(convs, moments=seen, **options)
            else:
                for conv in convs:
                    options |= {"basis_channels": size, "coefficients": layers[0].coefficients if layers else form}
                    layers.append(BasisConv2d.shaped_like(conv, **options))
        except ValueError as error:
            raise ValueError(f"{shown_name(names[0])}: {error}") from error
        for name, conv, layer in zip(names, convs, layers, strict=True):
            norm: Any = model.get_submodule(norms[name]) if name in norms else None
            if norm is not None and norm.running_mean is not None:  # the mean of a batch leaves out what is lost anyway
                norm.running_mean.copy_(norm.running_mean.double() - layer.lost_mean(moments[name]))
            new[conv] = hand_over(conv, layer)
    return new, example


def check_values(name: str, conv: nn.Module) -> None:
    """Raise ``ValueError`` for a layer whose weights are not finite, or not there."""
    if any(p.is_meta for p in conv.parameters()):
        raise ValueError(f"{shown_name(name)} is on the meta device and has no values; use init='random'")
    if not all(p.isfinite().all() for p in conv.parameters()):
        raise ValueError(f"{shown_name(name)} has weights that are not finite, so nothing is near to it")


def _calibrated(
    model: nn.Module, chosen: Mapping[str, Size], calibration: Batches
) -> tuple[dict[str, Moments], dict[str, str], Inputs]:
    """The moments of the basis layers to be, the batch normalisations of them that take means, and the first batch."""
    names = [name for name, size in chosen.items() if not isinstance(size, str)]
    if chosen and not names:
        raise ValueError("calibration data fit basis convolutions, but the plan has structured layers alone")
    inputs = calibration_inputs(calibration, model)
    first = next(inputs)
    norms = taking_means(model, first) if names else {}
    moments = output_moments(model, untied(model, names), itertools.chain([first], inputs)) if names else {}
    moments = {name: own for name, own in moments.items() if own.n}
    if unseen := [shown_name(name) for name in names if name not in moments]:
        reason = f"the calibration data never reach {few(unseen)} (or its bias is tied), so it was fitted to its weight"
        warnings.warn(reason, stacklevel=4)
    return moments, {conv: norm for conv, norm in norms.items() if conv in moments}, first


def hand_over(old: Any, new: Any) -> nn.Module:
    """:func:`keep_interface`, and its very bias."""
    keep_interface(old, new)
    if old.bias is not None:
        with torch.no_grad():
            old.bias.copy_(new.bias)
        new.bias = old.bias
    return new


def keep_interface(old: Any, new: Any) -> None:
    """Give ``new``, which takes the place of ``old``, its hooks, and the attributes and buffers of its user."""
    keep_attributes(old, new, own=(own := of_its_kind(old)))
    for name, buffer in old._buffers.items():
        if name not in own and not hasattr(new, name):
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)


def of_its_kind(layer: Any) -> Collection[str]:
    """The attributes and buffers that every layer of this kind has, so that the others are its user's."""
    fresh: Any = nn.Conv2d(*arguments_of(layer, torch.empty(0, device="meta")))
    if isinstance(layer, StructuredConv2d):
        fresh = type(layer).shaped_like(fresh, size=layer.size)
    elif isinstance(layer, BasisConv2d):
        fresh = BasisConv2d.shaped_like(fresh, ratio=1)
    return {*vars(fresh), *fresh._buffers}


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """``model`` with these modules in the places of others, wherever they stand."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent.add_module(name, new[child])
    return model
