"""A look into trained networks: their filters, their singular values, and what plans of every budget lose at once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from basis.batches import held_out
from basis.bench.report import BenchReport
from basis.bench.timing import Progress, Setting
from basis.environment import results_folder
from basis.experiments.execution import prepare_data, trained_dense
from basis.experiments.runs import Run
from basis.experiments.studies import STUDIES
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.saving import plain
from basis.search.measures import singular_energies
from basis.search.selection import InfeasibleBudget, predicted, select
from basis.search.sensitivity import joint, sensitivity
from basis.substitution import substitute
from basis.training.loop import train

BUDGETS = tuple(round(0.05 * i, 2) for i in range(2, 20))  # shares of the dense network's parameters
RULES = ("optimal", "largest_first")


def bench_trained(
    *, profile: str = "small", setting: Setting | None = None, progress: Progress | None = None
) -> BenchReport:
    """Train the dense network of ``profile`` and a basis network (r = 1/2), and measure plans of every budget.

    A row is a budget and a rule, with the ``plan``, its shares of ``params`` and ``macs``, and the growth of the loss:
    ``predicted`` (the sensitivities of its layers summed), and measured with all layers cut at once on held-out images
    that the search has not seen (``growth`` with a 95 % interval, :func:`basis.search.sensitivity.joint`). ``config``
    has the ``singular_values`` of every dense layer, and the filters of the basis network's first convolution, basis
    filters first.
    """
    say: Any = progress or (lambda message: None)
    run: Run = next(one for one in STUDIES["headline"].runs(profile) if one.ladder is not None)
    (measure, ratios), ladder = next(iter(run.ladder.measures.items())), run.ladder  # type: ignore[union-attr]
    torch.manual_seed(run.seed)
    setting = setting or Setting()
    data = prepare_data(run.data, run.validation, run.images, setting.where)
    fresh = build(run.model, num_classes=data.classes, width=run.width)
    kept = results_folder() / "bench" / "checkpoints" / f"trained-{profile}"
    small = substitute(fresh, ratio=1 / 2, init="random")
    dense = trained_dense(fresh, run, data=data, device=setting.where, checkpoint=kept).to(setting.where)
    say("the dense network is trained")
    how: Any = {"device": setting.where, "seed": run.seed, "test": False}
    train(small, data, run.recipe, checkpoint=kept.with_suffix(".basis"), **how)
    say("the basis network is trained")
    held, calibration = held_out(data), data.train.first(ladder.calibration)
    unseen = held.take(torch.arange(ladder.images, len(held)))
    table = sensitivity(
        dense, held.first(ladder.images), measure=measure, ratios=ratios, multiple=ladder.multiple,
        calibration=calibration,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        for rule in RULES:
            fixed: Any = {"ratio": max(r for r in ratios if r <= max(budget / 2, min(ratios)))}
            try:
                plan = select(table, budget={"params": budget}, rule=rule, **fixed if rule == "largest_first" else {})
            except InfeasibleBudget:
                continue
            told, growth = predicted(table, plan), joint(dense, plan, unseen, measure=measure, calibration=calibration)
            row: dict[str, Any] = {"budget": budget, "rule": rule, "plan": dict(plan.layers), "n": growth.n}
            row |= {"params": told["params"], "macs": told["macs"], "predicted": told["sensitivity"]}
            rows.append({**row, "growth": growth.value, "growth_low": growth.low, "growth_high": growth.high})
            say(rows[-1])
    convs = {name: layer for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)}
    found = {name: singular_energies(conv.weight).sqrt().tolist() for name, conv in convs.items()}
    filters = next(layer for layer in small.modules() if isinstance(layer, BasisConv2d))
    facts = {
        "model": run.model, "width": run.width, "data": run.data, "recipe": asdict(run.recipe), "measure": measure,
        "loss": table.baseline["loss"], "singular_values": found, "filters": filters.weight.tolist(),
        "basis_channels": filters.basis_channels,
    }  # fmt: skip
    return setting.settled(dense).report("bench-trained", rows, **plain(facts))
