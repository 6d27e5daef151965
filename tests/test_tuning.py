"""Modes chosen by measurement."""

import itertools

import pytest
import torch
from torch import nn

from basis import BasisConv2d, substitute
from basis.models import build
from basis.norm import couple
from basis.timing import BenchReport, Setting
from basis.tuning import EXPLICIT, fastest_modes, tune, use_modes


def clock(seconds):
    """A timer that runs a step and then says what the layer of its mode takes."""

    def timer(step):
        step()
        layer = step.args[0]
        return seconds.get(getattr(layer, "mode", "dense"), 1.0)

    return timer


def setting(**seconds):
    return Setting(device="cpu", batch_size=2, rounds=3, timer=clock(seconds))


def network(**options):
    torch.manual_seed(0)
    return substitute(build("resnet20", width=4), ratio=0.5, init="random", **options)


@pytest.mark.parametrize("fastest", EXPLICIT)
def test_auto_becomes_what_was_fastest(fastest):
    model = network()
    table = tune(model, setting=setting(**{fastest: 0.5}))
    names = [name for name, module in model.named_modules() if isinstance(module, BasisConv2d)]
    assert fastest_modes(table) == dict.fromkeys(names, fastest)
    x = torch.randn(2, 3, 32, 32)
    before = model.eval()(x)
    assert all(layer.measured_mode is None for layer in map(model.get_submodule, names))
    use_modes(model, table)
    for layer in map(model.get_submodule, names):
        assert (layer.mode, layer.resolved_mode) == ("auto", fastest)
        assert f"mode=auto (measured on cpu: {fastest})" in repr(layer)
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


def test_a_table_survives_its_file(tmp_path):
    table = tune(network(), setting=setting(hybrid=0.5), name="thin")
    table.save(tmp_path / "modes.json")
    loaded = BenchReport.load(tmp_path / "modes.json")
    assert fastest_modes(loaded) == fastest_modes(table)
    assert loaded.config["model"] == "thin"
    assert "hybrid" in str(loaded)


def test_other_modes_and_other_devices_keep_theirs():
    model = network()
    table = tune(model, setting=setting(hybrid=0.5))
    model.layer1[0].conv1.mode = "composed"
    use_modes(model, table)
    assert model.layer1[0].conv1.resolved_mode == "composed"
    layer = model.layer1[0].conv2
    assert layer.resolved_mode == "hybrid"
    assert layer.to("meta").resolved_mode == "composed"


def test_layers_that_a_normalisation_mixes_have_no_choice():
    model = couple(network())
    with pytest.raises(ValueError, match="no basis convolution that is called"):
        tune(model, setting=setting())
    table = tune(network(), setting=setting(composed=0.5))
    use_modes(model, table)
    assert model.layer1[0].conv1.resolved_mode == "factorized"


def test_wrong_tables_are_refused():
    model = network()
    table = tune(model, setting=setting())
    other = substitute(build("resnet20", width=4), ratio=0.25, init="random")
    with pytest.raises(ValueError, match=r"measured for another network: it has conv1, layer1\.0\.conv1"):
        use_modes(other, table)
    assert all(m.measured_mode is None for m in other.modules() if isinstance(m, BasisConv2d))
    with pytest.raises(ValueError, match="kind 'bench-layer'"):
        fastest_modes(BenchReport(kind="bench-layer", config={}, environment={}, rows=[]))
    with pytest.raises(ValueError, match="no basis convolution"):
        tune(nn.Conv2d(3, 4, 3), setting=setting())


def test_real_times_are_those_of_the_layer():
    layer = BasisConv2d(32, 64, 3, padding=1, ratio=0.25)
    table = tune(nn.Sequential(layer), input_size=(32, 8, 8), setting=Setting(device="cpu", batch_size=4, rounds=3))
    assert [row["mode"] for row in table.rows] == ["control", *EXPLICIT]
    assert all(row["ms"] > 0 and row["n"] == 3 for row in table.rows)
    assert {row["basis_channels"] for row in table.rows} == {16}
    assert len(list(itertools.groupby(row["shape"] for row in table.rows))) == 1
