"""Networks by name, and weights from files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from basis.compression.networks import build_network, load_weights
from tests import tiny


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture
def state():
    """Weights of which none is as the factory makes it."""
    return {name: value + 1 for name, value in tiny.network().state_dict().items()}


def test_a_factory_gets_the_number_of_classes_if_it_takes_it(tmp_path, monkeypatch):
    assert build_network("tests.tiny:network", classes=5)[-1].out_features == 5
    assert isinstance(build_network("torch.nn:ReLU", classes=5), nn.ReLU)
    (tmp_path / "my_own_net.py").write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 8, 3)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_network("my_own_net:make", classes=3), nn.Conv2d)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.tiny:netwrk", "netwrk"),
        ("tests.tiny:no_network", "returns a str"),
        ("tests.tiny:needs_an_argument", "width"),
        ("tests.tiny:exits", "SystemExit"),
        ("timm/resnet10", "near it are .*resnet10t"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_network(name, classes=3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "optimizer": {"state": {}}},
        lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"n_averaged": torch.tensor(2), **{f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
    ids=["plain", "checkpoint", "parallel", "lightning, compiled", "averaged", "without counters"],
)
def test_weights_are_found_in_what_wraps_them(tmp_path, state, wrap):
    model = tiny.network()
    load_weights(model, saved(tmp_path, wrap(state)))
    for name, value in model.state_dict().items():
        assert "num_batches" in name or torch.equal(value, state[name])


def test_safetensors_are_known_by_their_content(tmp_path, state):
    save_file(state, tmp_path / "weights.bin")
    model = tiny.network()
    load_weights(model, tmp_path / "weights.bin")
    assert torch.equal(model[0].weight, state["0.weight"])


def test_weights_that_do_not_fit_are_named(tmp_path, state):
    changed = state | {"0.weight": torch.zeros(16, 3, 5, 5), "stem": state["5.weight"]}
    with pytest.raises(ValueError, match=r"(?s)stem.*0.weight.*\[16, 3, 5, 5\]"):
        load_weights(tiny.network(), saved(tmp_path, changed))
    with pytest.raises(ValueError, match=r"\[7, 32\]"):
        load_weights(tiny.network(), saved(tmp_path, tiny.network(7).state_dict()))
    state["0.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0.weight .* not finite"):
        load_weights(tiny.network(), saved(tmp_path, state))


def test_weights_of_infinite_size_are_named_but_a_mask_may_be_infinite(tmp_path):
    model = tiny.network()
    model.register_buffer("mask", torch.tensor([-torch.inf]))
    load_weights(model, saved(tmp_path, model.state_dict()))
    with pytest.raises(ValueError, match=r"5.weight .* not finite"):
        load_weights(model, saved(tmp_path, model.state_dict() | {"5.weight": model[5].weight.detach() / 0}))


def test_files_without_weights_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("these are no weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    for content in (tiny.network(), [1, 2], {"epoch": 3}):  # the first would run code
        with pytest.raises(ValueError, match=r"weights.pt"):
            load_weights(tiny.network(), saved(tmp_path, content))
    for name in ("gone.pt", ".", "notes.txt", "cut.safetensors"):
        with pytest.raises(ValueError, match=r"no file of weights|not readable"):
            load_weights(tiny.network(), tmp_path / name)
