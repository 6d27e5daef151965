"""Networks of torchvision and timm, put through everything that the package does, with random weights.

Weekly all of them; with BASIS_ZOO=results/bench/zoo.json the record is written that chapter 11 shows.
"""

import copy
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch.nn.modules.conv import _ConvNd

from basis import Plan, couple, fold, load, merge, save, substitute
from basis.bench.timing import BenchReport
from basis.costs import cost
from basis.environment import environment
from basis.export import export_onnx, export_program
from basis.layers.batchnorm import couplings
from basis.modules import tracking_norms, training_norms
from basis.substitution import plan_of
from basis.text import first_line
from basis.vision import import_timm, import_torchvision

RECORD = Path(__file__).resolve().parents[1] / "results" / "bench" / "zoo.json"
EXACT = 1e-8  # largest difference in float64, relative to the largest output, of two forms of one function

# A small member of every family of torchvision's classifiers, and many of timm's: those of the record.
NETWORKS = [(row["library"], row["network"], row["size"]) for row in BenchReport.load(RECORD).rows]


def build(library, name, size):
    """10 classes; also what begins as a constant is random, as zeros that switch branches off would hide them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "timm":
            make = partial(import_timm().create_model, name, num_classes=10)
            try:
                model = make(img_size=size)
            except TypeError:  # of any image size
                model = make()
        else:
            options = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}
            options |= {"vit_b_32": {"image_size": size}, "maxvit_t": {"input_size": (size, size)}}
            model = import_torchvision().models.get_model(name, weights=None, num_classes=10, **options.get(name, {}))
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.data += torch.empty_like(parameter).uniform_(0.1, 0.5)
    return model


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output or ()
    return [tensor for value in values for tensor in tensors(value)]


def difference(outputs, expected):
    pairs = zip(tensors(outputs), tensors(expected), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


class Case:
    """A network, all its convolutions that save parameters at half the filters replaced, and images."""

    def __init__(self, library, name, size):
        self.size, self.model, self.notes = (3, size, size), build(library, name, size), []
        self.plan = Plan.uniform(self.model, ratio=0.5)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            self.small = substitute(self.model, self.plan, mode="factorized", init="random")
            with training_norms(tracking_norms(self.small)):
                self.small(torch.randn(4, *self.size))
            self.images = torch.randn(2, *self.size, dtype=torch.float64)
        self.wide = copy.deepcopy(self.small.eval()).double()
        self.expected = self.run(self.wide)
        assert difference(self.expected[0][:1], self.expected[0][1:]) > 1e-4, "outputs tell nothing of the images"

    @torch.no_grad()
    def run(self, model):
        return tensors(model.eval()(self.images))

    def compare(self, other):
        error = difference(self.run(other), self.expected)
        assert error <= EXACT, f"outputs differ by {error:.1e} of the largest"
        return error

    def names(self):
        there = {name for name, module in self.model.named_modules() if isinstance(module, _ConvNd)}
        assert there == self.plan.layers.keys() | self.plan.skipped.keys()
        return plan_of(self.small).layers == self.plan.layers

    def parameters(self):
        stored, before = (sum(p.numel() for p in model.parameters()) for model in (self.small, self.model))
        report = cost(self.small, input_size=self.size)
        assert (report.total.parameters, report.dense.parameters) == (stored, before)
        return stored / before

    def train(self):
        reached = []
        for model in (self.model, self.small):
            model = copy.deepcopy(model).train()
            sum(y.square().mean() for y in tensors(model(self.images.float()))).backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert all(grad.isfinite().all() for grad in gradients.values())
            reached.append({re.sub(r"\.(basis|coefficients\..*)$", ".weight", name) for name in gradients})
        return reached[0] == reached[1]

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            save(self.small, folder)
            loaded = load(self.model, folder)
        torch.testing.assert_close(loaded.state_dict(), self.small.state_dict(), rtol=0, atol=0)
        return plan_of(loaded) == plan_of(self.small)

    def export(self, function, name):
        folded = fold(self.small)
        with torch.no_grad():  # float32 can be no nearer to itself than to float64
            rounding = difference([y.double() for y in tensors(folded(self.images.float()))], self.expected)
        with tempfile.TemporaryDirectory() as folder:
            write = partial(function, folded, f"{folder}/{name}", self.size, tolerance=max(1e-4, 4 * rounding))
            try:
                return write().error
            except RuntimeError as error:
                self.notes.append(f"{name} has a fixed batch size: {first_line(error)}")
                return write(batch=2).error


CHECKS = {
    "named": Case.names, "parameters": Case.parameters, "trained": Case.train, "saved": Case.save,
    "merged": lambda case: case.compare(merge(case.wide)),
    "again": lambda case: case.compare(substitute(merge(case.wide), case.plan)),  # SVD finds what was merged
    "coupled": lambda case: case.compare(couple(case.wide)),
    "folded": lambda case: case.compare(fold(case.wide)),
    "onnx": lambda case: case.export(export_onnx, "model.onnx"),
    "program": lambda case: case.export(export_program, "model.pt2"),
}  # fmt: skip


def counted(reasons):
    """Reason -> how many have it, without the numbers of a layer."""
    general = (
        re.sub(r"\bk = \d+", "k", re.sub(r"only \d+ numbers", "no more numbers", why)) for why in reasons.values()
    )
    return dict(Counter(general).most_common())


def check(network, checks=tuple(CHECKS)):
    """The row of the record."""
    began, case = perf_counter(), Case(*network)
    row = dict(zip(("library", "network", "size"), network, strict=True))
    row |= {"convolutions": len(case.plan.layers) + len(case.plan.skipped), "substituted": len(case.plan.layers)}
    row |= {"left": counted(case.plan.skipped), "couplings": len(couplings(case.small).norms)}
    row |= {"notes": case.notes, "failed": {}}
    for name in checks:
        try:
            row[name] = CHECKS[name](case)
            assert row[name] is not False
        except Exception as error:
            row[name], row["failed"][name] = None, first_line(error)
    return row | {"seconds": round(perf_counter() - began, 1)}


def record(row, path):
    """Put the row into the record, in place of an older one."""
    about = environment(torch.device("cpu")) | {name: version(name) for name in ("torchvision", "timm")}
    rows = BenchReport.load(path).rows if Path(path).exists() else []
    kept = [old for old in rows if (old["library"], old["network"]) != (row["library"], row["network"])]
    config = {"ratio": 0.5, "checks": sorted(CHECKS)}
    BenchReport(kind="zoo", config=config, environment=about, rows=[*kept, row]).save(path)


@pytest.mark.weekly
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "/".join(network[:2]))
def test_a_network_passes_every_check(network):
    row = check(network)
    if "BASIS_ZOO" in os.environ:
        record(row, os.environ["BASIS_ZOO"])
    assert row["failed"] == {}


@pytest.mark.parametrize("network", [("torchvision", "squeezenet1_1", 64), ("timm", "test_byobnet", 64)])
def test_small_networks_pass_the_checks(network, tmp_path):
    exports = {"onnx", "program"} if network[0] == "torchvision" else {"onnx"}
    row = check(network, [name for name in CHECKS if name not in exports])
    assert row["failed"] == {}
    assert row["substituted"] + sum(row["left"].values()) == row["convolutions"]
    for _ in range(2):
        record(row, tmp_path / "zoo.json")
    assert [one["network"] for one in BenchReport.load(tmp_path / "zoo.json").rows] == [network[1]]


def test_the_record_holds_many_networks_and_none_failed():
    assert len(set(NETWORKS)) == len(NETWORKS) >= 78
    assert not [row["failed"] for row in BenchReport.load(RECORD).rows if row["failed"]]


def test_normalisation_with_an_activation_is_coupled_in_training():
    """timm's BatchNormAct2d."""
    small = substitute(build("timm", "test_byobnet", 64).double(), ratio=0.5)
    x, results = torch.randn(4, 3, 64, 64, dtype=torch.float64), []
    for model in (small, couple(small)):
        y = model.train()(x)
        y.square().sum().backward()
        results.append({"y": y.detach()} | {name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)
