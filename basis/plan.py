"""Plans: which convolutions become basis convolutions or other structured layers, and why the others stay dense."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from basis.layers.base import ConvLike
from basis.layers.coefficients import Form
from basis.layers.conv import BasisConv2d, basis_channels_for
from basis.layers.structured import Structure, StructuredConv2d
from basis.numbers import plain_number
from basis.saving import columns, write_json
from basis.text import first_line, shown_name

VERSION = 1  # of the file of a plan
# What DataParallel, DistributedDataParallel, torch.compile, FSDP and checkpointing put into the names of layers.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Size = int | str  # basis channels k of a basis convolution, or the text of a structured layer, "tucker:0.41"


@dataclass(frozen=True)
class Plan:
    """Which layers of a model become basis convolutions or other structured layers, and why the others do not.

    ``layers`` maps names to basis channels k, where k = C_out keeps the layer dense, or to texts of structured layers
    (:class:`basis.layers.structured.Structure`); ``skipped`` maps every other convolution to the reason.
    ``out_channels`` are the C_out of the model's, by which a plan of another model is known.

    Raises ``TypeError`` for what is no mapping, ``ValueError`` for a size that no layer could have.
    """

    layers: Mapping[str, Size]
    skipped: Mapping[str, str] = field(default_factory=dict)
    out_channels: Mapping[str, int] = field(default_factory=dict, compare=False)  # a plan written by hand has none

    def __post_init__(self) -> None:
        if not all(isinstance(getattr(self, one.name), Mapping) for one in fields(self)):
            raise TypeError("layers, skipped and out_channels must map names of layers to sizes, reasons and numbers")
        object.__setattr__(self, "layers", {name: _size(name, size) for name, size in self.layers.items()})
        for name, kind in (("skipped", str), ("out_channels", int)):
            object.__setattr__(self, name, {layer: kind(one) for layer, one in getattr(self, name).items()})

    @classmethod
    def uniform(
        cls, model: nn.Module, *, ratio: float | None = None, layer: str | Structure | None = None,
        coefficients: str | Form = "dense", include: str | Iterable[str] = (), exclude: str | Iterable[str] = (),
        multiple: int = 1,
    ) -> Plan:  # fmt: skip
        """Every convolution of ``model`` that can be substituted, all at one ratio or by one structured layer.

        A layer that the form of A does not fit, or that would then store more parameters than the dense one, stays
        dense; ``skipped`` says so.

        Args:
            ratio: r in (0, 1]; k is the multiple of ``groups`` and ``multiple`` nearest to r C_out. This or ``layer``.
            layer: the text of a structured layer; a layer that cannot take it is skipped with the reason.
            coefficients: the form of A, which decides how many parameters a basis layer stores.
            include, exclude: shell patterns (``fnmatch``) of layer names; to include none means all layers.

        Raises ``ValueError`` for an argument out of range, or an ``include`` pattern that no convolution matches.
        """
        if (ratio is None) == (layer is None):
            raise ValueError("give one of ratio and layer")
        if multiple < 1 or (layer is not None and multiple > 1):
            raise ValueError(f"multiple is {multiple}, but it must be at least 1, and goes with a ratio")
        form, structure = Form.parse(coefficients), None if layer is None else Structure.parse(layer)
        if ratio is not None:
            basis_channels_for(ratio, 1)  # refuses a bad ratio, whatever the layers are
        included, excluded = as_patterns(include), as_patterns(exclude)
        found = convolutions(model)
        check_patterns("include", included, [name for names in found.values() for name in names])
        layers: dict[str, Size] = {}
        skipped: dict[str, str] = {}
        for conv, names in found.items():
            reason = obstacle(model, conv) or left_out(names, included, excluded)
            size: Size = 0
            if structure is not None:
                reason, size = reason or structure.obstacle(conv), str(structure)
            elif not reason:
                size = basis_channels_for(ratio or 0, conv.out_channels, math.lcm(conv.groups, multiple))
                if size >= conv.out_channels:
                    reason = f"k = {size} is not below C_out = {conv.out_channels}: nothing to derive"
            if reason:
                skipped[names[0]] = reason
            else:
                layers[names[0]] = size
        for names in tied(model, layers, form):
            if reason := _growth([model.get_submodule(name) for name in names], layers[names[0]], form):
                layers = {name: size for name, size in layers.items() if name not in names}
                skipped |= dict.fromkeys(names, reason)
        return cls(layers, skipped, _widths(found))

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON to ``path``, whole or not at all."""
        write_json(Path(path), {"basis_plan": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan. Raises ``FileNotFoundError``, or ``ValueError`` for what is not one."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.pop("basis_plan", None)
            if version != VERSION:
                raise ValueError(f"its version is {version!r}, but {VERSION} is read here")
            return cls(**content)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} holds no plan: {first_line(error)}") from error

    def __str__(self) -> str:
        others = any(isinstance(size, str) for size in self.layers.values())
        title = "basis channels, or structured layer" if others else "basis channels"
        rows = [("layer", title), *((shown_name(n), str(size)) for n, size in self.layers.items())]
        if self.skipped:
            rows += [("", ""), ("kept dense", "because"), *((shown_name(n), r) for n, r in self.skipped.items())]
        return "\n".join(columns(rows, left=2))


def plan_of(model: nn.Module) -> Plan:
    """The plan that ``model`` was made by, read from its layers; ``skipped`` says why others stay dense, if known."""
    layers: dict[str, Size] = {}
    skipped: dict[str, str] = {}
    found = convolutions(model)
    for module, (name, *_) in found.items():
        if isinstance(module, BasisConv2d):
            layers[name] = module.basis_channels
        elif isinstance(module, StructuredConv2d):
            layers[name] = module.text
        else:
            skipped[name] = obstacle(model, module) or "left dense"
    return Plan(layers, skipped, _widths(found))


def convolutions(model: nn.Module) -> dict[Any, list[str]]:
    """Every convolution-like module with all its names, in the order of the model."""
    found: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (_ConvNd, ConvLike)) or _converted(module):
            found.setdefault(module, []).append(name)
    return found


def _converted(module: Any) -> str | None:
    """What was made of a convolution, so that it is none of ``torch.nn`` any more; None for other modules."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    name = getattr(module, "original_name", "") if scripted else type(module).__name__
    one = isinstance(module, _ConvNd) or next(module.children(), None) is None
    done = "scripted or traced" if scripted else "quantized" * type(module).__module__.startswith("torch.ao.")
    return f"{name}, {done}: substitute before that" if "Conv" in name and one and done else None


def _widths(found: Mapping[Any, Sequence[str]]) -> dict[str, int]:
    return {names[0]: conv.out_channels for conv, names in found.items() if hasattr(conv, "out_channels")}


def _size(name: str, size: Any) -> Size:
    """A size as a plan holds it: any kind of whole number as an int, texts of structured layers without spaces."""
    try:
        if isinstance(size, (str, Structure)):
            return str(Structure.parse(size))
        return plain_number("basis_channels", size, whole=True, least=1)
    except ValueError as error:
        raise ValueError(f"the plan for {shown_name(name)}: {error}") from error


def meant(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Each of ``names`` -> the one of ``known`` that it means: itself, or the only one that differs by wrappers alone.

    Wrappers are those of DataParallel, torch.compile and the like; names that mean none are left out.
    """

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in WRAPPERS)

    by_bare: dict[str, list[str]] = {}
    for name in known:
        by_bare.setdefault(bare(name), []).append(name)
    found = {name: by_bare.get(bare(name), []) for name in names}
    return {name: name if name in near else near[0] for name, near in found.items() if name in near or len(near) == 1}


def obstacle(model: nn.Module, module: nn.Module) -> str | None:
    """Why ``module`` cannot be substituted, whatever the size; None where it can."""
    kind = type(module)
    if isinstance(module, BasisConv2d):
        return f"already a basis convolution, with k = {module.basis_channels}"
    if isinstance(module, StructuredConv2d):
        return f"already a structured layer, {module.text}"
    if reason := _converted(module):
        return reason
    if not isinstance(module, nn.Conv2d):
        return f"{kind.__name__}: only nn.Conv2d can be substituted"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "lazy: its shape is not known before the first forward pass"
    if set(module._parameters) != {"weight", "bias"} or next(module.children(), None) is not None:
        return "parametrized: its weight is made from other parameters"
    own_forward = "forward" in vars(module) or "_conv_forward" in vars(module)
    if own_forward or any(getattr(kind, f) is not getattr(nn.Conv2d, f) for f in ("forward", "_conv_forward")):
        return f"{kind.__name__} has a forward of its own"
    named = [
        (name, m, key) for name, m in model.named_modules() for key, p in m._parameters.items() if p is module.weight
    ]
    if twins := [f"{name}.{key}".lstrip(".") for name, m, key in named if (m, key) != (module, "weight")]:
        return f"weight tied with {', '.join(twins)}"
    weight = module.weight
    if hasattr(weight, "__tensor_flatten__") or weight.layout != torch.strided or not weight.is_floating_point():
        what = f"{type(weight).__name__} ({weight.layout}, {weight.dtype})"
        return f"its weight is a {what}, not a plain tensor of real numbers: substitute before sharding or quantizing"
    if module.out_channels == module.groups:
        return "depthwise: one filter per group" if module.groups > 1 else "one filter: nothing to derive"
    return None


def tied(model: nn.Module, sizes: Mapping[str, Size], form: Form) -> list[list[str]]:
    """The names of ``sizes``, those together whose new layers share parameters."""
    together: dict[Hashable, list[str]] = {}
    for name, size in sizes.items():
        conv: Any = model.get_submodule(name)
        shared: Hashable = (conv.out_channels, conv.groups) if form.kind == "shared" else None
        if isinstance(size, str):
            shared = Structure.parse(size).key(conv)
        key = (size, shared, conv.weight.dtype, conv.weight.device, conv.weight.requires_grad)
        together.setdefault(name if shared is None else key, []).append(name)
    return list(together.values())


def _growth(convs: Sequence[Any], size: Size, form: Form) -> str | None:
    """Why ``convs``, whose new layers share parameters, would store more than now; None where they would not."""
    if isinstance(size, str):
        return Structure.parse(size).obstacle_together(convs)
    conv = convs[0]
    try:
        coefficients = form.make(conv.out_channels, size, conv.groups, device="meta").stored
    except ValueError as error:  # the form does not fit the layer
        return str(error)
    dense = sum(conv.weight.numel() for conv in convs)
    stored = coefficients + sum(size * conv.weight[0].numel() for conv in convs)
    return f"k = {size} makes it larger: {stored:,} parameters in place of {dense:,}" if stored > dense else None


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check_patterns(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a pattern that none of the names matches."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument} has {pattern!r}, but no convolution has such a name")


def left_out(names: Sequence[str], include: tuple[str, ...], exclude: tuple[str, ...]) -> str | None:
    """Why a layer of these names is not among the included ones; None where it is."""
    for pattern in exclude:
        if any(fnmatchcase(name, pattern) for name in names):
            return f"excluded by {pattern!r}"
    if include and not any(fnmatchcase(name, pattern) for name in names for pattern in include):
        return "not among the included layers"
    return None


def size_text(size: Size) -> str:
    """A size as it is said in messages."""
    return size if isinstance(size, str) else f"k = {size}"
