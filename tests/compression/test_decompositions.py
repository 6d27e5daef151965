"""What other tools make of a trained convolution: exact at full rank, best at a smaller one, within the budget."""

import sys
from importlib import util

import pytest
import torch
from torch import nn

from basis.costs import count_parameters
from basis.decompositions import (
    FASTERAI,
    WORKER,
    NotInstalled,
    fasterai_network,
    fasterai_python,
    pair_of,
    svd_pairs,
    tensorly_conv,
    tensorly_network,
)

needs_tltorch = pytest.mark.skipif(util.find_spec("tensorly") is None, reason="needs tensorly-torch")

# The decomposer's interface, with the truncated SVD in place of its own methods.
STAND_IN = """
import copy, runpy, sys, types
import torch
from torch import nn

class Conv_Decomposer:
    def decompose(self, model, percent_removed, method, n_iter):
        if method == "broken":
            raise KeyError("no such method here")
        made = copy.deepcopy(model)
        for name, conv in list(made.named_children()):
            q = max(1, int((1 - percent_removed) * min(conv.in_channels, conv.out_channels)))
            first = nn.Conv2d(conv.in_channels, q, conv.kernel_size, conv.stride, conv.padding, bias=False)
            second = nn.Conv2d(q, conv.out_channels, 1, bias=False)
            u, s, v = torch.linalg.svd(conv.weight.data.flatten(1), full_matrices=False)
            first.weight.data = (s[:q, None] * v[:q]).reshape(q, *conv.weight.shape[1:])
            second.weight.data = u[:, :q, None, None]
            setattr(made, name, nn.Sequential(first, second))
        return made

for name in ("fasterai", "fasterai.misc", "fasterai.misc.conv_decomposer"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["fasterai.misc.conv_decomposer"].Conv_Decomposer = Conv_Decomposer
assert sys.argv[1] == "-I"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, bias=False),
    ).eval()  # fmt: skip


@pytest.fixture
def fasterai(tmp_path, monkeypatch):
    """A Python of another environment, with a stand-in for the package."""
    script, python = tmp_path / "stand_in.py", tmp_path / "python"
    script.write_text(STAND_IN)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(FASTERAI, str(python))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"stride": (2, 1), "padding": (1, 2)},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_a_pair_of_full_rank_is_the_convolution(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(pair_of(conv, 6)(x), conv(x), atol=1e-5, rtol=1e-4)


def test_a_pair_is_the_best_of_its_rank():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    first, second = pair_of(conv, 2)
    weight = torch.einsum("oq,qihw->oihw", second.weight[:, :, 0, 0], first.weight)
    tail = torch.linalg.svdvals(conv.weight.flatten(1))[2:].square().sum()
    torch.testing.assert_close((weight - conv.weight).square().sum(), tail, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("q", "groups", "says"), [(0, 1, "between 1 and 6"), (7, 1, "and 6"), (1, 2, "groups = 2")])
def test_a_pair_that_makes_no_sense_is_refused(q, groups, says):
    with pytest.raises(ValueError, match=says):
        pair_of(nn.Conv2d(4, 6, 3, groups=groups), q)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_pairs_meet_the_budget_as_nearly_as_one_rank_allows(share):
    model = network()
    wanted = int(share * count_parameters(model))
    small = svd_pairs(model, wanted, ["0"])
    assert wanted - (9 * 24 + 32) <= count_parameters(small) <= wanted  # a step of the common fraction is one rank
    assert type(small[0]) is nn.Conv2d
    assert isinstance(small[3], nn.Sequential)
    assert type(model[3]) is nn.Conv2d  # the given model is left alone


def test_a_budget_that_no_common_size_meets_is_refused():
    with pytest.raises(ValueError, match=r"the fewest that one setting .* leaves, which is above 500"):
        svd_pairs(network(), 500)


def test_a_layer_to_leave_alone_must_be_there():
    with pytest.raises(ValueError, match="exclude has stem, but no convolution has such a name"):
        svd_pairs(network(), 5000, ["stem"])


@needs_tltorch
def test_tensorly_decomposes_the_weight_it_is_given():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(tensorly_conv(conv, 10**6)(x), conv(x), atol=1e-4, rtol=1e-3)


@needs_tltorch
def test_tensorlys_network_meets_the_budget():
    model = network()
    wanted = count_parameters(model) // 2
    small = tensorly_network(model, wanted, ["0", "5"])
    assert 0.9 * wanted < count_parameters(small) <= wanted
    assert [type(small[i]) is nn.Conv2d for i in (0, 3, 5, 7)] == [True, False, True, False]


def test_without_tensorly_it_is_said_what_brings_it(monkeypatch):
    monkeypatch.setattr("basis.decompositions.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match="pip install tensorly tensorly-torch"):
        tensorly_conv(nn.Conv2d(8, 8, 3), 400)


def test_weights_go_to_another_environment_and_come_back(fasterai):
    model = network()
    wanted = count_parameters(model) // 2
    small = fasterai_network(model, wanted, ["0"])
    assert wanted - (9 * 24 + 32) <= count_parameters(small) <= wanted
    assert [type(small[i]) is nn.Conv2d for i in (0, 3, 5, 7)] == [True, False, True, False]  # 1x1 is left alone
    rank = small[3][0].out_channels
    there = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(small[3](there), pair_of(model[3], rank)(there), atol=1e-5, rtol=1e-4)


def test_what_fails_in_the_other_environment_is_told(fasterai):
    with pytest.raises(RuntimeError, match=r"fasterai failed: .*no such method here"):
        fasterai_network(network(), 5000, method="broken")
    with pytest.raises(ValueError, match="fasterai cannot go down to"):
        fasterai_network(network(), count_parameters(network()[1]) + 24 * 24 + 24 + 24 + 100)


def test_without_fasterai_it_is_said_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(FASTERAI, raising=False)
    monkeypatch.setattr("basis.decompositions.util.find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=f"an environment of its own .* set {FASTERAI}="):
        fasterai_python()
    monkeypatch.setenv(FASTERAI, str(tmp_path / "python"))
    with pytest.raises(NotInstalled, match="is no file"):
        fasterai_python()


def test_the_worker_needs_nothing_of_this_package():
    assert "import basis" not in WORKER.read_text()
    assert "from basis" not in WORKER.read_text()
