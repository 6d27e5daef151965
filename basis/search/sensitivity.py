"""Sensitivity: what a network loses when one layer alone is substituted, by measures from cheap to dear.

The ladder, with what it takes (L layers, K candidates of each: numbers of basis channels, or structured layers;
N images):

================  ====================================  =================================================
measure           passes                                what it sees
================  ====================================  =================================================
spectrum          none                                  the weights
activation        N forward                             the layer's outputs
taylor, fisher    N forward and backward                the loss, near the dense network
oneshot           about L K N / 2 forward               the loss of the network with the layer replaced
oneshot_bn        the same, and as many to recalibrate  that, with fitting statistics of batch norm.
fine_tuning       (1 + L K) short trainings per seed    what training does not win back
short_training    (1 + L K) short trainings per seed    the loss after training from scratch
full_training     (1 + L K) trainings per seed          the truth
================  ====================================  =================================================
"""

from __future__ import annotations

import copy
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm.auto import tqdm

from basis.batches import (
    Batch,
    Batches,
    Loss,
    cross_entropy,
    even,
    held_out,
    outputs_of,
    read_batches,
    sample_losses,
    with_labels,
)
from basis.costs import Call, cost, cost_alone, trace_calls
from basis.data import Data, Images
from basis.layers.base import ConvLike
from basis.layers.structured import Structure
from basis.modules import tracking_norms
from basis.search import measures
from basis.search.journal import Journal, digest, name_of, samples, structure, weights
from basis.search.static import StaticTraining
from basis.search.table import MEASURES, Layer, SensitivityTable, Trial
from basis.statistics import Estimate
from basis.substitution import Plan, Size, merge, substitute
from basis.text import few
from basis.training.loop import Recipe, Result, TrainingError, check_recipe, train
from basis.training.stepping import means_for

# Each with the epochs and peak learning rate of its default recipe; the last two begin from scratch.
TRAINING: Mapping[str, Recipe] = {
    "fine_tuning": Recipe(epochs=1, lr=0.02),
    "short_training": Recipe(epochs=2),
    "full_training": Recipe(),
}
CALIBRATION_IMAGES = 2000
FITTING = ("taylor", "fisher", "oneshot", "oneshot_bn")  # the measures that take a fit

Trainer = Callable[[nn.Module, int], float]
Fit = Literal["weight", "activation"]
_Item = tuple[str | None, Size, int]  # layer (None: the dense network), k or text, seed


def sensitivity(
    model: nn.Module,
    data: Batches | None = None,
    *,
    measure: str = "oneshot_bn",
    ratios: Sequence[float] = (0.5, 0.25),
    layers: Sequence[str] = (),
    multiple: int = 8,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    loss: Loss | None = None,
    calibration: Batches | None = None,
    fit: Fit = "weight",
    recipe: Recipe | None = None,
    trainer: Trainer | None = None,
    seeds: int = 3,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    resume: str | os.PathLike | None = None,
    progress: bool | str | Callable[[Any], None] | None = None,
) -> SensitivityTable:
    """Measure what ``model`` loses when one convolution alone becomes a basis convolution, or a structured layer.

    ``model`` is left as it is, and so are torch's random numbers; work is done on its device, on copies.
    What cannot be substituted is listed in ``skipped``, with the reason.

    Args:
        data: what to measure on: batches (inputs, targets) of tensors, read once; or
            :class:`basis.data.Images`; or :class:`basis.data.Data`, whose validation images are used.
            "spectrum" needs none. The measures that train need ``Data`` with validation images.
        measure: one of ``basis.search.table.MEASURES``; see the table above and :mod:`basis.search.measures`.
        ratios: of k to C_out; each layer gets the nearest multiple of ``multiple`` and of its groups. May be
            empty where ``layers`` are given.
        layers: texts of structured layers, such as "tucker:0.41", which are candidates beside the ratios, of the
            convolutions that can become one. Not for "taylor" and "fisher", which are defined by truncation.
        include, exclude: shell patterns of layer names, as in :meth:`basis.Plan.uniform`.
        loss: of (outputs, targets): the loss of each sample (N,), or the mean of the batch, which gives
            no intervals; cross-entropy unless given.
        calibration: for "oneshot_bn": batches like ``data`` (targets may be absent) on which the
            statistics of batch normalisation are measured; ``data``, unless given, or the first 2,000
            training images of ``Data``. Other measures ignore it, but for ``fit``.
        fit: of "taylor", "fisher", "oneshot" and "oneshot_bn": what the basis layers are fitted to. "weight", by
            SVD; or "activation", as ``substitute(model, plan, calibration=...)`` builds them, to the outputs on the
            calibration data, in one forward pass more. Structured layers are fitted to weights.
        recipe: of the measures that train; of "fine_tuning", which starts at the weights of ``model``,
            ``Recipe(epochs=1, lr=0.02)`` unless given; of "short_training" and "full_training", which
            start from scratch, ``Recipe(epochs=2)`` and ``Recipe()``.
        trainer: instead of a recipe: trains the network given, in place, with a seed, and returns the
            final validation loss. From scratch, initial weights have been drawn from that seed, except
            those of modules without ``reset_parameters``, which the trainer has to draw itself.
        seeds, seed: how many trainings of each network, and the first one's seed.
        part: (i, n): measure only every n-th layer, from the i-th on (dense trainings are done by part 0).
            Each worker needs a file of its own; :meth:`SensitivityTable.merge` joins their tables.
        resume: file to which each measurement is appended. What it holds already is not measured again.
        progress: True or a title draws a bar; or a function that is called with each new measurement.

    Raises:
        ValueError: for arguments that make no sense together; a model without a convolution that can be
            substituted; data that are empty, that the model cannot run on, or whose labels do not fit;
            a dense network whose loss is not finite; a ``resume`` file of another measurement.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    _check(measure, ratios, layers, loss, recipe, trainer, seeds, part)
    _check_fit(measure, fit)
    trains = measure in TRAINING
    found, skipped = candidate_layers(model, ratios, layers, multiple, include, exclude)
    copied = substitute(model, {}).eval()
    numbers = tuple(range(seed, seed + seeds)) if trains else ()
    with _own_random_numbers(copied):
        if trains:
            work = _trainings(copied, data, measure, recipe, trainer, numbers)
        else:
            work = _evaluations(copied, data, measure, loss, calibration, fit)
        counted, total, macs = layer_costs(copied, found, work.size)
        counted, idle = called_layers(counted)
        fingerprint = {**_question(copied, measure, counted), **work.fingerprint}
        table = SensitivityTable(
            measure=measure, layers=counted, cells=(), skipped=skipped | idle, total=total, fingerprint=fingerprint,
            baseline={}, seeds=numbers,
        )  # fmt: skip
        journal = Journal(Path(resume) if resume is not None else None, table)
        names = [layer.name for layer in counted[part[0] :: part[1]]]
        pending = work.pending(journal.table, names, part[0] == 0)
        if not pending:
            return journal.table
        baseline, measured = work.start(pending, macs)
        if not math.isfinite(baseline.get("loss", 0.0)):
            raise ValueError(
                f"the dense network's loss is {baseline['loss']} on these data, so nothing can be compared with it; "
                "check the inputs, the labels and the weights"
            )
        journal.begin(baseline)
        bar = tqdm(total=len(pending), disable=not isinstance(progress, (bool, str)) or not progress,
                   desc=progress if isinstance(progress, str) else measure, dynamic_ncols=True)  # fmt: skip
        with bar:
            for item in measured:
                journal.append(item)
                bar.update()
                if callable(progress):
                    progress(item)
        return journal.table


def joint(
    model: nn.Module,
    plan: Plan | Mapping[str, Size],
    data: Batches,
    *,
    measure: str = "oneshot_bn",
    loss: Loss | None = None,
    calibration: Batches | None = None,
    fit: Fit = "weight",
) -> Estimate:
    """What ``model`` loses with all layers of ``plan`` replaced at once, measured as each was alone.

    To be held against the sum over single layers (:func:`basis.search.selection.predicted`).

    Args:
        measure: "oneshot" or "oneshot_bn".
        plan, data, loss, calibration, fit: as in :func:`basis.substitute` and :func:`sensitivity`.

    Returns:
        The growth of the mean loss, with its 95 % interval over samples (paired).

    Raises:
        ValueError: for another measure, and as :func:`sensitivity` and :func:`basis.substitute` do.
    """
    if measure not in ("oneshot", "oneshot_bn"):
        raise ValueError(f"measure is {measure!r}, but what layers lose together is measured by oneshot or oneshot_bn")
    _check_fit(measure, fit)
    dense = substitute(model, {}).eval()
    batches, score, inputs, _ = _prepare(dense, data, measure, loss, calibration, fit)
    with _own_random_numbers(dense):
        torch.manual_seed(0)  # fitting a structured layer may begin at random
        changed = merge(substitute(model, plan, calibration=inputs if fit == "activation" else None)).eval()
    return measures.growth(dense, changed, batches, score, calibration=inputs if measure == "oneshot_bn" else ())


def _own_random_numbers(model: nn.Module) -> Any:
    """A context that leaves torch's random numbers as they were."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# -- what is asked ------------------------------------------------------------------------------


def _check(
    measure: str,
    ratios: Sequence[float],
    layers: Sequence[str],
    loss: Loss | None,
    recipe: Recipe | None,
    trainer: Trainer | None,
    seeds: int,
    part: tuple[int, int],
) -> None:
    """Refuse arguments that make no sense, before anything is computed."""
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, but it must be one of {', '.join(MEASURES)}")
    if isinstance(ratios, (int, float)) or not (len(ratios) or layers) or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios is {ratios!r}, but it must be a list of numbers k / C_out between 0 and 1")
    if layers and measure in ("taylor", "fisher"):
        raise ValueError(
            f"{measure} is defined by truncation to k, which {few(layers)} is not; use activation or oneshot for layers"
        )
    if measure in TRAINING:
        if loss is not None:
            raise ValueError(f"{measure} takes no loss; a trainer returns the final validation loss by itself")
        if recipe is not None and trainer is not None:
            raise ValueError("give a recipe or a trainer, not both")
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
            raise ValueError(f"seeds is {seeds!r}, but it is how many trainings each network gets, at least 1")
    elif recipe is not None or trainer is not None:
        raise ValueError(f"{measure} trains nothing; recipe and trainer go with {', '.join(TRAINING)}")
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ValueError(f"part is {part!r}, but it must be (i, n) with 0 <= i < n: the i-th of n workers")


def _check_fit(measure: str, fit: str) -> None:
    if fit not in get_args(Fit):
        raise ValueError(f"fit is {fit!r}, but it must be one of {', '.join(get_args(Fit))}")
    if fit != "weight" and measure not in FITTING:
        raise ValueError(f"fit is {fit!r}, which goes with {few(FITTING)}, not with {measure}")


def candidate_layers(
    model: nn.Module,
    ratios: Sequence[float],
    texts: Sequence[str],
    multiple: int,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
) -> tuple[list[Layer], dict[str, str]]:
    """Every layer with a candidate, its cost not counted yet, and why each other convolution has none."""
    include, exclude = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    names = [
        name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, (_ConvNd, ConvLike))
    ]
    if not names:
        raise ValueError("the model has no convolution, so there is nothing to substitute")
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude has {pattern!r}, but no convolution has such a name")
    plans = [
        Plan.uniform(model, ratio=ratio, include=include, exclude=exclude, multiple=multiple)
        for ratio in sorted(ratios, reverse=True)
    ]
    others = [_alone(model, Plan.uniform(model, layer=text, include=include, exclude=exclude)) for text in texts]
    layers: list[Layer] = []
    for name, conv in model.named_modules():
        # Ratios descend, so their k do, too.
        sizes = tuple(dict.fromkeys(plan.layers[name] for plan in (*plans, *others) if name in plan.layers))
        if sizes and isinstance(conv, nn.Conv2d):
            if conv.weight.is_meta:
                raise ValueError(f"{name or 'the model'} is on the meta device and has no values to measure")
            bias = 0 if conv.bias is None else conv.out_channels
            layers.append(
                Layer(
                    name=name,
                    out_channels=conv.out_channels,
                    groups=conv.groups,
                    fan_in=conv.weight[0].numel(),
                    bias=bias,
                    positions=None,
                    input_gradient=bool(layers),
                    candidates=sizes,
                )
            )
    there = {layer.name for layer in layers}
    last = (*plans[-1:], *others)
    skipped = {
        name: "; ".join(dict.fromkeys(plan.skipped[name] for plan in last))
        for name in last[0].skipped
        if all(name in plan.skipped for plan in last) and name not in there
    }
    if not layers:
        reasons = few((f"{name or 'the model itself'}: {reason}" for name, reason in skipped.items()), "; ")
        what = "candidate" if texts else "number of basis channels"
        raise ValueError(f"no convolution of the model has a {what} to try ({reasons})")
    return layers, skipped


def _alone(model: nn.Module, plan: Plan) -> Plan:
    """The plan without those structured layers that would save nothing by themselves, as shared ones may."""
    layers, skipped = dict(plan.layers), dict(plan.skipped)
    for name, text in plan.layers.items():
        conv: Any = copy.deepcopy(model.get_submodule(name)).to("meta")
        try:
            Structure.parse(str(text)).make([conv], fitted=False)
        except ValueError as error:
            del layers[name]
            skipped[name] = str(error)
    return Plan(layers, skipped)


def layer_costs(
    model: nn.Module, layers: Sequence[Layer], size: tuple[int, ...] | None
) -> tuple[tuple[Layer, ...], dict[str, int | None], dict[str, int]]:
    """The layers with what they cost, the whole network's total, and the MACs of each module by name.

    As if all parameters were trained, and were a layer's own. Without images of (C, H, W), or where the network
    cannot be run on a single one, no MACs are known.
    """
    trained = substitute(model, {})
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def as_texts(calls: Mapping[str, Sequence[Call]]) -> list[Layer]:
        return [replace(layer, costs=_costs_of(trained, layer, calls.get(layer.name))) for layer in layers]

    try:
        if size is None:
            raise ValueError("there are no images")
        report = cost(trained, size)
    except ValueError:
        total = {"params": sum(p.numel() for p in model.parameters()), "macs": None, "backward_macs": None}
        return tuple(as_texts({})), total, {}
    by_name = {row.name: row.cost for row in report.layers}
    counted = tuple(
        replace(
            layer,
            positions=by_name[layer.name].forward_macs // (layer.out_channels * layer.fan_in),
            input_gradient=by_name[layer.name].input_gradient_macs > 0,
        )
        for layer in as_texts({name: calls for name, _, calls in trace_calls(trained, (1, *size))})
    )
    whole = report.total
    total = {"params": whole.parameters, "macs": whole.forward_macs, "backward_macs": whole.backward_macs}
    return counted, total, {name: row.forward_macs for name, row in by_name.items()}


def fingerprint_of(model: nn.Module, measure: str, layers: Sequence[Layer]) -> dict[str, str]:
    """What a table of ``model`` has in its fingerprint whatever the data are, of a measure that trains nothing."""
    copied = substitute(model, {}).eval()
    return {**_question(copied, measure, layers), "weights": weights(copied)}


def _question(model: nn.Module, measure: str, layers: Sequence[Layer]) -> dict[str, str]:
    chosen = "; ".join(f"{layer.name}: {layer.candidates}" for layer in layers)
    return {"measure": measure, "model": structure(model), "layers": digest(chosen)}


def called_layers(layers: Sequence[Layer]) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers that a forward pass in evaluation mode calls, and why each other one is no candidate.

    A layer that is never called loses nothing, so that every search would begin with it.
    """
    idle = {layer.name: "never called by the forward pass" for layer in layers if layer.positions == 0}
    if layers and len(idle) == len(layers):
        raise ValueError(f"the forward pass calls none of the {len(layers)} convolutions that can be substituted")
    return tuple(layer for layer in layers if layer.name not in idle), idle


def _costs_of(model: nn.Module, layer: Layer, calls: Sequence[Call] | None) -> dict[str, dict[str, int | None]]:
    """What the layer costs as each text among its candidates; no MACs where its calls are not known."""
    conv: Any = model.get_submodule(layer.name)
    costs: dict[str, dict[str, int | None]] = {}
    for text in layer.candidates:
        if isinstance(text, str):
            own = cost_alone(Structure.parse(text).check(conv), calls or ())
            macs = (None, None) if calls is None else (own.forward_macs, own.backward_macs)
            costs[text] = {"params": own.parameters, "macs": macs[0], "backward_macs": macs[1]}
    return costs


# -- measures that evaluate ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """A measure made ready: on what, how large an image is, what is left to do, and how to do it.

    ``pending`` gives (layer or None, k or text, seed) for a table, the names of its layers that are this worker's,
    and whether the dense trainings are; ``start`` gives the baseline and the measurements.
    """

    fingerprint: Mapping[str, str]
    size: tuple[int, ...] | None
    pending: Callable[[SensitivityTable, Sequence[str], bool], list[_Item]]
    start: Callable[[list[_Item], Mapping[str, int]], tuple[dict[str, float], Iterator[Any]]]


def _prepare(
    model: nn.Module, data: Batches | None, measure: str, loss: Loss | None, calibration: Batches | None, fit: Fit
) -> tuple[list[Batch], Loss, list[Tensor], dict[str, str]]:
    """The batches, the loss, the inputs for calibration, and the fingerprint of all of them, checked."""
    if data is None and measure != "spectrum":
        raise ValueError(f"{measure} needs data: batches (inputs, targets), or basis.data.Images")
    if measure == "oneshot_bn" and not tracking_norms(model):
        raise ValueError("the model has no batch normalisation to recalibrate; use measure='oneshot'")
    scored = held_out(data) if isinstance(data, Data) else data
    batches = [] if scored is None else read_batches(scored, model, "data")
    score = loss or cross_entropy
    fingerprint = {"weights": weights(model)}
    if measure != "spectrum":
        outputs = outputs_of(model, batches[0][0])
        fingerprint["data"] = samples(batches)
        if measure != "activation":
            batches = batches if loss else with_labels(batches, outputs)
            sample_losses(score, outputs, batches[0][1])
            fingerprint["loss"] = name_of(score)
    inputs: list[Tensor] = []
    if measure == "oneshot_bn" or fit == "activation":
        if calibration is None and isinstance(data, Data):
            calibration = Images(data.train.x[:CALIBRATION_IMAGES], data.train.y[:CALIBRATION_IMAGES])
        elif isinstance(calibration, Data):
            calibration = calibration.train
        given = batches if calibration is None else read_batches(calibration, model, "calibration", bare=True)
        inputs = even([x for x, _ in given])
        outputs_of(model, inputs[0])
        fingerprint["calibration"] = samples([(x, None) for x in inputs])
    if fit != "weight":
        fingerprint["fit"] = fit
    return batches, score, inputs, fingerprint


def _evaluations(
    model: nn.Module, data: Batches | None, measure: str, loss: Loss | None, calibration: Batches | None, fit: Fit
) -> _Work:
    batches, score, inputs, fingerprint = _prepare(model, data, measure, loss, calibration, fit)

    def pending(table: SensitivityTable, names: Sequence[str], first: bool) -> list[_Item]:
        return [(name, k, 0) for name, k in table.missing if name in names]

    def start(items: list[_Item], macs: Mapping[str, int]) -> measures.Measured:
        fitted = inputs if fit == "activation" else None
        wanted: dict[str, list[Size]] = {}
        for name, k, _ in items:
            wanted.setdefault(str(name), []).append(k)
        if measure == "spectrum":
            return measures.spectrum(model, wanted)
        if measure == "activation":
            return measures.activation(model, wanted, batches)
        if measure in ("taylor", "fisher"):
            return measures.gradients(model, wanted, batches, score, squared=measure == "fisher", fit=fitted)
        again = inputs if measure == "oneshot_bn" else []
        return measures.oneshot(model, wanted, batches, score, calibration=again, macs=macs, fit=fitted)

    size = tuple(batches[0][0].shape[1:]) if batches and batches[0][0].dim() == 4 else None
    return _Work(fingerprint, size, pending, start)


# -- measures that train ------------------------------------------------------------------------


def _trainings(
    model: nn.Module,
    data: Batches | None,
    measure: str,
    recipe: Recipe | None,
    trainer: Trainer | None,
    seeds: Sequence[int],
) -> _Work:
    fingerprint = {"seeds": ", ".join(map(str, seeds))}
    if measure == "fine_tuning":
        fingerprint["weights"] = weights(model)
    size = None
    recipe, scratch = recipe or TRAINING[measure], measure != "fine_tuning"
    device = next(model.parameters()).device
    if isinstance(data, Data):
        size = (data.train.x.shape[3], *data.train.x.shape[1:3])
        held = [] if data.validation is None else [(data.validation.x, data.validation.y)]
        fingerprint["data"] = f"{samples([(data.train.x, data.train.y)])}; {samples(held)}"
    elif data is not None and trainer is not None:
        batches = read_batches(data, model, "data")
        size = tuple(batches[0][0].shape[1:]) if batches[0][0].dim() == 4 else None
        fingerprint["data"] = samples(batches)
    if trainer is None:
        if not isinstance(data, Data) or data.validation is None:
            raise ValueError(
                f"{measure} needs basis.data.Data with validation images (see basis.data.hold_out), or a trainer"
            )
        if len(data.train) < recipe.batch_size:
            raise ValueError(
                f"the recipe's batch_size is {recipe.batch_size}, but there are only {len(data.train)} training images"
            )
        try:
            check_recipe(model, recipe, len(data.train) // recipe.batch_size)
        except TrainingError as error:
            raise ValueError(f"{error}, and {measure} trains the dense network too") from error
        fixed = [name for name, m in model.named_modules() if list(m.parameters(False)) and _reset_of(m) is None]
        if fixed and scratch:
            raise ValueError(
                f"{few(name or 'the model itself' for name in fixed)} has parameters but no reset_parameters, so it "
                "cannot be trained from scratch; give a trainer that initialises it"
            )
        kinds = {p.dtype for p in model.parameters()} - {torch.float32}
        if kinds:
            raise ValueError(
                f"the model has parameters of {', '.join(map(str, kinds))}, but the default training keeps them in "
                "float32; convert it, or give a trainer"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
        data = data.to(device)
    said = re.sub(", (step|attention|orthogonality)=None", "", repr(recipe))  # as in tables from before these
    fingerprint |= {"recipe": said} if trainer is None else {"trainer": name_of(trainer)}

    def trial(train: Callable[..., Result], layer: str | None, k: Size, seed: int) -> Trial:
        began = time.perf_counter()
        plan = {} if layer is None else {layer: k}
        torch.manual_seed(seed)  # fitting a structured layer may begin at random
        network = substitute(model, plan, init="random" if scratch else "svd").train()
        torch.manual_seed(seed)
        if scratch:
            network.apply(_reset)
        forward = backward = 0
        if trainer is not None:
            loss = float(trainer(network, seed))
        elif isinstance(data, Data) and data.validation is not None:
            try:
                result = train(network, data, recipe, device=device, seed=seed, test=False)
                loss = (result.validation or {})["loss"]
                backward = result.steps * recipe.batch_size
                forward = backward + (recipe.epochs + 2) * len(data.validation)
            except TrainingError:  # diverged: there is no other reason left
                loss = math.nan
        if layer is None and not math.isfinite(loss):
            raise ValueError(
                f"the dense network's training with seed {seed} ended with the loss {loss}, so nothing can be "
                "compared with it; a smaller learning rate may be right"
            )
        loss = loss if math.isfinite(loss) else math.nan
        cost = {"forward": forward, "backward": backward, "seconds": time.perf_counter() - began}
        return Trial(layer=layer, basis_channels=k, seed=seed, loss=loss, **cost)

    def pending(table: SensitivityTable, names: Sequence[str], first: bool) -> list[_Item]:
        known = {(t.layer, t.basis_channels, t.seed) for t in table.trials}
        dense: list[tuple[str | None, Size]] = [(None, 0)] if first else []
        pairs = dense + [(name, k) for name, k in table.candidates if name in names]
        return [(name, k, seed) for name, k in pairs for seed in seeds if (name, k, seed) not in known]

    def start(items: list[_Item], macs: Mapping[str, int]) -> tuple[dict[str, float], Iterator[Trial]]:
        once: Callable[..., Result] = train
        if trainer is None and means_for(recipe.step, device).prepares:  # compiled or captured once for all networks
            names = {name for name, k, _ in items if name is not None and not isinstance(k, str)}
            once = StaticTraining(model, names, recipe, device=device)
        return {}, (trial(train if isinstance(k, str) else once, name, k, seed) for name, k, seed in items)

    return _Work(fingerprint, size, pending, start)


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _reset(module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()
