"""Networks that nobody here wrote, those of torchvision and timm, put through everything that the package does.

Every family of torchvision's classifiers and many of timm's, by a small member each. Weights are random, since
what is checked holds for any: they are not loaded from anywhere. Layers that stay dense are named with the reason.
`basis zoo` checks all of them and leaves the record that the book shows.
"""

from __future__ import annotations

import copy
import importlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from basis.bench.timing import BenchReport
from basis.costs import cost
from basis.environment import environment
from basis.inference import Exported, export_onnx, export_program, fold, norms_left
from basis.layers.batchnorm import couple, couplings
from basis.storage import load, save
from basis.substitution import Plan, merge, plan_of, substitute
from basis.text import few, first_line
from basis.vision import import_timm, import_torchvision

EXACT = 1e-8  # largest difference in float64, relative to the largest output, of two forms of one function


@dataclass(frozen=True)
class Network:
    """A network by its name in a library, "torchvision" or "timm", and the image size (pixels) to run it on."""

    library: str
    name: str
    size: int = 64

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    def build(self) -> nn.Module:
        """The network with 10 classes and random weights (seed 0), float32, on the CPU.

        So are those that begin as constants, among them the zeros that switch branches off, which would hide them.

        Raises:
            ModuleNotFoundError: where the library is not installed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if (parameter == parameter.flatten()[0]).all():
                        parameter.add_(torch.empty_like(parameter).uniform_(0.1, 0.5))
        return model

    def _make(self) -> nn.Module:
        if self.library == "timm":
            timm, options = import_timm(), {"num_classes": 10}
            try:  # of this image size, where the network has one at all
                return timm.create_model(self.name, img_size=self.size, **options)
            except TypeError:
                return timm.create_model(self.name, **options)
        import_torchvision()
        given: dict[str, Any] = {"num_classes": 10, "weights": None}
        if self.name in ("googlenet", "inception_v3"):
            given["init_weights"] = (
                True  # says that their way of drawing weights, which others mean to change, is known
            )
        if self.name.startswith("vit_"):
            given["image_size"] = self.size
        if self.name.startswith("maxvit_"):
            given["input_size"] = (self.size, self.size)
        return importlib.import_module("torchvision.models").get_model(self.name, **given)


def _in(library: str, *names: str) -> tuple[Network, ...]:
    """Networks written ``name`` or ``name@size``."""
    parts = (name.partition("@") for name in names)
    return tuple(Network(library, name, int(size or 64)) for name, _, size in parts)


# A small member of every family of torchvision's classifiers.
TORCHVISION = _in(
    "torchvision",
    "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "efficientnet_b0", "googlenet", "alexnet", "densenet121", "resnext50_32x4d",
    "efficientnet_v2_s", "inception_v3@299", "wide_resnet50_2", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_32",
    "vgg11_bn", "maxvit_t@224",
)  # fmt: skip
TIMM = _in(
    "timm",
    "test_resnet", "test_byobnet", "test_efficientnet", "test_nfnet", "tf_mobilenetv3_small_minimal_100", "lcnet_035",
    "dla46_c", "ghostnet_050", "mobilenetv4_conv_small", "tinynet_e", "mixnet_s", "regnetx_002", "regnety_002",
    "efficientnet_lite0", "tf_efficientnet_b0", "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small",
    "efficientvit_b0", "ese_vovnet19b_dw", "resnet10t", "gernet_s", "rexnet_100", "convnext_atto", "convnextv2_atto",
    "starnet_s1", "fastvit_t8", "pvt_v2_b0", "repvit_m0_9", "levit_conv_128s@224", "hgnetv2_b0", "darknet17",
    "repvgg_a0", "mobileone_s0", "resnest14d", "skresnet18", "seresnet18", "resnetv2_18", "ecaresnet26t", "selecsls42",
    "coatnet_pico_rw_224@224", "efficientformer_l1@224", "poolformer_s12", "cs3darknet_focus_s", "nf_regnet_b0",
    "hrnet_w18_small", "dpn48b", "cspresnet50", "visformer_tiny@224", "focalnet_tiny_srf", "convmixer_768_32",
    "resnetv2_50", "res2net50_14w_8s", "xception41", "dm_nfnet_f0", "densenetblur121d",
)  # fmt: skip
NETWORKS = TORCHVISION + TIMM


# -- the checks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A network with what the checks need of it; ``expected`` is what ``wide``, in float64, makes of ``images``."""

    model: nn.Module
    plan: Plan
    small: nn.Module
    wide: nn.Module
    size: tuple[int, int, int]
    images: Tensor
    expected: list[Tensor]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, network: Network, ratio: float) -> _Case:
        model = network.build()
        plan = Plan.uniform(model, ratio=ratio)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            # factorized, so that it computes in another way than its dense form
            small = _settle(substitute(model, plan, mode="factorized", init="random"), network.size)
        size = (3, network.size, network.size)
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wide = copy.deepcopy(small).double()
        expected = _outputs(wide, images)
        if any(_difference([y[:1]], [y[1:]]) < 1e-4 for y in expected):
            raise ValueError(f"{network} gives the same for different images, so nothing can be seen from its outputs")
        return cls(model, plan, small, wide, size, images, expected)

    def compare(self, other: nn.Module) -> float:
        """The largest difference of the outputs of ``other``; ``ValueError`` where it is not exact."""
        error = _difference(_outputs(other, self.images), self.expected)
        if not error <= EXACT:
            raise ValueError(f"outputs differ by {error:.1e} of the largest, but {EXACT:g} is allowed")
        return error

    def export(self, function: Callable[..., Exported], name: str) -> float | None:
        """The error of an exported file, of any batch size if that can be, else of two images.

        Two ways to compute in float32 can be no nearer to each other than float32 is to float64.
        """
        folded = fold(self.small)
        rounding = _difference([y.double() for y in _outputs(folded, self.images.float())], self.expected)
        function = partial(function, tolerance=max(1e-4, 4 * rounding))
        with tempfile.TemporaryDirectory() as folder:
            try:
                return function(folded, f"{folder}/{name}", self.size).error
            except RuntimeError as error:
                fixed = function(folded, f"{folder}/{name}", self.size, batch=2).error
                self.notes.append(f"{name} has a fixed batch size: {first_line(error)}")
                return fixed


def _named(case: _Case) -> bool:
    there = {name for name, module in case.model.named_modules() if isinstance(module, _ConvNd)}
    if there != case.plan.layers.keys() | case.plan.skipped.keys():
        raise ValueError(f"the plan lacks {few(there - case.plan.layers.keys() - case.plan.skipped.keys())}")
    if plan_of(case.small).layers != case.plan.layers:
        raise ValueError("the layers of the substituted model are not those of the plan")
    return True


def _parameters(case: _Case) -> float:
    total = cost(case.small, input_size=case.size)
    stored = sum(p.numel() for p in case.small.parameters())
    before = sum(p.numel() for p in case.model.parameters())
    if (total.total.parameters, total.dense.parameters) != (stored, before):
        raise ValueError(f"{total.total.parameters} parameters are counted, but there are {stored}")
    return stored / before


def _trained(case: _Case) -> bool:
    unreached = []
    for network in (case.model, case.small):
        network = copy.deepcopy(network).train()
        loss: Any = sum(y.square().mean() for y in _tensors(network(case.images.float())))
        loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        bad = [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]
        if bad:
            raise ValueError(f"the gradients of {few(bad)} are not finite")
        unreached.append({name for name, grad in gradients.items() if grad is None})
    dense, now = unreached
    layers = {name.removesuffix(".weight") for name in dense}
    missed = [
        n for n in now if n not in dense and n.partition(".basis")[0].partition(".coefficients.")[0] not in layers
    ]
    if missed:
        raise ValueError(f"no gradient reaches {few(missed)}")
    return True


def _saved(case: _Case) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        save(case.small, folder)
        loaded = load(case.model, folder)
    state = loaded.state_dict()
    wrong = [name for name, value in case.small.state_dict().items() if not torch.equal(value, state[name])]
    if wrong or plan_of(loaded) != plan_of(case.small):
        raise ValueError(f"{few(wrong) or 'the plan'} differs after loading")
    return True


# What is checked -> the check. All but "parameters" give True or the largest difference of two forms of the network,
# relative to the largest output: in float64, and in float32 where a file is exported.
CHECKS: dict[str, Callable[[_Case], float | None]] = {
    "named": _named,  # every convolution is substituted, or has a reason in the plan
    "parameters": _parameters,  # the part that is kept; cost counts as many as the model has
    "trained": _trained,  # a training step gives a finite gradient to all that has one in the dense network
    "merged": lambda case: case.compare(merge(case.wide)),
    "again": lambda case: case.compare(substitute(merge(case.wide), case.plan)),  # SVD finds what was merged
    "coupled": lambda case: case.compare(couple(case.wide)),
    "folded": lambda case: case.compare(fold(case.wide)),
    "saved": _saved,  # and loaded, bit by bit
    "onnx": lambda case: case.export(export_onnx, "model.onnx"),
    "program": lambda case: case.export(export_program, "model.pt2"),
}


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return _tensors(model.eval()(images))


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor that a model gives."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [] if output is None else [tensor for value in values for tensor in _tensors(value)]


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(outputs, expected, strict=True)
    )


# -- the report -------------------------------------------------------------------------------------


class ZooReport(BenchReport):
    """What :func:`check_networks` found: a :class:`basis.bench.timing.BenchReport` of kind "zoo", a row for each network.

    A row has ``library``, ``network``, ``size`` (pixels) and ``seconds``; ``convolutions``, ``substituted`` and
    ``left`` (reason -> how many); ``couplings``, how many go through the basis with their batch normalisation, and
    ``norms_left`` (reason -> how many of them are not folded); and a column for each of :data:`CHECKS`. ``failed``
    maps the checks that failed to the message, and ``notes`` are for the reader.
    """

    def failures(self) -> dict[str, Mapping[str, str]]:
        """Network -> what failed, for those where anything did."""
        return {f"{row['library']}/{row['network']}": row["failed"] for row in self.rows if row["failed"]}

    def missing(self, networks: Sequence[Network] = ()) -> list[str]:
        """Those of ``networks`` (all unless given) that have no row."""
        there = {(row["library"], row["network"], row["size"]) for row in self.rows}
        return [str(n) for n in networks or NETWORKS if (n.library, n.name, n.size) not in there]

    def __str__(self) -> str:
        frame = self.to_frame().drop(columns=["left", "norms_left", "failed", "notes"], errors="ignore")
        table = frame.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.2g}")
        failures = self.failures()
        wrong = [f"{name}: {check} failed: {why}" for name, all_ in failures.items() for check, why in all_.items()]
        return "\n".join([table, *wrong, f"{len(self.rows) - len(failures)} of {len(self.rows)} networks pass"])


def check_networks(
    networks: Sequence[Network] = NETWORKS,
    *,
    ratio: float = 0.5,
    checks: Collection[str] = tuple(CHECKS),
    path: str | Path | None = None,
    progress: Callable[[str], object] | None = None,
) -> ZooReport:
    """:func:`check_network` of each, as a report.

    Args:
        path: a file that the report is written to after every network. Rows that are in it, of the same versions
            of torch, the libraries and this package, are kept, so that interrupted work goes on where it stopped;
            networks that failed are tried again.
        progress: is told each network when it is done.

    Raises:
        ModuleNotFoundError: where a library is not installed.
        basis.experiments.runs.RecordError: where the file at ``path`` is no report.
    """
    import_timm()
    about = environment(torch.device("cpu")) | {name: version(name) for name in ("torchvision", "timm")}
    config = {"ratio": ratio, "checks": sorted(checks)}
    rows: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    if path is not None and Path(path).exists():
        old = ZooReport.load(path)
        same = [old.environment.get(key) == about[key] for key in ("torch", "torchvision", "timm", "basis")]
        if old.kind == "zoo" and old.config == config and all(same):
            rows = {(row["library"], row["network"], row["size"]): row for row in old.rows if not row["failed"]}

    def report() -> ZooReport:
        return ZooReport(kind="zoo", config=config, environment=about, rows=list(rows.values()))

    for network in networks:
        key = (network.library, network.name, network.size)
        if key in rows:
            continue
        rows[key] = row = check_network(network, ratio=ratio, checks=checks)
        if path is not None:
            report().save(path)
        if progress:
            progress(f"{network}: {_said(row)}")
    return report()


def check_network(network: Network, *, ratio: float = 0.5, checks: Collection[str] = tuple(CHECKS)) -> dict[str, Any]:
    """The row of one network, see :class:`ZooReport`.

    All convolutions that save parameters at this ``ratio`` are substituted by random basis convolutions, and batch
    normalisations get the statistics of random images; ``checks`` name the ones of :data:`CHECKS` to do.
    """
    began = perf_counter()
    row: dict[str, Any] = {"library": network.library, "network": network.name, "size": network.size}
    failed: dict[str, str] = {}
    try:
        case = _Case.of(network, ratio)
    except Exception as error:  # other people's code is run, which may raise anything; the report tells
        return {**row, "notes": [], "failed": {"substituted": first_line(error)}, "seconds": 0.0}
    row |= {"convolutions": len(case.plan.layers) + len(case.plan.skipped), "substituted": len(case.plan.layers)}
    row |= {"left": _counted(case.plan.skipped), "couplings": len(couplings(case.small).norms)}
    row |= {"norms_left": _counted(norms_left(case.small))}
    for name in (name for name in CHECKS if name in checks):
        try:
            row[name] = CHECKS[name](case)
        except Exception as error:
            row[name], failed[name] = None, first_line(error)
    return {**row, "notes": case.notes, "failed": failed, "seconds": round(perf_counter() - began, 1)}


def _settle(model: nn.Module, size: int) -> nn.Module:
    """Give batch normalisations the average statistics of two batches of random images, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size, generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _counted(reasons: Mapping[str, str]) -> dict[str, int]:
    """Reason -> how many have it; numbers of a layer in it are left out."""
    general = (
        re.sub(r"\bk = \d+", "k", re.sub(r"only \d+ numbers", "no more numbers", why)) for why in reasons.values()
    )
    return dict(Counter(general).most_common())


def _said(row: Mapping[str, Any]) -> str:
    count = f"{row.get('substituted', 0)} of {row.get('convolutions', 'its')} convolutions substituted"
    wrong = "; ".join(f"{check} failed: {why}" for check, why in row["failed"].items())
    return f"{count}, {wrong or 'all is well'} ({row['seconds']:.0f} s)"
