"""Sensitivity: what a network loses when one layer alone is substituted, by measures from cheap to dear."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from basis.batches import (
    Batch,
    Batches,
    Loss,
    balanced,
    calibration_inputs,
    held_out,
    losses_of,
    outputs_of,
    stream_batches,
    targets_of,
)
from basis.costs import Cost, cost, cost_alone
from basis.data import Data
from basis.digests import contents, digest, samples, structure, weights
from basis.inputs import Inputs, first_samples, samples_in
from basis.layers.structured import Structure
from basis.modules import recalibrates
from basis.numbers import one_of, plain_number
from basis.plan import check_patterns, convolutions
from basis.progress import bar
from basis.search import measures
from basis.search.journal import Journal
from basis.search.table import MEASURES, Cell, Layer, SensitivityTable
from basis.statistics import Estimate, mean_estimate
from basis.substitution import Plan, Size, as_patterns, check_values, merge, substitute
from basis.text import few, shown_name
from basis.training.loop import Recipe, TrainingError, train

TUNING = Recipe(epochs=1, lr=0.02)  # of "fine_tuning", the one measure that trains
CALIBRATION_IMAGES = 2000
FITTING = ("taylor", "fisher", "oneshot", "oneshot_bn")  # the measures that take a fit, and a loss

Fit = Literal["weight", "activation"]


def sensitivity(
    model: nn.Module, data: Batches | None = None, *, measure: str | None = None,
    ratios: Sequence[float] = (0.5, 0.25), layers: str | Sequence[str] = (), multiple: int = 8,
    include: str | Iterable[str] = (), exclude: str | Iterable[str] = (),
    calibration: Batches | None = None, fit: Fit = "weight", loss: Loss | None = None, recipe: Recipe | None = None,
    seeds: int = 3, resume: str | os.PathLike | None = None,
    progress: bool | str | Callable[[Any], None] | None = None,
) -> SensitivityTable:  # fmt: skip
    """Measure what ``model`` loses when one convolution alone becomes a basis convolution, or a structured layer.

    ``model`` and torch's random numbers are left as they are. What cannot be substituted is listed in ``skipped``.

    Args:
        data: batches (inputs, targets), read once, see :func:`basis.batches.stream_batches`;
            :class:`basis.data.Images`; or :class:`basis.data.Data`, whose validation images are used, and which
            "fine_tuning" needs. "spectrum" needs none.
        measure: one of ``basis.search.table.MEASURES``, see :mod:`basis.search.measures`. None: "oneshot_bn" where
            the model has batch normalisation that can be recalibrated, else "oneshot".
        ratios: of k to C_out; each layer gets the nearest multiple of ``multiple`` and of its groups.
        layers: texts of structured layers, such as "tucker:0.41", as candidates; not of activation, taylor, fisher.
        include, exclude: shell patterns of layer names, as in :meth:`basis.Plan.uniform`.
        calibration: as in :func:`basis.substitute`, for "oneshot_bn" and ``fit``; None: ``data``, or of ``Data`` the
            first 2,000 training images.
        fit: basis layers nearest to the "weight", or, as by ``substitute(model, plan, calibration=...)``, to the
            outputs ("activation") on ``calibration``; of taylor, fisher, oneshot and oneshot_bn.
        loss: from outputs and targets, whatever they are, to the loss of each sample, (N,); of the measures that take a
            fit. None: cross-entropy of logits and labels. A ``resume`` file tells losses apart as
            :func:`basis.digests.contents` does.
        recipe, seeds: of the trainings of "fine_tuning", which start at the weights of ``model``.
        resume: file to which each measurement is appended. What it holds already is not measured again.
        progress: True or a title draws a bar; or a function that is called with each new measurement.

    Raises ``ValueError`` for arguments or data that do not fit together or the model, a dense loss that is not finite,
    and a ``resume`` file of another measurement.
    """
    texts = (layers,) if isinstance(layers, str) else tuple(layers)
    ratios = getattr(ratios, "tolist", lambda: ratios)()  # of numpy and torch
    several = isinstance(ratios, Iterable) and not isinstance(ratios, str)
    ratios = [plain_number("each of ratios", ratio) for ratio in ratios] if several else ratios
    if not several or not (ratios or texts) or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"ratios is {ratios!r}, but it must be a list of numbers k / C_out between 0 and 1")
    multiple, seeds = (plain_number(n, v, whole=True, least=1) for n, v in (("multiple", multiple), ("seeds", seeds)))
    measure = _usual(model) if measure is None else measure
    if texts and measure in ("activation", "taylor", "fisher"):
        raise ValueError(f"{measure} is defined by truncation to k, which {few(texts)} is not; leave out layers")
    trains = measure == "fine_tuning"
    if recipe is not None and not trains:
        raise ValueError(f"{measure} trains nothing; a recipe goes with fine_tuning")
    _check(measure, fit, MEASURES, loss)
    found, skipped = candidate_layers(model, ratios, texts, multiple, include, exclude)
    dense = substitute(model, {}).eval()
    with _own_random_numbers(dense):
        if trains:
            example, fingerprint, start = _tunings(dense, data, recipe or TUNING, seeds)
        else:
            example, fingerprint, start = _evaluations(dense, data, measure, calibration, fit, loss)
        counted, total = layer_costs(dense, found, example)
        idle = {layer.name for layer in found} - {layer.name for layer in counted}
        chosen = digest("; ".join(f"{layer.name}: {layer.candidates}" for layer in counted))
        table = SensitivityTable(
            measure=measure, layers=counted, cells=(), total=total, baseline={},
            skipped=skipped | dict.fromkeys(sorted(idle), "never called by the forward pass"),
            fingerprint={"measure": measure, "model": structure(dense), "layers": chosen, **fingerprint},
        )  # fmt: skip
        journal = Journal(resume, table)
        if pending := journal.table.missing:
            wanted: dict[str, list[Any]] = {}
            for name, k in pending:
                wanted.setdefault(name, []).append(k)
            baseline, measured = start(wanted)
            if not math.isfinite(baseline.get("loss", 0.0)):
                raise ValueError(f"the dense network's loss is {baseline['loss']} on these data; check its weights")
            journal.begin(baseline)
            title, drawn = progress if isinstance(progress, str) else measure, progress and not callable(progress)
            for cell in bar(measured, desc=title, total=len(pending), unit="candidate", shown=bool(drawn)):
                journal.append(cell)
                if callable(progress):
                    progress(cell)
    return journal.table


def joint(
    model: nn.Module, plan: Plan | Mapping[str, Size], data: Batches, *, measure: str | None = None,
    calibration: Batches | None = None, fit: Fit = "weight", loss: Loss | None = None,
) -> Estimate:  # fmt: skip
    """How much the mean loss grows with all layers of ``plan`` replaced at once, paired over samples.

    To be held against :func:`basis.search.selection.predicted`. ``measure`` is "oneshot", "oneshot_bn" or None; the
    other arguments and errors are those of :func:`sensitivity` and :func:`basis.substitute`.
    """
    measure = _usual(model) if measure is None else measure
    _check(measure, fit, ("oneshot", "oneshot_bn"), loss)
    dense = substitute(model, {}).eval()
    batches, inputs, _ = _prepare(dense, data, measure, calibration, fit, loss)
    with _own_random_numbers(dense):
        torch.manual_seed(0)  # fitting a structured layer may begin at random
        fitted = [(x, None) for x in inputs] if fit == "activation" else None  # pairs, whatever inputs are
        changed = merge(substitute(model, plan, calibration=fitted)).eval()
    again = inputs if measure == "oneshot_bn" else ()
    return measures.growth(dense, changed, batches, calibration=again, loss=loss)


def _usual(model: nn.Module) -> str:
    return "oneshot_bn" if recalibrates(model) else "oneshot"


def _own_random_numbers(model: nn.Module) -> Any:
    """A context that leaves torch's random numbers as they were."""
    device = next(model.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _check(measure: str, fit: str, among: Collection[str], loss: Loss | None) -> None:
    one_of("measure", measure, among)
    one_of("fit", fit, get_args(Fit))
    if measure not in FITTING and (fit != "weight" or loss is not None):
        raise ValueError(f"a fit and a loss go with {few(FITTING)}, not with {measure}")


# -- layers -------------------------------------------------------------------------------------


def candidate_layers(
    model: nn.Module, ratios: Sequence[float], texts: Sequence[str], multiple: int, include: str | Iterable[str],
    exclude: str | Iterable[str],
) -> tuple[list[Layer], dict[str, str]]:  # fmt: skip
    """Every layer with a candidate, its cost not counted yet, and why each other convolution has none."""
    check_patterns("exclude", as_patterns(exclude), [name for names in convolutions(model).values() for name in names])
    among: dict[str, Any] = {"include": as_patterns(include), "exclude": as_patterns(exclude)}
    plans = [Plan.uniform(model, ratio=ratio, multiple=multiple, **among) for ratio in sorted(ratios, reverse=True)]
    plans += [_alone(model, Plan.uniform(model, layer=text, **among)) for text in texts]
    layers: list[Layer] = []
    for name, conv in model.named_modules():
        sizes = tuple(dict.fromkeys(plan.layers[name] for plan in plans if name in plan.layers))
        if sizes and isinstance(conv, nn.Conv2d):
            check_values(name, conv)
            layers.append(
                Layer(
                    name=name, out_channels=conv.out_channels, groups=conv.groups, fan_in=conv.weight[0].numel(),
                    bias=0 if conv.bias is None else conv.out_channels, positions=None, input_gradient=bool(layers),
                    candidates=sizes,
                )
            )  # fmt: skip
    last = plans[max(0, len(ratios) - 1) :]  # of the ratios the smallest alone
    others = last[0].skipped.keys() - {layer.name for layer in layers}
    skipped = {n: "; ".join(dict.fromkeys(plan.skipped[n] for plan in last)) for n in last[0].skipped if n in others}
    if not layers:
        reasons = few((f"{shown_name(name)}: {reason}" for name, reason in skipped.items()), "; ")
        raise ValueError(f"no convolution of the model has a candidate to try ({reasons or 'there is none'})")
    return layers, skipped


def _alone(model: nn.Module, plan: Plan) -> Plan:
    """The plan without those structured layers that would save nothing by themselves, as shared ones may."""
    convolutions: dict[str, Any] = {name: model.get_submodule(name) for name in plan.layers}
    reasons = {n: Structure.parse(str(plan.layers[n])).obstacle_together([conv]) for n, conv in convolutions.items()}
    kept = {name: text for name, text in plan.layers.items() if reasons[name] is None}
    return Plan(kept, {**plan.skipped, **{name: str(reason) for name, reason in reasons.items() if reason}})


def layer_costs(
    model: nn.Module, layers: Sequence[Layer], inputs: Inputs | None
) -> tuple[tuple[Layer, ...], dict[str, int | None]]:
    """The layers that a forward pass calls with what they cost, and the whole network's total.

    As if all parameters were trained, and were a layer's own, for ``inputs`` of one sample. Without them, or where the
    network cannot be run on a single one, no MACs are known. A layer that is never called loses nothing, so that every
    search would begin with it; ``ValueError`` where none is called.
    """
    trained = substitute(model, {})
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    report = None
    if inputs is not None:
        with suppress(ValueError):
            report = cost(trained, inputs=inputs)

    def units(found: Cost) -> dict[str, int | None]:
        macs, backward = (found.forward_macs, found.backward_macs) if report else (None, None)
        return {"params": found.parameters, "macs": macs, "backward_macs": backward}

    rows = {row.name: row for row in report.layers} if report else {}
    counted = []
    for layer in layers:
        conv: Any = trained.get_submodule(layer.name)
        calls: Any = ()
        if report:
            row, calls = rows[layer.name].cost, rows[layer.name].calls
            positions, needed = row.forward_macs // (layer.out_channels * layer.fan_in), row.input_gradient_macs > 0
            layer = replace(layer, positions=positions, input_gradient=needed)
        texts = [text for text in layer.candidates if isinstance(text, str)]
        costs = {text: units(cost_alone(Structure.parse(text).check(conv), calls)) for text in texts}
        counted.append(replace(layer, costs=costs))
    if not (called := tuple(layer for layer in counted if layer.positions != 0)):
        raise ValueError(f"the forward pass calls none of the {len(layers)} convolutions that can be substituted")
    return called, units(report.total if report else Cost(parameters=sum(p.numel() for p in model.parameters())))


# -- measures -----------------------------------------------------------------------------------

# Inputs of one sample, the fingerprint, and what measures candidates.
_Work = tuple[Inputs | None, dict[str, str], Callable[[measures.Candidates], measures.Measured]]


def _prepare(
    model: nn.Module, data: Batches | None, measure: str, calibration: Batches | None, fit: Fit,
    loss: Loss | None,
) -> tuple[list[Batch], list[Inputs], dict[str, str]]:  # fmt: skip
    """The batches, the inputs for calibration, and the fingerprint of both, checked."""
    if data is None and measure != "spectrum":
        raise ValueError(f"{measure} needs data: batches (inputs, targets), or basis.data.Images")
    if measure == "oneshot_bn" and not recalibrates(model):
        raise ValueError("the model has no batch normalisation that can be recalibrated; use measure='oneshot'")
    scored = held_out(data) if isinstance(data, Data) else data
    batches = [] if scored is None else list(stream_batches(scored, model, "data"))
    inputs, fingerprint = [], {"weights": weights(model.state_dict())}
    if measure != "spectrum":
        (x, y), *_ = batches
        outputs = outputs_of(model, x)
        fingerprint["data"] = samples(batches)
        if loss is not None:
            fingerprint["loss"] = contents(loss)
            losses_of(loss, outputs, y, samples=samples_in(x))
        elif measure != "activation":
            batches = [(x, targets_of(y, outputs, samples=samples_in(x))) for x, y in batches]
    if measure == "oneshot_bn" or fit == "activation":
        if calibration is None and isinstance(data, Data):
            calibration = data.train.first(CALIBRATION_IMAGES)
        given: Any = (x for x, _ in batches) if calibration is None else calibration_inputs(calibration, model)
        inputs = list(balanced(given))
        outputs_of(model, inputs[0])
        fingerprint["calibration"] = samples([(x, None) for x in inputs])
    if fit != "weight":
        fingerprint["fit"] = fit
    return batches, inputs, fingerprint


def _evaluations(
    model: nn.Module, data: Batches | None, measure: str, calibration: Batches | None, fit: Fit, loss: Loss | None
) -> _Work:
    batches, inputs, fingerprint = _prepare(model, data, measure, calibration, fit, loss)
    fitted = inputs if fit == "activation" else []

    def start(wanted: Any) -> measures.Measured:
        if measure == "spectrum":
            return measures.spectrum(model, wanted)
        if measure == "activation":
            return measures.activation(model, wanted, batches)
        if measure in ("taylor", "fisher"):
            return measures.gradients(model, wanted, batches, squared=measure == "fisher", fit=fitted, loss=loss)
        again = inputs if measure == "oneshot_bn" else []
        return measures.oneshot(model, wanted, batches, calibration=again, fit=fitted, loss=loss)

    return first_samples(batches[0][0], 1) if batches else None, fingerprint, start


def _tunings(model: nn.Module, data: Batches | None, recipe: Recipe, seeds: int) -> _Work:
    """Train the dense network on, and copies with one layer substituted one after the other, with each seed."""
    if not isinstance(data, Data) or data.validation is None:
        raise ValueError("fine_tuning needs basis.data.Data with validation images (see basis.data.hold_out)")
    device, held = next(model.parameters()).device, data.validation
    if {p.dtype for p in model.parameters()} != {torch.float32} or not any(p.requires_grad for p in model.parameters()):
        raise ValueError("fine_tuning trains parameters of float32, but the model has others, or none to train")
    seen = f"{samples([(data.train.x, data.train.y)])}; {samples([(held.x, held.y)])}"
    fingerprint = {"seeds": str(seeds), "data": seen, "recipe": repr(recipe), "weights": weights(model.state_dict())}
    there = data.to(device)
    backward = recipe.epochs * (len(data.train) // recipe.batch_size) * recipe.batch_size * seeds
    forward = backward + (recipe.epochs + 2) * len(held) * seeds

    def losses(plan: Mapping[str, Size]) -> list[float]:
        """The validation loss after training with each seed."""
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)  # fitting a structured layer may begin at random
            result = train(substitute(model, plan).train(), there, recipe, device=device, seed=seed, test=False)
            found.append((result.validation or {})["loss"])
        return found

    def start(wanted: measures.Candidates) -> measures.Measured:
        began = time.perf_counter()
        try:
            dense = losses({})
        except TrainingError as error:
            raise ValueError(f"the dense network cannot be trained: {error}") from error
        share = 1 + 1 / sum(map(len, wanted.values()))  # of the passes: its own, and the dense network's shared evenly
        common = (time.perf_counter() - began) * (share - 1)

        def cells() -> Iterator[Cell]:
            for name, k in ((name, k) for name, sizes in wanted.items() for k in sizes):
                began = time.perf_counter()
                found: dict[str, Any] = {"value": math.nan}
                with suppress(TrainingError):  # it diverged: there is no other reason left
                    own = losses({name: k})
                    grown = [a - b for a, b in zip(own, dense, strict=True)]  # paired by seed
                    found = dict(vars(mean_estimate(grown))) if all(map(math.isfinite, own)) else found
                found |= {"forward": share * forward, "backward": share * backward}
                seconds = time.perf_counter() - began + common
                yield Cell(layer=name, basis_channels=k, seconds=seconds, **found)

        return {"loss": sum(dense) / seeds}, cells()

    (example, _), *_ = stream_batches(data.train.first(1), model, "data")
    return example, fingerprint, start
