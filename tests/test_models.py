"""The networks: parameter counts of their papers, names, shapes, and what they must work with."""

import pytest
import torch
from torch import nn

from basis.layers.norm_pairs import norm_pairs
from basis.models import MODELS, PaddedShortcut, build

PARAMETERS = {  # He et al. 2016, table 6, prints 0.27, 0.46, 0.66, 0.85 and 1.7 million for the three-stage networks
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "wrn-28-10": 36_479_194,
}
THIN = ("resnet18", "resnet50", "resnet20")  # one of each block and shortcut


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = build(name)
    assert parameters(model) == PARAMETERS[name]


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
    weighted = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n]
    assert len(weighted) == int(name.removeprefix("resnet"))


def test_the_parameter_free_shortcut_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 4, 5, 5)
    y = PaddedShortcut(4, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


@pytest.mark.parametrize("name", THIN)
def test_every_convolution_is_followed_by_its_batch_normalisation(name):
    model = build(name, width=4)
    pairs = norm_pairs(model)
    assert not pairs.alone
    assert len(pairs.norms) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert pairs.norms["layer2.0.conv2"] == "layer2.0.bn2"


def test_initial_weights_of_a_seed_are_those_of_the_records():
    torch.manual_seed(1)
    model = build("resnet20", width=4)
    assert list(model.state_dict())[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert [model.conv1.weight[0, 0, 0, 0].item(), model.fc.bias[-1].item()] == pytest.approx([0.09916245, -0.1681624])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet19"}, "model is 'resnet19'"),
        ({"name": "wrn-15-2"}, "WRN-15-2"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes is 0"),
        ({"name": "resnet18", "width": -4}, "width is -4"),
        ({"name": "resnet18", "width": (4, 8)}, "width"),
        ({"name": "wrn-16-4", "width": (4, 8, 8)}, "width"),
    ],
)
def test_unknown_names_and_sizes_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)
