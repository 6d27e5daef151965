import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from basis import Recipe, SensitivityTable, cost, sensitivity, substitute
from basis.data import Data, Images, first_images, hold_out, normalise, synthetic
from basis.models import build
from basis.search.journal import name_of
from basis.search.sensitivity import TRAINING, joint
from basis.search.table import MEASURES
from basis.statistics import difference_estimate
from basis.training.skipping import Skip

EVALUATING = [measure for measure in MEASURES if measure not in TRAINING]


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


def same(first, second):
    """Equal but for the time it took."""

    def plain(table):
        cells = tuple(replace(cell, seconds=0.0) for cell in table.cells)
        trials = tuple(replace(trial, seconds=0.0) for trial in table.trials)
        if table.seeds:
            return repr((table.layers, table.fingerprint, table.baseline, trials))
        return repr((table.layers, table.fingerprint, table.baseline, table.skipped, table.total, cells))

    return plain(first) == plain(second)


# -- which layers -------------------------------------------------------------------------------


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


def test_costs_and_totals_are_those_of_the_model():
    model = net()
    table = sensitivity(model, batches(), measure="activation", ratios=(0.5,))
    report = cost(model, (3, 8, 8))
    assert table.total == {
        "params": report.total.parameters,
        "macs": report.total.forward_macs,
        "backward_macs": report.total.backward_macs,
    }
    for layer in table.layers:
        small = cost(substitute(model, {layer.name: layer.candidates[0]}), (3, 8, 8), mode="factorized").total
        own, dense = layer.cost(layer.candidates[0]), layer.cost(layer.out_channels)
        assert report.total.parameters - small.parameters == dense["params"] - own["params"]
        assert report.total.forward_macs - small.forward_macs == dense["macs"] - own["macs"]
        assert report.total.backward_macs - small.backward_macs == dense["backward_macs"] - own["backward_macs"]
    frozen = sensitivity(net().requires_grad_(False), batches(), measure="activation", ratios=(0.5,))
    assert frozen.layers == table.layers
    blind = sensitivity(model, measure="spectrum", ratios=(0.5,))
    assert blind.total == {"params": report.total.parameters, "macs": None, "backward_macs": None}
    assert all(layer.positions is None for layer in blind.layers)


def test_a_single_convolution_is_a_model_too():
    table = sensitivity(nn.Conv2d(3, 16, 3), batches(), measure="activation", ratios=(0.5,))
    assert table.candidates == (("", 8),)
    assert 0 < table.cells[0].value < 1


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


def test_a_shared_layer_is_measured_once():
    model = net()
    model.again = model.middle
    table = sensitivity(model, batches(), measure="oneshot", ratios=(0.5,), include="again")
    assert table.candidates == (("middle", 8),)


# -- data ---------------------------------------------------------------------------------------


def test_kinds_of_data_give_the_same_table():
    pairs = batches()
    x, y = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    tables = [
        sensitivity(net(), data, measure="oneshot_bn", ratios=(0.5,))
        for data in (pairs, loader, iter(pairs), [[x, y.to(torch.uint8)] for x, y in pairs])
    ]
    assert all(same(tables[0], table) for table in tables[1:3])
    assert [c.value for c in tables[3].cells] == [c.value for c in tables[0].cells]


def test_images_and_data():
    data = hold_out(synthetic(train=90, test=10, size=16), 40)
    model = build("resnet20", width=8)
    options = {"ratios": (0.5,), "include": "layer3.2.*"}
    images = sensitivity(model, data.validation, measure="oneshot_bn", calibration=data.train, **options)
    whole = sensitivity(model, data, measure="oneshot_bn", **options)
    assert same(images, whole)  # the validation images, and all of less than 2,000 training images
    by_hand = [(normalise(data.validation.x), data.validation.y)]
    inputs = [normalise(data.train.x)]  # without targets
    pairs = sensitivity(model, by_hand, measure="oneshot_bn", calibration=inputs, **options)
    assert [c.value for c in pairs.cells] == pytest.approx([c.value for c in whole.cells], rel=1e-3, abs=1e-6)
    assert whole.layers[0].positions == 4 * 4
    own = sensitivity(model, data.validation, measure="oneshot_bn", **options)
    assert own.baseline["loss"] != whole.baseline["loss"]
    assert own.fingerprint["data"] == whole.fingerprint["data"]


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


def test_soft_labels_and_maps():
    pairs = [(x, F.one_hot(y, 5).double()) for x, y in batches()]
    soft = sensitivity(net(), pairs, measure="oneshot", ratios=(0.5,))
    hard = sensitivity(net(), batches(), measure="oneshot", ratios=(0.5,))
    assert [c.value for c in soft.cells] == pytest.approx([c.value for c in hard.cells], abs=1e-6)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1))
    maps = [(x, torch.zeros(6, 8, 8, dtype=torch.long)) for x, _ in batches()]
    table = sensitivity(model, maps, measure="oneshot", ratios=(0.5,))
    assert [c.n for c in table.cells] == [18]
    assert math.isnan(table.cells[0].kl)


# -- wrong input --------------------------------------------------------------------------------


def wrong(what, model=None, data=None, **options):
    options = {"measure": "oneshot", "ratios": (0.5,)} | options
    with pytest.raises(ValueError, match=what) as caught:
        sensitivity(model or net(), batches() if data is None else data, **options)
    assert str(caught.value).count("\n") == 0 or "cannot run" in str(caught.value)


def test_wrong_arguments():
    wrong("measure is 'magic', but it must be one of spectrum, activation, taylor", measure="magic")
    for ratios in ((), 0.5, (0.5, 1.0), (0,)):
        wrong("ratios is .* but it must be a list of numbers k / C_out between 0 and 1", ratios=ratios)
    wrong("multiple is 0, but", multiple=0)
    wrong("include has 'nothing', but no convolution has such a name", include="nothing")
    wrong("exclude has 'fc', but no convolution has such a name", exclude=("first", "fc"))
    for part in ((1, 1), (-1, 2), (0,)):
        wrong("part is .*, but it must be \\(i, n\\) with 0 <= i < n", part=part)
    wrong(
        "oneshot trains nothing; recipe and trainer go with fine_tuning, short_training, full_training", recipe=Recipe()
    )
    wrong("short_training takes no loss", measure="short_training", loss=F.cross_entropy)
    for seeds in (0, 1.5, True):
        wrong("seeds is .*, but it is how many trainings", measure="short_training", seeds=seeds)
    both = {"recipe": Recipe(), "trainer": lambda model, seed: 1.0}
    wrong("give a recipe or a trainer, not both", measure="full_training", **both)


def test_wrong_models():
    wrong("the model has no convolution, so there is nothing to substitute", nn.Linear(3, 3))
    wrong(
        r"no convolution of the model has a number of basis channels to try \(first: not among the included layers; "
        r"depthwise: depthwise: one filter per group; .* and 1 more\)$",
        include="depthwise",
    )
    wrong("no batch normalisation to recalibrate; use measure='oneshot'", nn.Conv2d(3, 16, 3), measure="oneshot_bn")
    wrong("first is on the meta device and has no values", net().to("meta"))
    broken = net()
    with torch.no_grad():
        broken.fc.bias.fill_(math.nan)
    for measure in ("taylor", "oneshot", "oneshot_bn"):
        wrong("the dense network's loss is nan on these data", broken, measure=measure)


def test_wrong_data():
    x, y = batches()[0]
    with pytest.raises(ValueError, match=r"taylor needs data: batches \(inputs, targets\)"):
        sensitivity(net(), measure="taylor")
    for empty in ([], [(x[:0], y[:0])], Images(torch.zeros((0, 8, 8, 3), dtype=torch.uint8), y[:0])):
        wrong("data holds no samples, so there is nothing to measure on", data=empty)
    for batch, found in (
        (x, r"a tensor of shape \(6, 3, 8, 8\)"),
        ({"x": x}, "a dict"),
        ((x, y[:3]), r"a tuple of a tensor of shape \(6, 3, 8, 8\), a tensor of shape \(3,\)"),
        ((x, y, y), "a tuple of"),
        ((x, 3), r"a tuple of a tensor of shape \(6, 3, 8, 8\), a int"),
    ):
        wrong(f"batch 1 of data is {found}.* but it must be a pair", data=[(x, y), batch])
    wrong(r"cannot run on inputs of shape \(6, 2, 8, 8\) and type torch.float32: .*channels", data=[(x[:, :2], y)])
    wrong("cannot run on inputs of .* torch.float64", data=[(x.double(), y)])
    wrong("the labels run from 0 to 7, but 5 logits take 0 to 4", data=[(x, y), (x, torch.tensor([0, 1, 2, 3, 4, 7]))])
    wrong("the labels run from -1 to", data=[(x, y - y.max() - 1 + 4), (x, y.clamp_max(0) - 1)])
    wrong(
        r"the labels are torch.float32 of shape \(6,\), but .* whole numbers of shape \('N',\)", data=[(x, y.float())]
    )
    wrong(r"the labels are torch.int64 of shape \(6, 1\)", data=[(x, y[:, None])])
    wrong(r"the loss returned shape \(6, 5\)", loss=lambda outputs, targets: outputs)
    wrong(
        r"returns a tuple of .*, not logits \(N, classes\); give a loss of your own",
        type("Two", (Net,), {"forward": lambda self, x: (Net.forward(self, x), x)})(),
    )
    wrong("the data have no validation images", data=synthetic(train=20, test=5, size=8))
    wrong("calibration holds no samples", measure="oneshot_bn", calibration=[])
    wrong("batch 0 of calibration is a str", measure="oneshot_bn", calibration=["x"])
    wrong("cannot run on inputs of shape", measure="oneshot_bn", calibration=[x[:, :1]])


# -- kept and resumed ---------------------------------------------------------------------------


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


def test_an_interruption_inside_a_measurement_loses_only_that_one(tmp_path):
    path = tmp_path / "run.jsonl"
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) == 1 + 3 + 3 + 2:  # tried, dense, one cell, and in the midst of the second
            raise Stop
        return F.cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(Stop):
        sensitivity(net(), batches(), measure="oneshot", ratios=(0.5,), loss=loss, resume=path)
    assert len(SensitivityTable.load(path).cells) == 1
    resumed = sensitivity(net(), batches(), measure="oneshot", ratios=(0.5,), loss=loss, resume=path)
    whole = sensitivity(net(), batches(), measure="oneshot", ratios=(0.5,))
    assert [c.value for c in resumed.cells] == [c.value for c in whole.cells]


def test_a_truncated_line_is_measured_again(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = sensitivity(net(), batches(), measure="oneshot", resume=path)
    path.write_bytes(path.read_bytes()[:-15])
    again = sensitivity(net(), batches(), measure="oneshot", resume=path)
    assert same(replace(again, cells=again.cells[:-1]), replace(whole, cells=whole.cells[:-1]))
    assert again.cells[-1].value == whole.cells[-1].value
    assert len(path.read_text().splitlines()) == 1 + len(whole.cells)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_another_measurement_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    base = {"measure": "oneshot_bn", "ratios": (0.5,)}
    sensitivity(net(), batches(), resume=path, **base)
    shuffled = [(x.flip(0), y.flip(0)) for x, y in reversed(batches())]
    before = path.read_bytes()
    sensitivity(net(), shuffled, resume=path, **base)  # the order of samples does not matter
    deeper = net()
    deeper.act = nn.ReLU()
    relabelled = [(x, y.flip(0)) for x, y in batches()]
    for model, data, options, what in (
        (net(1), batches(), {}, "another weights"),
        (net(), batches(seed=1), {}, "other data, calibration"),
        (net(), relabelled, {"calibration": batches()}, "another data"),
        (net(), batches(), {"calibration": batches(seed=1)}, "another calibration"),
        (net(), batches(), {"measure": "oneshot"}, "other measure, calibration"),
        (net(), batches(), {"ratios": (0.5, 0.25)}, "another layers"),
        (net(), batches(), {"include": "first"}, "another layers"),
        (net(), batches(), {"loss": nn.CrossEntropyLoss()}, "another loss"),
        (deeper, batches(), {}, "another model"),
    ):
        with pytest.raises(
            ValueError, match=f"run.jsonl was measured with {what}; name another file, or delete this one"
        ):
            sensitivity(model, data, resume=path, **(base | options))
    assert path.read_bytes() == before
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="is no sensitivity table, or damaged"):
        sensitivity(net(), batches(), resume=path, **base)
    assert path.read_text() == "my notes\n"
    path.write_text("")
    assert not sensitivity(net(), batches(), resume=path, **base).missing


@pytest.mark.parametrize("measure", ["taylor", "oneshot_bn"])
def test_parts_are_merged(measure, tmp_path):
    whole = sensitivity(net(), batches(), measure=measure)
    parts = []
    for i in range(4):  # the last one has nothing to do
        sensitivity(net(), batches(), measure=measure, part=(i, 4), resume=tmp_path / f"{i}.jsonl")
        if i < 3:
            parts.append(SensitivityTable.load(tmp_path / f"{i}.jsonl"))
            assert {cell.layer for cell in parts[i].cells} == {whole.layers[i].name}
    merged = SensitivityTable.merge(parts)
    assert not merged.missing
    assert [c.value for c in merged.cells] == [c.value for c in whole.cells]
    idle = sensitivity(net(), batches(), measure=measure, part=(3, 4))
    assert idle.cells == ()
    assert not SensitivityTable.merge([idle, merged]).missing
    with pytest.raises(ValueError, match="cannot be merged, because they differ in weights"):
        SensitivityTable.merge([merged, sensitivity(net(1), batches(), measure=measure)])


# -- measures that train ------------------------------------------------------------------------


def of_layers(model):
    """A made-up final loss: how many filters are trained, and the seed."""
    return float(sum(m.basis_channels for m in model.modules() if hasattr(m, "basis_channels")))


def test_a_trainer_of_ones_own(tmp_path):
    seen = []

    def trainer(model, seed):
        assert model.training
        seen.append((of_layers(model), seed, model.fc.weight.sum().item(), torch.rand(1).item()))
        return of_layers(model) + seed**2

    path = tmp_path / "run.jsonl"
    options = {"measure": "full_training", "ratios": (0.6, 0.3), "trainer": trainer, "seed": 4, "seeds": 3}
    model = net()
    state = copy.deepcopy(model.state_dict())
    table = sensitivity(model, resume=path, **options)
    assert table.baseline == {"loss": pytest.approx((16 + 25 + 36) / 3)}
    values = {("first", 8): 8, ("middle", 8): 8, ("last", 16): 16, ("last", 8): 8}
    assert {(c.layer, c.basis_channels): c.value for c in table.cells} == pytest.approx(values)
    expected = difference_estimate([8 + s**2 for s in (4, 5, 6)], [s**2 for s in (4, 5, 6)])
    assert (table.cells[0].low, table.cells[0].high, table.cells[0].n) == (expected.low, expected.high, 3)
    assert len(seen) == 15
    assert len({row[2] for row in seen if row[0] == 0}) == 3  # weights are drawn anew, by the seed
    assert len({row[1:] for row in seen if row[0] == 0}) == 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = sensitivity(net(seed=9), resume=path, **options)  # the weights given do not matter
    assert len(seen) == 15
    assert repr(again) == repr(table)
    with pytest.raises(ValueError, match="was measured with another seeds"):
        sensitivity(model, resume=path, **(options | {"seeds": 2}))
    first, second = (sensitivity(net(), **(options | {"part": (i, 2)})) for i in (0, 1))
    assert {c.layer for c in first.cells} == {"first", "last"}
    assert second.cells == ()  # its dense network is trained by the first part
    assert same(SensitivityTable.merge([second, first]), table)


def test_interrupted_training_is_resumed(tmp_path):
    path, trained = tmp_path / "run.jsonl", []

    def trainer(model, seed):
        trained.append(seed)
        if len(trained) == 4:
            raise Stop
        return 1.0 + seed

    options = {"measure": "short_training", "ratios": (0.5,), "trainer": trainer, "seeds": 2, "resume": path}
    with pytest.raises(Stop):
        sensitivity(net(), **options)
    assert len(SensitivityTable.load(path).trials) == 3
    table = sensitivity(net(), **options)
    assert len(trained) == 4 + 5
    assert not table.missing
    assert [c.value for c in table.cells] == [0, 0, 0]


def test_diverged_trainings():
    def trainer(model, seed):
        return math.inf if of_layers(model) == 16 else 1.0

    table = sensitivity(net(), measure="short_training", ratios=(0.6, 0.3), trainer=trainer, seeds=2)
    assert table.not_finite == (("last", 16),)
    with pytest.raises(ValueError, match="the dense network's training with seed 0 ended with the loss nan"):
        sensitivity(net(), measure="short_training", trainer=lambda model, seed: math.nan)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(3, 16, 3)


def test_wrong_trainings():
    data = hold_out(synthetic(train=60, test=5, size=8), 20)
    wrong("short_training needs basis.data.Data with validation images", measure="short_training")
    wrong("full_training needs basis.data.Data with", data=replace(data, validation=None), measure="full_training")
    wrong("batch_size is 500, but there are only 40 training images", data=data, measure="short_training")
    for terms in ({"decorrelation": 0.01}, {"skip": Skip(basis_every=2)}, {"decay": "product"}):
        recipe = Recipe(epochs=1, batch_size=20, **terms)
        says = f"sets {next(iter(terms))}, but the model has no basis convolutions, and short_training trains the dense"
        wrong(says, data=data, measure="short_training", recipe=recipe)
    small = {"measure": "short_training", "recipe": Recipe(epochs=1, batch_size=20)}
    wrong("the model itself has parameters but no reset_parameters.*give a trainer", Own(), data=data, **small)
    table = sensitivity(Own(), measure="short_training", trainer=lambda model, seed: model.scale.item(), seeds=1)
    assert [c.value for c in table.cells] == [0]
    assert table.cells[0].n == 0 or math.isnan(table.cells[0].low)


def test_a_real_training_never_sees_the_test_images():
    data = hold_out(synthetic(train=90, test=10, size=16, seed=3), 30)
    data = Data(data.name, data.train, Images(data.test.x[:0], data.test.y[:0]), data.validation)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = build("resnet20", width=8)
    options = {"measure": "short_training", "ratios": (0.5,), "include": "layer2.0.conv1", "seeds": 2}
    torch.manual_seed(3)
    recipe = Recipe(epochs=2, batch_size=20, lr=0.05, translate=1, cutout=0)
    tables = [sensitivity(model, data, recipe=recipe, **options) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    (cell,) = tables[0].cells
    assert math.isfinite(cell.value)
    assert cell.low < cell.value < cell.high
    assert cell.n == 2
    assert cell.backward == (2 + 2) * 2 * 60  # its own two trainings, and all of the dense network's two
    assert cell.value == tables[1].cells[0].value  # the same on a CPU every time
    losses = {(t.layer, t.seed): t.loss for t in tables[0].trials}
    assert len(set(losses.values())) == 4
    diverging = replace(recipe, lr=1e30)
    with pytest.raises(ValueError, match="the dense network's training with seed 0 ended with the loss nan"):
        sensitivity(model, first_images(data, 20), recipe=diverging, **options)


def test_what_layers_lose_together_is_paired_and_agrees_with_one_layer_alone():
    torch.manual_seed(0)
    model = build("resnet20", width=4)
    data = hold_out(synthetic(train=200, test=10, size=16), 60)
    alone = sensitivity(model, data, measure="oneshot_bn", ratios=(0.5,), multiple=1, include="layer1.0.conv1")
    cell = alone.cells[0]
    one = joint(model, {"layer1.0.conv1": 2}, data)
    assert one.value == pytest.approx(cell.value, abs=1e-6)
    assert (one.low, one.high) == pytest.approx((cell.low, cell.high), abs=1e-6)
    two = joint(model, {"layer1.0.conv1": 2, "layer2.0.conv2": 1}, data)
    assert two.value != pytest.approx(one.value, abs=1e-4)
    assert joint(model, {}, data).value == 0


def test_only_measures_of_the_loss_hold_for_several_layers():
    with pytest.raises(ValueError, match="measure is 'taylor', but what layers lose together"):
        joint(build("resnet20", width=4), {}, synthetic(train=20, test=10), measure="taylor")


def test_fine_tuning_starts_at_the_weights_of_the_model():
    torch.manual_seed(0)
    model = build("resnet20", width=4)
    seen = []

    def trainer(network, seed):
        seen.append({name: p.detach().clone() for name, p in network.named_parameters()})
        return float(len(seen))

    table = sensitivity(
        model, measure="fine_tuning", ratios=(0.5,), multiple=1, include="layer1.0.conv1", trainer=trainer, seeds=1
    )
    assert [cell.value for cell in table.cells] == [1.0]
    dense, tuned = seen
    assert all(torch.equal(value, dense[name]) for name, value in model.named_parameters())
    expected = substitute(model, {"layer1.0.conv1": 2}).state_dict()
    assert torch.equal(tuned["layer1.0.conv1.basis"], expected["layer1.0.conv1.basis"])
    assert torch.equal(tuned["conv1.weight"], model.conv1.weight)


def test_a_file_of_fine_tunings_of_other_weights_is_refused(tmp_path):
    options = {"measure": "fine_tuning", "ratios": (0.5,), "multiple": 1, "include": "conv1", "seeds": 1}
    options |= {"resume": tmp_path / "tuned.jsonl", "trainer": lambda network, seed: 1.0}
    sensitivity(build("resnet20", width=4), **options)
    with pytest.raises(ValueError, match="another weights"):
        sensitivity(build("resnet20", width=4), **options)


def test_a_resume_file_of_a_loss_with_other_settings_is_refused(tmp_path):
    torch.manual_seed(0)
    model, data = build("resnet20", width=4), [(torch.randn(6, 3, 8, 8), torch.arange(6))]
    options = {"measure": "oneshot", "ratios": (0.5,), "multiple": 1, "include": "conv1"}
    path = tmp_path / "loss.jsonl"
    sensitivity(model, data, loss=nn.CrossEntropyLoss(), resume=path, **options)
    sensitivity(model, data, loss=nn.CrossEntropyLoss(), resume=path, **options)
    with pytest.raises(ValueError, match="another loss"):
        sensitivity(model, data, loss=nn.CrossEntropyLoss(label_smoothing=0.5), resume=path, **options)


def test_closures_differ_by_what_they_hold():
    def made(factor):
        return lambda outputs, targets: factor * outputs

    assert name_of(made(1)) == name_of(made(1))
    assert name_of(made(1)) != name_of(made(2))
    assert name_of(lambda a, b: a) != name_of(lambda a, b: b)


def test_every_calibration_image_has_the_same_weight():
    torch.manual_seed(0)
    model, x = build("resnet20", width=4), torch.randn(33, 3, 8, 8)
    data = [(x, torch.arange(33) % 10)]
    options = {"measure": "oneshot_bn", "ratios": (0.5,), "multiple": 1, "include": "conv1"}
    uneven = sensitivity(model, data, calibration=[x[:32], x[32:]], **options)
    even = sensitivity(model, data, calibration=[x[:17], x[17:]], **options)
    assert uneven.baseline["loss"] == pytest.approx(even.baseline["loss"], abs=1e-6)


def test_divergences_are_of_predictions_only():
    torch.manual_seed(0)
    model, x = build("resnet20", width=4, num_classes=1), torch.randn(6, 3, 8, 8)
    table = sensitivity(
        model, [(x, torch.rand(6, 1))], measure="oneshot", ratios=(0.5,), multiple=1, include="conv1",
        loss=lambda outputs, targets: F.binary_cross_entropy_with_logits(outputs, targets),
    )  # fmt: skip
    with pytest.raises(ValueError, match="holds no divergences"):
        table.by_kl()


def test_models_that_the_default_training_cannot_train_are_named():
    data = hold_out(synthetic(train=60, test=10, size=8), 20)
    options = {"measure": "fine_tuning", "recipe": Recipe(epochs=1, batch_size=20, cutout=0), "ratios": (0.5,)}
    with pytest.raises(ValueError, match=r"parameters of torch.float64, but the default training"):
        sensitivity(build("resnet20", width=4).double(), data, multiple=1, **options)
    frozen = build("resnet20", width=4).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        sensitivity(frozen, data, multiple=1, **options)


def test_an_empty_buffer_is_no_obstacle():
    model = build("resnet20", width=4)
    model.register_buffer("empty", torch.zeros(0))
    assert sensitivity(model, measure="spectrum", ratios=(0.5,), multiple=1).cells
