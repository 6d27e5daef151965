import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from basis import Recipe, SensitivityTable, cost, sensitivity, substitute
from basis.data import Data, Images, hold_out, normalise, synthetic
from basis.models import build
from basis.search import sensitivity as search
from basis.search.table import MEASURES
from basis.statistics import mean_estimate
from basis.training.loop import TrainingError

EVALUATING = [measure for measure in MEASURES if measure != "fine_tuning"]


class Net(nn.Module):
    """Five convolutions, of which one is depthwise, two share a weight, and one is too narrow for a multiple of 8."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.middle = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(16, 4, 1)
        self.last = nn.Conv2d(4, 24, 3)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.middle(self.depthwise(x)))
        return self.fc(self.last(self.narrow(x)).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(count=3, size=6, seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]
    return [(x, torch.randint(0, classes, (size,), generator=generator)) for x in draw]


def test_layers_candidates_and_reasons():
    table = sensitivity(net(), batches(), measure="spectrum", ratios=(0.25, 0.5, 0.6))
    assert {layer.name: layer.candidates for layer in table.layers} == {"first": (8,), "middle": (8,), "last": (16, 8)}
    assert [(c.layer, c.basis_channels) for c in table.cells] == list(table.candidates)
    assert table.skipped == {
        "depthwise": "depthwise: one filter per group",
        "narrow": "k = 8 is not below C_out = 4: nothing to derive",
    }
    fine = sensitivity(net(), measure="spectrum", ratios=(0.5,), multiple=1, include=("*r*",), exclude="first")
    assert {layer.name: layer.candidates for layer in fine.layers} == {"narrow": (2,)}
    assert fine.skipped["first"] == "excluded by 'first'"
    assert fine.skipped["last"] == "not among the included layers"


def test_what_is_never_called_is_no_candidate():
    """It would lose nothing, and every search would begin with it."""
    model = net()
    model.spare = nn.Conv2d(8, 16, 3)
    table = sensitivity(model, batches(), measure="oneshot", ratios=(0.5,), multiple=1)
    assert table.skipped["spare"] == "never called by the forward pass"
    assert [layer.name for layer in table.layers] == [
        layer.name for layer in sensitivity(net(), batches(), measure="oneshot", ratios=(0.5,), multiple=1).layers
    ]
    assert len(table.cells) == len(table.layers)
    with pytest.raises(ValueError, match="calls none of the 1 convolutions that can be substituted"):
        sensitivity(model, batches(), measure="oneshot", ratios=(0.5,), multiple=1, include="spare")


@pytest.mark.parametrize("measure", EVALUATING)
def test_the_model_and_the_random_numbers_are_left_alone(measure):
    model = net().train()
    model.middle.requires_grad_(False)
    model.fc.eval()
    state = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loader = DataLoader(TensorDataset(*batches(1)[0]), batch_size=3, shuffle=True)  # draws from them
    sensitivity(model, loader, measure=measure)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert flags == ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()])
    assert model.norm.momentum == 0.1
    assert not model.middle._forward_hooks


class Stop(Exception):
    """What interrupts a measurement here."""


def stopping(after):
    """A progress that interrupts once so many measurements are there."""
    seen = []

    def progress(item):
        seen.append(item)
        if len(seen) == after:
            raise Stop

    return progress


@pytest.mark.parametrize("measure", EVALUATING)
def test_interrupted_and_resumed(measure, tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    options = {"measure": measure, "ratios": (0.6, 0.3)}
    whole = sensitivity(net(), batches(), **options)
    with pytest.raises(Stop):
        sensitivity(net(), batches(), resume=path, progress=stopping(2), **options)
    part = SensitivityTable.load(path)
    assert len(part.cells) == 2
    assert set(part.missing) == set(whole.candidates) - {(c.layer, c.basis_channels) for c in part.cells}
    measured = []
    resumed = sensitivity(net(), batches(), resume=path, progress=measured.append, **options)
    assert len(measured) == len(whole.cells) - 2 > 0
    for own, cell in zip(resumed.cells, whole.cells, strict=True):
        assert (own.layer, own.basis_channels) == (cell.layer, cell.basis_channels)
        assert own.value == cell.value
    assert repr(SensitivityTable.load(path)) == repr(resumed)
    before = path.read_bytes()
    assert repr(sensitivity(net(), batches(), resume=path, **options)) == repr(resumed)
    assert path.read_bytes() == before  # nothing measured again


def values(table):
    return [cell.value for cell in table.cells]


def test_costs_and_totals_are_those_of_the_model():
    model = net()
    table = sensitivity(model, batches(), measure="activation", ratios=(0.5,))
    report = cost(model, (3, 8, 8)).total
    found = {"params": report.parameters, "macs": report.forward_macs, "backward_macs": report.backward_macs}
    assert table.total == found
    frozen = sensitivity(net().requires_grad_(False), batches(), measure="activation", ratios=(0.5,))
    assert frozen.layers == table.layers
    blind = sensitivity(model, measure="spectrum", ratios=(0.5,))
    assert blind.total == {"params": report.parameters, "macs": None, "backward_macs": None}


def test_of_data_the_validation_images_are_scored_and_training_images_calibrate():
    data = hold_out(synthetic(train=90, test=10, size=16), 40)
    model = build("resnet20", width=8)
    options = {"ratios": (0.5,), "include": "layer3.2.*"}
    whole = sensitivity(model, data, **options)
    by_hand = [(normalise(data.validation.x), data.validation.y)]
    pairs = sensitivity(model, by_hand, calibration=[normalise(data.train.x)], **options)
    assert values(pairs) == pytest.approx(values(whole), rel=1e-3, abs=1e-6)
    own = sensitivity(model, data.validation, **options)
    assert own.baseline["loss"] != whole.baseline["loss"]
    assert own.fingerprint["data"] == whole.fingerprint["data"]


def broken():
    model = net()
    with torch.no_grad():
        model.fc.bias.fill_(math.nan)
    return model


X, Y = batches()[0]


@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("measure is", {"measure": "magic"}), ("ratios is", {"ratios": 0.5}), ("ratios is", {"ratios": (0.5, 1.0)}),
        ("include has", {"include": "nothing"}), ("recipe goes with fine_tuning", {"recipe": Recipe()}),
        ("seeds is 0", {"measure": "fine_tuning", "seeds": 0}), ("sep is not", {"measure": "fisher", "layers": "sep"}),
        ("depthwise: one filter per group", {"include": "depthwise"}),
        ("has a candidate to try", {"model": nn.Linear(3, 3)}), ("meta device", {"model": net().to("meta")}),
        ("no batch normalisation", {"model": nn.Conv2d(3, 16, 3), "measure": "oneshot_bn"}),
        ("dense network's loss is nan", {"model": broken(), "measure": "taylor"}), ("needs data", {"data": None}),
        ("labels", {"data": [(X, Y + 4)]}), ("no validation images", {"data": synthetic(train=20, test=5, size=8)}),
        ("calibration", {"measure": "oneshot_bn", "calibration": []}),
        ("needs basis.data.Data with validation images", {"measure": "fine_tuning"}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(says, options):
    options = {"model": net(), "data": batches(), "measure": "oneshot", "ratios": (0.5,)} | options
    with pytest.raises(ValueError, match=says):
        sensitivity(**options)


def test_an_interruption_inside_a_measurement_loses_only_that_one(tmp_path, monkeypatch):
    path, calls = tmp_path / "run.jsonl", []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 3 + 3 + 2:  # dense, one cell, and in the midst of the second
            raise Stop
        return F.cross_entropy(outputs, targets, reduction="none")

    monkeypatch.setattr("basis.batches.cross_entropy", loss)
    options = {"measure": "oneshot", "ratios": (0.5,)}
    with pytest.raises(Stop):
        sensitivity(net(), batches(), resume=path, **options)
    assert len(SensitivityTable.load(path).cells) == 1
    resumed = sensitivity(net(), batches(), resume=path, **options)
    assert values(resumed) == values(sensitivity(net(), batches(), **options))
    path.write_bytes(path.read_bytes()[:-15])  # a line that was cut short is measured again
    assert values(sensitivity(net(), batches(), resume=path, **options)) == values(resumed)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_another_measurement_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    base = {"measure": "oneshot_bn", "ratios": (0.5,)}
    sensitivity(net(), batches(), resume=path, **base)
    before = path.read_bytes()
    shuffled = [(x.flip(0), y.flip(0)) for x, y in reversed(batches())]
    sensitivity(net(), shuffled, resume=path, **base)  # the order of samples does not matter
    deeper = net()
    deeper.act = nn.ReLU()
    for model, data, options, what in (
        (net(1), batches(), {}, "another weights"),
        (net(), batches(seed=1), {}, "other data, calibration"),
        (net(), batches(), {"measure": "oneshot"}, "other measure, calibration"),
        (net(), batches(), {"ratios": (0.5, 0.25)}, "another layers"),
        (deeper, batches(), {}, "another model"),
    ):
        with pytest.raises(ValueError, match=f"run.jsonl was measured with {what};"):
            sensitivity(model, data, resume=path, **(base | options))
    assert path.read_bytes() == before
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="is no sensitivity table, or damaged"):
        sensitivity(net(), batches(), resume=path, **base)
    assert path.read_text() == "my notes\n"


RECIPE = Recipe(epochs=1, batch_size=20, lr=0.05, translate=1, cutout=0)


def images():
    return hold_out(synthetic(train=90, test=10, size=16, seed=3), 30)


def small_resnet(seed=0):
    torch.manual_seed(seed)
    return build("resnet20", width=8)


def tuning(model=None, data=None, **options):
    options = {"recipe": RECIPE, "ratios": (0.5,), "include": "layer2.0.conv1", "seeds": 2} | options
    return sensitivity(model or small_resnet(), data or images(), measure="fine_tuning", **options)


def test_a_training_is_repeatable_and_never_sees_the_test_images():
    data = images()
    data = Data(data.name, data.train, Images(data.test.x[:0], data.test.y[:0]), data.validation)
    model = build("resnet20", width=8)
    state = copy.deepcopy(model.state_dict())
    first, second = (tuning(model=model, data=data) for _ in range(2))
    (cell,) = first.cells
    assert cell.low < cell.value < cell.high
    assert cell.n == 2
    assert cell.backward == (2 + 2) * 60  # its own two trainings, and all of the dense network's two
    assert cell.value == second.cells[0].value
    assert first.baseline == second.baseline
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Losses:
    """In place of training: the final losses, one after the other, and the networks that were to be trained."""

    def __init__(self, *losses):
        self.losses, self.networks, self.seeds = list(losses), [], []

    def __call__(self, network, data, recipe, *, seed, **options):
        self.networks.append({name: p.detach().clone() for name, p in network.named_parameters()})
        self.seeds.append(seed)
        loss = self.losses.pop(0)
        if isinstance(loss, Exception):
            raise loss
        return type("Result", (), {"validation": {"loss": loss}})


def test_trainings_are_resumed_and_a_diverged_one_has_no_value(tmp_path, monkeypatch):
    path, options = tmp_path / "run.jsonl", {"ratios": (0.5, 0.25), "multiple": 2}
    monkeypatch.setattr(search, "train", Losses(1.0, 2.0, 4.0, 6.0, Stop()))
    with pytest.raises(Stop):
        tuning(resume=path, **options)
    (cell,) = SensitivityTable.load(path).cells
    expected = mean_estimate([3.0, 4.0])  # paired by seed
    assert (cell.value, cell.low, cell.high, cell.n) == (expected.value, expected.low, expected.high, 2)
    rest = Losses(1.0, 2.0, TrainingError("diverged"))
    monkeypatch.setattr(search, "train", rest)
    table = tuning(resume=path, **options)
    assert rest.seeds == [0, 1, 0]  # the dense network, and what is missing
    assert table.baseline == {"loss": 1.5}
    assert [cell.value for cell in table.cells] == [3.5, pytest.approx(math.nan, nan_ok=True)]
    with pytest.raises(ValueError, match="was measured with another seeds"):
        tuning(resume=path, **options | {"seeds": 3})
    monkeypatch.setattr(search, "train", Losses(TrainingError("diverged")))
    with pytest.raises(ValueError, match="dense network cannot be trained: diverged"):
        tuning()


def test_trainings_begin_at_the_weights_of_the_model(tmp_path, monkeypatch):
    model, losses = small_resnet(), Losses(*range(3))
    monkeypatch.setattr(search, "train", losses)
    tuning(model, seeds=1, layers="sep", resume=tmp_path / "run.jsonl")
    dense, small, structured = losses.networks
    tuned = substitute(model, {"layer2.0.conv1": 8}).state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in model.named_parameters())
    assert torch.equal(small["layer2.0.conv1.basis"], tuned["layer2.0.conv1.basis"])
    assert len(structured) > len(dense)
    with pytest.raises(ValueError, match="another weights"):
        tuning(small_resnet(1), seeds=1, layers="sep", resume=tmp_path / "run.jsonl")


def test_what_cannot_be_trained_is_refused():
    net = build("resnet20", width=8)
    for model, says in ((net.double(), "float32"), (net.requires_grad_(False), "train")):
        with pytest.raises(ValueError, match=says):
            tuning(model=model, include=())
    with pytest.raises(ValueError, match="only 60 training images"):
        tuning(recipe=Recipe(epochs=1, batch_size=500))
