import copy
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from basis.compression.networks import build_network, fit_weights, read_weights
from tests import tiny


def saved(tmp_path, content, name="weights.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def changed():
    """A network of which no tensor is as the factory makes it."""
    model = tiny.network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def test_a_factory_gets_the_number_of_classes_where_it_takes_it():
    assert build_network("tests.tiny:network", classes=5).model[-1].out_features == 5
    assert isinstance(build_network("torch.nn:ReLU", classes=5).model, nn.ReLU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.such.module:network", "the module 'no.such.module' cannot be imported: ModuleNotFoundError"),
        ("tests.tiny:netwrk", "tests.tiny has no 'netwrk'; near it are network"),
        ("tests.tiny:CLASSES", "is a tuple, but it must be a function that returns a network"),
        ("tests.tiny:no_network", "returns a str, but it must return a torch.nn.Module"),
        ("tests.tiny:needs_an_argument", "cannot be called: TypeError: .*'width'"),
        ("tests.tiny:fails", "cannot be called: RuntimeError: no such width"),
        (":network", "a factory is written package.module:factory"),
        ("tensorflow/resnet50", "before a / stands one of torchvision, timm"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        build_network(text, classes=3)


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 8, 3)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_network("my_own_net:make", classes=3).model, nn.Conv2d)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {"n_averaged": torch.tensor(2), **{f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["plain", "checkpoint", "with optimizer", "parallel", "lightning, compiled", "averaged"],
)
def test_states_are_taken_out_of_what_wraps_them_and_it_is_said(tmp_path, wrap):
    model, wanted = tiny.network(), changed().state_dict()
    notes = fit_weights(model, read_weights(saved(tmp_path, wrap(wanted))), "weights.pt", classes=3)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in wanted.items())
    assert bool(notes) == (wrap(wanted) is not wanted)


def test_safetensors_are_known_by_their_content(tmp_path):
    wanted = changed().state_dict()
    save_file(wanted, tmp_path / "weights.bin")
    model = tiny.network()
    assert fit_weights(model, read_weights(tmp_path / "weights.bin"), "weights.bin", classes=3) == ()
    assert torch.equal(model[0].weight, wanted["0.weight"])


def test_weights_in_half_precision_are_said_to_be_read_as_single(tmp_path):
    path = saved(tmp_path, changed().half().state_dict())
    assert "read float16 as float32" in fit_weights(tiny.network(), read_weights(path), path, classes=3)


def test_counters_of_batch_normalisations_may_be_missing(tmp_path):
    state = {name: value for name, value in changed().state_dict().items() if "num_batches" not in name}
    fit_weights(tiny.network(), read_weights(saved(tmp_path, state)), "weights.pt", classes=3)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = changed().state_dict()
    state["0.weight"] = torch.zeros(16, 3, 5, 5)
    state["stem.weight"] = state.pop("5.weight")
    with pytest.raises(ValueError, match="do not fit the network") as error:
        fit_weights(tiny.network(), read_weights(saved(tmp_path, state)), "weights.pt", classes=3)
    assert "5.weight is missing from the file" in str(error.value)
    assert "stem.weight is in the file but not in the model" in str(error.value)
    assert "0.weight is (16, 3, 5, 5) in the file, but (16, 3, 3, 3) in the model" in str(error.value)


def test_weights_of_another_number_of_classes(tmp_path):
    path = saved(tmp_path, tiny.network(7).state_dict())
    with pytest.raises(ValueError, match=r"of a network of 7 classes, but the data have 3"):
        fit_weights(tiny.network(), read_weights(path), path, classes=3)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("these are no weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    broken = copy.deepcopy(tiny.network())
    with torch.no_grad():
        broken[0].weight[0, 0, 0, 0] = torch.nan
    for path, message in [
        (tmp_path / "gone.pt", "there is no file of weights at"),
        (tmp_path, "there is no file of weights at"),
        (tmp_path / "notes.txt", "no file of weights"),
        (tmp_path / "cut.safetensors", "damaged or no file of weights"),
        (saved(tmp_path, tiny.network(), "whole.pt"), "holds more than tensors"),
        (saved(tmp_path, [1, 2], "list.pt"), "holds a list, but no state"),
        (saved(tmp_path, {"epoch": 3, "args": {"lr": 0.1}}, "args.pt"), "holds a dictionary of epoch, args, but no st"),
        (saved(tmp_path, broken.state_dict(), "nan.pt"), "values that are not finite: 0.weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_weights(path)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_networks_of_torchvision():
    network = build_network("resnet18", classes=3)
    assert network.model.fc.out_features == 3
    assert network.preparation is not None
    assert network.preparation.size == 224
    assert network.preparation.mean == (0.485, 0.456, 0.406)
    assert network.versions.keys() == {"torchvision"}
    with pytest.raises(ValueError, match=r"ha(s|ve) no such network; near it are .*resnet18"):
        build_network("resnet-18", classes=3)


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_networks_of_timm():
    network = build_network("timm/resnet10t.c3_in1k", classes=3)
    assert network.model.num_classes == 3
    assert network.preparation is not None
    assert network.preparation.size == network.model.pretrained_cfg["input_size"][-1]
    assert network.preparation.interpolation == network.model.pretrained_cfg["interpolation"]


def test_without_libraries_it_is_said_how_to_install_them(monkeypatch):
    def absent(library):
        raise ModuleNotFoundError(f"{library} is not installed", name=library)

    monkeypatch.setattr("basis.compression.networks._imported", absent)
    with pytest.raises(ValueError, match=r"not installed.*pip install torchvision timm.*package.module:factory"):
        build_network("resnet18", classes=3)


def test_weights_that_are_no_ordinary_numbers_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    state = tiny.network().state_dict()
    for value, said in (
        (state["0.weight"].to_sparse(), r"0.weight \(sparse_coo\), but dense tensors of 16 bits or more are read"),
        (state["0.weight"].to(torch.float8_e4m3fn), r"0.weight \(float8_e4m3fn\)"),
        (state["0.weight"].to("meta"), "the meta device"),
    ):
        torch.save(state | {"0.weight": value}, path)
        with pytest.raises(ValueError, match=said):
            read_weights(path)
    torch.save(state | {"0.weight": state["0.weight"].to(torch.int8)}, path)
    with pytest.raises(ValueError, match=r"0.weight is torch.int8 in the file, which is no weight without its scale"):
        fit_weights(tiny.network(), read_weights(path), path, classes=3)


def test_a_module_that_exits_is_told_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "trainer_with_arguments.py").write_text("raise SystemExit(2)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be imported: SystemExit: 2"):
        build_network("trainer_with_arguments:net", classes=3)
