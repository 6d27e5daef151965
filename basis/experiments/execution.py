"""One run, done: data, network, training, sensitivities, and what its record will hold."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import nn

from basis.batches import held_out
from basis.costs import cost, count_parameters, count_trained
from basis.data import Data, first_images, hold_out, load_cifar10, synthetic
from basis.environment import results_folder
from basis.experiments.comparison import compare
from basis.experiments.records import digest, read_record, take_lock
from basis.experiments.runs import Choice, Ladder, Run, spectrum
from basis.models import build
from basis.plan import Plan
from basis.saving import plain, replacing
from basis.search.selection import predicted, select
from basis.search.sensitivity import sensitivity
from basis.search.table import SensitivityTable
from basis.substitution import substitute
from basis.text import first_line
from basis.training.loop import TrainingError, TrainingPaused, choose_precision, train

Stop = Callable[[], bool] | None


class TableMissing(RuntimeError):
    """A run's plan is selected from sensitivities that no record holds yet."""


def execute(
    run: Run, *, device: torch.device, folder: Path | None = None, checkpoint: Path | None = None,
    should_stop: Stop = None, progress: bool | str = False,
) -> dict[str, Any]:  # fmt: skip
    """Do ``run`` and return its result as plain values: the training's, with size and best rank-k errors.

    The weights of the layers that stay dense are drawn alike in all runs of one seed. ``folder`` is where the records
    are that a :class:`Choice` refers to. Sensitivities and trained networks are kept beside the ``checkpoint``.

    Raises:
        TrainingPaused: when ``should_stop`` says so.
        TableMissing: where the sensitivities that the plan is selected from are not there.
    """
    data = prepare_data(run.data, run.validation, run.images, device)
    how: dict[str, Any] = {"should_stop": should_stop, "progress": progress}
    torch.manual_seed(run.seed)
    model: nn.Module = build(run.model, num_classes=data.classes, width=run.width)
    if run.compression is not None:
        trained = trained_dense(model, run, data=data, device=device, checkpoint=checkpoint, **how).to(device)
        return compare(trained, run.compression, data, seed=run.seed, progress=progress)
    plan, extra = None if run.plan is None else Plan(run.plan), {}
    if run.choice is not None:
        plan, foreseen = choose(run.choice, folder or results_folder())
        extra = {"plan": dict(plan.layers), "predicted": foreseen}
    begins_dense = plan is run.ratio is run.layer is None
    if not begins_dense:
        model = substitute(
            model, plan, ratio=run.ratio, layer=run.layer, include=run.include or (), mode=run.mode, init="random",
            coefficients=run.coefficients or "dense",
        )  # fmt: skip
    result = train(
        model, data, run.recipe, device=device, seed=run.seed, test=run.test is not False,
        checkpoint=checkpoint,
        checkpoint_every=60 if run.ladder is None else 0,  # sensitivities go on with the very same weights
        **how,
    )  # fmt: skip
    if run.ladder is not None:
        extra |= {"tables": climb(model, data, run.ladder, beside=checkpoint, should_stop=should_stop)}
    extra |= {"plan": result.switched["layers"]} if result.switched else {}
    stays_dense = begins_dense and not result.switched
    height, width, channels = data.train.x.shape[1:]
    total = cost(model, (channels, height, width), mode="factorized").total
    extra |= {"macs": total.forward_macs, "backward_macs": total.backward_macs}
    extra |= {"trained": count_trained(model)} if run.layer is not None else {}
    about = {"parameters": count_parameters(model), "spectrum": spectrum(model) if stays_dense else None}
    return {**asdict(result), **about, **extra}


@lru_cache(maxsize=1)  # the next run of a process mostly trains on the same images
def prepare_data(name: str, validation: int, images: int | None, device: torch.device) -> Data:
    """The data that a run trains on, on its device, with its validation images held out and its images chosen."""
    data = hold_out(synthetic() if name == "synthetic" else load_cifar10(), validation)
    return (data if images is None else first_images(data, images)).to(device)


def trained_dense(
    model: nn.Module, run: Run, *, data: Data, device: torch.device, checkpoint: Path | None = None,
    should_stop: Stop = None, progress: bool | str = False,
) -> nn.Module:  # fmt: skip
    """A copy of the dense ``model`` trained by ``run.recipe``, the same to the bit whenever it is asked for.

    Runs of one seed train it once: it is kept beside their checkpoints.

    Raises:
        TrainingPaused: when the time is up while it is trained.
        TrainingError: where the kept one cannot be read.
    """
    found, recipe = copy.deepcopy(model), run.recipe
    name = digest([run.model, run.width, run.data, run.images, run.validation, run.seed, plain(asdict(recipe))])
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(nowhere) if checkpoint is None else checkpoint.parent
        kept = folder / f"dense-{name}-{device.type}-{choose_precision(device)}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(kept.with_suffix(".lock"))
        take_lock(lock, wait=True)  # another run may be training it
        try:
            if not kept.exists():
                trained, part = copy.deepcopy(model), kept.with_suffix(".part")
                with torch.random.fork_rng(devices=[]):  # what is drawn after it must not depend on it
                    train(
                        trained, data, recipe, device=device, seed=run.seed, test=False, checkpoint=part,
                        should_stop=should_stop, progress=progress,
                    )  # fmt: skip
                with replacing(kept) as file:
                    torch.save(trained.state_dict(), file)
                part.unlink(missing_ok=True)
            try:
                found.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
            except Exception as error:  # torch.load raises many kinds for a damaged file
                why = f"{kept} cannot be read ({first_line(error)}); delete it to train it again"
                raise TrainingError(why) from error
        finally:
            lock.release()
    return found


def choose(choice: Choice, folder: Path) -> tuple[Plan, dict[str, float]]:
    """The plan that ``choice`` asks for, and what it is predicted to lose and to keep.

    Raises :class:`TableMissing` where no record holds the sensitivities.
    """
    places = dict.fromkeys((folder, results_folder()))  # a folder of one's own may lack the published sensitivities
    path = next((path for place in places for path in place.glob(f"*/*/{choice.table}.json")), None)
    if path is None:
        raise TableMissing(f"run {choice.table} has to measure the sensitivities first, and has no record yet")
    table = SensitivityTable.from_lines(read_record(path).result["tables"][choice.measure])
    rule: Any = choice.rule
    budget = {choice.unit: choice.budget}
    plan = select(table, budget=budget, rule=rule, ratio=choice.ratio, exclude=choice.exclude or ())
    return plan, {key: value for key, value in predicted(table, plan).items() if math.isfinite(value)}


def climb(
    model: nn.Module, data: Data, ladder: Ladder, *, beside: Path | None = None, should_stop: Stop = None
) -> dict[str, list[dict[str, Any]]]:
    """The table of every measure of the ladder on the trained ``model``, as lines; "fine_tuning" uses all images.

    Measured layers are kept ``beside`` the checkpoint. Raises ``TrainingPaused`` between two of them when
    ``should_stop`` says so.
    """
    held, calibration, tables = held_out(data).first(ladder.images), data.train.first(ladder.calibration), {}
    for measure, ratios in ladder.measures.items():
        tuned: dict[str, Any] = {"recipe": ladder.tuning, "seeds": 1} if measure == "fine_tuning" else {}
        tables[measure] = sensitivity(
            model, data if tuned else held, measure=measure, ratios=ratios, multiple=ladder.multiple,
            calibration=calibration, resume=beside and beside.with_name(f"{beside.stem}-{measure}.jsonl"),
            progress=lambda _: _pause(should_stop, "measuring sensitivities"), **tuned,
        ).to_lines()  # fmt: skip
    return tables


def _pause(should_stop: Stop, doing: str) -> None:
    if should_stop and should_stop():
        raise TrainingPaused(f"stopped while {doing}; what is done is kept")
