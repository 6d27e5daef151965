"""Ways to make a trained network smaller, on one footing: one budget of parameters, one calibration set, one repair."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis.costs import count_parameters
from basis.data import Data, Images, normalise
from basis.decompositions import fasterai_network, svd_pairs, tensorly_network
from basis.layers.conv import BasisConv2d
from basis.search.selection import select
from basis.search.sensitivity import sensitivity
from basis.substitution import Plan, substitute
from basis.training.finetuning import finetune
from basis.training.loop import choose_memory_format, choose_precision, evaluate
from basis.training.recalibration import recalibrate


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a trained network is made smaller and repaired.

    Args:
        method, budget: one of :data:`METHODS`, and the fraction of the parameters that may be left, in (0, 1].
        measure, ratios: of :func:`basis.sensitivity`, for the methods that select.
        multiple: what every number of basis channels is a multiple of.
        calibration, held: how many training images (the first, not augmented) layers are fitted to and batch
            normalisation is recalibrated on, and how many held-out images sensitivities are measured on.
        epochs, lr, batch_size: of :func:`basis.finetune`.
    """

    method: str
    budget: float
    measure: str = "activation"
    ratios: tuple[float, ...] = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
    multiple: int = 1
    calibration: int = 2000
    held: int = 1000
    epochs: int = 1
    lr: float = 0.01
    batch_size: int = 125

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, but it must be one of {', '.join(METHODS)}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}, but it must lie in (0, 1]")


class Made(NamedTuple):
    """A smaller network; its plan where it has one, and the seconds that the search alone took."""

    model: nn.Module
    plan: Plan | None = None
    searching: float = 0.0


class Given(NamedTuple):
    """What a method is given: the dense network, the task, and both sets of images."""

    model: nn.Module
    task: Compression
    data: Data

    @property
    def parameters(self) -> int:
        """How many may be left."""
        return int(self.task.budget * count_parameters(self.model))

    def convolutions(self, wanted: Callable[[nn.Conv2d], bool] = lambda conv: True) -> list[str]:
        """The names of those that are wanted."""
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d) and wanted(m)]


def _selected(given: Given, units: Sequence[str] = ("params",)) -> Made:
    task, train, held = given.task, given.data.train, given.data.validation
    how: dict[str, Any] = {"fit": "activation"} if task.measure.startswith("oneshot") else {}
    began = time.perf_counter()
    table = sensitivity(
        given.model, held, measure=task.measure, ratios=task.ratios, multiple=task.multiple, calibration=train, **how
    )
    plan = select(table, budget=dict.fromkeys(units, task.budget))
    searching = time.perf_counter() - began
    return Made(substitute(given.model, plan, calibration=train), plan, searching)


# Methods with one setting for all layers leave the first convolution alone: it has few parameters, and they are the
# better for it. Tucker convolutions leave 1x1 convolutions alone, too.


def _uniform(given: Given, *, fitted: bool) -> Made:
    shapes = sensitivity(given.model, measure="spectrum", ratios=(0.5,), multiple=given.task.multiple)
    budget, first = {"params": given.task.budget}, given.convolutions()[0]
    plan = select(shapes, budget=budget, rule="uniform", exclude=first)
    return Made(substitute(given.model, plan, calibration=given.data.train if fitted else None), plan)


def _tensorly(given: Given) -> Made:
    small = [given.convolutions()[0], *given.convolutions(lambda conv: conv.kernel_size == (1, 1))]
    return Made(tensorly_network(given.model, given.parameters, list(dict.fromkeys(small))))


def _fasterai(given: Given, **options: Any) -> Made:
    return Made(fasterai_network(given.model, given.parameters, given.convolutions()[:1], **options))


# Name -> what makes the smaller network. The first four are this package's; "both" halves multiplications, too, where
# the budget is a half.
METHODS: Mapping[str, Callable[[Given], Made]] = {
    "selected": _selected,
    "selected by both": lambda given: _selected(given, ("params", "macs")),
    "uniform": lambda given: _uniform(given, fitted=True),
    "uniform, fitted to weights": lambda given: _uniform(given, fitted=False),
    "svd": lambda given: Made(svd_pairs(given.model, given.parameters, given.convolutions()[:1])),
    "tensorly": _tensorly,
    "fasterai svd": lambda given: _fasterai(given, method="svd"),
    "fasterai tucker": _fasterai,
    "dense": lambda given: Made(copy.deepcopy(given.model)),
}


def shrink(model: nn.Module, task: Compression, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the method of ``task`` makes of the trained ``model``, which is left alone, and facts about it.

    The facts are ``plan`` (layer -> basis channels, or None), ``seconds`` that making it took and ``searching``, the
    part of it that measuring sensitivities took. Methods fit to the training images of ``data`` and measure on its
    validation images.

    Raises:
        ValueError: for too few images, and what the methods raise, among it
            :class:`basis.decompositions.NotInstalled`.
    """
    held = data.validation or data.train
    for name, needed, there in (("calibration", task.calibration, data.train), ("held", task.held, held)):
        if needed > len(there):
            raise ValueError(f"{name} is {needed}, but there are only {len(there)} such images")
    began = time.perf_counter()
    images = replace(data, train=first(data.train, task.calibration), validation=first(held, task.held))
    made = METHODS[task.method](Given(model, task, images))
    plan = None if made.plan is None else dict(made.plan.layers)
    return made.model, {"plan": plan, "searching": made.searching, "seconds": time.perf_counter() - began}


def compare(model: nn.Module, task: Compression, data: Data, *, seed: int = 0, progress: bool | str = False) -> dict:
    """Compress the trained ``model``, repair it, and test it at every stage.

    Returns plain values. ``stages`` holds loss and accuracy on the test images of the smaller network as it is
    ("made"), after recalibration and after fine-tuning ("tuned"); ``test`` is the last of them. ``macs`` and
    ``dense_macs`` are counted by torch, multiply-accumulates of one image, basis layers factorized.
    """
    place = next(model.parameters()).device
    data, precision = data.to(place), choose_precision(place)
    last = choose_memory_format(model, place, precision) == "channels_last"
    layout: Any = torch.channels_last if last else torch.contiguous_format
    model = model.eval().to(memory_format=layout)  # type: ignore[call-overload]
    smaller, about = shrink(model, task, data)
    smaller.to(memory_format=layout)  # type: ignore[call-overload]
    stages = {"made": evaluate(smaller, data.test, precision=precision)}
    sizes = {
        f"{name}{count}": counted
        for name, network in (("", smaller), ("dense_", model))
        for count, counted in (("parameters", count_parameters(network)), ("macs", _macs(network, data.train.x[:1])))
    }
    recalibrate(smaller, first(data.train, task.calibration))
    stages["recalibrated"] = evaluate(smaller, data.test, precision=precision)
    tuning = finetune(
        smaller, replace(data, validation=None), epochs=task.epochs, lr=task.lr, batch_size=task.batch_size, seed=seed,
        progress=progress,
    )  # fmt: skip
    stages["tuned"] = evaluate(smaller, data.test, precision=precision)
    return {
        **about, **sizes, "stages": stages, "test": stages["tuned"], "validation": None,
        "curves": [dict(row) for row in tuning.curves], "train_seconds": tuning.seconds, "precision": precision,
        "settings": asdict(tuning.settings),
    }  # fmt: skip


def first(images: Images, n: int) -> Images:
    """The first ``n`` images."""
    return Images(images.x[:n], images.y[:n])


@torch.no_grad()
def _macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-accumulates of one image (1, H, W, C), as torch counts them: basis layers factorized, M whole."""
    copied, counter = copy.deepcopy(model), FlopCounterMode(display=False)
    for module in copied.modules():
        if isinstance(module, BasisConv2d):
            module.mode = "factorized"
    with counter:
        copied(normalise(image).contiguous())
    return counter.get_total_flops() // 2
