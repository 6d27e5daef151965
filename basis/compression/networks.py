"""Networks by name, and the weights that belong into them.

A network is named as torchvision or timm name theirs ("resnet50", or "timm/resnet50" where both have one), or by a
factory of anybody's: "package.module:factory". Nothing is downloaded: weights come from a file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from basis.storage import misfits, put_state
from basis.text import few

LIBRARIES = ("torchvision", "timm")
# Under which names training programs keep a state inside a checkpoint, the most particular first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile, Lightning modules.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How an image becomes the input of a network.

    Attributes:
        size: side of the square that the network sees, in pixels.
        crop: side of that square as a share of the shorter side of the resized image.
        mean, std: per channel, in units of full scale.
        interpolation: of the resizing, "bilinear" or "bicubic".
        source: where the values come from, in words.
    """

    size: int
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    source: str


IMAGENET = Preparation(
    size=224, crop=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear",
    source="usual for ImageNet",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network with random weights, what made it, in words, and how its images are prepared, where that is known.

    ``versions`` are those of the library that it is from.
    """

    model: nn.Module
    source: str
    preparation: Preparation | None
    versions: Mapping[str, str] = field(default_factory=dict)


def build_network(text: str, *, classes: int) -> Network:
    """The network of this name, with random weights and ``classes`` outputs.

    A factory is called without arguments, but for ``num_classes`` where it takes that; the current folder counts as
    a place of modules.

    Raises:
        ValueError: for a name that neither library has (near names are given), a library that is not installed, and
            a factory that cannot be imported or called, or that returns no ``nn.Module``.
    """
    with warnings.catch_warnings():  # of libraries, about what they will initialise otherwise some day
        warnings.simplefilter("ignore")
        if ":" in text:
            return _from_factory(text, classes)
        library, _, name = text.rpartition("/")
        if library and library not in LIBRARIES:
            raise ValueError(f"MODEL is {text!r}, but before a / stands one of {', '.join(LIBRARIES)}")
        return _from_library(name, (library,) if library else LIBRARIES, classes)


# -- factories --------------------------------------------------------------------------------------


def _from_factory(text: str, classes: int) -> Network:
    module_name, _, path = text.partition(":")
    if not module_name or not path:
        raise ValueError(f"MODEL is {text!r}, but a factory is written package.module:factory")
    with _current_folder_importable():
        try:
            factory: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # the module's own code, which may raise anything
            raise ValueError(f"the module {module_name!r} cannot be imported: {_said(error)}") from error
        for part in path.split("."):
            if not hasattr(factory, part):
                near = difflib.get_close_matches(part, dir(factory), n=3)
                hint = f"; near it are {few(near)}" if near else ""
                raise ValueError(f"{module_name} has no {path!r}{hint}")
            factory = getattr(factory, part)
        if isinstance(factory, nn.Module) or not callable(factory):
            raise ValueError(f"{text} is a {type(factory).__name__}, but it must be a function that returns a network")
        try:
            model = factory(**({"num_classes": classes} if _takes(factory, "num_classes") else {}))
        except (Exception, SystemExit) as error:
            raise ValueError(f"{text} cannot be called: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} returns a {type(model).__name__}, but it must return a torch.nn.Module")
    return Network(model, f"made by {text}", _of_timm(model))


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As for ``python -m``; an installed command does not look there."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _takes(function: Callable, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False


# -- libraries --------------------------------------------------------------------------------------


def _from_library(name: str, libraries: tuple[str, ...], classes: int) -> Network:
    known: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for library in libraries:
        try:
            module = _imported(library)
        except (ImportError, RuntimeError) as error:
            missing[library] = "is not installed" if _is_missing(error, library) else f"fails: {_said(error)}"
            continue
        known[library] = _names(library, module)
        # timm's names may have a tag of weights, "resnet50.a1_in1k", which says how images are prepared.
        if (name if library == "torchvision" else name.partition(".")[0]) in known[library]:
            model = _MAKE[library](module, name, classes)
            versions = {library: module.__version__}
            return Network(model, f"{name} of {library}", _PREPARED[library](module, name, model), versions)
    lacking = " and ".join(f"{library} {what}" for library, what in missing.items())
    install = f"pip install {' '.join(missing)}"
    if not known:
        raise ValueError(
            f"MODEL is {name!r}, but {lacking} ({install}); or name a factory of yours as package.module:factory"
        )
    every = list(dict.fromkeys(one for names in known.values() for one in names))
    near = difflib.get_close_matches(name, every, n=5, cutoff=0.5)
    hint = f"near it are {few(near, limit=5)}" if near else f"they have {few(every)}"
    also = f"; {lacking} ({install})" if missing else ""
    raise ValueError(
        f"MODEL is {name!r}, but {' and '.join(known)} {'have' if len(known) > 1 else 'has'} no such network; "
        f"{hint}{also}; a factory of yours is written package.module:factory"
    )


def _imported(library: str) -> Any:
    from basis.vision import import_timm, import_torchvision  # slow to import, and not needed for a factory

    return import_torchvision() if library == "torchvision" else import_timm()


def _is_missing(error: Exception, library: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == library


def _names(library: str, module: Any) -> list[str]:
    if library == "torchvision":  # those that classify; others live in sub-modules
        return module.models.list_models(module=module.models)
    return module.list_models()


def _make_torchvision(torchvision: Any, name: str, classes: int) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=classes)


def _make_timm(timm: Any, name: str, classes: int) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, num_classes=classes)
    except Exception as error:  # such as a tag that it does not know
        raise ValueError(f"timm cannot make {name!r}: {_said(error)}") from error


def _of_torchvision(torchvision: Any, name: str, model: nn.Module) -> Preparation | None:
    try:
        given = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        (size,), (resized,) = given.crop_size, given.resize_size
        return Preparation(
            size=size, crop=size / resized, mean=tuple(given.mean), std=tuple(given.std),
            interpolation=given.interpolation.value, source=f"those of torchvision's own weights of {name}",
        )  # fmt: skip
    except (AttributeError, ValueError, TypeError):  # a network without published weights
        return None


def _of_timm(model: nn.Module) -> Preparation | None:
    """From the ``pretrained_cfg`` that timm's networks have, and a factory's may."""
    given = getattr(model, "pretrained_cfg", None)
    if not isinstance(given, Mapping) or not {"input_size", "mean", "std"} <= set(given):
        return None
    kind = given.get("interpolation")
    return Preparation(
        size=int(given["input_size"][-1]), crop=float(given.get("crop_pct") or IMAGENET.crop),
        mean=tuple(given["mean"]), std=tuple(given["std"]),
        interpolation=kind if kind in ("bilinear", "bicubic") else IMAGENET.interpolation,
        source="those of the network's pretrained_cfg",
    )  # fmt: skip


_MAKE = {"torchvision": _make_torchvision, "timm": _make_timm}
_PREPARED = {"torchvision": _of_torchvision, "timm": lambda module, name, model: _of_timm(model)}


# -- weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A state read from a file: its tensors by name, the SHA-256 of the file, and what was unwrapped, in words."""

    state: Mapping[str, Tensor]
    digest: str
    notes: tuple[str, ...]


def read_weights(path: str | os.PathLike) -> Weights:
    """Read safetensors, or what ``torch.save`` wrote of tensors; nothing in the file is executed.

    Of a checkpoint that holds more than a state the state is taken (see ``WRAPPERS``), and ``notes`` says so.

    Raises:
        ValueError: for what is no such file, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {path}")
    with path.open("rb") as file:
        head = file.read(9)
        digest = hashlib.sha256(head)
        while block := file.read(1 << 20):
            digest.update(block)
    content = _read_safetensors(path) if head[8:] == b"{" else _read_torch(path)
    state, notes = _unwrapped(path, content)
    odd = {name: kind for name, value in state.items() if (kind := _odd_kind(value))}
    if odd:
        raise ValueError(f"the weights in {path} hold {few(f'{n} ({kind})' for n, kind in odd.items())}, but dense "
                         "tensors of 16 bits or more are read")  # fmt: skip
    strange = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if strange:
        raise ValueError(f"the weights in {path} hold values that are not finite: {few(strange)}")
    return Weights(state, digest.hexdigest(), notes)


def _odd_kind(value: Tensor) -> str | None:
    """What keeps a tensor from being copied into a parameter; None for an ordinary one."""
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch.")
    if value.is_meta:
        return "on the meta device"
    small = value.is_quantized or (value.is_floating_point() and value.element_size() < 2)
    return str(value.dtype).removeprefix("torch.") if small else None


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or no file of weights: {_said(error)}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
            raise ValueError(f"{path} is no file of weights: neither safetensors nor of torch.save") from error
        raise ValueError(
            f"{path} holds more than tensors, and reading it would run code that came with it; "
            "save the state alone: torch.save(model.state_dict(), ...), or safetensors"
        ) from error
    except Exception as error:  # torch.load raises many kinds for what is no such file, or a damaged one
        raise ValueError(f"{path} is damaged or no file of weights: {_said(error)}") from error


def _unwrapped(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state inside what a file holds."""
    notes = []
    while isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        inner = {name: value for name, value in content.items() if isinstance(value, Mapping) and value}
        key = next((name for name in WRAPPERS if name in inner), None)
        if key is None and tensors:
            others = [str(name) for name in content if name not in tensors]
            notes += (
                [f"left {few(others)} out, which {'is' if len(others) == 1 else 'are'} no tensors"] if others else []
            )
            return tensors, tuple(notes)
        if key is None:
            break
        notes.append(f"took {key!r} of {few(map(str, content))}")
        content = inner[key]
    if isinstance(content, Mapping):
        held = f"a dictionary of {few(map(str, content))}" if content else "nothing"
    else:
        held = f"a {type(content).__name__}"
    raise ValueError(f"{path} holds {held}, but no state of tensors by name (model.state_dict())")


def fit_weights(model: nn.Module, weights: Weights, path: str | os.PathLike, *, classes: int) -> tuple[str, ...]:
    """Put the weights into ``model``; returns what was changed in their names and numbers, in words.

    A prefix that all names have and no name of the model (see ``PREFIXES``) is taken away. Counters of batch
    normalisations may be missing.

    Raises:
        ValueError: where they do not fit, with the entries.
    """
    expected = model.state_dict(keep_vars=True)
    state, notes = dict(weights.state), list(weights.notes)
    if "n_averaged" in state and "n_averaged" not in expected:
        del state["n_averaged"]
        notes.append("took averaged weights")
    while state and (prefix := next((p for p in PREFIXES if _is_extra(p, state, expected)), None)):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        notes.append(f"took {prefix!r} from the beginning of every name")
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    state = {**{name: value.detach() for name, value in counters.items() if name not in state}, **state}
    lazy = [name for name, value in expected.items() if is_lazy(value)]
    if lazy:
        raise ValueError(f"the network has parameters without a shape yet ({few(lazy)}); run it on an image first")
    problems = misfits(expected, state)
    for name in expected.keys() & state.keys():
        if expected[name].is_floating_point() and not state[name].is_floating_point():
            problems.append(f"{name} is {state[name].dtype} in the file, which is no weight without its scale")
    if problems:
        other = _other_classes(expected, state, problems)
        if other is not None:
            raise ValueError(f"the weights in {path} are of a network of {other} classes, but the data have {classes}")
        raise ValueError(f"the weights in {path} do not fit the network: {few(problems, '; ')}")
    kinds = sorted({f"{state[n].dtype} as {t.dtype}" for n, t in expected.items() if state[n].dtype != t.dtype})
    notes += [f"read {few(kinds)}".replace("torch.", "")] if kinds else []
    put_state(model, state)
    return tuple(notes)


def _is_extra(prefix: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected)


def _other_classes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], problems: list[str]) -> int | None:
    """The number of classes in the file, where nothing else is wrong with it."""
    if set(expected) != set(state):
        return None
    pairs = [
        (expected[name].shape, state[name].shape) for name in expected if expected[name].shape != state[name].shape
    ]
    firsts = {(here[0], there[0]) for here, there in pairs if here[1:] == there[1:]}
    alike = len(firsts) == 1 and len(pairs) == len(problems) and all(here[1:] == there[1:] for here, there in pairs)
    return next(iter(firsts))[1] if alike else None


def _said(error: BaseException) -> str:
    """An error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
