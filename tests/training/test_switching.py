"""Trainings that switch from dense layers on their way: when, to what, what is carried over, and how they resume."""

import copy
import dataclasses

import pytest
import torch

from basis import Switch, plan_of, substitute, train
from basis.layers.conv import BasisConv2d
from basis.models import build
from basis.training.loop import Recipe, TrainingError, TrainingPaused, make_step
from basis.training.switching import carry_momentum, dense_weights, weight_of
from tests.training.common import DATA, RECIPE, network

SEARCH = {"images": 60, "ratios": (0.5, 0.25)}


def switched(epochs: int = 4, **changes) -> Recipe:
    return dataclasses.replace(RECIPE, epochs=epochs, switch=Switch(**{**SEARCH, **changes}))


def dense() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("resnet20", width=4)


def result_of(recipe, **options):
    model = dense()
    return model, train(model, DATA, recipe, device="cpu", **options)


def test_the_network_is_replaced_in_place_within_the_budget():
    model, result = result_of(switched(after=0.5))
    whole = sum(p.numel() for p in dense().parameters())
    assert result.switched["epoch"] == 2
    assert plan_of(model).layers == result.switched["layers"]
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * whole
    assert 0 < result.switched["seconds"] < result.train_seconds
    assert len(result.curves) == 4 and result.test["accuracy"] >= 0


def test_until_the_switch_it_is_the_dense_training():
    _, result = result_of(switched(after=0.5))
    _, whole = result_of(dataclasses.replace(RECIPE, epochs=4))
    losses = [[row["train_loss"] for row in one.curves] for one in (result, whole)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]


@pytest.mark.parametrize("changes", [{}, {"momentum": "projected"}, {"pairs": True}, {"teach": 0.5}, {"until": "ranks"}])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_is_bit_identical(tmp_path, changes, stop):
    recipe, path = switched(after=0.5, **changes), tmp_path / "c.pt"
    whole, expected = result_of(recipe)
    left = iter(range(1, 9))
    with pytest.raises(TrainingPaused):
        result_of(recipe, checkpoint=path, should_stop=lambda: next(left) == stop)
    model, result = result_of(recipe, checkpoint=path)
    assert [row["train_loss"] for row in result.curves] == [row["train_loss"] for row in expected.curves]
    assert result.switched["layers"] == expected.switched["layers"]
    for one, other in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)
