"""Put basis convolutions, and other structured layers, into a model by plan, and take them out again.

A :class:`Plan` says which convolution gets how many basis channels, or which structured layer, and why each
of the others stays dense. :func:`substitute` and :func:`merge` return a changed deep copy: the model given
is left alone, and everything but the layers themselves (device, dtype, memory format, flags, hooks,
sharing) is kept.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from basis.batches import Batches, calibration_inputs
from basis.layers.base import ConvLike
from basis.layers.batchnorm import copy_of, couple_in_place, couplings, uncouple_in_place
from basis.layers.coefficients import Coefficients, Form
from basis.layers.conv import MODES, BasisConv2d, Mode, basis_channels_for, check_basis_channels
from basis.layers.moments import Moments, output_moments, taking_means, untied
from basis.layers.structured import LAYERS, Structure, StructuredConv2d
from basis.saving import Saved
from basis.text import few, shown_name

if TYPE_CHECKING:
    pass

PLAN_VERSION = 1

Size = int | str  # basis channels k of a basis convolution, or the text of a structured layer, "tucker:0.41"

# Every attribute in which nn.Module keeps hooks, with their kwargs / always-call flags.
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


@dataclass(frozen=True)
class Plan(Saved):
    """Which layers of a model become basis convolutions or other structured layers, and why the others do not.

    Attributes:
        layers: layer name (as in ``model.named_modules()``) -> basis channels k, where k = C_out keeps the
            layer dense; or the text of a structured layer, see :class:`basis.layers.structured.Structure`.
        skipped: name of every other convolution -> the reason why it stays dense.
        out_channels: C_out of the convolutions, in the order of the model, for :meth:`plot`; a plan that was written
            by hand need not know it.
    """

    kind: ClassVar[str] = "plan"

    layers: Mapping[str, Size]
    skipped: Mapping[str, str] = field(default_factory=dict)
    out_channels: Mapping[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        *,
        ratio: float | None = None,
        layer: str | Structure | None = None,
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        multiple: int = 1,
        only_smaller: bool = False,
    ) -> Plan:
        """Every convolution of ``model`` that can be substituted, all at one ratio or by one structured layer.

        Args:
            ratio: r in (0, 1]; k is the nearest to r C_out among the multiples of ``groups`` and of
                ``multiple``. Give this or ``layer``.
            layer: the text of a structured layer; a layer that cannot take it is skipped with the reason.
            include: shell patterns (``fnmatch``) of layer names; none means all layers.
            exclude: patterns of layers that stay dense.
            multiple: what every k is a multiple of, e.g. 8 for tensor cores.
            only_smaller: leave a layer dense where this k would save no parameters, which is where k per group is not
                below the C_in/groups x kh x kw numbers of a filter, as in 1x1 convolutions that widen a network.

        Raises:
            ValueError: for a ratio, layer or multiple that makes no sense, or an ``include`` pattern that
                no convolution matches.
        """
        if (ratio is None) == (layer is None):
            raise ValueError("give one of ratio and layer")
        if multiple < 1 or (layer is not None and multiple > 1):
            raise ValueError(
                f"multiple is {multiple}, but it must be a whole number of at least 1, and goes with a ratio"
            )
        structure = None if layer is None else Structure.parse(layer)
        basis_channels_for(1.0 if ratio is None else ratio, 1)  # refuses one that makes no sense, whatever the layers
        included, excluded = as_patterns(include), as_patterns(exclude)
        convolutions = _convolutions(model)
        for pattern in included:
            if not any(fnmatchcase(name, pattern) for names in convolutions.values() for name in names):
                raise ValueError(f"include has {pattern!r}, but no convolution has such a name")
        layers: dict[str, Size] = {}
        skipped: dict[str, str] = {}
        for module, names in convolutions.items():
            reason = _obstacle(model, module) or left_out(names, included, excluded)
            if reason is None and structure is not None and isinstance(module, nn.Conv2d):
                reason = structure.obstacle(module)
                if reason is None:
                    layers[names[0]] = str(structure)
                    continue
            elif reason is None and ratio is not None and isinstance(module, nn.Conv2d):
                k = basis_channels_for(ratio, module.out_channels, math.lcm(module.groups, multiple))
                fan_in = module.weight[0].numel()
                if k >= module.out_channels:
                    reason = f"k = {k} is not below C_out = {module.out_channels}: nothing to derive"
                elif only_smaller and k >= module.groups * fan_in:
                    reason = f"k = {k} saves nothing: its filters have only {fan_in} numbers"
                else:
                    layers[names[0]] = k
                    continue
            skipped[names[0]] = str(reason)
        if structure is not None:
            for group in _tied(model, layers, Form("dense")):  # whether layers save that share is a matter of all
                reason = structure.obstacle_together([model.get_submodule(name) for name in group])  # type: ignore[misc]
                if reason is not None:
                    layers = {name: size for name, size in layers.items() if name not in group}
                    skipped |= dict.fromkeys(group, reason)
        return cls(layers, skipped, _widths(convolutions))

    def __str__(self) -> str:
        others = any(isinstance(size, str) for size in self.layers.values())
        title = "basis channels, or structured layer" if others else "basis channels"
        rows = [("layer", title), *((shown_name(n), str(size)) for n, size in self.layers.items())]
        if self.skipped:
            rows += [("", ""), ("kept dense", "because"), *((shown_name(n), r) for n, r in self.skipped.items())]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)

    def to_json(self) -> str:
        """The plan as JSON text, for :meth:`from_json`."""
        content = {"basis_plan": PLAN_VERSION, "layers": dict(self.layers), "skipped": dict(self.skipped)}
        content |= {"out_channels": dict(self.out_channels)} if self.out_channels else {}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote. Raises ``ValueError`` where ``text`` is not one."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the plan is not readable JSON: {error}") from error
        if not isinstance(content, dict) or "basis_plan" not in content:
            raise ValueError("this JSON is not a plan: it has no entry 'basis_plan' with the version")
        if content["basis_plan"] != PLAN_VERSION:
            raise ValueError(f"the plan has version {content['basis_plan']!r}, but {PLAN_VERSION} is read here")
        known = {
            "layers": (_is_size, "numbers of basis channels or structured layers"),
            "skipped": (_is_text, "reasons"),
            "out_channels": (_is_count, "numbers of channels"),
        }
        content = {"out_channels": {}, **content}
        for key, (fits, what) in known.items():
            entries = content.get(key)
            if not isinstance(entries, dict) or not all(map(fits, entries.values())):
                raise ValueError(f"the plan's {key!r} is {entries!r}, but it must map layer names to {what}")
        return cls(content["layers"], content["skipped"], content["out_channels"])


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_size(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and value.partition(":")[0] in LAYERS)


def plan_of(model: nn.Module) -> Plan:
    """The plan that ``model`` was made by, read from its layers.

    ``layers`` holds its basis convolutions and structured layers. ``skipped`` holds its other convolutions,
    with the reason where they cannot be substituted, else as ``"left dense"``; why a ratio left them dense
    is what ``Plan.uniform(model, ratio=...)`` on the dense model says.
    """
    layers: dict[str, Size] = {}
    skipped: dict[str, str] = {}
    for module, names in _convolutions(model).items():
        if isinstance(module, BasisConv2d):
            layers[names[0]] = module.basis_channels
        elif isinstance(module, StructuredConv2d):
            layers[names[0]] = module.text
        else:
            skipped[names[0]] = _obstacle(model, module) or "left dense"
    return Plan(layers, skipped, _widths(_convolutions(model)))


def substitute(
    model: nn.Module,
    plan: Plan | Mapping[str, Size | float] | None = None,
    *,
    ratio: float | None = None,
    layer: str | Structure | None = None,
    mode: Mode = "auto",
    init: Literal["svd", "random"] = "svd",
    calibration: Batches | None = None,
    coefficients: str | Form = "dense",
    batch_norm: Literal["ordinary", "through_basis"] = "ordinary",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """A copy of ``model`` in which the convolutions that the plan names are basis convolutions or structured layers.

    Keeps device, dtype, memory format, training flag, ``requires_grad``, hooks and shared modules (a
    convolution with several names is replaced once, and any of its names will do). A bare
    ``nn.Conv2d`` comes back as a ``BasisConv2d``. :func:`plan_of` tells what was substituted.

    Args:
        plan: a :class:`Plan`, or a mapping of layer names to basis channels, or to texts of structured
            layers such as ``"tucker:0.41"``. Give this, ``ratio`` or ``layer``.
        ratio: every convolution that can be substituted, as by :meth:`Plan.uniform`, which takes
            ``include`` and ``exclude`` too.
        layer: the same with a structured layer in place of a ratio. Beside a plan: the kind alone, such as
            ``"tucker"``, and the plan maps layer names to its sizes (``{"layer1.0.conv1": 0.41}``).
        mode: the mode of the new basis layers, see :class:`BasisConv2d`.
        init: ``"svd"`` approximates each weight (:meth:`BasisConv2d.from_conv`, and that of each structured
            layer); ``"random"`` draws new ones for training from scratch (``shaped_like``).
        calibration: batches on which the basis layers are fitted to the outputs of the dense ones, instead of to their
            weights: what a layer can still say, it says of what occurs (:mod:`basis.layers.moments`). Inputs alone, or
            (inputs, targets); :class:`basis.data.Images`, or :class:`basis.data.Data`, whose training images are
            used. They are read once, one batch after the other, and run through ``model`` in evaluation mode. The
            mean of what a layer loses goes into its bias, or else into the running mean of the batch
            normalisation that directly follows; no parameter is added, and a layer with neither keeps the
            components about zero. A layer that the data never reach is fitted to its weight, with a warning that
            names it, and so is one whose bias is tied to another. Structured layers are always fitted to weights.
        coefficients: the form of A in every new basis layer, see :class:`Form`. With ``"shared"``, layers of
            equal C_out, k and groups hold one A (those of one dtype and device that all train or all do
            not); it is fitted to all of them at once.
        batch_norm: ``"through_basis"`` couples each new layer to the batch normalisation that directly follows
            it (:func:`basis.layers.batchnorm.couple`): the same function, trained faster. Where none does, or it cannot
            be, the layer stays an ordinary one; :func:`basis.layers.batchnorm.couplings` has the reasons.

    Raises:
        ValueError: for a plan that names a layer that is not there, that cannot be substituted (with
            the reason), or with a k or a form of A that makes no sense; for a bad ratio, mode, init or batch_norm;
            for calibration data that are empty, that the model cannot run on, or on which outputs are not finite.
    """
    if [plan, ratio].count(None) == 0 or [plan, ratio, layer].count(None) == 3 or (layer and ratio is not None):
        raise ValueError("give one of plan, ratio and layer (or a plan of sizes and the kind of layer)")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but it must be one of {', '.join(MODES)}")
    if init not in ("svd", "random"):
        raise ValueError(f"init is {init!r}, but it must be 'svd' or 'random'")
    if calibration is not None and init == "random":
        raise ValueError("calibration data fit layers to outputs, but init='random' fits nothing; leave one out")
    if batch_norm not in ("ordinary", "through_basis"):
        raise ValueError(f"batch_norm is {batch_norm!r}, but it must be 'ordinary' or 'through_basis'")
    if plan is None:
        plan = Plan.uniform(model, ratio=ratio, layer=layer, include=include, exclude=exclude)
    elif as_patterns(include) or as_patterns(exclude):
        raise ValueError("include and exclude go with a ratio or a layer; a plan names its layers itself")
    elif layer is not None:
        plan = _of_kind(plan, layer)
    chosen = _resolve(model, plan.layers if isinstance(plan, Plan) else plan)
    if isinstance(coefficients, Coefficients):
        raise ValueError("coefficients are a module, which the new layers would share with its owner; give a form")
    form = Form.parse(coefficients)
    texts = [size for size in chosen.values() if isinstance(size, str)]
    if texts and len(texts) == len(chosen) and (mode != "auto" or form.kind != "dense"):
        raise ValueError(f"mode and coefficients are for basis channels k, but every layer of the plan is a {texts[0]}")
    copied = copy_of(model)
    for name in chosen:
        if init == "svd" and copied.get_submodule(name).weight.is_meta:
            raise ValueError(f"{shown_name(name)} is on the meta device and has no values; use init='random'")
    moments, norms = ({}, {}) if calibration is None else _calibrated(copied, chosen, calibration)
    new: dict[nn.Module, nn.Module] = {}
    for names in _tied(copied, chosen, form):
        convs: list[Any] = [copied.get_submodule(name) for name in names]
        try:
            size = chosen[names[0]]
            if isinstance(size, str):
                layers: Sequence[ConvLike] = Structure.parse(size).make(convs, fitted=init == "svd")
            else:
                seen = [moments[name].centred() if name in norms else moments.get(name) for name in names]
                made = _make(convs, init, basis_channels=size, mode=mode, coefficients=form, moments=seen)
                for name, own in zip(names, made, strict=True):
                    if name in norms:
                        _take(copied.get_submodule(norms[name]), own.lost_mean(moments[name]))
                layers = made
        except ValueError as error:
            raise ValueError(f"{shown_name(names[0])}: {error}") from error
        new.update((conv, hand_over(conv, layer)) for conv, layer in zip(convs, layers, strict=True))
    copied = replace_modules(copied, new)
    if batch_norm == "through_basis":
        names_made = {name for name, module in copied.named_modules() if module in new.values()}
        couple_in_place(copied, names_made & couplings(copied).norms.keys())
    return copied


def _of_kind(plan: Plan | Mapping[str, Any], layer: str | Structure) -> Plan:
    """The plan of sizes with the kind of layer that they are sizes of."""
    structure = Structure.parse(layer)
    if structure.size:
        raise ValueError(f"layer is {str(layer)!r} beside a plan, but then it is a kind, whose sizes the plan gives")
    sizes = plan.layers if isinstance(plan, Plan) else plan
    widths = plan.out_channels if isinstance(plan, Plan) else {}
    return Plan({name: str(Structure(structure.kind, str(size))) for name, size in sizes.items()}, {}, widths)


def _tied(model: nn.Module, chosen: Mapping[str, Size], form: Form) -> list[list[str]]:
    """The layers to make, those together that share parameters."""
    together: dict[Hashable, list[str]] = {}
    for name, size in chosen.items():
        conv: Any = model.get_submodule(name)
        weight = conv.weight
        shared: Hashable = None
        if isinstance(size, str):
            shared = Structure.parse(size).key(conv)
        elif form.kind == "shared":
            shared = (conv.out_channels, conv.groups)
        key = (size, shared, weight.dtype, weight.device, weight.requires_grad)
        together.setdefault(name if shared is None else key, []).append(name)
    return list(together.values())


def _calibrated(
    model: nn.Module, chosen: Mapping[str, Size], calibration: Batches
) -> tuple[dict[str, Moments], dict[str, str]]:
    """The moments of the basis layers to be, and which of them have a batch normalisation that takes means."""
    names = [name for name, size in chosen.items() if not isinstance(size, str)]
    if chosen and not names:
        raise ValueError("calibration data fit basis convolutions, but the plan has structured layers alone")
    inputs = calibration_inputs(calibration, model)
    moments = output_moments(model, untied(model, names), inputs) if names else {}
    moments = {name: own for name, own in moments.items() if own.n}
    if unseen := [shown_name(name) for name in names if name not in moments]:
        warnings.warn(
            f"the calibration data never reach {few(unseen)} (or a tied bias keeps it from being fitted to outputs), "
            "so it was fitted to its weight",
            stacklevel=3,
        )
    return moments, {conv: norm for conv, norm in taking_means(model).items() if conv in moments}


@torch.no_grad()
def _take(norm: Any, lost: Tensor) -> None:
    """Take ``lost`` from the running mean, if there is one; else the mean of each batch leaves it out anyway."""
    if norm.running_mean is not None:
        norm.running_mean.copy_(norm.running_mean.double() - lost)


def _make(
    convs: list, init: str, *, coefficients: Form, moments: Sequence[Moments | None], **options: Any
) -> list[BasisConv2d]:
    """The layers for these convolutions, which hold one A."""
    if init == "svd":
        return BasisConv2d.from_convs(convs, coefficients=coefficients, moments=moments, **options)
    first = BasisConv2d.shaped_like(convs[0], coefficients=coefficients, **options)
    others = [BasisConv2d.shaped_like(conv, coefficients=first.coefficients, **options) for conv in convs[1:]]
    return [first, *others]


def merge(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with a plain ``nn.Conv2d`` for each basis convolution (of [B; A B]) and structured layer.

    Keeps what :func:`substitute` keeps. Batch normalisation through the basis is ordinary again.
    """
    copied = uncouple_in_place(copy_of(model))
    layers = [module for module in copied.modules() if isinstance(module, (BasisConv2d, StructuredConv2d))]
    return replace_modules(copied, {layer: hand_over(layer, layer.to_conv()) for layer in layers})


# -- which layers -------------------------------------------------------------------------------


def _convolutions(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every convolution-like module with all its names, in the order of the model."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (_ConvNd, ConvLike)):
            found.setdefault(module, []).append(name)
    return found


def _widths(convolutions: Mapping[nn.Module, list[str]]) -> dict[str, int]:
    return {names[0]: conv.out_channels for conv, names in convolutions.items()}  # type: ignore[misc]


def _obstacle(model: nn.Module, module: nn.Module) -> str | None:
    """Why ``module`` cannot be substituted, whatever k; None where it can."""
    kind = type(module)
    if isinstance(module, BasisConv2d):
        return f"already a basis convolution, with k = {module.basis_channels}"
    if isinstance(module, StructuredConv2d):
        return f"already a structured layer, {module.text}"
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__}: only nn.Conv2d can be substituted"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "lazy: its shape is not known before the first forward pass"
    if set(module._parameters) != {"weight", "bias"} or next(module.children(), None) is not None:
        return "parametrized: its weight is made from other parameters"
    own_forward = "forward" in vars(module) or "_conv_forward" in vars(module)
    if own_forward or any(getattr(kind, f) is not getattr(nn.Conv2d, f) for f in ("forward", "_conv_forward")):
        return f"{kind.__name__} has a forward of its own"
    tied = [
        f"{name}.{key}".lstrip(".")
        for name, other in model.named_modules()
        for key, parameter in other._parameters.items()
        if parameter is module.weight and (other, key) != (module, "weight")
    ]
    if tied:
        return f"weight tied with {', '.join(tied)}"
    if module.out_channels == module.groups:
        return "depthwise: one filter per group" if module.groups > 1 else "one filter: nothing to derive"
    return None


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def left_out(names: list[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    for pattern in exclude:
        if any(fnmatchcase(name, pattern) for name in names):
            return f"excluded by {pattern!r}"
    if include and not any(fnmatchcase(name, pattern) for name in names for pattern in include):
        return "not among the included layers"
    return None


def _resolve(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Size]:
    """The layers to substitute, each module once, after checking all that ``layers`` says."""
    convolutions = _convolutions(model)
    module_of = {name: module for module, names in convolutions.items() for name in names}
    chosen: dict[nn.Module, tuple[str, Size]] = {}
    for name, k in layers.items():
        module = module_of.get(name)
        if module is None:
            raise ValueError(_no_such_layer(name, dict(model.named_modules()), list(module_of)))
        if isinstance(module, nn.Conv2d) and k == module.out_channels:
            continue
        reason = _obstacle(model, module)
        if reason is not None:
            raise ValueError(f"the plan names {shown_name(name)}, which cannot be substituted: {reason}")
        conv: Any = module
        try:
            if isinstance(k, str):
                structure = Structure.parse(k)
                structure.check(conv)
                k = str(structure)  # without spaces
            else:
                check_basis_channels(k, conv.out_channels, conv.groups)
        except ValueError as error:
            raise ValueError(f"the plan for {shown_name(name)}: {error}") from error
        other, other_k = chosen.setdefault(module, (name, k))
        if other_k != k:
            raise ValueError(
                f"the plan gives {shown_name(other)} {size_text(other_k)} and {shown_name(name)} {size_text(k)}, "
                "but they are one shared layer"
            )
    return {name: k for name, k in chosen.values()}


def _no_such_layer(name: str, modules: Mapping[str, nn.Module], convolutions: list[str]) -> str:
    if name in modules:
        return f"the plan names {shown_name(name)}, which is a {type(modules[name]).__name__}, not a convolution"
    near = difflib.get_close_matches(name, convolutions, n=3) or convolutions
    hint = f"near it are {few(near)}" if near else "it has no convolution at all"
    return f"the plan names {shown_name(name)}, but the model has no such layer; {hint}"


# -- the exchange -------------------------------------------------------------------------------


def hand_over(old: Any, new: Any) -> nn.Module:
    """Give ``new`` the hooks of ``old``, and its very bias parameter, which may be tied elsewhere.

    But for the bias of a layer that ``shifts``: in a convolution it has another value.
    """
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)
    if old.bias is not None and not getattr(old, "shifts", False):
        with torch.no_grad():
            old.bias.copy_(new.bias)
        new.bias = old.bias
    return new


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent.add_module(name, new[child])
    return model


def size_text(size: Size) -> str:
    return size if isinstance(size, str) else f"k = {size}"
