"""Where the time of a step goes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from basis.bench.parts import PARTS, bench_parts, by_part


def event(*names, kernels=(), microseconds=0):
    """What the profiler tells of the first of the names, which runs within the others."""
    parent = event(*names[1:]) if names[1:] else None
    return SimpleNamespace(
        name=names[0], device_type=DeviceType.CPU, cpu_parent=parent, self_cpu_time_total=microseconds,
        kernels=[SimpleNamespace(name=name, duration=duration) for name, duration in kernels],
    )  # fmt: skip


def kernel(name, microseconds, **more):
    spent = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=spent, **more)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("aten::cudnn_convolution", "aten::conv2d"), "convolution"),
        (("aten::copy_", "aten::to", "aten::conv2d"), "convolution"),
        (
            ("aten::convolution_backward", "ConvolutionBackward0", "autograd::engine: ConvolutionBackward0"),
            "convolution",
        ),
        (("aten::add_", "autograd::engine::evaluate_function: ConvolutionBackward0"), "other"),
        (("aten::mm", "aten::matmul", "aten::linear"), "mixing"),
        (("aten::mm", "MmBackward0", "autograd::engine: MmBackward0"), "mixing"),
        (("aten::mm", "AddmmBackward0"), "other"),
        (("aten::addmm", "aten::linear"), "other"),
        (("aten::cudnn_batch_norm", "aten::batch_norm"), "normalisation"),
        (("aten::cudnn_batch_norm_backward", "CudnnBatchNormBackward0"), "normalisation"),
        (("aten::clamp_min", "aten::relu"), "normalisation"),
        (("aten::add",), "normalisation"),
        (("aten::add", "autograd::engine: AddBackward0"), "other"),
        (("aten::mul", "_NormaliseBackward"), "normalisation"),
        (("aten::_fused_sgd_", "Optimizer.step#SGD.step"), "optimizer"),
        (("aten::nll_loss_forward",), "other"),
    ],
)
def test_kernels_are_told_apart_by_the_operation_that_launched_them(names, part):
    launched = event(*names, kernels=[("void some_conv_kernel", 3)])
    sums = by_part([launched, kernel("void some_conv_kernel", 3)], gpu=True)
    assert {name: n for name, n in sums.items() if n} == {part: 3}


def test_kernels_of_triton_are_normalisation_and_spans_are_no_kernels():
    span = "Optimizer.step#SGD.step"
    events = [
        event("aten::mm", "aten::linear", kernels=[("nvjet", 2)]), kernel("nvjet", 2),
        event("_Fused", kernels=[("_outer_sums", 5)]), kernel("_outer_sums", 5), kernel("_affine", 7),
        event(span, kernels=[(span, 100)]), kernel(span, 100, is_user_annotation=True), kernel("Memset", 1),
    ]  # fmt: skip
    sums = by_part(events, gpu=True)
    assert {name: n for name, n in sums.items() if n} == {"mixing": 2, "normalisation": 12, "other": 1}


def test_every_part_of_a_step_is_reported(setting):
    report = bench_parts(model="resnet20", width=4, ratios=[0.5], setting=replace(setting, memory_format="contiguous"))
    networks = dict.fromkeys((row["mode"], row["ratio"], row["norms"]) for row in report.rows)
    assert list(networks) == [
        ("dense", 1.0, "ordinary"), ("dense", 1.0, "fused"), ("auto", 0.5, "fused"), ("auto", 0.5, "through_basis"),
    ]  # fmt: skip
    assert [row["part"] for row in report.rows] == list(PARTS) * 4
    assert report.kind == "bench-parts"
    for i in range(0, len(report.rows), len(PARTS)):
        some = report.rows[i : i + len(PARTS)]
        assert sum(row["share"] for row in some) == pytest.approx(1)
        assert sum(row["ms"] for row in some) == pytest.approx(some[0]["step_ms"])
        assert all(row["ms"] > 0 for row in some if row["part"] != "mixing" or row["mode"] == "auto")
