"""Trainings that switch from dense layers on their way: when, to what, what is carried over, and how they resume."""

import dataclasses

import pytest
import torch
from torch import nn

from basis import Switch, plan_of, substitute, train
from basis.data import hold_out
from basis.search.switching import pair_rank, stable_rank
from basis.training.loop import Recipe, TrainingError, TrainingPaused
from basis.training.skipping import Skip
from basis.training.switching import carry_momentum, dense_weights, weight_of
from tests.training.common import DATA, RECIPE, SEARCH, at, losses, network, same

HALF = 0.5


def switched(**changes) -> Recipe:
    return dataclasses.replace(RECIPE, epochs=4, switch=Switch(**{"after": HALF, **SEARCH, **changes}))


def trained(recipe, data=DATA, **options):
    model = network()
    return model, train(model, data, recipe, device="cpu", **options)


def size(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"budget": {"params": 0.5, "macs": 0.6}}, {"rule": "uniform", "fit": "weight"}, {"pairs": True},
     {"rule": "stable_rank", "exclude": ("layer1.*",)}, {"rule": "largest_first", "ratio": 0.25},
     {"measure": "fisher"}, {"measure": "spectrum", "fit": "weight"}],
    ids=str,
)  # fmt: skip
def test_layers_are_replaced_in_place_within_the_budget(changes):
    model, result = trained(switched(**changes), hold_out(DATA, 20))
    found = result.switched
    assert found["epoch"] == 2
    assert size(model) <= HALF * size(network())
    assert found["predicted"]["params"] <= HALF
    assert found["predicted"]["macs"] <= changes.get("budget", {}).get("macs", 1)
    assert 0 < found["seconds"] < result.train_seconds
    pairs = {name for name, m in model.named_modules() if isinstance(m, nn.Sequential) and len(m) == 2}
    assert set(found["layers"]) == (pairs if "pairs" in changes else set(plan_of(model).layers))
    assert not any(name.startswith("layer1") for name in found["layers"]) or "exclude" not in changes


def test_until_the_switch_it_is_the_dense_training():
    (_, result), (_, whole) = trained(switched()), trained(dataclasses.replace(RECIPE, epochs=4))
    assert losses(result)[:2] == losses(whole)[:2]
    assert losses(result)[2:] != losses(whole)[2:]


@pytest.mark.parametrize(  # after epoch 1, after epoch 3, and within epoch 4; the switch begins epoch 3
    ("question", "changes"),
    [(4, {}), (9, {"momentum": "projected"}), (4, {"pairs": True}), (11, {"teach": 0.5}), (9, {"until": "ranks"})],
    ids=str,
)
def test_a_resumed_training_is_bit_identical(tmp_path, changes, question):
    (whole, expected), path = trained(switched(**changes)), tmp_path / "c.pt"
    with pytest.raises(TrainingPaused):
        trained(switched(**changes), checkpoint=path, should_stop=at(question))
    torch.manual_seed(99)
    model = network()
    result = train(model, DATA, switched(**changes), device="cpu", checkpoint=path)
    assert same(model, whole)
    assert losses(result) == losses(expected)
    assert result.switched["layers"] == expected.switched["layers"]
    assert result.test == expected.test


@pytest.mark.parametrize("form", ["basis", "pair"])
def test_projected_momentum_is_that_of_the_factors(form):
    """What SGD would have gathered for B and A by the gradients that W had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)).double()
    dense = dense_weights(model)
    velocity = torch.randn_like(dense["0"])
    old = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    old.state[dense["0"]]["momentum_buffer"] = velocity
    Switch(pairs=form == "pair").rebuild(model, {"0": 3})
    new = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    carry_momentum(old, new, model, dense, momentum="projected")
    found = [new.state[p]["momentum_buffer"] for p in model.parameters()]
    v, layer = velocity.flatten(1), model[0]
    if form == "basis":
        order = torch.argsort(layer.order)  # of each row of [B; A B], its output channel
        expected = [layer.mixing.T @ v, v[order[3:]] @ layer.basis.flatten(1).T]
        factors = [layer.basis, layer.coefficients.weight]
    else:
        first, second = layer[0].weight.flatten(1), layer[1].weight.flatten(1)
        expected, factors = [second.T @ v, v @ first.T], [layer[0].weight, layer[1].weight]
    for p, one in zip(factors, expected, strict=True):
        torch.testing.assert_close(new.state[p]["momentum_buffer"].flatten(1), one.detach())
    assert len(found) == 2
    restarted = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    carry_momentum(old, restarted, model, dense, momentum="restarted")
    assert not restarted.state


def test_parameters_that_stay_keep_their_momentum():
    model = network()
    old = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    old.state.update({p: {"momentum_buffer": torch.randn_like(p)} for p in model.parameters()})
    dense = dense_weights(model)
    Switch().rebuild(model, {"layer3.0.conv2": 4})
    new = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    carry_momentum(old, new, model, dense, momentum="restarted")
    kept = [p for p in model.parameters() if p in old.state]
    assert len(kept) == len(list(model.parameters())) - 2
    assert all(new.state[p] is old.state[p] for p in kept)


def test_ranks_and_pairs():
    weight = torch.zeros(6, 4, 1, 1)
    weight[0, 0], weight[1, 1] = 2, 1
    assert stable_rank(weight) == pytest.approx(1.25)
    assert stable_rank(torch.zeros(3, 2, 1, 1)) == 1
    conv = nn.Conv2d(16, 32, 3, bias=False)
    q = pair_rank(conv, 8)
    basis = 8 * 144 + 24 * 8
    assert q * (144 + 32) <= basis < (q + 1) * (144 + 32)
    torch.manual_seed(0)
    model = nn.Sequential(conv)
    Switch(pairs=True).rebuild(model, {"0": 32})
    torch.testing.assert_close(weight_of(model[0]), conv.weight, rtol=0, atol=1e-5)  # at full rank


def test_the_switch_waits_until_it_has_settled():
    switch = Switch(after=0.8, until="ranks")
    seen = [{"a": factor, "b": 2 * factor} for factor in (1.0, 1.1, 1.1 * 1.04, 1.1 * 1.04**2)]
    assert [switch.due(epoch, 10, seen[: epoch + 1]) for epoch in range(4)] == [False, False, False, True]
    assert switch.due(8, 10, [{"a": float(2**i)} for i in range(9)])  # at the latest
    assert [Switch(after=0.3).due(epoch, 16, [{}]) for epoch in (4, 5)] == [False, True]


@pytest.mark.parametrize(
    ("wrong", "named"), [({"after": 1.0}, "after"), ({"teach": 0.0}, "teach"), ({"until": "never"}, "until"),
                         ({"momentum": "kept"}, "momentum"), ({"images": 0}, "images"), ({"fit": "x"}, "fit")]
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Switch(**wrong)


def test_a_training_that_cannot_switch_says_why_before_it_begins():
    with pytest.raises(ValueError, match="goes without skip"):
        dataclasses.replace(switched(), skip=Skip(basis_every=2))
    begun = {"should_stop": lambda: pytest.fail("it began")}
    for changes, reason in (
        ({"budget": {"params": 0.01}}, "no plan of the rule 'optimal' meets a budget"),
        ({"budget": {"params": 0.01}, "rule": "stable_rank"}, "no plan of the rule 'stable_rank' meets a budget"),
        ({"measure": "fine_tuning"}, "measure is 'fine_tuning'"),
        ({"exclude": ("head",)}, "exclude has 'head'"),
    ):
        with pytest.raises(TrainingError, match=reason):
            trained(switched(**changes), **begun)
    model = substitute(network(), ratio=0.5)
    with pytest.raises(TrainingError, match="no convolution of the model has a candidate"):
        train(model, DATA, switched(), device="cpu", **begun)


def test_pairs_leave_grouped_layers_dense_and_replace_shared_ones_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
            self.twice = nn.Conv2d(16, 16, 3, padding=1)
            self.again, self.fc = self.twice, nn.Linear(16, 10)

        def forward(self, x):
            x = self.again(self.twice(self.grouped(self.first(x)).relu()).relu())
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Shared()
    result = train(model, DATA, switched(pairs=True, measure="oneshot", budget={"params": 0.7}), device="cpu")
    assert "grouped" not in result.switched["layers"]
    assert isinstance(model.twice, nn.Sequential)
    assert model.twice is model.again
