"""Networks written as files of ONNX and ``torch.export``, which are run and compared before they appear."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from basis.inputs import Inputs, arguments, example_inputs, mapped, run, samples_in, shapes_of, tensors_in, with_samples
from basis.layers.batchnorm import uncouple
from basis.numbers import plain_number
from basis.saving import replacing
from basis.text import first_line

Batch = int | Literal["dynamic"]
Size = Sequence[int] | None
Exporter = Callable[[nn.Module, Inputs, Any, Any], bytes]  # of a model, inputs, their shapes, outputs
Runner = Callable[[bytes, Inputs], Any]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and run."""

    path: Path
    # The largest difference to the model's outputs, relative to their largest magnitude; None without onnxruntime.
    error: float | None


def export_onnx(
    model: nn.Module, path: str | os.PathLike, input_size: Size = None, *, inputs: Inputs | None = None,
    batch: Batch = "dynamic", tolerance: float = 1e-4,
) -> Exported:  # fmt: skip
    """Write ``model``, best folded first (:func:`basis.fold`), as an ONNX file that is checked and run.

    From a copy on the CPU in evaluation mode. The inputs are named as the arguments of its forward pass, but "images"
    where there is nothing but (N, C, H, W); the output is "logits", of several they are the keys of a dictionary, or
    "output_0" and so on. Where onnxruntime is installed the file is run and all outputs are compared; only then it
    appears, in the place of a file that was there.

    Args:
        input_size: the size of one sample, such as (C, H, W), for inputs of random numbers.
        inputs: in its place, a batch as the model takes it (:func:`basis.cost`), whose samples come round again.
        batch: samples per call; "dynamic" leaves it open, and the file is run with 1 and with 3.
        tolerance: largest difference allowed, relative to the largest magnitude of each of the model's outputs.

    Raises ``ModuleNotFoundError`` where onnx or onnxscript is missing; ``ValueError`` for a batch out of range, or a
    model that cannot be run on such inputs or returns no tensor; ``RuntimeError`` where it cannot be exported, the file
    cannot be run, or its outputs differ.
    """
    if not (is_installed("onnx") and is_installed("onnxscript")):
        raise ModuleNotFoundError("export to ONNX needs more: pip install onnx onnxscript onnxruntime")
    import onnx

    def export(copied: nn.Module, example: Inputs, shapes: Any, outputs: Any) -> bytes:
        args, kwargs = arguments(example)
        taken, found = signature(copied.forward).parameters, len(tensors_in(outputs))
        names = {"output_names": ["logits"] if found == 1 else [f"output_{i}" for i in range(found)]}
        if isinstance(outputs, Mapping) and len(outputs) == found:
            names["output_names"] = [f"{key}_output" if key in taken else str(key) for key in outputs]
        if isinstance(example, Tensor) and example.dim() == 4:
            names["input_names"] = ["images"]
        options = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes, **names}
        program: Any = torch.onnx.export(copied, args, kwargs=kwargs, **options)
        content: bytes = program.model_proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        return content

    def run_file(content: bytes, batch: Inputs) -> Any:
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        feed = zip(session.get_inputs(), tensors_in(batch), strict=True)
        return list(map(torch.from_numpy, session.run(None, {own.name: tensor.numpy() for own, tensor in feed})))

    runner = run_file if is_installed("onnxruntime") else None
    copied = uncouple(model).eval().cpu()
    return _write(copied, path, input_size, inputs, export, runner, batch=batch, tolerance=tolerance)


def export_program(
    model: nn.Module, path: str | os.PathLike, input_size: Size = None, *, inputs: Inputs | None = None, **options: Any
) -> Exported:
    """As :func:`export_onnx`, a program of ``torch.export`` (a ``.pt2`` file) of a copy on the model's own device."""

    def export(copied: nn.Module, example: Inputs, shapes: Any, outputs: Any) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(copied, *arguments(example), dynamic_shapes=shapes), buffer)
        return buffer.getvalue()

    def run_file(content: bytes, batch: Inputs) -> Any:
        return run(torch.export.load(io.BytesIO(content)).module(), batch)

    return _write(uncouple(model).eval(), path, input_size, inputs, export, run_file, **options)


def is_installed(package: str) -> bool:
    """Whether there is such a package."""
    return find_spec(package) is not None


def _write(
    model: nn.Module, path: str | os.PathLike, input_size: Size, inputs: Inputs | None, export: Exporter,
    run_file: Runner | None, *, batch: Batch = "dynamic", tolerance: float = 1e-4,
) -> Exported:  # fmt: skip
    """Export, run and compare; the file appears last, whole."""
    target = Path(path)
    sizes = (1, 3) if batch == "dynamic" else (plain_number("batch", batch, whole=True, least=1),)
    given = example_inputs(model, input_size, inputs, batch_size=sizes[-1] if inputs is None else 1)
    if inputs is None:
        given = mapped(lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t), given)
    batches = [with_samples(given, n) for n in sizes]
    try:
        with torch.no_grad():
            expected = [run(model, batch) for batch in batches]
    except Exception as error:  # the model's own code, which may raise anything
        what = f"the model cannot be run on inputs of {shapes_of(batches[-1])}"
        raise ValueError(f"{what}: {first_line(error)}") from error
    if not tensors_in(expected[0]):
        raise ValueError(f"the model returns a {type(expected[0]).__name__} without a tensor in it")
    try:
        with torch.no_grad(), _quiet():
            # From one sample a dynamic batch cannot be seen.
            shapes = _any_batch(model, batches[-1], given) if batch == "dynamic" else None
            content = export(model, batches[-1], shapes, expected[-1])
            outputs = [run_file(content, batch) for batch in batches] if run_file else expected
    except Exception as error:  # exporters run the model's code and raise errors of many kinds
        hint = "; a fixed batch may work" if batch == "dynamic" else ""
        raise RuntimeError(f"{type(model).__name__} cannot be exported: {first_line(error)}{hint}") from error
    apart = _difference(outputs, expected)
    if not apart <= tolerance:
        raise RuntimeError(f"the file differs from the model by {apart:.1e}, but tolerance is {tolerance:g}")
    with replacing(target) as file:
        file.write(content)
    return Exported(path=target, error=apart if run_file else None)


def _any_batch(model: nn.Module, example: Inputs, given: Inputs) -> Any:
    """The shapes of ``example``, which ``given`` became, in which the number of samples is open."""
    shapes, samples = torch.export.ShapesCollection(), samples_in(given)
    for tensor, source in zip(tensors_in(example), tensors_in(given), strict=True):
        if source.dim() and len(source) == samples:
            shapes[tensor] = {0: torch.export.Dim("batch")}
    return shapes.dynamic_shapes(model, *arguments(example))


def _difference(got: Any, wanted: Any) -> float:
    """The largest difference relative to an output's largest magnitude; ``RuntimeError`` where shapes differ."""
    outputs, expected = tensors_in(got), tensors_in(wanted)
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        raise RuntimeError(f"the file gives outputs of {shapes_of(outputs)}, but the model of {shapes_of(expected)}")
    apart = torch.zeros((), dtype=torch.float64)
    for a, b in zip(outputs, expected, strict=True):
        if b.numel():
            a, b = a.to("cpu", torch.complex128), b.to("cpu", torch.complex128)
            largest = b.abs().nan_to_num(posinf=0).max().clamp_min(1e-30)
            apart = torch.maximum(apart, torch.where(a == b, 0, (a - b).abs()).max() / largest)  # keeps NaN
    return float(apart)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the warnings of the exporters, which concern their own insides; errors are raised all the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
