"""Files of ONNX and torch.export, which are run and compared with the model."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from basis import BasisConv2d
from basis.export import export_onnx, export_program
from basis.layers.conv import MODES
from tests.test_inference import FORMS, Branch, difference, network, shape
from tests.unusual import UNUSUAL, Drifts, Pitch, Two, made

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
class TestRefusals:
    def test_what_makes_no_sense_or_cannot_be_exported(self, export, onnx, tmp_path):
        class Noisy(nn.Module):
            def forward(self, x):
                return x + torch.rand_like(x)

        class Keys(nn.Module):
            def forward(self, x):
                return [3]

        for model, size, batch, error, says in (
            (nn.Conv2d(3, 2, 3), (3, 8, 8), 2.0, ValueError, "batch is"),
            (nn.Conv2d(3, 2, 3), (4, 8, 8), 1, ValueError, "cannot be run on inputs of .* 3 channels"),
            (Keys(), (3, 8), 1, ValueError, "returns a list without a tensor"),
            (Noisy(), (3, 8, 8), "dynamic", RuntimeError, "differs from the model"),
            (Branch(nn.Identity()), (3, 8, 8), "dynamic", RuntimeError, "Branch cannot be exported"),
        ):
            with pytest.raises(error, match=says):
                export(model, tmp_path / "net", size, batch=batch)
        assert list(tmp_path.iterdir()) == []


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


def names_of(onnx, path):
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@pytest.mark.parametrize("batch", ["dynamic", np.int64(2)])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_programs_of_networks_that_take_and_give_something_else(kind, batch, tmp_path):
    model, x = made(kind)
    assert export_program(model, tmp_path / "net.pt2", inputs=x, batch=batch).error < 1e-5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Pitch, (["frames"], ["logits"])),
        (Two, (["image", "tokens"], ["match", "image_output", "words"])),
        (Drifts, (["images"], ["logits"])),
    ],
)
def test_onnx_of_networks_that_take_and_give_something_else(kind, names, onnx, tmp_path):
    model, x = made(kind)
    assert export_onnx(model, tmp_path / "net.onnx", inputs=x).error < 1e-5
    assert names_of(onnx, tmp_path / "net.onnx") == names


def test_keyword_inputs_in_another_order(onnx, tmp_path):
    model, (image, tokens) = made(Two)
    inputs = {"tokens": tokens, "image": image}
    assert export_onnx(model, tmp_path / "net.onnx", inputs=inputs).error < 1e-5
    assert names_of(onnx, tmp_path / "net.onnx")[0] == ["tokens", "image"]
    assert export_program(model, tmp_path / "net.pt2", inputs=inputs).error < 1e-5
    program = torch.export.load(tmp_path / "net.pt2").module()
    expected = model(image[:1], tokens[:1])
    assert difference(program(tokens=tokens[:1], image=image[:1])["match"], expected["match"]) < 1e-5


def test_inputs_are_used_as_they_are_and_left_as_they_were(tmp_path):
    model, x = made(Drifts)
    before = x.clone()
    export_program(model, tmp_path / "net.pt2", inputs=x)
    assert torch.equal(x, before)
    wide = torch.export.load(tmp_path / "net.pt2").module()
    assert wide(torch.zeros(7, 3, 9, 8)).shape == (7, 16)  # the number of samples is open


class Several(nn.Module):
    def forward(self, *xs):
        masked = xs[0].masked_fill(xs[0] > 0, -torch.inf)
        return [masked, (xs[1].argmax(1), None)]


def test_any_number_of_inputs_and_outputs_also_infinite_ones(onnx, tmp_path):
    x = (torch.randn(2, 4), torch.randn(2, 5))
    assert export_onnx(Several(), tmp_path / "net.onnx", inputs=x).error == 0
    assert names_of(onnx, tmp_path / "net.onnx")[1] == ["output_0", "output_1"]
    assert export_program(Several(), tmp_path / "net.pt2", inputs=x).error == 0


class Constant(nn.Module):
    def forward(self, x):
        return 2 * x, torch.tensor(3.0), x.shape[0]


def test_outputs_that_a_format_cannot_hold_are_refused_in_words(onnx, tmp_path, capfd):
    with pytest.raises(RuntimeError, match="the file gives outputs of"):
        export_onnx(Constant(), tmp_path / "net.onnx", (4,))
    assert capfd.readouterr() == ("", "")
    assert export_program(Constant(), tmp_path / "net.pt2", (4,)).error == 0


class Half(nn.Module):
    """One output of two is random."""

    def __init__(self, *, bad):
        super().__init__()
        self.bad = bad

    def forward(self, x):
        return x, self.bad(x)


@pytest.mark.parametrize(
    "bad",
    [torch.rand_like, lambda x: x / 0 * 0, lambda x: torch.complex(x, torch.rand_like(x))],
    ids=["random", "no number", "complex"],
)
def test_every_output_is_compared_as_a_whole(bad, tmp_path):
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_program(Half(bad=bad), tmp_path / "net.pt2", (4,))
    assert not list(tmp_path.iterdir())


def test_both_kinds_of_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one of"):
        export_program(nn.Linear(3, 2), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="give one of"):
        export_program(nn.Linear(3, 2), tmp_path / "net.pt2", (3,), inputs=torch.ones(1, 3))
