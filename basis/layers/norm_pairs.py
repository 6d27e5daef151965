"""Which convolution is directly followed by which batch normalisation, as a run of a throw-away copy shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from basis.copies import on_a_copy, refuse_lazy, unnoticed, watch_calls
from basis.inputs import Inputs, example_inputs, mapped, run, shapes_of, tensors_in, with_samples
from basis.layers.base import ConvLike
from basis.text import first_line, shown_name

# Hooks that see, or change, what goes into a module and what comes out of it.
_SEE_INPUTS = ("_forward_pre_hooks", "_backward_hooks")
_SEE_OUTPUTS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
# What tells a model on which device it runs; as the meta device is none of its own, such a model is really run.
_DEVICE = tuple(getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu", "is_meta"))
# What lets code know values, or gives shapes that depend on them.
_TELLING = ("__array__", "__bool__", "__contains__", "__float__", "__format__", "__index__", "__int__", "allclose",
            "argwhere", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist")  # fmt: skip
_VALUES = {getattr(place, name) for name in _TELLING for place in (Tensor, torch) if hasattr(place, name)}


@dataclass(frozen=True)
class Pairs:
    """Which convolutions have a batch normalisation of their own; all by name."""

    norms: Mapping[str, str]  # convolution -> the batch normalisation that directly follows it
    alone: Mapping[str, str]  # other convolution -> why it has none
    read: frozenset[str] = frozenset()  # convolutions whose parameters are, or may be, used outside their own calls
    inputs: Inputs | None = field(default=None, repr=False, compare=False)  # on what the model was run


def norm_pairs(model: nn.Module, *, inputs: Inputs | None = None, both_modes: bool = False) -> Pairs:
    """The pairs of a convolution (dense, basis or structured) and the ``nn.BatchNorm2d`` that directly follows it.

    In a pair, the output of the convolution goes into the batch normalisation and nowhere else, nothing else uses the
    parameters of the two, and both are called once: in the mode in which ``model`` is, or with ``both_modes`` in
    training and in evaluation (or in one of the two where the other calls neither). A copy without hooks is run, on
    the meta device if it can be.

    Args:
        inputs: a batch as the model takes it (:mod:`basis.inputs`), of which one sample is run too; None: two random
            images, of the size that timm notes, of ``image_size``, or of 32, 64, 299 or 224 pixels, whichever runs
            first, and one of 224 pixels if that runs.

    Raises ``ValueError`` for a model that cannot be run, on these inputs or on such images, and for lazy layers.
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, (ConvLike, nn.Conv2d))}
    if not convs:
        return Pairs({}, {})
    seen, example = _observed(model, inputs, (True, False) if both_modes else (None,))
    unsure = {part: shown_name(name) for name in seen.unsure for part in model.get_submodule(name).modules()}
    read = seen.read | {name for name, module in convs.items() if module in unsure}
    norms: dict[str, str] = {}
    alone: dict[str, str] = {}
    for name, module in convs.items():
        follows = set() if name in seen.elsewhere else seen.follows[name]
        after = next(iter(follows)) if len(follows) == 1 else None
        norm = None if after is None else model.get_submodule(after)
        if place := unsure.get(module) or unsure.get(norm or module):
            alone[name] = f"it is within {place}, whose forward pass depends on values"
        elif not seen.calls[name]:
            alone[name] = "it is never called"
        elif after is None or norm is None or afterwards(norm) is None:
            alone[name] = "its output does not go into one nn.BatchNorm2d and nowhere else"
        elif read & {name, after}:
            alone[name] = "its parameters, or those of its batch normalisation, are used elsewhere too"
        elif seen.calls[name] > 1 or seen.calls[after] > 1 or seen.precedes[after] != {name}:
            alone[name] = "it or its batch normalisation is called more than once"
        else:
            norms[name] = after
    return Pairs(norms, alone, frozenset(read & convs.keys()), example)


def norms_after(model: nn.Module, inputs: Inputs) -> Mapping[str, str]:
    """The pairs in both modes, convolution -> batch normalisation; none where the model cannot be run in both."""
    try:
        return norm_pairs(model, inputs=inputs, both_modes=True).norms
    except ValueError:
        return {}


def afterwards(norm: nn.Module) -> tuple[nn.Module, ...] | None:
    """What a batch normalisation does with its result, as timm's ``BatchNormAct2d``; None where that is not known."""
    kind = type(norm)
    if "forward" in vars(norm):
        return None
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return (norm.drop, norm.act)  # type: ignore[return-value]
    return () if isinstance(norm, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward else None


def _observed(model: nn.Module, inputs: Inputs | None, modes: Iterable[bool | None]) -> tuple[_Watch, Inputs]:
    """What runs in training (True), in evaluation (False) or as the model is (None) show, and on what it was run."""
    refuse_lazy(model)
    watch, ran, why = _Watch(model), list[Inputs](), ""
    with unnoticed(model):
        examples = _examples(model, inputs)
        for example in examples:
            if not ran or (inputs is None and example is examples[-1]):
                try:
                    for mode in modes:
                        on_a_copy(model, example, partial(watch.run, mode=mode))
                    ran.append(example)
                except Exception as failed:  # the model's own code may raise anything
                    why = first_line(failed)
    if not ran:
        raise ValueError(f"the model cannot be run on {shapes_of(examples[0])} ({why}); give inputs= as it takes them")
    return watch, ran[0]


def _examples(model: nn.Module, inputs: Inputs | None) -> list[Inputs]:
    """What the model may be run on; the last guess, of another size, shows whether that makes a difference."""
    if inputs is not None:
        given = example_inputs(model, None, inputs)
        return [with_samples(given, 2), given]
    channels = next(m.in_channels for m in model.modules() if isinstance(m, (ConvLike, nn.Conv2d)))
    about = getattr(model, "default_cfg", None)
    noted = [about["input_size"]] if isinstance(about, Mapping) and "input_size" in about else []
    edges = [edge for edge in (getattr(model, "image_size", None), 32, 64, 299, 224) if edge is not None]
    sizes = [(channels, *(edge if isinstance(edge, Sequence) else (edge, edge))) for edge in edges]
    zeros = [example_inputs(model, size, None, batch_size=2) for size in noted + sizes]
    batches = [mapped(torch.randn_like, batch) for batch in zeros]
    return [*batches, with_samples(batches[-1], 1)]


class _Watch(TorchFunctionMode):
    """What runs of copies of ``model`` show of its convolutions and batch normalisations; all are told by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()  # in the run with the most of them
        self.follows: defaultdict[str, set[str]] = defaultdict(set)  # convolution -> batch normalisations after it
        self.precedes: defaultdict[str, set[str | None]] = defaultdict(set)  # batch normalisation -> convolutions
        self.elsewhere: set[str] = set()  # convolutions whose output was used elsewhere, or kept
        self.read: set[str] = set()  # whose parameters or buffers were used outside their own calls
        self.unsure: set[str] = set()  # any modules in which values may decide what is run
        kinds = (ConvLike, nn.Conv2d, nn.BatchNorm2d)
        self._parts = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self._hooked = [
            {name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)}
            for kinds in (_SEE_INPUTS, _SEE_OUTPUTS)
        ]

    def run(self, copied: nn.Module, inputs: Inputs, *, mode: bool | None) -> None:
        """Run ``copied``, which is used up by it."""
        self._names = {module: name for name, module in copied.named_modules()}
        self._within: list[str] = []  # whose calls are going on, the innermost last
        self._givers = WeakIdKeyDictionary()  # output that is still there -> the convolution that gave it
        calls: Counter[str] = Counter()
        owned: defaultdict[nn.Module, set[str]] = defaultdict(set)
        for module, name in self._names.items():
            if isinstance(module, nn.DataParallel):
                module.device_ids = []  # no threads, of which nothing would be seen
            for own in module.modules() if name in self._parts else ():
                owned[own].add(name)
        for own, names in owned.items():
            for kind in ("_parameters", "_buffers"):
                vars(own)[kind] = _Reads(vars(own)[kind], partial(self._reads, names))
        if mode is not None:
            copied.train(mode)
        watch_calls(copied, self._enter, partial(self._leave, calls))
        with torch.no_grad(), self:
            result = run(copied, inputs)
        self.calls |= calls
        self.elsewhere.update(self._givers.values())
        del result  # in which an output may be, until now

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[module]
        if name in self._hooked[0]:
            self._uses(args, kwargs)
        self._within.append(name)
        if isinstance(module, nn.BatchNorm2d):
            conv = next(map(self._givers.get, tensors_in([args, kwargs])), None)
            self.precedes[name].add(conv)
            if conv is not None:
                self.follows[conv].add(name)

    def _leave(self, calls: Counter[str], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._within.pop()
        calls[name] += 1
        if name in self.unsure and not isinstance(output, Tensor | None) and self._within:
            self.unsure.add(self._within[-1])  # which may get to know values too
        if isinstance(module, (ConvLike, nn.Conv2d)) and isinstance(output, Tensor):
            self._givers[output] = name
        if name in self._hooked[1]:
            self._uses(output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DEVICE and args[0].is_meta and self._outside():
            raise NotImplementedError("what the model does may depend on the device")
        self._uses(args, kwargs)
        if func in _VALUES and self._outside():
            self.unsure.add(self._within[-1] if self._within else "")
        return func(*args, **(kwargs or {}))

    def _uses(self, *values: Any) -> None:
        """Something is done now with the tensors among ``values``."""
        for conv in filter(None.__ne__, map(self._givers.get, tensors_in(values))):
            if self.follows[conv].isdisjoint(self._within):
                self.elsewhere.add(conv)

    def _outside(self) -> bool:
        """Whether no convolution and no batch normalisation is running."""
        return self._parts.isdisjoint(self._within)

    def _reads(self, owners: set[str]) -> None:
        """What belongs to ``owners`` alone is read now."""
        if owners.isdisjoint(self._within):
            self.read |= owners


class _Reads(dict):
    """The parameters or buffers of a module; calls ``tell`` when one is read by name."""

    def __init__(self, tensors: Mapping[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(tensors)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        self.tell()
        return super().__getitem__(name)
