"""A user's network: made by name, its weights read from a file."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from basis.storage import put_state
from basis.text import few, first_line
from basis.vision import import_timm, import_torchvision

# Keys under which training programs keep the weights inside a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# Prefixes of DataParallel and DistributedDataParallel, torch.compile, and Lightning modules.
PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")


def build_network(name: str, *, classes: int) -> nn.Module:
    """The network of this name with random weights and as many outputs as ``classes``; nothing is downloaded.

    ``name`` is of torchvision or timm ("resnet50", "timm/resnet50"), or "package.module:factory", where the factory
    gets ``num_classes`` if it takes that, and the current folder is searched first. ``ValueError`` where that fails.
    """
    with warnings.catch_warnings():  # the libraries warn that their initialisation may change
        warnings.simplefilter("ignore")
        return _from_factory(name, classes) if ":" in name else _from_library(name, classes)


def _from_factory(name: str, classes: int) -> nn.Module:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        factory = pkgutil.resolve_name(name)
        takes = "num_classes" in inspect.signature(factory).parameters
        model = factory(num_classes=classes) if takes else factory()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ValueError(f"model {name} makes no network ({type(error).__name__}: {first_line(error)})") from error
    finally:
        sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name} returns a {type(model).__name__}, but it must return a torch.nn.Module")
    return model


def _from_library(name: str, classes: int) -> nn.Module:
    library, _, short = name.rpartition("/")
    models = import_torchvision().models
    known = models.list_models(module=models)
    if library in ("", "torchvision") and short in known:
        return models.get_model(short, num_classes=classes)
    if library == "timm" or (not library and find_spec("timm")):
        timm = import_timm()
        if short.partition(".")[0] in timm.list_models():  # without the tag of weights
            return timm.create_model(short, num_classes=classes)
        known += timm.list_models()
    near = few(difflib.get_close_matches(short, known)) or "none; timm's need timm, your own are package.module:factory"
    raise ValueError(f"model {name!r} is no network of torchvision or timm; near it are {near}")


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Put the weights of a file (safetensors, or tensors of ``torch.save``) into ``model``, in place.

    Nothing in the file is executed. Weights inside a checkpoint are found, prefixes of wrappers are removed, and
    counters of batch normalisation may be missing. Raises ``ValueError`` for a file or weights that do not fit.
    """
    state, expected = _read(Path(path)), model.state_dict()
    if not expected.keys() & state.keys():
        state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
        for prefix in PREFIXES:
            consume_prefix_in_state_dict_if_present(state, prefix)
    state = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")} | state
    numbers = dict(model.named_parameters())  # a mask among the buffers may be infinite
    if strange := [n for n, value in state.items() if not (value.isfinite() if n in numbers else ~value.isnan()).all()]:
        raise ValueError(f"the weights {few(strange)} in {path} are not finite")
    put_state(model, state, Path(path))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"there is no file of weights at {path}")
    try:
        data = path.read_bytes()
        safe = data[8:9] == b"{"
        content = safetensors.torch.load(data) if safe else torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:  # the readers raise errors of many kinds
        raise ValueError(f"{path} is not readable as a saved model.state_dict() ({first_line(error)})") from error
    for key in WRAPPERS * 2:  # one may be inside another
        inner = content.get(key) if isinstance(content, Mapping) else None
        content = inner if isinstance(inner, Mapping) else content
    items = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors by name, as model.state_dict() gives them")
    return state
