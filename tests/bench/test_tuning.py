"""Modes chosen by measurement."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from basis import BasisConv2d, substitute
from basis.bench.cases import Block
from basis.bench.timing import BenchReport, Setting, time_on_cpu
from basis.bench.tuning import EXPLICIT, fastest, tune, use_modes
from basis.layers.batchnorm import BasisBatchNorm2d, couple
from basis.models import build


def clock(seconds):
    """A timer that runs a step and then says what the layer of its mode takes."""

    def timer(step):
        step()
        layer = step.args[0]
        if isinstance(layer, Block):
            layer = layer.conv
        if getattr(layer, "mixed_later", False):
            return seconds.get("through_basis", 1.0)
        return seconds.get(getattr(layer, "mode", "dense"), 1.0)

    return timer


def setting(**seconds):
    return Setting(device="cpu", batch_size=2, rounds=3, timer=clock(seconds))


def network(**options):
    torch.manual_seed(0)
    return substitute(build("resnet20", width=4), ratio=0.5, init="random", **options)


@pytest.mark.parametrize("best", EXPLICIT)
def test_auto_becomes_what_was_fastest(best):
    model = network()
    table = tune(model, setting=setting(**{best: 0.5}))
    names = [name for name, module in model.named_modules() if isinstance(module, BasisConv2d)]
    assert fastest(table) == dict.fromkeys(names, best)
    x = torch.randn(2, 3, 32, 32)
    before = model.eval()(x)
    assert all(layer.measured_mode is None for layer in map(model.get_submodule, names))
    use_modes(model, table)
    for layer in map(model.get_submodule, names):
        assert (layer.mode, layer.resolved_mode) == ("auto", best)
        assert f"mode=auto (measured on cpu: {best})" in repr(layer)
    torch.testing.assert_close(model(x), before)


def test_equal_layers_are_measured_once():
    told = []
    table = tune(network(), setting=setting(), progress=told.append)
    rows = [row for row in table.rows if row["mode"] == "composed"]
    measured = [row for row in rows if row["same_as"] is None]
    assert len(rows) == 19
    assert len(measured) == 1 + 3 + 2  # the stem; one of each stage; two that change the shape
    assert len(told) == 4 * len(measured)
    frozen = network()
    frozen.layer1[0].conv1.basis.requires_grad_(False)
    again = tune(frozen, setting=setting())
    assert len({row["same_as"] or row["layer"] for row in again.rows}) == len(measured) + 1


@pytest.mark.parametrize("coupled", [False, True])
def test_normalisation_through_the_basis_is_one_of_the_ways(coupled):
    ordinary = network().double()
    model = couple(ordinary) if coupled else network().double()
    table = tune(model, setting=setting(through_basis=0.5))
    assert set(fastest(table).values()) == {"through_basis"}
    use_modes(model, table)
    x = torch.randn(4, 3, 32, 32).double()
    assert all(isinstance(m, BasisBatchNorm2d) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(model(x), ordinary(x))
    use_modes(model, tune(model, setting=setting(composed=0.5)))
    assert not any(isinstance(m, BasisBatchNorm2d) for m in model.modules())
    assert model.layer1[0].conv1.resolved_mode == "composed"
    torch.testing.assert_close(model(x), ordinary(x))


def test_what_the_table_does_not_name_stays_coupled():
    model = couple(network())
    table = tune(model, setting=setting(composed=0.5))
    rows = [row for row in table.rows if row["layer"] == "conv1"]
    use_modes(model, BenchReport(kind=table.kind, config=table.config, environment=table.environment, rows=rows))
    assert model.conv1.resolved_mode == "composed"
    assert not model.conv1.mixed_later
    assert model.layer1[0].conv1.mixed_later


def test_ways_are_timed_as_graphs_where_there_are_any_and_one_that_fails_is_not_chosen():
    def capture(function):
        if getattr(function.args[0], "mode", "") == "composed":
            raise RuntimeError("no")
        return function

    model = nn.Sequential(BasisConv2d(4, 8, 3, padding=1, ratio=0.5))
    graphed = replace(setting(composed=0.1, factorized=0.5), capture=capture)
    table = tune(model, input_size=(4, 8, 8), setting=graphed)
    assert {row["mode"]: row.get("timed") for row in table.rows} == {
        "control": "graph", "factorized": "graph", "composed": None,
    }  # fmt: skip
    assert fastest(table) == {"0": "factorized"}
    older = replace(table, rows=[*table.rows, {"layer": "0", "mode": "hybrid", "speedup": 9.0}])  # with a mode deleted
    assert fastest(older) == {"0": "factorized"}
    use_modes(model, table)
    assert model[0].resolved_mode == "factorized"


def test_a_forward_pass_is_timed_in_evaluation_mode():
    modes = set()

    def timer(step):
        modes.add(step.args[0].training)
        return time_on_cpu(step)

    tune(network(), one="forward", setting=Setting(device="cpu", batch_size=2, rounds=3, timer=timer))
    assert modes == {False}


def test_wrong_tables_are_refused():
    model = network()
    table = tune(model, setting=setting())
    other = substitute(build("resnet20", width=4), ratio=0.25, init="random")
    with pytest.raises(ValueError, match=r"measured for another network: it has conv1 \(3-4@32x32 3x3, k = 2\)"):
        use_modes(other, table)
    assert all(m.measured_mode is None for m in other.modules() if isinstance(m, BasisConv2d))
    with pytest.raises(ValueError, match="kind 'bench-layer'"):
        fastest(BenchReport(kind="bench-layer", config={}, environment={}, rows=[]))
    with pytest.raises(ValueError, match="no basis convolution"):
        tune(nn.Conv2d(3, 4, 3), setting=setting())


def test_a_table_that_asks_for_what_cannot_be_coupled_changes_nothing():
    table = tune(network(), setting=setting(through_basis=0.5))
    other = network()
    other.layer1[0].bn1 = nn.GroupNorm(1, 4)
    other = couple(other, ["layer1.1.conv1"])
    with pytest.raises(ValueError, match=r"'layer1\.0\.conv1' cannot be coupled"):
        use_modes(other, table)
    assert [n for n, m in other.named_modules() if isinstance(m, BasisBatchNorm2d)] == ["layer1.1.bn1"]
    assert not any(m.measured_mode for m in other.modules() if isinstance(m, BasisConv2d))
