"""Networks that do not take one image, losses of one's own, batches left alone, and what a checkpoint belongs to."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from basis import Switch, evaluate, finetune, recalibrate
from basis.data import hold_out, synthetic
from basis.training.loop import Recipe, TrainingError, TrainingPaused, train
from basis.training.skipping import Skip
from tests.training.common import DATA, RECIPE, SEARCH, losses, network, same


class Scaled(nn.Module):
    """An image and a number to logits, or to whatever ``head`` makes of them."""

    def __init__(self, head=lambda logits: logits):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc, self.head = nn.Linear(8, 5), head

    def forward(self, image, scale):
        return self.head(self.fc(self.inner(image).mean((2, 3)) * scale[:, None]))


class Joined(Scaled):
    """The same network with one tensor for an input."""

    def forward(self, x):
        return super().forward(x[..., :8], x[:, 0, 0, 8])


class Changing(Scaled):
    """As many networks do, it normalises its input in place."""

    def forward(self, image, scale):
        return super().forward(image.sub_(0.5).div_(0.25), scale.mul_(2))


class Keeping(Scaled):
    def forward(self, image, scale):
        return super().forward((image - 0.5) / 0.25, scale * 2)


def made(kind, *args, seed=0):
    torch.manual_seed(seed)
    return kind(*args)


def draw(kind=tuple, sizes=(6, 6, 2)):
    torch.manual_seed(1)
    found = [(torch.randn(n, 3, 8, 8), torch.rand(n) + 0.5, torch.randint(0, 5, (n,))) for n in sizes]
    if kind is dict:
        return [({"scale": s, "image": x}, y) for x, s, y in found]
    if kind is torch.cat:
        return [(torch.cat([x, s[:, None, None, None].expand(len(x), 3, 8, 1)], 3), y) for x, s, y in found]
    return [((x, s), y) for x, s, y in found]


def tuned(model, batches, **options):
    torch.manual_seed(0)
    return finetune(model, batches, **{"epochs": 2, "lr": 0.05, "precision": "fp32"} | options)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs_are_trained_evaluated_and_recalibrated(kind):
    model, plain = made(Scaled), made(Joined)
    teachers = made(Scaled, seed=3), made(Joined, seed=3)
    found, expected = (
        tuned(one, batches, teacher=teacher)
        for one, batches, teacher in zip((model, plain), (draw(kind), draw(torch.cat)), teachers, strict=True)
    )
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert (found.images, found.steps) == (28, 6)
    for batches in (draw(kind), [(x, y[:1]) for x, y in draw(kind)], [(x,) for x, _ in draw(kind)]):
        done = recalibrate(model, batches)
        assert (done.batches, done.images) == (3, 14)
        recalibrate(plain, draw(torch.cat))
        assert torch.allclose(model.inner[1].running_var, plain.inner[1].running_var, rtol=1e-5)
    own, other = evaluate(model, draw(kind)), evaluate(plain, draw(torch.cat))
    assert own.loss == pytest.approx(other.loss, rel=1e-5)
    assert (own.accuracy, own.n, own.classes) == (other.accuracy, 14, 5)


@dataclass
class Output:
    logits: torch.Tensor


HEADS = {
    "dict": (lambda logits: {"out": logits}, lambda outputs: outputs["out"]),
    "dataclass": (Output, lambda outputs: outputs.logits),
}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_a_loss_of_ones_own_takes_any_outputs_and_targets(kind, mean):
    head, logits = HEADS[kind]
    batches = [(x, {"classes": y, "boxes": [torch.zeros(3)]}) for x, y in draw()]

    def loss(outputs, targets):
        return F.cross_entropy(logits(outputs), targets["classes"], reduction="mean" if mean else "none")

    model, plain = made(Scaled, head), made(Scaled)
    found, expected = tuned(model, batches, loss=loss), tuned(plain, draw())
    assert same(model, plain)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
    assert "train_accuracy" not in found.curves[0]
    assert "train loss" in str(found)
    own = evaluate(model, batches, loss=loss)
    assert own.loss == pytest.approx(evaluate(plain, draw()).loss, rel=1e-6)
    assert (own.accuracy, own.top5, own.classes, own.n) == (None, None, None, 14)
    assert str(own).startswith("loss")
    for run, error in ((evaluate, ValueError), (finetune, TrainingError)):
        with pytest.raises(error, match=r"returns a.* give loss="):
            run(model, draw())


def test_regression_and_images_have_a_loss_of_their_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    batches = [(x, x.flip(3)) for (x, _), _ in draw()]

    def loss(outputs, targets):
        return (outputs - targets).square().mean((1, 2, 3))

    first = evaluate(model, batches, loss=loss)
    with torch.no_grad():
        expected = sum((model(x) - y).square().sum() for x, y in batches) / sum(y.numel() for _, y in batches)
    assert first.loss == pytest.approx(expected.item(), rel=1e-5)
    tuned(model, batches, loss=loss)
    assert evaluate(model, batches, loss=loss).loss < first.loss
    assert evaluate(network(), DATA.test, loss=F.cross_entropy).keys() == {"loss"}
    for wrong in (model, model[:1]):
        with pytest.raises(TrainingError, match=r"give loss="):
            finetune(wrong, batches)


def test_a_teacher_goes_with_a_loss_of_ones_own_where_both_give_logits():
    loss = partial(F.cross_entropy, reduction="none")
    model, plain, teacher = made(Scaled), made(Scaled), made(Scaled, seed=3)
    own, expected = tuned(model, draw(), teacher=teacher, loss=loss), tuned(plain, draw(), teacher=teacher)
    assert losses(own) == pytest.approx(losses(expected), rel=1e-6)
    assert same(model, plain)
    with pytest.raises(TrainingError, match="must return logits"):
        tuned(made(Scaled, Output), draw(), teacher=teacher, loss=lambda outputs, y: loss(outputs.logits, y))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": lambda outputs, y: outputs}, TrainingError, "the loss of each sample, or their mean"),
        ({"loss": lambda outputs, y: outputs.logits}, TrainingError, "cannot be computed from outputs"),
        ({"loss": F.cross_entropy, "label_smoothing": 0.1}, ValueError, "label_smoothing"),
        ({"loss": lambda outputs, y: F.cross_entropy(outputs.detach(), y)}, TrainingError, "no gradient"),
        ({"epochs": 1.5}, ValueError, "epochs"),
        ({"epochs": True}, ValueError, "epochs"),
        ({"seed": 0.5}, ValueError, "seed"),
        ({"distillation": True}, ValueError, "distillation"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(options, error, words):
    model = made(Scaled)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        finetune(model, draw(), **options)
    if "no gradient" not in words:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("once", [iter, lambda batches: (batch for batch in batches), lambda b: iter(DataLoader(b))])
def test_what_gives_its_batches_once_lasts_no_two_epochs(once):
    with pytest.raises(TrainingError, match="only once"):
        finetune(made(Scaled), once(draw()), epochs=2)


def test_a_model_that_detaches_its_logits_is_not_trained_in_silence():
    with pytest.raises(TrainingError, match="no gradient"):
        finetune(made(Scaled, torch.Tensor.detach), draw())


def test_the_loss_of_an_epoch_is_a_mean_over_samples_as_the_accuracy_is():
    model = made(Scaled).eval()
    batches = draw(sizes=(6, 1))
    model.inner[1] = nn.Identity()
    row = finetune(model, batches, lr=1e-12, weight_decay=0.0, precision="fp32").curves[0]
    found = evaluate(model, batches)
    assert row["train_loss"] == pytest.approx(found.loss, rel=1e-5)
    assert row["train_accuracy"] == found.accuracy.value
    assert finetune(model, batches, lr=1e-12, precision="fp32", loss=F.cross_entropy).curves[0]["train_loss"] == (
        pytest.approx(found.loss, rel=1e-5)
    )


def changing_loss(outputs, targets):
    found = F.cross_entropy(outputs, targets.clone(), reduction="none")
    targets.zero_()
    return found


@pytest.mark.parametrize("teacher", [None, Changing, Keeping])
@pytest.mark.parametrize("loss", [None, changing_loss])
def test_batches_are_left_as_they_are(teacher, loss):
    batches, other = draw(), None if teacher is None else made(Keeping, seed=3)
    found = made(Changing), made(Keeping)
    options = {} if teacher is None else {"teacher": made(teacher, seed=3)}
    first = tuned(found[0], batches, loss=loss, epochs=3, **options)
    assert str(batches) == str(draw())
    second = tuned(found[1], draw(), loss=loss, epochs=3, **({} if other is None else {"teacher": other}))
    assert losses(first) == losses(second)
    assert same(*found)
    recalibrate(found[0], batches)
    recalibrate(found[1], draw())
    assert same(*found)
    assert evaluate(found[0], batches, loss=loss).loss == evaluate(found[1], batches, loss=loss).loss
    assert str(batches) == str(draw())


class InPlace(nn.Module):
    """A ResNet that changes its images first."""

    def __init__(self, **options):
        super().__init__()
        self.inner = network(**options)
        self.stages = ("inner.layer1", "inner.layer2")

    def forward(self, x):
        return self.inner(x.sub_(0.5).div_(0.25))


class Outside(InPlace):
    def forward(self, x):
        return self.inner((x - 0.5) / 0.25)


@pytest.mark.parametrize("how", ["plain", "attention", "teach"])
def test_images_are_left_as_they_are(how):
    changes = {"attention": {"attention": 1000.0}, "teach": {"switch": Switch(**SEARCH, teach=0.5)}}.get(how, {})
    recipe = dataclasses.replace(RECIPE, epochs=2, **changes)
    found = []
    for kind in (InPlace, Outside):
        model, teacher = kind(), {"teacher": kind(seed=1)} if how == "attention" else {}
        found.append((model, train(model, DATA, recipe, device="cpu", **teacher)))
    (one, first), (other, second) = found
    assert same(one, other)
    assert losses(first) == losses(second)
    assert first.test == second.test


def test_a_network_that_keeps_its_activations_can_teach():
    class Keeping(Outside):
        def forward(self, x):
            self.kept = [super().forward(x)]
            return self.kept[0]

    recipe = dataclasses.replace(RECIPE, epochs=2, switch=Switch(**SEARCH, teach=0.5))
    assert train(Keeping(), DATA, recipe, device="cpu").switched["layers"]


# -- what a checkpoint belongs to ---------------------------------------------------------------


def paused(path, model, **options):
    with pytest.raises(TrainingPaused):
        tuned(model, draw(), checkpoint=path, should_stop=lambda: True, **options)
    return model


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model": made(Scaled, seed=9)}, "starting weights"),
        ({"batches": draw()[::-1]}, "data"),
        ({"batches": [(x, y.flip(0)) for x, y in draw()]}, "data"),
        ({"teacher": made(Scaled, seed=4)}, "teacher"),
        ({"teacher": None}, "teacher"),
        ({"distillation": 0.5}, "distillation"),
        ({"lr": 0.1}, "recipe"),
        ({"seed": 1}, "seed"),
        ({"loss": partial(F.cross_entropy, label_smoothing=0.2)}, "loss"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, options, what, finished):
    path, same_loss = tmp_path / "c.pt", partial(F.cross_entropy, label_smoothing=0.1)
    usual = {"teacher": made(Scaled, seed=3), "loss": same_loss, "checkpoint": path}
    paused(path, made(Scaled), teacher=usual["teacher"], loss=same_loss)
    if finished:
        tuned(made(Scaled), draw(), **usual)
    options = {"model": made(Scaled), "batches": draw()} | usual | options
    model = options.pop("model")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=f"another model.*differing: .*{what}"):
        tuned(model, options.pop("batches"), **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tuned(made(Scaled), draw(), **usual)


def test_the_network_that_was_paused_goes_on_itself(tmp_path):
    whole = made(Scaled)
    tuned(whole, draw())
    model = paused(tmp_path / "c.pt", made(Scaled))
    for _ in range(2):  # also once it is finished
        tuned(model, draw(), checkpoint=tmp_path / "c.pt")
        assert same(model, whole)


@pytest.mark.parametrize(
    "data",
    [
        lambda seed: DataLoader(TensorDataset(torch.full((8, 3, 8, 8), float(seed)), torch.arange(8) % 5), 4),
        lambda seed: DataLoader(TensorDataset(torch.zeros(8, 3, 8, 8), torch.arange(8) % (4 + seed)), 4),
    ],
)
def test_loaders_are_told_apart_without_drawing_from_them(tmp_path, data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    path, start = tmp_path / "c.pt", copy.deepcopy(model)
    tuned(model, data(0), checkpoint=path)
    tuned(copy.deepcopy(start), data(0), checkpoint=path)
    with pytest.raises(TrainingError, match="differing: data"):
        tuned(copy.deepcopy(start), data(1), checkpoint=path)


def test_trainings_on_images_are_told_apart(tmp_path):
    one, path = dataclasses.replace(RECIPE, epochs=1), tmp_path / "c.pt"
    run = partial(train, recipe=one, device="cpu", checkpoint=path, checkpoint_every=0)
    run(network(), DATA)
    others = synthetic(train=80, test=20, size=16, seed=1)
    for model, data, what in (
        (network(seed=1), DATA, "starting weights"),
        (network(), others, "data"),
        (network(), dataclasses.replace(DATA, validation=others.test), "data"),
    ):
        with pytest.raises(TrainingError, match=f"differing: {what}"):
            run(model, data)
    with pytest.raises(TrainingError, match="differing: seed"):
        run(network(), DATA, seed=1)
    assert len(run(network(), dataclasses.replace(DATA, test=others.test), seed=np.int64(0)).curves) == 1
    tuned(network(), hold_out(DATA, 20), batch_size=20, checkpoint=tmp_path / "d.pt")
    with pytest.raises(TrainingError, match="differing: data"):
        tuned(network(), hold_out(DATA, 20, seed=1), batch_size=20, checkpoint=tmp_path / "d.pt")


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "plain"),
    [
        (Recipe, {"epochs": np.int64(3), "lr": np.float64(0.5), "translate": np.uint8(2)}, {}),
        (Skip, {"basis_every": np.int32(2), "coefficients_until": np.float32(0.5)}, {}),
        (Switch, {"ratios": np.array([0.5, 0.25]), "multiple": np.int64(2)}, {"ratios": (0.5, 0.25)}),
        (Switch, {"budget": {"params": np.float32(0.5)}, "after": np.float32(0.25), "images": np.int64(9)}, {}),
    ],
)
def test_numbers_of_numpy_are_numbers(kind, options, plain):
    usual = {key: value.item() for key, value in options.items() if isinstance(value, np.generic)} | plain
    assert repr(kind(**options)) == repr(kind(**usual))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Recipe, {"epochs": 2.0}),
        (Recipe, {"batch_size": True}),
        (Recipe, {"lr": "0.1"}),
        (Recipe, {"momentum": None}),
        (Skip, {"basis_every": 1.0}),
        (Switch, {"patience": True}),
        (Switch, {"ratios": ("1/2",)}),
        (Switch, {"budget": {"params": True}}),
    ],
)
def test_what_is_no_number_is_refused_by_name(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_a_fine_tuning_takes_numbers_of_numpy():
    usual = {"epochs": 2, "lr": 0.5, "weight_decay": 0.25, "label_smoothing": 0.125, "seed": 3}
    given = {key: np.array(value)[()] for key, value in usual.items()}
    assert repr(tuned(made(Scaled), draw(), **given).recipe) == repr(tuned(made(Scaled), draw(), **usual).recipe)
