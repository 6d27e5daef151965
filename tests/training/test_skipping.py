"""Skip-training: what a step does not update is not computed, and the cost model knows it."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from basis.training.loop import Recipe, Schedule, TrainingError, make_step, train
from basis.training.skipping import Parts, Skip, Trained, check_skip, predicted_step, step_cost
from tests.training.common import DATA, RECIPE, layers, network, resumed

COMBINATIONS = [Trained(b, a) for b in (True, False) for a in (True, False)]


def trained(skip, steps=12, steps_per_epoch=4):
    """The schedule as two texts, one letter per step."""
    at = [skip.trains(s, steps_per_epoch=steps_per_epoch, total_steps=steps) for s in range(steps)]
    return "".join("-B"[t.basis] for t in at), "".join("-A"[t.coefficients] for t in at)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (Skip(), ("BBBBBBBBBBBB", "AAAAAAAAAAAA")),
        (Skip(basis_every=3), ("B--B--B--B--", "AAAAAAAAAAAA")),
        (Skip(coefficients_every=5), ("BBBBBBBBBBBB", "A----A----A-")),
        (Skip(coefficients_until=0), ("BBBBBBBBBBBB", "------------")),
        (Skip(basis_until=0.5), ("BBBBBB------", "AAAAAAAAAAAA")),
        (Skip(basis_every=2, basis_until=0.5, coefficients_until=0.25), ("B-B-B-------", "AAA---------")),
        (Skip(alternate=True), ("BBBB----BBBB", "----AAAA----")),
    ],
)
def test_the_schedule(skip, expected):
    assert trained(skip) == expected
    shares = skip.shares(steps_per_epoch=4, total_steps=12)
    both = [Trained(b != "-", a != "-") for b, a in zip(*expected, strict=True)]
    assert shares == {combination: both.count(combination) / 12 for combination in set(both)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"basis_every": 0}, "basis_every is 0"),
        ({"basis_until": 1.5}, "basis_until is 1.5"),
        ({"basis_until": 0, "coefficients_until": 0}, "never train anything"),
        ({"alternate": True, "basis_every": 2}, "alternate"),
        ({"rescale": True, "basis_until": 0.5}, "rescale"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        Skip(**options)


def test_a_schedule_without_effect_is_an_error():
    steps, frozen = {"steps_per_epoch": 4, "total_steps": 12}, network("frozen")
    for skip in (Skip(coefficients_every=2), Skip(alternate=True)):
        with pytest.raises(ValueError, match="no coefficients that are trained"):
            check_skip(frozen, skip, **steps)
    check_skip(frozen, Skip(basis_every=2), **steps)
    with pytest.raises(ValueError, match="only one epoch"):
        check_skip(network("dense"), Skip(alternate=True), steps_per_epoch=12, total_steps=12)


def gradients_seen(model, DATA, skip):
    """Of every step: whether all B, all A and all others had a gradient, or none of each."""
    parts = Parts(model)
    inside = {id(p) for p in (*parts.basis, *parts.coefficients)}
    kinds = (parts.basis, parts.coefficients, [p for p in model.parameters() if id(p) not in inside])
    seen = []

    def look(optimizer, args, kwargs):
        given = [{p.grad is not None for p in kind} for kind in kinds]
        assert all(len(kind) == 1 for kind in given)
        seen.append(tuple(kind.pop() for kind in given))

    handle = register_optimizer_step_pre_hook(look)
    try:
        train(model, DATA, dataclasses.replace(RECIPE, skip=skip), device="cpu")
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("mode", "skip"), [("factorized", Skip(basis_every=2, coefficients_until=0.3)), ("composed", Skip(alternate=True))]
)
def test_what_a_step_skips_has_no_gradient(mode, skip):
    expected = [skip.trains(step, steps_per_epoch=4, total_steps=12) for step in range(12)]
    assert gradients_seen(network("dense", mode=mode), DATA, skip) == [(*t, True) for t in expected]


@pytest.mark.parametrize(
    ("skip", "form"),
    [
        (Skip(basis_every=3, coefficients_until=0.5), "dense"),
        (Skip(alternate=True), "shared"),
    ],
)
def test_a_resumed_training_is_bit_identical(tmp_path, skip, form):
    resumed(dataclasses.replace(RECIPE, skip=skip), tmp_path / "c.pt", partial(network, form))


def test_gradients_are_asked_for_as_before_afterwards():
    model = network("dense")
    first, *others = layers(model)
    first.basis.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    frozen = first.basis.clone()
    train(model, DATA, dataclasses.replace(RECIPE, skip=Skip(basis_until=0.5)), device="cpu")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(first.basis, frozen)
    assert others

    with pytest.raises(TrainingError, match="loss is"):  # in epoch 1, at whose end B is frozen
        train(model, DATA, dataclasses.replace(RECIPE, lr=1e20, skip=Skip(basis_until=0.1)), device="cpu")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("mode", "combination"), [("factorized", t) for t in COMBINATIONS] + [("composed", COMBINATIONS[1])]
)
def test_the_cost_of_a_step_is_what_is_executed(combination, mode):
    model = network("dense", mode=mode, ratio=1 / 4)  # from 1/2 on, a CPU multiplies with A alone
    expected = step_cost(model, combination, input_size=(3, 32, 32), batch_size=2, mode=mode)
    assert all(p.requires_grad for p in model.parameters())
    Parts(model).train(combination)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    macs = expected.forward_macs + expected.backward_macs
    assert counter.get_total_flops() == 2 * (macs + expected.identity_forward_macs + expected.identity_backward_macs)


@pytest.mark.parametrize(
    ("skip", "counts"),
    [
        (Skip(), (1, 0, 0, 0)),
        (Skip(basis_every=2, coefficients_every=3), (1 / 6, 1 / 3, 1 / 6, 1 / 3)),
        (Skip(alternate=True), (0, 2 / 3, 1 / 3, 0)),
    ],
)
def test_the_predicted_step_is_the_mean_over_the_schedule(skip, counts):
    model = network("dense")
    size = {"input_size": (3, 32, 32), "batch_size": 2}
    total = [step_cost(model, combination, **size) for combination in COMBINATIONS]
    macs = [c.forward_macs + c.backward_macs for c in total]
    assert macs[0] > max(macs[1], macs[2]) > min(macs[1], macs[2]) > macs[3]
    expected = sum(share * m for share, m in zip(counts, macs, strict=True)) / macs[0]
    found = predicted_step(model, skip, **size, steps_per_epoch=4, total_steps=12)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_rescaled_part_has_n_times_the_learning_rate():
    recipe = Recipe(epochs=1, lr=0.1, skip=Skip(basis_every=4, rescale=True))
    step = make_step(network("dense"), recipe, device="cpu")
    Schedule(step, recipe, steps_per_epoch=10, total_steps=10).prepare(5)
    rates = {group["part"]: group["lr"] for group in step.optimizer.param_groups}
    assert rates["others"] == rates["coefficients"] == pytest.approx(recipe.rate(0.5))
    assert rates["basis"] == pytest.approx(4 * recipe.rate(0.5))
