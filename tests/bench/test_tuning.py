"""Modes chosen by measurement."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from basis import BasisConv2d, substitute
from basis.bench.cases import Block
from basis.bench.timing import BenchReport, Setting, layer_steps, time_on_cpu
from basis.bench.tuning import EXPLICIT, bench_latency, fastest, tune, use_modes
from basis.inference import measure_fold
from basis.layers.batchnorm import BasisBatchNorm2d, couple
from basis.models import build
from tests.unusual import UNUSUAL, Clips, Drifts, Two, made


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
    wide = BenchReport(**{**vars(table), "rows": [{**row, "shape": f"{row['shape']} groups 2"} for row in table.rows]})
    with pytest.raises(ValueError, match=r"measured for another network: it has conv1 \(3-4@32x32 3x3 groups 2"):
        use_modes(model, wide)
    use_modes(model, tune(model, input_size=(3, 16, 20), setting=setting()))  # images of another size
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


# -- inputs of other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNUSUAL)
def test_networks_that_take_something_else(kind, tmp_path):
    model, x = made(kind)
    cast = replace(setting(composed=0.5), precision="fp32", memory_format="channels_last")
    report = bench_latency(model, inputs=x, ratios=np.array([0.5]), multiple=np.int64(8), setting=cast)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(report.latencies("forward")) <= convolutions
    assert report.config["inputs"].startswith("(2, ")
    report.save(tmp_path / "latency.json")
    small = substitute(model, ratio=0.5)
    table = tune(small, inputs=x, setting=cast)
    assert not any(row.get("error") for row in table.rows)
    assert set(fastest(table).values()) == {"composed"}
    use_modes(small, table)
    assert set(measure_fold(small, inputs=x, setting=setting())) <= convolutions


def test_keyword_inputs_are_inputs_too():
    model, (image, tokens) = made(Two)
    given, graphs = {"tokens": tokens, "image": image}, replace(setting(), precision="bf16", capture=lambda step: step)
    named, placed = (
        bench_latency(model, inputs=x, ratios=[0.5], passes=["forward"], setting=graphs)
        for x in (given, (image, tokens))
    )
    assert named.config["network_ms"]["forward"] > 0
    assert [row["shape"] for row in named.rows] == [row["shape"] for row in placed.rows]
    with pytest.raises(ValueError, match="give one of"):
        tune(substitute(model, ratio=0.5), input_size=(3, 9, 8), inputs=given, setting=setting())


def test_a_layer_is_timed_on_as_many_images_as_it_gets():
    sizes = set()

    def timer(step):
        with watched(step.args[0], lambda x: sizes.add(tuple(x.shape))):
            step()
        return 1.0

    model, _ = made(Clips)
    for inputs in (torch.zeros(2, 4, 3, 9, 8), torch.zeros(1, 4, 3, 9, 8)):
        table = bench_latency(model, inputs=inputs, ratios=[0.5], setting=replace(setting(), timer=timer))
        assert {row["shape"] for row in table.rows} == {"3-16@4x9x8 3x3"}
    assert sizes == {(2 * 4, 3, 9, 8)}  # a batch of 2 clips of 4 frames


def watched(model, see):
    return model.register_forward_pre_hook(lambda _, args: see(args[0]))


def test_a_step_goes_back_from_every_output_and_leaves_no_gradients():
    model, inputs = made(Two)
    flows = []
    for parameter in (model.embed.weight, model.conv.weight):
        parameter.register_hook(lambda _, parameter=parameter: flows.append(parameter.dim()))
    layer_steps({"dense": model}, [inputs], "forward+backward", setting().settled(model))["dense"]()
    assert sorted(flows) == [2, 4]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("one", ["forward", "forward+backward"])
def test_a_network_that_changes_its_input_is_timed_on_the_same_one_every_time(one):
    for given in ((3, 9, 8), torch.rand(2, 3, 9, 8)):
        model, seen = made(Drifts)[0], []
        with watched(model, lambda x, seen=seen: seen.append(x.detach().clone())):
            step = layer_steps({"dense": model}, [given], one, setting().settled(model))["dense"]
            for _ in range(3):
                step()
        assert len(seen) == 4
        assert all(torch.equal(x, seen[0]) for x in seen)


def test_a_pass_that_is_none_is_refused():
    with pytest.raises(ValueError, match="pass is 'backward'"):
        tune(nn.Sequential(BasisConv2d(4, 8, 3, ratio=0.5)), input_size=(4, 8, 8), one="backward", setting=setting())
    with pytest.raises(ValueError, match="pass is 'f'"):
        bench_latency(nn.Conv2d(3, 8, 3), ratios=[0.5], multiple=4, passes="forward", setting=setting())
