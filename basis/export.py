"""Networks written as files of ONNX and ``torch.export``, which are run and compared before they appear."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from basis.layers.batchnorm import uncouple
from basis.saving import replacing
from basis.text import first_line

Batch = int | Literal["dynamic"]
Exporter = Callable[[nn.Module, Tensor, Any], bytes]
Runner = Callable[[bytes, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and run."""

    path: Path
    # The largest difference to the model's outputs, relative to their largest magnitude; None without onnxruntime.
    error: float | None


def export_onnx(
    model: nn.Module, path: str | os.PathLike, input_size: Sequence[int], *,
    batch: Batch = "dynamic", tolerance: float = 1e-4,
) -> Exported:  # fmt: skip
    """Write ``model``, best folded first (:func:`basis.fold`), as an ONNX file that is checked and run.

    From a copy on the CPU in evaluation mode. The file has one input, "images" (N, \\*input_size), and one output,
    "logits". Where onnxruntime is installed it is run on random images and compared; only then it appears, in the place
    of a file that was there.

    Args:
        input_size: (C, H, W) of one image.
        batch: images per call; "dynamic" leaves it open, and the file is run with 1 and with 3 images.
        tolerance: largest difference allowed, relative to the largest magnitude of the model's outputs.

    Raises ``ModuleNotFoundError`` where onnx or onnxscript is missing; ``ValueError`` for a batch out of range, or a
    model that does not return one tensor for such images; ``RuntimeError`` where it cannot be exported, the file cannot
    be run, or its outputs differ.
    """
    if not (is_installed("onnx") and is_installed("onnxscript")):
        raise ModuleNotFoundError("export to ONNX needs more: pip install onnx onnxscript onnxruntime")
    import onnx

    def export(copied: nn.Module, example: Tensor, shapes: Any) -> bytes:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        program: Any = torch.onnx.export(copied, (example,), dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
        content: bytes = program.model_proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        return content

    def run(content: bytes, images: Sequence[Tensor]) -> list[Tensor]:
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x in images]

    runner = run if is_installed("onnxruntime") else None
    return _write(uncouple(model).eval().cpu(), path, input_size, export, runner, batch=batch, tolerance=tolerance)


def export_program(model: nn.Module, path: str | os.PathLike, input_size: Sequence[int], **options: Any) -> Exported:
    """As :func:`export_onnx`, a program of ``torch.export`` (a ``.pt2`` file) of a copy on the model's own device."""

    def export(copied: nn.Module, example: Tensor, shapes: Any) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(copied, (example,), dynamic_shapes=shapes), buffer)
        return buffer.getvalue()

    def run(content: bytes, images: Sequence[Tensor]) -> list[Tensor]:
        program = torch.export.load(io.BytesIO(content)).module()
        return [program(x) for x in images]

    return _write(uncouple(model).eval(), path, input_size, export, run, **options)


def is_installed(package: str) -> bool:
    """Whether there is such a package."""
    return find_spec(package) is not None


def _write(
    model: nn.Module, path: str | os.PathLike, input_size: Sequence[int], export: Exporter, run: Runner | None, *,
    batch: Batch = "dynamic", tolerance: float = 1e-4,
) -> Exported:  # fmt: skip
    """Export, run and compare; the file appears last, whole."""
    target = Path(path)
    if batch != "dynamic" and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch is {batch!r}, but it must be 'dynamic' or a whole number of at least 1")
    sizes: tuple[Any, ...] = (1, 3) if batch == "dynamic" else (batch,)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    try:
        images = [torch.randn((n, *input_size), generator=generator).to(like) for n in sizes]
        with torch.no_grad():
            expected = [model(x) for x in images]
    except Exception as error:  # the model's own code, which may raise anything
        raise ValueError(f"the model cannot be run on images of {input_size}: {first_line(error)}") from error
    if not isinstance(expected[0], Tensor):
        raise ValueError(f"the model returns a {type(expected[0]).__name__}, but one tensor can be exported")
    try:
        with torch.no_grad(), _quiet():
            # From one image a dynamic batch cannot be seen.
            content = export(model, images[-1], ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None)
            outputs = expected if run is None else run(content, images)
    except Exception as error:  # exporters run the model's code and raise errors of many kinds
        hint = "; a fixed batch may work" if batch == "dynamic" else ""
        raise RuntimeError(f"{type(model).__name__} cannot be exported: {first_line(error)}{hint}") from error
    apart = max(map(_difference, outputs, expected))
    if not apart <= tolerance:
        raise RuntimeError(f"the file differs from the model by {apart:.1e}, but tolerance is {tolerance:g}")
    with replacing(target) as file:
        file.write(content)
    return Exported(path=target, error=apart if run else None)


def _difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest magnitude; infinite for outputs of another shape."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the warnings of the exporters, which concern their own insides; errors are raised all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
