"""The one loop over epochs, with checkpoints, of training and fine-tuning."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from basis.digests import weights
from basis.inputs import samples_in
from basis.progress import bar
from basis.saving import replacing
from basis.text import first_line
from basis.training.recipe import TrainingError, TrainingPaused
from basis.training.stepping import TrainingStep

# Of a training, and of its step, what a checkpoint holds.
PLACE = ("epoch", "step", "images", "curves", "setup_seconds", "seen", "switched")
STATES = ("model", "optimizer", "scaler")
LONG = 5.0  # seconds of an epoch, from which on a stop does not wait for its end


@dataclass(kw_only=True)
class Training:
    """A training under way: all that it changes, so that a checkpoint can hold it, and the loop over its epochs.

    Args:
        run: the step that trains the model.
        identity: what a checkpoint must have in common with the training, each thing by its name.
        epochs, steps: passes over the data; steps of each, as far as known before.
        batches: the batches of one epoch, on the model's device.
        prepare: called with the step's number before each step; gives its kind.
        generator: of the order and augmentation of the data, where there is one.
        validate: measures the model after each epoch; what it gives is added to the epoch's row.
        switch: called with the training before each epoch until it has replaced layers, ``run`` and ``prepare``; its
            ``rebuild`` does the same for a checkpoint.

    Attributes:
        setup_seconds: of steps that were replaced.
        seen, switched: what the switch observed before each epoch, and what it did, None before.
        teacher: the dense network at the switch, if it teaches.
    """

    run: TrainingStep
    identity: Mapping[str, str]
    epochs: int
    steps: int
    batches: Callable[[], Iterable[tuple[Any, Any]]]
    prepare: Callable[[int], Any]
    generator: torch.Generator | None = None
    validate: Callable[[], Mapping[str, float]] = dict
    switch: Any = None
    epoch: int = 0
    step: int = 0
    images: int = 0
    curves: tuple[dict[str, float], ...] = ()
    setup_seconds: float = 0.0
    seen: tuple[Mapping[str, float], ...] = ()
    switched: Mapping[str, Any] | None = None
    teacher: nn.Module | None = None

    def loop(
        self, path: str | Path | None, should_stop: Callable[[], bool] | None, progress: bool | str, *,
        title: str | None = None, checkpoint_every: float = 0.0,
    ) -> None:  # fmt: skip
        """Train until the last epoch, from where the checkpoint stopped; see :func:`train`."""
        path, saved = Path(path) if path else None, time.monotonic()
        if path and path.exists():
            self._restore(path)
        desc, total = progress if isinstance(progress, str) else title, self.epochs * self.steps
        with bar(desc=desc, total=total, initial=self.step, unit="step", shown=bool(progress)) as shown:
            while self.epoch < self.epochs:
                long = not self.curves or self.curves[-1]["seconds"] > LONG
                within = should_stop if long else None
                begun: Any = self._packed() if within else None
                switching = self._switch(shown)
                stays = switching and self.switched  # what began does not fit the new network
                if not (row := self._pass(shown, None if stays else within)):
                    raise self._undone(begun, path)
                row |= self.validate()
                row["seconds"] += switching
                self.curves = (*self.curves, row)
                accuracy = row.get("validation_accuracy", row.get("train_accuracy"))
                good = f"loss {row['train_loss']:.4g}" if accuracy is None else f"accuracy {accuracy:.1%}"
                shown.set_postfix_str(f"epoch {self.epoch}/{self.epochs}, {good}")
                stops = should_stop is not None and self.epoch < self.epochs and should_stop()
                if path and (stops or time.monotonic() - saved >= checkpoint_every):
                    self._save(path)
                    saved = time.monotonic()
                if stops:
                    raise TrainingPaused(f"stopped after epoch {self.epoch} of {self.epochs}, as asked")

    @property
    def seconds(self) -> float:
        """Of training, without evaluation."""
        return sum(row["seconds"] for row in self.curves)

    def _switch(self, shown: Any) -> float:
        """Let the network be switched, if it is time; the seconds that the search and the replacement took."""
        if not self.switch or self.switched is not None:
            return 0.0
        began = time.perf_counter()
        self.switch(self)
        seconds = time.perf_counter() - began
        if self.switched is not None:
            self.switched = {**self.switched, "seconds": seconds}
            replaced = f"{len(self.switched['layers'])} layers replaced after epoch {self.epoch}"
            if not shown.disable:
                shown.write(f"{replaced}, in {seconds:.1f} s")
        return seconds

    def _pass(self, shown: Any, should_stop: Callable[[], bool] | None) -> dict[str, float] | None:
        """One epoch; None if it was stopped within. The device is read at its end."""
        run, images = self.run, 0
        run.model.train()
        run.start_epoch()
        began, setup = time.perf_counter(), run.setup_seconds
        for x, labels in self.batches():
            if images and should_stop and should_stop():
                return None
            run(x, labels, self.prepare(self.step))
            self.step, images = self.step + 1, images + samples_in(x)
            shown.update()
        if not math.isfinite(value := run.loss.item()):
            rate = max(float(group["lr"]) for group in run.optimizer.param_groups)
            raise TrainingError(f"the training loss is {value} in epoch {self.epoch + 1} at lr = {rate:g}; lower lr")
        self.epoch, self.images = self.epoch + 1, self.images + images
        row = {"epoch": self.epoch, "train_loss": value / images}
        row |= {} if run.loss_function is not None else {"train_accuracy": run.correct.item() / images}
        return row | {"seconds": time.perf_counter() - began - (run.setup_seconds - setup)}

    def _packed(self) -> io.BytesIO:
        """A checkpoint of this moment, in memory."""
        content: dict[str, Any] = {name: getattr(self, name) for name in PLACE} | {"identity": dict(self.identity)}
        content |= {name: getattr(self.run, name).state_dict() for name in STATES}
        content["teacher"] = None if self.teacher is None else self.teacher.state_dict()
        content["generator"] = None if self.generator is None else self.generator.get_state()
        packed = io.BytesIO()  # torch reports a full disk in words of its own, a plain write as what it is
        torch.save(content | {"random": torch.get_rng_state()}, packed)
        return packed

    def _save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        with replacing(path) as file:
            file.write(self._packed().getbuffer())

    def _undone(self, begun: io.BytesIO, path: Path | None) -> TrainingPaused:
        """Undo the steps of an unfinished epoch, of the model, too."""
        begun.seek(0)
        self._put(torch.load(begun, map_location="cpu", weights_only=True))
        if path:
            self._save(path)
        place = f"after epoch {self.epoch}" if self.epoch else "from the start, and needs the time of an epoch"
        return TrainingPaused(f"stopped in epoch {self.epoch + 1} of {self.epochs}, as asked; it goes on {place}")

    def _restore(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            known = dict(content["identity"])
        except Exception as error:  # torch.load raises many kinds for a damaged file
            why = f"checkpoint {path} cannot be read ({first_line(error)}); delete it to start again"
            raise TrainingError(why) from error
        differing = [name for name, value in self.identity.items() if known.get(name) != value]
        if differing == ["starting weights"] and weights(self.run.model.state_dict()) == weights(content["model"]):
            differing = []  # the very network that was paused
        if differing:
            kind = f"checkpoint {path} belongs to a training with another model, data, recipe or seed"
            raise TrainingError(f"{kind} (differing: {', '.join(differing)}); delete it, or name another file")
        self.identity = known  # the starting weights are those of the first start
        if self.switch and content["switched"]:
            self.switch.rebuild(self, content["switched"])
        self._put(content)

    def _put(self, content: Mapping[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(content["teacher"])
        for name in STATES:
            getattr(self.run, name).load_state_dict(content[name])
        self.run.forget()
        if self.generator is not None and content["generator"] is not None:
            self.generator.set_state(content["generator"])
        torch.set_rng_state(content["random"])
        for name in PLACE:
            setattr(self, name, content[name])
