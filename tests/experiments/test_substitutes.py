"""The study of chapter 9: its runs, how variants are compared, the verdicts on S1 and S2, and runs with a teacher."""

import dataclasses

import pytest
import torch

from basis import substitute
from basis.experiments import execution
from basis.experiments.runner import Order, Task, in_processes
from basis.experiments.runs import Run, checkpoint_path
from basis.experiments.studies import STUDIES
from basis.experiments.studies import substitutes as study_of
from basis.experiments.studies.substitutes import Variant
from basis.models import build
from basis.training.loop import Recipe, TrainingPaused
from tests.experiments.test_search_studies import record

STUDY = STUDIES["substitutes"]
NOISE = (-0.001, 0.001, 0.0005)  # what the seeds 0, 1, 2 add to an accuracy


@pytest.mark.parametrize("profile", ["smoke", "paper"])
def test_a_variants_name_says_what_it_is(profile):
    for run in STUDY.runs(profile):
        variant = Variant.parse(run.variant)
        assert str(variant) == run.variant
        assert (variant.network, variant.width, variant.text) == (run.model, run.width, run.layer or "dense")
        assert (run.recipe.decay == "scaled") == (variant.text != "dense" and variant.how != "plain decay")


@pytest.mark.parametrize("profile", ["cpu", pytest.param("paper", marks=pytest.mark.weekly)])
def test_every_listed_layer_fits_every_convolution_of_its_networks_blocks(profile):
    for name, width, text in dict.fromkeys((r.model, r.width, r.layer) for r in STUDY.runs(profile) if r.layer):
        with torch.device("meta"):
            model = build(name, width=width)
        convs = [n for n, m in model.named_modules() if n.rpartition(".")[2].startswith("conv") and "." in n]
        assert substitute(model, dict.fromkeys(convs, text), init="random")  # raises where one does not fit


def outcomes(good="", accuracy=0.7, size=None):
    """Records of the CPU profile: ``good`` kinds or ways have this accuracy, others 0.6; three sizes of each kind."""
    records = []
    for run in STUDY.runs("cpu"):
        variant = Variant.parse(run.variant)
        texts = study_of.KINDS.get(variant.kind, ("", (variant.text.partition(":")[2],)))[1]
        place = texts.index(variant.text.partition(":")[2]) if variant.text != "dense" else 0
        narrow = {None: 300, 12: 200, 8: 100} if variant.text != "dense" else {None: 9000, 8: 320, 6: 220, 4: 120}
        cost = (size or {}).get(variant.kind, narrow[variant.width] - 100 * place)
        reached = accuracy if good and good in (variant.kind, variant.how) else 0.6
        records.append(record(run, accuracy=reached + NOISE[run.seed], parameters=cost, macs=cost))
    return records


@pytest.mark.parametrize(
    ("good", "size", "label"),
    [
        ("generic", None, "reproduced"),  # it beats narrower dense networks, and nobody beats it
        ("basis", None, "not reproduced"),  # it beats all of them at their size
        ("basis", {"basis": 1e6}, "partly"),  # what costs more beats nobody
    ],
)
def test_the_rule_for_s1(good, size, label):
    records = outcomes(good, size=size)
    verdict = STUDY.verdicts(records, "cpu")[0]
    assert (verdict.claim, verdict.label) == ("S1", label)
    assert ("low rank surely beat a narrower dense network" in verdict.finding) == (label == "reproduced")
    rest = [r for r in records if not (r.config["variant"].endswith("hashed:0.06") and r.config["seed"] == 1)]
    assert "wrn-10-1 hashed:0.06" in STUDY.verdicts(rest, "cpu")[0].finding  # a rival of one run: not tested


@pytest.mark.parametrize(("gain", "label"), [(0.02, "reproduced"), (-0.02, "not reproduced"), (0.002, "partly")])
def test_s2_is_judged_by_the_mean_gain(gain, label):
    records = outcomes("plain decay", 0.6 - gain)
    verdict = STUDY.verdicts(records, "cpu")[1]
    assert (verdict.claim, verdict.label, verdict.difference) == ("S2", label, f"{100 * gain:+.2f} points")
    alone = [r for r in records if r.config["seed"] == 0]
    assert [v.label for v in STUDY.verdicts(alone, "cpu")] == ["not tested"] * 2


# -- runs with a teacher --------------------------------------------------------------------------------


def tiny(tmp_path, **changes):
    """A run with a teacher, and how it is done."""
    recipe = Recipe(epochs=1, batch_size=50, translate=0, cutout=0)
    run = Run(
        study="substitutes", profile="smoke", variant="tiny", seed=0, model="wrn-10-1", data="synthetic", images=100,
        recipe=recipe, layer="dsf:0.25", include=study_of.BLOCKS, teacher=dataclasses.replace(recipe, epochs=2),
        fitted=True,
    )  # fmt: skip
    run = dataclasses.replace(run, **changes)
    return run, {"device": torch.device("cpu"), "checkpoint": checkpoint_path(tmp_path, run, torch.device("cpu"))}


def test_a_run_is_the_same_with_a_teacher_trained_at_once_kept_or_interrupted(tmp_path):
    run, options = tiny(tmp_path)
    with pytest.raises(TrainingPaused):
        execution.execute(run, **options, should_stop=lambda: True)
    results = []
    for _ in range(2):  # trained after an interruption, and kept
        results.append(execution.execute(run, **options))
        options["checkpoint"].unlink(missing_ok=True)
    results.append(execution.execute(run, device=options["device"]))
    assert results[0]["test"] == results[1]["test"] == results[2]["test"]
    (kept,) = tmp_path.glob("**/teacher-*.pt")
    kept.write_bytes(kept.read_bytes()[:2000])
    (step,) = in_processes(Order(tasks=[Task(run, "")], folder=tmp_path, device="cpu"), 1)
    assert (step.outcome, str(kept) in step.message) == ("failed", True)
