"""Folding, the choice of the form, and export: always against the model itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from basis import BasisConv2d, substitute
from basis.bench.timing import Setting
from basis.inference import fold, measure_fold
from basis.inputs import tensors_in
from basis.layers.batchnorm import couple
from basis.models import build
from basis.modules import is_channels_last
from basis.substitution import plan_of
from tests.unusual import Free, Output, changing, in_bfloat16, of_any_kind, of_two, plain

FORMS = ("dense", "low_rank:2", "grouped:2", "sparse:2", "frozen", "repeat")


class Mobile(nn.Module):
    """The layers of torchvision's MobileNet, ResNeXt and of older networks: depthwise, grouped, with biases."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False), nn.BatchNorm2d(8))
        self.grouped = nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16, affine=False, eps=1e-3)
        self.head = nn.Sequential(nn.Conv2d(16, 12, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classify = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x):
        x = F.relu(self.depthwise(self.stem(x)))
        return self.classify(self.head(F.relu(self.norm(self.grouped(x)))))


def trained(model):
    """``model`` with batch normalisations as after some training, in evaluation mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def network(name):
    """A substituted network in evaluation mode."""
    torch.manual_seed(0)
    widths = {"resnet18": 8, "resnet20": 4, "resnet50": 4}
    dense = build(name, width=widths[name]) if name in widths else Mobile()
    return substitute(trained(dense), ratio=0.5)


def shape(model, form):
    """``model`` itself, or as it is folded."""
    if form == "unfolded":
        return model
    return fold(model, factorized=plan_of(model).layers if form == "pairs" else ())


def difference(got, expected):
    """The largest difference relative to the largest magnitude."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


def layer_and_norm(*args, norm=True, affine=True, ratio=0.5, coefficients="dense", **options):
    torch.manual_seed(0)
    conv = nn.Conv2d(*args, dtype=torch.float64, **options)
    layer = BasisConv2d.from_conv(conv, ratio=ratio, coefficients=coefficients)
    parts = [layer] + [nn.BatchNorm2d(conv.out_channels, affine=affine, dtype=torch.float64)] * norm
    return trained(nn.Sequential(*parts))


# -- folding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factorized", [(), ("0",)], ids=["dense", "pair"])
@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((6, 8, 3), {"norm": False}), ((6, 8, 3), {"bias": False}), ((6, 8, 3), {"affine": False}),
        ((6, 8, (3, 5)), {"stride": (2, 1), "padding": (0, 2)}), ((6, 8, (2, 3)), {"dilation": 2, "padding": "same"}),
        ((6, 8, 3), {"padding": (1, 2), "padding_mode": "circular"}), ((6, 8, 3), {"groups": 2, "padding": 1}),
        ((8, 16, 3), {"groups": 2, "coefficients": "grouped:2"}),
        ((6, 16, 3), {"groups": 2, "coefficients": "low_rank:1"}),
        *(((6, 8, 3), {"coefficients": form}) for form in FORMS[3:]),
    ],
)  # fmt: skip
def test_a_folded_layer_computes_the_same(args, options, factorized):
    model = layer_and_norm(*args, **options)
    torch.manual_seed(2)
    x, folded = torch.randn(2, args[0], 9, 8, dtype=torch.float64), fold(model, factorized=factorized)
    assert difference(folded(x), model(x)) < 1e-12
    first = folded[0]
    convs = list(first) if factorized else [first]
    assert [type(conv) for conv in convs] == [nn.Conv2d] * (1 + len(factorized))
    assert (convs[-1].bias is not None) == (options.get("norm", True) or options.get("bias", True))


@pytest.mark.parametrize("form", ["dense", "pairs"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobile", "coupled"])
def test_a_folded_network_is_plain_and_computes_the_same(name, form):
    model = (couple(network("resnet20")) if name == "coupled" else network(name)).double()
    folded = shape(model, form)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert difference(folded(x), model(x)) < 1e-12
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {BasisConv2d, nn.BatchNorm2d}
    assert not any(kind.__module__.startswith("basis.co") for kind in kinds)  # no layer, no coefficients
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_the_model_given_is_left_alone():
    model = couple(network("resnet20")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    fold(model)
    assert model.training
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("factorized", [(), ("0",)], ids=["dense", "pair"])
def test_dtype_and_memory_format_are_kept(factorized):
    model = layer_and_norm(6, 8, 3).bfloat16().to(memory_format=torch.channels_last)
    first = fold(model, factorized=factorized)[0]
    conv = first[0] if factorized else first
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert is_channels_last(conv.weight)


def test_a_shared_layer_stays_one_and_keeps_its_norm():
    conv = BasisConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1), ratio=0.5)
    model = trained(nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))).double()
    folded = fold(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert folded[0] is folded[2]
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert difference(folded(x), model(x).detach()) < 1e-12


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnForward(BasisConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Branch(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda module, args, output: output.clamp(min=0))
    return conv


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        lambda: (hooked(), nn.BatchNorm2d(4)),
        lambda: (prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5), nn.BatchNorm2d(4)),
        lambda: (Scaled(4, 4, 3), nn.BatchNorm2d(4)),
        lambda: (OwnForward(4, 4, 3, ratio=0.5), nn.BatchNorm2d(4)),
        lambda: (Branch(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),),
    ],
)
def test_what_cannot_be_folded_stays(make):
    torch.manual_seed(0)
    model = trained(nn.Sequential(*make(), nn.Conv2d(4, 6, 3))).double()
    model[-1] = BasisConv2d.from_conv(model[-1], ratio=0.5)
    folded = fold(model)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert difference(folded(x), model(x)) < 1e-12
    assert type(folded[-1]) is nn.Conv2d
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 1


def test_names_that_are_no_basis_convolutions_are_refused():
    model = network("resnet20")
    for name in ("layer9", "bn1"):
        with pytest.raises(ValueError, match=f"factorized has '{name}'.*conv1, "):
            fold(model, factorized=[name])
    with pytest.raises(ValueError, match="meta device"):
        fold(model.to("meta"))
    with pytest.raises(ValueError, match="lazy"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)))


def free(way, norm=nn.BatchNorm2d):
    return trained(Free(way, BasisConv2d(3, 8, 3, basis_channels=2, bias=False), norm))


class Doubled(nn.BatchNorm2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Always(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize(
    ("way", "norm", "form", "folded"),
    [
        (plain, nn.BatchNorm2d, nn.Sequential, True),
        (in_bfloat16, nn.BatchNorm2d, nn.Sequential, True),
        (changing, nn.BatchNorm2d, nn.Sequential, True),
        (lambda m, x: Output(m.bn(m.conv(x))), nn.BatchNorm2d, nn.Sequential, True),
        (of_any_kind, nn.BatchNorm2d, nn.Sequential, False),
        (lambda m, x: m.bn(m.conv(x)).to(m.conv.weight.dtype), nn.BatchNorm2d, nn.Conv2d, False),
        (plain, Always, nn.Sequential, False),
    ],
)
def test_what_a_network_does_is_heeded(way, norm, form, folded, recwarn):
    model, x = free(way, norm), torch.randn(4, 3, 8, 8)
    result = fold(model, factorized=["conv"])
    assert type(result.conv) is form
    assert isinstance(result.bn, nn.Identity if folded else norm)
    assert not recwarn.list
    for got, expected in zip(tensors_in(result(x.clone())), tensors_in(model(x.clone())), strict=True):
        assert difference(got, expected) < (0.05 if way is in_bfloat16 else 1e-5)


@pytest.mark.parametrize("inputs", [None, torch.zeros(1, 3, 8, 8), torch.randn(1, 3, 8, 8)])
def test_a_result_that_differs_is_not_believed(inputs):
    model, x = free(plain, Doubled), torch.randn(1, 3, 8, 8)
    model.bn.running_mean.zero_()
    model.bn.bias.data.zero_()  # so that zeros would show no difference
    with pytest.warns(UserWarning, match="normalisation stays.* does not give what the model gives"):
        result = fold(model, inputs=inputs)
    assert isinstance(result.bn, Doubled)
    assert difference(result(x), model(x)) < 1e-5


def test_inputs_of_any_number():
    model, inputs = free(of_two), (torch.randn(1, 3, 8, 8), torch.tensor(2.0))
    with pytest.warns(UserWarning, match=r"normalisation stays.*inputs="):
        assert isinstance(fold(model, factorized=["conv"]).conv, nn.Conv2d)
    assert isinstance(fold(model, inputs=inputs).bn, nn.Identity)
    with pytest.raises(ValueError, match=r"cannot be run.*inputs="):
        fold(model, inputs=inputs[0])


@pytest.mark.parametrize("model", [nn.BatchNorm2d(3), nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 50)])
def test_where_there_is_nothing_to_fold_nothing_is_said(model, recwarn):
    assert type(fold(model)) is type(model)
    assert not recwarn.list


@pytest.mark.parametrize("layer", ["dense", "basis", "pair", "tucker:0.3"])
def test_attributes_are_kept(layer):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, eps=1e-3))
    if layer != "dense":
        model = substitute(model, {"0": layer if ":" in layer else 8})
    model[0].tag, model[0]._scale, model[1].tag = "stem", 0.5, "norm"
    model, numbers = trained(model), torch.get_rng_state()
    folded = fold(model, factorized=["0"] if layer == "pair" else ())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert isinstance(folded[0], nn.Sequential) == (layer == "pair")
    assert (folded[0].tag, folded[0]._scale, folded[1].tag) == ("stem", 0.5, "norm")
    assert (folded[0].in_channels, folded[0].kernel_size, folded[0].padding) == (16, (3, 3), (1, 1))
    assert (folded[1].num_features, folded[1].eps) == (16, 1e-3)
    left = vars(folded[0]).keys() - vars(nn.Conv2d(1, 1, 1)).keys()
    assert left == {"tag", "_scale"}  # nothing of the layer that it was


# -- which form is faster ---------------------------------------------------------------------------


def test_the_faster_form_is_measured_once_for_each_shape():
    model, measured = network("resnet20"), set()

    def timer(step):  # pairs are twice as fast at 16 channels, and half as fast elsewhere
        module = step.args[0]
        measured.update([module] if isinstance(module, nn.Sequential) else [])
        if isinstance(module, nn.Conv2d):
            return 1.0
        return 0.5 if module[1].out_channels == 16 else 2.0

    setting = Setting(device="cpu", precision="fp32", batch_size=2, rounds=3, timer=timer)
    faster = measure_fold(model, input_size=(3, 16, 16), setting=setting)
    names = list(plan_of(model).layers)
    assert set(faster) == {name for name in names if model.get_submodule(name).out_channels == 16}
    assert len(measured) == 6  # shapes
    folded = fold(model, factorized=faster)
    assert isinstance(folded.layer3[1].conv1, nn.Sequential)
    assert isinstance(folded.layer1[0].conv1, nn.Conv2d)


def test_real_times_of_bfloat16_weights_are_measured():
    model = network("mobile").bfloat16()
    setting = Setting(device="cpu", precision="fp32", memory_format="channels_last", batch_size=2, rounds=3)
    assert set(measure_fold(model, input_size=(3, 16, 16), setting=setting)) <= set(plan_of(model).layers)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no basis convolution"):
        measure_fold(build("resnet20", width=4))
    with pytest.raises(ValueError, match="cannot be run"):
        measure_fold(network("resnet20"), input_size=(5, 8, 8))
