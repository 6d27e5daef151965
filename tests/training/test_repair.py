import copy
import math

import pytest
import torch
from torch import nn

from basis import recalibrate
from basis.modules import evaluating
from tests.unusual import Fixed, Stuck


class Net(nn.Module):
    """Normalisation that is frozen, without affine, without momentum, without statistics, and never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bare = nn.BatchNorm2d(8, affine=False, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.BatchNorm1d(8)
        self.batchwise = nn.BatchNorm1d(8, track_running_stats=False)
        self.idle = nn.BatchNorm1d(4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.bare(self.second(x))).mean((2, 3))
        return self.fc(self.batchwise(self.flat(self.drop(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(32, 3, 6, 6))
    model.norm.requires_grad_(False).eval()
    model.idle.running_mean.fill_(3)
    return model


def test_statistics_become_the_plain_average_over_batches_and_nothing_else_changes(net):
    batches = [torch.randn(10, 3, 6, 6) + i for i in range(3)]
    before, flags = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    with torch.no_grad():
        maps = [net.conv(x) for x in batches]
        means = [y.mean((0, 2, 3)) for y in maps]
        variances = [y.var((0, 2, 3)) for y in maps]
    result = recalibrate(net, iter(batches))
    assert torch.allclose(net.norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(net.norm.running_var, torch.stack(variances).mean(0), atol=1e-6)
    assert [module.training for module in net.modules()] == flags
    assert (net.norm.momentum, net.bare.momentum) == (0.1, None)
    after = net.state_dict()
    kept = [name for name in after if torch.equal(after[name], before[name])]
    statistics = {
        f"{n}.{b}" for n in ("norm", "bare", "flat") for b in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(after) - set(kept) <= statistics
    assert "norm.running_mean" not in kept
    assert result.norms == ("norm", "bare", "flat")
    assert (result.batches, result.images) == (3, 30)
    assert result.skipped == {"batchwise": "it has no running statistics", "idle": "it was never called"}


def test_a_small_last_batch_counts_for_no_more_than_its_images():
    torch.manual_seed(0)
    x = torch.randn(41, 2, 4, 4)
    x[-1] += 100
    model = nn.Sequential(nn.BatchNorm2d(2))
    result = recalibrate(model, x.split(20))  # 20, 20, 1: the last is joined with the second
    assert (result.batches, result.images) == (3, 41)
    expected = torch.stack([part.mean((0, 2, 3)) for part in (x[:20], x[20:31], x[31:])]).mean(0)
    assert torch.allclose(model[0].running_mean, expected, atol=1e-5)
    assert recalibrate(model, [(x[:16], x[:16]), (x[16:24], x[16:24]), (x[24:], x[24:])]).batches == 3
    recalibrate(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(32)), x.split(20))  # a single sample has no variance


def test_where_it_fails_the_old_statistics_are_back(net):
    before = copy.deepcopy(net.state_dict())
    good = torch.randn(4, 3, 6, 6)
    for batches, words in (
        ([], "calibration holds no samples"),
        ([good, good * math.nan], "the statistics of norm, bare, flat are not finite"),
        ([good, good[:, :2]], "cannot run on inputs of shape"),
        ([good, "x"], "batch 1 of calibration is a str"),
    ):
        with pytest.raises(ValueError, match=words):
            recalibrate(net, batches)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert net.norm.momentum == 0.1
        assert not net.norm.training


def test_it_prints(net):
    assert recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3)), [torch.randn(2, 3, 5, 5)]).norms == ()
    result = recalibrate(net, [torch.randn(8, 3, 6, 6)])
    assert "left alone: idle" in str(result)


class Dropping(nn.BatchNorm2d):
    """Holds a dropout, as timm's ``BatchNormAct2d`` does, which has to rest."""

    def __init__(self, width):
        super().__init__(width)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x))


def turned_off(width):
    norm = nn.BatchNorm2d(width)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Stuck, "stay as they are"),
        (Fixed, "never called"),
        (turned_off, "stay as they are"),
        (lambda width: nn.InstanceNorm2d(width, track_running_stats=True), "stay as they are"),
    ],
)
def test_a_norm_that_does_not_train_keeps_its_statistics_and_is_named(kind, reason):
    torch.manual_seed(0)
    norm = kind(4)
    norm.running_mean.normal_()
    model = nn.Sequential(norm, Dropping(4), nn.BatchNorm2d(4)).train()
    norm.eval()
    before, flags = copy.deepcopy(norm.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(16, 4, 5, 5)
    with torch.no_grad():
        y = norm(x)
    result = recalibrate(model, [x])
    assert result.norms == ("1", "2")
    assert reason in result.skipped["0"]
    assert reason in str(result)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.allclose(model[1].running_mean, y.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[2].running_var, torch.full((4,), 1.0), atol=0.01)  # nothing was dropped


def test_statistics_that_are_not_finite_are_measured_anew():
    model, x = nn.Sequential(nn.BatchNorm2d(4)), torch.randn(16, 4, 5, 5)
    model[0].running_mean.fill_(math.nan)
    model[0].running_var.fill_(math.inf)
    recalibrate(model, [x])
    assert torch.allclose(model[0].running_mean, x.mean((0, 2, 3)), atol=1e-6)


class Merging(nn.Linear):
    """As the layers of LoRA do, it is turned back by ``train()`` alone."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("outer", [True, False])
def test_evaluation_ends_by_the_switch_that_each_module_has(outer):
    model = nn.Sequential(nn.Sequential(Merging(3, 3), nn.Dropout()), nn.Linear(3, 3)).train(outer)
    model[0].train()[1].eval()
    flags = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert model[0][0].merged
    assert [module.training for module in model.modules()] == flags
    assert not model[0][0].merged
