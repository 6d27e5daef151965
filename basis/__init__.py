"""Basis convolutions: train k of a layer's filters, mix the others from them, and learn where that is safe."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

# The stub says which module each public name is of: it is imported, and torch with it, when the name is asked for.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {name.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}
__all__ = tuple(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
