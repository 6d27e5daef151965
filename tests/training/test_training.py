"""Training: it learns, it is reproducible, it goes on where it stopped, and it refuses what cannot work."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from basis.data import hold_out, synthetic
from basis.models import build
from basis.training import epochs
from basis.training.loop import (
    Recipe,
    TrainingError,
    TrainingPaused,
    choose_memory_format,
    choose_precision,
    evaluate,
    learning_rate,
    make_optimizer,
    train,
)

RECIPE = Recipe(epochs=3, batch_size=100, translate=2, cutout=8, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return synthetic(train=300, test=100, size=16)


def network(seed=0):
    torch.manual_seed(seed)
    return build("resnet20", width=4)


def test_networks_learn_the_stand_in():
    data = hold_out(synthetic(train=1600, test=300, size=16), 100)
    result = train(network(), data, dataclasses.replace(RECIPE, epochs=5), device="cpu")
    assert result.test["accuracy"] > 0.5  # chance is 0.1
    assert result.validation["accuracy"] == pytest.approx(result.curves[-1]["validation_accuracy"])
    assert result.curves[-1]["train_loss"] < result.curves[0]["train_loss"]
    assert result.steps == 75
    assert result.train_seconds == pytest.approx(sum(row["seconds"] for row in result.curves))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_training_is_bit_identical(data, tmp_path, precision):
    recipe = dataclasses.replace(RECIPE, precision=precision)
    whole, parts = network(), network()
    expected = train(whole, data, recipe, device="cpu")
    with pytest.raises(TrainingPaused, match="after epoch 1 of 3"):
        train(parts, data, recipe, device="cpu", checkpoint=tmp_path / "c.pt", should_stop=lambda: True)
    torch.manual_seed(99)  # a new process: neither the weights nor the random state are there
    parts = network(seed=5)
    result = train(parts, data, recipe, device="cpu", checkpoint=tmp_path / "c.pt")
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert result.test == expected.test
    assert [row["train_loss"] for row in result.curves] == [row["train_loss"] for row in expected.curves]


def test_a_checkpoint_of_another_training_is_refused(data, tmp_path):
    one = dataclasses.replace(RECIPE, epochs=1)
    train(network(), data, one, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    with pytest.raises(TrainingError, match="belongs to a training with another"):
        train(network(), data, RECIPE, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    (tmp_path / "c.pt").write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="cannot be read"):
        train(network(), data, one, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)


def test_checkpoints_are_written_now_and_then_and_when_stopping(data, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(epochs, "write_checkpoint", lambda path, content: written.append(content["epoch"]))
    three = dataclasses.replace(RECIPE, epochs=3)
    train(network(), data, three, device="cpu", checkpoint=tmp_path / "c.pt")
    assert written == []  # within a minute none
    with pytest.raises(TrainingPaused):
        train(network(), data, three, device="cpu", checkpoint=tmp_path / "c.pt", should_stop=lambda: True)
    assert written == [1]
    train(network(), data, three, device="cpu", checkpoint=tmp_path / "c.pt", checkpoint_every=0)
    assert written == [1, 1, 2, 3]


def test_seeds_decide_alone_and_too_few_images_are_refused(data):
    one = dataclasses.replace(RECIPE, epochs=1)
    losses = [train(network(), data, one, device="cpu", seed=seed).curves[0]["train_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(TrainingError, match="batch_size is 700"):
        train(network(), data, dataclasses.replace(RECIPE, batch_size=700), device="cpu")


def test_a_loss_that_explodes_is_reported(data):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) in epoch"):
        train(network(), data, dataclasses.replace(RECIPE, lr=1e20), device="cpu")


def test_the_learning_rate_is_a_triangle():
    recipe = Recipe(lr=0.2, peak=0.2, start=0.5)
    assert learning_rate(recipe, 0) == pytest.approx(0.1)
    assert learning_rate(recipe, 0.2) == pytest.approx(0.2)
    assert learning_rate(recipe, 0.6) == pytest.approx(0.1)
    assert learning_rate(recipe, 1) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": -1},
        {"lr": 0.0},
        {"peak": 1.0},
        {"momentum": -1},
        {"translate": 40},
        {"cutout": -3},
        {"precision": "fp8"},
        {"memory_format": "NHWC"},
    ],
)
def test_recipes_that_make_no_sense_name_the_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        Recipe(**wrong)


def test_evaluation_counts_and_puts_the_training_flag_back(data):
    class Constant(nn.Module):
        """Logits that always name class 3."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    model = Constant().train()
    metrics = evaluate(model, data.test, flip=True)
    assert metrics["accuracy"] == (data.test.y == 3).sum().item() / len(data.test)
    assert metrics["accuracy_flip"] == metrics["accuracy"]
    assert metrics["loss"] == pytest.approx(math.log(9 + math.e) - 0.1, rel=1e-4)
    assert model.training


def test_precision_and_layout_are_chosen_by_device():
    assert choose_precision(torch.device("cpu")) in ("fp32", "bf16")
    wide, narrow, cpu = build("resnet18"), network(), torch.device("cpu")
    assert choose_memory_format(wide, cpu, "fp32") == "contiguous"
    assert choose_memory_format(narrow, cpu, "fp32") == "channels_last"
    assert choose_memory_format(wide, cpu, "bf16") == "channels_last"


def test_frozen_parameters_stay(data):
    model = network()
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    train(model, data, dataclasses.replace(RECIPE, epochs=1), device="cpu")
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
