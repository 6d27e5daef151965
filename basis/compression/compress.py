"""From a trained network to a smaller one: the stages of ``basis compress``.

A finished stage leaves ``OUT/stages/NAME.json`` and is not done again. Layers are chosen on images held out from the
training images; the test images serve the last numbers alone.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from basis.batches import outputs_of
from basis.bench.report import BenchReport
from basis.bench.timing import Setting, layer_steps
from basis.bench.tuning import bench_latency
from basis.compression.images import ImageData, Preparation, check_images, open_images, preparation_for, subset
from basis.compression.networks import build_network, load_weights
from basis.compression.report import render
from basis.costs import cost
from basis.digests import digest, structure
from basis.environment import environment
from basis.export import export_onnx, export_program, is_installed
from basis.inference import fold, measure_fold
from basis.modules import recalibrates
from basis.progress import bar
from basis.saving import plain, replacing, write_json
from basis.search.selection import UNITS, select
from basis.search.sensitivity import sensitivity
from basis.search.table import SEARCHES, SensitivityTable
from basis.statistics import mean_estimate, proportion_estimate
from basis.storage import load, save
from basis.substitution import Plan, plan_of, substitute
from basis.text import few, first_line
from basis.training.finetuning import finetune
from basis.training.loop import choose_device
from basis.training.recalibration import recalibrate
from basis.vision import import_torchvision

COSTS = {"params": "parameters", "macs": "forward_macs", "backward_macs": "backward_macs"}  # -> fields of a cost
EXPORTS: Mapping[str, tuple[str, Any]] = {"onnx": ("model.onnx", export_onnx), "program": ("model.pt2", export_program)}
INSTALLED = tuple(name for name in EXPORTS if name != "onnx" or (is_installed("onnx") and is_installed("onnxscript")))
MULTIPLE = 8  # of every number of basis channels
TOLERANCE = 1e-2  # of outputs, relative to their largest magnitude
MANY = 500  # images from which on worker processes decode them

Say = Callable[[str], object]
Stage = dict[str, Any]


def option(default: Any, text: str, **options: Any) -> Any:
    """A field of :class:`Settings`, with what ``argparse`` is told about it."""
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do. ``budget``: params, macs, backward_macs or milliseconds -> the share that may stay, in (0, 1]."""

    model: str
    weights: str
    data: str
    budget: Mapping[str, float]
    out: str
    classes: int | None = option(None, "outputs of the network (default: one for each class of the data)", type=int)
    measure: str | None = option(None, "how layers are ranked (default: oneshot_bn, or oneshot)", choices=SEARCHES)
    ratios: Sequence[float] = option((0.5, 0.25), "shares of filters to try (default: 0.5 0.25)", nargs="+", type=float)
    epochs: int = option(1, "of fine-tuning, 0 for none (default: 1)", type=int)
    lr: float = option(0.01, "peak learning rate of fine-tuning (default: 0.01)", type=float)
    batch_size: int = option(64, "images in a batch, also where times are measured (default: 64)", type=int)
    image_size: int | None = option(None, "side in pixels that the network takes (default: its own)", type=int)
    crop: float | None = option(None, "share of the side kept (default: its own; 1 with --image-size)", type=float)
    mean: Sequence[float] | None = option(None, "of red, green, blue, in [0, 1] (default: known)", nargs=3, type=float)
    std: Sequence[float] | None = option(None, "as for mean", nargs=3, type=float)
    validation: int | None = option(None, "training images held out to choose on (default: a tenth)", type=int)
    export: Sequence[str] = option(INSTALLED, "files to write (default: all it can)", nargs="+", choices=tuple(EXPORTS))
    device: str | None = option(None, "cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    seed: int = option(0, "of all randomness (default: 0)", type=int)
    anyway: bool = option(False, "go on with a network that hardly beats guessing", action="store_true")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            object.__setattr__(self, name, plain(value, finite=False))
        if not self.budget or not all(unit in UNITS and 0 < share <= 1 for unit, share in self.budget.items()):
            raise ValueError(f"budget is {dict(self.budget)}, but must have shares in (0, 1] of {', '.join(UNITS)}")
        least = {"epochs": 0, "seed": 0, "batch_size": 2, "validation": 1, "image_size": 1, "lr": 1e-9}
        wrong = [n for n, low in least.items() if getattr(self, n) is not None and not getattr(self, n) >= low]
        wrong += ["crop"] * (self.crop is not None and not 0 < self.crop <= 1)
        wrong += ["measure"] * (self.measure not in (None, *SEARCHES))
        wrong += ["export"] * (not set(self.export) <= set(EXPORTS))
        wrong += ["std"] * ({len(self.mean or ()), len(self.std or ())} not in ({0}, {3}))
        if wrong:
            raise ValueError(f"{wrong[0]} cannot be {getattr(self, wrong[0])}; see basis compress --help")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings that were checked, and what was made from them."""

    settings: Settings
    out: Path
    say: Say | None
    model: nn.Module
    data: ImageData
    parts: Mapping[str, Subset]  # "train" (augmented), "calibration" of it, "held" out, "scored" of these, and "test"
    input_size: tuple[int, ...]  # (C, H, W) of one image
    device: torch.device
    measure: str
    identity: Mapping[str, Any]  # settings, digests, what is done to the images: what makes a run this one
    preparation: Preparation  # of the images

    @property
    def setting(self) -> Setting:
        """How times are measured."""
        s = self.settings
        return Setting(device=str(self.device), precision="fp32", batch_size=s.batch_size, seconds=60, seed=s.seed)

    def batches(self, name: str) -> DataLoader:
        """Batches (inputs, labels) of a part, on the CPU."""
        part, size, train = self.parts[name], self.settings.batch_size, name == "train"
        workers = torch.get_num_threads() if len(part) > MANY else 0
        order = torch.Generator().manual_seed(self.settings.seed)
        last = train and len(part) >= size
        return DataLoader(part, size, shuffle=train, drop_last=last, num_workers=workers, generator=order)

    def small(self) -> nn.Module:
        """The substituted network, as the last stage left it."""
        return load(self.model, self.out).eval()


def compress(settings: Settings, *, say: Say | None = None, command: str = "") -> dict[str, Any]:
    """Find the layers that can take it, replace, repair and measure them, and export the network.

    ``settings.out`` receives ``plan.json`` and ``model.safetensors`` (for :func:`basis.load`), the exported files,
    ``sensitivity.jsonl``, ``report.html`` and ``report.json``, whose content is returned. ``say`` receives lines about
    the progress, ``command`` is for the report. Raises what :func:`prepare` raises, before any long work.
    """
    job = prepare(settings, say=say)
    write_json(job.out / "run.json", job.identity)
    learnt = f"{len(job.parts['held'])} of those in train are held out to choose by, which the network may have learnt"
    say(f"images: {job.preparation}; {learnt}") if say else None
    done: dict[str, Stage] = {}
    for stage in STAGES:
        done[stage.__name__] = _finished(job, stage, done)
    return _report(job, done, command)


def prepare(settings: Settings, *, say: Say | None = None) -> Job:
    """Read and check what was given; ``ValueError`` for what is missing, unreadable, impossible, or of another run."""
    s = settings
    missing = [name for name in ("onnx", "onnxscript") if "onnx" in s.export and not is_installed(name)]
    if missing:
        raise ValueError(f"export to ONNX needs {few(missing)}: pip install onnx onnxscript; or export program alone")
    try:
        data = open_images(s.data)
        model = build_network(s.model, classes=s.classes or len(data.classes))
        load_weights(model, s.weights)
        device = choose_device(s.device)
        model = model.float().to(device).eval()
    except (ModuleNotFoundError, RuntimeError, AssertionError) as error:  # of a library, or of a device
        raise ValueError(first_line(error)) from error
    measure = s.measure or ("oneshot_bn" if recalibrates(model) else "oneshot")
    identity = asdict(s) | {"out": "", "anyway": False, "device": str(device), "measure": measure, "data": data.digest}
    identity["network"] = structure(model)
    identity["weights"] = digest(Path(s.weights).read_bytes())
    identity = _check_folder(Path(s.out), plain(identity))
    if "preparation" not in identity:
        seen = check_images(data.files)
        own = preparation_for(s.model, model, [size for size, _ in seen], image_size=s.image_size, crop=s.crop,
                              mean=s.mean, std=s.std)  # fmt: skip
        identity |= plain({"preparation": asdict(own), "turned": sum(one for _, one in seen[: len(data.train)])})
    prepared = Preparation(**identity["preparation"])
    parts = _split(s, data, prepared)
    job = Job(settings=s, out=Path(s.out), say=say, model=model, data=data, parts=parts, device=device, measure=measure,
              input_size=tuple(parts["held"][0][0].shape), identity=identity, preparation=prepared)  # fmt: skip
    _check_network(job)
    plan = Plan.uniform(model, ratio=min(s.ratios), multiple=MULTIPLE)
    if not plan.layers:
        raise ValueError(f"no convolution of the network can be replaced ({few(set(plan.skipped.values()), '; ')})")
    with torch.random.fork_rng(devices=[]):
        costs = _costs(job, substitute(model, plan, init="random"))
    _check_budget(job, {unit: after / max(1, before) for unit, (before, after) in costs.items()})
    return job


def _split(s: Settings, data: ImageData, evaluate: Preparation) -> dict[str, Subset]:
    make = import_torchvision().transforms
    augment = make.Compose([make.RandomHorizontalFlip(), evaluate])  # as in evaluation: arXiv 1906.06423, section 3
    total, most = len(data.train), 2000 if max(evaluate(data.train[0][0]).shape) <= 64 else 256  # small: cheap
    held = s.validation or min(2000, max(1, total // 10))
    if held >= total:
        raise ValueError(f"validation is {held}, but must be below the number of training images, {total}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(s.seed)).tolist()
    index = {"held": order[:held], "scored": order[:held][:most], "calibration": order[held:][:most]}
    parts = {name: subset(data.train, own, evaluate) for name, own in index.items()}
    parts["train"] = subset(data.train, order[held:], augment)
    return parts | {"test": subset(data.test, range(len(data.test)), evaluate)}


def _check_network(job: Job) -> None:
    """Refuse a network that gives no logits of these classes, or cannot be fine-tuned when it should be."""
    classes, x = len(job.data.classes), torch.zeros(2, *job.input_size, device=job.device)
    y = outputs_of(job.model, x[:1])
    if not isinstance(y, Tensor) or y.shape != (1, job.settings.classes or classes) or y.shape[1] < classes:
        raise ValueError(f"the network must return logits (N, classes) for the {classes} classes of the data")
    trains = any(p.requires_grad for p in job.model.parameters())
    if job.settings.epochs and not (trains and isinstance(outputs_of(copy.deepcopy(job.model).train(), x), Tensor)):
        raise ValueError("the network is frozen or returns more than logits in training, so epochs must be 0")
    if job.measure == "oneshot_bn" and not recalibrates(job.model):
        raise ValueError("measure oneshot_bn needs batch normalisation, which the network has not; use oneshot")


def _check_budget(job: Job, least: Mapping[str, float]) -> None:
    """Refuse a budget that not even the smallest candidates meet."""
    for unit, share in least.items():
        if job.settings.budget.get(unit, 1) < share:
            raise ValueError(f"budget {unit} cannot be met: at least {share:.3f} stays; give smaller ratios")


def _check_folder(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says, or else this identity; refuses a folder that holds anything but a run of these settings."""
    run = out / "run.json"
    if not run.exists() and out.exists() and (out.is_file() or any(p.suffix != ".tmp" for p in out.iterdir())):
        raise ValueError(f"{out} holds other things, and nothing is overwritten; name another folder")
    known = _content(run) if run.exists() else dict(identity)
    if differing := [key for key in identity if known.get(key) != identity[key]]:
        raise ValueError(f"{out} holds a run with other {few(differing)}; name another folder")
    return known


def evaluate_dense(job: Job, done: Mapping[str, Stage]) -> Stage:
    """The accuracy of the dense network on the held-out images."""
    row = _row("dense", "held-out", _hits(job, "held", job.model))
    guess, turned, warned = 1 / len(job.data.classes), job.identity["turned"], []
    if row["low"] <= guess:
        said = f"on {row['n']} held-out images the dense network hardly beats guessing ({row['value']:.1%} against "
        said += f"{guess:.1%}); are weights, order of classes, --image-size, --crop, --mean, --std those of training? "
        said += f"The images were {job.preparation}"
        if not job.settings.anyway:
            (job.out / "run.json").unlink()  # the folder is free for the next try
            raise ValueError(f"{said}; --validation N holds out more, --anyway goes on")
        warned = [said]
    warned += [f"{turned} training images carry a rotation in EXIF, which is ignored"] * (turned > 0)
    return {"accuracy": [row], "warning": "; ".join(warned)}


def time_layers(job: Job, done: Mapping[str, Stage]) -> Stage:
    """The milliseconds of every layer with every k, for a budget in them, which is checked."""
    if "milliseconds" not in job.settings.budget:
        return {}
    report = bench_latency(job.model, input_size=job.input_size, ratios=tuple(job.settings.ratios), multiple=MULTIPLE,
                           passes=("forward",), setting=job.setting, progress=job.say)  # fmt: skip
    report.save(job.out / "layers.json")
    times = report.latencies("forward").values()
    dense, least = sum(ms[max(ms)] for ms in times), sum(min(ms.values()) for ms in times)
    _check_budget(job, {"milliseconds": least / dense})
    return {"dense_ms": dense}


def measure_sensitivity(job: Job, done: Mapping[str, Stage]) -> Stage:
    """What the network loses when one layer alone is replaced, on held-out images; resumes between candidates."""
    fitted = job.measure not in ("spectrum", "activation")
    table = sensitivity(
        job.model, job.batches("scored"), measure=job.measure, ratios=tuple(job.settings.ratios), multiple=MULTIPLE,
        resume=job.out / "sensitivity.jsonl", calibration=job.batches("calibration") if fitted else None,
        fit="activation" if fitted else "weight", progress="sensitivity of layers" if job.say else None,
    )  # fmt: skip
    return {"measure": table.measure, "unit": table.unit, "candidates": len(table.cells)}


def replace_layers(job: Job, done: Mapping[str, Stage]) -> Stage:
    """The layers of the smallest sum of sensitivities replaced, fitted to the dense outputs, and recalibrated."""
    table = SensitivityTable.load(job.out / "sensitivity.jsonl")
    times = BenchReport.load(job.out / "layers.json") if "milliseconds" in job.settings.budget else None
    plan = select(table, budget=job.settings.budget, latency=times, step="forward")
    small = substitute(job.model, plan, calibration=job.batches("calibration")).eval()
    recalibrate(small, job.batches("calibration"))
    save(small, job.out)
    rows = [_row("replaced", "held-out", _hits(job, "held", small))]
    return {"accuracy": rows, "layers": plan.layers, "kept": plan.skipped}


def fine_tune(job: Job, done: Mapping[str, Stage]) -> Stage:
    """The network after some epochs on the training images; resumes after its last epoch."""
    if not job.settings.epochs:
        return {}
    small, checkpoint = job.small(), job.out / "stages" / "finetuning.pt"
    with torch.random.fork_rng():
        torch.manual_seed(job.settings.seed)  # of the augmentation
        finetune(small, job.batches("train"), epochs=job.settings.epochs, lr=job.settings.lr,
                 checkpoint=checkpoint, progress="fine-tuning" if job.say else False)  # fmt: skip
    save(small.eval(), job.out)
    return {"accuracy": [_row("fine-tuned", "held-out", _hits(job, "held", small))]}


def evaluate_last(job: Job, done: Mapping[str, Stage]) -> Stage:
    """The accuracy of both networks on the test images, which nothing has seen before."""
    before, after = (_hits(job, "test", model) for model in (job.model, job.small()))
    rows = [_row("dense", "test", before), _row("compressed", "test", after)]
    return {"accuracy": rows, "change": asdict(mean_estimate((after - before).tolist()))}


def measure_latency(job: Job, done: Mapping[str, Stage]) -> Stage:
    """Whole networks by turns; and which layers are exported as pairs: of a budget in milliseconds the faster ones."""
    small, setting = job.small(), job.setting.settled(job.model)
    pairs = list(plan_of(small).layers)
    if pairs and "milliseconds" in job.settings.budget:
        pairs = list(measure_fold(small, input_size=job.input_size, setting=job.setting))
    networks = {"dense": copy.deepcopy(job.model), "control": copy.deepcopy(job.model)}
    example = next(iter(job.batches("held")))[0][:2]
    networks["dense, folded"] = fold(job.model, inputs=example)
    networks["exported"] = fold(small, factorized=pairs, inputs=example)
    with setting.globals():
        placed = {name: setting.place(network) for name, network in networks.items()}
        rows = setting.measure(layer_steps(placed, [job.input_size], "forward", setting))
    slower = "as exported the network is slower on this device than it was; a budget in milliseconds minds that"
    return {"rows": rows, "pairs": pairs, "batch_size": setting.batch_size, "environment": environment(job.device),
            "warning": slower if rows["exported"]["speedup_q3"] < 1 else None}  # fmt: skip


def export(job: Job, done: Mapping[str, Stage]) -> Stage:
    """Write the network as plain convolutions, in files that are run and compared with them.

    ``ValueError`` where these differ from the network that was scored, on held-out images.
    """
    small, (images, _) = job.small().cpu(), next(iter(job.batches("held")))
    images = images[torch.arange(job.settings.batch_size) % len(images)]  # some networks have a fixed batch
    expected = outputs_of(small, images)
    folded = fold(small, factorized=done["measure_latency"]["pairs"], inputs=images[:2])
    apart = (outputs_of(folded, images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not apart <= TOLERANCE:
        raise ValueError(f"folded, the network differs by {apart:.1e} from what was scored, so it is not exported")
    files: dict[str, Stage] = {}
    for name, writer in (EXPORTS[kind] for kind in job.settings.export):
        for batch in ("dynamic", job.settings.batch_size):  # some networks have a fixed batch
            try:
                made = writer(folded, job.out / name, job.input_size, batch=batch)
                files[name] = {"batch": batch, "error": made.error}
                break
            except (RuntimeError, ValueError) as error:  # other people's exporters: the rest is not lost
                files[name] = {"failed": first_line(error)}
    return {"files": files}


STAGES = (evaluate_dense, time_layers, measure_sensitivity, replace_layers, fine_tune, evaluate_last, measure_latency,
          export)  # fmt: skip


def _finished(job: Job, stage: Callable[[Job, Mapping[str, Stage]], Stage], done: Mapping[str, Stage]) -> Stage:
    """What the stage found, doing its work only where no file says so."""
    path, name = job.out / "stages" / f"{stage.__name__}.json", stage.__name__.replace("_", " ")
    if not path.exists():
        began = time.perf_counter()
        write_json(path, plain(stage(job, done) | {"seconds": time.perf_counter() - began}))
    found = _content(path)
    if job.say:
        rows = [f"{r['stage']} {r['value']:.2%} of {r['n']:,} {r['images']} images" for r in found.get("accuracy", ())]
        job.say(f"{name}: {', '.join(rows) or 'done'} ({found['seconds']:.1f} s)")
        job.say(f"warning: {found['warning']}") if found.get("warning") else None
    return found


def _content(path: Path) -> Stage:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); delete it to have it made again") from error


@torch.no_grad()
def _hits(job: Job, name: str, model: nn.Module) -> Tensor:
    """Which images of a part the network gets right, (N,) of 0 and 1."""
    batches = bar(job.batches(name), desc=f"evaluating on {name} images", unit="batch", shown=bool(job.say))
    return torch.cat([model(x.to(job.device)).argmax(1).cpu() == y for x, y in batches]).double()


def _row(stage: str, images: str, hits: Tensor) -> Stage:
    return {"stage": stage, "images": images, **asdict(proportion_estimate(hits.sum().item(), len(hits)))}


def _costs(job: Job, small: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters and MACs of one image, dense and small."""
    before, after = (cost(model, job.input_size).total for model in (job.model, small))
    return {unit: (getattr(before, name), getattr(after, name)) for unit, name in COSTS.items()}


def _report(job: Job, done: Mapping[str, Stage], command: str) -> dict[str, Any]:
    small, table = job.small(), SensitivityTable.load(job.out / "sensitivity.jsonl")
    replace(plan_of(small), skipped=done["replace_layers"]["kept"]).save(job.out / "plan.json")  # with reasons
    report = plain({
        "command": command, "settings": asdict(job.settings), "identity": job.identity, "classes": job.data.classes,
        "prepared": str(job.preparation), "cost": _costs(job, small), "folder": str(job.out.absolute()),
        "images": {name: len(part) for name, part in job.parts.items()}, "input_size": job.input_size,
        "cells": table.to_frame().to_dict("records"), "stages": done,
    })  # fmt: skip
    write_json(job.out / "report.json", report)
    with replacing(job.out / "report.html") as file:
        file.write(render(report, table).encode(errors="backslashreplace"))
    (job.out / "stages" / "finetuning.pt").unlink(missing_ok=True)
    return report
