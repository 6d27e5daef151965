"""The table of the book: which tool works with the layers. Every entry is tried here."""

import copy
import csv
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic, quantize_fx
from torch.distributed.fsdp import fully_shard
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

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


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


def alike(name, tolerance=1e-5):
    """What the tool makes of the network gives what the network gives."""

    def register(make):
        def attempt(model):
            expected = model(images())
            same(make(model)(images()), expected, tolerance)

        TOOLS[name] = attempt
        return make

    return register


def trained(model):
    """Two steps of training; everything that is trained gets a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(images()).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return model.eval()


def parametrized(register, remove=parametrize.remove_parametrizations):
    """What is computed is what the layer uses, also after a step, and once it is a parameter again."""

    def attempt(model):
        before, modules = model(images()), [m for m in model.modules() if isinstance(m, (ConvLike, Coefficients))]
        parts = [(m, name) for m in modules for name, p in m.named_parameters(recurse=False) if p.dim() > 1]
        for module, name in parts:
            register(module, name)
        after = trained(model)(images())
        assert not torch.allclose(after, before, atol=1e-3)
        for module, name in parts:
            remove(module, name)
        same(model(images()), after)

    return attempt


TOOLS["pruning"] = parametrized(lambda m, n: prune.l1_unstructured(m, n, amount=0.3), prune.remove)
TOOLS["weight norm"] = parametrized(parametrizations.weight_norm)
TOOLS["spectral norm"] = parametrized(parametrizations.spectral_norm)
TOOLS["parametrizations"] = parametrized(parametrizations.orthogonal)


alike("SyncBatchNorm conversion")(nn.SyncBatchNorm.convert_sync_batchnorm)
alike("jit.trace")(lambda model: torch.jit.trace(model, 2 * images()))
alike("jit.script")(torch.jit.script)
alike("torch.export")(lambda model: torch.export.export(model, (2 * images(),)).module())
alike("deepcopy and pickle")(lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))))


@alike("dynamic quantisation (torch.ao)", 0.05)
def _(model):
    quantised = quantize_dynamic(model, {nn.Linear})
    assert "quantized" in type(quantised[-1]).__module__
    return quantised


@alike("fx quantisation (torch.ao)", 0.1)
def _(model):
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (images(),))
    prepared(images())
    quantised = quantize_fx.convert_fx(prepared)
    assert isinstance(quantised.get_submodule("0"), ConvLike)
    return quantised


@alike("AveragedModel")
def _(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    return averaged


@alike("EMA over the state")
def _(model):
    average = copy.deepcopy(model)
    for own, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        own.copy_(0.9998 * own + 0.0002 * value)
    return average


def network_like(model):
    """The same layers with other numbers."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not torch.allclose(other(images()), model(images()))
    return other


@alike("state averaging")
def _(model):
    loaded = network_like(model)
    loaded.load_state_dict({n: 0.3 * v + 0.7 * v for n, v in model.state_dict().items()})
    return loaded


@alike("half precision cast", 0.05)
def _(model):
    half = model.bfloat16()
    return lambda x: half(x.bfloat16()).float()


@alike("torch.compile")
def _(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


@alike("fx.symbolic_trace")
def _(model):
    traced = torch.fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == [*"01234567"]
    return traced


@alike("feature extraction (torchvision)")
def _(model):
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, ["3", "4"])
    return lambda x: model[5:](extractor(x)["4"])


@alike("vmap ensembles")
def _(model):
    stacked = stack_module_state([network_like(model), model])
    base = copy.deepcopy(model).to("meta")
    return lambda x: vmap(lambda *state: functional_call(base, state, x))(*stacked)[1]


@alike("functional_call")
def _(model):
    other = network_like(model)
    return lambda x: functional_call(other, model.state_dict(), x)


@alike("DataParallel")
def _(model):
    """What DataParallel calls on each GPU, made as it makes them."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.clone())
    return replicas[model]


@pytest.fixture(scope="module")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(name, wrap):
    def attempt(model):
        expected = trained(copy.deepcopy(model))(images())
        same(trained(wrap(model))(images()), expected)

    TOOLS[name] = attempt


def shard(model, *parts):
    for part in (*parts, model):
        fully_shard(part, mesh=dist.init_device_mesh("cpu", (1,)))
    return model


distributed("DistributedDataParallel", nn.parallel.DistributedDataParallel)
distributed("FSDP2 of a block", shard)
distributed("FSDP2 of each layer", lambda model: shard(model, model[0], model[3]))


@alike("load_state_dict with assign=True")
def _(model):
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


@alike("meta and to_empty")
def _(model):
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    return empty


@alike("forward hooks")
def _(model):
    seen = []
    for module in model:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    model(images())
    assert seen == list(model)
    return model


@alike("channels_last")
def _(model):
    last = {"memory_format": torch.channels_last}
    model.to(**last)
    return lambda x: model(x.to(**last))


def with_complex_numbers(model):
    options = {"ratio": 0.5} if isinstance(model[0], BasisConv2d) else {"size": model[0].size}
    layer, x = type(model[0])(4, 8, 3, dtype=torch.complex64, **options), images() + 1j
    layer.mixed_later = isinstance(model[1], BasisBatchNorm2d)
    y = model[1](layer(x)) if layer.mixed_later else layer(x)
    same(y, nn.functional.conv2d(x, layer.weight, layer.bias))


TOOLS["complex numbers"] = with_complex_numbers

# What a refusal says; SyncBatchNorm speaks for itself.
SAYS = {
    "SyncBatchNorm conversion": "running_mean", "jit.script": "merge", "DataParallel": "uncouple",
    "FSDP2 of each layer": "uncouple", "complex numbers": "complex",
}  # fmt: skip


def test_the_table_has_what_is_tried():
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
