"""torchvision and timm, imported beside any build of torch.

Beside another build of torch than that of PyPI, as the one for CPUs, torchvision's compiled operators do not load, and
its import fails for two that classification does not need, so they are declared in that case. timm imports torchvision.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, with its compiled operators where they fit this torch, else without them."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """The module ``timm``."""
    import_torchvision()
    return importlib.import_module("timm")
