"""Structured layers in networks: published counts, costs by hand, and bases that layers share."""

import copy

import pytest
import torch
from torch import nn

from basis import cost, count_parameters, merge, models, plan_of, substitute
from basis.costs import Cost
from basis.experiments.studies.published import GRAY
from basis.experiments.studies.substitutes import BLOCKS
from basis.layers.structured.filters import LFBConv2d
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


def test_published_counts_of_a_learned_basis():
    """ResNet-56 with (m, p) = (24, 16), (48, 32), (84, 64)."""
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


def test_a_shared_basis_is_fitted_to_all_layers():
    convs = [nn.Conv2d(8, 12, 3, dtype=torch.float64) for _ in range(4)]

    def total(layers):
        return sum(float((a.weight - b.weight).detach().square().sum()) for a, b in zip(layers, convs, strict=True))

    joint = LFBConv2d.together(convs, size="0.5,2", fitted=True)
    assert all(torch.equal(layer.bias, conv.bias) for layer, conv in zip(joint, convs, strict=True))
    apart = [LFBConv2d.together([conv], size="0.5,2", fitted=True)[0] for conv in convs]
    of_the_first = copy.deepcopy(apart)
    for layer, conv in zip(of_the_first, convs, strict=True):
        with torch.no_grad():
            layer.basis.copy_(apart[0].basis)
            layer._fit_mixing(conv.weight.reshape(-1, layer.basis[0].numel()))
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


@pytest.mark.parametrize("text", ["basis:1/4", *TEXTS])
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
            "lfb:" in text
        )
        if ":" in text and text != "basis:1/4":
            assert set(plan_of(new).layers.values()) == {text}
