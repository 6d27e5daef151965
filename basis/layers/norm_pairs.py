"""Which convolution is directly followed by which batch normalisation, as a run of a throw-away copy shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from basis.copies import copy_of, shape_copy, unnoticed, without_hooks
from basis.inputs import Inputs, example_inputs, first_samples, mapped, run, samples_in, shapes_of, tensors_in
from basis.layers.base import ConvLike
from basis.text import first_line, shown_name

# What sees, or changes, what a convolution gives on its way to the batch normalisation.
_HOOKS_OF_CONV = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_NORM = ("_forward_pre_hooks", "_backward_hooks")

# What tells a model on which device it runs; as the meta device is none of its own, such a model is really run.
_DEVICE = tuple(getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu", "is_meta"))


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
    runs, example = _observed(model, inputs, (True, False) if both_modes else (None,))
    places = {model.get_submodule(name): name for seen in runs for name in seen.unsure}
    unsure = {part: shown_name(name) for place, name in places.items() for part in place.modules()}
    read = {name for name, module in convs.items() if module in unsure}.union(*(seen.read for seen in runs))
    calls: Counter[str] = Counter()
    follows: defaultdict[str, set[str | None]] = defaultdict(set)
    precedes: defaultdict[str, set[str | None]] = defaultdict(set)
    for seen in runs:
        calls |= seen.calls  # in the mode that calls it most
        for conv in seen.calls.keys() & convs.keys():
            follows[conv] |= {None} if conv in seen.elsewhere else seen.follows[conv] or {None}
        for follower, before in seen.precedes.items():
            precedes[follower] |= before
    norms: dict[str, str] = {}
    alone: dict[str, str] = {}
    for name, module in convs.items():
        after = next(iter(follows[name])) if len(follows[name]) == 1 else None
        norm = None if after is None else model.get_submodule(after)
        if place := unsure.get(module) or unsure.get(norm or module):
            alone[name] = f"it is within {place}, whose forward pass depends on values"
        elif not calls[name]:
            alone[name] = "it is never called"
        elif after is None or norm is None or afterwards(norm) is None:
            alone[name] = "its output does not go into one nn.BatchNorm2d and nowhere else"
        elif any(getattr(m, k) for m, kinds in ((module, _HOOKS_OF_CONV), (norm, _HOOKS_OF_NORM)) for k in kinds):
            alone[name] = "a hook sees what goes from it into its batch normalisation"
        elif read & {name, after}:
            alone[name] = "its parameters, or those of its batch normalisation, are used elsewhere too"
        elif calls[name] > 1 or calls[after] > 1 or precedes[after] != {name}:
            alone[name] = "it or its batch normalisation is called more than once"
        else:
            norms[name] = after
    return Pairs(norms, alone, frozenset(read & convs.keys()), example)


def afterwards(norm: nn.Module) -> tuple[nn.Module, ...] | None:
    """What a batch normalisation does with its result, as timm's ``BatchNormAct2d``; None where that is not known."""
    kind = type(norm)
    if "forward" in vars(norm):
        return None
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return (norm.drop, norm.act)  # type: ignore[return-value]
    return () if isinstance(norm, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward else None


def _observed(model: nn.Module, inputs: Inputs | None, modes: tuple[bool | None, ...]) -> tuple[list[_Seen], Inputs]:
    """What a run in training (True), in evaluation (False) or as the model is (None) shows, and its inputs."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has lazy layers, whose shapes are not known yet; run it once first")
    examples = _examples(model, inputs)
    why = ""
    with unnoticed(model):
        for copied in (shape_copy, copy_of):  # where the meta device cannot do it, the real run tells
            found: list[tuple[Inputs, list[_Seen]]] = []
            for i, example in enumerate(examples):
                if not found or i == len(examples) - 1:
                    try:
                        found.append((example, [_Seen(copied(model), example, mode) for mode in modes]))
                    except Exception as failed:  # the model's own code may raise anything
                        why = first_line(failed)
            if found:
                return [seen for _, runs in found for seen in runs], found[0][0]
    tried = shapes_of(inputs if inputs is not None else examples[0])
    raise ValueError(f"the model cannot be run on {tried} ({why}); give inputs= as it takes them")


def _examples(model: nn.Module, inputs: Inputs | None) -> list[Inputs]:
    """What the model may be run on; the last, of another size, shows whether that makes a difference."""
    if inputs is not None:
        given = example_inputs(model, None, inputs)
        twice = mapped(lambda t: torch.cat([t, t]) if t.dim() and len(t) == 1 else t, given)
        return [given, twice if samples_in(given) == 1 else first_samples(given, 1)]
    channels = next(m.in_channels for m in model.modules() if isinstance(m, (ConvLike, nn.Conv2d)))
    about = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    sizes = [about["input_size"]] if isinstance(about, Mapping) and "input_size" in about else []
    for edge in (getattr(model, "image_size", None), 32, 64, 299, 224):
        if edge is not None:
            sizes.append((channels, *(edge if isinstance(edge, (tuple, list)) else (edge, edge))))
    numbers = torch.Generator("cpu").manual_seed(0)
    zeros = [example_inputs(model, size, None, batch_size=2) for size in sizes]
    batches = [mapped(lambda t: torch.randn(t.shape, generator=numbers, device="cpu").to(t), batch) for batch in zeros]
    return [*batches, first_samples(batches[-1], 1)]


class _Seen(TorchDispatchMode):
    """What one run of ``copied``, which is used up by it, shows of its convolutions and batch normalisations.

    All are told by name; a set has None for what is none of them.
    """

    def __init__(self, copied: nn.Module, inputs: Inputs, mode: bool | None) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.follows: defaultdict[str | None, set[str | None]] = defaultdict(set)  # convolution -> into what it went
        self.precedes: defaultdict[str, set[str | None]] = defaultdict(set)  # batch normalisation -> of what
        self.elsewhere: set[str] = set()  # convolutions whose output was used elsewhere, or kept
        self.read: set[str] = set()  # whose parameters or buffers were used outside their own calls
        self.unsure: set[str] = set()  # any modules in which values may decide what is run
        self._names = {module: name for name, module in copied.named_modules()}
        kinds = (ConvLike, nn.Conv2d, nn.BatchNorm2d)
        self._parts = {name for module, name in self._names.items() if isinstance(module, kinds)}
        hooked = {name for module, name in self._names.items() if module._forward_hooks or module._forward_pre_hooks}
        self._hooked = hooked - self._parts
        self._within: list[str] = []  # whose calls are going on, the innermost last
        self._outputs: dict[int, tuple[StorageWeakRef, set[str]]] = {}  # storage -> the convolutions that gave it
        self._owners: defaultdict[int, set[str]] = defaultdict(set)  # storage -> whose parameter or buffer it is
        if mode is not None:
            copied.train(mode)
        self._prepare(without_hooks(copied))
        if any(parameter.is_meta for parameter in copied.parameters()):
            inputs = mapped(lambda tensor: tensor.to("meta"), inputs)
        # Autograd saves copies, so that an output that is still there afterwards was kept by somebody.
        saving = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)
        try:
            with torch.set_grad_enabled(copied.training), saving, _Asked(self), self:
                result = run(copied, inputs)
        finally:
            self._names.clear()  # the copy may go
        self.elsewhere.update(*(convs for storage, convs in self._outputs.values() if not storage.expired()))
        del result  # in which an output may be, until now

    def _prepare(self, copied: nn.Module) -> None:
        """Watch over the calls of all modules, and over what is read of their parameters and buffers."""
        owned: defaultdict[nn.Module, set[str]] = defaultdict(set)
        for module, name in self._names.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # nobody sees into it
            if isinstance(module, nn.DataParallel):
                module.device_ids = []  # no threads, of which nothing would be seen
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
            for own in module.modules() if name in self._parts else [module]:
                owned[own].add(name)
        for module, names in owned.items():
            for tensor in tensors_in(vars(module)):
                self._owners[_storage(tensor)] |= names
            for kind in ("_parameters", "_buffers"):
                vars(module)[kind] = _Reads(vars(module)[kind], partial(self._reads, names))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[module]
        self._within.append(name)
        if isinstance(module, nn.BatchNorm2d):
            before = next((self._givers(tensor) for tensor in tensors_in([args, kwargs])), set())
            self.precedes[name] |= before or {None}
            for conv in before:
                self.follows[conv].add(name)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._within.pop()
        self.calls[name] += 1
        if name in self.unsure and not isinstance(output, Tensor) and self._within:
            self.unsure.add(self._within[-1])  # which may get to know values too
        if name in self._hooked:
            self.elsewhere.update(*map(self._givers, tensors_in([args, kwargs, output])))
        if isinstance(module, (ConvLike, nn.Conv2d)) and isinstance(output, Tensor) and (key := _storage(output)) > 0:
            # While there is a weak reference, no other storage gets the same address.
            self._outputs.setdefault(key, (StorageWeakRef(output.untyped_storage()), set()))[1].add(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = self.uses(args, kwargs)
        for tensor in tensors:
            self._reads(self._owners.get(_storage(tensor), set()))
        tells = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
        if tells and (func is not torch.ops.aten.index.Tensor or any(t.dtype == torch.bool for t in tensors[1:])):
            self.tells_values()
        return func(*args, **(kwargs or {}))

    def uses(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors among these, of which something is done now."""
        tensors = tensors_in([args, kwargs])
        for conv in set().union(*map(self._givers, tensors)):
            if self.follows[conv].isdisjoint(self._within):
                self.elsewhere.add(conv)
        return tensors

    def tells_values(self) -> None:
        """The code that runs now gets to know values, or shapes that depend on them."""
        if self.outside():
            self.unsure.add(self._within[-1] if self._within else "")

    def outside(self) -> bool:
        """Whether no convolution and no batch normalisation is running."""
        return self._parts.isdisjoint(self._within)

    def _reads(self, owners: set[str]) -> None:
        """What belongs to ``owners`` alone is used now."""
        if owners.isdisjoint(self._within):
            self.read |= owners

    def _givers(self, tensor: Tensor) -> set[str]:
        """The convolutions whose output this tensor is, or a view of it."""
        return self._outputs.get(_storage(tensor), (None, set[str]()))[1]


class _Asked(TorchFunctionMode):
    """Tells a watch also of what is no operation, such as a shape that is asked for."""

    def __init__(self, watch: _Seen) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DEVICE and args[0].is_meta and self.watch.outside():
            raise NotImplementedError("what the model does may depend on the device")
        self.watch.uses(args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__):
            self.watch.tells_values()
        return func(*args, **(kwargs or {}))


class _Reads(dict):
    """The parameters or buffers of a module; calls ``tell`` when one is read by name."""

    def __init__(self, tensors: Mapping[str, Any], tell: Callable[[], None]) -> None:
        super().__init__(tensors)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        self.tell()
        return super().__getitem__(name)


def _storage(tensor: Tensor) -> int:
    """What tells the storage of one tensor from that of another; negative where it has none."""
    try:
        with torch._C.DisableTorchFunction():  # for it is we who ask
            return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # as of sparse tensors
        return -id(tensor)
