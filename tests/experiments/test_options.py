"""The options of nn.Conv2d on which the peers fail: ours, row by row."""

import pytest
import torch

from basis.experiments import options
from basis.experiments.options import OPTIONS, PEERS, check_option, options_table

KNOWN = {"depthwise": "left dense: depthwise: one filter per group"}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_is_exact_or_left_with_its_reason(option):
    assert check_option(option) == KNOWN.get(option.name, "ok")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_layers_have_the_rank_that_is_said(option):
    conv = option.conv().double()
    blocks = conv.weight.detach().reshape(conv.groups, conv.out_channels // conv.groups, -1)
    tolerance = 0.05 if option.dtype == torch.bfloat16 else 1e-5
    assert int(torch.linalg.matrix_rank(blocks, rtol=tolerance).sum()) == option.rank


def test_the_check_sees_what_goes_wrong(monkeypatch):
    right = options.substitute

    def forgetful(model, plan):
        changed = right(model, plan)
        changed[0].padding_mode = "zeros"
        return changed

    reflect = next(option for option in OPTIONS if "reflect" in option.name)
    monkeypatch.setattr(options, "substitute", forgetful)
    assert check_option(reflect).startswith("wrong by ")
    monkeypatch.setattr(options, "substitute", lambda model, plan: right(model, plan).train())
    assert check_option(reflect) == "lost: evaluation mode"


def test_the_table_has_a_verdict_of_everybody_on_everything():
    table = options_table()
    assert list(table.columns) == ["basis", *PEERS]
    assert list(table.index) == [option.name for option in OPTIONS]
    assert table.map(lambda text: isinstance(text, str) and text != "").all(axis=None)
