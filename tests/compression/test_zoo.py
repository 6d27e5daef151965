"""Networks of torchvision and timm: the smallest ones here, all of them in the record that `basis zoo` made."""

import copy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from basis import BasisConv2d, Plan, couple, fold, merge, substitute, uncouple
from basis.cli import main
from basis.compression.zoo import CHECKS, NETWORKS, TIMM, TORCHVISION, Network, ZooReport, check_network, check_networks
from basis.inference import norms_left
from basis.layers.batchnorm import couplings
from basis.saving import RecordError
from basis.vision import import_timm, import_torchvision

RECORD = Path(__file__).resolve().parents[2] / "results" / "bench" / "zoo.json"
EXPORTS = ("onnx", "program")
WITHOUT_EXPORTS = [name for name in CHECKS if name not in EXPORTS]

# Small ones with: two outputs in training, a forward pass of its own, weights made from others, normalisation and
# activation in one, attention, grouped and depthwise convolutions, channels shuffled, squeezed and joined.
QUICK = [
    Network("torchvision", "squeezenet1_1"),
    Network("torchvision", "shufflenet_v2_x0_5"),
    Network("torchvision", "mobilenet_v3_small"),
    Network("timm", "test_byobnet"),
    Network("timm", "test_efficientnet"),
    Network("timm", "test_nfnet"),
    Network("timm", "test_resnet"),
    Network("timm", "tf_mobilenetv3_small_minimal_100"),
    Network("timm", "mobilevit_xxs"),
]


@pytest.fixture(scope="module")
def network():
    """A small network of timm with grouped convolutions, and its normalisations and activations in one."""
    return Network("timm", "test_byobnet").build()


def images(count=2, dtype=torch.float32):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("chosen", QUICK, ids=str)
def test_a_network_stands_every_check(chosen):
    row = check_network(chosen, checks=WITHOUT_EXPORTS)
    assert row["failed"] == {}
    assert row["substituted"] > 0
    assert row["substituted"] + sum(row["left"].values()) == row["convolutions"]
    assert 0 < row["parameters"] < 1


def test_a_network_is_exported():
    row = check_network(Network("timm", "test_efficientnet"), checks=EXPORTS)
    assert row["failed"] == {}
    assert row["notes"] == []
    assert max(row[name] for name in EXPORTS) < 1e-4


# -- the record -----------------------------------------------------------------------------------


def test_the_record_holds_all_networks_and_none_failed():
    report = ZooReport.load(RECORD)
    assert report.failures() == {}
    assert set(report.config["checks"]) == set(CHECKS)
    for row in report.rows:
        assert row["substituted"] + sum(row["left"].values()) == row["convolutions"]
    assert report.missing() == []


# torchvision's modules of classifiers -> how the names of their networks begin
FAMILIES = {name: name for name in (
    "alexnet", "convnext", "densenet", "googlenet", "mnasnet", "regnet", "resnet", "squeezenet", "vgg", "maxvit",
)} | {
    "efficientnet": "efficientnet_b", "inception": "inception_v3", "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3", "shufflenetv2": "shufflenet_v2", "swin_transformer": "swin",
    "vision_transformer": "vit",
}  # fmt: skip


def test_every_family_of_classifiers_is_there():
    """Also one that a newer torchvision brings."""
    import_torchvision()
    models = import_module("torchvision.models")
    modules = {
        module.__module__.rpartition(".")[2] for module in map(models.get_model_builder, models.list_models(models))
    }
    assert modules == set(FAMILIES)
    for start in FAMILIES.values():
        assert any(network.name.startswith(start) for network in TORCHVISION), start
    assert len({network.name for network in TIMM}) >= 20
    assert len(set(NETWORKS)) == len(NETWORKS)


def test_work_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, done = tmp_path / "zoo.json", []

    def check(network, **_):
        if network.name == "bad":
            raise KeyboardInterrupt
        done.append(network.name)
        return {"library": "timm", "network": network.name, "size": 64, "failed": {}, "seconds": 1.0}

    monkeypatch.setattr("basis.compression.zoo.check_network", check)
    first, bad, last = (Network("timm", name) for name in ("first", "bad", "last"))
    with pytest.raises(KeyboardInterrupt):
        check_networks([first, bad, last], path=path)
    told = []
    report = check_networks([first, last], path=path, progress=told.append)
    assert done == ["first", "last"]
    assert len(told) == 1
    assert report.missing([first, bad, last]) == ["timm/bad"]
    report.rows[0]["failed"]["onnx"] = "differs"
    report.save(path)
    check_networks([first, last], path=path)  # what failed is tried again
    assert done == ["first", "last", "first"]
    check_networks([first], path=path, ratio=0.25)  # another question: all anew
    assert done == ["first", "last", "first", "first"]
    path.write_text("{")
    with pytest.raises(RecordError, match="not a JSON"):
        check_networks([first], path=path)


def test_a_failure_is_told_and_stops_nothing(monkeypatch):
    monkeypatch.setitem(CHECKS, "merged", lambda case: case.compare(nn.Flatten()))
    monkeypatch.setitem(CHECKS, "again", lambda case: 0.0)
    report = ZooReport(kind="zoo", config={}, environment={}, rows=[
        check_network(Network("timm", "test_resnet"), checks=("merged", "again")),
        check_network(Network("timm", "no such network"), checks=()),
    ])  # fmt: skip
    assert report.rows[0]["again"] == 0.0
    failures = report.failures()
    assert list(failures) == ["timm/test_resnet", "timm/no such network"]
    assert list(failures["timm/test_resnet"]) == ["merged"]
    assert "Unknown model" in failures["timm/no such network"]["substituted"]
    assert str(report).endswith("0 of 2 networks pass")


# -- what these networks have that our own have not -----------------------------------------------


def test_layers_that_would_grow_are_left_on_demand(network):
    free, careful = (Plan.uniform(network, ratio=0.5, only_smaller=flag) for flag in (False, True))
    sizes = {name: network.get_submodule(name).weight for name in free.layers}
    grows = {
        name for name, k in free.layers.items() if k >= sizes[name][0].numel() * network.get_submodule(name).groups
    }
    assert grows
    assert careful.layers == {name: k for name, k in free.layers.items() if name not in grows}
    name = min(grows)
    reason = f"k = {free.layers[name]} saves nothing: its filters have only {sizes[name][0].numel()} numbers"
    assert careful.skipped[name] == reason
    for name in grows:
        one, dense = BasisConv2d.from_conv(network.get_submodule(name), basis_channels=free.layers[name]), sizes[name]
        assert sum(p.numel() for p in (one.basis, one.coefficients.values)) >= dense.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(network, dtype):
    half = copy.deepcopy(network).to(dtype)
    small = substitute(half, ratio=0.5).eval()
    assert {p.dtype for p in small.parameters()} == {dtype}
    y = small(images(dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    tolerance = 32 * torch.finfo(dtype).eps * float(y.detach().abs().max())
    for other in (merge(small), couple(small), fold(small)):
        torch.testing.assert_close(other(images(dtype=dtype)), y, rtol=0, atol=tolerance)


def test_frozen_layers_stay_frozen(network):
    frozen = copy.deepcopy(network)
    frozen.stages[:2].requires_grad_(False)
    small = substitute(frozen, ratio=0.5).train()
    couple(small)(images(4)).sum().backward()
    for name in Plan.uniform(frozen, ratio=0.5).layers:
        trains = frozen.get_submodule(name).weight.requires_grad
        layer = small.get_submodule(name)
        assert {p.requires_grad for n, p in layer.named_parameters() if n != "bias"} == {trains}
        assert merge(small).get_submodule(name).weight.requires_grad == trains


def test_normalisation_with_an_activation_is_coupled_and_folded(network):
    """timm's BatchNormAct2d, in training and in evaluation, and back."""
    import_timm()
    from timm.layers import BatchNormAct2d

    dense = copy.deepcopy(network).double()
    norms = {name: m for name, m in dense.named_modules() if isinstance(m, BatchNormAct2d)}
    for norm in norms.values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    small = substitute(dense, ratio=0.5)
    coupled = couple(small)
    found = couplings(small).norms
    assert set(found.values()) == set(norms)
    assert norms_left(small) == {}
    x = images(4, torch.float64)
    expected = {}
    for model in (small, coupled):
        model.train().zero_grad()
        y = model(x)
        y.square().sum().backward()
        values = {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
        expected = expected or {name: value.clone() for name, value in values.items()}
        torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-9)
        model.eval()
    back = uncouple(coupled)
    assert all(type(back.get_submodule(name)) is BatchNormAct2d for name in norms)
    assert {type(m) for m in fold(small).modules()}.isdisjoint({BatchNormAct2d, nn.BatchNorm2d, BasisConv2d})
    for other in (coupled, copy.deepcopy(coupled), back, fold(small), fold(coupled), merge(coupled)):
        torch.testing.assert_close(other(x), small(x), rtol=1e-9, atol=1e-9)


def test_the_command_refuses_what_it_does_not_know(capsys, tmp_path):
    assert main(["zoo", "--only", "timm/resnet10", "--out", str(tmp_path / "zoo.json")]) == 2
    assert "--only has 'timm/resnet10', but the networks are timm/resnet10t" in capsys.readouterr().err
    assert main(["zoo", "--only", "timm/test_resnet", "--out", str(tmp_path)]) == 2
    assert "is a folder, but must be the name of a file" in capsys.readouterr().err


def test_the_command_makes_the_record(capsys, tmp_path, monkeypatch):
    row = {"library": "timm", "network": "test_resnet", "size": 64, "seconds": 1.0}
    for failed, status in (({}, 0), ({"merged": "outputs differ"}, 1)):
        monkeypatch.setattr(
            "basis.compression.zoo.check_network", lambda *_, failed=failed, **__: {**row, "failed": failed}
        )
        path = tmp_path / f"{status}.json"
        assert main(["zoo", "--only", "timm/test_resnet", "--out", str(path)]) == status
        assert ZooReport.load(path).failures() == ({"timm/test_resnet": failed} if failed else {})
        assert f"{1 - status} of 1 networks pass" in capsys.readouterr().out


def test_a_network_that_asks_for_the_version_of_its_state_is_saved():
    row = check_network(Network("torchvision", "mnasnet0_5"), checks=["saved"])
    assert row["failed"] == {}
