"""Which batch normalisation directly follows which convolution, in networks that do what they like."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from basis import BasisConv2d, couple, substitute
from basis.layers.batchnorm import couplings
from basis.layers.moments import taking_means
from basis.layers.norm_pairs import norm_pairs
from basis.models import build
from tests.unusual import Free, Of, Output, changing, in_bfloat16, of_any_kind, of_two, plain

NOWHERE = "does not go into one nn.BatchNorm2d and nowhere else"
READ = "are used elsewhere too"
TWICE = "called more than once"
VALUES = "depends on values"


@pytest.mark.parametrize(("name", "count"), [("resnet20", 19), ("resnet50", 53)])
def test_every_convolution_of_a_resnet_has_its_own(name, count):
    model = build(name, width=4)
    model = substitute(model, ratio=0.5, init="random") if name == "resnet20" else model
    pairs = norm_pairs(model)
    assert len(pairs.norms) == count
    assert pairs.norms["layer1.0.conv1"] == "layer1.0.bn1"
    assert not pairs.alone


def after(change):
    """``change`` of the output, its input and the network, on the way into the batch normalisation."""
    return lambda m, x: m.bn(change(m.conv(x), x, m))


def beside(use):
    """The result, and what ``use`` makes of the output and the network."""

    def forward(m, x):
        y = m.conv(x)
        return m.bn(y), use(y, m)

    return forward


def changed_later(m, x):
    y = m.conv(x)
    z = m.bn(y)
    y.mul_(2)
    return z


def experts(m, x):
    return torch.stack([m.bn(m.conv(x[i : i + 1])) for i in torch.nonzero(x.sum((1, 2, 3)))])


WAYS = {
    "relu between": after(lambda y, x, m: torch.relu(y)),
    "kind": of_any_kind,
    "changed": after(lambda y, x, m: y.add_(1)),
    "size of the images": after(lambda y, x, m: 2 * y if x.shape[2] > 100 else y),
    "size of the batch": after(lambda y, x, m: 2 * y if len(x) == 1 else y),
    "device": after(lambda y, x, m: 2 * y if x.device.type == "cpu" else y),
    "view": after(lambda y, x, m: y.view(len(x), 3, *x.shape[2:])),
    "used twice": beside(lambda y, m: m.bn.eps + y),
    "given back": beside(lambda y, m: {"hidden": [y]}),
    "in a dataclass": beside(lambda y, m: Output(m.bn.eps, [y])),
    "kept": beside(lambda y, m: m.kept.append(y)),
    "shape": beside(lambda y, m: y.shape[1]),
    "changed later": changed_later,
    "functional": lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var),
    "called twice": lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))),
    "norm twice": lambda m, x: m.bn(m.conv(x)) + m.bn(x),
    "weight elsewhere": beside(lambda y, m: m.conv.weight.sum()),
    "weight in words": beside(lambda y, m: torch.zeros(1, dtype=m.conv.weight.dtype)),
    "bias asked for": beside(lambda y, m: 1 if m.conv.bias is None else 2),
    "statistics elsewhere": beside(lambda y, m: m.bn.running_mean.sum()),
    "value": lambda m, x: m.bn(m.conv(x)) if x.mean() > 0 else m.bn(m.other(x)),
    "numbers of numpy": lambda m, x: m.bn(m.conv(x)) if x.numpy().mean() > 0 else x,
    "numbers in a list": lambda m, x: m.bn(m.conv(x)) if sum(x.flatten().tolist()) > 0 else x,
    "experts": experts,
}
REASONS = {
    **dict.fromkeys(WAYS, NOWHERE), **dict.fromkeys(("called twice", "norm twice"), TWICE),
    **dict.fromkeys(("weight elsewhere", "weight in words", "bias asked for", "statistics elsewhere"), READ),
    **dict.fromkeys(("value", "numbers of numpy", "numbers in a list", "experts"), VALUES),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_pair_has_its_reason(way):
    pairs = norm_pairs(Free(WAYS[way]))
    assert not pairs.norms
    assert REASONS[way] in pairs.alone["conv"]
    assert ("conv" in pairs.read) == (REASONS[way] in (READ, VALUES) and way != "statistics elsewhere")


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: m.bn(input=m.conv(input=x)), lambda m, x: Output(m.bn(m.conv(x))),
        lambda m, x: [{"y": (m.bn(m.conv(x)),)}], lambda m, x: m.bn(nn.Identity()(m.conv(x))),
        lambda m, x: m.bn(m.conv(x.to(next(m.parameters()).dtype))), lambda m, x: m.kept.append(m.bn(m.conv(x))),
        lambda m, x: m.bn(m.conv(x))[torch.tensor([1, 0])],
        lambda m, x: checkpoint(lambda x: m.bn(m.conv(x)), x, use_reentrant=False), in_bfloat16, changing,
    ],
)  # fmt: skip
def test_what_the_rest_of_a_network_does_hinders_no_pair(way):
    assert norm_pairs(Free(way), both_modes=True).norms == {"conv": "bn"}


def test_parameters_may_be_shared():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    model.append(nn.ConvTranspose2d(3, 3, 1))[4].weight = model[0].weight
    assert norm_pairs(model).norms == {"0": "1", "2": "3"}
    pairs = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    shared = substitute(pairs, ratio=0.5, coefficients="shared")
    assert couplings(couple(shared, ["0"])).norms == couplings(shared).norms == {"0": "1", "2": "3"}


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def patched(norm):
    norm.forward = lambda x: 2 * x
    return norm


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm(3), OwnForward(3), patched(nn.BatchNorm2d(3)), torch.jit.script(nn.BatchNorm2d(3))]
)
def test_a_normalisation_of_ones_own_is_none(norm):
    assert NOWHERE in norm_pairs(nn.Sequential(nn.Conv2d(3, 3, 1), norm)).alone["0"]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: (nn.DataParallel(m), "module."),
        lambda m: (torch.compile(m, backend="eager"), "_orig_mod."),
        lambda m: (nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 1)), m), "1."),
    ],
)
def test_wrapped_networks(wrapped):
    model, prefix = wrapped(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert norm_pairs(model).norms == {f"{prefix}0": f"{prefix}1"}


@pytest.mark.parametrize("place", ["0.0", "0", "1", "2"])
def test_a_hook_that_sees_the_output_is_heeded_and_never_called(place):
    calls = []

    def hook(module, args, output=None):
        calls.append(module)
        return torch.zeros(2) if output is None else output.clamp(min=0)

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Identity(), nn.BatchNorm2d(3))
    hooked = model.get_submodule(place)
    handle = (hooked.register_forward_pre_hook if place == "2" else hooked.register_forward_hook)(hook)
    assert norm_pairs(model).alone.keys() == {"0.0"}
    handle.remove()
    model[2].register_forward_hook(hook)
    model.register_forward_hook(hook)
    assert norm_pairs(model).norms == {"0.0": "2"}
    assert not calls


MODES = {
    "output in training": (lambda m, x: m.bn(y := m.conv(x)) + (y.mean() if m.training else 0), {}),
    "other convolution": (lambda m, x: m.bn(m.conv(x) if m.training else m.other(x)), {}),
    "other normalisation": (lambda m, x: (m.own if m.training else m.bn)(m.conv(x)), {}),
    "branch in training": (
        lambda m, x: m.own(m.other(plain(m, x))) if m.training else plain(m, x), {"conv": "bn", "other": "own"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", MODES)
def test_pairs_of_both_modes(way):
    forward, norms = MODES[way]
    model = Free(forward)
    model.own.eval()
    assert norm_pairs(model, both_modes=True).norms == norm_pairs(model.eval(), both_modes=True).norms == norms
    model.train().own.eval()
    norm_pairs(model, both_modes=True)
    assert (model.training, model.bn.training, model.own.training) == (True, True, False)


def parts(depends, leak=False):
    """A pair, and a part of it whose forward pass depends on values in the modes ``depends``."""

    def part(m, x):
        return x if m.training in depends and x.sum() > 1e9 else plain(m, x)

    model = Free(lambda m, x: plain(m.part, m.part(plain(m, x))) if leak else m.part(plain(m, x)))
    model.part = Free(part)
    return model


@pytest.mark.parametrize("depends", [(True, False), (True,), (False,)])
def test_what_depends_on_values_hides_no_other_pairs(depends):
    pairs = norm_pairs(parts(depends), both_modes=True)
    assert pairs.norms == {"conv": "bn"}
    assert pairs.alone["part.conv"] == "it is within part, whose forward pass depends on values"
    assert norm_pairs(parts(())).norms == {"conv": "bn", "part.conv": "part.bn"}
    assert norm_pairs(parts((True, False), leak=True)).norms == {"conv": "bn"}


def test_values_that_a_module_gives_to_another():
    model = Free(lambda m, x: m.conv(x) if m.router(x) else plain(m, x))
    model.router = Free(lambda m, x: int(x.sum() > 1e9))
    assert VALUES in norm_pairs(model).alone["conv"]


# -- inputs -----------------------------------------------------------------------------------------


def sized(size, **attributes):
    """A network that takes images of one size alone."""
    fc = nn.Linear(2 * (size // 8) ** 2, 2)
    return Of(
        lambda m, x: m.fc(plain(m, x).flatten(1)), conv=nn.Conv2d(3, 2, 8, 8), bn=nn.BatchNorm2d(2), fc=fc, **attributes
    )


@pytest.mark.parametrize(
    "model", [sized(64), sized(224), sized(48, image_size=48), sized(40, default_cfg={"input_size": (3, 40, 40)})]
)
def test_inputs_are_guessed_whatever_the_default_device_is(model):
    with torch.device("meta"):
        pairs = norm_pairs(model, both_modes=True)
    assert pairs.norms == {"conv": "bn"}
    assert not pairs.inputs.is_meta


@pytest.mark.parametrize("inputs", [(torch.randn(2, 3, 4, 4), torch.ones(1)), {"b": 2.0, "a": torch.randn(1, 3, 1, 1)}])
def test_inputs_may_be_many_and_of_one_sample(inputs):
    model = Free(of_two)
    with pytest.raises(ValueError, match="inputs="):
        norm_pairs(model)
    assert norm_pairs(model, inputs=inputs, both_modes=True).norms == {"conv": "bn"}


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\).*inputs="):
        norm_pairs(Free(plain), inputs=torch.randn(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"cannot be run on .*inputs="):
        norm_pairs(nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))}))
    with pytest.raises(ValueError, match="lazy"):
        norm_pairs(nn.Sequential(nn.LazyConv2d(3, 1), nn.BatchNorm2d(3)))


def test_what_uses_the_pairs_takes_inputs():
    model = Free(of_two, BasisConv2d(3, 3, 1, basis_channels=1))
    inputs = (torch.randn(2, 3, 4, 4), torch.ones(1))
    assert couple(model, inputs=inputs).conv.mixed_later
    with pytest.warns(UserWarning, match="inputs="):
        assert not couple(model).conv.mixed_later
    model.conv = nn.Conv2d(3, 3, 1, bias=False)
    assert taking_means(model, inputs) == {"conv": "bn"}
    assert taking_means(model, inputs[0]) == {}


def test_the_model_and_the_random_numbers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    reaches = model[1].forward  # of the model itself, wherever this is copied to
    model.append(nn.Identity())[3].forward = lambda x: reaches(x)
    before, numbers = {n: value.clone() for n, value in model.state_dict().items()}, torch.get_rng_state()
    norm_pairs(model, both_modes=True)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calibration_data_tell_substitution_what_a_network_takes():
    options = {"calibration": [torch.randn(4, 3, 40, 40)], "batch_norm": "through_basis"}
    assert substitute(sized(40), {"conv": 1}, **options).conv.mixed_later
