"""Networks made ready for inference: batch normalisation folded away, the faster form measured, and exported.

In evaluation mode a batch normalisation is an affine map of each channel, so it goes into the weight and
the bias of the convolution before it (Jacob et al. 2018, arXiv 1712.05877, section 3.2; Krishnamoorthi
2018, arXiv 1806.08342). For a basis convolution it goes into M = [I; A], so that the pair of B and M
stays a pair, or into the dense weight M B.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from basis.bench.shapes import TimedLayer
from basis.bench.timing import BenchReport, Progress, Setting, layer_steps, tell
from basis.costs import trace_calls
from basis.layers.base import ConvLike
from basis.layers.batchnorm import copy_of, uncouple_in_place
from basis.layers.conv import BasisConv2d
from basis.layers.norm_pairs import afterwards, norm_pairs
from basis.layers.structured import StructuredConv2d
from basis.models import build
from basis.modules import is_channels_last
from basis.saving import replacing
from basis.substitution import HOOKS, replace_modules, substitute
from basis.text import few, first_line

# -- folding ----------------------------------------------------------------------------------------


def fold(model: nn.Module, *, factorized: Iterable[str] = (), strict: bool = False) -> nn.Module:
    """A copy of ``model`` for inference, of plain ``torch.nn`` layers, with batch normalisation folded away.

    Every basis convolution or structured layer becomes one dense ``nn.Conv2d``, or, where ``factorized`` names it,
    the pair ``nn.Sequential(nn.Conv2d(C_in, k, ...), nn.Conv2d(k, C_out, 1))`` of B and M = [I; A], rows in the order
    of the output channels. The ``nn.BatchNorm2d`` that directly follows a convolution, of any kind, goes
    into the weight and bias of that convolution (of the second one in a pair) and ``nn.Identity`` takes its
    place, or, of timm's ``BatchNormAct2d``, its activation; :func:`norms_left` says which ones stay, and why.
    Computed in float64 on the CPU and rounded once.

    The copy is in evaluation mode and no parameter of it takes gradients. Device, dtype, memory format and
    hooks are kept. The new convolutions have parameters of their own, also where those of the model were
    tied or shared; a convolution with several names remains one.

    Args:
        factorized: names (as in ``model.named_modules()``) of the basis convolutions that become pairs, for
            instance ``measure_fold(...).faster()``.
        strict: refuse a model of which a batch normalisation would stay.

    Raises:
        ValueError: for a name in ``factorized`` that is no basis convolution; for a model on the meta device;
            where ``strict``, for the batch normalisations that stay, with the reasons.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device and has no values to fold; load its values first")
    folded, source = _ready(model), _ready(model)  # the second is for tracing and for float64
    pairs = _named(folded, factorized)
    norms, left = _folding(source)
    if strict and left:
        reasons = few((f"{name} ({why})" for name, why in left.items()), "; ")
        raise ValueError(f"not every batch normalisation can be folded: {reasons}; strict=False keeps these")
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in folded.named_modules():
        if isinstance(layer, ConvLike) or name in norms:
            norm = source.get_submodule(norms[name]) if name in norms else None
            plain = _plain(layer, source.get_submodule(name), norm, pair=layer in pairs)
            new[layer] = _with_hooks(layer, plain)
    for name in norms.values():
        norm = folded.get_submodule(name)
        parts = [part for part in afterwards(norm) or () if type(part) is not nn.Identity]
        new[norm] = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
    return replace_modules(folded, new).eval().requires_grad_(False)


def norms_left(model: nn.Module) -> dict[str, str]:
    """The batch normalisations that :func:`fold` leaves in ``model``: their names, each with the reason."""
    return _folding(_ready(model))[1]


def _ready(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, of ordinary batch normalisations."""
    return uncouple_in_place(copy_of(model)).eval()


def _named(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    """The basis convolutions of these names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if not isinstance(modules.get(name), BasisConv2d):
            what = f"is of the kind {type(modules[name]).__name__}" if name in modules else "the model does not have"
            known = few(known for known, module in modules.items() if isinstance(module, BasisConv2d))
            raise ValueError(
                f"factorized has {name!r}, which {what}, but it must name basis convolutions ({known or 'here none'})"
            )
    return {modules[name] for name in names}


def _folding(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Convolution -> the batch normalisation to fold into it, and every other batch normalisation -> why not."""
    own = {part for layer in model.modules() if isinstance(layer, ConvLike) for part in layer.modules()}
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module not in own]
    if not names:
        return {}, {}
    try:
        found = norm_pairs(model)
    except ValueError as error:
        return {}, dict.fromkeys(names, str(error))
    pairs = found.norms
    reasons = {norm: _obstacle(model.get_submodule(conv), model.get_submodule(norm)) for conv, norm in pairs.items()}
    usual = "it does not directly follow a convolution, or not that alone"
    left = {name: reasons.get(name, found.hidden.get(name, usual)) for name in names}
    return (
        {conv: norm for conv, norm in pairs.items() if reasons[norm] is None},
        {name: why for name, why in left.items() if why is not None},
    )


def _obstacle(conv: Any, norm: Any) -> str | None:
    """Why ``norm`` cannot be folded into ``conv``; None where it can."""
    if any(map(is_lazy, (*conv.parameters(), *norm.parameters(), *norm.buffers()))):
        return "lazy: shapes are not known before the first forward pass"
    if norm.running_mean is None or norm.running_var is None:
        return "it normalises by the statistics of each batch (track_running_stats=False), which no weight can hold"
    if conv._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks:
        return "it or its convolution has forward hooks, which would see other values"
    if isinstance(conv, ConvLike):
        return None
    if type(conv) is not nn.Conv2d or {"forward", "_conv_forward"} & set(vars(conv)):
        return f"its convolution is a {type(conv).__name__}, which may compute something of its own"
    if set(conv._parameters) != {"weight", "bias"}:
        return "its convolution is parametrized: the weight is made from other parameters"
    return None


@torch.no_grad()
def _plain(layer: Any, source: Any, norm: Any, *, pair: bool) -> nn.Module:
    """The plain form of ``layer``; ``source`` is the same layer and ``norm`` what follows it, both to spend."""
    structured = isinstance(layer, StructuredConv2d)
    layer = layer.to_conv() if structured else layer
    like: Tensor = layer.basis if isinstance(layer, BasisConv2d) else layer.weight
    wide = torch.promote_types(like.dtype, torch.float64)
    source = source.to("cpu", wide)
    source = source.to_conv() if structured else source
    weight, bias = source.mixing[:, :, None, None] if pair else source.weight, source.bias
    if norm is not None:
        norm = norm.to("cpu", wide)
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        weight = weight * scale[:, None, None, None]
        bias = scale * ((0 if bias is None else bias) - norm.running_mean) + (0 if norm.bias is None else norm.bias)
    spatial = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    if not pair:
        return _conv(like, weight, bias, layer.groups, **spatial)
    thin = _conv(like, source.basis, None, layer.groups, **spatial)
    return nn.Sequential(thin, _conv(like, weight, bias, layer.coefficients.groups))


def _conv(like: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **options: Any) -> nn.Conv2d:
    """A convolution with these values, in the device, dtype and memory format of ``like``."""
    out_channels, width, kh, kw = weight.shape
    conv = nn.Conv2d(
        width * groups, out_channels, (kh, kw), groups=groups, bias=bias is not None, device="meta", **options
    )
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    conv.weight = nn.Parameter(weight.detach().to(like.device, like.dtype, copy=True).contiguous(memory_format=layout))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(like.device, like.dtype, copy=True))
    return conv


def _with_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
    return new


# -- which form is faster ---------------------------------------------------------------------------


class FoldReport(BenchReport):
    """What :func:`measure_fold` found: a :class:`basis.bench.timing.BenchReport` of kind "bench-fold".

    Every basis convolution has two rows against its dense form: ``mode`` "pair", and "control", which is the
    dense form again.
    """

    def faster(self) -> tuple[str, ...]:
        """The layers whose pair is faster, for ``factorized`` of :func:`fold`.

        These are the ones whose lower quartile of dense / pair is above 1. Raises ``ValueError`` for a report
        of another kind.
        """
        if self.kind != "bench-fold":
            raise ValueError(f"this is a report of kind {self.kind!r}, but it must be one that measure_fold made")
        pairs = [row for row in self.rows if row["mode"] == "pair"]
        return tuple(row["layer"] for row in pairs if (row.get("speedup_q1") or 0) > 1)


def measure_fold(
    model: nn.Module,
    *,
    input_size: Sequence[int] = (3, 32, 32),
    setting: Setting | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> FoldReport:
    """Measure every basis convolution of ``model`` as :func:`fold` makes it: dense, and as a pair.

    Forward passes without gradients, of each layer alone on random inputs of the sizes that it gets in one
    forward pass, ``setting.batch_size`` images at once; dense and pair by turns. Of layers with equal shapes
    the first is measured; the rows of the others say so in ``same_as``.

    Args:
        input_size: (C, H, W) of one image.
        name: what the report calls the model; its class unless given.

    Raises:
        ValueError: for a model without a basis convolution that is called, on the meta device, or that
            cannot be run on such images.
    """
    forms = [fold(model), fold(model, factorized=[n for n, m in _ready(model).named_modules() if _is_basis(m)])]
    source = _ready(model)
    setting = (setting or Setting()).settled(source)
    measured: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for layer, module, calls in trace_calls(source, (1, *input_size)):
        if isinstance(module, BasisConv2d) and calls:
            dense, pair = (form.get_submodule(layer) for form in forms)
            timed = TimedLayer.of(dense, (call.x[1:] for call in calls), input_gradient=False)
            key = (timed, module.basis_channels, module.coefficients.groups)
            if key not in measured:
                measured[key] = _rows(layer, timed, dense, pair, setting, progress)
            cell = measured[key]
            first = cell[0]["layer"]
            rows += [{**row, "layer": layer, "same_as": None if layer == first else first} for row in cell]
    if not rows:
        raise ValueError("the model has no basis convolution that is called, so there is nothing to measure")
    options = {"model": name or type(model).__name__, "input_size": list(input_size)}
    return FoldReport(**vars(setting.report("bench-fold", rows, **options)))


def bench_inference(
    *,
    model: str = "resnet18",
    width: int | None = None,
    ratios: Sequence[float] = (1 / 4, 1 / 2),
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure the forward pass, in evaluation mode, of a network of :func:`basis.models.build` and its folded forms.

    All eligible convolutions are substituted at one ratio; a cell is a ratio. Modes: "dense folded", the dense
    network without its batch normalisations; "auto", the substituted one as it is; "folded", it as dense
    convolutions; and "folded, pairs", with the pairs that :func:`measure_fold` finds faster just before, whose number
    is ``pairs`` of ``layers``. Images are random, 3x32x32.

    Raises:
        ValueError: for an unknown model, or a ratio or setting that makes no sense.
    """
    setting = setting or Setting()
    with setting.globals():
        dense = build(model, width=width).eval()
    setting = setting.settled(dense)
    rows: list[dict[str, Any]] = []
    for ratio in ratios:
        with setting.globals():
            basis = substitute(dense, ratio=ratio, init="random").eval()
            faster = measure_fold(setting.place(basis), setting=setting).faster()
            networks = {"dense": dense, "control": copy.deepcopy(dense), "dense folded": fold(dense), "auto": basis}
            networks |= {"folded": fold(basis), "folded, pairs": fold(basis, factorized=faster)}
            placed = {name: setting.place(network) for name, network in networks.items()}
            measured = setting.measure(layer_steps(placed, [(3, 32, 32)], "forward", setting))
        count = sum(map(_is_basis, basis.modules()))
        for name, values in measured.items():
            row = {"model": model, "pass": "forward", "ratio": ratio, "mode": name, **values}
            rows.append(row | ({"pairs": len(faster), "layers": count} if name == "folded, pairs" else {}))
            tell(progress, rows[-1], model)
    return setting.report("bench-inference", rows, model=model, width=width, ratios=list(ratios))


def _is_basis(module: nn.Module) -> bool:
    return isinstance(module, BasisConv2d)


def _rows(
    layer: str, timed: TimedLayer, dense: nn.Module, pair: Any, setting: Setting, progress: Progress | None
) -> list[dict[str, Any]]:
    """The rows of one layer."""
    with setting.globals():
        forms = {"dense": dense, "control": copy.deepcopy(dense), "pair": pair}
        placed = {name: setting.place(form.float()) for name, form in forms.items()}
        measured = setting.measure(layer_steps(placed, timed.inputs, "forward", setting))
    rows = []
    for name, k in (("control", timed.options[1]), ("pair", pair[0].out_channels)):
        row = {"layer": layer, "shape": str(timed), "pass": "forward", "ratio": k / timed.options[1]}
        rows.append({**row, "basis_channels": k, "mode": name, **measured[name]})
        tell(progress, rows[-1], layer)
    return rows


# -- export -----------------------------------------------------------------------------------------

Batch = int | Literal["dynamic"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: where it is.
        batches: the batch sizes that it was run with.
        error: the largest difference to the model's outputs, relative to their largest magnitude; None where
            the file was not run, since onnxruntime is not installed.
    """

    path: Path
    batches: tuple[int, ...]
    error: float | None


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike,
    input_size: Sequence[int],
    *,
    batch: Batch = "dynamic",
    opset: int | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write ``model``, best folded first (:func:`fold`), as an ONNX file that is checked and run.

    By ``torch.onnx.export(dynamo=True)``, from a copy on the CPU in evaluation mode. The file has one input,
    "images" (N, \\*input_size), and one output, "logits". It is checked by ``onnx.checker`` and, where
    onnxruntime is installed, run on random images and compared with the model; only then it appears at
    ``path``, whole.

    Args:
        input_size: (C, H, W) of one image.
        batch: images per call; "dynamic" leaves it open, and the file is run with 1 and with 3 images.
        opset: version of the ONNX operators; the exporter's own choice unless given.
        tolerance: largest difference allowed, relative to the largest magnitude of the model's outputs.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: when there is a file at ``path`` and ``overwrite`` is not set.
        ModuleNotFoundError: when onnx or onnxscript is missing; says how to install them.
        ValueError: for a batch or input_size that makes no sense, or a model that cannot be run on it or does
            not return one tensor.
        RuntimeError: when the model cannot be exported, the file cannot be run, or its outputs differ.
    """
    target = _target(path, overwrite)
    _need("onnx", "onnxscript")
    import onnx

    copied = _ready(model).cpu()
    images, expected = _examples(copied, input_size, batch)
    options: dict[str, Any] = {"opset_version": opset, "input_names": ["images"], "output_names": ["logits"]}

    def export() -> bytes:
        program = torch.onnx.export(
            copied, (_example(images),), dynamo=True, verbose=False, dynamic_shapes=_dynamic(batch), **options
        )
        return program.model_proto.SerializeToString()  # type: ignore[union-attr]

    content = _attempt(export, copied, "ONNX", batch)
    onnx.checker.check_model(content, full_check=True)
    error = None
    if is_installed("onnxruntime"):
        error = _compared(_run_onnx(content, images), expected, tolerance, "onnxruntime")
    with replacing(target) as file:
        file.write(content)
    return Exported(path=target, batches=tuple(map(len, images)) if error is not None else (), error=error)


def export_program(
    model: nn.Module,
    path: str | os.PathLike,
    input_size: Sequence[int],
    *,
    batch: Batch = "dynamic",
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write ``model``, best folded first (:func:`fold`), as a program of ``torch.export`` (a ``.pt2`` file).

    From a copy in evaluation mode, on the model's device. The bytes to be written are read back, run on random
    images and compared with the model; only then the file appears at ``path``, whole. ``torch.export.load``
    reads it. Arguments and errors are those of :func:`export_onnx`, which explains them.
    """
    target = _target(path, overwrite)
    copied = _ready(model)
    images, expected = _examples(copied, input_size, batch)

    def export() -> bytes:
        program = torch.export.export(copied, (_example(images),), dynamic_shapes=_dynamic(batch))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()

    content = _attempt(export, copied, "torch.export", batch)
    with torch.no_grad(), _quiet():
        program = torch.export.load(io.BytesIO(content)).module()
        outputs = [program(x) for x in images]
    error = _compared(outputs, expected, tolerance, "torch.export")
    with replacing(target) as file:
        file.write(content)
    return Exported(path=target, batches=tuple(map(len, images)), error=error)


def _target(path: str | os.PathLike, overwrite: bool) -> Path:
    target = Path(path)
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder, but path must name the file to write")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; give overwrite=True to replace it")
    return target


def is_installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def _need(*packages: str) -> None:
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        raise ModuleNotFoundError(
            f"export to ONNX needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime"
        )


def _examples(model: nn.Module, input_size: Sequence[int], batch: object) -> tuple[list[Tensor], list[Tensor]]:
    """Random images in batches of the sizes to check, and the outputs of the model for them."""
    size = tuple(input_size)
    if not size or any(type(n) is not int or n < 1 for n in size):
        raise ValueError(f"input_size is {input_size!r}, but it must be (C, H, W) in whole numbers of at least 1")
    if batch != "dynamic" and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch is {batch!r}, but it must be 'dynamic' or a whole number of at least 1")
    sizes: tuple[Any, ...] = (1, 3) if batch == "dynamic" else (batch,)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn((n, *size), generator=generator).to(like) for n in sizes]
    try:
        with torch.no_grad():
            outputs = [model(x) for x in images]
    except Exception as error:  # the model's own code, which may raise anything
        raise ValueError(f"the model cannot be run on images of {size}: {first_line(error)}") from error
    if not all(isinstance(y, Tensor) for y in outputs):
        raise ValueError(f"the model returns a {type(outputs[0]).__name__}, but one tensor can be exported and checked")
    return images, outputs


def _example(images: Sequence[Tensor]) -> Tensor:
    return images[-1]  # not the one of a single image, from which a dynamic batch cannot be seen


def _dynamic(batch: object) -> Any:
    return ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None


def _attempt(export: Callable[[], bytes], model: nn.Module, what: str, batch: object) -> bytes:
    try:
        with torch.no_grad(), _quiet():
            return export()
    except Exception as error:  # exporters run the model's code and raise errors of many kinds
        hint = "; a fixed batch may work" if batch == "dynamic" else ""
        reason = f"{first_line(error)}{hint}"
        raise RuntimeError(f"{type(model).__name__} cannot be exported to {what}: {reason}") from error


def _run_onnx(content: bytes, images: Sequence[Tensor]) -> list[Tensor]:
    import onnxruntime  # type: ignore[import-untyped]

    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x in images]
    except Exception as error:  # those of onnxruntime have no common base
        raise RuntimeError(f"onnxruntime cannot run the exported model: {first_line(error)}") from error


def _compared(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str) -> float:
    """The largest difference, relative to the largest expected magnitude; ``RuntimeError`` where it is too large."""
    error = 0.0
    for got, wanted in zip(outputs, expected, strict=True):
        if got.shape != wanted.shape:
            raise RuntimeError(f"{what} gives outputs of {tuple(got.shape)}, but the model of {tuple(wanted.shape)}")
        difference = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
        if not difference <= tolerance:
            raise RuntimeError(
                f"{what} differs from the model by {difference:.1e} of the largest output at batch {len(got)}, "
                f"but {tolerance:g} is allowed; nothing was written"
            )
        error = max(error, float(difference))
    return error


@contextmanager
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
