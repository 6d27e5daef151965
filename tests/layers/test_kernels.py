"""The Triton kernels against plain formulas in float64, with bounds on the rounding error.

On a GPU they run as they are. Without one they run in Triton's interpreter, which has to be switched on before Triton
is imported: one test runs this whole file again in a process of its own, so that no other test sees the switch.
"""

import os
import subprocess
import sys

import pytest
import torch

from basis.layers import kernels

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here; test_in_the_interpreter runs this"
)
on_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (  # P, k, C
    (1, 1, 10),
    (7, 8, 64),
    (300, 24, 130),
    (1000, 64, 10),
    (300, 100, 64),
    (1000, 1, 130),
    (129, 256, 100),
)


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


def gated(dout, out):
    return dout.double() if out is None else dout.double() * (out > 0)


def assert_within(actual, expected, bound):
    """|actual - expected| <= bound, element by element."""
    excess = ((actual.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"off by {excess:.3g} more than rounding explains"


def rounding(dtype, terms):
    """Relative to the sum of the magnitudes: a factor and the result rounded to dtype, and float32 sums."""
    return 2 * torch.finfo(dtype).eps + terms * 2**-24


def assert_moments(z):
    """Bounds: sums in float32 with few terms each, and on a GPU factors rounded to tf32 for low precision."""
    mean, covariance = kernels.moments(z)
    assert mean.dtype == covariance.dtype == torch.float32
    exact = z.double()
    deviation = exact.std(0, correction=0)
    tf32 = 2**-10 if z.is_cuda and z.dtype != torch.float32 else 0
    assert_within(mean, exact.mean(0), 2**-20 * deviation + 2**-23 * exact.mean(0).abs())
    centred = exact - exact.mean(0)
    # the shift is within three deviations of the mean, so numbers are (1 + 3^2) times as large as the variance
    bound = 10 * (2**-20 + tf32) * torch.outer(deviation, deviation)
    assert_within(covariance, centred.T @ centred / len(z), bound)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "k", "C"), SHAPES)
def test_moments(P, k, C, dtype):
    assert_moments(maps(P, k, dtype))


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_with_a_mean_of_100_deviations(dtype):
    assert_moments(maps(3000, 24, dtype, mean=100.0))


@runs
def test_moments_of_rows_in_order():
    """Neither the first rows nor those of any chunk are like the others."""
    z = maps(3000, 8, torch.float32)
    assert_moments(z + 50 * torch.arange(3000, device=DEVICE)[:, None] / 3000)


@runs
@pytest.mark.parametrize(("with_residual", "relu"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "k", "C"), SHAPES)
def test_apply(P, k, C, dtype, with_residual, relu):
    z, weight, bias = maps(P, k, dtype), small(C, k), small(C)
    residual = maps(P, C, dtype) if with_residual else torch.zeros(P, C, dtype=dtype, device=DEVICE)
    out = kernels.apply(z, weight, bias, residual if with_residual else None, relu)
    assert out.dtype == dtype
    exact = z.double() @ weight.double().T + bias + residual
    magnitude = z.double().abs() @ weight.double().abs().T + bias.abs() + residual.abs()
    assert_within(out, exact.relu() if relu else exact, rounding(dtype, k) * magnitude)


@runs
def test_relu_keeps_nan():
    z = torch.full((3, 8), torch.nan, device=DEVICE)
    assert kernels.apply(z, small(10, 8), small(10), None, True).isnan().all()


@runs
@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "k", "C"), SHAPES)
def test_gradient_sums(P, k, C, dtype, with_out):
    z, dout, mean = maps(P, k, dtype), maps(P, C, dtype), small(k)
    out = maps(P, C, dtype).relu() if with_out else None
    total, moment = kernels.gradient_sums(dout, out, z, mean)
    assert total.dtype == moment.dtype == torch.float32
    dO = gated(dout, out)
    assert_within(total, dO.sum(0), 2**-20 * dO.abs().sum(0))
    magnitude = dO.abs().T @ z.double().abs() + torch.outer(dO.abs().sum(0), mean.double().abs())
    assert_within(moment, dO.T @ (z.double() - mean), 2**-20 * magnitude)


@runs
@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "k", "C"), SHAPES)
def test_input_gradient(P, k, C, dtype, with_out):
    z, dout = maps(P, k, dtype), maps(P, C, dtype)
    weight, quadratic, constant = small(C, k), small(k, k), small(k)
    out = maps(P, C, dtype).relu() if with_out else None
    dz = kernels.input_gradient(dout, out, z, weight, quadratic, constant)
    assert dz.dtype == dtype
    dO = gated(dout, out)
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
def test_two_calls_give_the_same_bits():
    args = arguments(P=30_000 if DEVICE == "cuda" else 1000, C=10)
    assert_same(everything(*args), everything(*args))


@runs
def test_rows_may_lie_apart():
    args = arguments()
    apart = [torch.nn.functional.pad(m, (3, i))[:, 3 : 3 + m.shape[1]] for i, m in enumerate(args[:3])]
    assert len({m.stride(0) for m in (*args[:3], *apart)}) == 5
    assert_same(everything(*apart, *args[3:]), everything(*args))


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
def test_opaque_to_the_compiler():
    args = arguments(P=50)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*args), everything(*args))


@runs
def test_operators_are_declared_correctly():
    z, dout, out, weight, bias, quadratic, constant = arguments(P=20)
    ops = torch.ops.basis
    torch.library.opcheck(ops.moments.default, (z,))
    torch.library.opcheck(ops.apply.default, (z, weight, bias, dout, True))
    torch.library.opcheck(ops.apply.default, (z, weight, bias, None, False))
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


# -- wrong input --------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": lambda z: z.double()}, "must be float32, bfloat16 or float16"),
        ({"z": lambda z: z[None]}, r"must be \(P, k\)"),
        ({"z": lambda z: z[:0]}, "P >= 1"),
        ({"z": lambda z: z.repeat(1, 33)}, "k <= 256"),
        ({"z": lambda z: z.T.contiguous().T}, "the second must be 1"),
        ({"dout": lambda d: d.float()}, "dout is .* it must be .* torch.bfloat16"),
        ({"dout": lambda d: d[:-1]}, r"dout is \(6, 10\).* it must be \(7, 10\)"),
        ({"dout": lambda d: d.T.contiguous().T}, "dout has strides"),
        ({"out": lambda d: d[:, :-1]}, r"out is \(7, 9\).* it must be \(7, 10\)"),
        ({"weight": lambda w: w.bfloat16()}, "weight is .* it must be .* torch.float32"),
        ({"weight": lambda w: w.T}, r"weight is \(8, 10\).* it must be \(10, 8\)"),
        ({"quadratic": lambda q: q[1:]}, r"quadratic is \(7, 8\).* it must be \(8, 8\)"),
        ({"constant": lambda c: c[None]}, r"constant is \(1, 8\).* it must be \(8,\)"),
    ],
)
def test_wrong_input(change, message):
    names = ("z", "dout", "out", "weight", "bias", "quadratic", "constant")
    args = dict(zip(names, arguments(P=7, k=8, C=10), strict=True))
    args = {name: change.get(name, lambda t: t)(value) for name, value in args.items()}
    del args["bias"]
    with pytest.raises(ValueError, match=message):
        kernels.input_gradient(**args)
    assert kernels.usable(args["z"]) == ("z" not in change)


@runs
def test_wrong_input_of_the_others():
    z, dout, out, weight, bias, _, constant = arguments(P=7, k=8, C=10)
    with pytest.raises(ValueError, match="bias is"):
        kernels.apply(z, weight, bias[1:], None, True)
    with pytest.raises(ValueError, match="residual is"):
        kernels.apply(z, weight, bias, dout.float(), True)
    with pytest.raises(ValueError, match="mean is"):
        kernels.gradient_sums(dout, out, z, constant.double())
    with pytest.raises(ValueError, match="k <= 256"):
        kernels.moments(z.repeat(1, 40))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes a CPU's tensors")
def test_not_usable_on_a_cpu():
    z = torch.zeros(3, 8)
    assert not kernels.usable(z)
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        kernels.moments(z)


def test_not_usable_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.usable(torch.zeros(3, 8, device=DEVICE if torch.cuda.is_available() else "cpu"))
