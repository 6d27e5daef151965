"""Plans that were chosen for milliseconds, measured: is the network as fast as the budget asked for?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from basis.bench.networks import Norms, bench_training
from basis.bench.report import BenchReport
from basis.bench.timing import Pass, Progress, Setting
from basis.bench.tuning import bench_latency
from basis.costs import count_parameters
from basis.inference import bench_inference
from basis.models import build
from basis.search.selection import InfeasibleBudget, predicted, select
from basis.search.sensitivity import sensitivity
from basis.search.table import SensitivityTable
from basis.substitution import Plan, substitute


def bench_budget(
    *, model: str = "resnet18", width: int | None = None, shares: Sequence[float] = (0.8, 0.6, 0.4),
    ratios: Sequence[float] = (3 / 4, 1 / 2, 1 / 4, 1 / 8), one: Pass = "forward",
    smallest: bool = False, latency: BenchReport | None = None, setting: Setting | None = None,
    progress: Progress | None = None,
) -> BenchReport:  # fmt: skip
    """Measure networks that were selected to take a share of the milliseconds that the dense convolutions take.

    Every layer is timed alone (:func:`bench_latency`); for each share :func:`basis.select` finds the plan, by the
    spectrum of the weights. For the forward pass the networks are those of :func:`bench_inference`, where "selected" is
    "folded, pairs": rows have ``parameters`` as a share of the dense network's, and ``layers`` and ``pairs``, how many
    there are. With the backward pass whole graphed training steps are measured, by :func:`bench_training`, and
    ``layers`` is the plan; where they are captured in mode auto ("fused"), and with each layer in the way that
    its latencies found fastest ("tuned"). Either way ``predicted`` is the share that the layers alone add up to.

    Args:
        one: the pass; reports of "forward+backward" are of kind "bench-plans".
        smallest: in place of the shares out of reach measure the smallest one that can be met.
        latency: of the network, in that pass; measured unless given.

    Raises:
        InfeasibleBudget: where no share can be reached; otherwise those out of reach stand in ``config["beyond"]``.
        ValueError: for an unknown model, or a share, ratio or setting that makes no sense.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"a share is {share}, but must be in (0, 1]")
    setting = setting or Setting()
    with setting.globals():
        dense = build(model, width=width).train(one != "forward")
    setting = setting.settled(dense)
    table = sensitivity(dense, measure="spectrum", ratios=ratios)
    times = latency or bench_latency(dense, ratios=ratios, passes=(one,), setting=setting, progress=progress)
    plans, beyond = _plans(table, times, shares, one, smallest=smallest)
    more: dict[float, dict[str, Any]] = {}
    for share, plan in plans.items():
        more[share] = {"predicted": predicted(table, plan, times, step=one)["milliseconds"]}
        if one == "forward":
            small = substitute(dense, plan, init="random")
            more[share]["parameters"] = count_parameters(small) / count_parameters(dense)
        else:
            more[share]["layers"] = dict(plan.layers)
    given: Any = {"model": model, "width": width, "plans": plans, "setting": setting, "progress": progress}
    if one == "forward":
        report = replace(bench_inference(**given, ratios=()), kind="bench-budget")
        rows = [row for row in report.rows if row["mode"] not in ("auto", "folded")]
        rows = [{**row, "mode": "selected"} if row["mode"] == "folded, pairs" else row for row in rows]
    else:
        norms: tuple[Norms, ...] = ("fused", "tuned") if setting.captures else ("ordinary", "through_basis")
        tables = {share: _ways(times, plan, one) for share, plan in plans.items()}
        report = bench_training(**given, norms=norms, steps=("graphed",), tables=tables)
        rows = list(report.rows)
    rows = [{**row, **(more[row["share"]] if row["mode"] in ("auto", "selected") else {})} for row in rows]
    return replace(report, config={**report.config, "beyond": beyond, "candidates": list(ratios)}, rows=rows)


def _ways(times: BenchReport, plan: Plan, one: Pass) -> BenchReport:
    """What a report of latencies says of the layers of ``plan``, as a table for :func:`basis.use_modes`."""
    rows = [row for row in times.rows if row["pass"] == one and plan.layers.get(row["layer"]) == row["basis_channels"]]
    return replace(times, kind="bench-modes", rows=[{**row, "mode": row["resolved"]} for row in rows])


def _plans(
    table: SensitivityTable, times: BenchReport, shares: Sequence[float], one: Pass, *, smallest: bool
) -> tuple[Mapping[float, Plan], list[float]]:
    """The plan of each share, and the shares out of reach; raises ``InfeasibleBudget`` where all are."""
    plans: dict[float, Plan] = {}
    beyond: dict[float, InfeasibleBudget] = {}
    for share in shares:
        try:
            plans[share] = select(table, budget={"milliseconds": share}, latency=times, step=one)
        except InfeasibleBudget as error:
            beyond[share] = error
    if smallest and beyond:
        least = math.ceil(next(iter(beyond.values())).fractions["milliseconds"] * 1e4) / 1e4
        if least < 1:
            plans[least] = select(table, budget={"milliseconds": least}, latency=times, step=one)
    if beyond and not plans:
        raise beyond[max(beyond)]
    return plans, list(beyond)
