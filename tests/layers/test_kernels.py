"""The Triton kernels against plain formulas in float64, with bounds on the rounding error.

On a GPU they run as they are. Without one they run in Triton's interpreter, which has to be switched on before Triton
is imported: one test runs this file again in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from basis.layers import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here; test_in_the_interpreter runs this"
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")

# P, k, C, dtype, whether there is an output (a gate, a residual)
CASES = (
    (1, 1, 10, torch.float32, True),
    (7, 8, 64, torch.bfloat16, False),
    (300, 24, 130, torch.float16, True),
    (200, 100, 64, torch.float32, False),
    (129, 256, 100, torch.bfloat16, True),
    (1000, 1, 130, torch.float16, False),
)
cases = pytest.mark.parametrize(("P", "k", "C", "dtype", "gated"), CASES)


@pytest.mark.weekly
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps(rows, channels, dtype, *, mean=0.5):
    return (torch.randn(rows, channels) + mean).to(DEVICE, dtype)


def small(*shape):
    return torch.randn(shape).to(DEVICE)


def before_relu(dout, out):
    return dout.double() if out is None else dout.double() * (out > 0)


def assert_within(actual, expected, bound):
    """|actual - expected| <= bound, element by element."""
    excess = ((actual.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"off by {excess:.3g} more than rounding explains"


def rounding(dtype, terms):
    """Relative to the sum of the magnitudes: a factor and the result rounded to dtype, and float32 sums."""
    return 2 * torch.finfo(dtype).eps + terms * 2**-24


@runs
@cases
def test_moments(P, k, C, dtype, gated):
    """Bounds: sums in float32 with few terms each, and on a GPU factors rounded to tf32 for low precision."""
    z = maps(P, k, dtype, mean=100.0 if P == 300 else 0.5)  # also a mean of 100 deviations
    z = z + 50 * torch.arange(P, device=DEVICE)[:, None] / P if P == 1000 else z  # and rows in order
    z = z.to(dtype)
    mean, covariance = kernels.moments(z)
    assert mean.dtype == covariance.dtype == torch.float32
    exact = z.double()
    deviation, centred = exact.std(0, correction=0), exact - exact.mean(0)
    tf32 = 2**-10 if z.is_cuda and z.dtype != torch.float32 else 0
    assert_within(mean, exact.mean(0), 2**-20 * deviation + 2**-23 * exact.mean(0).abs())
    # the shift is within three deviations of the mean, so numbers are (1 + 3^2) times as large as the variance
    bound = 10 * (2**-20 + tf32) * torch.outer(deviation, deviation)
    assert_within(covariance, centred.T @ centred / len(z), bound)


@runs
@cases
def test_apply(P, k, C, dtype, gated):
    z, weight, bias = maps(P, k, dtype), small(C, k), small(C)
    assert kernels.apply(z * torch.nan, weight, bias, None, True).isnan().all()
    residual = maps(P, C, dtype) if gated else None
    out = kernels.apply(z, weight, bias, residual, gated or P < 10)
    assert out.dtype == dtype
    residual = 0 if residual is None else residual.double()
    exact = z.double() @ weight.double().T + bias + residual
    magnitude = z.double().abs() @ weight.double().abs().T + bias.abs() + abs(residual)
    assert_within(out, exact.relu() if gated or P < 10 else exact, rounding(dtype, k) * magnitude)


@runs
@cases
def test_gradients(P, k, C, dtype, gated):
    z, dout, mean = maps(P, k, dtype), maps(P, C, dtype), small(k)
    weight, quadratic, constant = small(C, k), small(k, k), small(k)
    out = maps(P, C, dtype).relu() if gated else None
    total, moment = kernels.gradient_sums(dout, out, z, mean)
    assert total.dtype == moment.dtype == torch.float32
    dO = before_relu(dout, out)
    assert_within(total, dO.sum(0), 2**-20 * dO.abs().sum(0))
    magnitude = dO.abs().T @ z.double().abs() + torch.outer(dO.abs().sum(0), mean.double().abs())
    assert_within(moment, dO.T @ (z.double() - mean), 2**-20 * magnitude)
    dz = kernels.input_gradient(dout, out, z, weight, quadratic, constant)
    assert dz.dtype == dtype
    exact = dO @ weight.double() - z.double() @ quadratic.double() + constant
    magnitude = dO.abs() @ weight.double().abs() + z.double().abs() @ quadratic.double().abs() + constant.abs()
    assert_within(dz, exact, rounding(dtype, C + k) * magnitude)


def everything(z, dout, out, weight, bias, quadratic, constant):
    mean, covariance = kernels.moments(z)
    return (
        mean,
        covariance,
        kernels.apply(z, weight, bias, dout, True),
        *kernels.gradient_sums(dout, out, z, mean),
        kernels.input_gradient(dout, out, z, weight, quadratic, constant),
    )


def arguments(P=700, k=24, C=40, dtype=torch.bfloat16):
    z, dout, out = maps(P, k, dtype), maps(P, C, dtype), maps(P, C, dtype).relu()
    return z, dout, out, small(C, k), small(C), small(k, k), small(k)


def assert_same(actual, expected):
    """Bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@runs
def test_two_calls_and_rows_that_lie_apart_give_the_same_bits():
    args = arguments(P=30_000 if DEVICE == "cuda" else 700)
    expected = everything(*args)
    assert_same(everything(*args), expected)
    apart = [torch.nn.functional.pad(m, (3, i))[:, 3 : 3 + m.shape[1]] for i, m in enumerate(args[:3])]
    assert len({m.stride(0) for m in (*args[:3], *apart)}) == 5
    assert_same(everything(*apart, *args[3:]), expected)


@runs
def test_more_than_2_to_the_31_elements():
    z, dout, out, *matrices = arguments(P=3, k=8, C=8)
    try:  # 4.3 GB, of which a CPU only uses the pages that are written
        apart = torch.empty(2**31 + 8, dtype=z.dtype, device=DEVICE).as_strided((3, 8), (2**30, 1))
    except RuntimeError:
        pytest.skip("not enough memory")
    expected = everything(z, dout, out, *matrices)
    for i, m in enumerate((z, dout, out)):
        maps_ = [z, dout, out]
        maps_[i] = apart.copy_(m)
        assert_same(everything(*maps_, *matrices), expected)


@runs
def test_operators_are_declared_correctly():
    z, dout, out, weight, bias, quadratic, constant = arguments(P=20)
    ops = torch.ops.basis
    torch.library.opcheck(ops.moments.default, (z,))
    torch.library.opcheck(ops.apply.default, (z, weight, bias, dout, True))
    torch.library.opcheck(ops.gradient_sums.default, (dout, out, z, constant))
    torch.library.opcheck(ops.input_gradient.default, (dout, None, z, weight, quadratic, constant))


@on_gpu
def test_cuda_graph():
    args, others = arguments(), arguments()
    everything(*args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything(*args)
    for a, b in zip(args, others, strict=True):
        a.copy_(b)
    graph.replay()
    assert_same(results, everything(*others))


@runs
@pytest.mark.parametrize(
    ("change", "good"),
    [
        (lambda z: z, True),
        (lambda z: z.double(), False),
        (lambda z: z[None], False),
        (lambda z: z[:0], False),
        (lambda z: z.repeat(1, 33), False),  # k above 256
        (lambda z: z.T.contiguous().T, False),
    ],
)
def test_what_is_usable(change, good):
    assert kernels.usable(change(maps(7, 8, torch.bfloat16))) == good
