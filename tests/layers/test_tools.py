"""The table of the book: which tool works with the layers. Every entry is tried here."""

import copy
import csv
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic, quantize_fx
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from basis.environment import repository_root
from basis.layers.base import ConvLike
from basis.layers.batchnorm import BasisBatchNorm2d, couple
from basis.layers.coefficients import Coefficients
from basis.layers.conv import BasisConv2d
from basis.layers.structured import Structure
from basis.vision import import_torchvision

COLUMNS = ("basis convolution", "structured layers", "through the basis")
with (repository_root() / "book" / "tools.csv").open(newline="") as file:
    ROWS = {row["tool"]: row for row in csv.DictReader(file)}
TOOLS = {}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def tool(name):
    def register(attempt):
        TOOLS[name] = attempt
        return attempt

    return register


def network(column):
    """Two convolutions with their normalisation, and statistics that are not those of a new one."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    if column == "structured layers":
        conv = Structure("hashed", "0.3").make([first], fitted=True) + Structure("sep").make([second], fitted=True)
    else:
        conv = [BasisConv2d.from_conv(c, ratio=0.5, mode=m) for c, m in ((first, "factorized"), (second, "composed"))]
    parts = [conv[0], nn.BatchNorm2d(8), nn.ReLU(), conv[1], nn.BatchNorm2d(8)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    model(images())
    return (couple(model) if column == "through the basis" else model).eval()


def images():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def same(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def a_step(model):
    """One step of training; everything that is trained gets a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(images()).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model.eval()


def trained_parts(model):
    """(module, name) of the parameters that the weights are made from."""
    for module in list(model.modules()):
        if isinstance(module, (ConvLike, Coefficients)):
            yield from ((module, name) for name in list(module._parameters) if name != "bias")


def parametrized(register, remove=parametrize.remove_parametrizations, *, alike=True):
    """What is computed is what the layer uses, before and after a step, and once it is a parameter again."""

    def attempt(model):
        before = model(images())
        parts = [(m, n) for m, n in trained_parts(model) if getattr(m, n).dim() > 1]
        for module, name in parts:
            register(module, name)
        if alike:
            same(model(images()), before)
        a_step(model)
        after = model(images())
        dense = [m.to_conv() for m in model if isinstance(m, ConvLike)]
        assert all(conv.weight.isfinite().all() for conv in dense)
        for module, name in parts:
            remove(module, name)
        same(model(images()), after)
        assert not torch.allclose(after, before, atol=1e-3)

    return attempt


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


TOOLS["pruning"] = parametrized(lambda m, n: prune.l1_unstructured(m, n, amount=0.3), prune.remove, alike=False)
TOOLS["weight norm"] = parametrized(parametrizations.weight_norm)
TOOLS["spectral norm"] = parametrized(parametrizations.spectral_norm, alike=False)
TOOLS["parametrizations"] = parametrized(lambda m, n: parametrize.register_parametrization(m, n, Twice()))


@tool("SyncBatchNorm conversion")
def _(model):
    expected = model(images())
    same(nn.SyncBatchNorm.convert_sync_batchnorm(model)(images()), expected)


@tool("dynamic quantisation (torch.ao)")
def _(model):
    quantised = quantize_dynamic(model, {nn.Linear})
    assert "quantized" in type(quantised[-1]).__module__
    same(quantised(images()), model(images()), 0.05)


@tool("fx quantisation (torch.ao)")
def _(model):
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
    prepared(images())
    quantised = quantize_fx.convert_fx(prepared)
    assert isinstance(quantised.get_submodule("0"), ConvLike)
    same(quantised(images()), model(images()), 0.1)


@tool("AveragedModel")
def _(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    same(averaged(images()), model(images()))


@tool("EMA over the state")
def _(model):
    average = copy.deepcopy(model)
    for _ in range(3):
        for own, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(0.9998 * own + 0.0002 * value)
    same(average(images()), model(images()))


@tool("state averaging")
def _(model):
    state = model.state_dict()
    copy.deepcopy(model).load_state_dict({n: 0.3 * v + 0.7 * v for n, v in state.items()})
    loaded = network_like(model)
    loaded.load_state_dict({n: 0.3 * v + 0.7 * v for n, v in state.items()})
    same(loaded(images()), model(images()))


def network_like(model):
    """The same layers with other numbers."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.allclose(other(images()), model(images()))
    return other


@tool("half precision cast")
def _(model):
    same(copy.deepcopy(model).bfloat16()(images().bfloat16()).float(), model(images()), 0.05)


@tool("jit.trace")
def _(model):
    traced = torch.jit.trace(model, images())
    same(traced(2 * images()), model(2 * images()))


@tool("jit.script")
def _(model):
    torch.jit.script(model)


@tool("torch.compile")
def _(model):
    torch._dynamo.reset()
    same(torch.compile(model, fullgraph=True, backend="eager")(images()), model(images()))


@tool("torch.export")
def _(model):
    same(torch.export.export(model, (images(),)).module()(images()), model(images()))


@tool("fx.symbolic_trace")
def _(model):
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == [*"01234567"]
    same(traced(images()), model(images()))


@tool("feature extraction (torchvision)")
def _(model):
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    found = create_feature_extractor(model, ["0", "4"])(images())
    same(found["4"], model[:5](images()))


@tool("vmap ensembles")
def _(model):
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    stacked = stack_module_state(models)
    x = images()
    for base in (copy.deepcopy(model), copy.deepcopy(model).to("meta")):
        found = vmap(lambda *state, base=base: functional_call(base, state, x))(*stacked)
        same(found, torch.stack([one(x) for one in models]))


@tool("functional_call")
def _(model):
    expected, own = model(images()), copy.deepcopy(model)
    same(functional_call(network_like(model), model.state_dict(), images()), expected)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    same(functional_call(own, {**dict(model.named_parameters()), **dict(model.named_buffers())}, images()), expected)


@tool("deepcopy and pickle")
def _(model):
    expected = model(images())
    same(copy.deepcopy(model)(images()), expected)
    same(pickle.loads(pickle.dumps(model))(images()), expected)


@tool("DataParallel")
def _(model):
    """What DataParallel calls on each GPU, made as it makes them."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    same(replicas[model](images()), model(images()))


@pytest.fixture(scope="module")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@tool("DistributedDataParallel")
def _(model):
    expected = a_step(copy.deepcopy(model))(images())
    same(a_step(nn.parallel.DistributedDataParallel(model))(images()), expected)


def sharded(model, parts):
    from torch.distributed.fsdp import fully_shard

    expected = a_step(copy.deepcopy(model))(images())
    mesh = dist.init_device_mesh("cpu", (1,))
    for part in (*parts(model), model):
        fully_shard(part, mesh=mesh)
    same(a_step(model)(images()), expected)


@tool("FSDP2 of each layer")
def _(model):
    sharded(model, lambda model: [m for m in model if isinstance(m, ConvLike)])


@tool("FSDP2 of a block")
def _(model):
    sharded(model, lambda model: [])


@tool("load_state_dict(assign=True)")
def _(model):
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    same(other(images()), model(images()))


@tool("meta and to_empty")
def _(model):
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    same(empty(images()), model(images()))


@tool("forward hooks")
def _(model):
    seen, expected = [], model(images())
    for module in model:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    same(model(images()), expected)
    assert seen == list(model)


@tool("channels_last")
def _(model):
    expected = model(images())
    same(model.to(memory_format=torch.channels_last)(images().to(memory_format=torch.channels_last)), expected)


@tool("complex numbers")
def _(model):
    options = {"ratio": 0.5} if isinstance(model[0], BasisConv2d) else {"size": model[0].size}
    layer, x = type(model[0])(4, 8, 3, dtype=torch.complex64, **options), images() + 1j
    layer.mixed_later = isinstance(model[1], BasisBatchNorm2d)
    y = model[1](layer(x)) if isinstance(model[1], BasisBatchNorm2d) else layer(x)
    same(y, nn.functional.conv2d(x, layer.weight, layer.bias))


# What a refusal says; SyncBatchNorm speaks for itself.
SAYS = {
    "SyncBatchNorm conversion": "running_mean", "jit.script": "merge", "DataParallel": "uncouple",
    "FSDP2 of each layer": "uncouple", "complex numbers": "complex",
}  # fmt: skip


def test_the_table_has_what_is_tried():
    assert list(ROWS) == list(dict.fromkeys(ROWS))
    assert set(ROWS) == set(TOOLS)
    assert {row[column] for row in ROWS.values() for column in COLUMNS} == {"works", "refused"}


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ROWS)
def test_every_entry_is_true(name, column):
    model = network(column)
    if ROWS[name][column] == "works":
        TOOLS[name](model)
    else:
        with pytest.raises((RuntimeError, ValueError), match=SAYS[name]):
            TOOLS[name](model)
