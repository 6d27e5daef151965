"""What holds for every structured layer: sizes that are none, states, copies, memory formats, sharing."""

import copy
import pickle

import pytest
import torch
from torch import nn

from basis import cost, merge, plan_of, substitute
from basis.layers.structured import LAYERS, Structure
from basis.substitution import Plan

TEXTS = (
    "sep", "generic:0.25", "tied:1/4", "sep_hashed:0.2", "hashed:0.2", "tensor_train:0.4", "tucker:0.5", "shuffle:2",
    "acdc:3", "tridiagonal:1,2", "lfb:0.5", "lfb:1,2", "dsfb:1/4,1/8", "basisconv:0.4", "dcf:3", "debut:0.4",
    "pemn:1/3", "dsf:0.6",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(text, conv, *, fitted=False):
    return Structure.parse(text).make([conv], fitted=fitted)[0].eval()


def test_every_kind_is_tested_here():
    assert {text.partition(":")[0] for text in TEXTS} == set(LAYERS) - {"basis", "linearconv"}


# -- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acdc:99999999999999999999", "at least 1 and at most 1,000,000"),
        ("shuffle:" + "9" * 5000, "at least 1 and at most 1,000,000"),
        ("lfb:1e30", "s in lfb:1e30 is 1e30, but it must be above 0 and at most 1,000,000"),
        ("lfb:1e400", "at most 1,000,000"),
        ("dsfb:1/4,1e30", "u in dsfb:1/4,1e30 is 1e30, but it must be above 0 and at most 1,000,000"),
        ("tucker:1e999999999", "must be a number such as 0.25"),
        ("dsfb:1", "dsfb:1 has not two numbers, but dsfb takes two"),
        ("dsfb:1,2,3", "dsfb:1,2,3 has not two numbers, but dsfb takes two"),
    ],
)
def test_sizes_that_are_none(text, message):
    assert message in Structure.parse(text).obstacle(nn.Conv2d(16, 16, 3))


def test_spaces_around_a_size_make_no_difference():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    new = substitute(model, {"0": "lfb:1/2", "1": " lfb: 1/2", "2": "lfb:1/2 "}, init="random")
    assert new[0].basis is new[1].basis is new[2].basis
    assert set(plan_of(new).layers.values()) == {"lfb:1/2"}


# -- states and copies --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_states_by_every_way_that_torch_has(text, kernel):
    conv = nn.Conv2d(8, 16, kernel, padding=1)
    if not Plan.uniform(conv, layer=text).layers:
        return
    layer, x = make(text, conv), torch.randn(2, 8, 5, 6)
    torch.manual_seed(9)
    fresh, empty = make(text, conv), copy.deepcopy(layer).to("meta").to_empty(device="cpu").eval()
    assigned = copy.deepcopy(layer).to("meta")
    for other in (fresh, empty):
        other.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    pickled = pickle.loads(pickle.dumps(layer))
    for other in (fresh, empty, assigned, pickled):
        assert torch.equal(other(x), layer(x))
    empty.reset_parameters()
    torch.testing.assert_close(empty(x), empty.to_conv()(x), rtol=1e-4, atol=1e-5)


# -- fits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_fitted_to_zeros_can_still_learn(text, kernel):
    """Such as the last convolution of a residual block that starts as the identity."""
    conv = nn.Conv2d(16, 16, kernel, bias=False)
    nn.init.zeros_(conv.weight)
    if not Plan.uniform(conv, layer=text).layers:
        return
    layer = make(text, conv, fitted=True)
    layer(torch.randn(2, 16, 6, 6)).sub(1).square().sum().backward()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert any(p.grad.abs().sum() > 0 for p in layer.parts.values() if p.requires_grad)


# -- memory format ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "hashed:0.2"])  # whose table has no format
def test_channels_last_stays_and_comes_back(text):
    conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last)
    layer, x = make(text, conv), torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    later = make(text, nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last)
    for one in (layer, copy.deepcopy(layer), later):
        assert one.to_conv().weight.is_contiguous(memory_format=torch.channels_last)
    assert make(text, nn.Conv2d(8, 16, 3)).to_conv().weight.is_contiguous()


# -- models -------------------------------------------------------------------------------------------


def test_a_layer_that_does_not_save_even_with_others_is_skipped_with_the_reason():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3)), nn.Conv2d(8, 8, 3))
    plan = Plan.uniform(model, layer="lfb:1.5")
    assert list(plan.layers) == ["0", "1", "2"]
    assert "whose basis 1 layer would share, would store" in plan.skipped["3"]
    assert plan_of(substitute(model, layer="lfb:1.5")).layers == plan.layers
    with pytest.raises(ValueError, match=r"3: lfb:1\.5, whose basis 1 layer would share"):
        substitute(model, {"3": "lfb:1.5"})


def test_a_bias_tied_elsewhere_is_not_changed_by_merging_a_normalisation():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    model[1].bias = model[2].bias = model[0].bias
    new = substitute(model, {"0": "dsfb:1/4,1/8", "1": "dsfb:1/4,1/8"}).eval()
    for layer in new[:2]:
        nn.init.normal_(layer.norm.running_mean)
    x = torch.randn(2, 8, 9, 9)
    dense = merge(new)
    torch.testing.assert_close(dense(x), new(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(dense[2].bias, model[2].bias)


# -- counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_kept_for_the_backward_pass_is_counted(text, kernel):
    """But for weights that are built, which are small here."""
    layer, x = nn.Conv2d(16, 32, kernel, padding=kernel // 2), torch.randn(4, 16, 32, 32).requires_grad_()
    if not Plan.uniform(layer, layer=text).layers:
        return
    layer = make(text, layer)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    _, *counted = cost(nn.Sequential(nn.Conv2d(16, 16, 1), layer), (16, 32, 32), batch_size=4).layers
    assert sum(one.cost.activation_bytes for one in counted) == pytest.approx(sum(kept.values()), rel=0.25)


@pytest.mark.parametrize("options", [{"mode": "composed"}, {"coefficients": "frozen"}])
def test_options_of_basis_channels_are_refused_where_every_layer_is_another(options):
    with pytest.raises(ValueError, match="mode and coefficients are for basis channels k"):
        substitute(nn.Sequential(nn.Conv2d(16, 16, 3)), layer="generic:0.5", init="random", **options)
