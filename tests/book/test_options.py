"""The table of chapter 11: what becomes of each option of ``nn.Conv2d``; our column is measured here."""

import csv

import pytest
import torch
from torch import nn

from basis import BasisConv2d, Plan, substitute
from basis.environment import repository_root

OPTIONS = {
    "plain": {}, "no bias": {"bias": False}, "kernel (3, 5)": {"kernel_size": (3, 5)},
    "stride (2, 1)": {"stride": (2, 1)}, "dilation 2": {"dilation": 2}, "groups 4": {"groups": 4},
    "depthwise": {"groups": 8}, "padding 'same'": {"padding": "same"},
    "padding_mode 'reflect'": {"padding_mode": "reflect"}, "1x1": {"kernel_size": 1, "padding": 0},
    "float64": {"dtype": torch.float64}, "bfloat16": {"dtype": torch.bfloat16},
}  # fmt: skip
LINES = (repository_root() / "book" / "conv2d-options.csv").read_text().splitlines()
ROWS = {row["option"]: row for row in csv.DictReader(LINES[1:])}


def conv_of_rank(k, *, groups=1, dtype=torch.float32, **options):
    """A convolution of 8 to 12 channels (both 8 where depthwise) whose weight has rank k in each group."""
    conv = nn.Conv2d(8, 8 if groups == 8 else 12, **{"kernel_size": 3, "padding": 1, "groups": groups} | options)
    rows = conv.double().weight.detach().view(groups, conv.out_channels // groups, -1)
    rest = torch.rand(rows.shape[1] - k, k, dtype=torch.float64) - 0.5
    conv.weight = nn.Parameter(torch.cat([rows[:, :k], rest @ rows[:, :k]], 1).view_as(conv.weight))
    return conv.to(dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_our_column_is_true(name):
    torch.manual_seed(0)
    groups = OPTIONS[name].get("groups", 1)
    k = 1 if groups > 1 else 4
    conv = conv_of_rank(k, **OPTIONS[name]).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    seen = []
    conv.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(conv)
    if reason := Plan.uniform(model, ratio=0.5).skipped.get("0"):
        assert ROWS[name]["basis"] == f"left dense: {reason}"
        return
    layer = substitute(model, {"0": k * groups})[0]
    x = torch.randn(2, 8, 9, 7).to(conv.weight.dtype).to(memory_format=torch.channels_last)
    y, expected = layer(x), conv(x)
    assert ROWS[name]["basis"] == "ok"
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= 64 * torch.finfo(conv.weight.dtype).eps
    assert isinstance(layer, BasisConv2d)
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert len(seen) == 2


def test_everybody_has_a_verdict_on_every_option():
    assert set(ROWS) == set(OPTIONS)
    assert all(all(row.values()) for row in ROWS.values())
