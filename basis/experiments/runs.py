"""Runs, records and studies: what was trained, what came out, and how to go on after an interruption.

A run is a frozen configuration; a hash of the configuration is its identity and the name of its
record, one JSON file under ``results/STUDY/PROFILE/``. A record appears whole or not at all, and only
when its run is finished, so a study may be killed at any moment and started again, and any number of
processes may work on one folder: a lock that dies with its process keeps two from doing one run twice.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
import torch

from basis.costs import cost, count_parameters, count_trained
from basis.data import Data, DataError, Images, first_images, hold_out, load_cifar10, synthetic
from basis.decompositions import NotInstalled
from basis.environment import environment, results_folder
from basis.experiments.comparison import Compression, compare
from basis.layers.conv import Mode
from basis.models import build
from basis.saving import RecordError, Unwritable, replacing, unwritable, write_json
from basis.search.selection import predicted, select
from basis.search.sensitivity import joint, sensitivity
from basis.search.table import SensitivityTable
from basis.substitution import Plan, substitute
from basis.training.loop import (
    Recipe,
    Result,
    TrainingError,
    TrainingPaused,
    choose_device,
    choose_precision,
    seconds_per_step,
    train,
)
from basis.training.reuse import Reuse

VERSION = 1
PROFILES = ("smoke", "small", "cpu", "colab", "paper")
# The kind of device that a profile is meant for; "smoke" and "small" take any.
DEVICES: Mapping[str, str] = {"cpu": "cpu", "colab": "cuda", "paper": "cuda"}


class TableMissing(RuntimeError):
    """A run's plan is selected from sensitivities that no record holds yet."""


class TooLittleMemory(RuntimeError):
    """The device cannot hold the network's training, so no run like it could be done."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sensitivities of a trained dense network, measured at the end of its run.

    Args:
        measures: names of :data:`basis.search.sensitivity.MEASURES`, with the ratios that each is measured at.
        multiple: what every k is a multiple of.
        images: how many held-out images they are measured on.
        calibration: how many training images (not augmented) batch normalisation is recalibrated on.
        tuning: how a network is trained on for the measure "fine_tuning".
        joint: unit -> budgets at which whole plans, selected by the last measure and uniform, are measured too.
    """

    measures: Mapping[str, Sequence[float]]
    multiple: int = 8
    images: int = 2000
    calibration: int = 2000
    tuning: Recipe | None = None
    joint: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plan that is selected from the sensitivities that another run has measured.

    Args:
        rule: of :func:`basis.search.selection.select`.
        unit, budget: "params" or "macs", and the fraction of the dense network's that may be kept.
        table: identity of the run with the ladder; measure: which of its measures ranks the layers.
        ratio: for the rules that need one.
        draw: seed of the rule "random".
    """

    rule: str
    unit: str
    budget: float
    table: str
    measure: str
    ratio: float | None = None
    draw: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, fully described; equal configurations have equal identities.

    Args:
        study, profile, variant: where it belongs; ``variant`` is what is compared, such as "r=1/2".
        seed: of the initial weights and of the order and augmentation of the images.
        model, width: a network of :mod:`basis.models`.
        ratio: r of every convolution made basis, None for the dense network.
        mode: of the basis layers.
        data: "cifar10" or "synthetic".
        images: how many training images are used, None for all.
        validation: how many training images are held out, before ``images`` are taken from the others.
        recipe: how it is trained.
        plan: basis channels of the layers made basis, instead of ``ratio``.
        choice: how the plan is selected, instead of ``plan``.
        ladder: which sensitivities are measured afterwards.
        test: False where the test images are not looked at.
        coefficients: how the basis layers hold their coefficients, see :class:`basis.layers.coefficients.Form`.
        layer: the structured layer that every convolution becomes that can, see
            :class:`basis.layers.structured.Structure`; instead of ``ratio``, ``plan`` and ``choice``.
        include: pattern of the convolutions that ``layer`` is for.
        teacher: how a dense network is trained first, from the same seed, for attention transfer
            (``recipe.attention``) or as what the layers are fitted to.
        fitted: whether the run starts at the teacher's weights, those of the layers approximated.
        compression: how the network is made smaller and repaired after it has been trained, dense, by ``recipe``.
            Runs with equal networks train theirs once.
    """

    study: str
    profile: str
    variant: str
    seed: int
    model: str = "resnet18"
    width: int | Sequence[int] | None = None
    ratio: float | None = None
    mode: Mode = "auto"
    data: str = "cifar10"
    images: int | None = None
    validation: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    plan: Mapping[str, int] | None = None
    choice: Choice | None = None
    ladder: Ladder | None = None
    test: bool | None = None
    coefficients: str | None = None
    layer: str | None = None
    include: str | None = None
    teacher: Recipe | None = None
    fitted: bool | None = None
    compression: Compression | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as plain values, as a record holds it."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the configuration."""
        return identity(self.config)


@dataclass(frozen=True)
class Record:
    """What a finished run leaves: its configuration, result, environment and the study's definition then."""

    id: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    definition: str


def identity(config: Mapping[str, Any]) -> str:
    """The identity of a configuration: its digest without the entries that are None.

    A field added later must default to None, meaning "as before"; it then changes no older identity.
    """

    def said(value: Any) -> Any:
        return {k: said(v) for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value

    return digest(said(config))


def digest(value: object) -> str:
    """Sixteen hexadecimal digits that identify any value made of plain JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# -- where things are -------------------------------------------------------------------------------


def record_path(folder: Path, run: Run) -> Path:
    """The file of a run's record."""
    return folder / run.study / run.profile / f"{run.id}.json"


# -- writing and reading ----------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """One record; :class:`RecordError` says in one sentence what is wrong with a bad one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror})") from error
    return parse_record(content, path)


def parse_record(text: bytes, path: Path | str, *, remedy: str = "delete it to have its run done again") -> Record:
    """The record that a file holds; a :class:`RecordError` calls it ``path`` and says the ``remedy`` of a damage."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{path} is not a JSON record ({error}); {remedy}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise RecordError(f"{path} has record version {version!r}, but this package reads version {VERSION}")
    missing = [name for name in ("id", "config", "result", "environment", "definition") if name not in content]
    if missing:
        raise RecordError(f"{path} lacks {', '.join(missing)}; {remedy}")
    strange = sorted(set(content) - {"version", *Record.__dataclass_fields__})
    if strange:
        raise RecordError(f"{path} holds {', '.join(strange)}, which no record has; {remedy}")
    wrong = [name for name in ("config", "result", "environment") if not isinstance(content[name], dict)]
    if wrong:
        raise RecordError(f"{path} holds no entries in {', '.join(wrong)}; {remedy}")
    if content["id"] != identity(content["config"]):
        raise RecordError(f"{path} was changed after it was written: its id does not fit its configuration")
    del content["version"]
    return Record(**content)


def load_records(folder: Path | None = None, *, study: str | None = None, profile: str | None = None) -> list[Record]:
    """All records below ``folder``, or those of one study or profile, ordered by variant and seed.

    Whether a study still lists them, under its present rule, is :func:`basis.experiments.studies.check_records`'s matter.

    Raises:
        RecordError: for the first record that cannot be read.
    """
    files = (folder or results_folder()).glob(f"{study or '*'}/{profile or '*'}/*.json")
    records = [read_record(path) for path in sorted(files) if path.parts[-3] != "bench"]
    return sorted(
        records, key=lambda r: (r.config["study"], r.config["profile"], r.config["variant"], r.config["seed"])
    )


# -- doing a run ------------------------------------------------------------------------------------


def prepare_data(run: Run) -> Data:
    """The data that ``run`` trains on, with its images chosen and its validation images held out."""
    if run.data == "synthetic":
        data = synthetic()
    elif run.data == "cifar10":
        data = load_cifar10()
    else:
        raise ValueError(f"data is {run.data!r}, but it must be cifar10 or synthetic")
    data = hold_out(data, run.validation)
    return data if run.images is None else first_images(data, run.images)


def _data_on(device: torch.device, run: Run, reuse: Reuse) -> Data:
    key = (run.data, run.validation, run.images, device)
    return reuse.data(key, lambda: prepare_data(run).to(device))


def execute(
    run: Run,
    *,
    device: torch.device,
    reuse: Reuse | None = None,
    folder: Path | None = None,
    definition: str | None = None,
    checkpoint: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool | str = False,
) -> dict[str, Any]:
    """Do ``run`` and return its result as plain values: the training's, with size and best rank-k errors.

    The weights of the layers that stay dense are drawn alike in all runs of one seed. ``folder`` is where
    the records are that a :class:`Choice` refers to, made under that ``definition`` of the study. A ladder is
    measured beside the checkpoint, cell by cell, and is resumed there. ``reuse`` is what earlier runs have left.
    """
    _check_teacher(run)
    reuse = reuse or Reuse()
    data = _data_on(device, run, reuse)
    torch.manual_seed(run.seed)
    model: torch.nn.Module = build(run.model, num_classes=data.classes, width=run.width)
    if run.compression is not None:
        trained = _teacher(model, replace(run, teacher=run.recipe), data, device, checkpoint, should_stop, progress)
        return compare(trained.to(device), run.compression, data, seed=run.seed, progress=progress)
    plan = None if run.plan is None else Plan(run.plan)
    extra: dict[str, Any] = {}
    if run.choice is not None:
        plan, foreseen = choose(run.choice, folder or results_folder(), definition, should_stop=should_stop)
        extra |= {"plan": dict(plan.layers), "predicted": foreseen}
    teacher = None if run.teacher is None else _teacher(model, run, data, device, checkpoint, should_stop, progress)
    dense = plan is None and run.ratio is None and run.layer is None
    if not dense:
        model = substitute(
            model if not run.fitted or teacher is None else teacher, plan, ratio=run.ratio, layer=run.layer,
            include=run.include or (), mode=run.mode, init="svd" if run.fitted else "random",
            coefficients=run.coefficients or "dense",
        )  # fmt: skip
    size = tuple(data.train.x.shape[1:])
    report = cost(model, (size[2], *size[:2]), mode="factorized")
    extra |= {"macs": report.total.forward_macs, "backward_macs": report.total.backward_macs}
    extra |= {"trained": count_trained(model)} if run.layer is not None else {}
    step = None
    if reusable(run):
        step = reuse.step(network_of(run, plan), model, run.recipe, device)
        model = step.model
    result: Result = train(
        model, data, run.recipe, device=device, seed=run.seed, checkpoint=checkpoint,
        should_stop=should_stop, progress=progress, test=run.test is not False,
        teacher=teacher if run.recipe.attention else None, step=step,
        checkpoint_every=60 if run.ladder is None else 0,  # a ladder is gone on with on the very same weights
    )  # fmt: skip
    if run.ladder is not None:
        extra |= climb(model, data, run.ladder, beside=checkpoint, should_stop=should_stop)
    return {
        **asdict(result),
        "parameters": count_parameters(model),
        "spectrum": spectrum(model) if dense else None,
        **extra,
    }


def measured_seconds(run: Run, device: torch.device, reuse: Reuse) -> float | None:
    """How long ``run`` will train on this device, from a few steps; None where that cannot be told so simply."""
    if not reusable(run) or run.choice is not None:
        return None
    data = _data_on(device, run, reuse)
    model: torch.nn.Module = build(run.model, num_classes=data.classes, width=run.width)
    plan = None if run.plan is None else Plan(run.plan)
    if plan is not None or run.ratio is not None:
        model = substitute(model, plan, ratio=run.ratio, mode=run.mode, init="random")
    step = reuse.step(network_of(run, plan), model, run.recipe, device)
    steps = run.recipe.epochs * (len(data.train) // run.recipe.batch_size)
    return steps * seconds_per_step(step, data.train, run.recipe)


def reusable(run: Run) -> bool:
    """Whether the weights are all that tells this run's network from another of :func:`network_of` equal."""
    plain = (run.teacher, run.compression, run.layer, run.recipe.skip, run.recipe.attention)
    return plain == (None,) * 5 and run.coefficients in (None, "dense")


def network_of(run: Run, plan: Plan | None) -> str:
    """Everything but the seed that a run's network and its training step depend on."""
    layers = None if plan is None else dict(plan.layers)
    images = [run.data, run.images, run.validation]
    said = [run.model, run.width, run.ratio, layers, run.mode, asdict(run.recipe), images]
    return json.dumps(said)


def _teacher(
    model: torch.nn.Module,
    run: Run,
    data: Data,
    device: torch.device,
    checkpoint: Path | None,
    should_stop: Callable[[], bool] | None,
    progress: bool | str,
) -> torch.nn.Module:
    """A trained copy of the dense ``model``; runs with equal teachers train it once, and keep it beside checkpoints.

    It is the same to the bit, in place and layout too, whether it has been trained just now or was kept.
    """
    recipe, trained = run.teacher, copy.deepcopy(model)
    terms = {name: value for name, value in asdict(recipe or Recipe()).items() if value is not None}
    said = [run.model, run.width, run.data, run.images, run.validation, run.seed, terms]
    options: dict[str, Any] = {"device": device, "seed": run.seed, "should_stop": should_stop, "test": False}
    teacher = copy.deepcopy(model)
    if checkpoint is None:
        train(trained, data, recipe, progress=progress, **options)
        teacher.load_state_dict(trained.state_dict())
        return teacher
    kept = checkpoint.with_name(f"teacher-{digest(said)}-{device.type}-{choose_precision(device)}.pt")
    part = kept.with_suffix(".part")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _held(kept.with_suffix(".lock"), should_stop, "the teacher"):
        if not kept.exists():
            _remove_leftovers(kept, part)
            title = f"{progress}, teacher" if isinstance(progress, str) else progress
            with torch.random.fork_rng(devices=[]):  # what is drawn after it must not depend on whether it was kept
                train(trained, data, recipe, checkpoint=part, progress=title, **options)
            packed = io.BytesIO()
            torch.save(trained.state_dict(), packed)
            with replacing(kept) as file:
                file.write(packed.getbuffer())
            part.unlink(missing_ok=True)
        try:
            teacher.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise TrainingError(f"teacher {kept} cannot be read ({error}); delete it to train it again") from error
    return teacher


def _check_teacher(run: Run) -> None:
    """Refuse a run that would train a teacher for nothing, or lacks the one that it needs."""
    if run.compression is not None and (run.ladder, run.layer, run.ratio, run.plan, run.choice) != (None,) * 5:
        raise ValueError("compression makes the layers itself; it goes with no ladder, layer, ratio, plan or choice")
    taught = [name for name, uses in (("fitted", run.fitted), ("recipe.attention", run.recipe.attention)) if uses]
    if (run.teacher is not None) != bool(taught):
        what = f"{taught[0]} is set without a teacher" if taught else "a teacher is set that nothing uses"
        raise ValueError(f"{what}; teacher goes with fitted or recipe.attention")
    if run.fitted and run.ratio is run.plan is run.choice is run.layer is None:
        raise ValueError("fitted is set for the dense network, but only substituted layers can be fitted; set layer")


@contextmanager
def _held(path: Path, should_stop: Callable[[], bool] | None, what: str) -> Iterator[None]:
    """Hold the lock of what another run may be making right now.

    Raises:
        TrainingPaused: when ``should_stop`` says so while waiting.
    """
    lock = filelock.FileLock(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=2)
        except filelock.Timeout:
            if should_stop and should_stop():
                raise TrainingPaused(f"stopped while waiting for {what} of another run") from None
    try:
        yield
    finally:
        lock.release()


def spectrum(model: torch.nn.Module, ratios: Sequence[float] = (0.125, 0.25, 0.5, 0.75)) -> dict[str, dict[str, float]]:
    """For every convolution: the relative Frobenius error of its best approximation at each ratio."""
    errors: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            rows = module.weight.detach().double().flatten(1)
            # Of the smaller Gram matrix: a hundred times as fast as singular values, and equal to 1e-12 of the largest.
            gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
            energy = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
            kept = {r: int(max(1, round(r * module.out_channels))) for r in ratios}
            errors[name] = {str(r): float((energy[k:].sum() / energy.sum()).sqrt()) for r, k in kept.items()}
    return errors


def choose(
    choice: Choice, folder: Path, definition: str | None = None, *, should_stop: Callable[[], bool] | None = None
) -> tuple[Plan, dict[str, float]]:
    """The plan that ``choice`` asks for, and what it is predicted to lose and to keep.

    Waits where another process is measuring the sensitivities right now.

    Raises:
        TableMissing: where no record made under ``definition`` (any, if None) holds them.
        TrainingPaused: when ``should_stop`` says so while waiting.
    """

    def record() -> Record | None:
        found = [read_record(path) for path in folder.glob(f"*/*/{choice.table}.json")]
        return next((r for r in found if definition in (None, r.definition)), None)

    made = record()
    for path in folder.glob(f"*/*/{choice.table}.lock") if made is None else ():
        with _held(path, should_stop, "the sensitivities"):
            made = record()
    if made is None:
        raise TableMissing(f"run {choice.table} has to measure the sensitivities first, and has no record yet")
    table = SensitivityTable.from_lines(made.result["tables"][choice.measure])
    options: dict[str, Any] = {"rule": choice.rule, "ratio": choice.ratio, "seed": choice.draw or 0}
    plan = select(table, budget={choice.unit: choice.budget}, **options)
    return plan, {key: value for key, value in predicted(table, plan).items() if math.isfinite(value)}


def climb(
    model: torch.nn.Module,
    data: Data,
    ladder: Ladder,
    *,
    beside: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, list[Any] | dict[str, Any]]:
    """Every measure of the ladder on the trained ``model``: ``tables``, and ``joint``, what whole plans lose.

    Uses the first held-out images, and the first training images for calibration, in float32; fine-tuning uses
    all images of both.

    Raises:
        TrainingPaused: when ``should_stop`` says so between two cells.
    """
    if data.validation is None or len(data.validation) < ladder.images:
        raise ValueError(f"the ladder needs {ladder.images} held-out images; set validation to as many")
    held = Images(data.validation.x[: ladder.images], data.validation.y[: ladder.images])
    calibration = Images(data.train.x[: ladder.calibration], data.train.y[: ladder.calibration])

    def pause(_: object) -> None:
        if should_stop and should_stop():
            raise TrainingPaused("stopped while measuring sensitivities; measured cells are kept")

    tables: dict[str, Any] = {}
    for measure, ratios in ladder.measures.items():
        tuned: dict[str, Any] = {"recipe": ladder.tuning, "seeds": 1} if measure == "fine_tuning" else {}
        table = sensitivity(
            model, data if tuned else held, measure=measure, ratios=ratios, multiple=ladder.multiple,
            calibration=calibration, resume=beside and beside.with_name(f"{beside.stem}-{measure}.jsonl"),
            progress=pause, **tuned,
        )  # fmt: skip
        tables[measure] = table.to_lines()
    together = []
    for unit, budgets in (ladder.joint or {}).items():
        for rule, budget in itertools.product(("optimal", "uniform"), budgets):
            plan = select(table, budget={unit: budget}, rule=rule)  # type: ignore[arg-type]
            found = joint(model, plan, held, measure=measure, calibration=calibration)
            total = predicted(table, plan)["sensitivity"]
            told = total if math.isfinite(total) else None
            cell = {"rule": rule, "unit": unit, "budget": budget, "predicted": told}
            together.append(cell | {"loss": found.value, "low": found.low, "high": found.high})
    return {"tables": tables, "joint": together}


@dataclass(frozen=True)
class Progress:
    """What became of a run that was begun."""

    run: Run
    outcome: str  # "done", "paused" or "failed"
    message: str
    seconds: float


def work(
    runs: Sequence[Run],
    definition: str,
    *,
    folder: Path | None = None,
    device: str | None = None,
    deadline: float | None = None,
    progress: bool = False,
) -> Iterator[Progress]:
    """Do the missing runs of one study in the order given, until all are done or ``deadline`` has come.

    The deadline is a ``time.monotonic()``. No run is begun after it; see :func:`attempt` for the rest.

    Raises:
        Unwritable: where nothing can be written.
        DataError: where the data cannot be had.
    """

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    reuse = Reuse()
    for run in runs:
        if late():
            return
        step = attempt(run, definition, folder=folder, device=device, should_stop=late, progress=progress, reuse=reuse)
        if step is not None:
            yield step


def attempt(
    run: Run,
    definition: str,
    *,
    folder: Path | None = None,
    device: str | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
    jobs: int = 1,
    reuse: Reuse | None = None,
) -> Progress | None:
    """Do ``run``, unless it has its record or another process holds it: then None.

    A run under way stops at the end of its epoch when ``should_stop`` says so, leaving a checkpoint. One that
    fails is reported, as is one whose record is there and cannot be read. A record made under another
    ``definition`` of its study is replaced. ``jobs``, how many processes share the device, is noted in the record.
    ``reuse`` is what this process keeps between runs.

    Raises:
        Unwritable: where nothing can be written.
        DataError: where the data cannot be had.
        TooLittleMemory: where the device cannot hold the training.
    """
    folder, place = folder or results_folder(), device_for(run.profile, device)
    path = record_path(folder, run)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    except OSError as error:
        raise unwritable(path.parent, error) from error
    checkpoint = checkpoint_path(folder, run, place)
    began = time.monotonic()
    try:
        if path.exists() and read_record(path).definition == definition:
            return None
        _remove_leftovers(path, checkpoint)
        bar = f"{run.variant}, seed {run.seed}" if progress else False
        result = execute(
            run, device=place, folder=folder, checkpoint=checkpoint, should_stop=should_stop, progress=bar, reuse=reuse
        )
        record = Record(run.id, run.config, result, environment(place) | {"jobs": jobs}, definition)
        write_json(path, {"version": VERSION, **asdict(record)})
        for file in checkpoint.parent.glob(f"{checkpoint.stem}*"):
            file.unlink(missing_ok=True)
        held = "validation" if result["test"] is None else "test"
        outcome, message = "done", f"{held} accuracy {result[held]['accuracy']:.2%}"
    except (TrainingPaused, TableMissing, NotInstalled) as pause:
        outcome, message = "paused", str(pause)
    except (DataError, Unwritable):
        raise  # the other runs would fail in the same way
    except OSError as error:
        raise unwritable(path.parent, error) from error
    except RecordError as error:
        outcome, message = "failed", str(error)
    except torch.cuda.OutOfMemoryError as error:
        raise TooLittleMemory(
            f"{place} has {_free(place)} free, too little to train {run.model} on {run.recipe.batch_size} images a "
            "step; end what else uses it, give fewer --jobs, or take the profile small"
        ) from error
    except (RuntimeError, ValueError) as error:
        outcome, message = "failed", f"{type(error).__name__}: {error}"
        if reuse is not None:
            reuse.forget_networks()
    finally:
        if path.exists():
            path.with_suffix(".lock").unlink(missing_ok=True)  # while it is held: nobody else can hold it then
        lock.release()
    return Progress(run, outcome, message, time.monotonic() - began)


def _free(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"


def device_for(profile: str, name: str | None = None) -> torch.device:
    """The named device, or the one that records of ``profile`` are made on.

    Raises:
        ValueError: for a device of another kind; comparing its times would compare machines.
    """
    kind = DEVICES.get(profile)
    device = torch.device("cpu") if name is None and kind == "cpu" else choose_device(name)
    if kind not in (None, device.type):
        fit = [one for one in PROFILES if DEVICES.get(one, device.type) == device.type]
        raise ValueError(
            f"the profile {profile!r} is for {kind} devices, but the device is {device}; it may do {', '.join(fit)}"
        )
    return device


def checkpoint_path(folder: Path, run: Run, device: torch.device) -> Path:
    """Where ``run`` keeps its checkpoint on this kind of device; another kind computes other numbers."""
    kind = f"{device.type}-{choose_precision(device)}"
    return folder / run.study / run.profile / "checkpoints" / f"{run.id}-{kind}.pt"


def _remove_leftovers(*paths: Path) -> None:
    """Delete the temporary files that a killed process left beside these, which are this process's now."""
    for path in paths:
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``9m``, ``1h30m``; a bare number counts seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 90s, 9m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds
