"""Steps made fast train the same: kinds of steps, learning rates, checkpoints, and what is not supported."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import basis.training.loop
from basis import Switch
from basis.data import synthetic
from basis.training.loop import Kind, make_step, train
from basis.training.skipping import Skip
from basis.training.stepping import CudaCapture, Means, means_for
from tests.training.common import RECIPE, SEARCH, losses, network, same

DATA = synthetic(train=120, test=40, size=16)  # 6 steps an epoch
GRAPHED = dataclasses.replace(RECIPE, step="graphed")


class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph: repeats every operation on the same memory, numbers as they were.

    Unlike the real one it also runs what it captures, so the first repetition is left out.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.repeated = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.repeated += 1
        if self.repeated == 1:
            return
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """As on a GPU: fused SGD, and graphs, which are collected here."""
    found = []

    def capture(function):
        found.append(Tape())
        with found[-1]:
            function()
        return found[-1].replay

    make, sgd = make_step, torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: sgd(*args, **{**options, "fused": True}))
    monkeypatch.setattr(
        basis.training.loop, "make_step", lambda *args, **options: make(*args, **options, capture=capture)
    )
    graphed = {"graphed": Means(graphed=True)}
    monkeypatch.setattr(
        basis.training.loop, "means_for", lambda step, device: graphed.get(step, means_for(step, device))
    )
    return found


@pytest.mark.parametrize(
    ("form", "terms", "graphs"),
    [
        (None, {}, 1),
        ("dense", {"skip": Skip(basis_every=2, coefficients_every=3), "decorrelation": 0.01}, 5),
        ("dense", {"skip": Skip(alternate=True), "decay": "product"}, 2),
        ("sparse:1/2", {"precision": "bf16"}, 2),
        (None, {"precision": "fp16", "momentum": 0.0}, 1),
        (None, {"switch": Switch(**SEARCH)}, 2),
        (None, {"switch": Switch(**SEARCH, momentum="projected", teach=0.5), "precision": "bf16"}, 2),
    ],
    ids=str,
)
def test_graphs_train_the_same_bit_for_bit(tapes, form, terms, graphs):
    plain, graphed = network(form), network(form)
    expected = train(plain, DATA, dataclasses.replace(RECIPE, **terms), device="cpu")
    assert not tapes
    result = train(graphed, DATA, dataclasses.replace(GRAPHED, **terms), device="cpu")
    assert len(tapes) == graphs  # one for each kind of step
    assert sum(tape.repeated for tape in tapes) == 18
    assert same(plain, graphed)
    assert result.test == expected.test
    assert losses(result) == losses(expected)
    assert (expected.step, result.step) == ("eager", "graphed")
    assert result.setup_seconds > 0 == expected.setup_seconds


def test_an_overflow_is_handled_within_the_graph(tapes):
    """Steps whose scaled gradients overflow are left out, and the scale is halved; nobody asks the device."""
    scales = []
    for recipe in (GRAPHED, RECIPE):
        model = network("dense")
        step = basis.training.loop.make_step(model, dataclasses.replace(recipe, precision="fp16"), device="cpu")
        x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
        before = model.fc.weight.detach().clone()
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        step.optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()})
        for _ in range(30):
            step(x, y, Kind())
        scales.append(step.scaler.get_scale())
        assert not torch.equal(model.fc.weight, before)
        assert model.fc.weight.isfinite().all()
    assert scales[0] == scales[1] < 2.0**40


def test_a_model_that_waits_for_the_device_is_trained_eagerly(tapes):
    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            factor = 2.0 if x.sum().item() > 0 else 1.0
            return factor * self.inner(x)

    models = Waiting(), Waiting()
    train(models[0], DATA, RECIPE, device="cpu")
    result = train(models[1], DATA, GRAPHED, device="cpu")
    reason = "could not be graphed: operation not permitted when stream is capturing"
    assert result.step == f"eager ({reason})"
    assert same(*models)


def test_a_capture_that_fails_ends_all_graphs(tapes, monkeypatch):
    """Else the learning rates of the kinds that were captured before would stay as they were."""
    made = []

    def capture(function):
        if made:
            raise RuntimeError("out of memory")
        made.append(Tape())
        with made[0]:
            function()
        return made[0].replay

    monkeypatch.setattr(basis.training.stepping, "compiled", lambda model, last: model)
    monkeypatch.setattr(basis.training.loop, "means_for", lambda step, device: Means(compiled=True, graphed=True))
    model = network()
    step = make_step(model, dataclasses.replace(GRAPHED, weight_decay=0.0, momentum=0.0), device="cpu", capture=capture)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    for kind in ("one", "two"):
        assert str(step.means) == "compiled and graphed"
        step(x, y, Kind(settled=kind == "two"))
    assert str(step.means) == "compiled (could not be graphed: out of memory)"
    before = model.fc.weight.detach().clone()
    step.set_rates([0.0])
    step(x, y, Kind())
    assert torch.equal(model.fc.weight, before)
    step.set_rates([0.1])
    step(x, y, Kind())
    assert not torch.equal(model.fc.weight, before)


def test_a_capture_that_fails_names_its_cause_and_goes_back_to_the_stream(monkeypatch):
    """The contexts of torch: that of a graph stays on its stream where the end of the capture raises."""
    current, asked = ["main"], []

    @contextmanager
    def stream(to):
        before, current[0] = current[0], to
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def __init__(self, graph, pool, stream):
            asked.append((pool, stream))

        def __enter__(self):
            current[0] = asked[-1][1]

        def __exit__(self, *args):
            raise RuntimeError("operation failed due to a previous error during capture")

    fakes = {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device: f"of {device}", "CUDAGraph": object,
        "current_stream": lambda device: current[0], "stream": stream, "graph": Graph,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def waits():
        assert current == ["of cuda:1"]
        raise ValueError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CudaCapture(torch.device("cuda:1"))(waits)
    assert asked == [("pool", "of cuda:1")]
    assert current == ["main"]


@pytest.mark.parametrize(
    ("step", "device", "triton", "expected"),
    [
        (None, "cpu", False, "eager"), ("eager", "cuda", True, "eager"),
        ("fast", "cpu", True, "eager (on cpu compiling takes longer than a short training gains)"),
        ("compiled", "cpu", False, "compiled"), ("graphed", "cpu", True, "eager (CUDA graphs need a GPU, not cpu)"),
        ("graphed", "cuda", False, "graphed"), ("compiled", "cuda", False, "eager (torch.compile needs Triton)"),
        ("fast", "cuda", False, "graphed (torch.compile needs Triton)"), ("fast", "cuda", True, "compiled and graphed"),
    ],
)  # fmt: skip
def test_what_a_device_supports(step, device, triton, expected, monkeypatch):
    monkeypatch.setattr(basis.training.stepping, "has_triton", lambda: triton)
    assert str(means_for(step, torch.device(device))) == expected


def test_a_compiler_that_fails_is_named(monkeypatch):
    def compiled(model, channels_last):
        def network(x):
            model(x)  # batch normalisation has moved by now
            raise OSError("g++ is not there\n\nand more")

        return network

    monkeypatch.setattr(basis.training.stepping, "compiled", compiled)
    models = network(), network()
    train(models[0], DATA, RECIPE, device="cpu")
    result = train(models[1], DATA, dataclasses.replace(RECIPE, step="compiled"), device="cpu")
    assert result.step == "eager (could not be compiled: g++ is not there)"
    assert same(*models)


@pytest.mark.weekly
def test_compiled_training_is_the_same_up_to_rounding():
    """With the real compiler, and channels-last kept."""

    def model():
        torch.manual_seed(0)
        layer = basis.BasisConv2d(3, 8, 3, padding=1, ratio=0.5, mode="factorized")
        return nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(16), nn.Flatten(), nn.Linear(8, 10))

    models, recipe = (model(), model()), dataclasses.replace(RECIPE, lr=0.02, memory_format="channels_last")
    expected = train(models[0], DATA, recipe, device="cpu")
    result = train(models[1], DATA, dataclasses.replace(recipe, step="compiled"), device="cpu")
    assert result.step == "compiled"
    assert result.setup_seconds > 10 * result.train_seconds / result.steps
    assert result.test["loss"] == pytest.approx(expected.test["loss"], rel=1e-4)
    for ours, theirs in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.weekly
def test_more_networks_of_one_class_are_compiled_than_torch_allows(monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        basis.training.stepping, "compiled", lambda model, last: torch.compile(model, backend="aot_eager")
    )
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    for k in range(1, 11):
        model = nn.Sequential(basis.BasisConv2d(3, 16, 8, basis_channels=k), nn.Flatten())
        step = make_step(model, dataclasses.replace(RECIPE, step="compiled"), device="cpu")
        step(x, y)
    assert counters["stats"]["unique_graphs"] == 10
    torch._dynamo.reset()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize(
    ("step", "precision", "form", "terms"),
    [
        ("graphed", "fp32", None, {}),
        ("compiled", "bf16", None, {}),
        ("fast", "bf16", "dense", {"skip": Skip(basis_every=2, rescale=True), "decorrelation": 0.01}),
        ("graphed", "fp16", "sparse:1/2", {}),
    ],
    ids=str,
)
def test_on_a_gpu(step, precision, form, terms):
    """Sums are in another order there from run to run, so only the course of the training is compared."""
    recipe = dataclasses.replace(RECIPE, lr=0.02, precision=precision, **terms)
    models = network(form), network(form)
    expected = train(models[0], DATA, dataclasses.replace(recipe, step="eager"), device="cuda")
    result = train(models[1], DATA, dataclasses.replace(recipe, step=step), device="cuda")
    assert result.step == {"fast": "compiled and graphed"}.get(step, step)
    assert losses(result) == pytest.approx(losses(expected), rel=0.02)
    assert losses(expected)[-1] < losses(expected)[0]
