"""Structured layers in networks: published counts, costs by hand, and bases that layers share."""

import copy

import pytest
import torch
from torch import nn

from basis import cost, count_parameters, count_trained, merge, models, plan_of, substitute
from basis.costs import Cost
from basis.experiments.studies.published import GRAY
from basis.experiments.studies.substitutes import BLOCKS
from basis.layers.structured import LAYERS
from basis.layers.structured.filters import FilterBasis
from basis.models import build
from basis.substitution import Plan
from tests.layers.structured.gray import mult_adds
from tests.layers.structured.kinds import TEXTS, conv_of


def convolutions(count=4, **options):
    torch.manual_seed(0)
    return nn.Sequential(*(conv_of(8, 8, dtype=torch.float32, **options) for _ in range(count))).eval()


@pytest.mark.parametrize("row", GRAY, ids=lambda row: row.setting)
def test_parameters_and_mult_adds_are_those_of_gray_et_al(row):
    with torch.device("meta"):
        wide = build("wrn-28-10")
    model = substitute(wide, layer=row.layer, include=BLOCKS, init="random") if row.layer else wide
    assert count_parameters(model) == row.parameters
    assert f"{mult_adds(model, (3, 32, 32)):.3e}" == f"{row.mult_adds:.3e}"


def test_mult_adds_of_a_tied_layer_repeat_the_channels():
    layer = substitute(conv_of(16, 32, padding=1), {"": "tied:1/4"})
    assert mult_adds(layer, (16, 4, 4)) == 16 * (16 * 9 + 2 * 32 * 8)


def test_published_counts_of_linearconv():
    """ResNet-18 with all its convolutions: 6.03 M, and with A of rank 10 5.64 M."""
    with torch.device("meta"):
        model = models.build("resnet18")
    plan = {name: "linearconv" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plan |= {name: c.out_channels // 2 for name, c in model.named_modules() if "shortcut.0" in name or name == "conv1"}
    assert count_parameters(substitute(model, plan, init="random")) == 6_029_546
    assert count_parameters(substitute(model, dict.fromkeys(plan, "linearconv:10"), init="random")) == 5_642_346


def test_published_counts_of_shared_bases():
    """ResNet-56 with (m, p) = (24, 16), (48, 32), (84, 64); ResNet-32 S8U1 and S16U1."""
    model = models.build("resnet56")
    plan = {
        name: "lfb:84/64" if conv.in_channels == 64 else "lfb:1.5"
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d) and name != "conv1"
    }
    new = substitute(model, plan, init="random")
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert count_parameters(new) - norms - 10 == 194_992
    assert new.layer2[0].conv1.basis is new.layer1[0].conv1.basis
    model = models.build("resnet32")
    for text, numbers in (("dsfb:1/2,1/16", 150_666), ("dsfb:1,1/16", 197_258)):
        plan = {name: text for name, m in model.named_modules() if ".conv" in name and name.split(".")[1] != "0"}
        new = substitute(model, plan, init="random")
        assert count_parameters(new) == count_trained(new) == numbers
        assert len({id(m.basis) for m in new.modules() if isinstance(m, FilterBasis)}) == 3


def test_generic_by_hand_and_frozen_layers():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1))
    report = cost(substitute(model, {"2": "generic:0.25"}), (8, 12, 12), batch_size=2)
    n, macs = 2 * 6 * 6, 16 * 9 + 16 * 8 + 8 * 32
    kept = 2 * 16 * 12 * 12 + n * (16 + 8)  # its input, and those of both pointwise products
    assert report.layers[1].cost == Cost(macs + 32, n * macs, n * macs, n * macs, 0, 0, 4 * kept)
    assert report.dense == cost(model, (8, 12, 12), batch_size=2).total
    network = substitute(model, layer="sep")
    network[2].requires_grad_(False)
    first, second = (row.cost for row in cost(network, (8, 12, 12)).layers)
    assert (second.input_gradient_macs, second.weight_gradient_macs) == (36 * (16 * 9 + 16 * 32), 0)
    assert first.input_gradient_macs == 144 * 8 * 16  # of the map alone: it follows the trained depthwise filters


@pytest.mark.parametrize("text", ["lfb:0.5,2", "dsfb:1/3,1/12"])
def test_a_shared_basis_is_fitted_to_all_layers(text):
    kind, _, size = text.partition(":")
    convs = [nn.Conv2d(8, 12, 3, dtype=torch.float64) for _ in range(4)]

    def total(layers):
        return sum(float((a.weight - b.weight).detach().square().sum()) for a, b in zip(layers, convs, strict=True))

    joint = LAYERS[kind].together(convs, size=size, fitted=True)
    assert all(torch.equal(layer.bias, conv.bias) for layer, conv in zip(joint, convs, strict=True))
    apart = [LAYERS[kind].together([conv], size=size, fitted=True)[0] for conv in convs]
    of_the_first = copy.deepcopy(apart)
    for layer, conv in zip(of_the_first, convs, strict=True):
        with torch.no_grad():
            layer.basis.copy_(apart[0].basis)
            layer._fit_rest(conv.weight.reshape(-1, layer.basis[0].numel()))
    assert total(apart) < total(joint) < total(of_the_first)


def test_a_basis_is_worth_it_only_where_it_is_shared():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3)), nn.Conv2d(8, 8, 3))
    plan = Plan.uniform(model, layer="lfb:1.5")
    assert list(plan.layers) == ["0", "1", "2"]
    assert "nothing to save" in plan.skipped["3"]
    with pytest.raises(ValueError, match="whose basis 1 layer would share"):
        substitute(model, {"3": "lfb:1.5"})
    new = substitute(model, {"0": "lfb:1/2", "1": " lfb: 1/2", "2": "lfb:1/2 "}, init="random")  # spaces
    assert new[0].basis is new[1].basis is new[2].basis
    assert set(plan_of(new).layers.values()) == {"lfb:1/2"}


def test_layers_that_do_not_train_share_nothing_with_those_that_do():
    model = convolutions()
    model[3].requires_grad_(False)
    new = substitute(model, layer="lfb:1,2")
    assert new[0].basis is new[1].basis is new[2].basis is not new[3].basis
    assert not any(p.requires_grad for p in new[3].parameters())


def test_a_bias_is_merged_with_a_normalisation_but_one_tied_elsewhere_stays():
    model = convolutions()
    model[1].bias = model[2].bias = model[0].bias
    model[3].bias = None
    new = substitute(model, {name: "dsfb:1/4,1/8" for name in "013"}).eval()
    for name in (0, 1, 3):
        nn.init.normal_(new[name].norm.running_mean)
    x, dense = torch.randn(2, 8, 11, 11), merge(new)
    torch.testing.assert_close(dense(x), new(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(dense[2].bias, model[2].bias)
    assert new[3].bias is None
    assert dense[3].bias.requires_grad


@pytest.mark.parametrize("text", ["basis:1/4", "linearconv", *TEXTS])
def test_networks_train_merge_and_keep_what_they_share(text, monkeypatch):
    for init in ["svd", "random"]:
        monkeypatch.setattr("basis.layers.structured.layer.FIT_STEPS", 5)
        new, x = substitute(convolutions(padding=1), layer=text, init=init).train(), torch.randn(2, 8, 9, 9)
        new(x).square().sum().backward()
        for name, parameter in new.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        assert all(type(layer) is nn.Conv2d for layer in merge(new))
        torch.testing.assert_close(merge(new.eval())(x), new(x), rtol=1e-4, atol=1e-5)
        copied, other = copy.deepcopy(new), substitute(convolutions(padding=1), layer=text, init="random").eval()
        other.load_state_dict(new.state_dict())
        for same in (copied, other):
            torch.testing.assert_close(same(x), new(x))
            assert len(list(same.parameters())) == len(list(new.parameters()))
        assert (len(list(new.parameters())) < len(list(new.named_parameters(remove_duplicate=False)))) == (
            "fb:" in text
        )
        if ":" in text and text != "basis:1/4":
            assert set(plan_of(new).layers.values()) == {text}
