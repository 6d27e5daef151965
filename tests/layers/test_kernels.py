"""The Triton kernels against the same layers in float64, and compiled for GPUs that are not here.

On a GPU they run as they are. Without one they run in Triton's interpreter, which has to be switched on before Triton
is imported: one test runs this file again in a process of its own.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from torch import nn

pytest.importorskip("triton")

import triton

from basis import BasisConv2d, couple
from basis.layers import fused, kernels, mixing_kernels, thin
from basis.layers.batchnorm import activate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here; test_in_the_interpreter runs this"
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
ahead = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
LAST = torch.channels_last


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps(n, channels, size, dtype=torch.float32, *, mean=0.0):
    return (torch.randn(n, channels, size, size) + mean).to(dtype).contiguous(memory_format=LAST)


class Block(nn.Module):
    def __init__(self, conv, norm, relu):
        super().__init__()
        self.conv, self.norm, self.relu = conv, norm, relu

    def forward(self, x, residual=None):
        return activate(self.norm, self.conv(x), residual, relu=self.relu)


def block(channels, k, *, relu=True, bias=False, **options):
    """A block whose normalisation is through the basis; ordinary for k = 0."""
    conv = nn.Identity()
    if k:
        conv = BasisConv2d(6, channels, 3, padding=1, bias=bias, basis_channels=k, mode="factorized")
    norm = nn.BatchNorm2d(channels, **options)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    whole = Block(conv, norm, relu).to(memory_format=LAST)
    return couple(whole) if k else whole


def outcome(model, x, residual, dout):
    """Output, gradients of everything, and running statistics after a step."""
    inputs = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    model.zero_grad()
    y = model(*inputs)
    y.backward(dout)
    found = {"y": y.detach(), "x": inputs[0].grad, "residual": inputs[-1].grad}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


def error(actual, exact):
    return ((actual.double().cpu() - exact).norm() / exact.double().norm().clamp_min(1e-30)).item()


# channels, k (0: ordinary), images, their size, mean of the input, dtype, options
CASES = (
    (10, 0, 3, 5, 100.0, torch.float32, {}),
    (130, 0, 2, 7, 0.5, torch.float16, {"affine": False}),
    (64, 0, 5, 11, 0.0, torch.bfloat16, {"track_running_stats": False}),
    (10, 3, 3, 5, 1.0, torch.float32, {"bias": True}),
    (130, 40, 2, 6, 0.5, torch.float16, {"momentum": 0.7}),
    (64, 16, 4, 9, 0.0, torch.bfloat16, {"affine": False}),
    (32, 20, 4, 6, 10.0, torch.float32, {"eps": 0.1}),
)


@runs
@pytest.mark.parametrize(("relu", "added"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("channels", "k", "n", "size", "mean", "dtype", "options"), CASES)
def test_a_step_is_that_in_float64(monkeypatch, channels, k, n, size, mean, dtype, options, relu, added):
    model = block(channels, k, relu=relu, **options)
    exact = copy.deepcopy(model).double()
    model = model.to(DEVICE)
    x = maps(n, 6 if k else channels, size, dtype, mean=mean)
    residual, dout = maps(n, channels, size, dtype) if added else None, maps(n, channels, size, dtype)
    expected = outcome(exact, *(t if t is None else t.double() for t in (x, residual, dout)))
    calls = []
    for module, name in ((kernels, "gradients"), (mixing_kernels, "mixing_gradients")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=whole, _n=name, **o: (calls.append(_n), _f(*a, **o))[1])
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        found = outcome(model, *(t if t is None else t.to(DEVICE) for t in (x, residual, dout)))
    assert calls == ["mixing_gradients" if k else "gradients"]
    assert found.keys() == expected.keys()
    # A pixel within rounding of zero may fall on the other side of the ReLU.
    bound = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    errors = {name: error(found[name], value) for name, value in expected.items() if value.double().norm() > 1e-9}
    assert not {name: e for name, e in errors.items() if not e < bound}


@runs
@pytest.mark.parametrize(("k", "channels", "size"), [(16, 64, 7), (16, 20, 33)])
def test_gradients_of_a_thin_convolution(k, channels, size):
    x, dz, filters = maps(2, channels, size, torch.float16), maps(2, k, size, torch.float16), maps(k, channels, 3)
    rounded = filters.half()
    exact = [t.double().requires_grad_() for t in (x, rounded)]
    F.conv2d(*exact, padding=1).backward(dz.double())
    x, filters = x.to(DEVICE).requires_grad_(), filters.to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, torch.float16):
        z = fused.convolve(x, filters, (1, 1), (1, 1), (1, 1), 1)
    assert "Thin" in type(z.grad_fn).__name__
    z.backward(dz.to(DEVICE))
    assert error(x.grad, exact[0].grad) < 1e-3
    assert error(filters.grad, exact[1].grad) < 1e-5
    assert filters.grad.dtype == torch.float32


@runs
@pytest.mark.parametrize("k", [0, 16])
def test_two_steps_give_the_same_bits(k):
    n = 64 if DEVICE == "cuda" else 4
    args = maps(n, 64, 9, torch.bfloat16), maps(n, 64, 9, torch.bfloat16), maps(n, 64, 9, torch.bfloat16)
    norm = nn.BatchNorm2d(64, track_running_stats=False).to(DEVICE)
    mixing = torch.randn(64, 16, device=DEVICE)

    def step():
        x, residual, dout = (t.to(DEVICE) for t in args)
        x = (x[:, :16].contiguous(memory_format=LAST) if k else x).requires_grad_()
        y = fused.mix_and_normalise(norm, x, mixing, None, residual, relu=True) if k else fused.normalise(norm, x)
        return y, torch.autograd.grad(y, x, dout)[0]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@runs
def test_nan_stays_nan_and_the_output_may_be_overwritten():
    model = block(10, 3).to(DEVICE)
    x = maps(2, 6, 5).to(DEVICE)
    assert model(x * torch.nan).isnan().all()
    norm = nn.BatchNorm2d(6).to(DEVICE)
    x = x.requires_grad_()
    fused.normalise(norm, x).relu_().sum().backward()
    assert x.grad.isfinite().all()


@runs
def test_what_the_kernels_do_not_do_is_left_to_pytorch():
    norm, x = nn.BatchNorm2d(6).to(DEVICE), maps(2, 6, 5).to(DEVICE)
    assert fused.suits(norm, x)
    assert not fused.suits(norm, x.double())
    assert not fused.suits(norm, x.contiguous())
    assert not fused.suits(norm, x[:0])
    assert not fused.suits(norm, x, x[:, :1])
    assert not fused.suits(nn.BatchNorm2d(6, momentum=None).to(DEVICE), x)
    assert not fused.suits(copy.deepcopy(norm).double(), x)
    assert not fused.suits(copy.deepcopy(norm).eval(), x)
    assert not fused.suits(nn.BatchNorm2d(6, eps=0).to(DEVICE), x)
    assert not fused.suits(nn.BatchNorm2d(6), x.to("meta"))
    for wrong in (torch.ones(3), torch.ones(6, 2)[:, 0], torch.ones(1).expand(6)):
        odd = copy.deepcopy(norm)
        odd.weight = nn.Parameter(wrong.to(DEVICE))
        assert not fused.suits(odd, x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not fused.suits(norm, x)
    assert not fused.suits(nn.BatchNorm2d(600).to(DEVICE), maps(1, 300, 2).to(DEVICE), basis_channels=300)


@runs
@pytest.mark.parametrize("k", [0, 16])
def test_an_outlier_in_the_first_pixel_and_kept_tensors_in_another_format(k):
    model, x = block(64, k).to(DEVICE), maps(8, 6 if k else 64, 16)
    x[0, :, 0, 0] += 1000
    exact, args = copy.deepcopy(model).double(), (maps(8, 64, 16), maps(8, 64, 16))
    expected = outcome(exact, *(t.double().to(DEVICE) for t in (x, *args)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):  # as when kept on a CPU
        found = outcome(model, *(t.to(DEVICE) for t in (x, *args)))
    assert not {n: e for n in ("y", "x", "norm.running_var") if (e := error(found[n], expected[n].cpu())) > 1e-3}


@runs
@pytest.mark.parametrize("k", [0, 3])
def test_second_derivatives_are_refused_in_words(k):
    y = block(10, k).to(DEVICE)(maps(2, 6 if k else 10, 5).to(DEVICE).requires_grad_())
    with pytest.raises(RuntimeError, match="no second derivatives; set BASIS_KERNELS=0"):
        y.sum().backward(create_graph=True)


@runs
def test_a_forward_of_its_own_is_called():
    norm = nn.BatchNorm2d(6).to(DEVICE)
    norm.forward = lambda x: x * 0 + 1
    assert (activate(norm, maps(2, 6, 5).to(DEVICE)) == 1).all()


@on_gpu
@pytest.mark.parametrize("k", [0, 16])
def test_cuda_graph(k):
    model = block(64, k).to(DEVICE)
    x, dout = maps(8, 6 if k else 64, 9).to(DEVICE).requires_grad_(), maps(8, 64, 9).to(DEVICE)

    def step():
        return torch.autograd.grad(model(x), x, dout)[0]

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    with torch.no_grad():
        x.copy_(maps(8, x.shape[1], 9))
    graph.replay()
    assert torch.allclose(result, step(), rtol=1e-3, atol=1e-4)


# -- compiled ahead of time, for GPUs that are not here ----------------------------------------------


def launches(monkeypatch, channels, k, capability):
    """(kernel, signature, constants, attributes, options) of every launch in a step, none of which is run."""
    found = []

    def record(kernel, *args, grid, warmup, **options):
        bound = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = bound[name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = "*" + kinds[value.dtype] if is_tensor else "i32" if isinstance(value, int) else "fp32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        found.append((kernel, signature, constants, attributes, chosen))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    low = {"dtype": torch.bfloat16}
    x, residual, vector = maps(64, channels, 8, **low), maps(64, channels, 8, **low), torch.ones(channels)
    statistics = kernels.Statistics(vector, vector, torch.zeros((), dtype=torch.long), 0.1)
    options = {"statistics": statistics, "eps": 1e-5, "relu": True}
    z, mixing = maps(64, k, 8, **low), torch.ones(channels, k)
    for other in (residual, None):
        out, state = kernels.normalise(x, vector, vector, other, **options)
        kernels.gradients(x, out, x, state, relu=True, residual=other is not None)
        out, mixed = mixing_kernels.mix_and_normalise(z, mixing, vector, vector, None, other, **options)
        mixing_kernels.mixing_gradients(x, out, z, mixing, vector, mixed, residual=other is not None)
    if k == 16 and capability >= 90:
        thin.gradients(z, x, maps(k, channels, 3, **low))
    return found


@ahead
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("channels", "k"), [(64, 16), (128, 64)])
def test_they_compile_for_gpus_without_spills(monkeypatch, tmp_path, channels, k, capability):
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    compiled = {}
    for kernel, signature, constants, attributes, options in launches(monkeypatch, channels, k, capability):
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=target, options=options)
        compiled[kernel.fn.__name__] = binary.metadata.shared
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        used = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
        assert re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", used) == [("0", "0")], kernel.fn.__name__
    assert len(compiled) == (10 if k == 16 and capability >= 90 else 9)
    assert max(compiled.values()) <= (163 if capability == 80 else 227) * 1024  # bytes of shared memory of a program
