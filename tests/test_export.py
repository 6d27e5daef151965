"""Files of ONNX and torch.export, which are run and compared with the model."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from basis import BasisConv2d
from basis.export import export_onnx, export_program
from basis.inputs import with_samples
from basis.layers.conv import MODES
from tests.test_inference import FORMS, Branch, difference, network, shape
from tests.unusual import UNUSUAL, Drifts, Of, Pitch, Two, made

WEEKLY = (("resnet20", "pairs"), ("resnet18", "unfolded"), ("mobile", "dense"), ("resnet50", "pairs"))


@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


@pytest.mark.parametrize(
    ("name", "form"),
    [("mobile", "pairs"), *(pytest.param(*case, marks=pytest.mark.weekly) for case in WEEKLY)],
)
def test_networks_as_onnx(name, form, onnx, tmp_path, capfd):
    model = shape(network(name), form).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = export_onnx(model, tmp_path / "net.onnx", (3, 16, 16))
    assert capfd.readouterr() == ("", "")
    assert model.training  # a copy is exported
    assert done.error < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [0, 3, 16, 16]


@pytest.mark.parametrize(
    ("name", "form"),
    [("mobile", "unfolded"), *(pytest.param(*case, marks=pytest.mark.weekly) for case in WEEKLY)],
)
def test_networks_as_programs(name, form, tmp_path):
    model, x = shape(network(name), form), torch.randn(5, 3, 16, 16)
    assert export_program(model, tmp_path / "net.pt2", (3, 16, 16)).error < 1e-5
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert difference(program(x), model(x)) < 1e-5


def stack():
    """A basis convolution in every mode and form, one after the other."""
    torch.manual_seed(0)
    layers = [
        BasisConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=1, groups=groups), ratio=0.5, mode=mode, coefficients=form)
        for mode in MODES
        for form in FORMS
        for groups in ((1, 2) if mode == "factorized" else (1,))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


@pytest.mark.weekly
def test_every_mode_and_form_as_onnx(onnx, tmp_path):
    assert export_onnx(stack(), tmp_path / "stack.onnx", (8, 6, 6)).error < 1e-4


@pytest.mark.weekly
def test_every_mode_and_form_as_a_program():
    model, x = stack(), torch.randn(2, 8, 6, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for n in (1, 4):
        x = torch.randn(n, 8, 6, 6)
        assert difference(program(x), model(x)) < 1e-5


@pytest.mark.parametrize("export", [export_onnx, export_program])
@pytest.mark.parametrize(
    ("model", "size", "batch", "error", "says"),
    [
        (nn.Conv2d(3, 2, 3), (3, 8, 8), 2.0, ValueError, "batch is"),
        (nn.Conv2d(3, 2, 3), (4, 8, 8), 1, ValueError, "cannot be run on inputs of .* 3 channels"),
        (nn.Conv2d(3, 2, 3), None, 1, ValueError, "give one of"),
        (Of(lambda m, x: [3]), (3, 8), 1, ValueError, "returns a list without a tensor"),
        (Of(lambda m, x: x + torch.rand_like(x)), (3, 8), "dynamic", RuntimeError, "differs from the model"),
        (Branch(nn.Identity()), (3, 8, 8), "dynamic", RuntimeError, "Branch cannot be exported"),
    ],
)
def test_what_makes_no_sense_or_cannot_be_exported(export, model, size, batch, error, says, onnx, tmp_path):
    with pytest.raises(error, match=says):
        export(model, tmp_path / "net", size, batch=batch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [torch.rand_like, lambda x: x / 0 * 0, lambda x: torch.complex(x, torch.rand_like(x))])
def test_every_output_is_compared_as_a_whole(bad, tmp_path):
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_program(Of(lambda m, x: (x, bad(x))), tmp_path / "net.pt2", (4,))
    assert not list(tmp_path.iterdir())


def test_missing_packages(onnx, tmp_path, monkeypatch):
    model, path = nn.Conv2d(3, 2, 3), tmp_path / "net.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = export_onnx(model, path, (3, 8, 8))
    assert done.error is None
    assert path.exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        export_onnx(model, path, (3, 8, 8))


# -- inputs of other kinds --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["dynamic", np.int64(2)])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_programs_of_networks_that_take_and_give_something_else(kind, batch, tmp_path):
    (model, x), before = made(kind), str(made(kind)[1])
    assert export_program(model, tmp_path / "net.pt2", inputs=x, batch=batch).error < 1e-5
    assert str(x) == before
    program = torch.export.load(tmp_path / "net.pt2").module()
    if batch == "dynamic":  # the number of samples is open
        program(*with_samples(x if isinstance(x, tuple) else (x,), 7))


def masked(m, x, other):
    return [x.masked_fill(x > 0, -torch.inf), (other.argmax(1), None)]


IMAGE, TOKENS = made(Two)[1]


@pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (made(Pitch)[0], made(Pitch)[1], (["frames"], ["logits"])),
        (made(Drifts)[0], IMAGE, (["images"], ["logits"])),
        (made(Two)[0], {"tokens": TOKENS, "image": IMAGE}, (["tokens", "image"], ["match", "image_output", "words"])),
        (Of(masked), (torch.randn(2, 4), torch.randn(2, 5)), (["args_0", "args_1"], ["output_0", "output_1"])),
    ],
)
def test_onnx_of_networks_that_take_and_give_something_else(model, inputs, names, onnx, tmp_path):
    assert export_onnx(model, tmp_path / "net.onnx", inputs=inputs).error < 1e-5
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert tuple([value.name for value in values] for values in (graph.input, graph.output)) == names
    assert export_program(model, tmp_path / "net.pt2", inputs=inputs).error < 1e-5


def test_keyword_inputs_stay_keywords(tmp_path):
    model, (image, tokens) = made(Two)
    export_program(model, tmp_path / "net.pt2", inputs={"tokens": tokens, "image": image})
    program = torch.export.load(tmp_path / "net.pt2").module()
    found, expected = program(tokens=tokens[:1], image=image[:1]), model(image[:1], tokens[:1])
    assert difference(found["match"], expected["match"]) < 1e-5


def test_outputs_that_a_format_cannot_hold_are_refused_in_words(onnx, tmp_path, capfd):
    constant = Of(lambda m, x: (2 * x, torch.tensor(3.0), x.shape[0]))
    with pytest.raises(RuntimeError, match="the file gives outputs of"):
        export_onnx(constant, tmp_path / "net.onnx", (4,))
    assert capfd.readouterr() == ("", "")
    assert export_program(constant, tmp_path / "net.pt2", (4,)).error == 0
