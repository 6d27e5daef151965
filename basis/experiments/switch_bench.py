"""What a training that switches on its way takes: its steps before and after, and its search, by one device's clock."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from basis.bench.report import BenchReport
from basis.bench.timing import Progress, Setting, tell
from basis.costs import cost
from basis.data import Data, Images
from basis.experiments.runs import Run
from basis.experiments.studies import headline, switch
from basis.experiments.studies.skip import steps_of
from basis.experiments.studies.study import result_of, valid_records
from basis.models import build
from basis.substitution import substitute
from basis.training.loop import make_step

SCRATCH, NARROWER = (headline.variant(rule, headline.HALF) for rule in ("selected", headline.NARROWER))
SWITCHED = switch.variant(switch.OURS, headline.HALF)


def bench_switch(
    *, profile: str = "small", setting: Setting | None = None, progress: Progress | None = None
) -> BenchReport:
    """Measure a training step of the networks of chapter 12 against the dense one's, and its search once.

    Steps are those of the runs, with their batch size and weight decay, on random images. Modes are the variants
    "narrower dense", "selected" (from scratch) and "switched", at half of the parameters, with the plans of the stored
    records. ``config`` has the ``search_seconds``, ``steps_per_epoch``, ``epochs`` and the ``epoch`` of the switch.

    Raises:
        ValueError: where no record of these variants is stored, or for a setting that makes no sense.
    """
    records = [*valid_records(switch.STUDY, profile), *valid_records(headline.STUDY, profile)]
    if missing := {SCRATCH, SWITCHED} - {record.config["variant"] for record in records}:
        raise ValueError(f"no record of {' and '.join(sorted(missing))} is stored in the profile {profile!r}")
    base = switch.STUDY.runs(profile)[0]
    setting = setting or Setting()
    with setting.globals():
        dense: nn.Module = build(base.model, width=base.width)
        thin = build(base.model, width=headline.STAGES[profile][headline.HALF])
    setting = replace(setting, batch_size=base.recipe.batch_size).settled(dense)
    plain, product = base.recipe.before_switch, base.recipe.after_switch
    plans = {name: result_of(records, name)["plan"] for name in (SCRATCH, SWITCHED)}
    with setting.globals():
        made = {"dense": (dense, plain), "control": (copy.deepcopy(dense), plain), NARROWER: (thin, plain)}
        made |= {name: (substitute(dense, plan, init="random"), product if name == SWITCHED else plain)
                 for name, plan in plans.items()}  # fmt: skip
        x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
        labels = torch.randint(10, (setting.batch_size,), device=x.device)
        steps = {name: make_step(network, recipe, device=setting.where) for name, (network, recipe) in made.items()}
        measured = setting.measure({name: partial(step, x, labels) for name, step in steps.items()})
        search = _search_seconds(dense, base, setting)
    rows = []
    for name, values in measured.items():
        row: dict[str, Any] = {"model": base.model, "mode": name, "pass": "step", **values}
        rows.append(row | {"macs": cost(made[name][0], (3, 32, 32), mode="factorized").total.forward_macs})
        tell(progress, rows[-1])
    about = {"profile": profile, "search_seconds": search, "epochs": base.recipe.epochs}
    about |= {"epoch": result_of(records, SWITCHED)["switched"]["epoch"]}
    about |= {"steps_per_epoch": steps_of(base)["steps_per_epoch"]}
    return setting.report("bench-switch", rows, model=base.model, width=base.width, **about)


def _search_seconds(dense: nn.Module, run: Run, setting: Setting) -> float:
    """Seconds of one search and replacement on random images."""
    chosen: Any = run.recipe.switch
    x = torch.randint(256, (chosen.images, 32, 32, 3), dtype=torch.uint8, device=setting.where)
    split = Images(x, torch.randint(10, (len(x),), device=x.device))
    model = setting.place(copy.deepcopy(dense))
    began = time.perf_counter()
    chosen.replace(model, Data("random", split, split, split), [{}])
    return time.perf_counter() - began
