"""Networks that do not take one image, losses of one's own, batches left alone, and what a checkpoint belongs to."""

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from basis import Switch, evaluate, finetune, recalibrate
from basis.data import hold_out, synthetic
from basis.training.loop import TrainingError, TrainingPaused, train
from tests.training.common import DATA, RECIPE, losses, network, same
from tests.unusual import HEADS, Changing, Joined, Keeping, Output, Scaled, changing_loss, draw


def tuned(model, batches, **options):
    torch.manual_seed(0)
    return finetune(model, batches, **{"epochs": 2, "lr": 0.05, "precision": "fp32"} | options)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs_are_trained_evaluated_and_recalibrated(kind):
    model, plain = Scaled(), Joined()
    found = tuned(model, draw(kind), teacher=Scaled(seed=3), epochs=np.int64(2), lr=np.float64(0.05))
    assert losses(found) == pytest.approx(losses(tuned(plain, draw(torch.cat), teacher=Joined(seed=3))), rel=1e-5)
    assert (found.images, found.steps) == (28, 6)
    for batches in (draw(kind), [(x, y[:1]) for x, y in draw(kind)], [(x,) for x, _ in draw(kind)]):
        done = recalibrate(model, batches)
        assert (done.batches, done.images) == (3, 14)
        recalibrate(plain, draw(torch.cat))
        assert torch.allclose(model.inner[1].running_var, plain.inner[1].running_var, rtol=1e-5)
    own, other = evaluate(model, draw(kind)), evaluate(plain, draw(torch.cat))
    assert own.loss == pytest.approx(other.loss, rel=1e-5)
    assert (own.accuracy, own.n, own.classes) == (other.accuracy, 14, 5)


@pytest.mark.parametrize(("kind", "reduction"), [("dict", "mean"), ("dataclass", "none"), ("tuple", "none")])
def test_a_loss_of_ones_own_takes_any_outputs_and_targets(kind, reduction):
    head, logits = HEADS[kind]
    batches = [(x, {"classes": y, "boxes": [torch.zeros(3)]}) for x, y in draw()]

    def loss(outputs, targets):
        return F.cross_entropy(logits(outputs), targets["classes"], reduction=reduction)

    model, plain = Scaled(head), Scaled()
    found, expected = tuned(model, batches, loss=loss), tuned(plain, draw())
    assert same(model, plain)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
    assert "train_accuracy" not in found.curves[0]
    own = evaluate(model, batches, loss=loss)
    assert own.loss == pytest.approx(evaluate(plain, draw()).loss, rel=1e-6)
    assert (own.accuracy, own.top5, own.classes, own.n) == (None, None, None, 14)
    assert "loss" in str(found)
    assert str(own).startswith("loss")
    for run, error in ((evaluate, ValueError), (finetune, TrainingError)):
        with pytest.raises(error, match=r"returns a.* give loss="):
            run(model, draw())


def test_images_are_targets_where_the_loss_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    batches = [(x, x.flip(3)) for (x, _), _ in draw()]
    with pytest.raises(TrainingError, match=r"give loss="):
        finetune(model, batches)
    loss = partial(F.mse_loss, reduction="mean")
    first = evaluate(model, batches, loss=loss)
    with torch.no_grad():
        expected = sum((model(x) - y).square().sum() for x, y in batches) / sum(y.numel() for _, y in batches)
    assert first.loss == pytest.approx(expected.item(), rel=1e-5)
    tuned(model, batches, loss=loss)
    assert evaluate(model, batches, loss=loss).loss < first.loss
    assert evaluate(network(), DATA.test, loss=F.cross_entropy).keys() == {"loss"}


def test_a_teacher_goes_with_a_loss_of_ones_own_where_both_give_logits():
    loss = partial(F.cross_entropy, reduction="none")
    model, plain, teacher = Scaled(), Scaled(), Scaled(seed=3)
    own, expected = tuned(model, draw(), teacher=teacher, loss=loss), tuned(plain, draw(), teacher=teacher)
    assert losses(own) == pytest.approx(losses(expected), rel=1e-6)
    assert same(model, plain)
    with pytest.raises(TrainingError, match="must return logits"):
        tuned(Scaled(Output), draw(), teacher=teacher, loss=lambda outputs, y: loss(outputs.logits, y))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": lambda outputs, y: outputs}, "the loss of each sample, or their mean"),
        ({"loss": lambda outputs, y: outputs.logits}, "cannot be computed from outputs"),
        ({"loss": F.cross_entropy, "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": lambda outputs, y: F.cross_entropy(outputs.detach(), y)}, "no gradient"),
        ({"model": Scaled(torch.Tensor.detach)}, "no gradient"), ({"batches": iter(draw()), "epochs": 2}, "only once"),
        ({"batches": iter(DataLoader(draw())), "epochs": 2}, "only once"), ({"epochs": True}, "epochs"),
        ({"seed": 0.5}, "seed"), ({"distillation": True}, "distillation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(options, words):
    options = {"model": Scaled(), "batches": draw()} | options
    model, before = options["model"], copy.deepcopy(options["model"])
    with pytest.raises((TrainingError, ValueError), match=words):
        finetune(options.pop("model"), options.pop("batches"), **options)
    assert words in ("no gradient", "only once") or same(model, before)


def test_the_loss_of_an_epoch_is_a_mean_over_samples_as_the_accuracy_is():
    model, batches = Scaled().eval(), draw(sizes=(6, 1))
    model.inner[1] = nn.Identity()
    found = evaluate(model, batches)
    for loss in (None, F.cross_entropy):
        row = finetune(model, batches, lr=1e-12, weight_decay=0.0, precision="fp32", loss=loss).curves[0]
        assert row["train_loss"] == pytest.approx(found.loss, rel=1e-5)
        assert row.get("train_accuracy") == (found.accuracy.value if loss is None else None)


@pytest.mark.parametrize(("teacher", "loss"), [(None, changing_loss), (Changing, None), (Keeping, changing_loss)])
def test_batches_are_left_as_they_are(teacher, loss):
    batches, models = draw(), (Changing(), Keeping())
    first, second = (
        tuned(model, data, loss=loss, epochs=3, **({"teacher": kind(seed=3)} if teacher else {}))
        for model, data, kind in zip(models, (batches, draw()), (teacher, Keeping), strict=True)
    )
    assert losses(first) == losses(second)
    assert same(*models)
    recalibrate(models[0], batches)
    recalibrate(models[1], draw())
    assert same(*models)
    assert evaluate(models[0], batches, loss=loss).loss == evaluate(models[1], batches, loss=loss).loss
    assert str(batches) == str(draw())


class InPlace(nn.Module):
    """A ResNet that changes its images first, and keeps what it gave."""

    def __init__(self, seed=0):
        super().__init__()
        self.inner, self.stages = network(seed=seed), ("inner.layer1", "inner.layer2")

    def forward(self, x):
        self.kept = [self.inner(x.sub_(0.5).div_(0.25))]
        return self.kept[0]


class Outside(InPlace):
    def forward(self, x):
        return self.inner((x - 0.5) / 0.25)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"switch": Switch(images=20, ratios=(0.5, 0.25), measure="spectrum", fit="weight", teach=0.5)},
    ],
)
def test_images_are_left_as_they_are(changes):
    recipe = dataclasses.replace(RECIPE, epochs=2, **changes)
    models, found = (InPlace(), Outside()), []
    for model in models:
        found.append(train(model, DATA, recipe, device="cpu"))
    assert same(*models)
    assert losses(found[0]) == losses(found[1])
    assert found[0].test == found[1].test


# -- what a checkpoint belongs to ---------------------------------------------------------------


def paused(path, model, **options):
    with pytest.raises(TrainingPaused):
        tuned(model, draw(), checkpoint=path, should_stop=lambda: True, **options)
    return model


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model": Scaled(seed=9)}, "starting weights"), ({"batches": draw()[::-1]}, "data"),
        ({"batches": [(x, y.flip(0)) for x, y in draw()]}, "data"), ({"teacher": Scaled(seed=4)}, "teacher"),
        ({"teacher": None}, "teacher"), ({"distillation": 0.5}, "distillation"), ({"lr": 0.1}, "recipe"),
        ({"seed": 1}, "seed"), ({"loss": partial(F.cross_entropy, label_smoothing=0.2)}, "loss"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused(tmp_path, options, what, finished):
    path, loss = tmp_path / "c.pt", partial(F.cross_entropy, label_smoothing=0.1)
    usual = {"teacher": Scaled(seed=3), "loss": loss, "checkpoint": path}
    paused(path, Scaled(), teacher=usual["teacher"], loss=loss)
    if finished:
        tuned(Scaled(), draw(), **usual)
    options = {"model": Scaled(), "batches": draw()} | usual | options
    model = options.pop("model")
    before = copy.deepcopy(model)
    with pytest.raises(TrainingError, match=f"another model.*differing: .*{what}"):
        tuned(model, options.pop("batches"), **options)
    assert same(model, before)
    tuned(Scaled(), draw(), **usual)


def test_the_network_that_was_paused_goes_on_itself(tmp_path):
    whole, model = Scaled(), paused(tmp_path / "c.pt", Scaled())
    tuned(whole, draw())
    for _ in range(2):  # also once it is finished
        tuned(model, draw(), checkpoint=tmp_path / "c.pt")
        assert same(model, whole)


def test_trainings_on_loaders_and_images_are_told_apart(tmp_path):
    one, others = dataclasses.replace(RECIPE, epochs=1), synthetic(train=80, test=20, size=16, seed=1)
    run = partial(train, recipe=one, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    run(network(), DATA)
    for model, data, seed, what in (
        (network(seed=1), DATA, 0, "starting weights"),
        (network(), others, 0, "data"),
        (network(), dataclasses.replace(DATA, validation=others.test), 0, "data"),
        (network(), DATA, 1, "seed"),
    ):
        with pytest.raises(TrainingError, match=f"differing: {what}"):
            run(model, data, seed=seed)
    assert len(run(network(), dataclasses.replace(DATA, test=others.test), seed=np.int64(0)).curves) == 1
    for name, make in (
        ("d.pt", lambda seed: hold_out(DATA, 20, seed=seed)),
        ("e.pt", lambda seed: DataLoader(TensorDataset(torch.full((20, 3, 8, 8), 1.0 * seed), torch.arange(20) % 5))),
    ):
        for _ in range(2):
            tuned(network(), make(0), epochs=1, batch_size=20, checkpoint=tmp_path / name)
        with pytest.raises(TrainingError, match="differing: data"):
            tuned(network(), make(1), epochs=1, batch_size=20, checkpoint=tmp_path / name)
