"""Substituted models on disk: a state in safetensors and a small JSON plan, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from basis.layers.conv import BasisConv2d
from basis.plan import Plan, Size, meant, plan_of
from basis.saving import replacing
from basis.substitution import substitute
from basis.text import few, first_line, shown_name

PLAN_FILE, STATE_FILE = "plan.json", "model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write ``model`` to ``folder``: ``model.safetensors`` (its state) and ``plan.json``; no pickle, and no modes.

    A tensor of several names is written once for each.

    Raises ``ValueError`` for a state with entries that are not tensors with values.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or is_lazy(value) or value.is_meta:
            raise ValueError(f"the state's entry {name!r} is not a tensor with values and cannot be saved")
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    folder, plan = Path(folder), plan_of(model)
    forms = {name: str(m.coefficients.form) for name, m in model.named_modules() if isinstance(m, BasisConv2d)}
    about = {"coefficients": json.dumps(forms), "layers": json.dumps(plan.layers)}
    with replacing(folder / STATE_FILE) as file:
        file.write(safetensors.torch.save(tensors, about))
    plan.save(folder / PLAN_FILE)


def load(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """The model that :func:`save` wrote to ``folder``, on the architecture of the dense ``model``.

    The weights of ``model`` are not used and it is left alone; device, dtype, flags, hooks and sharing are its own,
    but for coefficients, which are held as in the saved model, and shared by layers of equal shape where it shared any.
    Raises ``FileNotFoundError``, and ``ValueError`` for a damaged file, or a plan or state that does not fit ``model``.
    """
    folder = Path(folder)
    plan = Plan.load(folder / PLAN_FILE)
    state, forms, layers = _read_state(folder / STATE_FILE)
    if layers is not None and layers != plan.layers:
        differing = few(map(shown_name, sorted({name for name, _ in layers.items() ^ plan.layers.items()})))
        raise ValueError(f"{folder / STATE_FILE} was saved with another {PLAN_FILE}: they differ in {differing}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model is on the meta device; give it storage first: model.to_empty(device='cpu')")
    loaded = model
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten: leave no trace of it
        parts: dict[str, dict[str, Size]] = {"dense": {}}
        for name, size in plan.layers.items():
            parts.setdefault(forms.get(name, "dense"), {})[name] = size
        for form, part in parts.items():
            loaded = substitute(loaded, replace(plan, layers=part), init="random", coefficients=form)
    put_state(loaded, state, folder / STATE_FILE)
    return loaded


def put_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """``load_state_dict`` with the versions of ``model``, without which torchvision's MNASNet refuses a state.

    Names may differ by what DataParallel or torch.compile put before them. Raises ``ValueError`` where the state of the
    file ``path`` does not fit.
    """
    versioned = model.state_dict()
    names = meant(state, versioned)
    names = names if len(set(names.values())) == len(names) else {}
    versioned.clear()  # but for the versions
    versioned.update({names.get(name, name): value for name, value in state.items()})
    try:
        model.load_state_dict(versioned)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {first_line(error)}") from error


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Size] | None]:
    """The tensors by name, the layers' forms of coefficients, and the plan's layers; None in files of old."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved state at {path}")
    try:
        content = path.read_bytes()  # safetensors opens no path that is no UTF-8
        state = safetensors.torch.load(content)
        about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        forms, layers = (json.loads(about.get(key, "null")) for key in ("coefficients", "layers"))
        return state, dict(forms or {}), layers if layers is None else dict(layers)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is damaged or no state that save() wrote: {first_line(error)}") from error
