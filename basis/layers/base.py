"""What all layers that stand for an ``nn.Conv2d`` have in common: its arguments, and a weight that is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import _get_current_dispatch_mode

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Fact:
    """An attribute of :class:`Constants` that is saved: reading gives a copy; what is set is checked as if loaded."""

    def __set_name__(self, owner: type[Constants], name: str) -> None:
        self.name, owner.facts = name, (*owner.facts, name)

    def __get__(self, layer: Constants | None, owner: type | None = None) -> Any:
        return self if layer is None else layer._fact(self.name)

    def __set__(self, layer: Constants, value: Tensor) -> None:
        layer._know({self.name: layer._admitted(self.name, value)})


class Constants(nn.Module):
    """A module with constants that are no numbers of a model, such as orders and masks, and so not in ``buffers()``.

    What goes over buffers (weight averaging, casts, broadcasts) does not meet them. A :class:`Fact` is in the state all
    the same, and checked on loading (``RuntimeError``). ``_made`` makes any constant where it is needed.
    """

    facts: ClassVar[tuple[str, ...]] = ()
    _needed: tuple[str, ...] = ()  # the constants that a forward pass takes

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, np.ndarray] = {}  # the facts; no tensors, which copies and transforms would change
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _like(self) -> Tensor:
        """A parameter, where the constants are to be."""
        raise NotImplementedError

    def _made(self, name: str, like: Tensor) -> Tensor:
        """A constant, on the device of ``like``."""
        return torch.tensor(self._known[name], device=like.device)

    def _fact(self, name: str) -> Tensor:
        """A fact as it stands in the state."""
        return Constants._made(self, name, self._like())

    def _checked(self, name: str, value: Tensor) -> np.ndarray:
        """The fact that ``value`` is; ``ValueError`` where it cannot be one. Here: a seed."""
        own = int(self._known[name])
        if value.dim() == 0 and not (value.is_floating_point() or value.is_complex()):
            return np.array(value.item())
        # A float can only be recognised: the seed that this layer has, rounded as in a weighted sum of equal ones.
        exact = value.dim() == 0 and not value.is_complex() and value.dtype.itemsize >= 4
        if not exact or not abs(value.item() - own) <= 1e-6 * abs(own):
            raise ValueError("is no seed, which is a whole number")
        return np.array(own)

    def _admitted(self, name: str, value: Tensor) -> np.ndarray:
        try:
            return self._checked(name, torch.as_tensor(value))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None

    def _know(self, facts: Mapping[str, np.ndarray]) -> None:
        """From now on these are the facts; what was made of others is made anew, in place: CUDA graphs may read it."""
        self._known.update(facts)
        for (name, *_), placed in self._placed.items():
            if name in self._needed:
                placed.copy_(self._made(name, self._like()))
        self._place()

    def _place(self) -> None:
        """Have what is needed where the parameters are now, and nowhere else."""
        like = self._like()
        kept = {(name, like.device, like.dtype) for name in self._needed}
        self._placed = {at: t for at, t in self._placed.items() if at in kept}
        for name in self._needed:
            self.constant(name, like)

    def constant(self, name: str, like: Tensor) -> Tensor:
        """The constant of this name where ``like`` is; kept, unless a transform would keep a tensor of its own."""
        at = name, like.device, like.dtype
        found = self._placed.get(at)
        if found is None or found.device != like.device:  # as after a load to another device
            with torch.inference_mode(False):
                found = self._made(name, like)
            if not transformed():
                self._placed[at] = found
        return found

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._place()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: self._fact(name) for name in self.facts})

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        _, strict, missing, unexpected, errors = args
        found, keys = {}, {prefix + name: name for name in self.facts}
        unexpected[:] = [key for key in unexpected if key not in keys]
        for key, name in keys.items():
            if key not in state:
                missing += [key] * strict
            elif not getattr(state[key], "is_meta", False):
                try:
                    found[name] = self._admitted(name, state[key])
                except ValueError as error:
                    errors.append(f"{prefix}{error}: the state was cast, or averages networks that differ in it")
        self._know(found)


def whole_numbers(value: Tensor) -> np.ndarray:
    """Its entries; floats within 1e-3 of whole numbers count as such, as a weighted sum of equal ones is."""
    value = getattr(value, "full_tensor", value.detach)().cpu()  # of a DTensor all of it
    if value.is_complex() or not (value.double() - value.double().round()).abs().le(1e-3).all():
        raise ValueError("holds fractions, but it must hold whole numbers")
    return value.double().round().long().numpy()


def mask_of(value: Tensor, shape: Sequence[int], kept: int | None = None, axis: int | None = None) -> np.ndarray:
    """Out of a state a mask that keeps so many entries, of all or along ``axis``; ``ValueError`` for anything else."""
    mask = whole_numbers(value)
    if mask.shape != tuple(shape) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"is no mask of shape {tuple(shape)}")
    if kept is not None and (mask.sum(axis) != kept).any():
        raise ValueError(f"is no mask that keeps {kept} entries" + " of each row" * (axis is not None))
    return mask.astype(bool)


class _AnyTensor(type(Tensor)):  # type: ignore[misc]
    """Any tensor passes as an instance, or ``torch.testing`` would not compare one of the class with a parameter."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, Tensor)


class Computed(Tensor, metaclass=_AnyTensor):
    """A weight that is made from other numbers: reading it gives plain tensors and gradients; writing is refused.

    Raises ``RuntimeError`` where it, or a view of it, is written to. An ``nn.Parameter`` made of it is an ordinary one.
    """

    layer: ConvLike
    detached: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        first, source = _computed([*args, *kwargs.values()][:1]), _computed(args)
        writes = kwargs.get("inplace") or WRITING.fullmatch(name)
        if func == ANY_TENSOR.grad.__set__ or (first is not None and first.detached and func in REQUIRING):
            writes = False
        written = first if writes else _computed(kwargs.get("out"))
        if written is not None:
            raise RuntimeError(written.layer.no_writing())
        with torch._C.DisableTorchFunctionSubclass():
            if first is not None and name in ("__deepcopy__", "__reduce_ex__"):  # copies are like any other tensor
                return getattr(first.as_subclass(Tensor), name)(*args[1:])
            found = func(*args, **kwargs)
            return found if source is None else _seen(found, source, detached=name == "detach")

    @property
    def _is_param(self) -> bool:  # which nn.Parameter sets on what it makes
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        vars(self).clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]


ANY_TENSOR: Any = Tensor  # whose descriptors mypy does not know
REQUIRING = (Tensor.requires_grad_, ANY_TENSOR.requires_grad.__set__)  # allowed once detached: nn.Parameter does it
WRITING = re.compile(r"__set(item)?__|__i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|.*[^_]_")


def _computed(value: Any) -> Computed | None:
    """The first of them that is, or is in a list of, ``value``."""
    if isinstance(value, (tuple, list)):
        return next((one for item in value if (one := _computed(item)) is not None), None)
    return value if type(value) is Computed else None


def _seen(found: Any, source: Computed, *, detached: bool) -> Any:
    """``found``, of which what shares the memory of ``source`` may not be written to either."""
    if type(found) in (tuple, list):
        return type(found)(_seen(item, source, detached=detached) for item in found)
    if isinstance(found, np.ndarray):
        found.flags.writeable = False
    elif type(found) is Tensor and found.untyped_storage()._cdata == source.untyped_storage()._cdata:
        found = found.as_subclass(Computed)
        found.layer, found.detached = source.layer, detached
    return found


class ConvLike(Constants):
    """A layer with the arguments and attributes of ``nn.Conv2d``; the subclass sets ``bias``, (C_out,) or None."""

    bias: nn.Parameter | None
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, padding_mode: PaddingMode = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        # nn.Conv2d checks and normalises the arguments, so that both accept the same.
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            device="meta",
        )  # fmt: skip
        self.in_channels, self.out_channels, self.groups = int(in_channels), int(out_channels), int(groups)
        self.kernel_size, self.stride, self.dilation = map(_whole, (conv.kernel_size, conv.stride, conv.dilation))
        self.padding = conv.padding if isinstance(conv.padding, str) else _whole(conv.padding)
        self.padding_mode = padding_mode
        self._reversed_padding_repeated_twice = _whole(conv._reversed_padding_repeated_twice)

    def _computed_weight(self) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight of the dense convolution that this layer is, (C_out, C_in/groups, kh, kw), never autocast.

        Computed, in the memory format of the layer: gradients flow through it; writing to it is a ``RuntimeError``.
        """
        weight = self._computed_weight()
        if type(weight) is Tensor and not transformed():
            weight = weight.as_subclass(Computed)
            weight.layer, weight.detached = self, False
        return weight

    @weight.setter
    def weight(self, value: Any) -> None:
        raise RuntimeError(self.no_writing())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module; ``RuntimeError`` for ``weight``, and for what is made of it, as pruning does."""
        if name == "weight" or type(param) is Computed:
            raise RuntimeError(self.no_writing())
        super().register_parameter(name, param)

    @property
    def itself(self) -> ConvLike:
        """The layer, for torch.fx: where a layer is traced alone, it is the one node of its graph."""
        return self

    def __prepare_scriptable__(self) -> None:
        """Which torch.jit.script calls first."""
        what = "torch.jit.trace it, or script what basis.merge(model) gives"
        raise RuntimeError(f"torch.jit.script takes no {type(self).__name__}: {what}")

    def no_writing(self) -> str:
        """Why nobody can write to :attr:`weight`, and what to do."""
        names = ", ".join(f"layer.{name}" for name, _ in self.named_parameters() if name != "bias")
        what = f"write to that ({names}), or make a layer of a convolution that has the weight (from_conv, substitute)"
        return f"the weight of {type(self).__name__} is computed from other numbers and cannot be written to; {what}"

    @property
    def filter_shape(self) -> tuple[int, int, int]:
        """(C_in/groups, kh, kw), the shape of one filter of the dense convolution."""
        return (self.in_channels // self.groups, *self.kernel_size)  # type: ignore[return-value]

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pad ``x`` where the convolution cannot; also the (height, width) that the convolution still has to pad."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        kind = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=kind), (0, 0)

    def _dense(self, weight: Tensor, *, trains: bool) -> nn.Conv2d:
        """``nn.Conv2d`` of this shape with a copy of ``weight``, in its memory format, and of the bias."""
        conv = nn.Conv2d(*arguments_of(self, weight))
        conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def _shown_arguments(self) -> list[str]:
        """The arguments that matter, as ``nn.Conv2d`` prints them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        return [*parts, "bias=False"] if self.bias is None else parts


def arguments_of(conv: nn.Conv2d | ConvLike, weight: Tensor) -> tuple[Any, ...]:
    """The arguments that make another layer of the shape of ``conv``, with the device and dtype of ``weight``."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, conv.bias is not None, conv.padding_mode, weight.device, weight.dtype,
    )  # fmt: skip


def autocast_device(tensor: Tensor) -> str:
    """The device type to ask autocast about; the meta device has none of its own."""
    return "cpu" if tensor.is_meta else tensor.device.type


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast: weights are built in full precision and rounded once, where they are applied."""
    return torch.autocast(autocast_device(tensor), enabled=False)


def transformed() -> bool:
    """Whether something compiles, traces or transforms what is computed now, or watches its operations."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )


def as_leaf(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of ``layer`` as one node, where an argument is a Proxy of torch.fx; else None."""
    proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
    if proxy is None:
        return None
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer) or "itself", args, kwargs)


def check_weight(conv: nn.Conv2d, *, fitted: bool) -> None:
    """Raise ``ValueError`` for a complex weight; to be ``fitted``, it must have values, all of them finite."""
    if conv.weight.is_complex():
        raise ValueError("the convolution has a complex weight, and only real ones are supported")
    if fitted and conv.weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values; give it some first")
    if fitted and not conv.weight.isfinite().all():
        raise ValueError("the weight has entries that are not finite")


def _whole(numbers: Any) -> tuple[int, ...]:
    return tuple(map(int, numbers))
