"""Plans: what they hold, which model they belong to, what stays dense and why."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import ao, nn

from basis.models import build
from basis.plan import Plan, plan_of
from basis.substitution import substitute
from basis.vision import import_torchvision

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{name}") for name in ("torch.jit", "quantize_per_tensor")]


def net(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 12, 3))


# -- what a plan holds ------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers(tmp_path):
    plan = Plan({"0": np.int64(4), "2": np.uint8(6)}, out_channels={"0": np.int32(8)})
    odd = nn.Sequential(nn.Conv2d(np.int64(3), np.int64(8), 3))
    for one, layers in ((plan, {"0": 4, "2": 6}), (Plan.uniform(odd, ratio=np.float32(0.5)), {"0": 4})):
        one.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").layers == one.layers == layers
    assert substitute(net(), {"0": np.int64(4)}, init="random")[0].basis_channels == 4


@pytest.mark.parametrize("size", ["32", 4.0, 0.5, True, None, 0, -1, [4], np.float32(4), np.bool_(True), "no:1"])
def test_what_is_no_size_is_refused_with_the_layer(size):
    with pytest.raises(ValueError, match=r"plan for 0: "):
        substitute(net(), {"0": size})


@pytest.mark.parametrize("plan", ["plan.json", [("0", 4)], 4, {"layers"}])
def test_what_is_no_mapping_is_refused(plan):
    with pytest.raises(TypeError, match="must map names"):
        substitute(net(), plan)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"basis_plan": 2}, "version is 2"), ({"mood": 1}, "mood"), ({"layers": [["0", 4]]}, "must map"),
        ({"layers": {"0": "32"}}, "plan for 0"), ({"layers": {"0": 4.0}}, "plan for 0"),
        ({"layers": {"0": None}}, "plan for 0"), ({"out_channels": {"0": "many"}}, "many"),
        ({"out_channels": None}, "must map"), ({"skipped": []}, "must map"),
        (b"", ""), (b"\xff\xfe", ""), (b'{"basis_plan": 1, "lay', ""), (b"null", ""), (b"[" * 100_000, ""),
        (b"[1]", ""), (b'{"basis_plan": 1}', ""),
    ],
)  # fmt: skip
def test_a_plan_file_with_wrong_content_is_refused(content, says, tmp_path):
    path = tmp_path / "plan.json"
    Plan.uniform(net(), ratio=0.5).save(path)
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"plan\.json holds no plan.*{says}"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        Plan.load(tmp_path / "absent.json")


# -- which model it belongs to ----------------------------------------------------------------------


def test_a_plan_of_a_model_of_another_width_is_refused_by_name(tmp_path):
    plan = Plan.uniform(net(16), ratio=0.25)
    plan.save(tmp_path / "plan.json")
    for one in (plan, Plan.load(tmp_path / "plan.json"), plan_of(substitute(net(16), plan))):
        for width in (8, 4):  # where k is by chance the width here
            with pytest.raises(ValueError, match=rf"another model: C_out of 0 is 16 there and {width} here"):
                substitute(net(width), one)
    other_head = Plan({"0": 4}, out_channels={"0": 8, "2": 1000})
    assert plan_of(substitute(net(8), other_head)).layers == {"0": 4}


@pytest.mark.parametrize(
    ("prefix", "wrap"), [("module.", nn.DataParallel), ("_orig_mod.", lambda m: nn.ModuleDict({"_orig_mod": m}))]
)
def test_plans_fit_with_and_without_wrappers(prefix, wrap):
    bare, plan = net(), Plan.uniform(net(), ratio=0.5)
    theirs = Plan.uniform(wrap(bare), ratio=0.5)
    assert list(theirs.layers) == [f"{prefix}{name}" for name in plan.layers]
    assert plan_of(substitute(bare, theirs)) == plan
    assert plan_of(substitute(wrap(bare), plan)).layers == theirs.layers
    assert plan_of(substitute(nn.Sequential(wrap(bare)), {"0.2": 4})).layers == {f"0.{prefix}2": 4}
    with pytest.raises(ValueError, match="another model: C_out of 0"):
        substitute(net(16), theirs)


# -- what stays dense -------------------------------------------------------------------------------


def size_of(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mobilenet_v2", {"ratio": 0.75, "multiple": 8}),
        ("mobilenet_v2", {"layer": "tucker:0.9"}),
        ("efficientnet_b0", {"ratio": 0.25, "coefficients": "low_rank:1/8"}),
        ("mnasnet0_5", {"ratio": 0.5, "coefficients": "grouped:8"}),
    ],
)
def test_at_no_ratio_does_a_network_or_a_layer_grow(name, more):
    with torch.device("meta"):
        model = import_torchvision().models.get_model(name)
    for options in ({"ratio": 0.5}, more):
        plan = Plan.uniform(model, **options)
        small = substitute(model, plan, init="random", coefficients=options.get("coefficients", "dense"))
        assert plan.layers
        assert size_of(small) < size_of(model)
        assert all(size_of(small.get_submodule(n)) <= size_of(model.get_submodule(n)) for n in plan.layers)
    left = model.get_submodule(next(n for n, why in Plan.uniform(model, ratio=0.5).skipped.items() if "larger" in why))
    grown = substitute(left, {"": left.out_channels // 2}, init="random")
    assert size_of(grown) > size_of(left)  # a plan of the user's does what it says


def quantised():
    layer = ao.nn.quantized.Conv2d(8, 8, 3)
    layer.set_weight_bias(torch.quantize_per_tensor(torch.ones(8, 8, 3, 3), 0.1, 0, torch.qint8), torch.ones(8))
    return layer


def holding(change):
    conv = nn.Conv2d(8, 8, 3)
    conv.weight = nn.Parameter(change(conv.weight.detach()), requires_grad=False)
    return conv


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (quantised, "quantized"),
        (lambda: ao.nn.qat.Conv2d(8, 8, 3, qconfig=ao.quantization.get_default_qat_qconfig("x86")), "quantized"),
        (lambda: torch.jit.script(nn.Conv2d(8, 8, 3)), "scripted or traced"),
        (lambda: torch.jit.trace(nn.Conv2d(8, 8, 3), torch.zeros(1, 8, 5, 5)), "scripted or traced"),
        (lambda: nn.Conv2d(8, 8, 3, dtype=torch.complex64), "complex64"),
        (lambda: holding(torch.Tensor.char), "int8"),
        (lambda: holding(torch.Tensor.to_sparse), "sparse"),
    ],
)
def test_convolutions_of_other_kinds_have_a_reason(make, says):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make())
    plan = Plan.uniform(model, ratio=0.5)
    assert plan.layers == {"0": 4}
    assert says in plan.skipped["1"]
    assert says in plan_of(model).skipped["1"]
    assert "1" in str(plan)
    with pytest.raises(ValueError, match=f"names 1, which cannot be substituted: .*{says}"):
        substitute(model, {"1": 4})


def test_sharded_weights_have_a_reason(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(holding(lambda weight: distribute_tensor(weight, mesh, [Replicate()])))
        assert "DTensor" in Plan.uniform(model, ratio=0.5).skipped["0"]
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = net()
    model[2].weight.data[0, 0, 0, 0] = value
    for options in ({"ratio": 0.5}, {"plan": {"2": 4}}, {"layer": "tucker:0.5"}):
        with pytest.raises(ValueError, match="2 has weights that are not finite"):
            substitute(model, **options)
    assert plan_of(substitute(model, ratio=0.5, init="random")).layers
    assert plan_of(substitute(model, {"0": 4})).layers


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "no convolution"),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv3d(3, 8, 3)), "Conv1d.*; Conv3d"),
        (lambda: torch.jit.script(net()), "scripted or traced"),
        (lambda: torch.jit.trace(net(), torch.zeros(1, 3, 9, 9)), "scripted or traced"),
        (lambda: torch.jit.freeze(torch.jit.script(net().eval())), "scripted or traced"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), "depthwise"),
    ],
)
def test_where_nothing_is_substituted_a_warning_says_why(make, says):
    for options in ({"ratio": 0.5}, {"layer": "tucker:0.5"}):
        with pytest.warns(UserWarning, match=f"nothing was substituted: .*{says}"):
            substitute(make(), **options)


def test_where_all_is_left_out_a_warning_says_so_but_an_empty_plan_is_silent():
    with pytest.warns(UserWarning, match=r"excluded by '\*'"):
        substitute(net(), ratio=0.5, exclude="*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        substitute(nn.Linear(2, 2), Plan({}))
        substitute(build("resnet20", width=4), ratio=0.5, init="random")
