"""From a trained network to a smaller one, in stages: the work behind ``basis compress``.

Every stage leaves what it found in the folder of the run (:mod:`basis.compression.workplace`), so that a run which was interrupted
goes on where it was. Layers are chosen on images held out from the training images; the test images are looked at for
the last numbers only.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from basis.bench.timing import BenchReport, Setting, layer_steps
from basis.bench.tuning import bench_latency
from basis.compression.facts import as_json, facts_of
from basis.compression.images import Split, check_images
from basis.compression.job import Job, Say, Settings, absolute, check_budget, prepare, total_of
from basis.compression.report import render
from basis.costs import cost
from basis.environment import environment
from basis.inference import Exported, export_onnx, export_program, fold, measure_fold
from basis.layers.conv import BasisConv2d
from basis.saving import replacing
from basis.search.selection import select
from basis.search.sensitivity import sensitivity
from basis.search.table import SensitivityTable
from basis.statistics import mean_estimate, proportion_estimate
from basis.storage import load, save
from basis.substitution import Plan, substitute
from basis.training.finetuning import finetune
from basis.training.recalibration import recalibrate

# The measures that replace layers as they will be replaced: fitted to their outputs on the calibration images.
FITTED = ("taylor", "fisher", "oneshot", "oneshot_bn")

Stage = dict[str, Any]  # what a stage found, with its seconds


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What :func:`compress` made.

    Attributes:
        folder: where everything is.
        model: the small network, of basis convolutions, in evaluation mode.
        plan: what was replaced, and why the rest was not.
        report: every number, as in ``report.json``.
    """

    folder: Path
    model: nn.Module
    plan: Plan
    report: Mapping[str, Any]

    def __str__(self) -> str:
        params, macs = (self.report["cost"][unit]["ratio"] for unit in ("params", "macs"))
        rows = self.report["latency"]["rows"]
        last = [_percent(row) for row in self.report["accuracy"] if row["images"] == "test"]
        return (
            f"{self.report['replaced']} of {self.report['convolutions']} convolutions replaced: {params:.1%} of the "
            f"parameters, {macs:.1%} of the MACs; test accuracy {last[0]} before, {last[1]} after; "
            f"{rows['exported']['speedup']:.2f} times as fast; all of it in {self.folder}"
        )


def compress(settings: Settings, *, say: Say | None = None, command: str = "") -> Compressed:
    """Find the layers that can take it, replace, repair and measure them, and export the network.

    ``settings.out`` receives ``plan.json`` and ``model.safetensors`` (for :func:`basis.load`), ``model.onnx`` and
    ``model.pt2``, which were run and compared with the network, ``sensitivity.jsonl``, ``report.json`` and
    ``report.html``. Called again with the same settings it goes on where it was.

    Args:
        say: is told what is going on; with it, bars are drawn too.
        command: what a user typed, for the report.

    Raises:
        ValueError: for input that is wrong, before any long work: see :func:`basis.compression.job.prepare`.
        InfeasibleBudget: for a budget that no choice of layers meets.
    """
    job = prepare(settings, say=say)
    with job.place.held():
        if job.place.done("dense") is None:
            check_pictures(job)
        job.place.begin()
        dense = evaluate_dense(job)
        times, timed = time_layers(job)
        table, analysed = analyse(job, dense)
        plan, chosen = choose(job, table, times)
        small, repaired = repair(job, plan)
        small, tuned = tune_finely(job, small)
        last = evaluate_last(job, small)
        form = choose_form(job, small)
        latency = time_networks(job, small, form)
        exported = export(job, small, form)
        stages = {"dense": dense, "sensitivity": analysed, "layer times": timed, "selection": chosen}
        stages |= {"repair": repaired, "fine-tuning": tuned, "last numbers": last, "form": form}
        stages |= {"latency": latency, "export": exported}
        report = write(job, small, table, plan, stages, command)
    return Compressed(folder=job.out, model=small, plan=plan, report=report)


# -- the stages -------------------------------------------------------------------------------------


def check_pictures(job: Job) -> None:
    """Decode every image that will be used, before any is; :func:`basis.compression.images.check_images` names those that fail."""
    used = [job.validation, job.pictures.test, job.pictures.train if job.settings.epochs else job.calibration]
    if any(split.files for split in used):
        check_images(used, progress=partial(_bar, job, what="reading every image once"))


def evaluate_dense(job: Job) -> Stage:
    """The accuracy of the dense network on the held out images."""

    def work() -> Stage:
        rows, _ = _accuracies(job, job.validation, dense=job.model)
        told = (
            "the dense network is hardly better than guessing; do the weights, the order of the classes, and --mean "
            "and --std fit these data?"
        )
        guessing = rows[0]["low"] <= 1 / len(job.pictures.classes)
        return {"accuracy": rows, "warnings": [told] if guessing else []}

    found = job.place.stage("dense", work)
    (row,) = found["accuracy"]
    job.say(f"dense network: {_percent(row)} right of {row['n']:,} held out images")
    _warn(job, found)
    return found


def analyse(job: Job, dense: Stage) -> tuple[SensitivityTable, Stage]:
    """What each layer loses alone, on the held out images; every measurement is kept as it is made."""
    s, path = job.settings, job.out / "sensitivity.jsonl"
    given = s.table is not None and not path.exists()
    fitted = job.measure in FITTED
    if job.place.done("sensitivity") is None and job.measure.startswith("oneshot"):
        images = len(job.scored) + (len(job.calibration) if job.measure == "oneshot_bn" else 0)
        (row,) = dense["accuracy"]  # replacing a layer, the half behind it is run again, more or less
        minutes = len(job.candidates.candidates) * images / 2 * row["seconds"] / row["n"] / 60
        if minutes > 2:
            job.say(
                f"sensitivity: {len(job.candidates.candidates)} candidates, in about {minutes:,.0f} min; the measure "
                "fisher takes one pass forward and backward"
            )

    def measure() -> SensitivityTable:
        if given:
            with replacing(path) as file:
                file.write(Path(str(s.table)).read_bytes())
        return sensitivity(
            job.model, list(job.loader(job.scored)), measure=job.measure, ratios=tuple(s.ratios), multiple=s.multiple,
            include=tuple(s.include), exclude=tuple(s.exclude), resume=path,
            calibration=[x for x, _ in job.loader(job.calibration)] if fitted else None,
            fit="activation" if fitted else "weight",
            progress="sensitivity of layers" if job.progress else None,
        )  # fmt: skip

    try:
        found = job.place.stage("sensitivity", lambda: {"cells": len(measure().cells)})
    except ValueError as error:
        if given:  # it was measured on other images
            path.unlink(missing_ok=True)
            why = str(error).partition(";")[0].replace(str(path), "it")
            raise ValueError(f"the table {s.table} cannot be gone on from: {why}") from error
        raise
    table = SensitivityTable.load(path)
    job.say(f"sensitivity: {len(table.cells)} candidates of {len(table.layers)} layers by {table.measure}")
    return table, found


def time_layers(job: Job) -> tuple[BenchReport | None, Stage]:
    """The milliseconds of every layer with every k, for a budget in them."""
    if "milliseconds" not in job.settings.budget:
        return None, {}
    path, s = job.out / "layers.json", job.settings

    def measure() -> Stage:
        report = bench_latency(
            job.model, input_size=job.input_size, ratios=tuple(s.ratios), multiple=s.multiple, passes=("forward",),
            setting=job.setting, progress=job.say, name=s.model,
        )  # fmt: skip
        report.save(path)
        return {"layers": len({row["layer"] for row in report.rows})}

    found = job.place.stage("times", measure)
    times = BenchReport.load(path)
    check_budget(job, times)
    return times, found


def choose(job: Job, table: SensitivityTable, times: BenchReport | None) -> tuple[Plan, Stage]:
    """The plan of the smallest sum of sensitivities within the budget."""
    totals = {**table.total, **({} if times is None else total_of(times))}

    def work() -> Stage:
        budget = absolute(job.settings.budget, totals)
        plan = select(table, budget=budget, absolute=True, latency=times, step="forward")
        share = {unit: value / (totals[unit] or math.nan) for unit, value in budget.items()}
        return {"budget": share, "plan": json.loads(plan.to_json())}

    found = job.place.stage("selection", work)
    plan = Plan.from_json(json.dumps(found["plan"]))
    plan.save(job.out / "plan.json")
    job.say(f"selection: {len(plan.layers)} layers are replaced, {len(plan.skipped)} stay as they are")
    return plan, found


def repair(job: Job, plan: Plan) -> tuple[nn.Module, Stage]:
    """The network with its layers replaced, fitted to what they give on the calibration images."""
    folder = job.out / "stages" / "repaired"

    def work() -> Stage:
        inputs = [x for x, _ in job.loader(job.calibration)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small = substitute(job.model, plan, calibration=inputs).eval()
        rows, _ = _accuracies(job, job.validation, replaced=small)
        if recalibrate(small, inputs).norms:
            rows += _accuracies(job, job.validation, recalibrated=small)[0]
        save(small, folder)
        return {"accuracy": rows, "warnings": list(dict.fromkeys(str(one.message) for one in caught))}

    found = job.place.stage("repair", work)
    _warn(job, found)
    for row in found["accuracy"]:
        job.say(f"{row['stage']}: {_percent(row)} right of the held out images")
    return _held(job, folder), found


def tune_finely(job: Job, small: nn.Module) -> tuple[nn.Module, Stage]:
    """The network after a few epochs on the training images; its checkpoint goes away when it is done."""
    s = job.settings
    if not s.epochs:
        return small, {}
    folder, checkpoint = job.out / "stages" / "tuned", job.out / "stages" / "finetuning.pt"

    def work() -> Stage:
        result = finetune(
            small, job.loader(job.pictures.train, augment=True), teacher=job.model if s.distil else None,
            epochs=s.epochs, lr=s.lr, checkpoint=checkpoint, progress="fine-tuning" if job.progress else False,
        )  # fmt: skip
        small.eval()
        save(small, folder)
        rows, _ = _accuracies(job, job.validation, **{"fine-tuned": small})
        return {"accuracy": rows, "curves": list(result.curves)}

    found = job.place.stage("tuning", work)
    checkpoint.unlink(missing_ok=True)
    (row,) = found["accuracy"]
    job.say(f"fine-tuned: {_percent(row)} right of the held out images")
    return _held(job, folder), found


def evaluate_last(job: Job, small: nn.Module) -> Stage:
    """The accuracy of both networks on the test images, which nothing has seen before."""

    def work() -> Stage:
        rows, change = _accuracies(job, job.pictures.test, dense=job.model, compressed=small)
        return {"accuracy": rows, "change": change}

    found = job.place.stage("last", work)
    before, after = found["accuracy"]
    job.say(f"last numbers: {_percent(before)} right before, {_percent(after)} after, of {after['n']:,} test images")
    return found


def choose_form(job: Job, small: nn.Module) -> Stage:
    """Which replaced layers are exported as a pair of convolutions, and which as one dense convolution.

    A pair is smaller; where the budget is in milliseconds, it is taken only where it was measured to be faster.
    """

    def work() -> Stage:
        names = [name for name, module in small.named_modules() if isinstance(module, BasisConv2d)]
        if not names:
            return {"pairs": [], "faster": []}
        report = measure_fold(small, input_size=job.input_size, setting=job.setting, progress=job.say)
        faster = list(report.faster())
        return {"pairs": faster if "milliseconds" in job.settings.budget else names, "faster": faster}

    return job.place.stage("form", work)


def time_networks(job: Job, small: nn.Module, form: Stage) -> Stage:
    """Whole networks by turns, at the batch size and on the device of the job."""

    def work() -> Stage:
        setting = job.setting.settled(job.model)
        pairs = fold(small, factorized=form["pairs"])
        networks = {"as given": copy.deepcopy(job.model), "as given, again": copy.deepcopy(job.model)}
        networks |= {"folded": fold(job.model)}
        networks |= {"exported": pairs}
        if form["faster"] != form["pairs"]:
            networks["fastest"] = fold(small, factorized=form["faster"])
        with setting.globals():
            placed = {name: setting.place(network) for name, network in networks.items()}
            steps = layer_steps({"dense": job.model, **placed}, [job.input_size], "forward", setting)
            del steps["dense"]  # it told the shape of the outputs
            rows = setting.measure(steps, reference=dict.fromkeys(steps, "as given"))
        slower = rows["exported"]["speedup_q3"] < 1
        told = "in the exported form the network is slower here than it was; a budget in milliseconds would mind that"
        return {
            "rows": rows, "setting": _plain_setting(setting), "environment": environment(job.device),
            "warnings": [told] if slower else [],
        }  # fmt: skip

    job.say("latency: whole networks by turns")
    found = job.place.stage("latency", work)
    given, exported = found["rows"]["as given"], found["rows"]["exported"]
    job.say(f"latency: {given['ms']:.3g} ms before, {exported['ms']:.3g} ms exported, a batch of "
            f"{job.settings.batch_size}: {exported['speedup']:.2f} times as fast "
            f"[{exported['speedup_q1']:.2f}, {exported['speedup_q3']:.2f}]")  # fmt: skip
    _warn(job, found)
    return found


def export(job: Job, small: nn.Module, form: Stage) -> Stage:
    """Write the weights, the ONNX file and the program; both were run and compared with the network."""

    def work() -> Stage:
        save(small, job.out)
        plain = fold(small, factorized=form["pairs"]).cpu()
        files, failed = [], dict(job.left_out)
        writers: dict[str, tuple[str, Callable[..., Exported]]] = {
            "ONNX": ("model.onnx", export_onnx), "torch.export": ("model.pt2", export_program),
        }  # fmt: skip
        for what, (name, writer) in writers.items():
            if what in failed:
                continue
            job.say(f"export: {name}")
            try:
                files.append(_written(job, plain, what, name, writer))
            except (RuntimeError, ValueError) as error:  # other people's exporters and layers: the rest is not lost
                failed[what] = str(error)
                job.say(f"left out: {what}, since {error}")
        x = next(iter(job.loader(job.scored)))[0]
        with torch.no_grad():
            wanted = small(x).cpu()
            apart = (plain(x.cpu()) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        return {"files": files, "left_out": failed, "apart": apart.item()}

    return job.place.stage("export", work)


def _written(job: Job, plain: nn.Module, what: str, name: str, writer: Callable[..., Exported]) -> dict[str, Any]:
    """One exported file, for any number of images, or where that fails for the batch size of the job."""
    sizes: tuple[Any, ...] = ("dynamic", job.settings.batch_size)
    for batch in sizes:
        try:
            made = writer(plain, job.out / name, job.input_size, batch=batch, overwrite=True)
            break
        except RuntimeError:
            if batch == sizes[-1]:
                raise
    return {
        "name": name, "what": what, "batch": batch, "batches": list(made.batches), "error": made.error,
        "bytes": made.path.stat().st_size,
    }  # fmt: skip


def write(
    job: Job, small: nn.Module, table: SensitivityTable, plan: Plan, stages: Mapping[str, Stage], command: str
) -> dict[str, Any]:
    """The report, as JSON and as a page; what only an unfinished run needs goes away."""
    plan.save(job.out / "plan.json")  # once more, since save() knows no reasons
    costs = {name: cost(model, job.input_size).total for name, model in (("dense", job.model), ("compressed", small))}
    report = facts_of(job, table, plan, costs, stages, command)
    with replacing(job.out / "report.json") as file:
        file.write(as_json(report))
    with replacing(job.out / "report.html") as file:
        file.write(render(report, table).encode())
    for name in ("repaired", "tuned"):
        shutil.rmtree(job.out / "stages" / name, ignore_errors=True)
    job.say(f"the report is at {(job.out / 'report.html').absolute()}")
    return report


# -- shared by stages -------------------------------------------------------------------------------


def _accuracies(job: Job, split: Split, **networks: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """A row for each network, and of two the change from the first to the second, paired image by image."""
    began = time.perf_counter()
    losses: dict[str, list[Tensor]] = {name: [] for name in networks}
    right: dict[str, list[Tensor]] = {name: [] for name in networks}
    with torch.no_grad():
        for x, y in _bar(job, job.loader(split), what=f"evaluating {' and '.join(networks)}"):
            for name, model in networks.items():
                logits = model(x).float()
                losses[name].append(F.cross_entropy(logits, y, reduction="none"))
                right[name].append(logits.argmax(1) == y)
    seconds = (time.perf_counter() - began) / len(networks)
    hits = {name: torch.cat(parts).double().cpu() for name, parts in right.items()}
    rows = []
    for name, own in hits.items():
        share = proportion_estimate(own.sum().item(), len(own))
        row = {"stage": name, "images": "test" if split is job.pictures.test else "held out", "accuracy": share.value}
        row |= {"low": share.low, "high": share.high, "n": share.n, "seconds": seconds}
        rows.append(row | {"loss": torch.cat(losses[name]).double().mean().item()})
    if len(hits) < 2:
        return rows, None
    before, after = hits.values()
    return rows, asdict(mean_estimate((after - before).tolist()))


def _held(job: Job, folder: Path) -> nn.Module:
    """The network that a stage kept; the last one, where that is done or the stage's is gone."""
    return load(job.model, job.out if job.place.done("export") or not folder.exists() else folder).eval()


def _bar(job: Job, items: Iterable, *, what: str, total: int | None = None) -> Iterable:
    return tqdm(items, desc=what, total=total, disable=not job.progress, leave=False, dynamic_ncols=True)


def _warn(job: Job, found: Stage) -> None:
    for line in found["warnings"]:
        job.say(f"warning: {line}")


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.2f} % [{100 * row['low']:.2f}, {100 * row['high']:.2f}]"


def _plain_setting(setting: Setting) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in ("batch_size", "precision", "memory_format")}
