"""The libraries of other people's networks, torchvision and timm, imported in a way that works beside any torch.

The torchvision of PyPI holds operators compiled against the torch of PyPI, with CUDA. Beside another build of
the same torch, such as the one for CPUs alone, they do not load; ``import torchvision`` goes on without them and
then fails where it gives two of them, ``nms`` and ``qnms``, a shape rule: ``operator torchvision::nms does not
exist``. Networks for classification need no such operator. :func:`import_torchvision` declares the two in that
case, and in that case only, so that all of torchvision but those operators can be used. timm imports torchvision,
so it goes the same way.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# The operators that torchvision speaks of while it is imported, as its own source declares them.
_SCHEMAS = {name: "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, with its compiled operators where they fit this torch, else without them.

    Raises:
        ModuleNotFoundError: where it is not installed; says how to install it.
        RuntimeError: where it cannot be imported beside this torch for any other reason.
    """
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)
    return _import("torchvision")


def import_timm() -> ModuleType:
    """The module ``timm``. Raises what :func:`import_torchvision` raises."""
    import_torchvision()
    return _import("timm")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"{name} is not installed: pip install {name}", name=name) from error
