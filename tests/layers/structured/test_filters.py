"""Filter bases: by text, shared by layers, fixed; each against nn.Conv2d with a weight built here by its formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis import cost, count_parameters, count_trained, merge, models, plan_of, substitute
from basis.layers.conv import BasisConv2d
from basis.layers.structured import LAYERS, Structure
from basis.layers.structured.filters import DCFConv2d, FixedBasisConv2d, fourier_bessel
from basis.layers.structured.shared import DSFBConv2d, LFBConv2d

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "1x1, strided": {"kernel_size": 1, "stride": 2},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "reflect": {"padding_mode": "reflect", "padding": (1, 2), "stride": 2},
    "circular": {"padding_mode": "circular", "padding": (2, 1), "dilation": 2},
    "kernel (3, 5)": {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
}
# Structured layers, also the composed and the convolving way of each.
TEXTS = ("lfb:0.5", "lfb:2,4", "lfb:2.5", "dsfb:1/4,1/12", "basisconv:0.3", "basisconv:0.5", "dcf:3")
EVERY = ("basis:1/4", "basis:3", "linearconv", "linearconv:2", *TEXTS)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def possible(text, option):
    kernel = OPTIONS[option].get("kernel_size", 3)
    if kernel == 1 and text in ("dcf:3", "lfb:2,4", "lfb:2.5"):
        return False
    return not (text == "dcf:3" and isinstance(kernel, tuple))


def make(text, option="plain", **changes):
    """A float64 layer of 8 -> 12 channels; running statistics are not those of a new one."""
    kind, _, size = text.partition(":")
    layer = LAYERS[kind](8, 12, dtype=torch.float64, size=size, **({"kernel_size": 3} | OPTIONS[option] | changes))
    if isinstance(layer, DSFBConv2d):
        for numbers in (layer.norm.running_mean, layer.norm.weight, layer.norm.bias):
            nn.init.normal_(numbers)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer


def formula(layer):
    """Weight and bias of the layer, by the definition of its method."""
    mixing = None if isinstance(layer, DCFConv2d) else layer.mixing[:, :, 0, 0]
    if isinstance(layer, DCFConv2d):
        return torch.einsum("ockl,kij->ocij", layer.coefficients, layer.functions), layer.bias
    if isinstance(layer, DSFBConv2d):
        norm = layer.norm
        spread = (norm.running_var + norm.eps).sqrt()
        filters = torch.cat([layer.basis, layer.unique])
        bias = torch.einsum("om,m->o", mixing, norm.bias - norm.running_mean * norm.weight / spread)
        weight = torch.einsum("om,m,mcij->ocij", mixing, norm.weight / spread, filters)
        return weight, bias if layer.bias is None else bias + layer.bias
    groups = layer.in_channels // layer.basis.shape[1]
    parts = [
        torch.einsum("om,mcij->ocij", part, layer.basis) for part in mixing.split(len(layer.basis), dim=1)
    ]  # one for each group
    assert len(parts) == groups
    return torch.cat(parts, dim=1), layer.bias


@pytest.mark.parametrize("layout", ["batch", "unbatched", "channels_last"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_forward_and_backward_are_those_of_the_dense_convolution(option, text, layout):
    if not possible(text, option):
        return
    layer = make(text, option).eval()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    if layout == "channels_last":
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    x = (x[0] if layout == "unbatched" else x).requires_grad_()
    arguments = {"kernel_size": 3} | OPTIONS[option]
    conv = nn.Conv2d(8, 12, dtype=torch.float64, **arguments)
    if arguments.get("bias", True) is False and isinstance(layer, DSFBConv2d):
        conv = nn.Conv2d(8, 12, dtype=torch.float64, **arguments | {"bias": True})
    weight, bias = formula(layer)
    expected = torch.func.functional_call(conv, {"weight": weight} | ({} if bias is None else {"bias": bias}), x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.to_conv()(x), expected, rtol=0, atol=1e-10)

    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    dy = torch.randn_like(expected)
    ours = torch.autograd.grad(layer(x), [x, *trained.values()], dy)
    theirs = torch.autograd.grad(expected, [x, *trained.values()], dy)
    for name, mine, wanted in zip(["x", *trained], ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9, msg=name)
        assert mine.abs().sum() > 0, name


@pytest.mark.parametrize("text", TEXTS)
def test_macs_are_what_is_executed(text):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), make(text, padding=1, stride=2).float()).eval()
    total = cost(model, (8, 12, 12), batch_size=3).total
    x = torch.randn(3, 8, 12, 12)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * (total.forward_macs + total.building_macs)


@pytest.mark.parametrize("text", EVERY)
def test_bfloat16_autocast_and_compiled(text):
    kind, _, size = text.partition(":")
    layer = LAYERS[kind].shaped_like(nn.Conv2d(8, 12, 3, padding=1), size=size).eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


# -- what a text makes ------------------------------------------------------------------------------


def test_basis_and_linearconv_make_basis_convolutions():
    def made(text, conv):
        return Structure.parse(text).make([conv], fitted=True)[0]

    conv = nn.Conv2d(8, 12, 3)
    assert isinstance(made("basis:1/4", conv), BasisConv2d)
    layers = [made(text, conv) for text in ("basis:1/4", "basis:5", "linearconv", "linearconv:2")]
    assert [layer.basis_channels for layer in layers] == [3, 5, 6, 6]
    assert [layer.mode for layer in layers] == ["auto", "auto", "composed", "composed"]
    assert [str(layer.coefficients.form) for layer in layers] == ["dense", "dense", "dense", "low_rank:2"]
    expected = BasisConv2d.from_conv(conv, basis_channels=6)
    torch.testing.assert_close(layers[2].weight, expected.weight)
    assert made("basis:1/2", nn.Conv2d(8, 12, 3, groups=2)).basis_channels == 6


def test_linearconv_has_the_published_number_of_parameters():
    """ResNet-18 of Kahatapitiya and Rodrigo with all its convolutions, 6.03 M and with A of rank 10 5.64 M.

    The text refuses theirs where it saves nothing: the stem, and the shortcuts if A is dense.
    """
    with torch.device("meta"):
        model = models.resnet18()
    plan = {name: "linearconv" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    plan |= {name: c.out_channels // 2 for name, c in model.named_modules() if "shortcut.0" in name or name == "conv1"}
    assert count_parameters(substitute(model, plan, init="random")) == 6_029_546
    low_rank = dict.fromkeys(plan, "linearconv:10")
    assert count_parameters(substitute(model, low_rank, init="random")) == 5_642_346


def test_published_counts_of_learning_filter_basis():
    """ResNet-56 with (m, p) = (24, 16), (48, 32), (84, 64): about 195 k weights."""
    model = models.resnet56()
    plan = {}
    for name, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d) and name != "conv1":
            plan[name] = "lfb:84/64" if conv.in_channels == 64 else "lfb:1.5"
    new = substitute(model, plan, init="random")
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert count_parameters(new) - norms - 10 == 194_992
    assert count_parameters(new) == sum(p.numel() for p in new.parameters())
    # the first convolution of a stage has the basis of the stage before
    assert new.layer2[0].conv1.basis is new.layer1[0].conv1.basis
    assert len({id(m.basis) for m in new.modules() if isinstance(m, LFBConv2d)}) == 3
    assert new.layer3[3].conv2.basis.shape == (84, 64, 3, 3)


@pytest.mark.parametrize(("text", "numbers"), [("dsfb:1/2,1/16", 150_666), ("dsfb:1,1/16", 197_258)])
def test_published_counts_of_deeply_shared_filter_bases(text, numbers):
    """ResNet-32 S8U1 and S16U1, where the first block of every stage is ordinary."""
    model = models.resnet32()
    plan = {
        name: text
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and name != "conv1" and name.split(".")[1] != "0"
    }
    new = substitute(model, plan, init="random")
    assert count_parameters(new) == count_trained(new) == numbers
    assert len({id(m.basis) for m in new.modules() if isinstance(m, DSFBConv2d)}) == 3


def test_numbers_of_fixed_bases():
    layer = FixedBasisConv2d(16, 20, 3, bias=False, size="1/4")
    assert count_parameters(layer) == count_trained(layer) == layer.stored == 5 * 20
    layer.fit(torch.randn(20, 16, 3, 3))
    assert count_parameters(layer) == layer.stored == 5 * (20 + 16 * 9)
    assert count_trained(layer) == 5 * 20
    layer = DCFConv2d(16, 20, 3, bias=False, size="4")
    assert count_parameters(layer) == count_trained(layer) == layer.stored == 16 * 20 * 4


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("basis", (8, 12, 3), "takes a size"),
        ("basis:0", (8, 12, 3), "whole number of at least 1"),
        ("basis:1.5", (8, 12, 3), r"must lie in \(0, 1\]"),
        ("basis:a", (8, 12, 3), "must be a number"),
        ("basis:12", (8, 12, 3), "would store 864 numbers, and the dense weight has 864: nothing to save"),
        ("basis:1", (8, 1, 3), "nothing to save"),
        ("basis:14", (8, 12, 3), "must lie between 1 and out_channels"),
        ("linearconv", (8, 13, 3), "odd number"),
        ("linearconv:0", (8, 12, 3), "whole number of at least 1"),
        ("linearconv:7", (8, 12, 3), "no rank is above 6"),
        ("lfb", (8, 12, 3), "takes a size"),
        ("lfb:-1", (8, 12, 3), "must be above 0"),
        ("lfb:1,0", (8, 12, 3), "number of groups"),
        ("lfb:1,1,1", (8, 12, 3), "number of groups"),
        ("lfb:1,3", (8, 12, 3), "3 groups, but it has 8 channels"),
        ("lfb:9", (8, 12, 3), "nothing to save"),
        ("lfb:1.5", (8, 12, 1), "nothing to save"),
        ("dsfb:1", (8, 12, 3), "takes two"),
        ("dsfb:1,x", (8, 12, 3), "u in dsfb:1,x is 'x'"),
        ("basisconv:2", (8, 12, 3), "fraction"),
        ("basisconv:1", (8, 12, 1), "nothing to save"),
        ("dcf:9", (8, 12, 3), "a 3x3 kernel has 8"),
        ("dcf:0.5", (8, 12, 3), "whole number"),
        ("dcf:3", (8, 12, 1), "needs a kernel larger than 1x1"),
        ("dcf:3", (8, 12, (3, 5)), "square kernel"),
    ],
)
def test_settings_that_make_no_sense(text, shape, message):
    with pytest.raises(ValueError, match=message):
        Structure.parse(text).check(nn.Conv2d(*shape))


def test_groups_of_the_convolution_are_refused_but_by_basis_convolutions():
    conv = nn.Conv2d(8, 12, 3, groups=2)
    refusing = {text for text in EVERY if "grouped" in (Structure.parse(text).obstacle(conv) or "")}
    assert refusing == set(TEXTS)


def test_a_basis_is_worth_it_only_where_it_is_shared():
    conv = nn.Conv2d(16, 16, 3)
    with pytest.raises(ValueError, match=r"whose basis 1 layer would share, would store 3,840 .* 2,304: nothing"):
        substitute(conv, {"": "lfb:1.5"}, init="random")
    three = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3)))
    assert count_parameters(substitute(three, layer="lfb:1.5", init="random")) == 3456 + 3 * (24 * 16 + 16)


def test_fitted_filters_have_to_be_stored():
    layer = FixedBasisConv2d(8, 12, 3, size="0.9")
    with pytest.raises(ValueError, match=r"with fitted filters, would store 924 .* 864"):
        layer.fit(torch.randn(12, 8, 3, 3))


# -- fits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_of_the_form_is_found_again(text):
    conv = make(text).eval().to_conv()
    structure = Structure.parse(text)
    if text != "lfb:2.5":
        again = structure.make([conv], fitted=True)[0].eval()
    else:  # worth it only where it shares
        again = LFBConv2d.from_conv(conv, size="2.5")
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(again(x), conv(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("text", ["lfb:0.5", "lfb:1,2", "dsfb:1/3,1/12", "basisconv:0.3", "dcf:3"])
def test_no_step_downhill_is_left_by_the_fit(text):
    """The gradient of the squared error is zero."""
    conv = nn.Conv2d(8, 12, 3, dtype=torch.float64)
    layer = Structure.parse(text).make([conv], fitted=True)[0]
    layer.basis.requires_grad_(True) if hasattr(layer, "basis") else None
    (layer.weight - conv.weight.detach()).square().sum().backward()
    for name in layer.parts:
        assert getattr(layer, name).grad.abs().max() < 1e-9, name


@pytest.mark.parametrize("text", ["lfb:0.5,2", "dsfb:1/3,1/12"])
def test_a_shared_basis_is_fitted_to_all_layers(text):
    kind, _, size = text.partition(":")
    convs = [nn.Conv2d(8, 12, 3, dtype=torch.float64) for _ in range(4)]

    def error(layers):
        pairs = zip(layers, convs, strict=True)
        return sum((layer.weight - conv.weight).detach().square().sum().item() for layer, conv in pairs)

    joint = LAYERS[kind].together(convs, size=size, fitted=True)
    assert all(layer.basis is joint[0].basis for layer in joint)
    assert all(torch.equal(layer.bias, conv.bias) for layer, conv in zip(joint, convs, strict=True))
    apart = [LAYERS[kind].from_conv(conv, size=size) for conv in convs]
    of_the_first = copy.deepcopy(apart)
    for layer, conv in zip(of_the_first, convs, strict=True):
        with torch.no_grad():
            layer.basis.copy_(apart[0].basis)
            layer._fit_rest(conv.weight.reshape(-1, layer.basis[0].numel()))
    assert error(apart) < error(joint) < error(of_the_first)


def test_too_few_rows_leave_drawn_filters():
    """24 filters for 4 rows: the fit is exact, and every filter can still learn."""
    conv = nn.Conv2d(8, 4, 5, dtype=torch.float64)
    layer = LFBConv2d.from_conv(conv, size="3")
    torch.testing.assert_close(layer.weight, conv.weight, rtol=0, atol=1e-12)
    assert (layer.basis.flatten(1).norm(dim=1) > 0.1).all()


# -- drawing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lfb:1.5,2", "basisconv:0.3", "dcf:4"])
def test_drawn_layers_keep_the_size_of_activations(text):
    kind, _, size = text.partition(":")
    layer = LAYERS[kind](64, 64, 3, padding=1, bias=False, size=size)
    variance = layer(torch.randn(8, 64, 12, 12)).var()
    assert 0.5 < variance < 3


def test_fixed_filters_are_orthonormal_and_come_from_the_seed():
    torch.manual_seed(3)
    layer = FixedBasisConv2d(8, 12, 3, dtype=torch.float64, size="0.5")
    rows = layer.basis.flatten(1)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(6, dtype=torch.float64))
    torch.manual_seed(3)
    assert torch.equal(FixedBasisConv2d(8, 12, 3, size="0.5").basis, layer.basis.float())
    assert not torch.equal(FixedBasisConv2d(8, 12, 3, size="0.5").basis, layer.basis.float())
    assert layer.factors == [layer.mixing]


@pytest.mark.parametrize("fitted", [False, True])
def test_fixed_filters_survive_a_state_dict_with_where_they_come_from(fitted):
    layer = FixedBasisConv2d(8, 12, 3, size="0.5")
    if fitted:
        layer.fit(torch.randn(12, 8, 3, 3))
    other = FixedBasisConv2d(8, 12, 3, size="0.5")
    for copied in (other, copy.deepcopy(layer)):
        copied.load_state_dict(layer.state_dict())
        assert torch.equal(copied.basis, layer.basis)
        assert copied.stored == layer.stored == (6 * (12 + 72) if fitted else 6 * 12)


def test_orthogonality():
    layer = DSFBConv2d(8, 8, 3, size="1/2,1/4", dtype=torch.float64)
    nn.init.zeros_(layer.unique)
    assert layer.penalty().item() == pytest.approx(2 / 36)  # two zero rows in a 6 x 6 matrix
    layer.penalty().backward()
    nn.init.ones_(layer.unique)
    loss = layer.penalty()
    loss.backward()
    assert loss > 10
    assert layer.basis.grad.abs().sum() > 0
    assert layer.unique.grad.abs().sum() > 0
    fitted = DSFBConv2d.from_conv(nn.Conv2d(8, 8, 3, dtype=torch.float64), size="1/2,1/4")
    assert fitted.penalty().item() == pytest.approx(0, abs=1e-20)


def test_fourier_bessel_functions():
    three = torch.from_numpy(fourier_bessel(3))
    assert len(three) == 8
    assert torch.linalg.matrix_rank(three.flatten(1)) == 8
    lowest = three[0]  # J_0: the same in all directions, falling from the middle
    assert lowest[1, 1] > lowest[0, 1] > lowest[0, 0] > 0
    torch.testing.assert_close(lowest, lowest.rot90())
    torch.testing.assert_close(three[1].rot90().abs(), three[2].abs())  # cosine and sine of the same wave
    torch.testing.assert_close(three[1], -three[1].flip(1))
    for size in (2, 5, 7):
        functions = torch.from_numpy(fourier_bessel(size)).flatten(1)
        assert torch.linalg.matrix_rank(functions) == len(functions) < size * size
    layer = DCFConv2d(4, 4, 5, size="6", dtype=torch.float64)
    assert layer.functions.square().sum() == pytest.approx(6)


# -- whole networks ---------------------------------------------------------------------------------

# Sizes that suit every layer of a thin ResNet-20.
NETWORKS = ("basis:1/4", "linearconv", "linearconv:2", "lfb:1,2", "lfb:1.5", "dsfb:1/2,1/4", "basisconv:0.4", "dcf:4")


def network(text, **options):
    """A thin ResNet-20 all of whose 3x3 convolutions but the first are of the layer, after one step of training."""
    dense = models.resnet20(width=8)
    new = substitute(dense, layer=text, exclude="conv1", **options)
    assert sum(module.__class__ is nn.Conv2d for module in new.modules()) == 1
    new.train()(torch.randn(4, 3, 12, 12)).square().sum().backward()
    return new


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("text", NETWORKS)
def test_networks_merge_train_and_keep_what_they_share(text, init):
    model = network(text, init=init)
    x = torch.randn(2, 3, 12, 12)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad and not name.endswith("conv1.bias"):
            assert parameter.grad.abs().sum() > 0, name
    model.eval()
    dense = merge(model)
    assert all(type(m) is nn.Conv2d for n, m in dense.named_modules() if n.endswith(("conv1", "conv2")))
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)

    def sharing(net):
        return [sorted(n for n, p in net.named_parameters(remove_duplicate=False) if p is q) for q in net.parameters()]

    copied = copy.deepcopy(model)
    assert sharing(copied) == sharing(model)
    other = network(text, init="random").eval()
    assert sharing(other) == sharing(model)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(copied(x), model(x))
    assert count_parameters(model) < count_parameters(models.resnet20(width=8))
    shares = any(len(names) > 1 for names in sharing(model))
    assert shares == text.startswith(("lfb", "dsfb"))
    if not text.startswith(("basis:", "linearconv")):
        assert set(plan_of(model).layers.values()) == {text}


@pytest.mark.parametrize("text", ["lfb:1,2", "dsfb:1/2,1/4"])
def test_layers_that_do_not_train_share_nothing_with_those_that_do(text):
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(4)))
    model[3].requires_grad_(False)
    model.eval()
    new = substitute(model, layer=text)
    assert new[0].basis is new[1].basis is new[2].basis is not new[3].basis
    assert not any(p.requires_grad for p in new[3].parameters())
    assert not any(module.training for module in new.modules())


def test_merged_bias_of_a_convolution_with_normalisation_inside():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=True), nn.Conv2d(8, 8, 3, bias=False))
    new = substitute(model, layer="dsfb:1/4,1/8")
    for layer in new:
        nn.init.normal_(layer.norm.running_mean)
    x = torch.randn(2, 8, 9, 9)
    new.eval()
    torch.testing.assert_close(merge(new)(x), new(x), rtol=1e-4, atol=1e-5)
    assert new[1].bias is None
    assert merge(new)[1].bias.requires_grad


def test_training_normalises_with_the_batch():
    """The maps that are mixed have the statistics that nn.BatchNorm2d gives them."""
    layer = make("dsfb:1/4,1/12", padding=1).train()
    x = torch.randn(4, 8, 9, 7, dtype=torch.float64)
    maps = F.conv2d(x, torch.cat([layer.basis, layer.unique]), padding=1)
    maps = (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    maps = maps * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    torch.testing.assert_close(layer(x), F.conv2d(maps, layer.mixing, layer.bias), rtol=0, atol=1e-10)
