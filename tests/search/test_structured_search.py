"""Structured layers beside basis channels: measured, chosen, predicted, kept on disk and folded."""

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from basis import Plan, cost, merge, select, substitute
from basis.layers.structured import Structure
from basis.search.selection import InfeasibleBudget, predicted
from basis.search.sensitivity import joint, sensitivity

SIZE = (3, 8, 8)
TEXTS = {
    "basis": "basis:1/4", "linearconv": "linearconv", "sep": "sep", "generic": "generic:0.25", "tied": "tied:0.25",
    "sep_hashed": "sep_hashed:0.5", "hashed": "hashed:0.2", "tensor_train": "tensor_train:0.5",
    "tucker": "tucker:0.5", "shuffle": "shuffle:2", "acdc": "acdc:4", "tridiagonal": "tridiagonal:1,1,7",
    "lfb": "lfb:0.5,2", "dsfb": "dsfb:1/4,1/8", "basisconv": "basisconv:0.25", "dcf": "dcf:3", "debut": "debut:0.5",
    "pemn": "pemn:1", "dsf": "dsf:0.5",
}  # fmt: skip
LAYERS_ASKED = ("generic:0.25", "sep", "tridiagonal:1,1,7")


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


# -- measured -----------------------------------------------------------------------------------------


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


def test_activation_is_the_error_of_the_centred_output(net, data):
    cells = ask(net, data, "activation", ratios=()).cells
    assert len(cells) == 11
    inputs = {}
    for name in ("stem", "a", "b", "c"):
        net.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: inputs.update({name: x[0]}))
    net(torch.cat([x for x, _ in data]))
    for cell in cells:
        x, conv = inputs[cell.layer], net.get_submodule(cell.layer)
        y, z = (
            one(x).transpose(0, 1).flatten(1).double()
            for one in (conv, merge(substitute(conv, {"": cell.basis_channels})))
        )
        error = (z - y).var(1).sum() / y.var(1).sum()
        assert cell.value == pytest.approx(error.sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("measure", ["oneshot", "oneshot_bn"])
def test_oneshot_is_what_the_substituted_network_loses(net, data, measure):
    for cell in ask(net, data, measure, ratios=(0.5,), layers=("sep", "generic:0.5"), include="b").cells:
        alone = joint(net, {"b": cell.basis_channels}, data, measure=measure)
        assert (cell.value, cell.low, cell.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-5)


def test_measuring_leaves_random_numbers_alone_and_does_not_depend_on_order(net, data, tmp_path):
    asked = {"layers": ("sep_hashed:0.5", "pemn:1", "debut:0.5"), "ratios": (), "include": ("a", "b")}
    state = torch.get_rng_state()
    whole = ask(net, data, **asked)
    joint(net, {"a": "pemn:1"}, data)
    assert torch.equal(state, torch.get_rng_state())
    whole.save(tmp_path / "part")
    lines = (tmp_path / "part").read_text().splitlines(keepends=True)
    (tmp_path / "part").write_text("".join([lines[0], lines[-2]]))
    torch.manual_seed(5)
    again = ask(net, data, **asked, resume=tmp_path / "part")
    assert [cell.value for cell in again.cells] == [cell.value for cell in whole.cells]


# -- asked in vain ------------------------------------------------------------------------------------


def test_layers_for_which_no_text_fits_are_skipped_with_the_reason(net, data):
    table = sensitivity(net, data, measure="spectrum", ratios=(), layers=("tridiagonal:1,1,7", "lfb:9"))
    assert [layer.name for layer in table.layers] == ["a", "b", "c"]
    assert "has only 48" in table.skipped["stem"]
    assert "nothing to save" in table.skipped["stem"]  # lfb is worth it only where layers share it
    assert all(layer.candidates == ("tridiagonal:1,1,7",) for layer in table.layers)


# -- kept and shown -----------------------------------------------------------------------------------


def test_files_of_basis_channels_alone_are_as_before(net, data):
    (head, *cells) = sensitivity(net, data, measure="oneshot").to_lines()
    layer = "name", "out_channels", "groups", "fan_in", "bias", "positions", "input_gradient", "candidates"
    assert all(tuple(entry) == layer for entry in json.loads(json.dumps(head))["layers"])
    assert all(type(cell["basis_channels"]) is int for cell in cells)


# -- chosen -------------------------------------------------------------------------------------------


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


def test_uniform_is_one_text_for_all(net, data):
    texts = ("generic:0.25", "generic:0.5", "sep")
    table = sensitivity(net, data, measure="oneshot", ratios=(), layers=texts)
    kept = {t: predicted(table, Plan(dict.fromkeys(("stem", "a", "b", "c"), t)))["params"] for t in texts}
    for budget in np.linspace(min(kept.values()) * 1.001, 0.99, 5):
        (text,) = set(select(table, budget={"params": budget}, rule="uniform").layers.values())
        assert kept[text] == max(value for value in kept.values() if value <= budget)
    assert select(table, budget={"params": 1}, rule="uniform").layers == {}
    with pytest.raises(InfeasibleBudget, match="smallest that can be met"):
        select(table, budget={"params": 0.01}, rule="uniform")


# -- kept on disk, folded, exported ---------------------------------------------------------------------


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
