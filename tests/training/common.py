"""What the tests of training share: a small network, a short recipe, and the check of a resumed training."""

import itertools

import pytest
import torch

import basis
from basis.data import synthetic
from basis.models import build
from basis.training.loop import Recipe, TrainingPaused, train

RECIPE = Recipe(epochs=3, batch_size=20, translate=2, cutout=8, precision="fp32")
SEARCH = {"images": 40, "ratios": (0.5, 0.25)}  # of a switch that takes a second
DATA = synthetic(train=80, test=20, size=16)  # 4 steps an epoch


def network(form=None, *, seed=0, width=4, ratio=0.5, mode="factorized", **options):
    """ResNet-20, dense unless a form of coefficients, or substitute's options, are given."""
    torch.manual_seed(seed)
    model = build("resnet20", width=width)
    if form:
        options |= {"ratio": ratio, "mode": mode, "coefficients": form}
    return basis.substitute(model, init="random", **options) if options else model


def layers(model):
    return [module for module in model.modules() if isinstance(module, basis.BasisConv2d)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def losses(result):
    return [row["train_loss"] for row in result.curves]


def at(question):
    """A ``should_stop`` that says yes when asked for that time; it is asked after each step of an epoch."""
    asked = itertools.count(1)
    return lambda: next(asked) == question


def resumed(recipe, path, make, data=DATA):
    """The network of an uninterrupted training, after a check that one paused twice is alike bit for bit."""
    whole, parts = make(), make()
    expected = train(whole, data, recipe, device="cpu")
    steps = len(data.train) // recipe.batch_size
    for question, said in ((steps, "after epoch 1 of 3"), (steps + 2, "in epoch 3 of 3.* after epoch 2")):
        with pytest.raises(TrainingPaused, match=said):
            train(parts, data, recipe, device="cpu", checkpoint=path, should_stop=at(question))
    torch.manual_seed(99)  # a new process: the random state is another, and the weights are those of the start
    parts = make()
    result = train(parts, data, recipe, device="cpu", checkpoint=path)
    assert same(whole, parts)
    assert losses(result) == losses(expected)
    assert result.test == expected.test
    return whole
