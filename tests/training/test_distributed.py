"""Models under DistributedDataParallel: two processes on the CPU, each with half of a batch."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from basis import cost, couple, fold, merge, substitute, uncouple

WORLD = 2


class Net(nn.Module):
    """Convolutions with and without batch normalisation, with groups, frozen and called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.frozen = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.frozen(self.stem(x).relu())
        x = self.norm(self.conv(x)).relu()
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


def networks():
    torch.manual_seed(0)
    net = Net().double().train()
    made = {mode: substitute(net, ratio=0.5, mode=mode) for mode in ("factorized", "composed")}
    made |= {"shared": substitute(net, ratio=0.5, coefficients="shared"), "coupled": couple(made["factorized"])}
    made |= {"tucker": substitute(net, {"stem": "tucker:0.5", "conv": "tucker:0.5"})}
    return made


def batch():
    return torch.randn(2 * WORLD, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(network, images):
    network.zero_grad()
    network(images).square().mean().backward()
    module = getattr(network, "module", network)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def process(rank, folder):
    """What each process does; the first of them compares."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    halves = batch().chunk(WORLD)
    for name, network in networks().items():
        alone = [gradients(copy.deepcopy(network), half) for half in halves]
        wrapped = DistributedDataParallel(network)
        for _ in range(2):  # the second step finds the buckets that the first one ordered
            together = gradients(wrapped, halves[rank])
        expected = {key: (alone[0][key] + alone[1][key]) / WORLD for key in alone[0]}
        torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(merge(wrapped.module.eval())(halves[0]), network(halves[0]))
        sys.stdout.write(f"{name}\n")
    dist.destroy_process_group()


@pytest.mark.weekly
def test_gradients_are_the_averages_of_all_processes(tmp_path):
    code = "import sys; from tests.training.test_distributed import process; process(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[2]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root, stdout=-1, stderr=-1, text=True)
        for rank in range(WORLD)
    ]
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=400)
            assert worker.returncode == 0, err
            assert out.split() == list(networks())
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture
def wrapped(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield DistributedDataParallel(Net())
    dist.destroy_process_group()


def test_a_wrapped_model_is_refused_in_one_sentence(wrapped):
    """Its reducer would not see the new parameters, and the processes would silently drift apart."""
    for call in (lambda m: substitute(m, ratio=0.5), merge, couple, uncouple, fold):
        for model in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
                call(model)
    assert cost(wrapped, input_size=(3, 6, 6)).total == cost(wrapped.module, input_size=(3, 6, 6)).total


def test_a_coupled_model_whose_normalisation_was_synchronised_is_no_silent_error():
    net = couple(substitute(Net(), ratio=0.5))
    broken = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(RuntimeError, match="running_mean"):
        broken(x)
    torch.testing.assert_close(uncouple(broken)(x), net.eval()(x))  # which mends it
