"""Training: it learns, it is reproducible, it goes on where it stopped, and it refuses what cannot work."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from basis.data import hold_out, normalise, synthetic
from basis.models import build
from basis.training.epochs import Training
from basis.training.loop import (
    Recipe,
    TrainingError,
    TrainingPaused,
    choose_memory_format,
    choose_precision,
    evaluate,
    make_optimizer,
    train,
)
from basis.training.skipping import Skip
from tests.training.common import DATA, RECIPE, at, network, resumed, same


def test_networks_learn_the_stand_in():
    images = hold_out(synthetic(train=1600, test=300, size=16), 100)
    result = train(network(), images, dataclasses.replace(RECIPE, epochs=5, batch_size=100), device="cpu")
    assert result.test["accuracy"] > 0.5  # chance is 0.1
    assert result.validation["accuracy"] == pytest.approx(result.curves[-1]["validation_accuracy"])
    assert result.curves[-1]["train_loss"] < result.curves[0]["train_loss"]
    assert result.steps == 75
    assert result.train_seconds == pytest.approx(sum(row["seconds"] for row in result.curves))


def test_a_resumed_training_is_bit_identical(tmp_path):
    resumed(dataclasses.replace(RECIPE, precision="bf16"), tmp_path / "c.pt", network)


def test_checkpoints_are_written_now_and_then_and_when_stopping(tmp_path, monkeypatch):
    written, path = [], tmp_path / "c.pt"
    monkeypatch.setattr(Training, "_save", lambda self, path: written.append(self.epoch))
    train(network(), DATA, RECIPE, device="cpu", checkpoint=path)
    assert written == []  # within a minute none
    with pytest.raises(TrainingPaused):
        train(network(), DATA, RECIPE, device="cpu", checkpoint=path, should_stop=at(4))
    assert written == [1]
    train(network(), DATA, RECIPE, device="cpu", checkpoint=path, checkpoint_every=0)
    assert written == [1, 1, 2, 3]


def test_a_stop_within_an_epoch_undoes_its_steps(tmp_path):
    """So also one that fixed sparse masks, in the second epoch; the very network then goes on."""
    whole, parts = network("sparse:4"), network("sparse:4")
    with pytest.raises(TrainingPaused, match=r"in epoch 1 of 3.* from the start"):
        train(parts, DATA, RECIPE, device="cpu", should_stop=at(1))
    assert same(parts, whole)
    kept = {"device": "cpu", "checkpoint": tmp_path / "c.pt"}
    with pytest.raises(TrainingPaused, match=r"in epoch 2 of 3.* after epoch 1"):
        train(parts, DATA, RECIPE, **kept, should_stop=at(4 + 3))
    train(parts, DATA, RECIPE, **kept)
    train(whole, DATA, RECIPE, device="cpu")
    assert same(parts, whole)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    one = dataclasses.replace(RECIPE, epochs=1)
    train(network(), DATA, one, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    with pytest.raises(TrainingError, match="belongs to a training with another"):
        train(network(), DATA, RECIPE, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    (tmp_path / "c.pt").write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="cannot be read"):
        train(network(), DATA, one, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)


def test_seeds_decide_alone_and_too_few_images_are_refused():
    one = dataclasses.replace(RECIPE, epochs=1)
    losses = [train(network(), DATA, one, device="cpu", seed=seed).curves[0]["train_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(TrainingError, match="batch_size is 700"):
        train(network(), DATA, dataclasses.replace(RECIPE, batch_size=700), device="cpu")


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch"):
        train(network(), DATA, dataclasses.replace(RECIPE, lr=1e20), device="cpu")


def test_the_learning_rate_is_a_triangle():
    recipe = Recipe(lr=0.2, peak=0.2, start=0.5)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(0.2) == pytest.approx(0.2)
    assert recipe.rate(0.6) == pytest.approx(0.1)
    assert recipe.rate(1) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": -1},
        {"lr": 0.0},
        {"peak": 1.0},
        {"momentum": -1},
        {"translate": 40},
        {"precision": "fp8"},
        {"decay": "l1"},
        {"step": "quick"},
        {"decorrelation": float("nan")},
        {"weight_decay": 0.0, "decay": "product"},
        {"decorrelation": 0.1, "skip": Skip(basis_until=0)},
    ],
    ids=str,
)
def test_recipes_that_make_no_sense_name_the_option(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_images_and_batches_give_equal_evaluations():
    batches = zip(normalise(DATA.test.x).split(7), DATA.test.y.split(7), strict=True)
    found = evaluate(network(), list(batches))
    own = {"loss": found.loss, "accuracy": found.accuracy.value}
    assert own == pytest.approx(evaluate(network(), DATA.test), rel=1e-5)


def test_evaluation_counts_and_puts_the_training_flag_back():
    class Constant(nn.Module):
        """Logits that always name class 3."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    model = Constant().train()
    metrics = evaluate(model, DATA.test, flip=True)
    assert metrics["accuracy"] == (DATA.test.y == 3).sum().item() / len(DATA.test)
    assert metrics["accuracy_flip"] == metrics["accuracy"]
    assert metrics["loss"] == pytest.approx(math.log(9 + math.e) - 0.1, rel=1e-4)
    assert model.training


def test_precision_and_layout_are_chosen_by_device():
    assert choose_precision(torch.device("cpu")) in ("fp32", "bf16")
    wide, narrow, cpu = build("resnet18"), network(), torch.device("cpu")
    assert choose_memory_format(wide, cpu, "fp32") == "contiguous"
    assert choose_memory_format(narrow, cpu, "fp32") == "channels_last"
    assert choose_memory_format(wide, cpu, "bf16") == "channels_last"


def test_frozen_parameters_stay():
    model = network()
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    train(model, DATA, dataclasses.replace(RECIPE, epochs=1), device="cpu")
    assert torch.equal(model.conv1.weight, before)


def test_a_first_step_that_overflows_leaves_no_momentum_behind(monkeypatch):
    """As on a GPU in fp16; fused SGD of a CPU has the same fault, and ours must not show it."""
    network = nn.Linear(100, 1, bias=False)
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: sgd(*args, **{**options, "fused": True}))
    optimizer = make_optimizer(network, Recipe(weight_decay=0.0), torch.device("cuda"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = network.weight.detach().clone()
    for scale in (1e38, 1.0):
        optimizer.zero_grad()
        scaler.scale(scale * network.weight.square().sum() / 2).backward()
        scaler.step(optimizer)
        scaler.update()
    # One step of Nesterov momentum from rest: lr (1 + momentum) grad, and the gradient is the weight itself.
    torch.testing.assert_close(network.weight.detach(), before * (1 - 0.2 * 1.9))
