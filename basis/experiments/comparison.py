"""Ways to make a trained network smaller, on one footing: one budget of parameters, one calibration set, one repair.

:func:`shrink` makes the smaller network by a method of :data:`METHODS`; :func:`compare` follows it through its
repair: as it is, with the statistics of batch normalisation measured anew, and after a short fine-tuning.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

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
        method: one of :data:`METHODS`.
        budget: the fraction of the dense network's parameters that may be left.
        measure, ratios: of :func:`basis.sensitivity`, for the methods that select.
        multiple: what every number of basis channels is a multiple of.
        calibration: how many training images (the first, not augmented) layers are fitted to and batch
            normalisation is recalibrated on.
        held: how many held-out images sensitivities are measured on.
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
            raise ValueError(f"budget is {self.budget}, but it is a fraction of the parameters and must lie in (0, 1]")


@dataclass(frozen=True)
class _Asked:
    """What a method is given: the dense network, the task, and the two sets of images."""

    model: nn.Module
    task: Compression
    calibration: Images
    held: Images

    @property
    def parameters(self) -> int:
        return int(self.task.budget * count_parameters(self.model))

    @property
    def first(self) -> str:
        """The convolution that sees the images. Methods of one setting for all layers leave it alone: it has few
        parameters, and they are the better for it."""
        return self._named(lambda conv: True)[0]

    @property
    def small(self) -> list[str]:
        """That one and the 1x1 convolutions, which Tucker convolutions had better leave alone, too."""
        return list(dict.fromkeys([self.first, *self._named(lambda conv: conv.kernel_size == (1, 1))]))

    def _named(self, wanted: Callable[[nn.Conv2d], bool]) -> list[str]:
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d) and wanted(m)]


@dataclass(frozen=True)
class _Made:
    """A smaller network; its plan where it has one, and seconds that the search alone took."""

    model: nn.Module
    plan: Plan | None = None
    searching: float = 0.0


def _selected(asked: _Asked, units: Sequence[str] = ("params",)) -> _Made:
    task, began = asked.task, time.perf_counter()
    how: dict[str, Any] = {"fit": "activation"} if task.measure.startswith("oneshot") else {}
    table = sensitivity(
        asked.model, asked.held, measure=task.measure, ratios=task.ratios, multiple=task.multiple,
        calibration=asked.calibration, **how,
    )  # fmt: skip
    plan = select(table, budget=dict.fromkeys(units, task.budget))
    searching = time.perf_counter() - began
    return _Made(substitute(asked.model, plan, calibration=asked.calibration), plan, searching)


def _uniform(asked: _Asked, *, fitted: bool) -> _Made:
    shapes = sensitivity(asked.model, measure="spectrum", ratios=(0.5,), multiple=asked.task.multiple)
    plan = select(shapes, budget={"params": asked.task.budget}, rule="uniform", exclude=asked.first)
    return _Made(substitute(asked.model, plan, calibration=asked.calibration if fitted else None), plan)


# Name -> what makes the smaller network. The first four are this package's; "both" halves multiplications, too, where
# the budget is a half.
METHODS: Mapping[str, Callable[[_Asked], _Made]] = {
    "selected": _selected,
    "selected by both": lambda asked: _selected(asked, ("params", "macs")),
    "uniform": lambda asked: _uniform(asked, fitted=True),
    "uniform, fitted to weights": lambda asked: _uniform(asked, fitted=False),
    "svd": lambda asked: _Made(svd_pairs(asked.model, asked.parameters, [asked.first])),
    "tensorly": lambda asked: _Made(tensorly_network(asked.model, asked.parameters, asked.small)),
    "fasterai svd": lambda asked: _Made(fasterai_network(asked.model, asked.parameters, [asked.first], method="svd")),
    "fasterai tucker": lambda asked: _Made(fasterai_network(asked.model, asked.parameters, [asked.first])),
    "dense": lambda asked: _Made(copy.deepcopy(asked.model)),
}


def shrink(model: nn.Module, task: Compression, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the method of ``task`` makes of the trained ``model``, which is left alone, and facts about it.

    The facts are ``plan`` (layer -> basis channels, or None), ``seconds`` that making it took and ``searching``, the
    part of it that measuring sensitivities took.

    Args:
        data: training images to fit to, and validation images to measure on.

    Raises:
        ValueError: for too few images, and what the methods raise, among it
            :class:`basis.decompositions.NotInstalled`.
    """
    there = len(data.validation or ())
    for name, needed, given in (("calibration", task.calibration, len(data.train)), ("held", task.held, there)):
        if needed > given:
            raise ValueError(f"{name} is {needed}, but there are only {given} such images")
    held = data.validation or data.train
    asked = _Asked(model, task, _first(data.train, task.calibration), _first(held, task.held))
    began = time.perf_counter()
    made = METHODS[task.method](asked)
    about = {"plan": None if made.plan is None else dict(made.plan.layers), "searching": made.searching}
    return made.model, about | {"seconds": time.perf_counter() - began}


def compare(model: nn.Module, task: Compression, data: Data, *, seed: int = 0, progress: bool | str = False) -> dict:
    """Compress the trained ``model``, repair it, and test it at every stage.

    Returns:
        Plain values. ``stages`` holds loss and accuracy on the test images of the smaller network as it is ("made"; of
        the method "dense" that is the network given), after recalibration and after fine-tuning ("tuned"); ``test``
        is the last of them. ``parameters``,
        ``macs`` (counted by torch, multiply-accumulates of one image), ``dense_parameters`` and ``dense_macs``;
        ``curves`` of the fine-tuning; what :func:`shrink` tells.
    """
    place = next(model.parameters()).device
    data = data.to(place)
    precision = choose_precision(place)

    def tested(network: nn.Module) -> dict[str, float]:
        return evaluate(network, data.test, precision=precision)

    last = choose_memory_format(model, place, precision) == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    model = model.eval().to(memory_format=layout)  # type: ignore[call-overload]
    smaller, about = shrink(model, task, data)
    smaller.to(memory_format=layout)  # type: ignore[call-overload]
    size = data.train.x[:1]
    stages = {"made": tested(smaller)}
    macs = [_macs(network, size) for network in (smaller, model)]
    recalibrate(smaller, _first(data.train, task.calibration))
    stages["recalibrated"] = tested(smaller)
    tuning = finetune(
        smaller, replace(data, validation=None), epochs=task.epochs, lr=task.lr, batch_size=task.batch_size, seed=seed,
        progress=progress,
    )  # fmt: skip
    stages["tuned"] = tested(smaller)
    return {
        **about,
        "stages": stages,
        "test": stages["tuned"],
        "validation": None,
        "curves": [dict(row) for row in tuning.curves],
        "train_seconds": tuning.seconds,
        "precision": precision,
        "settings": asdict(tuning.settings),
        "parameters": count_parameters(smaller),
        "dense_parameters": count_parameters(model),
        "macs": macs[0],
        "dense_macs": macs[1],
    }


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


def _first(images: Images, n: int) -> Images:
    return Images(images.x[:n], images.y[:n])
