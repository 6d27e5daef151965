"""The networks: parameter counts of their papers, names, shapes, and what they must work with."""

import inspect

import pytest
import torch
from torch import nn

from basis import models
from basis.layers.norm_pairs import norm_pairs
from basis.models import MODELS, PaddedShortcut, build

PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}
# He et al. 2016, table 6, in millions, as printed there
PAPER = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
THIN = ("resnet18", "resnet50", "resnet20")  # one of each block and shortcut


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = build(name)
    assert parameters(model) == PARAMETERS[name]
    if name in PAPER:
        digits = 1 if name == "resnet110" else 2
        assert round(parameters(model) / 1e6, digits) == PAPER[name]


@pytest.mark.parametrize("name", MODELS)
def test_depth_is_the_number_in_the_name(name):
    with torch.device("meta"):
        model = build(name)
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n]
    assert len(weighted) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_at_every_stage(name):
    with torch.device("meta"):
        model = build(name, num_classes=7, width=8)
    seen = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape[1:])))
    y = model(torch.empty(2, 3, 32, 32, device="meta"))
    assert y.shape == (2, 7)
    wider = 4 if name == "resnet50" else 1
    assert seen == [(wider * 8 * 2**i, 32 // 2**i, 32 // 2**i) for i in range(len(model.stages))]


def test_names_of_layers():
    names = dict(build("resnet18", width=4).named_modules())
    top = [name for name in names if name and "." not in name]
    assert top == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    for name in ("layer4.0.conv1", "layer4.0.bn2", "layer4.1.conv2", "layer2.0.shortcut.0"):
        assert name in names
    assert names["layer4.0.conv1"].stride == (2, 2)
    assert isinstance(names["layer1.0.shortcut"], nn.Identity)
    assert isinstance(dict(build("resnet20", width=4).named_modules())["layer2.0.shortcut"], PaddedShortcut)


def test_the_parameter_free_shortcut_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 4, 5, 5)
    y = PaddedShortcut(4, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("name", THIN)
def test_channels_last_gives_the_same_numbers_and_stays_channels_last(name):
    torch.manual_seed(0)
    model = build(name, width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    formats = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(
            lambda m, args, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    y = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert formats == [True] * len(model.stages)


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_export(name):
    torch.manual_seed(0)
    model = build(name, width=4).eval()
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", THIN)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build(name, width=4)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", THIN)
def test_every_convolution_is_followed_by_its_batch_normalisation(name):
    model = build(name, width=4)
    pairs = norm_pairs(model)
    assert not pairs.alone
    assert len(pairs.norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert pairs.norms["layer2.0.conv2"] == "layer2.0.bn2"


def test_initialisation_is_that_of_pytorch():
    torch.manual_seed(0)
    conv = build("resnet18", width=16).layer4[1].conv2
    bound = (conv.in_channels * 9) ** -0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound


@pytest.mark.parametrize("name", MODELS)
def test_build_is_the_function_of_that_name(name):
    with torch.device("meta"):
        model = getattr(models, name)()
        assert parameters(build(name)) == parameters(model)
        assert build(name, width=6).conv1.out_channels == 6
    assert inspect.signature(getattr(models, name)).parameters["width"].default == model.conv1.out_channels


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match=r"model is 'resnet19', but the known ones are resnet18, .*resnet110"):
        build("resnet19")
    with pytest.raises(ValueError, match="num_classes is 0"):
        build("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="width is -4"):
        build("resnet18", width=-4)
