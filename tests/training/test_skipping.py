"""Skip-training: what a step does not update is not computed, and the cost model knows it."""

import dataclasses

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import basis
from basis.data import synthetic
from basis.models import build
from basis.training.loop import Recipe, TrainingError, TrainingPaused, _State, learning_rate, train
from basis.training.skipping import Parts, Skip, Trained, check_skip, predicted_step, step_cost

RECIPE = Recipe(epochs=3, batch_size=40, translate=2, cutout=8, precision="fp32")  # 4 steps an epoch
COMBINATIONS = [Trained(b, a) for b in (True, False) for a in (True, False)]


@pytest.fixture(scope="module")
def data():
    return synthetic(train=160, test=50)


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


def test_a_fraction_is_met_to_the_step():
    for steps in (7, 10, 300):
        for kept in range(steps + 1):
            skip = Skip(basis_until=kept / steps)
            assert trained(skip, steps)[0] == "B" * kept + "-" * (steps - kept)


@pytest.mark.parametrize("name", ["basis_every", "coefficients_every"])
@pytest.mark.parametrize("value", [0, -2, 1.5, True, "2"])
def test_every_must_be_a_number_of_steps(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, but it must be a whole number of steps"):
        Skip(**{name: value})


@pytest.mark.parametrize("name", ["basis_until", "coefficients_until"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_until_must_be_a_fraction(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}, but it is a fraction"):
        Skip(**{name: value})


def test_settings_that_contradict_themselves():
    with pytest.raises(ValueError, match="would never train anything"):
        Skip(basis_until=0, coefficients_until=0)
    for other in ({"basis_every": 2}, {"coefficients_until": 0.5}):
        with pytest.raises(ValueError, match=r"alternate .* cannot be combined"):
            Skip(alternate=True, **other)


# -- what it can be used on ---------------------------------------------------------------------------


def test_a_model_without_basis_convolutions_is_refused(data):
    recipe = dataclasses.replace(RECIPE, skip=Skip(basis_every=2))
    with pytest.raises(TrainingError, match="sets skip, but the model has no basis convolutions"):
        train(build("resnet20", width=4), data, recipe, device="cpu")


def test_a_part_whose_turn_never_comes_is_an_error(data):
    recipe = dataclasses.replace(RECIPE, epochs=1, skip=Skip(alternate=True))
    with pytest.raises(TrainingError, match="there is only one epoch"):
        train(network(), data, recipe, device="cpu")


@pytest.mark.parametrize("skip", [Skip(coefficients_every=2), Skip(coefficients_until=0.5), Skip(alternate=True)])
@pytest.mark.parametrize("form", ["frozen", "repeat"])
def test_a_schedule_for_what_is_not_trained_is_an_error(skip, form):
    with pytest.raises(ValueError, match="no coefficients that are trained at all"):
        check_skip(network(coefficients=form), skip, steps_per_epoch=4, total_steps=12)
    check_skip(network(coefficients=form), Skip(basis_every=2), steps_per_epoch=4, total_steps=12)


def test_a_training_of_nothing_is_an_error():
    model = network().requires_grad_(False)
    for layer in layers(model):
        layer.coefficients.requires_grad_(True)
    check_skip(model, Skip(coefficients_every=2), steps_per_epoch=4, total_steps=12)
    with pytest.raises(ValueError, match="skip leaves nothing to train"):
        check_skip(model, Skip(coefficients_until=0), steps_per_epoch=4, total_steps=12)


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


@pytest.mark.parametrize("mode", ["factorized", "composed", "hybrid"])
@pytest.mark.parametrize("skip", [Skip(basis_every=2, coefficients_until=0.3), Skip(alternate=True)])
def test_what_a_step_skips_has_no_gradient(data, mode, skip):
    expected = [skip.trains(step, steps_per_epoch=4, total_steps=12) for step in range(12)]
    assert gradients_seen(network(mode=mode), data, skip) == [(*t, True) for t in expected]


@pytest.mark.parametrize("skip", [Skip(basis_until=0.3), Skip(alternate=True)])
def test_a_paused_part_stands_still(data, tmp_path, skip):
    """Neither momentum nor weight decay moves it: after epoch 1 B is not trained in epoch 2."""
    recipe, model = dataclasses.replace(RECIPE, skip=skip), network()
    found = []
    for _ in range(2):
        with pytest.raises(TrainingPaused):
            train(model, data, recipe, device="cpu", checkpoint=tmp_path / "c.pt", should_stop=lambda: True)
        found.append([(layer.basis.clone(), layer.coefficients.matrix().clone()) for layer in layers(model)])
    for (b, a), (b_later, a_later) in zip(*found, strict=True):
        assert torch.equal(b, b_later)
        assert not torch.equal(a, a_later)


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
        (Skip(alternate=True), "low_rank:1/2"),
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


def test_a_step_may_train_nothing(data):
    model = network().requires_grad_(False)
    for layer in layers(model):
        layer.coefficients.requires_grad_(True)
    before = [layer.coefficients.matrix().clone() for layer in layers(model)]
    train(model, data, dataclasses.replace(RECIPE, skip=Skip(coefficients_every=2)), device="cpu")
    assert not any(torch.equal(layer.coefficients.matrix(), a) for layer, a in zip(layers(model), before, strict=True))


def test_shared_coefficients_are_there_once():
    model = network(coefficients="shared")
    parts = Parts(model)
    assert len(parts.coefficients) == len({id(p) for p in parts.coefficients}) < len(layers(model))
    assert len(parts.basis) == len(layers(model))


# -- the cost model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("mode", ["factorized", "composed", "hybrid"])
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
        (Skip(basis_every=2), (1 / 2, 0, 1 / 2, 0)),
        (Skip(coefficients_until=0), (0, 1, 0, 0)),
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
    state = _State(network(), recipe, 0, torch.device("cpu"), total_steps=10)
    state.prepare(5)
    rates = {group["part"]: group["lr"] for group in state.optimizer.param_groups}
    assert rates["others"] == rates["coefficients"] == pytest.approx(learning_rate(recipe, 0.5))
    assert rates["basis"] == pytest.approx(4 * learning_rate(recipe, 0.5))


def test_rescaling_nothing_is_refused():
    with pytest.raises(ValueError, match="rescale has no effect"):
        Skip(rescale=True, basis_until=0.5)
