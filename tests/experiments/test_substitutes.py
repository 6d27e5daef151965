"""The study of chapter 9: its runs, how variants are compared, and the verdicts on S1 and S2."""

import dataclasses
import json
from collections import Counter

import filelock
import pytest
import torch

from basis import substitute
from basis.experiments import runs
from basis.experiments.runs import Run, load_records, work
from basis.experiments.studies import STUDIES
from basis.experiments.studies import substitutes as study_of
from basis.experiments.studies.substitutes import Variant
from basis.models import build
from basis.training.loop import Recipe, TrainingPaused, learning_rate
from tests.experiments.test_search_studies import record

STUDY = STUDIES["substitutes"]
NOISE = (-0.001, 0.001, 0.0005)  # what the seeds 0, 1, 2 add to an accuracy


def outcomes(accuracy, *, size=lambda variant: 1000.0):
    """Records of the CPU profile; accuracy and size (both axes) are functions of a variant."""
    records = []
    for run in STUDY.runs("cpu"):
        variant = Variant.parse(run.variant)
        about = {"parameters": size(variant), "macs": size(variant)}
        records.append(record(run, accuracy=accuracy(variant) + NOISE[run.seed], **about))
    return records


@pytest.mark.parametrize("profile", ["smoke", "cpu", "colab", "paper"])
def test_no_run_is_listed_twice_and_an_arms_name_says_what_it_is(profile):
    runs = STUDY.runs(profile)
    assert len({run.id for run in runs}) == len(runs) == len({(run.variant, run.seed) for run in runs})
    for run in runs:
        variant = Variant.parse(run.variant)
        assert str(variant) == run.variant
        assert (variant.network, variant.width) == (run.model, run.width)
        assert variant.text == (run.layer or "dense")
        assert (run.recipe.decay == "scaled") == (variant.text != "dense" and variant.how != "plain decay")


@pytest.mark.parametrize("profile", ["smoke", "cpu", "colab", "paper"])
def test_every_listed_layer_fits_every_convolution_of_its_networks_blocks(profile):
    for name, width, text in dict.fromkeys((r.model, r.width, r.layer) for r in STUDY.runs(profile) if r.layer):
        with torch.device("meta"):
            model = build(name, width=width)
        convs = [n for n, m in model.named_modules() if n.rpartition(".")[2].startswith("conv") and "." in n]
        changed = substitute(model, dict.fromkeys(convs, text), init="random")  # raises where one does not fit
        assert sum(p.numel() for p in changed.parameters()) > 0


def test_every_kind_has_three_sizes_or_three_widths():
    variants = [Variant.parse(run.variant) for run in STUDY.runs("cpu") if run.seed == 0]
    sizes = Counter(variant.kind for variant in variants if not variant.how)
    assert sizes == dict.fromkeys(study_of.KINDS, 3) | {"dense": 4}


def ladder(variant):
    """Size by the place among a kind's variants: 300, 200, 100."""
    if variant.text == "dense":
        return {None: 9000.0, 8: 320.0, 6: 220.0, 4: 120.0}[variant.width]
    if variant.width:
        return 200.0 if variant.width == 12 else 100.0
    sizes = study_of.KINDS[variant.kind][1] if variant.kind in study_of.KINDS else (variant.text.partition(":")[2],)
    return 300.0 - 100 * sizes.index(variant.text.partition(":")[2])


def test_s1_is_reproduced_when_a_structured_layer_beats_thin_networks_and_nobody_beats_it():
    records = outcomes(lambda variant: 0.7 if variant.kind == "generic" else 0.6, size=ladder)
    verdict = STUDY.verdicts(records, "cpu")[0]
    assert (verdict.claim, verdict.label) == ("S1", "reproduced")
    assert "low rank surely beat a narrower dense network" in verdict.finding


def test_s1_is_not_reproduced_when_all_of_them_are_beaten_at_their_size():
    records = outcomes(lambda variant: 0.7 if variant.kind == "basis" else 0.6, size=ladder)
    assert STUDY.verdicts(records, "cpu")[0].label == "not reproduced"


def test_s1_is_partly_reproduced_when_nothing_can_be_told_apart():
    records = outcomes(lambda variant: 0.6, size=ladder)
    assert STUDY.verdicts(records, "cpu")[0].label == "partly"


def test_an_arm_that_costs_more_beats_nobody():
    records = outcomes(
        lambda variant: 0.7 if variant.kind == "basis" else 0.6,
        size=lambda variant: 1e6 if variant.kind == "basis" else ladder(variant),
    )
    assert study_of.standing(records, "macs").beaten == {}


@pytest.mark.parametrize(("gain", "label"), [(0.02, "reproduced"), (-0.02, "not reproduced"), (0.002, "partly")])
def test_s2_is_judged_by_the_mean_gain(gain, label):
    records = outcomes(lambda variant: 0.6 - gain * (variant.how == "plain decay"), size=ladder)
    verdict = STUDY.verdicts(records, "cpu")[1]
    assert (verdict.claim, verdict.label) == ("S2", label)
    assert verdict.difference == f"{100 * gain:+.2f} points"


def test_without_two_runs_per_arm_nothing_is_judged():
    records = [r for r in outcomes(lambda variant: 0.6, size=ladder) if r.config["seed"] == 0]
    assert [v.label for v in STUDY.verdicts(records, "cpu")] == ["not tested"] * 2
    assert [v.label for v in STUDY.verdicts([], "cpu")] == ["not tested"] * 2


def test_s1_is_not_tested_while_a_rival_it_has_to_beat_has_one_run():
    records = outcomes(lambda variant: 0.7 if variant.kind == "generic" else 0.6, size=ladder)
    rest = [r for r in records if not (r.config["variant"].endswith("hashed:0.06") and r.config["seed"] == 1)]
    verdict = STUDY.verdicts(rest, "cpu")[0]
    assert verdict.label == "not tested"
    assert "wrn-10-1 hashed:0.06" in verdict.finding


def test_the_network_with_the_most_arms_is_judged_even_if_another_has_more_runs():
    runs = [r for r in STUDY.runs("paper") if (r.model == "wrn-16-4" and r.seed == 0) or r.model == "resnet18"]
    records = [record(run) for run in runs[:12]] + [record(run) for run in runs if run.model == "resnet18"]
    assert study_of.main_network(records) == "wrn-16-4"


def test_a_record_without_macs_is_not_taken_for_one_with_as_many_as_parameters():
    run = STUDY.runs("cpu")[0]
    with pytest.raises(KeyError, match="macs"):
        study_of.cost_of([record(run)], Variant.parse(run.variant), "macs")
    assert study_of.cost_of([record(run)], Variant.parse(run.variant), "trained") == 10


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_the_weight_of_the_orthogonality_lets_bases_converge(profile):
    for run in [r for r in STUDY.runs(profile) if r.seed == 0 and (r.layer or "").startswith("dsfb")]:
        torch.manual_seed(0)
        model = substitute(build(run.model), layer=run.layer, include=run.include, init="random")
        layers = [m for m in model.modules() if hasattr(m, "penalty")]
        optimizer = torch.optim.SGD(model.parameters(), lr=run.recipe.lr, momentum=0.9, nesterov=True)
        penalties = []
        for step in range(30):
            optimizer.param_groups[0]["lr"] = learning_rate(run.recipe, step / 60)
            optimizer.zero_grad()
            penalty = torch.stack([layer.penalty() for layer in layers]).sum()
            (run.recipe.orthogonality * penalty).backward()
            optimizer.step()
            penalties.append(penalty.item())
        assert penalties[-1] < penalties[0] / 2


def tiny(tmp_path, **changes):
    """A run with a teacher, where its checkpoint would be, and how it is done."""
    recipe = Recipe(epochs=1, batch_size=50, translate=0, cutout=0)
    run = Run(
        study="substitutes", profile="smoke", variant="tiny", seed=0, model="wrn-10-1", data="synthetic", images=100,
        recipe=recipe, layer="dsf:0.25", include=study_of.BLOCKS, teacher=dataclasses.replace(recipe, epochs=2),
        fitted=True,
    )  # fmt: skip
    run = dataclasses.replace(run, **changes)
    return run, {"device": torch.device("cpu"), "checkpoint": runs.checkpoint_path(tmp_path, run, torch.device("cpu"))}


def without_times(result):
    """A result without what differs between equal runs."""
    kept = {key: value for key, value in result.items() if "second" not in key}
    return kept | {"curves": [{k: v for k, v in row.items() if k != "seconds"} for row in result["curves"]]}


def test_a_run_is_the_same_with_a_teacher_trained_at_once_kept_or_interrupted(tmp_path):
    run, options = tiny(tmp_path)
    teacher = runs._teacher
    states = []

    def watched(*args):
        states.append((teacher(*args), torch.get_rng_state()))
        return states[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_teacher", watched)
        first = runs.execute(run, **options)
        options["checkpoint"].unlink(missing_ok=True)
        again = runs.execute(run, **options)
        options["checkpoint"].unlink(missing_ok=True)
        for file in tmp_path.glob("**/teacher-*"):
            file.unlink()
        with pytest.raises(TrainingPaused):
            runs.execute(run, **options, should_stop=lambda: True)
        assert not options["checkpoint"].exists()
        resumed = runs.execute(run, **options)
        nowhere = runs.execute(run, device=options["device"])
    assert without_times(first) == without_times(again) == without_times(resumed) == without_times(nowhere)
    assert json.loads(json.dumps(first)) == first | {"curves": list(first["curves"])}
    for network, state in states[1:]:
        assert torch.equal(state, states[0][1])
        for one, other in zip(network.parameters(), states[0][0].parameters(), strict=True):
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


def test_a_damaged_teacher_is_named_and_the_next_run_begun(tmp_path):
    run, options = tiny(tmp_path)
    runs.execute(run, **options)
    options["checkpoint"].unlink(missing_ok=True)
    (kept,) = tmp_path.glob("**/teacher-*.pt")
    for damaged in (b"", b"no teacher at all", kept.read_bytes()[:2000]):
        kept.write_bytes(damaged)
        (step,) = work([run], "", folder=tmp_path, device="cpu")
        assert step.outcome == "failed"
        assert f"{kept} cannot be read" in step.message
        assert "delete it" in step.message


def test_a_run_waits_for_anothers_teacher_but_not_beyond_the_deadline(tmp_path):
    run, options = tiny(tmp_path)
    runs.execute(run, **options)
    options["checkpoint"].unlink(missing_ok=True)
    (lock,) = tmp_path.glob("**/teacher-*.lock")
    with filelock.FileLock(lock, thread_local=False), pytest.raises(TrainingPaused, match="waiting for the teacher"):
        runs.execute(run, **options, should_stop=lambda: True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "fitted is set without a teacher"),
        ({"fitted": None}, "nothing uses"),
        ({"layer": None, "include": None}, "dense network"),
        ({"fitted": None, "teacher": None, "recipe": Recipe(attention=1.0)}, "recipe.attention is set without"),
    ],
)
def test_a_teacher_goes_with_what_uses_it(tmp_path, changes, message):
    run, options = tiny(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        runs.execute(run, **options)


@pytest.mark.slow
def test_runs_with_a_teacher_train_it_once_and_can_be_done_again(tmp_path):
    runs = [r for r in STUDY.runs("smoke") if r.teacher is not None and r.seed == 0]
    assert {Variant.parse(run.variant).how for run in runs} == {"fitted", "attention"}
    first = next(run for run in runs if run.fitted)
    second = next(run for run in runs if run.recipe.attention)
    done = list(work([first, second], STUDY.definition, folder=tmp_path, device="cpu"))
    assert [step.outcome for step in done] == ["done", "done"]
    assert len(list(tmp_path.glob("**/teacher-*.pt"))) == 1
    records = {r.config["variant"]: r.result for r in load_records(tmp_path)}
    again = list(work([dataclasses.replace(first, variant="again")], STUDY.definition, folder=tmp_path, device="cpu"))
    assert again[0].outcome == "done"
    repeated = {r.config["variant"]: r.result for r in load_records(tmp_path)}["again"]
    assert repeated["test"] == records[first.variant]["test"]
    assert repeated["trained"] > 0
