"""Ways to make a trained network smaller, on one footing: one budget of parameters, one calibration set, one repair."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from basis.costs import cost, count_parameters
from basis.data import Data, normalise
from basis.decompositions import svd_pairs, tensorly_network
from basis.plan import Plan
from basis.search.selection import Rule, select
from basis.search.sensitivity import sensitivity
from basis.substitution import substitute
from basis.training.finetuning import finetune
from basis.training.loop import choose_memory_format, choose_precision, evaluate
from basis.training.recalibration import recalibrate

Made = tuple[nn.Module, Plan | None]  # the smaller network, and its plan where it has one


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How a trained network is made smaller and repaired."""

    method: str  # one of METHODS
    budget: float  # the fraction of the parameters that may be left, in (0, 1]
    # At which ratios the methods that select measure layers, and what every number of basis channels is a multiple of.
    ratios: tuple[float, ...] = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
    multiple: int = 1
    calibration: int = 2000  # training images, not augmented, that layers and batch normalisation are fitted to
    held: int = 1000  # held-out images that sensitivities are measured on
    # Of basis.finetune.
    epochs: int = 1
    lr: float = 0.01
    batch_size: int = 125


def _selected(model: nn.Module, task: Compression, data: Data, units: Sequence[str] = ("params",)) -> Made:
    table = sensitivity(
        model, data.validation, measure="activation", ratios=task.ratios, multiple=task.multiple, calibration=data.train
    )
    plan = select(table, budget=dict.fromkeys(units, task.budget))
    return substitute(model, plan, calibration=data.train), plan


# Methods with one setting for all layers leave the first convolution alone: it has few parameters, and they are the
# better for it. Tucker convolutions leave 1x1 convolutions alone, too.


def _ruled(model: nn.Module, task: Compression, data: Data, *, rule: Rule) -> Made:
    # Largest first gives layer after layer half the budget's ratio, so that about as many stay dense.
    shapes = sensitivity(model, measure="spectrum", ratios=(task.budget / 2,), multiple=task.multiple)
    plan = select(shapes, budget={"params": task.budget}, rule=rule, exclude=next(iter(_convolutions(model))))
    return substitute(model, plan, calibration=data.train), plan


def _by_others(shrink: Callable[..., nn.Module], model: nn.Module, task: Compression, _: Data) -> Made:
    convolutions = _convolutions(model)
    small = [name for name, conv in convolutions.items() if shrink is tensorly_network and conv.kernel_size == (1, 1)]
    exclude = {next(iter(convolutions)), *small}
    return shrink(model, int(task.budget * count_parameters(model)), exclude), None


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


# Name -> what makes the smaller network, the most telling first; "MACs too" keeps to the budget in both units.
METHODS: Mapping[str, Callable[[nn.Module, Compression, Data], Made]] = {
    "dense": lambda model, task, data: (copy.deepcopy(model), None),
    "selected": _selected,
    "SVD pairs": partial(_by_others, svd_pairs),
    "largest first": partial(_ruled, rule="largest_first"),
    "uniform": partial(_ruled, rule="uniform"),
    "selected, MACs too": partial(_selected, units=("params", "macs")),
    "Tucker": partial(_by_others, tensorly_network),
}


def shrink(model: nn.Module, task: Compression, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the method of ``task`` makes of the trained ``model``, which is left alone, and facts about it.

    The facts are ``plan`` (layer -> basis channels, or None) and the ``seconds`` that making it took. Methods fit to
    the training images of ``data`` and measure on its validation images. Raises ``ModuleNotFoundError`` for a package
    of somebody else that is not here.
    """
    began, held = time.perf_counter(), data.validation or data.train
    images = replace(data, train=data.train.first(task.calibration), validation=held.first(task.held))
    smaller, plan = METHODS[task.method](model, task, images)
    about = {"plan": None if plan is None else dict(plan.layers), "seconds": time.perf_counter() - began}
    return smaller, about


def compare(model: nn.Module, task: Compression, data: Data, *, seed: int = 0, progress: bool | str = False) -> dict:
    """Compress the trained ``model``, repair it, and test it at every stage.

    Returns plain values. ``stages`` holds loss and accuracy on the test images of the smaller network as it is
    ("made"), after recalibration and after fine-tuning ("tuned"); ``test`` is the last of them, ``given`` is of the
    trained model. ``macs`` are the multiply-accumulates of one image, basis layers factorized.
    """
    place = next(model.parameters()).device
    data, precision = data.to(place), choose_precision(place)
    last = choose_memory_format(model, place, precision) == "channels_last"
    layout: Any = torch.channels_last if last else torch.contiguous_format
    model = model.eval().to(memory_format=layout)  # type: ignore[call-overload]
    given = evaluate(model, data.test, precision=precision)
    smaller, about = shrink(model, task, data)
    smaller.to(memory_format=layout)  # type: ignore[call-overload]
    stages = {"made": evaluate(smaller, data.test, precision=precision)}
    size = cost(smaller, inputs=normalise(data.train.x[:1]), mode="factorized").total
    recalibrate(smaller, data.train.first(task.calibration))
    stages["recalibrated"] = evaluate(smaller, data.test, precision=precision)
    tuning = finetune(
        smaller, data, epochs=task.epochs, lr=task.lr, batch_size=task.batch_size, seed=seed, progress=progress
    )
    stages["tuned"] = evaluate(smaller, data.test, precision=precision)
    return {
        **about, "parameters": size.parameters, "macs": size.forward_macs, "given": given,
        "stages": stages, "test": stages["tuned"], "validation": None, "curves": [dict(row) for row in tuning.curves],
        "train_seconds": tuning.seconds, "precision": precision,
    }  # fmt: skip
