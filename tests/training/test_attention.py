"""Attention transfer: the maps, the term, what a training makes of it, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import basis
from basis.data import synthetic
from basis.models import build
from basis.training.attention import Attention, attention_map
from basis.training.loop import Kind, Recipe, TrainingError, TrainingPaused, make_step, train
from basis.training.skipping import Skip

RECIPE = Recipe(epochs=3, batch_size=20, translate=2, cutout=8, precision="fp32", attention=1000.0)  # 4 steps an epoch
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return synthetic(train=80, test=20, size=16)


def dense(seed=0, width=8):
    torch.manual_seed(seed)
    return build("resnet20", width=width)


def student(seed=1, **options):
    options = {"layer": "generic:0.5", "include": "layer*conv?"} | options
    torch.manual_seed(seed)
    return basis.substitute(build("resnet20", width=4), init="random", **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# -- the term ---------------------------------------------------------------------------------------


def test_the_map_is_the_unit_mean_of_squares():
    features = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    squares = (features.numpy() ** 2).mean(1).reshape(3, 24)
    expected = squares / np.sqrt((squares**2).sum(1, keepdims=True))
    np.testing.assert_allclose(attention_map(features).numpy(), expected, rtol=1e-12)
    large = (300 * features).half()  # whose squares overflow in fp16
    torch.testing.assert_close(attention_map(large), attention_map(large.float()))
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention_map(zeros).sum().backward()
    assert torch.equal(zeros.grad, torch.zeros_like(zeros))


class Scale(nn.Module):
    """One channel, two pixels, and two weights."""

    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b]))
        self.at = nn.Identity()

    def forward(self, x):
        return self.at(x * self.weight).flatten(1)


def test_the_term_is_that_of_a_hand_computation():
    ours, theirs = Scale(1.0, 2.0), Scale(2.0, 1.0)
    logits, term = Attention(ours, theirs, ["at"], weight=3.0)(torch.ones(5, 1, 1, 2))
    assert torch.equal(logits, torch.tensor([[1.0, 2.0]]).expand(5, 2))
    # The maps are (1, 4) / sqrt(17) and (4, 1) / sqrt(17), so both differences are 3 / sqrt(17).
    assert term.item() == pytest.approx(3 * 9 / 17)
    term.backward()
    assert theirs.weight.grad is None
    # d(term)/d(cos) = -2 weight / pixels = -3 with cos = (4 a^2 + b^2) / sqrt(17 (a^4 + b^4)) at a = 1, b = 2.
    a, b = 1.0, 2.0
    norm, dot = a**4 + b**4, 4 * a**2 + b**2
    by_a = -3 / 17**0.5 * (8 * a / norm**0.5 - dot * 2 * a**3 / norm**1.5)
    by_b = -3 / 17**0.5 * (2 * b / norm**0.5 - dot * 2 * b**3 / norm**1.5)
    assert ours.weight.grad.tolist() == pytest.approx([by_a, by_b], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_adds_the_term_and_leaves_the_teacher_as_it_is(precision):
    model, teacher = student(), dense()
    teacher.layer2.eval()
    teacher.fc.weight.requires_grad_(False)
    before, modes = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()]
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    recipe = Recipe(attention=100.0, precision=precision, momentum=0.0, weight_decay=0.0, lr=0.1)
    step = make_step(model, recipe, device="cpu", teacher=teacher)
    reference = copy.deepcopy(model)
    step(x, y, Kind())
    assert [module.training for module in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert [name for name, p in teacher.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for network in (model, teacher) for module in network.modules())

    attention = Attention(reference, teacher, weight=100.0, autocast=step._autocast)
    logits, term = attention(x)
    assert term > 0.01
    (nn.functional.cross_entropy(logits.float(), y) + term).backward()
    for p, old in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, old - 0.1 * old.grad, rtol=1e-4, atol=1e-5)


# -- in a training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"decay": "scaled"}, {}),
        ({"skip": Skip(basis_every=2)}, {"layer": None, "ratio": 0.5, "batch_norm": "through_basis"}),
    ],
    ids=str,
)
def test_a_resumed_training_is_bit_identical(data, tmp_path, terms, options):
    recipe, path = dataclasses.replace(RECIPE, **terms), tmp_path / "c.pt"
    whole, parts, plain = student(**options), student(**options), student(**options)
    expected = train(whole, data, recipe, device="cpu", teacher=dense())
    assert expected.step == "eager"
    with pytest.raises(TrainingPaused):
        train(parts, data, recipe, device="cpu", checkpoint=path, should_stop=lambda: True, teacher=dense())
    torch.manual_seed(99)
    parts = student(seed=7, **options)
    result = train(parts, data, recipe, device="cpu", checkpoint=path, teacher=dense())
    assert same(whole, parts)
    assert [row["train_loss"] for row in result.curves] == [row["train_loss"] for row in expected.curves]
    train(plain, data, dataclasses.replace(recipe, attention=None), device="cpu")
    assert not same(whole, plain)


def test_a_step_can_be_used_again(data):
    model, recipe = student(), dataclasses.replace(RECIPE, epochs=1)
    start = copy.deepcopy(model.state_dict())
    expected = student()
    train(expected, data, recipe, device="cpu", teacher=dense())
    step = make_step(model, recipe, device="cpu", teacher=dense())
    for _ in range(2):
        model.load_state_dict(start)
        train(model, data, recipe, device="cpu", step=step)
        assert same(model, expected)
    for weight, teacher in ((1000.0, dense()), (5.0, None), (None, None)):
        with pytest.raises(TrainingError, match="step"):
            train(model, data, dataclasses.replace(recipe, attention=weight), device="cpu", step=step, teacher=teacher)


# -- what is refused --------------------------------------------------------------------------------


class Twice(nn.Module):
    """Calls one module twice and another never."""

    def __init__(self):
        super().__init__()
        self.conv, self.idle = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "teacher", "taps", "message"),
    [
        (student, None, None, "no teacher"),
        (student, dense, [], "taps"),
        (student, dense, ["layr1"], "the model has no module 'layr1' .* 'layer1'"),
        (student, lambda: build("resnet18", width=4), ["layer1.2"], "the teacher has no module 'layer1.2'"),
        (student, dense, ["layer1", "fc"], "the output of 'fc'"),
        (lambda: build("resnet18", width=4), dense, None, "the teacher has no module 'layer4'"),
        (student, lambda: Strided(), ["layer1"], "attention maps of 'layer1'"),
        (Twice, dense, None, "stages"),
        (Twice, Twice, ["conv"], "'conv' 2 times"),
        (Twice, Twice, ["idle"], "'idle' 0 times"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(data, model, teacher, taps, message):
    model = model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=message):
        train(model, data, RECIPE, device="cpu", teacher=teacher and teacher(), taps=taps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


class Strided(nn.Module):
    """A first stage of half the size."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.layer1(x)


def test_a_teacher_without_attention_is_refused(data):
    for options in ({"teacher": dense()}, {"taps": ["layer1"]}):
        with pytest.raises(TrainingError, match="attention"):
            train(student(), data, dataclasses.replace(RECIPE, attention=None), device="cpu", **options)
    model = student()
    for teacher in (model, copy.copy(model)):
        with pytest.raises(TrainingError, match="shares parameters"):
            train(model, data, RECIPE, device="cpu", teacher=teacher)


def test_a_checkpoint_knows_weight_taps_and_teacher(data, tmp_path):
    path, recipe = tmp_path / "c.pt", dataclasses.replace(RECIPE, epochs=1)
    train(student(), data, recipe, device="cpu", checkpoint=path, checkpoint_every=0, teacher=dense())
    train(student(), data, recipe, device="cpu", checkpoint=path, teacher=dense())
    for weight, teacher, taps in ((1.0, dense(), None), (1000.0, dense(), ["layer1"]), (1000.0, dense(width=4), None)):
        other = dataclasses.replace(recipe, attention=weight)
        with pytest.raises(TrainingError, match="belongs to a training with another"):
            train(student(), data, other, device="cpu", checkpoint=path, teacher=teacher, taps=taps)
