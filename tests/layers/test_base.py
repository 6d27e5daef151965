"""What layers have in common: constants that are no buffers, a weight that is only read, numbers of any kind."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from basis.layers.base import ConvLike
from basis.layers.batchnorm import BasisBatchNorm2d, couple
from basis.layers.coefficients import Form
from basis.layers.conv import BasisConv2d
from basis.layers.structured import LAYERS, Structure
from basis.models import build
from basis.substitution import substitute
from tests.layers.structured.kinds import TEXTS

FORMS = ("dense", "low_rank:3", "grouped:2", "sparse:3", "shared", "frozen", "repeat")
KINDS = (*(f"basis {form}" for form in FORMS), *TEXTS, "basis:1/4")


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("basis.layers.structured.layer.FIT_STEPS", 3)


def layer_of(kind, conv=None, *, fitted=True):
    """In evaluation mode; of a convolution of 8 to 16 channels, whose order is not the identity where it has one."""
    conv = conv or nn.Conv2d(8, 16, 3, padding=1)
    name, _, form = kind.partition(" ")
    if name == "basis":
        make = BasisConv2d.from_conv if fitted else BasisConv2d.shaped_like
        return make(conv, basis_channels=8, coefficients=form).eval()
    return Structure.parse(kind).make([conv], fitted=fitted)[0].eval()


def test_every_kind_is_tried():
    assert {kind.partition(":")[0] for kind in KINDS if " " not in kind} == set(LAYERS)


def images():
    return torch.randn(2, 8, 5, 6)


# -- constants ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_an_unchanged_layer_are_the_layer(kind):
    layer, x = layer_of(kind), images()
    expected, state = layer(x), layer.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    assert all(b.is_floating_point() for n, b in layer.named_buffers() if "tracked" not in n)

    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    twin = copy.deepcopy(layer)
    for _ in range(2):
        averaged.update_parameters(layer)
        for own, value in zip(twin.state_dict().values(), state.values(), strict=True):  # as ModelEmaV2 of timm does
            own.copy_(0.9998 * own + 0.0002 * value)
    torch.testing.assert_close(averaged(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=1e-5)

    for value in layer.state_dict().values():
        value.detach().zero_()  # parameters are the layer's own, facts are copies
    assert all(torch.equal(layer.state_dict()[name], before[name]) for name in layer.facts)
    layer.load_state_dict(before)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)

    mean = {name: sum(w * value for w in (0.3, 0.6, 0.1)) for name, value in before.items()}
    layer.load_state_dict(mean)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_of_two_layers_of_one_order_has_the_average_numbers(kind):
    layer = layer_of(kind)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)  # which changes no mask
    halves = {name: 0.5 * value + 0.5 * other.state_dict()[name] for name, value in layer.state_dict().items()}
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.25)
    layer.load_state_dict(halves)
    x = images()
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_survives_every_way_of_copying_and_moving(kind):
    layer, x = layer_of(kind), images()
    if "sparse" in kind:
        layer.coefficients.settle()
    expected, state = layer(x), layer.state_dict()
    fresh, empty, assigned = (layer_of(kind, fitted=False) for _ in range(3))
    empty, assigned = empty.to("meta").to_empty(device="cpu"), assigned.to("meta")
    for other, assign in ((fresh, False), (empty, False), (assigned, True)):
        other.load_state_dict(state, assign=assign)
    for other in (fresh, empty, assigned, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert other.state_dict().keys() == state.keys()
    double = copy.deepcopy(layer)
    for tensor in (*double.parameters(), *double.buffers()):
        tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data  # as FSDP2 moves a module
    with torch.inference_mode():
        torch.testing.assert_close(double(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    double(x.double().requires_grad_()).sum().backward()
    halves = copy.deepcopy(layer).half().float()
    torch.testing.assert_close(halves(x), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["basis dense", "basis low_rank:3"])
def test_orders_that_are_none_are_refused(kind):
    layer = layer_of(kind)
    before = layer.order
    different = layer.order.flip(0)
    state = layer.state_dict()
    floats = before.float()
    wrong = (
        (floats + different) / 2,
        floats + 0.01,
        before[:-1],
        before * 0,
        before - 1,
        floats * torch.nan,
        before + 1j,
    )
    for value in wrong:
        with pytest.raises(RuntimeError, match="order"):
            layer.load_state_dict({**state, "order": value})
        with pytest.raises(ValueError, match="order"):
            layer.order = value
        assert torch.equal(layer.order, before)
    layer.order.zero_()
    state["order"].zero_()
    assert torch.equal(layer.order, before)
    layer.order = different.tolist()
    layer.order = given = different.clone()
    given.zero_()
    assert torch.equal(layer.weight.flip(0), layer_like(layer, before).weight)
    groups = BasisConv2d(8, 16, 3, groups=2, ratio=0.5)
    with pytest.raises(RuntimeError, match="permutation"):
        groups.load_state_dict(groups.state_dict() | {"order": torch.arange(16).flip(0)})


def layer_like(layer, order):
    layer = copy.deepcopy(layer)
    layer.order = order
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_state_is_right_or_refused(dtype):
    layer = BasisConv2d.from_conv(nn.Conv2d(2, 600, 3), ratio=0.02)
    state = {name: value.to(dtype) for name, value in layer.state_dict().items()}
    if dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match=r"order .*cast"):
            layer.load_state_dict(state)
    else:
        expected = layer.order
        layer.load_state_dict(state)
        assert torch.equal(layer.order, expected)


def test_masks_that_are_none_are_refused():
    layer = layer_of("basis sparse:3")
    for name, value in layer.state_dict().items():
        if name.endswith("mask"):
            for wrong in (value * 0.5, ~value, value[:-1], value.long() * 2):
                with pytest.raises(RuntimeError, match="mask"):
                    layer.load_state_dict(layer.state_dict() | {name: wrong})
        if name.endswith("settled"):
            with pytest.raises(RuntimeError, match="settled"):
                layer.load_state_dict(layer.state_dict() | {name: torch.tensor(0.5)})


def test_facts_are_missing_and_others_unexpected_as_for_any_state():
    layer = layer_of("basis sparse:3")
    state = layer.state_dict()
    for name in ("order", "coefficients.mask", "coefficients.settled"):
        with pytest.raises(RuntimeError, match=f"Missing.*\n?.*{name}"):
            layer.load_state_dict({n: value for n, value in state.items() if n != name})
    found = layer.load_state_dict({"coefficients.settled": torch.tensor(True), "other": state["order"]}, strict=False)
    assert "order" in found.missing_keys
    assert found.unexpected_keys == ["other"]
    assert nn.Sequential(layer).load_state_dict({"order": state["order"]}, strict=False).unexpected_keys == ["order"]
    assert not layer.coefficients.settled  # without a mask


def test_a_state_of_before_names_the_coefficients_values():
    layer = layer_of("basis dense")
    state = layer.state_dict()
    state["coefficients.values"] = state.pop("coefficients.weight") + 1
    layer.load_state_dict(state)
    assert torch.equal(layer.coefficients.weight, state["coefficients.values"])


def test_the_mask_of_an_average_is_that_of_its_own_weight_until_settled():
    layer = layer_of("basis sparse:3").train()
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True).eval()
    averaged.update_parameters(layer)
    with torch.no_grad():
        layer.coefficients.weight.normal_()
    averaged.update_parameters(layer)
    own = averaged.module.coefficients
    top = own.weight.abs().topk(3, dim=1).values[:, -1:]
    assert torch.equal(own.matrix(), torch.where(own.weight.abs() >= top, own.weight, 0))


def test_constants_are_renewed_in_place_and_only_where_they_are_needed():
    layer = layer_of("basis low_rank:3")
    names = ("identity", "order", "sources")
    before = {name: layer.constant(name, layer.basis).data_ptr() for name in names}
    layer.order = layer.order.flip(0)
    assert {name: layer.constant(name, layer.basis).data_ptr() for name in names} == before  # for CUDA graphs
    layer.double()
    assert {at[2] for at in layer._placed} == {torch.float64}
    layer.reset_parameters()
    assert [at[0] for at in layer._placed] == ["identity"]
    torch.func.functional_call(layer.float(), {n: p.double() for n, p in layer.named_parameters()}, images().double())
    torch.func.vmap(layer)(images()[None])
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in layer._placed.values())


def test_every_kind_can_be_sharded_and_take_a_state():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, x = dist.init_device_mesh("cpu", (1,)), images()
        for kind in KINDS:
            source, layer = layer_of(kind, fitted=False), layer_of(kind, fitted=False)
            fully_shard(source, mesh=mesh)
            fully_shard(layer, mesh=mesh)
            layer.load_state_dict(source.state_dict())
            torch.testing.assert_close(layer(x), source(x), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


# -- a computed weight --------------------------------------------------------------------------

NO_GRAD_WRITES = {
    "copy_": lambda layer, t: layer.weight.copy_(t),
    "out": lambda layer, t: torch.add(t, 1, out=layer.weight),
    "view": lambda layer, t: layer.weight[0].view(-1).mul_(2),
    "chunk": lambda layer, t: layer.weight.chunk(2)[1].zero_(),
    "foreach": lambda layer, t: torch._foreach_mul_([layer.weight], 2.0),
    "inplace": lambda layer, t: nn.functional.relu(layer.weight, inplace=True),
    "imul": lambda layer, t: layer.weight.__imul__(2),
    "requires_grad_": lambda layer, t: layer.weight.requires_grad_(True),
}
WRITES = {
    "zeros_": lambda layer, t: nn.init.zeros_(layer.weight),
    "constant_": lambda layer, t: nn.init.constant_(layer.weight, 1.0),
    "uniform_": lambda layer, t: nn.init.uniform_(layer.weight),
    "orthogonal_": lambda layer, t: nn.init.orthogonal_(layer.weight),
    "eye_": lambda layer, t: nn.init.eye_(layer.weight.flatten(1)),
    "data": lambda layer, t: layer.weight.data.zero_(),
    "set data": lambda layer, t: setattr(layer.weight, "data", t),
    "setitem": lambda layer, t: layer.weight.__setitem__(0, 1),
    "detach": lambda layer, t: layer.weight.detach().mul_(2),
    "parameter": lambda layer, t: setattr(layer, "weight", nn.Parameter(t)),
    "tensor": lambda layer, t: setattr(layer, "weight", t),
    "pruning": lambda layer, t: prune.l1_unstructured(layer, "weight", amount=0.3),
    "vector": lambda layer, t: nn.utils.vector_to_parameters(t.flatten(), [layer.weight]),
} | {name: torch.no_grad()(write) for name, write in NO_GRAD_WRITES.items()}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("kind", "names"), [("basis dense", "layer.basis, .*weight"), ("tucker:0.5", "factor1.*core3")]
)
def test_writing_to_a_computed_weight_is_refused(kind, names, write):
    layer = layer_of(kind)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=f"weight of {type(layer).__name__} is computed .*{names}"):
        WRITES[write](layer, torch.zeros_like(before))
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_computed_weight_is_read_like_any_other(kind):
    layer = layer_of(kind)
    weight = layer.weight
    weight.retain_grad()
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight)
    assert any(p.grad is not None for p in layer.parameters())
    weight.grad = None
    leaf = layer.weight.detach()
    leaf.requires_grad = True
    leaf.square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * weight)
    conv, free = nn.Conv2d(8, 16, 3), weight.detach()
    for own in (nn.Parameter(layer.weight), nn.Parameter(layer.weight.detach(), requires_grad=False)):
        assert type(own) is nn.Parameter
        torch.testing.assert_close(weight, own)
        conv.weight = own
        nn.init.zeros_(conv.weight)
    conv.weight.data = layer.weight.detach()
    conv.weight.data.copy_(weight)
    for other in (weight * 1, weight.clone(), copy.deepcopy(free), pickle.loads(pickle.dumps(free))):
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, conv.weight)
    assert "Computed" in repr(weight)


# -- from any convolution -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_complex_or_not_finite_is_refused(kind):
    with pytest.raises(ValueError, match="complex"):
        layer_of(kind, nn.Conv2d(8, 16, 3, dtype=torch.complex64), fitted=False)
    for value in (torch.nan, torch.inf):
        conv = nn.Conv2d(8, 16, 3)
        conv.weight.data[1, 2] = value
        with pytest.raises(ValueError, match="the weight has entries that are not finite"):
            layer_of(kind, conv)
    with pytest.raises(ValueError, match="meta"):
        layer_of(kind, nn.Conv2d(8, 16, 3, device="meta"))


def test_a_complex_layer_is_refused_where_it_is_made_but_for_basis_convolutions():
    with pytest.raises(ValueError, match="complex"):
        LAYERS["sep"](8, 16, 3, dtype=torch.complex64)
    layer = BasisConv2d(8, 16, 3, ratio=0.5, dtype=torch.complex64)
    x = torch.randn(1, 8, 5, 5, dtype=torch.complex64)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))


def test_numbers_may_be_those_of_numpy():
    n, form = np.int64, Form("low_rank", np.int64(2))
    options = {"groups": n(2), "basis_channels": n(4), "coefficients": form}
    layer = BasisConv2d(n(8), n(16), (n(3), n(3)), n(1), n(1), **options)
    assert layer(images()).shape == (2, 16, 5, 6)
    numbers = (layer.basis_channels, layer.in_channels, layer.groups, *layer.kernel_size, *layer.padding, form.size)
    assert {type(number) for number in numbers} == {int}
    assert str(form) == "low_rank:2"
    assert BasisConv2d(8, 16, 3, ratio=np.float32(0.5)).basis_channels == 8
    assert type(BasisConv2d(n(8), n(16), 3, ratio=np.float16(0.5)).basis_channels) is int
    conv = nn.Conv2d(8, 16, 3)
    assert Structure("tucker", np.float32(0.5)).make([conv], fitted=False)[0].text == "tucker:0.5"
    for wrong in ({"ratio": True}, {"ratio": "0.5"}, {"ratio": np.nan}, {"basis_channels": np.bool_(True)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BasisConv2d(8, 16, 3, **wrong)
    with pytest.raises(ValueError, match="coefficients"):
        Form("low_rank", True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_the_interface_of_the_one_it_replaces(kind):
    conv, x = nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), images()
    layer = layer_of(kind, conv)
    torch.testing.assert_close(layer(input=x), layer(x), rtol=0, atol=0)
    names = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "transposed", "output_padding", "_reversed_padding_repeated_twice",
    )  # fmt: skip
    ours, theirs = ([getattr(one, name) for name in names] for one in (layer, conv))
    assert [*map(str, ours[:-1]), *ours[-1]] == [*map(str, theirs[:-1]), *theirs[-1]]


def test_networks_of_the_package_are_traced_with_their_layers_as_nodes():
    model = substitute(build("resnet20", width=4), ratio=0.5).eval()
    structured = substitute(build("resnet20", width=4), layer="sep").eval()
    x = torch.randn(1, 3, 8, 8)
    for network in (model, couple(model), structured):
        traced = torch.fx.symbolic_trace(network)
        torch.testing.assert_close(traced(x), network(x), rtol=0, atol=0)
        names = {name for name, module in network.named_modules() if isinstance(module, (ConvLike, BasisBatchNorm2d))}
        assert names <= {node.target for node in traced.graph.nodes}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_alone_is_traced_as_one_node(kind):
    layer, x = layer_of(kind), images()
    for layer.mode in ("factorized", "composed", "auto"):
        traced = torch.fx.symbolic_trace(layer)
        torch.testing.assert_close(copy.deepcopy(traced)(x), layer(x), rtol=0, atol=0)
        assert traced.itself is layer


def test_a_coupled_normalisation_is_called_by_name_too():
    model = couple(nn.Sequential(BasisConv2d(8, 16, 3, ratio=0.5), nn.BatchNorm2d(16)))
    z = model[0](input=images())
    torch.testing.assert_close(model[1](input=z), model[1](z))
    assert next(iter(inspect.signature(model[1].forward).parameters)) == "input"


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_has_a_name_that_torch_needs(kind):
    layer = layer_of(kind)
    for module in layer.modules():
        assert not [name for name in module._parameters if hasattr(nn.ModuleDict(), name)]
