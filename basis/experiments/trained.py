"""A look into trained networks: filters and singular values, and what plans of every size lose, measured at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from basis.batches import held_out
from basis.bench.report import BenchReport
from basis.bench.timing import Progress, Setting, layer_steps
from basis.environment import results_folder
from basis.experiments.execution import prepare_data, trained_dense
from basis.experiments.runs import Run
from basis.experiments.studies import STUDIES
from basis.inference import fold
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.plan import Plan
from basis.saving import plain
from basis.search.measures import singular_energies
from basis.search.selection import InfeasibleBudget, predicted, select
from basis.search.sensitivity import joint, sensitivity
from basis.search.table import SensitivityTable
from basis.substitution import substitute
from basis.training.evaluation import evaluate
from basis.training.loop import train
from basis.training.recalibration import recalibrate

BUDGETS = tuple(round(0.05 * i, 2) for i in range(2, 20))  # shares of the dense network's parameters
RATIO = 1 / 4  # of the layers that are replaced one after another


def bench_trained(
    *, profile: str = "small", setting: Setting | None = None, progress: Progress | None = None
) -> BenchReport:
    """Train the dense network of ``profile`` and a basis network (r = 1/2), and measure plans, without more training.

    A row is a plan: of a ``budget`` of parameters by a ``rule``, or the first ``replaced`` layers at :data:`RATIO`, the
    least sensitive or the largest first. It has its shares of ``params`` and ``macs``, the growth of the loss as
    ``predicted`` (sensitivities summed) and measured (``growth`` with a 95 % interval, see
    :func:`basis.search.sensitivity.joint`), and the ``accuracy``, on held-out images that the search has not seen; of
    layers replaced one after another also the ``speedup`` of the folded forward pass. ``config`` has all layers'
    ``singular_values``, and the ``filters`` of the basis network's first convolution, basis filters first.
    """
    say: Any = progress or (lambda message: None)
    run: Run = next(one for one in STUDIES["headline"].runs(profile) if one.ladder is not None)
    ladder: Any = run.ladder
    measure, ratios = next(iter(ladder.measures.items()))
    torch.manual_seed(run.seed)
    setting = setting or Setting()
    data = prepare_data(run.data, run.validation, run.images, setting.where)
    fresh = build(run.model, num_classes=data.classes, width=run.width)
    kept = results_folder() / "bench" / "checkpoints" / f"trained-{profile}"
    small = substitute(fresh, ratio=1 / 2, init="random")
    dense = trained_dense(fresh, run, data=data, device=setting.where, checkpoint=kept).to(setting.where)
    train(
        small, data, run.recipe, device=setting.where, seed=run.seed, test=False, checkpoint=kept.with_suffix(".basis")
    )
    held, calibration = held_out(data), data.train.first(ladder.calibration)
    unseen = held.take(torch.arange(ladder.images, len(held)))
    table = sensitivity(
        dense, held.first(ladder.images), measure=measure, ratios=ratios, multiple=ladder.multiple,
        calibration=calibration,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for about, plan in (*_budgets(table, ratios), *_one_after_another(table)):
        told, growth = predicted(table, plan), joint(dense, plan, unseen, measure=measure, calibration=calibration)
        recalibrate(changed := substitute(dense, plan), calibration)
        row = {**about, "plan": dict(plan.layers), "n": growth.n, "accuracy": evaluate(changed, unseen)["accuracy"]}
        row |= {"params": told["params"], "macs": told["macs"], "predicted": told["sensitivity"]}
        rows.append({**row, "growth": growth.value, "growth_low": growth.low, "growth_high": growth.high})
        say(rows[-1])
    setting = setting.settled(dense)
    timed = [row for row in rows if "replaced" in row]
    forms = {str(i): fold(substitute(dense, row["plan"]), factorized=list(row["plan"])) for i, row in enumerate(timed)}
    placed = {name: setting.place(form.eval()) for name, form in {"dense": fold(dense), **forms}.items()}
    height, width, channels = data.train.x.shape[1:]
    times = setting.measure(layer_steps(placed, [(channels, height, width)], "forward", setting))
    for i, row in enumerate(timed):
        row |= {key: value for key, value in times[str(i)].items() if key != "n"} | {"rounds": times[str(i)]["n"]}
    convs = ((name, layer) for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d))
    found = {name: singular_energies(conv.weight).sqrt().tolist() for name, conv in convs}
    filters = next(layer for layer in small.modules() if isinstance(layer, BasisConv2d))
    facts = {
        "model": run.model, "width": run.width, "data": run.data, "recipe": asdict(run.recipe), "measure": measure,
        "loss": table.baseline["loss"], "accuracy": evaluate(dense, unseen)["accuracy"], "singular_values": found,
        "filters": filters.weight.tolist(), "basis_channels": filters.basis_channels,
    }  # fmt: skip
    return setting.report("bench-trained", rows, **plain(facts))


def _budgets(table: SensitivityTable, ratios: Sequence[float]) -> Iterator[tuple[dict[str, Any], Plan]]:
    """The selected plan of every budget that can be met, and that of the largest layers first."""
    for budget in BUDGETS:
        least = max(r for r in ratios if r <= max(budget / 2, min(ratios)))
        rules: Mapping[Any, dict[str, Any]] = {"optimal": {}, "largest_first": {"ratio": least}}
        for rule, options in rules.items():
            with suppress(InfeasibleBudget):
                plan = select(table, budget={"params": budget}, rule=rule, **options)
                yield {"rule": rule, "budget": budget}, plan


def _one_after_another(table: SensitivityTable) -> Iterator[tuple[dict[str, Any], Plan]]:
    """One more layer replaced at :data:`RATIO` each time, in the order of sensitivity, and in that of size."""
    sizes_at = {name: cell.basis_channels for name, cell in table.at(RATIO).items() if cell}
    ranking = table.ranking(RATIO)
    sizes = {layer.name: layer.out_channels * layer.fan_in for layer in table.layers}
    orders = {"least sensitive first": ranking, "largest first": sorted(ranking, key=sizes.__getitem__, reverse=True)}
    for rule, names in orders.items():
        for count in range(1, len(names) + 1):
            yield {"rule": rule, "replaced": count}, Plan({name: sizes_at[name] for name in names[:count]})
