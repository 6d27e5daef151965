"""Which batch normalisation directly follows which convolution."""

import pytest
import torch
from torch import nn

from basis import substitute
from basis.layers.norm_pairs import norm_pairs
from basis.models import build


@pytest.mark.parametrize(("name", "count"), [("resnet20", 19), ("resnet50", 53)])
def test_every_convolution_of_a_resnet_has_its_own(name, count):
    model = build(name, width=4)
    model = substitute(model, ratio=0.5, init="random") if name == "resnet20" else model
    pairs = norm_pairs(model)
    assert len(pairs.norms) == count
    assert pairs.norms["layer1.0.conv1"] == "layer1.0.bn1"
    assert not pairs.alone


class Network(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn = nn.SyncBatchNorm(3) if way == "sync" else nn.BatchNorm2d(3)
        self.way = way

    def forward(self, x):
        y = self.conv(x)
        if self.way == "relu between":
            return self.bn(torch.relu(y))
        if self.way == "used twice":
            return self.bn(y) + y
        if self.way == "called twice":
            return self.bn(self.conv(self.bn(y)))
        if self.way == "weight elsewhere":
            return self.bn(y) + self.conv.weight.sum()
        if self.way == "statistics elsewhere":
            return self.bn(y) + self.bn.running_mean.sum()
        if self.way == "branches":
            return self.bn(y) if y.sum() > 0 else y
        return self.bn(y)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("relu between", "does not go into one nn.BatchNorm2d and nowhere else"),
        ("used twice", "does not go into one nn.BatchNorm2d and nowhere else"),
        ("sync", "does not go into one nn.BatchNorm2d and nowhere else"),
        ("called twice", "called more than once"),
        ("weight elsewhere", "are used elsewhere too"),
        ("statistics elsewhere", "are used elsewhere too"),
    ],
)
def test_what_is_no_pair_has_its_reason(way, reason):
    pairs = norm_pairs(Network(way))
    assert not pairs.norms
    assert reason in pairs.alone["conv"]
    assert pairs.alone["other"] == "it is never called"


class Modes(nn.Module):
    """A batch normalisation of its own for training, one that both share, or an output of its own in training."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.own = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.way = way

    def forward(self, x):
        if self.way == "other convolution":
            return self.bn(self.conv(x) if self.training else self.other(x))
        if self.way == "other normalisation":
            return self.own(self.conv(x)) if self.training else self.bn(self.conv(x))
        if self.way == "branch in training":
            x = self.bn(self.conv(x))
            return self.own(self.other(x)) if self.training else x
        y = self.conv(x)
        return self.bn(y) + y.mean() if self.training else self.bn(y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("way", "norms"),
    [
        ("output in training", {}),
        ("other convolution", {}),
        ("other normalisation", {}),
        ("branch in training", {"conv": "bn", "other": "own"}),
    ],
)
def test_pairs_of_both_modes(way, norms, training):
    model = Modes(way).train(training)
    model.own.eval()
    assert norm_pairs(model, both_modes=True).norms == norms
    assert (model.training, model.bn.training, model.own.training) == (training, training, False)


def test_a_model_that_cannot_be_traced_is_refused():
    with pytest.raises(ValueError, match=r"Network cannot be traced by torch\.fx"):
        norm_pairs(Network("branches"))


class Parts(nn.Module):
    """A traceable pair, and a part whose forward pass depends on values (in one mode, or in both)."""

    def __init__(self, depends, leak=False):
        super().__init__()
        self.part = Network("plain")
        self.part.forward = lambda x: self._part(x)
        self.depends, self.leak = depends, leak
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def _part(self, x):
        if self.depends in ("both", "training" if self.part.training else "evaluation") and x.sum() > 0:
            return x
        return self.part.bn(self.part.conv(x))

    def forward(self, x):
        x = self.part(self.bn(self.conv(x)))
        return self.part.bn(self.part.conv(x)) if self.leak else x


@pytest.mark.parametrize("depends", ["both", "training", "evaluation"])
def test_what_cannot_be_traced_hides_no_other_pairs(depends):
    pairs = norm_pairs(Parts(depends), both_modes=True)
    assert pairs.norms == {"conv": "bn"}
    assert pairs.alone["part.conv"] == "it is within part, which cannot be traced by torch.fx"


def test_what_is_hidden_and_called_elsewhere_too_is_no_pair():
    assert norm_pairs(Parts("none")).norms == {"conv": "bn", "part.conv": "part.bn"}
    assert norm_pairs(Parts("both", leak=True)).norms == {"conv": "bn"}
