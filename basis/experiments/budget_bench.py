"""Plans that were chosen for milliseconds, measured: is the network as fast as the budget asked for?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from basis.bench.networks import NORMS, Norms, bench_training
from basis.bench.report import BenchReport
from basis.bench.timing import Pass, Progress, Setting, layer_steps, tell
from basis.bench.tuning import bench_latency
from basis.costs import count_parameters
from basis.inference import fold, measure_fold
from basis.models import build
from basis.search.selection import InfeasibleBudget, predicted, select
from basis.search.sensitivity import sensitivity
from basis.search.table import SensitivityTable
from basis.substitution import Plan, substitute
from basis.training.stepping import Step

CANDIDATE_RATIOS = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
SHARES = (0.8, 0.6, 0.4)


def bench_budget(
    *,
    model: str = "resnet18",
    width: int | None = None,
    shares: Sequence[float] = SHARES,
    ratios: Sequence[float] = CANDIDATE_RATIOS,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure the forward pass of networks that were selected to take a share of the convolutions' milliseconds.

    Every layer is timed alone (:func:`bench_latency`); for each share :func:`basis.select` finds the plan, by the
    spectrum of the weights, and the network is folded, with pairs where :func:`measure_fold` finds them faster. Modes
    are "dense folded" and "selected". Rows of "selected" have ``predicted``, the share that the layers alone add up
    to, ``parameters`` as a share of the dense network's, and ``layers`` and ``pairs``, how many there are.

    Raises:
        InfeasibleBudget: where no share can be reached; otherwise those out of reach stand in ``config["beyond"]``.
        ValueError: for an unknown model, or a share, ratio or setting that makes no sense.
    """
    dense, setting, table = _start(model, width, shares, ratios, setting)
    dense.eval()
    times = bench_latency(dense, ratios=ratios, passes=("forward",), setting=setting, progress=progress)
    plans, beyond = _plans(table, times, shares, "forward")
    rows: list[dict[str, Any]] = []
    for share, plan in plans.items():
        with setting.globals():
            small = substitute(dense, plan, init="random").eval()
            pairs = measure_fold(setting.place(small), setting=setting).faster() if plan.layers else ()
            networks = {"dense": dense, "control": copy.deepcopy(dense), "dense folded": fold(dense)}
            networks |= {"selected": fold(small, factorized=pairs)}
            placed = {name: setting.place(network) for name, network in networks.items()}
            measured = setting.measure(layer_steps(placed, [(3, 32, 32)], "forward", setting))
        about = {"predicted": predicted(table, plan, times, step="forward")["milliseconds"], "pairs": len(pairs)}
        about |= {"parameters": count_parameters(small) / count_parameters(dense), "layers": len(plan.layers)}
        for name, values in measured.items():
            row = {"model": model, "pass": "forward", "share": share, "mode": name, **values}
            rows.append(row | (about if name == "selected" else {}))
            tell(progress, rows[-1], model)
    options = {"model": model, "width": width, "shares": list(plans), "beyond": beyond, "ratios": list(ratios)}
    return setting.report("bench-budget", rows, **options)


def bench_plans(
    *,
    model: str = "resnet18",
    width: int | None = None,
    shares: Sequence[float] = SHARES,
    ratios: Sequence[float] = CANDIDATE_RATIOS,
    norms: Sequence[Norms] = NORMS,
    steps: Sequence[Step] = ("graphed",),
    smallest: bool = False,
    latency: BenchReport | None = None,
    setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure whole training steps of networks that were selected to take a share of the milliseconds of a step.

    As :func:`bench_budget`, but layers count with their backward pass. ``layers`` is the plan.

    Args:
        smallest: in place of the shares out of reach measure the smallest one that can be met.
        latency: of the network, forward and backward; measured unless given.

    Raises:
        InfeasibleBudget, ValueError: as :func:`bench_budget`.
    """
    dense, setting, table = _start(model, width, shares, ratios, setting)
    one: Pass = "forward+backward"
    latency = latency or bench_latency(dense, ratios=ratios, passes=(one,), setting=setting, progress=progress)
    plans, beyond = _plans(table, latency, shares, one, smallest=smallest)
    report = bench_training(
        model=model, width=width, plans=plans, norms=norms, steps=steps, setting=setting, progress=progress
    )
    about = {
        share: {"predicted": predicted(table, plan, latency, step=one)["milliseconds"], "layers": dict(plan.layers)}
        for share, plan in plans.items()
    }
    rows = [{**row, **(about[row["share"]] if row["mode"] == "auto" else {})} for row in report.rows]
    return replace(report, config={**report.config, "beyond": beyond, "candidates": list(ratios)}, rows=rows)


def _start(
    model: str, width: int | None, shares: Sequence[float], ratios: Sequence[float], setting: Setting | None
) -> tuple[nn.Module, Setting, SensitivityTable]:
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"a share is {share}, but must be in (0, 1]")
    setting = setting or Setting()
    with setting.globals():
        dense = build(model, width=width)
    return dense, setting.settled(dense), sensitivity(dense, measure="spectrum", ratios=ratios)


def _plans(
    table: SensitivityTable, times: BenchReport, shares: Sequence[float], one: Pass, *, smallest: bool = False
) -> tuple[Mapping[float, Plan], list[float]]:
    """The plan of each share, and the shares out of reach; raises ``InfeasibleBudget`` where all are."""
    plans: dict[float, Plan] = {}
    beyond: dict[float, InfeasibleBudget] = {}
    for share in shares:
        try:
            plans[share] = select(table, budget={"milliseconds": share}, latency=times, step=one)
        except InfeasibleBudget as error:
            beyond[share] = error
    for refused in list(beyond.values())[:1] if smallest else ():
        least = math.ceil(refused.fractions["milliseconds"] * 1e4) / 1e4
        if least < 1:
            plans[least] = select(table, budget={"milliseconds": least}, latency=times, step=one)
    if beyond and not plans:
        raise beyond[max(beyond)]
    return plans, list(beyond)
