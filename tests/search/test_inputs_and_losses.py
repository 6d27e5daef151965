"""Networks that do not take one image, and losses of one's own."""

import copy
from dataclasses import dataclass
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

FITTING = ("taylor", "fisher", "oneshot", "oneshot_bn")
OPTIONS = {"ratios": (0.5,), "multiple": 1}


class Frames(nn.Module):
    """Frames of sound, (N, 64), to classes, as the pitch tracker CREPE takes them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, (16, 1), stride=(4, 1))
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, (4, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(torch.relu(self.first(x[:, None, :, None])))
        return self.fc(self.second(x).mean((2, 3)))


class Scaled(nn.Module):
    """An image and a number, by position or by name, to whatever ``head`` makes of logits."""

    def __init__(self, head=lambda logits: logits):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc, self.head = nn.Linear(8, 5), head

    def forward(self, image, scale):
        return self.head(self.fc(self.inner(image).mean((2, 3)) * scale[:, None]))


def made(kind, *args, **options):
    torch.manual_seed(0)
    return kind(*args, **options).eval()


def draw(count=3):
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8), torch.rand(6) + 0.5, torch.randint(0, 5, (6,))) for _ in range(count)]


def values(table):
    return [cell.value for cell in table.cells]


@pytest.mark.parametrize("measure", SEARCHES)
def test_frames_of_sound_are_measured_as_images_of_one_row_are(measure):
    torch.manual_seed(1)
    frames = [(torch.randn(6, 64), torch.randint(0, 5, (6,))) for _ in range(2)]
    table = sensitivity(made(Frames), frames, measure=measure, **OPTIONS)
    macs = 13 * 8 * 16 + 10 * 8 * 32 + 40
    assert table.total["macs"] == macs
    assert [layer.positions for layer in table.layers] == [13, 10]

    class Images(nn.Module):
        def __init__(self, frames):
            super().__init__()
            vars(self)["_modules"] = frames._modules

        def forward(self, x):
            return Frames.forward(self, x[:, 0, :, 0])

    as_images = [(x[:, None, :, None], y) for x, y in frames]
    own = sensitivity(Images(made(Frames)), as_images, measure=measure, **OPTIONS)
    assert values(own) == values(table)


@pytest.mark.parametrize("measure", SEARCHES)
@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_by_position_and_by_name(measure, named):
    batches = [({"scale": s, "image": x} if named else (x, s), y) for x, s, y in draw()]

    class Bound(Scaled):  # what both kinds must equal: everything in one tensor
        def forward(self, x):
            return super().forward(x[..., :8], x[:, 0, 0, 8])

    joined = [(torch.cat([x, s[:, None, None, None].expand(6, 3, 8, 1)], 3), y) for x, s, y in draw()]
    options = OPTIONS | ({} if measure in ("spectrum", "activation") else {"fit": "activation"})
    table = sensitivity(made(Scaled), batches, measure=measure, **options)
    assert values(table) == pytest.approx(
        values(sensitivity(made(Bound), joined, measure=measure, **options)), rel=1e-4
    )
    assert table.total["macs"] == 64 * 8 * 27 + 36 * 8 * 72 + 40
    assert sensitivity(made(Scaled), batches, measure=measure, **options).fingerprint == table.fingerprint
    if measure.startswith("oneshot"):
        both = {"inner.0": 4, "inner.3": 4}
        found, expected = (joint(made(kind), both, of, measure=measure, fit="activation") for kind, of in
                           ((Scaled, batches), (Bound, joined)))  # fmt: skip
        assert found.value == pytest.approx(expected.value, rel=1e-4)


@dataclass
class Output:
    logits: torch.Tensor


HEADS = {
    "dict": (lambda logits: {"out": logits}, lambda outputs: outputs["out"]),
    "dataclass": (Output, lambda outputs: outputs.logits),
    "tuple": (lambda logits: (logits, None), lambda outputs: outputs[0]),
}


@pytest.mark.parametrize("measure", FITTING)
@pytest.mark.parametrize("kind", HEADS)
def test_a_loss_of_ones_own_takes_any_outputs_and_targets(measure, kind):
    head, logits = HEADS[kind]
    batches = [((x, s), {"classes": y, "extra": [torch.zeros(2)]}) for x, s, y in draw()]

    def loss(outputs, targets):
        return F.cross_entropy(logits(outputs), targets["classes"], reduction="none")

    plain = [((x, s), y) for x, s, y in draw()]
    found = sensitivity(made(Scaled, head), batches, measure=measure, loss=loss, **OPTIONS)
    expected = sensitivity(made(Scaled), plain, measure=measure, **OPTIONS)
    assert values(found) == values(expected)
    assert found.baseline == expected.baseline
    assert all(cell.kl != cell.kl for cell in found.cells)
    if measure.startswith("oneshot"):
        arguments = ({"inner.3": 4}, batches), {"measure": measure}
        own = joint(made(Scaled, head), *arguments[0], **arguments[1], loss=loss)
        assert own == joint(made(Scaled), {"inner.3": 4}, plain, measure=measure)


def test_images_are_targets_where_the_loss_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    batches = [(x, x.flip(3)) for x, _, _ in draw()]
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
    batches = [((x, s), y) for x, s, y in draw()]
    measure = partial(sensitivity, made(Scaled), batches, **OPTIONS)
    for loss, words in (
        (F.cross_entropy, r"tensor of shape \(\).* the loss of each sample"),
        (lambda outputs, targets: outputs - F.one_hot(targets, 5), r"\(6, 5\).* the loss of each sample"),
        (lambda outputs, targets: outputs.logits, "cannot be computed from outputs"),
    ):
        with pytest.raises(ValueError, match=words):
            measure(loss=loss)
        with pytest.raises(ValueError, match=words):
            joint(made(Scaled), {"inner.3": 4}, batches, loss=loss)
    for name in ("spectrum", "activation", "fine_tuning"):
        with pytest.raises(ValueError, match="a loss go with"):
            measure(measure=name, loss=F.cross_entropy)

    def scaled(outputs, targets, *, weight):
        return weight * F.cross_entropy(outputs, targets, reduction="none")

    path = tmp_path / "run.jsonl"
    first = measure(loss=partial(scaled, weight=2), resume=path)
    assert measure(loss=partial(scaled, weight=2), resume=path).cells == SensitivityTable.load(path).cells
    assert len(first.cells) == 2
    for other in (partial(scaled, weight=3), None):
        with pytest.raises(ValueError, match="another loss"):
            measure(loss=other, resume=path)


def test_without_a_gradient_nothing_scores():
    batches = [((x, s), y) for x, s, y in draw()]
    for head, loss in (
        (torch.Tensor.detach, None),
        (lambda logits: logits, lambda o, y: F.cross_entropy(o.detach(), y, reduction="none")),
    ):
        table = sensitivity(made(Scaled, head), batches, measure="taylor", loss=loss, **OPTIONS)
        assert all(value != value for value in values(table))
    with torch.inference_mode():
        table = sensitivity(made(Scaled), batches, measure="taylor", **OPTIONS)
    assert all(value != value for value in values(table))


class Changing(Scaled):
    """As many networks do, it normalises its input in place."""

    def forward(self, image, scale):
        return super().forward(image.sub_(0.5).div_(0.25), scale.mul_(2))


class Keeping(Scaled):
    def forward(self, image, scale):
        return super().forward((image - 0.5) / 0.25, scale * 2)


def changing_loss(outputs, targets):
    losses = F.cross_entropy(outputs, targets.clone(), reduction="none")
    targets.zero_()
    return losses


@pytest.mark.parametrize("measure", SEARCHES)
def test_batches_are_left_as_they_are(measure):
    batches, expected = ([((x, s), y) for x, s, y in draw()] for _ in range(2))
    calibration = [((x, s),) for x, s, _ in draw(2)]
    options = OPTIONS | ({} if measure in ("spectrum", "activation") else {"fit": "activation", "loss": changing_loss})
    found, whole = (
        sensitivity(made(kind), batches, measure=measure, calibration=calibration, **options)
        for kind in (Changing, Keeping)
    )
    assert values(found) == values(whole)
    assert str(batches) == str(expected)
    assert str(calibration) == str([((x, s),) for x, s, _ in draw(2)])
    assert {key: found.fingerprint[key] for key in found.fingerprint if key in ("data", "calibration")} == {
        key: whole.fingerprint[key] for key in whole.fingerprint if key in ("data", "calibration")
    }


class Frozen(nn.BatchNorm2d):
    """Stays in evaluation mode whatever is said."""

    def train(self, mode=True):
        return super().train(False)


class Fixed(nn.BatchNorm2d):
    """Says it trains, but uses and keeps its statistics."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("kind", [Frozen, Fixed])
def test_norms_that_do_not_train_keep_their_statistics(kind):
    torch.manual_seed(2)
    first = kind(8)
    first.running_mean.normal_()
    first.running_var.uniform_(0.5, 2)
    parts = [
        nn.Conv2d(3, 8, 3),
        first,
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 5),
    ]
    model = nn.Sequential(*parts)
    batches = [(x, y) for x, _, y in draw()]
    model.eval()
    loss = sensitivity(model, batches, measure="oneshot_bn", **OPTIONS).baseline["loss"]
    with torch.no_grad():
        maps = [model[:4](x) for x, _ in batches]
        again = copy.deepcopy(model)
        again[4].running_mean = torch.stack([y.mean((0, 2, 3)) for y in maps]).mean(0)
        again[4].running_var = torch.stack([y.var((0, 2, 3)) for y in maps]).mean(0)
        expected = torch.stack([F.cross_entropy(again(x), y) for x, y in batches]).mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_measure_is_what_the_network_allows():
    batches = [((x, s), y) for x, s, y in draw()]
    assert sensitivity(made(Scaled), batches, **OPTIONS).measure == "oneshot_bn"
    for norm in (nn.Identity(), Frozen(8), nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8)):
        model = made(Scaled)
        model.inner[1] = norm
        table = sensitivity(model, batches, **OPTIONS)
        assert table.measure == "oneshot"
        assert joint(model, {"inner.3": 4}, batches).value == pytest.approx(values(table)[1], rel=1e-4, abs=1e-6)
        for ask in (partial(sensitivity, model, batches, **OPTIONS), partial(joint, model, {"inner.3": 4}, batches)):
            with pytest.raises(ValueError, match="use measure='oneshot'"):
                ask(measure="oneshot_bn")


@pytest.mark.parametrize("measure", [*SEARCHES, "fine_tuning"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layers_that_are_not_finite_are_named_at_once(measure, name):
    data = hold_out(synthetic(train=30, test=5, size=8), 10)
    model = build("resnet20", width=8)
    model.layer1[0].conv1.bias = nn.Parameter(torch.zeros(8))
    getattr(model.layer1[0].conv1, name).data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 has weights that are not finite"):
        sensitivity(model, data, measure=measure, **OPTIONS)


@pytest.mark.parametrize(
    "ratios",
    [np.array([0.5, 0.25]), np.array([0.5, 0.25], dtype=np.float32), torch.tensor([0.5, 0.25]), iter((0.5, 0.25))],
)
def test_numbers_of_numpy_are_numbers(ratios, tmp_path):
    options = {"measure": "oneshot", "resume": tmp_path / "run.jsonl"}
    batches = [((x, s), y) for x, s, y in draw()]
    first = sensitivity(made(Scaled), batches, ratios=ratios, multiple=np.int64(1), **options)
    assert sensitivity(made(Scaled), batches, ratios=(0.5, 0.25), multiple=1, **options).cells == first.cells
    assert {cell.basis_channels for cell in first.cells} == {4, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratios": np.array(0.5)},
        {"ratios": "0.5"},
        {"ratios": None},
        {"ratios": (True,)},
        {"ratios": ("1/2",)},
        {"multiple": True},
        {"multiple": 2.0},
        {"seeds": 1.5},
    ],
)
def test_what_is_no_number_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sensitivity(made(Scaled), [((x, s), y) for x, s, y in draw()], **wrong)


def test_images_tell_macs_as_cost_does():
    data = synthetic(train=10, test=10, size=8)
    model = build("resnet20", width=8)
    table = sensitivity(model, Images(data.test.x, data.test.y), measure="spectrum", ratios=(0.5,))
    assert table.total["macs"] == cost(model, (3, 8, 8)).total.forward_macs
