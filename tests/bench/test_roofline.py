from dataclasses import replace

import pytest
import torch

from basis.bench.cases import Setting, Shape
from basis.bench.roofline import (
    Machine,
    kernels,
    measure_machine,
    predicted,
)

BOTH = "forward+backward"

# MB of one forward and of one backward pass at batch 1024 in bf16, tabulated by an independent program
# (dense, cat, factorized, composed).
TABLE = {
    ("64@32", 8): ("269/537", "554/621", "302/604", "269/537"),
    ("64@32", 16): ("269/537", "570/705", "336/671", "269/537"),
    ("64@32", 32): ("269/537", "604/872", "403/805", "269/537"),
    ("64@32", 48): ("269/537", "638/1040", "470/940", "269/537"),
    ("128@16", 32): ("135/269", "285/352", "168/336", "135/270"),
    ("256@8", 64): ("68/137", "143/177", "84/168", "69/140"),
    ("512@4", 128): ("38/77", "73/91", "43/86", "43/89"),
}


@pytest.fixture
def machine():
    return Machine(device="cuda", precision="bf16", threads=1, macs_per_second=100.0, bytes_per_second=10.0)


def moved(shape, k, mode, passes):
    """Bytes at batch 1024 in bf16."""
    return 2 * sum(kernel.values for kernel in kernels(Shape.parse(shape), k, mode, batch_size=1024, passes=passes))


@pytest.mark.parametrize(("shape", "k"), TABLE)
def test_bytes_are_those_of_the_table(shape, k):
    found = []
    for mode in ("dense", "cat", "factorized", "composed"):
        forward = moved(shape, k, mode, "forward")
        both = moved(shape, k, mode, BOTH)
        found.append(f"{forward / 1e6:.0f}/{(both - forward) / 1e6:.0f}")
    assert tuple(found) == TABLE[shape, k]


def test_the_kernels_multiply_what_the_layer_does():
    shape = Shape.parse("64-128@33/2")  # 17 x 17 pixels come out
    k, f, c, pixels = 32, 576, 128, 4 * 17 * 17
    expected = {
        "dense": pixels * c * f,
        "factorized": pixels * k * (f + c),
        "composed": pixels * c * f + (c - k) * k * f,
        "cat": pixels * k * (f + c - k),
    }
    for mode, macs in expected.items():
        for passes, times in (("forward", 1), (BOTH, 3)):
            found = sum(kernel.macs for kernel in kernels(shape, k, mode, batch_size=4, passes=passes))
            assert found == times * macs


def test_the_time_of_a_mode_is_the_sum_over_its_kernels(machine):
    shape, options = Shape.parse("4@4"), {"batch_size": 1, "passes": "forward"}
    first, second = kernels(shape, 2, "factorized", **options)
    assert machine.ridge == 10
    machine = replace(machine, bytes_per_second=40.0)
    assert first.macs / 100 > 2 * first.values / 40  # bound by arithmetic
    assert second.macs / 100 < 2 * second.values / 40  # bound by memory
    expected = first.macs / 100 + 2 * second.values / 40
    assert predicted(shape, 2, "factorized", **options, bytes_per_value=2, machine=machine) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k is 0, but must lie between 1 and C_out = 4"),
        ({"k": 5}, "k is 5"),
    ],
)
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        kernels(Shape.parse("4@4"), **{"k": 2, "mode": "dense", "batch_size": 1, "passes": "forward", **options})


@pytest.mark.parametrize(("convolving", "macs"), [(1000.0, 8**3 / 1.0), (1e-3, 3 * 2 * 16 * 16 * 9 * 2 / 1e-3)])
def test_a_machine_is_measured_by_its_quickest(convolving, macs):
    seconds = iter([5.0, 1.0, 2.0, convolving, convolving, 2 * convolving, 9.0, 4.0, 3.0])
    ran = []

    def timer(step):
        ran.append(step())
        return next(seconds)

    setting = Setting(device="cpu", precision="bf16", batch_size=3, timer=timer)
    machine = measure_machine(setting, side=8, copied=100, rounds=3)
    assert machine.macs_per_second == pytest.approx(macs)
    assert machine.bytes_per_second == 2 * 100 / 3
    assert machine.precision == "bf16"
    assert [tuple(result.shape) for result in ran] == [(8, 8)] * 3 + [(3, 2, 16, 16)] * 3 + [(100,)] * 3
    assert ran[0].dtype == torch.bfloat16
