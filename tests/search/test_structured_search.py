"""Structured layers beside basis channels: measured, chosen, predicted, kept on disk and folded."""

import itertools
import math

import pytest
import torch
from torch import nn

from basis import Plan, SensitivityTable, cost, fold, load, merge, plan_of, save, select, substitute
from basis.layers.structured import LAYERS, Structure
from basis.search.selection import predicted
from basis.search.sensitivity import joint, sensitivity

SIZE = (3, 8, 8)
TEXTS = {
    "basis": "basis:1/4", "sep": "sep", "generic": "generic:0.25", "tensor_train": "tensor_train:0.5",
    "tucker": "tucker:0.5", "shuffle": "shuffle:2", "acdc": "acdc:4", "hashed": "hashed:0.2", "lfb": "lfb:0.5,2",
}  # fmt: skip
LAYERS_ASKED = ("generic:0.25", "sep", "lfb:0.5,2")


class Net(nn.Module):
    """Four convolutions, of which the first three have a batch normalisation, and the second has no bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.norm_a = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.c, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.norm_b(self.b(self.norm_a(self.a(x)).relu())).relu()
        return self.head(self.c(x).relu().mean((2, 3)))


def build(seed=0):
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(32, *SIZE))
    return net.eval()


@pytest.fixture
def net():
    return build()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, *SIZE, generator=generator), torch.randint(0, 10, (8,), generator=generator)) for _ in range(3)
    ]


def ask(net, data, measure="oneshot", **options):
    return sensitivity(net, data, measure=measure, **{"ratios": (0.5, 0.25), "layers": LAYERS_ASKED, **options})


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(16, *SIZE, generator=generator), torch.randint(0, 10, (16,), generator=generator)
    return ask(build(), [batch])


def test_layers_cost_what_the_substituted_model_costs(table, net):
    whole = cost(net, SIZE).total
    for layer in table.layers:
        for candidate in layer.candidates:
            changed = cost(substitute(net, {layer.name: candidate}), SIZE, mode="factorized").total
            dense, own = layer.cost(layer.out_channels), layer.cost(candidate)
            assert changed.parameters == whole.parameters - dense["params"] + own["params"]
            assert changed.forward_macs == whole.forward_macs - dense["macs"] + own["macs"]
            assert changed.backward_macs == whole.backward_macs - dense["backward_macs"] + own["backward_macs"]


def test_spectrum_is_the_error_of_the_fitted_weight(net):
    for cell in ask(net, None, "spectrum").cells:
        weight = net.get_submodule(cell.layer).weight
        apart = substitute(net, {cell.layer: cell.basis_channels}).get_submodule(cell.layer).weight - weight
        assert cell.value == pytest.approx((apart.norm() / weight.norm()).item(), rel=1e-4)
        assert cell.forward == 0


@pytest.mark.parametrize("measure", ["oneshot", "oneshot_bn"])
def test_oneshot_is_what_the_substituted_network_loses(net, data, measure):
    for cell in ask(net, data, measure, ratios=(0.5,), layers=("sep", "generic:0.5"), include="b").cells:
        alone = joint(net, {"b": cell.basis_channels}, data, measure=measure)
        assert (cell.value, cell.low, cell.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-5)


def test_measuring_leaves_random_numbers_alone_and_does_not_depend_on_order(net, data, tmp_path):
    asked = {"layers": ("hashed:0.5", "tucker:0.5", "tensor_train:0.5"), "ratios": (), "include": ("a", "b")}
    state = torch.get_rng_state()
    whole = ask(net, data, **asked)
    joint(net, {"a": "hashed:0.5"}, data)
    assert torch.equal(state, torch.get_rng_state())
    whole.save(tmp_path / "part")
    lines = (tmp_path / "part").read_text().splitlines(keepends=True)
    (tmp_path / "part").write_text("".join([lines[0], lines[-2]]))
    torch.manual_seed(5)
    again = ask(net, data, **asked, resume=tmp_path / "part")
    assert [cell.value for cell in again.cells] == [cell.value for cell in whole.cells]


def every_plan(table):
    """Each choice with its loss and what it keeps of the parameters and the MACs."""
    values = {(cell.layer, cell.basis_channels): cell.value for cell in table.cells}
    for sizes in itertools.product(*((layer.out_channels, *layer.candidates) for layer in table.layers)):
        chosen = list(zip(table.layers, sizes, strict=True))
        loss = sum(values.get((layer.name, k), 0.0) for layer, k in chosen)
        saved = {u: sum(at.cost(at.out_channels)[u] - at.cost(k)[u] for at, k in chosen) for u in ("params", "macs")}
        yield loss, {unit: 1 - saved[unit] / table.total[unit] for unit in saved}


@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.3}, {"params": 0.5, "macs": 0.35}])
def test_the_optimum_is_the_best_method_for_each_layer(table, budget):
    plan = select(table, budget=budget)
    met = [loss for loss, kept in every_plan(table) if all(kept[unit] <= budget[unit] for unit in budget)]
    found = predicted(table, plan)
    assert found["sensitivity"] == pytest.approx(min(met), abs=1e-9)
    assert all(found[unit] <= budget[unit] * (1 + 1e-9) for unit in budget)


def substituted(net, text, init="random"):
    """``net`` with every layer that can take it, after a few steps in training mode."""
    names = [
        name for name in ("stem", "a", "b", "c") if Structure.parse(text).obstacle(net.get_submodule(name)) is None
    ]
    assert len(names) > 1
    changed = substitute(net, dict.fromkeys(names, text), init=init).train()
    with torch.no_grad():
        changed(torch.randn(16, *SIZE))
    return changed.eval()


def test_candidates_are_basis_channels_then_the_texts_that_fit(table, net, tmp_path):
    found = {layer.name: layer.candidates for layer in table.layers}
    assert found["stem"] == (8, "generic:0.25", "sep")  # 3 channels make no two groups, and 4 is not a multiple of 8
    assert found["c"] == (16, 8, "generic:0.25", "sep", "lfb:0.5,2")
    assert table.columns == (0.5, 0.25, *LAYERS_ASKED)
    frame = table.to_frame().set_index(["layer", "basis_channels"])
    assert math.isnan(frame.loc[("c", "sep"), "ratio"])
    assert frame.loc[("c", "sep"), "saved_params"] == 32 * 32 * 9 - 32 * 9 - 32 * 32
    table.save(tmp_path / "table")
    assert SensitivityTable.load(tmp_path / "table").to_lines() == table.to_lines()
    with pytest.raises(ValueError, match="no convolution of the model has a candidate to try"):
        sensitivity(net, measure="spectrum", ratios=(), layers="generic:0.001")
    for options in ({"rule": "uniform"}, {"ratio": 0.5}, {"rule": "largest_first"}):
        with pytest.raises(ValueError, match="chosen by 'optimal'"):
            select(table, budget={"params": 0.5}, **options)
    with pytest.raises(ValueError, match="which is not in the table"):
        predicted(table, Plan({"a": "tucker:0.5"}))


def test_what_layers_lose_together_and_what_they_add_up_to(table, net, data):
    values = table.values
    found = predicted(table, Plan({"a": "sep", "c": 8, "b": 12}))["sensitivity"]
    assert found == pytest.approx(values["a", "sep"] + values["c", 8] + (values["b", 8] + values["b", 16]) / 2)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        loss = nn.functional.cross_entropy
        expected = loss(merge(substitute(net, {"a": "sep", "c": 8})).eval()(x), y) - loss(net(x), y)
    assert joint(net, {"a": "sep", "c": 8}, data, measure="oneshot").value == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("text", TEXTS.values())
def test_what_is_saved_is_loaded_and_folding_keeps_the_function(net, text, tmp_path):
    changed, x = substituted(net, text), torch.randn(4, *SIZE)
    save(changed, tmp_path)
    loaded = load(build(seed=1), tmp_path)
    assert plan_of(loaded) == plan_of(changed)
    assert len(list(loaded.parameters())) == len(list(changed.parameters()))  # tied ones are tied again
    torch.testing.assert_close(loaded(x), changed(x), rtol=0, atol=1e-6)  # modes are not saved
    folded = fold(changed)
    assert {type(m) for m in folded.modules()} == {Net, nn.Conv2d, nn.Linear, nn.Identity}
    torch.testing.assert_close(folded(x), changed(x), rtol=1e-4, atol=1e-5)


def test_every_kind_is_tried_here():
    assert set(TEXTS) == set(LAYERS)


def test_layers_for_which_no_text_fits_are_skipped_with_the_reason(net):
    table = sensitivity(net, measure="spectrum", ratios=(), layers=("lfb:0.5,2", "lfb:9"))
    assert [layer.candidates for layer in table.layers] == [("lfb:0.5,2",)] * 3
    assert "2 groups, but it has 3 channels" in table.skipped["stem"]
    assert "nothing to save" in table.skipped["stem"]  # lfb is worth it only where layers share it
