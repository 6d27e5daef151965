"""Networks that do not take one image, and losses of one's own."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis import SensitivityTable, cost, sensitivity, substitute
from basis.data import Images, hold_out, synthetic
from basis.models import build
from basis.search.sensitivity import joint
from basis.search.table import SEARCHES
from tests.unusual import HEADS, Changing, Fixed, Joined, Keeping, Pitch, Scaled, Stuck, changing_loss, draw, made

OPTIONS = {"ratios": (0.5,), "multiple": 1}
SCORING = [measure for measure in SEARCHES if measure not in ("spectrum", "activation")]


def values(table):
    return [cell.value for cell in table.cells]


@pytest.mark.parametrize("measure", SEARCHES)
def test_frames_of_sound_are_measured_as_images_of_one_row_are(measure):
    class OfImages(Pitch):
        def forward(self, x):
            return super().forward(x[:, 0, :, 0])

    model, frames = made(Pitch)
    of_images, y = OfImages(), torch.tensor([0, 3])
    of_images.load_state_dict(model.state_dict())
    table = sensitivity(model, [(frames, y)], measure=measure, **OPTIONS)
    assert table.total["macs"] == cost(Pitch(), (1024,)).total.forward_macs
    assert table.layers[0].positions == 256
    expected = sensitivity(of_images, [(frames[:, None, :, None], y)], measure=measure, **OPTIONS)
    assert values(table) == values(expected)


@pytest.mark.parametrize("measure", SEARCHES)
@pytest.mark.parametrize("kind", [tuple, dict])
def test_several_inputs_by_position_and_by_name(measure, kind):
    options = OPTIONS | {"measure": measure} | ({"fit": "activation"} if measure in SCORING else {})
    table, again = (sensitivity(Scaled(), draw(kind), **options) for _ in range(2))
    assert values(table) == pytest.approx(values(sensitivity(Joined(), draw(torch.cat), **options)), rel=1e-4)
    assert table.total["macs"] == 64 * 8 * 27 + 36 * 8 * 72 + 40
    assert again.fingerprint == table.fingerprint
    if measure.startswith("oneshot"):
        found, expected = (
            joint(model, {"inner.0": 4, "inner.3": 4}, batches, measure=measure, fit="activation")
            for model, batches in ((Scaled(), draw(kind)), (Joined(), draw(torch.cat)))
        )
        assert found.value == pytest.approx(expected.value, rel=1e-4)


@pytest.mark.parametrize("measure", SCORING)
@pytest.mark.parametrize("kind", HEADS)
def test_a_loss_of_ones_own_takes_any_outputs_and_targets(measure, kind):
    head, logits = HEADS[kind]
    batches = [(x, {"classes": y, "extra": [torch.zeros(2)]}) for x, y in draw()]

    def loss(outputs, targets):
        return F.cross_entropy(logits(outputs), targets["classes"], reduction="none")

    found = sensitivity(Scaled(head), batches, measure=measure, loss=loss, **OPTIONS)
    expected = sensitivity(Scaled(), draw(), measure=measure, **OPTIONS)
    assert values(found) == values(expected)
    assert found.baseline == expected.baseline
    assert all(cell.kl != cell.kl for cell in found.cells)
    if measure.startswith("oneshot"):
        own = joint(Scaled(head), {"inner.3": 4}, batches, measure=measure, loss=loss)
        assert own == joint(Scaled(), {"inner.3": 4}, draw(), measure=measure)


def test_images_are_targets_where_the_loss_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    batches = [(x, x.flip(3)) for (x, _), _ in draw()]
    with pytest.raises(ValueError, match="give loss="):
        sensitivity(model, batches, **OPTIONS)

    def loss(outputs, targets):
        return (outputs - targets).square().mean((1, 2, 3))

    table = sensitivity(model, batches, loss=loss, **OPTIONS)
    with torch.no_grad():
        dense = torch.cat([loss(model(x), y) for x, y in batches])
        thin = torch.cat([loss(substitute(model, {"1": 2})(x), y) for x, y in batches])
    assert table.baseline["loss"] == pytest.approx(dense.mean().item())
    assert values(table)[1] == pytest.approx((thin - dense).mean().item(), rel=1e-4)


def test_losses_that_do_not_fit_are_refused_in_words(tmp_path):
    measure = partial(sensitivity, Scaled(), draw(), **OPTIONS)
    for loss, words in (
        (F.cross_entropy, r"tensor of shape \(\).* the loss of each sample"),
        (lambda outputs, targets: outputs - F.one_hot(targets, 5), r"\(6, 5\).* the loss of each sample"),
        (lambda outputs, targets: outputs.logits, "cannot be computed from outputs"),
    ):
        for ask in (measure, partial(joint, Scaled(), {"inner.3": 4}, draw())):
            with pytest.raises(ValueError, match=words):
                ask(loss=loss)
    for name in ("spectrum", "activation", "fine_tuning"):
        with pytest.raises(ValueError, match="a loss go with"):
            measure(measure=name, loss=F.cross_entropy)
    path, loss = tmp_path / "run.jsonl", partial(F.cross_entropy, reduction="none")
    measure(loss=partial(loss, label_smoothing=0.2), resume=path)
    again = measure(loss=partial(loss, label_smoothing=0.2), resume=path)
    assert again.cells == SensitivityTable.load(path).cells
    for other in (partial(loss, label_smoothing=0.3), None):
        with pytest.raises(ValueError, match="another loss"):
            measure(loss=other, resume=path)


@pytest.mark.parametrize("measure", SEARCHES)
def test_batches_are_left_as_they_are(measure):
    batches, calibration = draw(), [(x,) for x, _ in draw()]
    options = {"measure": measure, "calibration": calibration} | OPTIONS
    options |= {"fit": "activation", "loss": changing_loss} if measure in SCORING else {}
    found, expected = (sensitivity(kind(), batches, **options) for kind in (Changing, Keeping))
    assert values(found) == values(expected)
    assert str((batches, calibration)) == str((draw(), [(x,) for x, _ in draw()]))
    assert all(found.fingerprint.get(key) == expected.fingerprint.get(key) for key in ("data", "calibration"))


@pytest.mark.parametrize("kind", [Stuck, Fixed])
def test_norms_that_do_not_train_keep_their_statistics(kind):
    torch.manual_seed(2)
    norms = kind(8), nn.BatchNorm2d(8)
    norms[0].running_mean.normal_()
    norms[0].running_var.uniform_(0.5, 2)
    layers = nn.Conv2d(3, 8, 3), norms[0], nn.ReLU(), nn.Conv2d(8, 8, 3), norms[1], nn.Flatten(), nn.Linear(128, 5)
    model, batches = nn.Sequential(*layers).eval(), [(x, y) for (x, _), y in draw(sizes=(6, 6))]
    loss = sensitivity(model, batches, measure="oneshot_bn", **OPTIONS).baseline["loss"]
    with torch.no_grad():
        maps, again = [model[:4](x) for x, _ in batches], copy.deepcopy(model)
        again[4].running_mean = torch.stack([y.mean((0, 2, 3)) for y in maps]).mean(0)
        again[4].running_var = torch.stack([y.var((0, 2, 3)) for y in maps]).mean(0)
        expected = torch.stack([F.cross_entropy(again(x), y) for x, y in batches]).mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_measure_is_what_the_network_allows():
    assert sensitivity(Scaled(), draw(), **OPTIONS).measure == "oneshot_bn"
    for norm in (nn.Identity(), Stuck(8), nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8)):
        model = Scaled()
        model.inner[1] = norm
        table = sensitivity(model, draw(), **OPTIONS)
        assert table.measure == "oneshot"
        assert joint(model, {"inner.3": 4}, draw()).value == pytest.approx(values(table)[1], rel=1e-4, abs=1e-6)
        for ask in (partial(sensitivity, model, draw(), **OPTIONS), partial(joint, model, {"inner.3": 4}, draw())):
            with pytest.raises(ValueError, match="use measure='oneshot'"):
                ask(measure="oneshot_bn")


@pytest.mark.parametrize("measure", [*SEARCHES, "fine_tuning"])
def test_layers_that_are_not_finite_are_named_at_once(measure):
    data, model = hold_out(synthetic(train=30, test=5, size=8), 10), build("resnet20", width=8)
    conv = model.layer1[0].conv1
    conv.bias = nn.Parameter(torch.zeros(8))
    for values_of in (conv.bias, conv.weight):
        values_of.data.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=r"layer1\.0\.conv1 has weights that are not finite"):
            sensitivity(model, data, measure=measure, **OPTIONS)
        conv.bias.data.zero_()


@pytest.mark.parametrize("ratios", [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), iter((0.5, 0.25))])
def test_numbers_of_numpy_are_numbers(ratios, tmp_path):
    options = {"measure": "oneshot", "resume": tmp_path / "run.jsonl"}
    first = sensitivity(Scaled(), draw(), ratios=ratios, multiple=np.int64(1), **options)
    assert sensitivity(Scaled(), draw(), ratios=(0.5, 0.25), multiple=1, **options).cells == first.cells
    assert {cell.basis_channels for cell in first.cells} == {4, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratios", np.array(0.5)), ("ratios", "0.5"), ("ratios", None), ("ratios", (True,)), ("ratios", ("1/2",)),
        ("multiple", True), ("multiple", 2.0), ("seeds", 1.5),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        sensitivity(Scaled(), draw(), **{name: value})


def test_images_tell_macs_as_cost_does():
    data, model = synthetic(train=10, test=10, size=8), build("resnet20", width=8)
    table = sensitivity(model, Images(data.test.x, data.test.y), measure="spectrum", ratios=(0.5,))
    assert table.total["macs"] == cost(model, (3, 8, 8)).total.forward_macs
