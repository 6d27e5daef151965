"""Speed of whole training steps: networks of basis layers against the dense one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from basis.bench.cells import Cell, Row, measure_cells, with_pytorchs_norms
from basis.bench.report import BenchReport
from basis.bench.shapes import RATIOS
from basis.bench.timing import PeakCapture, Progress, Setting, Step
from basis.bench.tuning import tune, use_modes
from basis.costs import count_parameters
from basis.layers.batchnorm import couple_in_place
from basis.layers.conv import BasisConv2d, Mode
from basis.models import build
from basis.substitution import Plan, substitute
from basis.training.loop import Recipe, make_step
from basis.training.skipping import Parts, Trained
from basis.training.stepping import Capture, TrainingStep, means_for
from basis.training.stepping import Step as Stepping

STEPS: tuple[Stepping, ...] = get_args(Stepping)
# PyTorch's batch normalisation; ours, fused where the device can; through the basis; what :func:`tune` finds fastest.
Norms = Literal["ordinary", "fused", "through_basis", "tuned"]
NORMS: tuple[Norms, ...] = get_args(Norms)
TUNING_SECONDS = 0.4  # of rounds for each layer, for "tuned"
# What a training step may train of the basis layers; everything else is always trained.
TRAINED: Mapping[str, Trained] = {
    "both": Trained(basis=True, coefficients=True),
    "basis": Trained(basis=True, coefficients=False),
    "coefficients": Trained(basis=False, coefficients=True),
    "neither": Trained(basis=False, coefficients=False),
}


@dataclass(frozen=True, kw_only=True)
class TrainingCell(Cell):
    """Networks whose whole training steps (forward, loss, backward, SGD) are measured, on random images 3x32x32.

    ``rows`` has the kind of ``step`` of each, eager unless given. A candidate is compared with the dense network by the
    same kind of step, "dense X", where there is one; where only one of the two could be made that kind, it has failed.
    """

    def measure(self, modules: Mapping[str, nn.Module], setting: Setting) -> dict[str, Row]:
        """Rows have ``means`` (what the kind of step came to on this device), and how many layers are ``coupled`` (norm
        through the basis) and otherwise ``factorized``. The peak of a CUDA graph is that of its capture.
        """
        kinds: dict[str, Stepping] = {name: self.rows.get(name, {}).get("step", "eager") for name in modules}
        x = setting.place(torch.randn(setting.batch_size, 3, 32, 32))
        labels = torch.randint(10, (setting.batch_size,), device=x.device)
        captures = {
            name: PeakCapture(setting.where, setting.new_capture())
            for name, kind in kinds.items()
            if means_for(kind, setting.where).graphed and setting.captures
        }
        trainers = {name: trainer_of(net, setting, kinds[name], captures.get(name)) for name, net in modules.items()}
        references = {name: other for name, kind in kinds.items() if (other := f"dense {kind}") in kinds}
        references |= {name: "dense" for name in kinds if name in references.values()}
        compiled = next((name for name in kinds if name in ("dense compiled", "dense fast")), None)
        measured = setting.measure(
            {name: _step(trainer, x, labels) for name, trainer in trainers.items()},
            reference=references,
            versus=dict.fromkeys(kinds, compiled) if compiled else {},
            may_fail=[name for name in kinds if name != "dense"],
        )
        known = compiled is not None and trainers[compiled].means.compiled
        for name, row in measured.items():
            other = references.get(name, "dense")
            means, others = trainers[name].means, trainers[other].means
            if kinds[name] == kinds[other] and means.graphed != others.graphed and "error" not in row:
                row = {"error": f"its step is {means}, that of the dense network {others}"}
            versus = {f"versus_compiled{key[12:]}": row.pop(key) for key in list(row) if key.startswith("versus_basis")}
            if "ms" in row:
                row |= versus if known else {}
                row |= {"timed": "graph"} if "timed" in row and means.graphed else {}
                for key, side in (("peak_mib", name), ("dense_peak_mib", other)):
                    row |= {key: captures[side].peak / 2**20} if trainers[side].means.graphed else {}
            measured[name] = {**row, "means": str(means), **_counts(modules[name])}
        return measured


def bench_training(
    *, model: str = "resnet18", width: int | None = None, ratios: Sequence[float] = RATIOS,
    plans: Mapping[float, Plan] | None = None, modes: Sequence[Mode] = ("auto",),
    coefficients: Sequence[str] = ("dense",), trained: Sequence[str] = ("both",),
    norms: Sequence[Norms] | None = None, steps: Sequence[Stepping] = ("eager",),
    dense_steps: Sequence[Stepping] = (), tables: Mapping[float, BenchReport] | None = None,
    setting: Setting | None = None, progress: Progress | None = None,
) -> BenchReport:  # fmt: skip
    """Measure training steps of a network of :func:`basis.models.build`, see :class:`TrainingCell`.

    A cell is a ratio, at which all eligible convolutions are substituted; its candidates are the combinations of
    mode, coefficients, trained parts, norms and steps.

    Args:
        plans: in place of ``ratios``: the share of a budget -> plan; the report is of kind "bench-plans" then.
        coefficients: forms of the coefficient matrix, see :class:`basis.layers.coefficients.Form`.
        trained: what a step trains of the basis layers, of :data:`TRAINED`.
        norms: of :data:`NORMS`; "fused" on a GPU unless given. Where the dense network is fused, too, and "ordinary" is
            among them, an ordinary dense one is a candidate.
        tables: ratio or share -> the report by which :func:`use_modes` makes "tuned"; measured unless given.
        steps: "eager", "compiled", "graphed" or "fast" (:mod:`basis.training.stepping`).
        dense_steps: further kinds of step of the dense network; a compiled one gives rows ``versus_compiled``.

    Raises ``ValueError`` for an unknown model, or a ratio, plan, form or setting that makes no sense.
    """
    setting = setting or Setting()
    norms = norms or (("fused",) if setting.where.type == "cuda" else ("ordinary",))
    usual: Norms = "fused" if "fused" in norms or setting.where.type == "cuda" else "ordinary"
    what = "ratio" if plans is None else "share"
    sizes: dict[float, dict[str, Any]] = {r: {"ratio": r} for r in ratios}
    if plans is not None:
        sizes = {share: {"plan": plan} for share, plan in plans.items()}
    with torch.device("meta"):
        shape = build(model, width=width)
    for size, form in itertools.product(sizes.values(), coefficients):  # refused before any is measured
        substitute(shape, **size, init="random", coefficients=form)
    with setting.globals():
        dense = build(model, width=width)
    setting = setting.settled(dense)
    plain = {"coefficients": "", "trained": "both", "norms": usual}
    rows: dict[str, dict[str, Any]] = {name: {**plain, "step": steps[0]} for name in ("dense", "control")}
    others = [step for step in [*steps, *dense_steps] if step != steps[0]]
    rows |= {f"dense {step}": {**plain, "mode": "dense", "step": step} for step in others}
    if "ordinary" in norms and usual != "ordinary":
        rows["dense ordinary"] = {**plain, "norms": "ordinary", "mode": "dense", "step": steps[0]}
    for kind in itertools.product(modes, coefficients, trained, norms, steps):
        rows[" ".join(kind)] = dict(zip(("mode", *plain, "step"), kind, strict=True))
    cells = []
    for value, size in sizes.items():
        make = partial(_candidate, dense, size, setting, (tables or {}).get(value))
        makes = {name: partial(make, row) for name, row in rows.items() if name != "control"}
        cells.append(TrainingCell(about={"model": model, what: value}, candidates=makes, rows=rows))
    listed: dict[str, Iterable[Any]] = {f"{what}s": sizes, "modes": modes, "coefficients": coefficients}
    listed |= {"trained": trained, "norms": norms, "steps": steps, "dense_steps": dense_steps}
    options = {"model": model, "width": width, **{name: list(values) for name, values in listed.items()}}
    found = measure_cells(cells, setting, progress)
    return setting.report(f"bench-{'train' if plans is None else 'plans'}", found, **options)


def _candidate(
    dense: nn.Module, size: Mapping[str, Any], setting: Setting, table: BenchReport | None, row: Mapping[str, Any]
) -> nn.Module:
    norms = row["norms"]
    if not row["coefficients"]:
        network = copy.deepcopy(dense)
    else:
        options: Any = {"mode": row["mode"], "coefficients": row["coefficients"]}
        network = substitute(dense, **size, init="random", **options)
        network = couple_in_place(network) if norms == "through_basis" else network
        Parts(network).train(TRAINED[row["trained"]])
    if norms == "tuned":
        use_modes(network, table or tune(network, setting=replace(setting, seconds=TUNING_SECONDS)))
    return with_pytorchs_norms(network) if norms == "ordinary" else network


def _counts(network: nn.Module) -> dict[str, int]:
    ways = [(m.mixed_later, m.resolved_mode) for m in network.modules() if isinstance(m, BasisConv2d)]
    coupled, factorized = sum(later for later, _ in ways), ways.count((False, "factorized"))
    return {"parameters": count_parameters(network), "coupled": coupled, "factorized": factorized}


def trainer_of(
    network: nn.Module, setting: Setting, step: Stepping = "eager", capture: Capture | None = None
) -> TrainingStep:
    """The training step of a network that is placed, as benchmarks time it."""
    # A learning rate at which no network diverges: infinities and denormals have other speeds.
    recipe = Recipe(lr=1e-3, step=step, precision=setting.precision, memory_format=setting.memory_format)
    return make_step(network, recipe, device=setting.where, capture=capture)


def _step(trainer: TrainingStep, x: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        trainer(x, labels)
        if not trainer.means.graphed:  # a graph keeps its gradients where it has captured them
            trainer.optimizer.zero_grad()

    return step
