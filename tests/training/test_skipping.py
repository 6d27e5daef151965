"""Skip-training: what a step does not update is not computed, and the cost model knows it."""

import dataclasses

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import basis
from basis.data import synthetic
from basis.models import build
from basis.training.loop import Recipe, Schedule, TrainingError, TrainingPaused, learning_rate, make_step, train
from basis.training.skipping import Parts, Skip, Trained, check_skip, predicted_step, step_cost

RECIPE = Recipe(epochs=3, batch_size=20, translate=2, cutout=8, precision="fp32")  # 4 steps an epoch
COMBINATIONS = [Trained(b, a) for b in (True, False) for a in (True, False)]


@pytest.fixture(scope="module")
def data():
    return synthetic(train=80, test=20, size=16)


def network(*, seed=0, mode="factorized", coefficients="dense", ratio=0.5):
    torch.manual_seed(seed)
    model = build("resnet20", width=4)
    return basis.substitute(model, ratio=ratio, init="random", mode=mode, coefficients=coefficients)


def layers(model):
    return [module for module in model.modules() if isinstance(module, basis.BasisConv2d)]


# -- the schedule -----------------------------------------------------------------------------------


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
        ({"coefficients_every": 1.5}, "coefficients_every is 1.5"),
        ({"coefficients_every": True}, "coefficients_every is True"),
        ({"basis_until": 1.5}, "basis_until is 1.5"),
        ({"coefficients_until": float("nan")}, "coefficients_until is nan"),
        ({"basis_until": 0, "coefficients_until": 0}, "never train anything"),
        ({"alternate": True, "basis_every": 2}, "alternate"),
        ({"rescale": True, "basis_until": 0.5}, "rescale"),
    ],
)
def test_settings_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        Skip(**options)


# -- what it can be used on ---------------------------------------------------------------------------


def test_a_schedule_without_effect_is_an_error():
    steps, frozen = {"steps_per_epoch": 4, "total_steps": 12}, network(coefficients="frozen")
    for skip in (Skip(coefficients_every=2), Skip(alternate=True)):
        with pytest.raises(ValueError, match="no coefficients that are trained"):
            check_skip(frozen, skip, **steps)
    check_skip(frozen, Skip(basis_every=2), **steps)
    with pytest.raises(ValueError, match="only one epoch"):
        check_skip(network(), Skip(alternate=True), steps_per_epoch=12, total_steps=12)
    model = network().requires_grad_(False)
    for layer in layers(model):
        layer.coefficients.requires_grad_(True)
    check_skip(model, Skip(coefficients_every=2), **steps)
    with pytest.raises(ValueError, match="skip leaves nothing to train"):
        check_skip(model, Skip(coefficients_until=0), **steps)


# -- training ---------------------------------------------------------------------------------------


def gradients_seen(model, data, skip):
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
        train(model, data, dataclasses.replace(RECIPE, skip=skip), device="cpu")
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("mode", "skip"), [("factorized", Skip(basis_every=2, coefficients_until=0.3)), ("composed", Skip(alternate=True))]
)
def test_what_a_step_skips_has_no_gradient(data, mode, skip):
    expected = [skip.trains(step, steps_per_epoch=4, total_steps=12) for step in range(12)]
    assert gradients_seen(network(mode=mode), data, skip) == [(*t, True) for t in expected]


def resumed(recipe, form, data, path):
    """The network of an uninterrupted training, after a check that a paused and resumed one is alike bit for bit."""
    whole, parts = network(coefficients=form), network(coefficients=form)
    expected = train(whole, data, recipe, device="cpu")
    with pytest.raises(TrainingPaused):
        train(parts, data, recipe, device="cpu", checkpoint=path, should_stop=lambda: True)
    parts = network(seed=5, coefficients=form)
    result = train(parts, data, recipe, device="cpu", checkpoint=path)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["train_loss"] for row in result.curves] == [row["train_loss"] for row in expected.curves]
    return whole


@pytest.mark.parametrize(
    ("skip", "form"),
    [
        (Skip(basis_every=3, coefficients_until=0.5), "dense"),
        (Skip(alternate=True), "shared"),
        (Skip(coefficients_every=3), "sparse:1/2"),
    ],
)
def test_a_resumed_training_is_bit_identical(data, tmp_path, skip, form):
    recipe = dataclasses.replace(RECIPE, skip=skip)
    resumed(recipe, form, data, tmp_path / "c.pt")


def test_gradients_are_asked_for_as_before_afterwards(data):
    model = network()
    first, *others = layers(model)
    first.basis.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    frozen = first.basis.clone()
    train(model, data, dataclasses.replace(RECIPE, skip=Skip(basis_until=0.5)), device="cpu")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert torch.equal(first.basis, frozen)
    assert others

    with pytest.raises(TrainingError, match="loss is"):  # in epoch 1, at whose end B is frozen
        train(model, data, dataclasses.replace(RECIPE, lr=1e20, skip=Skip(basis_until=0.1)), device="cpu")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


# -- the cost model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "combination"), [("factorized", t) for t in COMBINATIONS] + [("composed", COMBINATIONS[1])]
)
def test_the_cost_of_a_step_is_what_is_executed(combination, mode):
    model = network(mode=mode, ratio=1 / 4)  # from 1/2 on, a CPU multiplies with A alone
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
    model = network()
    size = {"input_size": (3, 32, 32), "batch_size": 2}
    total = [step_cost(model, combination, **size) for combination in COMBINATIONS]
    macs = [c.forward_macs + c.backward_macs for c in total]
    assert macs[0] > max(macs[1], macs[2]) > min(macs[1], macs[2]) > macs[3]
    expected = sum(share * m for share, m in zip(counts, macs, strict=True)) / macs[0]
    found = predicted_step(model, skip, **size, steps_per_epoch=4, total_steps=12)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_rescaled_part_has_n_times_the_learning_rate():
    recipe = Recipe(epochs=1, lr=0.1, skip=Skip(basis_every=4, rescale=True))
    step = make_step(network(), recipe, device="cpu")
    Schedule(step, recipe, steps_per_epoch=10, total_steps=10).prepare(5)
    rates = {group["part"]: group["lr"] for group in step.optimizer.param_groups}
    assert rates["others"] == rates["coefficients"] == pytest.approx(learning_rate(recipe, 0.5))
    assert rates["basis"] == pytest.approx(4 * learning_rate(recipe, 0.5))
