import copy
import math
import warnings

import pytest
import torch
from torch import nn

from basis import BasisConv2d, cost, couple, evaluate, load, merge, save, sensitivity, substitute
from basis.layers.moments import Moments, directions, output_moments
from basis.search.sensitivity import joint


def moments_of(conv, *batches):
    return output_moments(conv, [""], iter(batches))[""]


def error(layer, conv, x):
    """The mean over images and pixels of the squared distance of the outputs."""
    return (layer(x) - conv(x)).square().sum(1).mean().item()


def inputs(n=12, channels=8, size=9, seed=0):
    """Images whose rows and columns differ in strength, and whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, channels, size, size), generator=generator) * torch.linspace(0.1, 2, size)
    return x * torch.linspace(0.2, 1.5, channels)[:, None, None] + 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"groups": 2, "padding": "same", "padding_mode": "reflect"},
        {"groups": 4, "padding": 1, "padding_mode": "circular"},
    ],
)
def test_the_error_is_the_sum_of_the_discarded_eigenvalues_and_below_that_of_svd(options, bias):
    torch.manual_seed(1)
    conv = nn.Conv2d(8, 16, 3, bias=bias, **options)
    x = inputs()
    moments = moments_of(conv, x[:5], x[5:])
    groups = conv.groups
    y = conv(x).movedim(1, 0).reshape(groups, 16 // groups, -1).double()
    y = y - y.mean(2, keepdim=True) if bias else y
    energies = torch.linalg.eigvalsh(y @ y.mT / y.shape[2])
    for k in (groups, 2 * groups, 16 - groups):
        layer = BasisConv2d.from_conv(conv, basis_channels=k, moments=moments)
        tail = energies[:, : (16 - k) // groups].sum().item()
        assert error(layer, conv, x) == pytest.approx(tail, rel=1e-4, abs=1e-7 * energies.sum().item())
        assert error(layer, conv, x) <= error(BasisConv2d.from_conv(conv, basis_channels=k), conv, x) * (1 + 1e-5)
        assert (layer.bias is not None) == bias
    whole = BasisConv2d.from_conv(conv, basis_channels=16, moments=moments)
    assert torch.equal(whole.weight, conv.weight)


def test_directions_without_variance_are_those_of_the_weight():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 10, 3, bias=False)
    with torch.no_grad():
        conv.weight[7:] = 0  # dead channels
    few = torch.randn(1, 4, 4, 4)  # four outputs for ten channels
    kept = directions(moments_of(conv, few).second(about_mean=False), conv.weight.flatten(1)[None])[0]
    assert torch.allclose(kept.mT @ kept, torch.eye(10, dtype=torch.float64), atol=1e-10)
    seen, rest = kept[:, :4], kept[:, 4:]
    y = conv(few).flatten(2)[0].double()
    assert torch.allclose(seen @ (seen.mT @ y), y, atol=1e-6)
    left = conv.weight.flatten(1).double() - seen @ (seen.mT @ conv.weight.flatten(1).double())
    norms = (rest.mT @ left).norm(dim=1)
    assert torch.allclose(norms, torch.linalg.svdvals(left)[:6], atol=1e-6)
    for k in (3, 5, 8, 9):
        layer = BasisConv2d.from_conv(conv, basis_channels=k, moments=moments_of(conv, few))
        assert layer.weight.isfinite().all()
        assert layer.weight[7:].abs().max() < 1e-6
    constant = moments_of(conv, torch.zeros(2, 4, 5, 5))  # says nothing: the SVD is left
    a, b = (BasisConv2d.from_conv(conv, basis_channels=4, moments=m) for m in (constant, None))
    assert torch.allclose(a.weight, b.weight, atol=1e-6)


def test_moments_do_not_depend_on_how_outputs_come():
    torch.manual_seed(0)
    y = torch.randn(7, 6, 5, 4, dtype=torch.float64) + 100
    once, pieces = Moments(), Moments()
    once.add_maps(y, 2)
    for part in (y[:1], y[1:4].to(memory_format=torch.channels_last), y[4], y[5:]):
        pieces.add_maps(part, 2)
    assert once.n == pieces.n == 140
    assert torch.allclose(once.mean, pieces.mean)
    assert torch.allclose(once.scatter, pieces.scatter)
    parts = once.second(about_mean=True, groups=6)
    assert torch.allclose(parts.flatten(), y.movedim(1, 0).flatten(1).var(1, correction=0))


class Net(nn.Module):
    """A bias before no normalisation, a pair without bias, a convolution alone without bias, one that is shared."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.pair = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.alone = nn.Conv2d(16, 12, 1, bias=False)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.unused = nn.Conv2d(12, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.pair(torch.relu(self.first(x)))))
        x = self.shared(torch.relu(self.shared(self.alone(x))))
        return self.fc(torch.relu(x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(3)
    model = Net()
    model(torch.randn(64, 3, 8, 8))  # statistics
    return model.eval()


PLAN = {"first": 6, "pair": 5, "alone": 4, "shared": 6}


def test_a_model_gets_no_parameter_and_the_normalisation_takes_the_mean(net, tmp_path):
    x = [torch.randn(16, 3, 8, 8) + 1 for _ in range(2)]
    before = copy.deepcopy(net.state_dict())
    net.norm.train()
    small = substitute(net, PLAN, calibration=x)
    assert net.norm.training
    assert small.norm.training
    net.eval(), small.eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def mean_after(model):
        kept = []
        with torch.no_grad():
            handle = model.norm.register_forward_hook(lambda _, __, y: kept.append(y))
            for part in x:
                model.norm(model.pair(torch.relu(net.first(part))))
            handle.remove()
        return torch.cat(kept).mean((0, 2, 3))

    assert torch.allclose(mean_after(small), mean_after(net), atol=1e-5)
    assert not torch.allclose(mean_after(substitute(net, PLAN)), mean_after(net), atol=1e-2)
    assert small.pair.bias is None
    assert small.alone.bias is None
    table = sensitivity(net, measure="spectrum", multiple=1)
    predicted = {layer.name: layer.cost(PLAN[layer.name])["params"] for layer in table.layers if layer.name in PLAN}
    assert {e.name: e.cost.parameters for e in cost(small, input_size=(3, 8, 8)).layers if e.name in PLAN} == predicted
    images = torch.cat(x)
    for other in (merge(small), couple(small)):
        assert torch.allclose(other(images), small(images), atol=1e-4)
    assert merge(small).state_dict().keys() == net.state_dict().keys()
    save(small, tmp_path)
    assert torch.equal(load(net, tmp_path)(images), small(images))
    coupled = substitute(net, PLAN, calibration=x, batch_norm="through_basis")
    assert torch.allclose(coupled(images), small(images), atol=1e-4)


def test_what_data_never_reach_is_fitted_to_its_weight_and_named(net):
    x = torch.randn(4, 3, 8, 8)
    with pytest.warns(UserWarning, match="never reach unused "):
        small = substitute(net, {"unused": 3, "first": 5}, calibration=[x])
    assert torch.equal(small.unused.weight, substitute(net, {"unused": 3}).unused.weight)
    assert not torch.equal(small.first.weight, substitute(net, {"first": 5}).first.weight)
    net.shared.bias = net.unused.bias
    with pytest.warns(UserWarning, match="shared"):
        small = substitute(net, {"shared": 3}, calibration=[x])
    assert torch.equal(small.shared.weight, substitute(net, {"shared": 3}).shared.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        substitute(net, {"first": 5}, calibration=[(x, torch.zeros(4))])


@pytest.mark.parametrize("form", ["grouped:2", "low_rank:2", "sparse:2", "repeat", "frozen", "shared"])
def test_every_form_keeps_the_mean_and_is_no_worse_than_by_weight(form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 12, 3, padding=1))
    x = inputs(channels=6)
    own, other = (substitute(net, {"2": 4}, calibration=c, coefficients=form) for c in ([x], None))
    z = net[:2](x)
    lost = (own[2](z) - net[2](z)).mean((0, 2, 3)).abs().max().item()
    assert lost < 1e-4
    if form != "sparse":  # whose pattern is a heuristic
        assert error(own[2], net[2], z) <= error(other[2], net[2], z) * (1 + 1e-5)
    if form == "shared":
        pair = nn.Sequential(nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 1))
        tied = substitute(pair, ratio=0.5, calibration=[z], coefficients="shared")
        assert tied[0].coefficients is tied[1].coefficients
        assert (tied[0](z) - pair[0](z)).mean((0, 2, 3)).abs().max() < 1e-4


def test_bad_calibration_is_refused(net):
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="calibration holds no samples"):
        substitute(net, {"first": 4}, calibration=[])
    with pytest.raises(ValueError, match=r"first: .*not finite"):
        substitute(net, {"first": 4}, calibration=[x * math.nan])
    with pytest.raises(ValueError, match="fits nothing"):
        substitute(net, {"first": 4}, calibration=[x], init="random")
    with pytest.raises(ValueError, match="structured layers alone"):
        substitute(net, {"first": "tucker:0.5"}, calibration=[x])
    with pytest.raises(ValueError, match="moments"):
        BasisConv2d.from_conv(net.first, basis_channels=4, moments=moments_of(net.shared, torch.randn(2, 12, 5, 5)))


# -- in the search ------------------------------------------------------------------------------


def data_for(net, n=24):
    x = torch.randn(n, 3, 8, 8) + 0.5
    with torch.no_grad():
        return [(part, net(part).argmax(1)) for part in x.split(8)]


@pytest.mark.parametrize("measure", ["oneshot", "oneshot_bn"])
def test_the_search_scores_what_substitution_builds(net, measure):
    data = data_for(net)
    calibration = [x + 0.1 for x, _ in data]
    table = sensitivity(net, data, measure=measure, calibration=calibration, fit="activation", multiple=1)
    assert table.skipped["unused"] == "never called by the forward pass"
    for cell in table.cells:
        plan = {cell.layer: cell.basis_channels}
        found = joint(net, plan, data, measure=measure, calibration=calibration, fit="activation")
        assert cell.value == pytest.approx(found.value, abs=1e-5)
    if measure == "oneshot":
        small = substitute(net, {"pair": 8}, calibration=calibration)
        own = next(c for c in table.cells if (c.layer, c.basis_channels) == ("pair", 8))
        assert own.value == pytest.approx(evaluate(small, data).loss - table.baseline["loss"], abs=1e-5)


def test_taylor_is_exact_where_the_loss_is_linear_in_the_outputs(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Flatten())
    data = [(torch.randn(6, 4, 6, 6) + 1, torch.zeros(6).long()) for _ in range(2)]
    slope = torch.randn(12 * 16)

    def loss(outputs, targets):
        return outputs @ slope

    monkeypatch.setattr("basis.batches.cross_entropy", loss)
    table = sensitivity(net, data, measure="taylor", fit="activation", multiple=1)
    for cell in table.cells:
        small = substitute(net, {"0": cell.basis_channels}, calibration=[x for x, _ in data])
        change = torch.cat([loss(small(x) - net(x), None) for x, _ in data]).mean().item()
        assert cell.value == pytest.approx(change, abs=1e-4)
