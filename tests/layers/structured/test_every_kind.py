"""What holds for every structured layer: it is the convolution with its weight, and its numbers stay what they are."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from basis import cost
from basis.layers.structured import LAYERS, Structure
from basis.substitution import Plan
from tests.layers.structured.kinds import TEXTS, conv_of, error, fitted_to, make

GEOMETRIES = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2, "dilation": (1, 2)},
    {"kernel_size": 1, "stride": 2, "padding": 1},
)
# Numbers stored, multiply-accumulates per pixel and for building, and the size of a new and of a fitted weight.
NUMBERS = {
    "sep": (200, 200, 0, 2.1814181, 0.8567095),
    "generic:0.25": (168, 168, 0, 2.5550464, 0.8777370),
    "hashed:0.2": (230, 1152, 0, 2.3613828, 0.8928528),
    "tensor_train:0.4": (122, 200, 320, 0.8583498, 0.9079442),
    "tucker:0.5": (171, 200, 592, 0.7855905, 0.9018268),
    "shuffle:2": (84, 84, 0, 2.0075043, 0.9424954),
    "acdc:3": (136, 200, 8192, 2.1191128, 0.9141301),
    "lfb:0.5": (352, 352, 0, 5.2013000, 0.7604399),
    "lfb:1,2": (272, 416, 0, 5.3281828, 0.7833720),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_every_kind_is_tested_here():
    assert {text.partition(":")[0] for text in TEXTS} == set(LAYERS) - {"basis"}


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_and_weights_are_those_that_studies_were_made_with(text, monkeypatch):
    monkeypatch.setattr("basis.layers.structured.layer.FIT_STEPS", 20)
    conv = conv_of()
    new = Structure.parse(text).make([conv], fitted=False)[0]
    sizes = float(new.weight.detach().norm()), error(make(text, conv, fitted=True), conv.weight)
    found = (new.stored, sum(product.macs for product in new.products), new.building, *sizes)
    assert found == pytest.approx(NUMBERS[text], rel=1e-6)


@pytest.mark.parametrize("text", TEXTS)
def test_every_layer_is_the_convolution_with_its_weight(text):
    """Forward and backward, in a batch, alone and channels-last."""
    for geometry in GEOMETRIES:
        conv = conv_of(**geometry)
        if not Plan.uniform(conv, layer=text).layers:
            continue
        layer, x = make(text, conv), torch.randn(2, 8, 7, 9, dtype=torch.float64, requires_grad=True)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        own = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
        expected = torch.func.functional_call(layer.to_conv(), own, x)
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-10)
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), y, rtol=0, atol=1e-10)
        dy = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(out, inputs, dy) for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("text", ["basis:1/4", *TEXTS])
def test_autocast_and_compiled(text):
    layer, x = make(text, conv_of(padding=1, dtype=torch.float32)), torch.randn(2, 8, 6, 6)
    weight = layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.weight, weight)  # built in full precision
    assert y.dtype == torch.bfloat16
    assert (y - layer(x)).norm() < 0.02 * layer(x).norm()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("text", TEXTS)
def test_states_by_every_way_that_torch_has(text):
    for kernel in [1, 3]:
        conv = conv_of(kernel_size=kernel, padding=1, dtype=torch.float32)
        if not Plan.uniform(conv, layer=text).layers:
            continue
        layer, x = make(text, conv), torch.randn(2, 8, 5, 6)
        state = torch.get_rng_state()
        unmade = make(text, conv.to("meta"))
        assert unmade(x.to("meta")).shape == layer(x).shape
        assert torch.equal(torch.get_rng_state(), state)
        fresh = make(text, conv_of(kernel_size=kernel, padding=1, dtype=torch.float32))
        empty = unmade.to_empty(device="cpu")
        assigned = copy.deepcopy(layer).to("meta")
        assert not torch.equal(fresh.weight, layer.weight)
        for other, assign in ((fresh, False), (empty, False), (assigned, True)):
            other.load_state_dict(layer.state_dict(), assign=assign)
        for other in (fresh, empty, assigned, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
            assert other.stored == layer.stored
        empty.reset_parameters()
        torch.testing.assert_close(empty(x), empty.to_conv()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "hashed:0.2"])  # whose table has no format
def test_channels_last_stays_and_comes_back(text):
    conv, x = conv_of(padding=1).to(memory_format=torch.channels_last), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    layer = make(text, conv)
    assert layer(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    later = make(text, conv_of()).to(memory_format=torch.channels_last)
    for one in (layer, copy.deepcopy(layer), later):
        assert one.to_conv().weight.is_contiguous(memory_format=torch.channels_last)
    assert make(text, conv_of()).to_conv().weight.is_contiguous()


@pytest.mark.parametrize("text", TEXTS)
def test_costs_are_what_is_executed_and_kept_for_the_backward_pass(text):
    for kernel in [1, 3]:
        conv = conv_of(16, 32, kernel, torch.float32, padding=kernel // 2, stride=2 if kernel == 3 else 1)
        if not Plan.uniform(conv, layer=text).layers:
            continue
        layer, x = make(text, conv), torch.randn(4, 16, 32, 32).requires_grad_()
        own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), *layer._placed.values())}
        kept = {}

        def keep(tensor, kept=kept, own=own):
            storage = tensor.untyped_storage()
            kept.update({} if storage.data_ptr() in own else {storage.data_ptr(): storage.nbytes()})
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as counter:
            layer(x)
        report = cost(nn.Sequential(nn.Conv2d(16, 16, 1), layer), (16, 32, 32), batch_size=4)
        _, *counted = report.layers
        assert counter.get_total_flops() == 2 * sum(row.cost.forward_macs + row.cost.building_macs for row in counted)
        assert sum(row.cost.activation_bytes for row in counted) == pytest.approx(sum(kept.values()), rel=0.25)


@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_fitted_to_zeros_can_still_learn(text):
    """Such as the last convolution of a residual block that starts as the identity."""
    layer = fitted_to(text, torch.zeros(16, 16, 3, 3))
    layer(torch.randn(2, 16, 6, 6)).sub(1).square().sum().backward()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert any(p.grad.abs().sum() > 0 for p in layer.parts.values() if p.requires_grad)


@pytest.mark.parametrize("text", TEXTS)
def test_a_fit_is_better_than_zero_and_leaves_flags_alone(text, monkeypatch):
    monkeypatch.setattr("basis.layers.structured.layer.FIT_STEPS", 20)
    conv = conv_of(16, 16, 3, torch.float32)
    conv.weight.requires_grad_(False)
    layer = make(text, conv, fitted=True)
    assert error(layer, conv.weight) < 0.999
    assert torch.equal(layer.bias, conv.bias)
    assert not any(p.requires_grad for p in layer.parts.values())
    assert all(p.grad is None and p.dtype == torch.float32 for p in layer.parameters())


EXACT = [text for text in TEXTS if text.partition(":")[0] not in ("shuffle", "acdc")]


@pytest.mark.parametrize("text", EXACT)
def test_the_fit_of_a_weight_of_the_structure_is_that_weight(text):
    for shape in [(16, 16, 3), (16, 32, 3), (16, 32, 1)]:
        conv = conv_of(*shape)
        if not Plan.uniform(conv, layer=text).layers:
            continue
        source = make(text, conv)
        if getattr(source, "depthwise", None) is not None:  # those that the fit begins with
            with torch.no_grad():
                source.depthwise.abs_()
                source.depthwise /= source.depthwise.flatten(1).norm(dim=1)[:, None, None, None]
        assert error(fitted_to(text, source.weight), source.weight) < 1e-7


WRONG = (
    ("basis", (8, 12)), ("basis:1.5", (8, 12)), ("basis:12", (8, 12)), ("sep:1", (8, 12)), ("generic:0.01", (16, 16)),
    ("hashed:0.00001", (4, 4)), ("tensor_train:x", (16, 16)), ("tucker", (16, 16)), ("acdc:1", (16, 16)),
    ("acdc:3", (15, 15)), ("acdc:2.5", (16, 16)), ("shuffle:2", (16, 3)), ("shuffle:0", (16, 16)),
    ("shuffle:" + "9" * 5000, (16, 16)), ("lfb:1,0", (8, 12)), ("lfb:1,3", (8, 12)), ("lfb:9", (8, 12)),
)  # fmt: skip


def test_sizes_and_shapes_that_make_no_sense():
    for text, shape in WRONG:
        conv = nn.Conv2d(*(*shape, 3)[:3])
        with pytest.raises(ValueError, match=rf"{text.partition(':')[0]}|rank|basis_channels"):
            Structure.parse(text).check(conv)


def test_unknown_kinds_and_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="its kind must be one of basis, sep"):
        Structure.parse("sepp")
    for text in TEXTS:
        assert "grouped" in Structure.parse(text).obstacle(nn.Conv2d(8, 16, 3, groups=2))
    assert Structure.parse("basis:1/4").obstacle(nn.Conv2d(8, 16, 3, groups=2)) is None
