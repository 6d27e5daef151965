import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from basis import substitute
from basis.search.measures import activation, gradients, oneshot, spectrum


class Net(nn.Module):
    """Bias, groups, in-place activations, a convolution that is called twice, a depthwise one, pooling."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act(self.first(x))
        x = self.depthwise(self.act(self.norm(self.grouped(x))))
        x = x + self.shared(torch.relu(self.shared(x)))
        return self.fc(x.mean((2, 3)))


class PreActivation(nn.Module):
    """What is kept before ``side`` is changed in place by what follows it."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 8, 1, bias=False)
        self.main = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.norm(self.stem(x))
        view = x.flatten(2)  # shares memory with x, as copies of both would not
        side = self.side(x)
        x = F.relu(x, inplace=True)
        x = self.last(self.main(x)) + side + view.view_as(side)
        return self.fc(x.mean((2, 3)))


def made(kind, **options):
    """A network with statistics of its own, in eval mode, with weights that are not all alike."""
    torch.manual_seed(0)
    model = kind(**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.linspace(2.5, 0.5, module.out_channels)[:, None, None, None])
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def batches(count=3, size=7, seed=1, classes=5):
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [size - 2]
    draw = [torch.randn(n, 3, 8, 8, generator=generator) for n in sizes]
    return [(x, torch.randint(0, classes, (len(x),), generator=generator)) for x in draw]


CANDIDATES = {"first": (4, 2), "grouped": (6, 2), "shared": (6, 3)}


def by_key(cells):
    return {(cell.layer, cell.basis_channels): cell for cell in cells}


def cut(weight, k, groups=1):
    """The best approximation of rank k, group by group, by numpy."""
    blocks = weight.detach().double().numpy().reshape(groups, weight.shape[0] // groups, -1)
    out = np.empty_like(blocks)
    for i, block in enumerate(blocks):
        u, s, vh = np.linalg.svd(block, full_matrices=False)
        s[k // groups :] = 0
        out[i] = u @ np.diag(s) @ vh
    return torch.from_numpy(out.reshape(weight.shape))


def test_spectrum_is_the_error_of_the_truncated_weight():
    model = made(Net)
    base, cells = spectrum(model, CANDIDATES)
    cells = by_key(cells)
    assert base == {}
    for name, ks in CANDIDATES.items():
        conv = model.get_submodule(name)
        for k in ks:
            weight = conv.weight.detach().double()
            error = (weight - cut(weight, k, conv.groups)).norm() / weight.norm()
            assert cells[name, k].value == pytest.approx(error.item(), rel=1e-9)
            assert cells[name, k].forward == cells[name, k].backward == cells[name, k].n == 0
            own = substitute(model, {name: k}).get_submodule(name).weight.detach().double()
            assert (weight - own).norm() / weight.norm() == pytest.approx(error.item(), rel=1e-4)


def outputs_of(model, name, data):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append(y.detach().clone()))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    handle.remove()
    return found


def test_activation_is_the_error_of_the_projected_outputs():
    model, data = made(Net), batches()
    base, cells = activation(model, CANDIDATES, data)
    cells = by_key(cells)
    assert base == {}
    for name, ks in CANDIDATES.items():
        g = model.get_submodule(name).groups
        rows = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs_of(model, name, data)], 1).double().numpy()
        for k in ks:
            tail = total = 0.0
            for block in np.split(rows, g):
                centred = block - block.mean(1, keepdims=True)
                u = np.linalg.svd(centred, full_matrices=False)[0][:, : k // g]
                tail += ((centred - u @ (u.T @ centred)) ** 2).sum()
                total += (centred**2).sum()
            assert cells[name, k].value == pytest.approx(math.sqrt(tail / total), rel=1e-4)
    assert sum(cell.forward for cell in cells.values()) == pytest.approx(19)  # one pass of 19 images


def deltas(model, name, k, data):
    """grad . (y_k - y) of each sample, with y_k from the truncated weight: nothing but autograd."""
    model = copy.deepcopy(model).double()
    conv = model.get_submodule(name)
    thin = copy.deepcopy(conv)
    thin.weight.data = cut(conv.weight, k, conv.groups)
    result = []
    for x, y in data:
        for i in range(len(x)):
            change = 0.0
            calls = []

            def keep(module, args, out, calls=calls):
                probe = torch.zeros_like(out, requires_grad=True)
                calls.append((args[0].detach().clone(), out.detach().clone(), probe))
                return out + probe

            handle = conv.register_forward_hook(keep)
            loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
            handle.remove()
            assert len(calls) == 1 + (name == "shared")
            for (before, out, _), grad in zip(calls, torch.autograd.grad(loss, [c[2] for c in calls]), strict=True):
                change += (grad * (thin(before) - out)).sum().item()
            result.append(change)
    return np.array(result)


def test_taylor_and_fisher_from_the_change_of_the_output_and_its_gradient():
    model, data, candidates = made(Net), batches(), CANDIDATES
    model.requires_grad_(False)  # a frozen network has sensitivities too
    base, taylor = gradients(model, candidates, data, squared=False)
    fisher = by_key(gradients(model, candidates, data, squared=True)[1])
    taylor = by_key(taylor)
    assert set(taylor) == {(name, k) for name, ks in candidates.items() for k in ks}
    for (name, k), cell in taylor.items():
        change = deltas(model, name, k, data)
        half = 1.96 * change.std(ddof=1) / math.sqrt(len(change))
        assert cell.value == pytest.approx(change.mean(), rel=1e-3, abs=1e-6)
        assert cell.n == len(change) == 19
        assert (cell.high - cell.low) / 2 == pytest.approx(half, rel=0.1)  # Student's factor is 2.10
        assert cell.low < cell.value < cell.high
        squares = change**2 / 2
        assert fisher[name, k].value == pytest.approx(squares.mean(), rel=1e-3)
        assert fisher[name, k].low < fisher[name, k].value < fisher[name, k].high
    with torch.no_grad():
        loss = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in data) / 19
    assert base["loss"] == pytest.approx(loss, rel=1e-6)
    assert sum(c.forward for c in taylor.values()) == pytest.approx(19)
    assert sum(c.backward for c in taylor.values()) == pytest.approx(19)


def test_a_layer_without_gradients_scores_nan_not_zero():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                x = torch.relu(self.first(x))
            x = self.norm(self.grouped(x))
            return self.fc((x + self.shared(x)).mean((2, 3)))

    cells = by_key(gradients(made(Frozen), CANDIDATES, batches(), squared=False)[1])
    assert math.isnan(cells["first", 2].value)
    assert math.isfinite(cells["shared", 3].value)
    assert cells["shared", 3].value != 0


def test_a_layer_that_sees_other_images_than_the_batch_is_refused():
    class Folded(Net):
        def forward(self, x):
            return super().forward(x.reshape(-1, 3, 4, 8)).view(len(x), 2, 5).mean(1)

    model, data = made(Folded), batches()
    with pytest.raises(ValueError, match="first sees 14 images where the batch holds 7"):
        gradients(model, CANDIDATES, data, squared=False)
    assert len(list(oneshot(model, CANDIDATES, data)[1])) == 6
    with pytest.raises(ValueError, match="cannot be differentiated"):
        gradients(made(PreActivation), {"stem": (4,)}, batches(), squared=False)


def scored(model, data):
    with torch.no_grad():
        logits = [model(x).double() for x, _ in data]
    losses = [F.cross_entropy(z, y, reduction="none") for z, (_, y) in zip(logits, data, strict=True)]
    return torch.cat(losses), torch.cat(logits).log_softmax(1)


def recalibrated(model, inputs):
    """A copy whose statistics are the averages of what each batch gives, all layers in eval but BatchNorm."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    sums = {norm: [0.0, 0.0] for norm in norms}

    def collect(norm, args):
        x = args[0]
        sums[norm][0] = sums[norm][0] + x.mean((0, 2, 3)) / len(inputs)
        sums[norm][1] = sums[norm][1] + x.var((0, 2, 3), unbiased=True) / len(inputs)

    handles = [norm.register_forward_pre_hook(collect) for norm in norms]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for x in inputs:
            model(x)
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.eval()
        norm.running_mean, norm.running_var = sums[norm]
    return model


@pytest.mark.parametrize(("kind", "calibrated"), [(Net, False), (Net, True), (PreActivation, True)])
def test_oneshot_is_what_substitution_and_evaluation_give(kind, calibrated):
    model, data = made(kind), batches()
    candidates = CANDIDATES if kind is not PreActivation else {"stem": (4,), "side": (4, 2), "main": (5, 1)}
    inputs = [x for x, _ in batches(count=2, seed=2)] if calibrated else []
    state = copy.deepcopy(model.state_dict())
    base, cells = oneshot(copy.deepcopy(model), candidates, data, calibration=inputs)
    cells = by_key(cells)
    ready = recalibrated if calibrated else lambda model, inputs: model
    dense, log_p = scored(ready(model, inputs), data)
    assert base["loss"] == pytest.approx(dense.mean().item(), rel=1e-5)
    assert set(cells) == {(name, k) for name, ks in candidates.items() for k in ks}
    for (name, k), cell in cells.items():
        losses, log_q = scored(ready(substitute(model, {name: k}), inputs), data)
        change = losses - dense
        assert cell.value == pytest.approx(change.mean().item(), rel=1e-3, abs=2e-6)
        assert cell.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel=1e-3, abs=1e-7)
        assert (cell.high - cell.low) / 2 == pytest.approx(2.1009 * change.std().item() / math.sqrt(19), rel=1e-3)
        assert cell.n == 19
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, data = made(Net).to(dtype), [(x.to(dtype), y) for x, y in batches()]
    plain = by_key(oneshot(made(Net), CANDIDATES, batches())[1])
    own = by_key(oneshot(model, CANDIDATES, data)[1])
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    assert all(own[key].value == pytest.approx(plain[key].value, abs=tolerance) for key in plain)
    taylor = by_key(gradients(made(Net), CANDIDATES, batches(), squared=False)[1])
    own = by_key(gradients(model, CANDIDATES, data, squared=False)[1])
    assert all(own[key].value == pytest.approx(taylor[key].value, abs=tolerance) for key in plain)
    error = by_key(activation(made(Net), CANDIDATES, batches())[1])
    own = by_key(activation(model, CANDIDATES, data)[1])
    assert all(own[key].value == pytest.approx(error[key].value, abs=tolerance) for key in plain)


def test_weights_that_are_zero_and_outputs_of_a_large_mean():
    model = made(Net)
    with torch.no_grad():
        model.first.weight.zero_()
    assert by_key(spectrum(model, CANDIDATES)[1])["first", 2].value == 0
    model = nn.Sequential(nn.Conv2d(3, 8, 1)).eval()
    plain = by_key(activation(model, {"0": (4, 2)}, batches())[1])
    with torch.no_grad():
        model[0].bias += 300.0
    shifted = by_key(activation(model, {"0": (4, 2)}, batches())[1])
    assert shifted["0", 2].value == pytest.approx(plain["0", 2].value, rel=1e-3)
