"""substitute, merge, plans, save and load: what is kept, what is named, what is refused."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from basis.costs import count_parameters
from basis.inference import fold
from basis.layers.batchnorm import BasisBatchNorm2d, couplings
from basis.layers.conv import MODES, BasisConv2d
from basis.models import build
from basis.storage import load, save
from basis.substitution import Plan, merge, plan_of, substitute

C_IN, C_OUT, K = 8, 12, 4

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """Two convolutions, a normalisation and a head."""

    def __init__(self, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, C_IN, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(C_IN)
        self.conv2 = nn.Conv2d(C_IN, C_OUT, **({"kernel_size": 3} | options))
        self.fc = nn.Linear(C_OUT, 5)

    def forward(self, x):
        return self.fc(self.conv2(self.bn1(self.conv1(x)).relu()).mean((-2, -1)))


def images(n=2):
    return torch.randn(n, 3, 9, 7)


def lower_rank(conv, k=K):
    """Make the weight of ``conv`` one that k basis filters hold exactly."""
    with torch.no_grad():
        rows = conv.weight.view(conv.groups, conv.out_channels // conv.groups, -1)
        k //= conv.groups
        u, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
        rows.copy_((u[..., :k] * s[:, None, :k]) @ vh[:, :k])


def assert_same(ours, expected, tolerance=0.0):
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- the acceptance matrix: every option, at the rank the weight has ----------------------------

OPTIONS = (
    {"bias": False, "kernel_size": (3, 5)}, {"stride": (2, 1), "dilation": 2}, {"groups": 4}, {"padding": "same"},
    {"padding": "same", "kernel_size": 2}, {"padding": "valid"}, {"padding": (2, 0)},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular"}, {"kernel_size": 1},
)  # fmt: skip


@pytest.mark.parametrize(("options", "mode"), list(zip(OPTIONS, MODES * len(OPTIONS), strict=False)))
def test_at_full_rank_the_network_is_the_same(options, mode):
    model = Net(**options).double()
    lower_rank(model.conv2)
    small = substitute(model, {"conv2": K}, mode=mode)
    assert isinstance(small.conv2, BasisConv2d)
    x = images().double()
    assert_same(small(x), model(x), 1e-10)
    assert_same(merge(small)(x), model(x), 1e-10)


# -- what is kept -------------------------------------------------------------------------------


def test_the_model_given_is_left_alone():
    model = Net()
    before, modules = state_of(model), list(model.modules())
    small = substitute(model, ratio=0.5)
    for parameter in small.parameters():
        nn.init.zeros_(parameter)
    dense = merge(small)
    for parameter in dense.parameters():
        nn.init.ones_(parameter)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((p == 0).all() for p in small.parameters())


@pytest.mark.parametrize("init", ["svd", "random"])
def test_flags_and_formats_are_kept(init):
    model = Net().half().to(memory_format=torch.channels_last)
    model.conv2.eval()
    model.conv2.weight.requires_grad_(False)
    model.conv1.bias.requires_grad_(False)
    small = substitute(model, ratio=0.5, init=init)
    for changed in (small, merge(small)):
        training = {name: m.training for name, m in changed.named_modules()}
        assert all(training[name] == m.training for name, m in model.named_modules())
        assert not training.get("conv2.coefficients")
        frozen = {name for name, p in changed.named_parameters() if not p.requires_grad}
        assert {"conv1.bias"} == {name for name in frozen if not name.startswith("conv2")}
        assert frozen >= {name for name, _ in changed.named_parameters() if name.startswith("conv2")} - {"conv2.bias"}
        assert "conv2.bias" not in frozen
        assert all(p.dtype == torch.float16 for p in changed.parameters())
    assert small.conv2.basis.is_contiguous(memory_format=torch.channels_last)
    assert merge(small).conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_hooks_of_every_kind_are_kept():
    log, model = [], Net()

    def note(kind):
        return lambda module, *_, **__: log.append((kind, type(module).__name__))

    kinds = (
        "forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook", "state_dict_pre_hook",
        "load_state_dict_post_hook",
    )  # fmt: skip
    for kind in kinds:
        getattr(model.conv2, f"register_{kind}")(note(kind))
    model.conv2.register_forward_hook(note("kwargs"), with_kwargs=True)
    model.conv2.register_forward_hook(note("always"), always_call=True)
    model.conv2._register_load_state_dict_pre_hook(note("load pre"), with_module=True)
    small = substitute(model, ratio=0.5)
    for changed, seen in ((small, "BasisConv2d"), (merge(small), "Conv2d"), (model, "Conv2d")):
        log.clear()
        changed(images()).sum().backward()
        changed.load_state_dict(changed.state_dict())
        assert sorted(log) == sorted((kind, seen) for kind in (*kinds, "kwargs", "always", "load pre"))
        log.clear()
        with pytest.raises(RuntimeError):
            changed.conv2(torch.zeros(1, 1, 5, 5))
        assert log == [("forward_pre_hook", seen), ("always", seen)]


@pytest.mark.parametrize("size", [6, "tucker:0.5", "hashed:0.25"])
def test_what_users_keep_on_a_layer_is_kept(size):
    model = Net()
    kept = {"tag": "stem", "lr_scale": 0.1, "_is_hf_initialized": True}
    vars(model.conv2).update(kept)
    model.conv2.register_buffer("seen", torch.ones(1))
    model.conv2.register_buffer("cache", torch.ones(1), persistent=False)
    small = substitute(model, {"conv2": size})
    for conv in (small.conv2, merge(small).conv2):
        assert {name: getattr(conv, name, None) for name in kept} == kept
        assert {"seen", "cache"} <= dict(conv.named_buffers()).keys()
        assert {name for name in conv.state_dict() if name in ("seen", "cache")} == {"seen"}
    assert vars(merge(small).conv2).keys() == vars(model.conv2).keys()
    assert merge(small).conv2._buffers.keys() == model.conv2._buffers.keys()
    assert not kept.keys() & vars(small.conv1).keys()


def test_a_module_with_several_names_stays_shared():
    shared = nn.Conv2d(C_IN, C_IN, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    for plan in ({"0": 4}, {"2": 4}, {"0": 4, "2": 4}):
        small = substitute(model, plan)
        assert isinstance(small[0], BasisConv2d)
        assert small[0] is small[2]
        dense = merge(small)
        assert type(dense[0]) is nn.Conv2d
        assert dense[0] is dense[2]
    assert Plan.uniform(model, ratio=0.5).layers == {"0": 4}
    with pytest.raises(ValueError, match="gives 0 k = 4 and 2 k = 6, but they are one shared layer"):
        substitute(model, {"0": 4, "2": 6})


def test_a_bare_convolution():
    conv = nn.Conv2d(C_IN, C_OUT, 3)
    for layer in (substitute(conv, ratio=0.5), substitute(conv, {"": 6})):
        assert isinstance(layer, BasisConv2d)
        assert layer.basis_channels == 6
        assert type(merge(layer)) is nn.Conv2d
    assert plan_of(layer).layers == {"": 6}
    assert "(the model itself)" in str(plan_of(layer))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_that_keep_computed_tensors_can_be_substituted():
    model = Net()
    prune.l1_unstructured(model.conv1, "weight", amount=0.5)
    nn.utils.weight_norm(model.fc)
    model.kept = model.fc(torch.ones(1, C_OUT))
    lower_rank(model.conv2)
    small = substitute(model, {"conv2": K})
    x = images()
    assert_same(small(x), model(x), 1e-5)
    small(x).sum().backward()
    assert small.conv1.weight_orig.grad.any()
    assert small.fc.weight_g.grad.any()


def test_batch_normalisation_through_the_basis():
    model = build("resnet18", width=8).double()
    ordinary = substitute(model, ratio=0.5)
    coupled = substitute(model, ratio=0.5, batch_norm="through_basis")
    assert len(couplings(coupled).norms) == sum(isinstance(m, BasisBatchNorm2d) for m in coupled.modules()) == 20
    assert coupled.state_dict().keys() == ordinary.state_dict().keys()
    x = torch.randn(2, 3, 16, 16).double()
    assert torch.allclose(coupled(x), ordinary(x))
    assert torch.allclose(merge(coupled)(x), merge(ordinary)(x))
    assert plan_of(coupled) == plan_of(ordinary)


def test_layers_of_a_plan_at_c_out_stay_dense():
    small = substitute(Net(), {"conv1": C_IN, "conv2": K})
    assert type(small.conv1) is nn.Conv2d
    assert isinstance(small.conv2, BasisConv2d)


# -- forms of the coefficients ------------------------------------------------------------------

FORMS = ("dense", "low_rank:2", "low_rank:1/4", "grouped:2", "sparse:2", "shared", "frozen", "repeat")


@pytest.mark.parametrize(("form", "init"), list(zip(FORMS, ("svd", "random") * len(FORMS), strict=False)))
def test_the_form_reaches_every_layer_and_merge_undoes_it(form, init):
    model = build("resnet20", width=8).double().eval()
    small = substitute(model, ratio=0.5, init=init, coefficients=form, exclude="conv1")
    layers = [m for m in small.modules() if isinstance(m, BasisConv2d)]
    assert len(layers) == 18
    assert {str(layer.coefficients.form) for layer in layers} == {form}
    assert plan_of(small).layers == Plan.uniform(model, ratio=0.5, exclude="conv1").layers
    assert not any(m.training for m in small.modules())
    x = torch.randn(2, 3, 32, 32).double()
    dense, twin = merge(small), copy.deepcopy(small)
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert_same(dense(x), small(x), 1e-8)
    assert_same(twin(x), small(x))


def twins():
    """Layers of two shapes, one of another dtype, one that is not trained."""
    model = nn.Sequential(
        *(nn.Conv2d(i, 8, 3, padding=1, groups=g) for i, g in ((4, 1), (8, 1), (8, 2), (8, 1), (8, 1)))
    )
    model[3].half()
    model[4].weight.requires_grad_(False)
    return model.append(nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize("init", ["svd", "random"])
def test_shared_ties_the_layers_of_equal_shape(init):
    small = substitute(twins(), ratio=0.5, init=init, coefficients="shared")
    a = [layer.coefficients for layer in small]
    assert a[0] is a[1] is a[5]
    assert len({id(one) for one in a}) == 4
    assert [one.trains for one in a] == [True, True, True, True, False, True]
    assert {p.dtype for p in small[3].parameters()} == {torch.float16}
    assert len(list(small.parameters())) == sum(p.numel() > 0 for layer in small for p in (layer.basis, layer.bias)) + 4
    apart = substitute(twins(), {"0": 4, "1": 6}, init=init, coefficients="shared")
    assert apart[0].coefficients is not apart[1].coefficients


@pytest.mark.parametrize("form", ["low_rank:3", "grouped:3", "sparse:3"])
def test_a_layer_too_narrow_for_a_form_stays_dense_unless_a_plan_names_it(form):
    small = substitute(Net(), ratio=0.25, init="random", coefficients=form)
    assert plan_of(small).layers == {"conv2": 3}
    assert form in Plan.uniform(Net(), ratio=0.25, coefficients=form).skipped["conv1"]
    with pytest.raises(ValueError, match=f"conv1: .*'{form}'"):
        substitute(Net(), {"conv1": 2}, init="random", coefficients=form)
    with pytest.raises(ValueError, match=r"^coefficients is"):
        substitute(Net(), ratio=0.25, coefficients="low-rank:3")


# -- plans --------------------------------------------------------------------------------------


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_every_convolution_that_stays_dense_has_its_reason():
    parametrized = "parametrized: its weight is made from other parameters"
    reasons = {
        "depthwise": (nn.Conv2d(8, 8, 3, groups=8), "depthwise: one filter per group"),
        "single": (nn.Conv2d(8, 1, 3), "one filter: nothing to derive"),
        "tied": (nn.Conv2d(8, 8, 3), "weight tied with twin.weight"),
        "twin": (nn.Conv2d(8, 8, 3), "weight tied with tied.weight"),
        "own": (OwnForward(8, 8, 3), "OwnForward has a forward of its own"),
        "patched": (nn.Conv2d(8, 8, 3), "Conv2d has a forward of its own"),
        "lazy": (nn.LazyConv2d(8, 3), "lazy: its shape is not known before the first forward pass"),
        "normed": (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), parametrized),
        "pruned": (prune.identity(nn.Conv2d(8, 8, 3), "weight"), parametrized),
        "basis": (BasisConv2d(8, 8, 3, ratio=0.5), "already a basis convolution, with k = 4"),
        "up": (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d: only nn.Conv2d can be substituted"),
        "line": (nn.Conv1d(8, 8, 3), "Conv1d: only nn.Conv2d can be substituted"),
        "head": (nn.Conv2d(8, 8, 3), "excluded by 'head'"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in reasons.items()})
    model.update({"plain": nn.Conv2d(8, 8, 3), "multiplier": nn.Conv2d(8, 16, 3, groups=8), "linear": nn.Linear(8, 8)})
    model["twin"].weight = model["tied"].weight
    model["patched"].forward = lambda x: x
    plan = Plan.uniform(model, ratio=0.7, exclude="head")
    assert plan.layers == {"plain": 6, "multiplier": 8}
    assert plan.skipped == {name: reason for name, (_, reason) in reasons.items()}
    small = substitute(model, plan)
    assert all(isinstance(small[name], BasisConv2d) for name in plan.layers)
    assert all(type(small[name]) is type(model[name]) for name in reasons)
    assert small["twin"].weight is small["tied"].weight
    for name in reasons.keys() - {"head"}:
        with pytest.raises(ValueError, match=f"{name}, which cannot be substituted: ") as error:
            substitute(model, {name: 3})
        assert reasons[name][1] in str(error.value)


def test_whether_a_layer_grows_depends_on_the_form_of_its_coefficients():
    model = nn.Sequential(nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    for form, replaced in (("dense", False), ("frozen", True), ("low_rank:2", True), ("shared", True)):
        assert ("0" in Plan.uniform(model, ratio=0.5, coefficients=form).layers) == replaced
    assert Plan.uniform(model, ratio=0.99).skipped["1"] == "k = 32 is not below C_out = 32: nothing to derive"


@pytest.mark.parametrize(
    ("name", "ratio", "grown"),
    [
        ("resnet20", 0.75, 0), ("resnet56", 0.5, 0), ("resnet18", 0.25, 0), ("resnet50", 0.25, 0),
        ("resnet18", 0.5, 1), ("resnet34", 0.5, 1), ("resnet18", 0.75, 4), ("resnet50", 0.5, 18), ("wrn-16-4", 0.5, 1),
    ],
)  # fmt: skip
def test_which_layers_of_our_networks_would_grow(name, ratio, grown):
    with torch.device("meta"):
        plan = Plan.uniform(build(name), ratio=ratio)
    assert len([name for name, reason in plan.skipped.items() if "larger" in reason]) == grown


def test_patterns_choose_layers():
    model, options = Net(), {"include": "conv*", "exclude": ("conv2", "absent")}
    assert Plan.uniform(model, ratio=0.5, include="conv2").layers == {"conv2": 6}
    assert Plan.uniform(model, ratio=0.5, **options).layers == {"conv1": 4}
    assert plan_of(substitute(model, ratio=0.5, **options)).layers == {"conv1": 4}


def test_k_is_the_nearest_multiple():
    for ratio, groups, multiple, k in ((0.6, 1, 8, 32), (0.1, 1, 16, 16), (0.5, 4, 6, 24), (0.01, 1, 1, 1)):
        assert Plan.uniform(nn.Conv2d(48, 48, 3, groups=groups), ratio=ratio, multiple=multiple).layers == {"": k}


def test_a_plan_survives_json_and_disk(tmp_path):
    plan = Plan.uniform(Net(), ratio=0.5, exclude="conv1")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert os.listdir(tmp_path) == ["plan.json"]
    with pytest.raises(AttributeError):
        plan.layers = {}


# -- what substitute refuses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"plan": {"conv9": 8}}, r"no convolution.* near it are conv"), ({"plan": {"bn1": 8}}, "names bn1"),
        ({"plan": {"conv1": 600}}, "conv1: basis_channels is 600"), ({"plan": {"conv1": 0}}, "basis_channels is 0"),
        ({"plan": {"conv1": 0.5}}, "basis_channels is 0.5"), ({}, "give one of"),
        ({"plan": {"conv1": 4}, "ratio": 0.5}, "give one of"), ({"ratio": 0.5, "layer": "sep"}, "give one of"),
        ({"ratio": 0.0}, "ratio is 0"), ({"ratio": 1.0, "mode": "fast"}, "mode is 'fast'"),
        ({"ratio": 0.5, "init": "zeros"}, "init is 'zeros'"),
        ({"ratio": 0.5, "batch_norm": "fast"}, "batch_norm is 'fast'"),
        ({"ratio": 0.5, "include": "cov*"}, r"include has 'cov\*'"),
        ({"plan": {"conv1": 4}, "exclude": "conv1"}, "include and exclude"),
        ({"plan": {"conv2": 3}, "model": Net(groups=2)}, "multiple of groups = 2"),
        ({"ratio": 0.5, "model": Net().to("meta")}, "conv1 is on the meta device"),
        ({"ratio": 2, "model": nn.Linear(2, 2)}, "ratio is 2"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        substitute(**({"model": Net()} | arguments))


# -- save and load ------------------------------------------------------------------------------


def make_saved(folder, ratio=0.5, **options):
    small = substitute(build("resnet20", width=4), ratio=ratio, **options)
    small(torch.randn(4, 3, 32, 32))  # moves the running statistics
    save(small, folder)
    return small.eval()


def test_what_is_saved_comes_back_without_an_svd(tmp_path, monkeypatch):
    small = make_saved(tmp_path / "new" / "folder", exclude="conv1")
    dense = build("resnet20", width=4).eval()
    dense.conv1.weight.requires_grad_(False)
    before, rng = state_of(dense), torch.get_rng_state()
    monkeypatch.setattr(BasisConv2d, "from_convs", None)
    loaded = load(dense, tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert_same(loaded(x), small(x))
    assert plan_of(loaded) == plan_of(small)
    assert not loaded.training
    assert not loaded.conv1.weight.requires_grad


def test_shared_and_tied_tensors_come_back(tmp_path):
    def dense():
        shared = nn.Conv2d(3, 3, 3, padding=1)
        model = nn.Sequential(shared, shared, nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
        model[3].weight = model[2].weight
        return model

    small = substitute(dense(), ratio=0.5)
    save(small, tmp_path)
    loaded = load(dense(), tmp_path)
    assert loaded[0] is loaded[1]
    assert loaded[3].weight is loaded[2].weight
    x = torch.randn(1, 3, 8, 8)
    assert_same(loaded(x), small(x))


def test_forms_of_coefficients_come_back(tmp_path):
    small = build("resnet20", width=8).eval()
    for stage, form in enumerate(["low_rank:2", "grouped:2", "sparse:1", "shared", "frozen", "repeat"]):
        plan = {f"layer{stage // 2 + 1}.{stage % 2}.conv{i}": 4 for i in (1, 2)}
        small = substitute(small, plan, init="random", coefficients=form)
    save(small, tmp_path)
    loaded = load(build("resnet20", width=8).eval(), tmp_path)
    assert count_parameters(loaded) == count_parameters(small)
    assert [str(m) for m in loaded.modules() if isinstance(m, BasisConv2d)] == [
        str(m) for m in small.modules() if isinstance(m, BasisConv2d)
    ]
    x = torch.randn(2, 3, 32, 32)
    assert_same(loaded(x), small(x))


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    make_saved(tmp_path)
    for other, says in (
        ({"name": "resnet32"}, r"Missing key.*layer1\.3\.conv1\.weight"),
        ({"name": "resnet20", "num_classes": 7}, r"fc\.weight: .* torch.Size\(\[10, 16\]\)"),
    ):
        with pytest.raises(ValueError, match=says):
            load(build(**({"width": 4} | other)), tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        load(Net(), tmp_path)
    make_saved(tmp_path)
    path, model = tmp_path / "model.safetensors", build("resnet20", width=4)
    for content in (b"", b"nonsense", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load(model, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no saved state at .*model\.safetensors"):
        load(model, tmp_path)


def test_a_state_belongs_to_its_plan_and_its_model(tmp_path):
    for name, ratio in (("a", 0.5), ("b", 0.25)):
        make_saved(tmp_path / name, ratio=ratio)
    with pytest.raises(ValueError, match=r"another model: C_out of .* is 4 there and 8 here"):
        load(build("resnet20", width=8), tmp_path / "a")
    with pytest.raises(ValueError, match="names conv1, which is no convolution"):
        load(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "a")
    (tmp_path / "b" / "plan.json").replace(tmp_path / "a" / "plan.json")
    with pytest.raises(ValueError, match=r"another plan\.json: they differ in .*conv1"):
        load(build("resnet20", width=4), tmp_path / "a")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_was_saved_from_a_wrapped_model_fits_the_bare_one_and_the_other_way_round(wrap, tmp_path):
    wrapped, small = wrap(Net()), substitute(Net(), ratio=0.5)
    save(substitute(wrapped, ratio=0.5), tmp_path / "wrapped")
    save(small, tmp_path / "bare")
    assert type(load(Net(), tmp_path / "wrapped")) is Net
    loaded = load(wrapped, tmp_path / "bare")
    assert all(map(torch.equal, loaded.state_dict().values(), small.state_dict().values()))


def test_what_has_no_values_or_is_no_tensor_is_not_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    for model, entry in ((Net().to("meta"), "conv1.weight"), (Extra(2, 2), "_extra_state")):
        with pytest.raises(ValueError, match=entry):
            save(model, tmp_path)
    make_saved(tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        load(build("resnet20", width=4).to("meta"), tmp_path)


def test_a_failed_write_loses_nothing(tmp_path, monkeypatch):
    make_saved(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_saved(tmp_path, ratio=0.25)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_pruned_network_is_merged_and_folded_as_it_is():
    model = substitute(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), ratio=0.5).eval()
    prune.l1_unstructured(model[0], "basis", amount=0.4)
    prune.l1_unstructured(model[2].coefficients, "weight", amount=0.4)
    x = torch.randn(2, 3, 12, 12)
    for plain in (merge(model), fold(model)):
        torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-4)
        assert vars(plain[2]).keys() == vars(nn.Conv2d(1, 1, 1)).keys()
    assert prune.is_pruned(model)
