"""What ``nn.Conv2d`` offers, option by option, and what becomes of it in libraries that factorize convolutions.

Each option is a layer whose weight has rank k. Replaced by one with k basis filters it must compute the same; so
must the peers' at their full rank. The peers were run by us on a CPU with torch 2.15, at the commits in
:data:`PEERS`; their verdicts are quoted from there and not measured again here. :func:`check_option` measures ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from basis.layers.conv import BasisConv2d
from basis.substitution import Plan, substitute

# Column -> repository and commit.
PEERS = {
    "AIMET spatial SVD": "quic/aimet c51b284",
    "AIMET weight SVD": "quic/aimet c51b284",
    "tltorch Tucker": "tensorly/torch 25c915d",
    "torchprune": "lucaslie/torchprune 14b392c",
    "fasterai Tucker, SVD": "FasterAI-Labs/fasterai 868348e",
    "fasterai spatial, CP": "FasterAI-Labs/fasterai 868348e",
}
FINE = "ok"


@dataclass(frozen=True)
class Option:
    """An option of a convolution of 8 to 12 channels (both 8 where ``groups`` is 8), and the ``peers``' verdicts.

    ``peers`` stand in the order of :data:`PEERS`. ``arguments`` are those of ``nn.Conv2d``; kernel_size is 3 and
    padding 1 where it is not given.
    """

    name: str
    arguments: Mapping[str, Any]
    peers: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def conv(self) -> nn.Conv2d:
        """The convolution, with a weight of rank :attr:`rank` in each group."""
        given = {"kernel_size": 3, "padding": 1} | dict(self.arguments)
        groups = given.get("groups", 1)
        conv: nn.Conv2d = nn.Conv2d(8, 8 if groups == 8 else 12, dtype=torch.float64, **given)
        width = conv.out_channels // groups
        if width > 1:
            rows = conv.weight.detach().view(groups, width, -1)
            k = self.rank // groups
            mixing = torch.cat([torch.eye(k), torch.rand(width - k, k) - 0.5]).to(rows)
            conv.weight = nn.Parameter((mixing @ rows[:, :k]).view_as(conv.weight))
        return conv.to(self.dtype)

    @property
    def rank(self) -> int:
        """The rank k of the weight: the sum of those of its groups."""
        groups = self.arguments.get("groups", 1)
        return groups if groups > 1 else 4


WRONG, FALSE, SHAPE = "wrong", "wrong by 30 %", "wrong shape"
NONE = "left dense"
OPTIONS = (
    Option("plain", {}, (FINE, FINE, FINE, FINE, FINE, WRONG)),
    Option("no bias", {"bias": False}, (FINE, FINE, FINE, FINE, FINE, WRONG)),
    Option("kernel (3, 5)", {"kernel_size": (3, 5)}, (FINE, FINE, FINE, FINE, FINE, WRONG)),
    Option("stride (2, 1)", {"stride": (2, 1)}, (FINE, FINE, SHAPE, FINE, FINE, WRONG)),
    Option("dilation 2", {"dilation": 2}, ("AssertionError", FINE, FINE, FINE, FINE, SHAPE)),
    Option("groups 4", {"groups": 4}, ("RuntimeError", "RuntimeError", "RuntimeError", "AssertionError", NONE, NONE)),
    Option(
        "depthwise",
        {"groups": 8},
        ("RuntimeError", "wrong by 400 %", "RuntimeError", "AssertionError", NONE, NONE),
    ),
    Option(
        "padding 'same'",
        {"padding": "same"},
        ("TypeError", FINE, "AssertionError", "TypeError", FINE, "TypeError"),
    ),
    Option("padding_mode 'reflect'", {"padding_mode": "reflect"}, (FALSE, FALSE, FALSE, FINE, FALSE, WRONG)),
    Option("1x1", {"kernel_size": 1, "padding": 0}, (FINE, FINE, FINE, FINE, NONE, NONE)),
    Option("float64", {}, ("RuntimeError", FINE, FINE, FINE, FINE, WRONG), torch.float64),
    Option(
        "bfloat16",
        {},
        ("TypeError", "TypeError", "NotImplementedError", "not tried", "NotImplementedError", "NotImplementedError"),
        torch.bfloat16,
    ),
)


def check_option(option: Option) -> str:
    """``"ok"`` where a basis convolution of k filters computes what the layer does, else what is wrong.

    Where the layer is left dense: ``"left dense"`` and the reason. Ok means: the same output up to rounding,
    the same dtype and memory format; flags, frozen parameters and hooks kept; nothing shared with the original.
    """
    torch.manual_seed(0)
    model = nn.Sequential(option.conv()).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    if reason := Plan.uniform(model, ratio=0.5).skipped.get("0"):
        return f"{NONE}: {reason}"
    small = substitute(model, {"0": option.rank})
    layer: Any = small[0]  # type: ignore[index]
    x = torch.randn(2, 8, 9, 7).to(option.dtype).to(memory_format=torch.channels_last)
    y, expected = small(x), model(x)
    if y.shape != expected.shape:
        return SHAPE
    error = float((y.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= 8 * torch.finfo(option.dtype).eps:
        return f"{WRONG} by {error:.2g}"
    kept = {
        "basis filters": isinstance(layer, BasisConv2d) and layer.basis_channels == option.rank,
        "dtype": y.dtype == expected.dtype,
        "memory format": y.stride() == expected.stride(),
        "evaluation mode": not layer.training,
        "frozen parameters": not any(p.requires_grad for p in layer.parameters()),
        "hook": len(seen) == 2,
        "storage of its own": {p.data_ptr() for p in layer.parameters()}.isdisjoint(
            p.data_ptr() for p in model.parameters()
        ),
    }
    lost = [name for name, fine in kept.items() if not fine]
    return f"lost: {', '.join(lost)}" if lost else FINE


def options_table() -> pd.DataFrame:
    """One row per option: ours, measured now, and the peers', as quoted."""
    rows = [{"basis": check_option(option)} | dict(zip(PEERS, option.peers, strict=True)) for option in OPTIONS]
    return pd.DataFrame(rows, index=pd.Index([option.name for option in OPTIONS], name="option"))
