"""Copies of networks that keep anything, and what is done with them."""

import collections
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from basis import BasisConv2d
from basis.copies import copy_of, shape_copy, without_hooks
from tests.unusual import Output


def keeping(put):
    """A convolution that keeps its last output, which autograd made."""
    conv = nn.Conv2d(3, 4, 3)
    conv.kept = put(conv(torch.randn(1, 3, 8, 8)))
    return conv


def with_weight(make):
    conv = nn.Conv2d(3, 4, 3)
    conv.weight = make(conv.weight.data)
    return conv


class Mine(nn.Parameter):
    pass


class Kind(torch.Tensor):
    pass


class Others(nn.Module):
    """It hides layers in a list."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = [nn.Conv2d(3, 4, 3)], nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layers[0](x) * self.scale


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    return model


MODELS = {
    "in a list": lambda: keeping(lambda y: [y]),
    "in a dict": lambda: keeping(lambda y: {"y": (y, {y})}),
    "in a dataclass": lambda: keeping(Output),
    "in a namespace": lambda: keeping(lambda y: SimpleNamespace(y=collections.deque([y]))),
    "itself": lambda: keeping(lambda y: y),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "old weight norm": lambda: weight_norm(nn.Conv2d(3, 4, 3)),
    "old spectral norm": lambda: spectral_norm(nn.Conv2d(3, 4, 3)),
    "tied": tied,
    "basis": lambda: BasisConv2d(3, 4, 3, ratio=0.5),
    "parameter of a kind": lambda: with_weight(Mine),
    "tensor of a kind": lambda: with_weight(lambda w: nn.Parameter(w.as_subclass(Kind))),
    "frozen": lambda: nn.Conv2d(3, 4, 3).requires_grad_(False),
    "scripted": lambda: nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3))),
    "others": Others,
}
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{name}") for name in ("weight_norm", "spectral_norm", "torch.jit")]


def about(model):
    return [(name, p.requires_grad, p.is_leaf, p.shape) for name, p in model.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("name", MODELS)
def test_whatever_is_copied_computes_the_same(name):
    model, x = MODELS[name]().eval(), torch.randn(2, 3, 8, 8)
    copied, shapes = copy_of(model), shape_copy(model)
    assert about(copied) == about(model)
    assert torch.equal(copied(x), model(x))
    assert not {id(t) for t in copied.parameters()} & {id(t) for t in model.parameters()}
    if name not in ("scripted", "others"):  # which keep values
        assert about(shapes) == about(model)
        assert all(tensor.is_meta for tensor in (*shapes.parameters(), *shapes.buffers()))
        assert shapes(x.to("meta")).shape == model(x).shape


def test_tied_parameters_stay_tied_and_lazy_ones_lazy():
    for copied in (copy_of(tied()), shape_copy(tied())):
        assert copied[1].weight is copied[0].weight
    lazy = copy_of(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()))
    assert lazy(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("name", ["tied", "pruned", "old weight norm", "old spectral norm"])
def test_hooks_of_a_copy_are_removed_from_it_alone_and_those_that_make_weights_stay(name):
    model, calls = MODELS[name]().double().eval(), []  # the weight becomes double as it is made anew
    for module in model.modules():
        module.register_forward_hook(lambda *args: calls.append("after"))
        module.register_forward_pre_hook(lambda *args: calls.append("before"))
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    y = without_hooks(copy_of(model))(x)
    assert not calls
    assert torch.equal(model(x), y)
    assert calls.count("after") == calls.count("before") == len(list(model.modules()))
