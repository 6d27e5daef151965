"""Attention transfer: the maps, the term, what a training makes of it, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from basis.training.attention import Attention, attention_map
from basis.training.loop import Kind, Recipe, TrainingError, make_step, train
from basis.training.skipping import Skip
from tests.training import common
from tests.training.common import DATA, same

RECIPE = dataclasses.replace(common.RECIPE, attention=1000.0)


def dense(seed=0, width=8):
    return common.network(seed=seed, width=width)


def student(seed=1, **options):
    return common.network(seed=seed, **({"layer": "generic:0.5", "include": "layer*conv?"} | options))


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

    stages = ("at",)

    def __init__(self, a, b):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b]))
        self.at = nn.Identity()

    def forward(self, x):
        return self.at(x * self.weight).flatten(1)


def test_the_term_is_that_of_a_hand_computation():
    ours, theirs = Scale(1.0, 2.0), Scale(2.0, 1.0)
    logits, term = Attention(ours, theirs, weight=3.0)(torch.ones(5, 1, 1, 2))
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
    before, modes = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()]
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    recipe = Recipe(attention=100.0, precision=precision, momentum=0.0, weight_decay=0.0, lr=0.1)
    step = make_step(model, recipe, device="cpu", teacher=teacher)
    reference = copy.deepcopy(model)
    step(x, y, Kind())
    assert [module.training for module in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for network in (model, teacher) for module in network.modules())

    logits, term = Attention(reference, teacher, weight=100.0, autocast=step._autocast)(x)
    assert term > 0.01
    (nn.functional.cross_entropy(logits.float(), y) + term).backward()
    for p, old in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, old - 0.1 * old.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"decay": "scaled"}, {}),
        ({"skip": Skip(basis_every=2)}, {"form": "dense", "layer": None, "batch_norm": "through_basis"}),
    ],
    ids=str,
)
def test_a_resumed_training_is_bit_identical(tmp_path, terms, options):
    recipe = dataclasses.replace(RECIPE, **terms)
    whole = common.resumed(recipe, tmp_path / "c.pt", lambda seed=1: student(seed, **options), dense)
    plain = student(**options)
    train(plain, DATA, dataclasses.replace(recipe, attention=None), device="cpu")
    assert not same(whole, plain)


def test_what_cannot_be_compared_is_refused_before_any_work():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    for model, teacher, message in ((student(), None, "attention"), (linear, dense(), "names no stages")):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(TrainingError, match=message):
            train(model, DATA, RECIPE, device="cpu", teacher=teacher)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_teacher_goes_with_attention_alone_and_is_no_part_of_the_model():
    with pytest.raises(TrainingError, match="attention"):
        train(student(), DATA, common.RECIPE, device="cpu", teacher=dense())
    model = student()
    with pytest.raises(TrainingError, match="shares parameters"):
        train(model, DATA, RECIPE, device="cpu", teacher=copy.copy(model))


def test_a_checkpoint_knows_weight_and_teacher(tmp_path):
    path, recipe = tmp_path / "c.pt", dataclasses.replace(RECIPE, epochs=1)
    train(student(), DATA, recipe, device="cpu", checkpoint=path, checkpoint_every=0, teacher=dense())
    for weight, teacher in ((1.0, dense()), (1000.0, dense(width=4))):
        other = dataclasses.replace(recipe, attention=weight)
        with pytest.raises(TrainingError, match="belongs to a training with another"):
            train(student(), DATA, other, device="cpu", checkpoint=path, teacher=teacher)
