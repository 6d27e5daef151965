"""Batch normalisation through the basis: equal to the ordinary pair in everything but what it keeps."""

import copy
import pickle

import pytest
import torch
from torch import nn

from basis import BasisConv2d, substitute
from basis.layers.batchnorm import BasisBatchNorm2d, activate, couple, couplings, uncouple
from basis.models import build

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
C_IN, C, K = 5, 12, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return images()


class Block(nn.Module):
    """Convolution, batch normalisation, and what may follow: a residual, a ReLU."""

    def __init__(self, conv, norm, *, relu=True):
        super().__init__()
        self.conv, self.norm, self.relu = conv, norm, relu

    def forward(self, x, residual=None):
        z = self.conv(x)
        if self.relu:
            return activate(self.norm, z, residual)
        y = self.norm(z)
        return y if residual is None else y + residual


def block(relu=True, norm=None, dtype=torch.float64, form="dense", channels=C, **options):
    options = {"padding": 1, "bias": False, "basis_channels": K, "mode": "factorized"} | options
    conv = BasisConv2d(C_IN, channels, coefficients=form, **{"kernel_size": 3} | options)
    norm = norm or nn.BatchNorm2d(channels)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return Block(conv, norm, relu=relu).to(dtype)


def images(size=6, dtype=torch.float64, n=4, memory_format=torch.contiguous_format, mean=0.0):
    return (torch.randn(n, C_IN, size, size, dtype=dtype) + mean).contiguous(memory_format=memory_format)


def outcome(model, x, residual=None, seed=1):
    """Output, gradients of everything, and buffers after a step."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    model.zero_grad()
    y = model(x) if residual is None else model(x, residual)
    torch.manual_seed(seed)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    result = {"y": y.detach(), "x": x.grad}
    result |= {} if residual is None else {"residual": residual.grad}
    result |= {name: p.grad for name, p in model.named_parameters()}
    return result | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got is None) == (expected is None), name
        if expected is not None and expected.numel():
            assert got.shape == expected.shape, name
            size = max(expected.double().abs().max().item(), 1.0)
            assert (got.double() - expected.double()).abs().max().item() <= tolerance * size, name


# -- equal to the ordinary pair ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("follows", "memory_format", "size"),
    [("nothing", "nchw", 10), ("relu", "channels_last", 3), ("residual", "channels_last", 10),
     ("residual and relu", "nchw", 3), ("residual and relu", "channels_last", 10)],
)  # fmt: skip
def test_output_gradients_and_statistics_are_the_pairs(follows, memory_format, size):
    pair = block(relu="relu" in follows).to(memory_format=FORMATS[memory_format])
    ours = couple(pair)
    assert isinstance(ours.norm, BasisBatchNorm2d)
    x = images(size, memory_format=FORMATS[memory_format], mean=1.0)
    like = copy.deepcopy(pair)(x).detach()
    residual = like.flip(0) if "residual" in follows else None
    for _ in range(2):
        ordinary, mine = outcome(pair, x, residual), outcome(ours, x, residual)
        assert_same(mine, ordinary)
        assert mine["y"].stride() == ordinary["y"].stride()
    pair.eval(), ours.eval()
    assert_same(outcome(ours, x, residual), outcome(pair, x, residual))


@pytest.mark.parametrize(
    ("form", "fitted"), [("low_rank:2", True), ("sparse:0.5", False), ("frozen", True), ("repeat", False)]
)
def test_every_form_of_coefficients(form, fitted):
    if fitted:
        conv = nn.Conv2d(C_IN, C, 3, bias=False)
        pair = Block(BasisConv2d.from_conv(conv, basis_channels=K, coefficients=form), nn.BatchNorm2d(C)).double()
    else:
        pair = block(form=form)
    x = images()
    assert_same(outcome(couple(pair), x), outcome(pair, x))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"stride": (2, 1), "padding": (0, 2)},
        {"padding": "same"},
        {"padding_mode": "circular"},
        {"basis_channels": 1},
        {"basis_channels": C},
        {"mode": "composed"},
    ],
    ids=str,
)
def test_every_kind_of_convolution(options, x):
    pair = block(**options)
    assert_same(outcome(couple(pair), x), outcome(pair, x))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.7}, {"eps": 0.1}],
    ids=str,
)
def test_every_kind_of_batch_normalisation(options, x):
    pair = block(relu="affine" in options, norm=nn.BatchNorm2d(C, **options), bias=True)
    ours = couple(pair)
    for training in (True, True, False):
        pair.train(training), ours.train(training)
        assert_same(outcome(ours, x), outcome(pair, x))


@pytest.mark.parametrize(
    "frozen",
    [["conv.basis"], ["conv.coefficients.weight"], ["norm.weight"], ["norm.bias"], ["norm.weight", "norm.bias"],
     ["conv.basis", "conv.coefficients.weight"], ["conv.basis", "conv.coefficients.weight", "norm.weight"]],
    ids=str,
)  # fmt: skip
def test_what_is_frozen_gets_no_gradient(frozen, x):
    pair = block()
    for name in frozen:
        pair.get_parameter(name).requires_grad_(False)
    ours = couple(pair)
    result = outcome(ours, x)
    assert_same(result, outcome(pair, x))
    assert all(result[name] is None for name in frozen)


def test_a_residual_that_broadcasts_or_of_another_dtype(x):
    pair = block(dtype=torch.float32)
    ours = couple(pair)
    for residual in (torch.randn(C, 1, 1), torch.randn(4, C, 6, 6, dtype=torch.float64)):
        a, b = ours(x.float(), residual), pair(x.float(), residual)
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-5)


class InPlace(Block):
    """As torchvision writes it: the sum and the ReLU overwrite what the batch normalisation gave."""

    def forward(self, x, residual=None):
        y = self.norm(self.conv(x))
        if residual is not None:
            y += residual
        return torch.relu_(y)


@pytest.mark.parametrize(("memory_format", "size"), [("nchw", 10), ("channels_last", 3)])
def test_its_output_may_be_overwritten(memory_format, size):
    plain = block()
    pair = InPlace(plain.conv, plain.norm).to(memory_format=FORMATS[memory_format])
    x = images(size, memory_format=FORMATS[memory_format])
    residual = torch.randn(4, C, size, size).double()
    assert_same(outcome(couple(pair), x, residual), outcome(pair, x, residual))


def test_a_batch_without_images(x):
    pair = block(bias=True)
    ours = couple(pair)
    residual = torch.randn(0, C, 6, 6).double()
    assert_same(outcome(ours, x[:0], residual), outcome(pair, x[:0], residual))
    assert_same(outcome(ours, x), outcome(pair, x))


# -- low precision ----------------------------------------------------------------------------------


def errors(model, exact, x, residual, autocast):
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        mine = outcome(model, x, residual)
    names = [name for name in exact if "num_batches" not in name and "order" not in name]
    return {n: ((mine[n].double() - exact[n]).norm() / exact[n].norm()).item() for n in names}


LOW = [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False), (torch.float32, False)]


@pytest.mark.parametrize(
    ("dtype", "autocast", "relu", "mean", "memory_format"),
    [(*LOW[i], *rest) for i, *rest in (
        (0, True, 0.0, "nchw"), (0, False, 10.0, "channels_last"), (1, False, 10.0, "nchw"),
        (2, True, 10.0, "channels_last"), (3, True, 10.0, "nchw"), (3, False, 0.0, "channels_last"),
    )],
)  # fmt: skip
def test_errors_are_those_of_the_pair(dtype, autocast, relu, mean, memory_format):
    """The geometric mean over seeds: a pixel that falls on the other side of the ReLU is a chance event.

    Up to 4 roundings of float32 are nobody's fault: how the pair's own sums are ordered depends on the processor.
    """
    seeds = 12 if relu else 4
    low = torch.float32 if autocast else dtype
    rounding = 4 * torch.finfo(torch.float32).eps
    ratios, sizes = {}, {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        pair = block(relu=relu, dtype=low).to(memory_format=FORMATS[memory_format])
        x = images(12, low, n=16, memory_format=FORMATS[memory_format], mean=mean)
        residual = torch.randn(16, C, 12, 12).to(dtype).contiguous(memory_format=FORMATS[memory_format])
        exact = outcome(copy.deepcopy(pair).double(), x.double(), residual.double())
        ours, theirs = (errors(m, exact, x, residual, dtype if autocast else None) for m in (couple(pair), pair))
        for name, error in ours.items():
            floor = torch.finfo(low).eps / 2
            ratios[name] = ratios.get(name, 1.0) * ((error + floor) / (theirs[name] + floor)) ** (1 / seeds)
            sizes[name] = sizes.get(name, 0.0) + error / seeds
    assert not {name: ratio for name, ratio in ratios.items() if ratio > 1.5 and sizes[name] > rounding}


@pytest.mark.parametrize("memory_format", FORMATS)
def test_float16_does_not_overflow_in_sums_over_pixels(memory_format):
    pair = block(relu=False, dtype=torch.float32).to(memory_format=FORMATS[memory_format])
    x = images(16, torch.float32, memory_format=FORMATS[memory_format]) * 30
    norms = []
    for model in (pair, couple(pair)):
        with torch.autocast("cpu", torch.float16):
            y = model(x)
        (y.float().square().sum() * 1024).backward()
        norms.append(model.norm.weight.grad.norm())
    assert torch.isclose(*norms, rtol=1e-2)


# -- memory -----------------------------------------------------------------------------------------


def kept(model, *inputs):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(*inputs)
    given = {t.untyped_storage().data_ptr() for t in (*inputs, *model.parameters(), y)}
    return sum(size for pointer, size in storages.items() if pointer not in given)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("relu", [False, True])
def test_of_the_maps_only_those_of_k_channels_are_kept(memory_format, relu):
    pair = block(relu=relu, dtype=torch.float32).to(memory_format=FORMATS[memory_format])
    x = images(32, torch.float32, memory_format=FORMATS[memory_format])
    maps = 4 * 32 * 32 * 4
    residual = torch.randn(4, C, 32, 32).contiguous(memory_format=FORMATS[memory_format])
    assert kept(couple(pair), x, residual) <= K * maps + 8192
    assert kept(pair, x, residual) >= (C + K) * maps


# -- errors -----------------------------------------------------------------------------------------


def test_second_derivatives_are_refused_in_words(x):
    y = couple(block())(x)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        y.sum().backward(create_graph=True)


def test_one_pixel_and_other_shapes_fail_as_in_batch_normalisation():
    pair = block(padding=0)
    ours = couple(pair)
    one = torch.randn(1, C_IN, 3, 3).double()
    for x in (one, one[0]):
        with pytest.raises(ValueError, match="xpected") as ordinary:
            pair(x)
        with pytest.raises(ValueError, match="xpected") as mine:
            ours(x)
        assert str(mine.value) == str(ordinary.value)
    assert torch.allclose(ours.eval()(one), pair.eval()(one))


# -- the model ---------------------------------------------------------------------------------------


def test_coupling_changes_a_copy_and_uncoupling_is_the_way_back(x):
    pair = block()
    ours = couple(pair)
    assert type(pair.norm) is nn.BatchNorm2d
    assert not pair.conv.mixed_later
    assert ours.state_dict().keys() == pair.state_dict().keys()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in pair.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in pair.named_parameters()]
    back = uncouple(ours)
    assert isinstance(ours.norm, BasisBatchNorm2d)
    assert type(back.norm) is nn.BatchNorm2d
    assert vars(back.norm).keys() == vars(pair.norm).keys()
    assert torch.equal(back(x), pair(x))
    again = couple(couple(pair))
    assert couplings(again).norms == {"conv": "norm"}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_mix_with_their_own_coefficients(way, x):
    ours = couple(block())
    other = way(ours)
    assert torch.equal(other(x), ours(x))
    before = ours(x)
    with torch.no_grad():
        other.conv.coefficients.weight.add_(1)
    assert torch.equal(ours(x), before)
    assert not torch.allclose(other(x), before)


def test_flags_hooks_and_shared_parameters_are_kept(x):
    pair = block()
    seen = []
    pair.conv.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    pair.norm.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    pair.norm.eval()
    pair.norm.bias.requires_grad_(False)
    ours = couple(pair)
    assert not ours.norm.training
    assert not ours.norm.bias.requires_grad
    assert torch.allclose(ours(x), pair(x))
    assert seen[0] == seen[2] == x.shape
    assert torch.allclose(seen[1], seen[3])
    assert (seen[1] < 0).any()  # before the ReLU, as ever


class Twice(nn.Module):
    def __init__(self, norm, conv=None):
        super().__init__()
        self.conv, self.norm = conv or BasisConv2d(3, 8, 3, basis_channels=2), norm

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Depends(Twice):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


class OtherNorm(nn.BatchNorm2d):
    pass


class OtherConv(BasisConv2d):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(nn.BatchNorm2d(8)), "nowhere else"),
        (Depends(nn.BatchNorm2d(8)), "depends on values"),
        (Block(BasisConv2d(3, 8, 3, ratio=0.5), nn.SyncBatchNorm(8)), "into one nn.BatchNorm2d"),
        (Block(BasisConv2d(3, 8, 3, ratio=0.5), OtherNorm(8)), "OtherNorm"),
        (Block(OtherConv(3, 8, 3, ratio=0.5), nn.BatchNorm2d(8)), "OtherConv"),
        (Block(BasisConv2d(3, 8, 3, basis_channels=4, coefficients="grouped:2"), nn.BatchNorm2d(8)), "in 2 groups"),
    ],
)
def test_what_cannot_be_coupled_stays_ordinary_and_says_why(model, reason):
    found = couplings(model)
    assert not found.norms
    assert reason in found.alone["conv"]
    ours = couple(model)
    assert not ours.conv.mixed_later
    assert type(ours.norm) is type(model.norm)
    with pytest.raises(ValueError, match=f"'conv' cannot be coupled to a batch normalisation: .*{reason}"):
        couple(model, ["conv"])


def test_some_layers_may_be_coupled():
    model = substitute(build("resnet20", width=8), ratio=0.5)
    ours = couple(model, ["layer1.0.conv2"])
    assert [n for n, m in ours.named_modules() if isinstance(m, BasisBatchNorm2d)] == ["layer1.0.bn2"]
    assert couple(ours).layer1[0].conv1.mixed_later
    with pytest.raises(ValueError, match=r"'conv9' cannot be coupled.*no basis convolution of that name"):
        couple(model, ["conv9"])


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_in_one_graph(training, x):
    ours = couple(block()).train(training)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    ordinary = outcome(ours, x)
    got = outcome(compiled, x)
    assert_same({n.removeprefix("_orig_mod."): t for n, t in got.items()}, ordinary, 1e-12)
