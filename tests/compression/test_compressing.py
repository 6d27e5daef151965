import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import basis
from basis import InfeasibleBudget
from basis.cli import main
from basis.compression import compress as compressing
from basis.compression.compress import compress
from basis.compression.job import Settings, parse_budget, prepare
from tests import tiny
from tests.compression.test_report import check_page

ROOT = Path(__file__).resolve().parents[2]


def silent(line):
    """Of what is said nothing is wanted."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and weights."""
    folder = tmp_path_factory.mktemp("own")
    tiny.image_folder(folder / "data", train=24, val=12)
    torch.save({"state_dict": tiny.network().state_dict()}, folder / "weights.pt")
    return folder


def settings(place, out, **changes):
    usual = {"model": "tests.tiny:network", "weights": str(place / "weights.pt"), "data": str(place / "data")}
    usual |= {"budget": {"params": 0.7}, "out": str(out), "image_size": 16, "batch_size": 16, "seed": 1}
    return Settings(**(usual | changes))


def command_line(place):
    """The same as a command line, without its options."""
    return ["compress", "tests.tiny:network", "--weights", str(place / "weights.pt"), "--data", str(place / "data")]


@pytest.fixture(scope="module")
def made(place):
    """A finished run, and what it said."""
    said = []
    torch.set_num_threads(1)
    return compress(settings(place, place / "made"), say=said.append, command="basis compress ..."), said


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- a whole run ------------------------------------------------------------------------------------


def test_the_folder_holds_what_was_promised(made):
    folder = made[0].folder
    there = {path.name for path in folder.iterdir()}
    assert there >= {"plan.json", "model.safetensors", "model.onnx", "model.pt2", "report.html", "report.json"}
    assert not (folder / "stages" / "finetuning.pt").exists()
    assert not (folder / "stages" / "tuned").exists()
    plan = basis.Plan.load(folder / "plan.json")
    assert plan.skipped["3"] == "depthwise: one filter per group"
    assert set(plan.layers) == {name for name, _ in made[0].model.named_modules() if name in plan.layers}


def test_the_network_can_be_loaded_and_is_within_the_budget(made):
    result = made[0]
    loaded = basis.load(tiny.network(), result.folder).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x), result.model(x))
    assert basis.count_parameters(loaded) <= 0.7 * basis.count_parameters(tiny.network())
    assert result.report["cost"]["params"]["after"] == basis.count_parameters(loaded)


def test_the_exported_files_were_run_and_agree(made):
    result = made[0]
    assert {file["name"] for file in result.report["files"] if file["error"] is not None} == {"model.onnx", "model.pt2"}
    x = torch.randn(5, 3, 16, 16)
    program = torch.export.load(result.folder / "model.pt2").module()
    torch.testing.assert_close(program(x), result.model(x), atol=1e-4, rtol=1e-4)


def test_what_is_told_how_to_load_works(made, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = {}
    exec(made[0].report["loading"], values)
    assert values["logits"].shape == (1, 3)
    expected = values["model"](values["x"]).detach().numpy()
    np.testing.assert_allclose(values["logits"], expected, atol=1e-4)


def test_progress_is_told_stage_by_stage(made):
    text = "\n".join(made[1])
    for word in ("network:", "dense network:", "sensitivity:", "selection:", "replaced:", "fine-tuned:", "latency:"):
        assert word in text
    assert "took 'state_dict' of state_dict" in text


def test_the_test_images_are_used_for_the_last_numbers_only(place, tmp_path, monkeypatch):
    """With other test images all else comes out the same."""
    other = tmp_path / "data"
    tiny.image_folder(other, train=24, val=12)
    for file in (other / "val").rglob("*.png"):
        file.write_bytes((other / "val" / "ant" / "000.png").read_bytes())
    monkeypatch.setattr(compressing, "time_networks", None)
    monkeypatch.setattr(compressing, "choose_form", None)
    accuracies, plans = [], []
    for number, data in enumerate((place / "data", other)):
        out = tmp_path / f"out{number}"
        with pytest.raises(TypeError):  # stopped where latencies would be measured
            compress(settings(place, out, data=str(data)))
        found = [json.loads((out / "stages" / f"{name}.json").read_text()) for name in ("dense", "repair", "tuning")]
        accuracies.append([(row["accuracy"], row["loss"]) for stage in found for row in stage["accuracy"]])
        plans.append((out / "plan.json").read_text())
    assert accuracies[0] == accuracies[1]
    assert plans[0] == plans[1]


# -- going on ---------------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(made, place, monkeypatch):
    before = files(made[0].folder)
    for name in (
        "sensitivity",
        "finetune",
        "recalibrate",
        "export_onnx",
        "export_program",
        "measure_fold",
        "check_images",
    ):
        monkeypatch.setattr(compressing, name, None)
    again = compress(settings(place, made[0].folder), command="basis compress ...")
    assert files(made[0].folder) == before
    assert again.report == made[0].report


def test_a_run_that_was_killed_goes_on(place, tmp_path, monkeypatch):
    """Killed within fine-tuning; what came before is not done again, and the epochs that were done are kept."""
    out = tmp_path / "out"
    arguments = command_line(place)
    arguments += ["--budget", "params=0.7", "--out", str(out), "--image-size", "16", "--batch-size", "16"]
    arguments += ["--seed", "1", "--epochs", "500", "--device", "cpu"]
    command = [sys.executable, "-m", "basis.cli", *arguments]
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    checkpoint, began = out / "stages" / "finetuning.pt", time.monotonic()
    while not checkpoint.exists() and child.poll() is None and time.monotonic() - began < 120:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert checkpoint.exists(), "it ended before it was to be killed"
    done = torch.load(checkpoint, weights_only=True)["epoch"]
    before = {name: content for name, content in files(out).items() if name.endswith((".json", ".jsonl"))}
    assert set(before) >= {"run.json", "plan.json", "sensitivity.jsonl", "stages/dense.json", "stages/repair.json"}
    for name in ("sensitivity", "recalibrate", "check_images", "select"):
        monkeypatch.setattr(compressing, name, None)
    seen = []

    def finetune(model, loader, *, checkpoint, epochs, **options):
        seen.append((torch.load(checkpoint, weights_only=True)["epoch"], epochs))
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "finetune", finetune)
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 130
    assert seen == [(done, 500)]
    assert {name: content for name, content in files(out).items() if name in before} == before


def test_training_goes_on_with_the_numbers_that_it_would_have_had(place, tmp_path, monkeypatch):
    real = compressing.finetune
    whole, parts = (settings(place, tmp_path / name, epochs=2) for name in ("whole", "parts"))
    monkeypatch.setattr(compressing, "evaluate_last", None)
    for one in (whole, parts):
        if one is parts:  # interrupted after the first epoch
            with monkeypatch.context() as patch:
                patch.setattr(compressing, "finetune", lambda *a, **o: real(*a, **o, should_stop=lambda: True))
                with pytest.raises(RuntimeError, match="stopped after epoch 1 of 2"):
                    compress(one)
        with pytest.raises(TypeError):
            compress(one)
    rows = [json.loads((Path(one.out) / "stages" / "tuning.json").read_text())["accuracy"][0] for one in (whole, parts)]
    assert rows[0]["loss"] == rows[1]["loss"]


def test_an_analysis_that_was_interrupted_goes_on_layer_by_layer(place, tmp_path, monkeypatch):
    real, out = basis.search.measures.oneshot, tmp_path / "out"

    measured = []

    def counted(*arguments, **options):
        baseline, cells = real(*arguments, **options)
        return baseline, (measured.append(cell) or cell for cell in cells)

    def interrupted(*arguments, **options):
        def first(cells):
            yield next(cells)
            raise KeyboardInterrupt

        baseline, cells = counted(*arguments, **options)
        return baseline, first(cells)

    monkeypatch.setattr("basis.search.measures.oneshot", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(settings(place, out))
    monkeypatch.setattr("basis.search.measures.oneshot", counted)
    monkeypatch.setattr(compressing, "repair", None)
    with pytest.raises(TypeError):
        compress(settings(place, out))
    cells = basis.SensitivityTable.load(out / "sensitivity.jsonl").cells
    assert len(measured) == len(cells) == 3  # each once


def test_two_processes_do_not_work_in_one_folder(place, tmp_path):
    job = prepare(settings(place, tmp_path / "out"))
    with job.place.held(), pytest.raises(ValueError, match="another process is working in"):
        compress(settings(place, tmp_path / "out"))


# -- options ----------------------------------------------------------------------------------------


def test_a_budget_in_milliseconds_without_fine_tuning(place, tmp_path):
    """Of the npz kind of data, and with a teacher left aside since nothing is trained."""
    rng = np.random.default_rng(0)
    arrays = {
        f"x_{part}": rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for part, n in (("train", 60), ("test", 30))
    }
    np.savez(tmp_path / "data.npz", **arrays, y_train=np.arange(60) % 3, y_test=np.arange(30) % 3)
    out = tmp_path / "out"
    options = {"data": str(tmp_path / "data.npz"), "budget": {"milliseconds": 1000, "params": 3000}, "epochs": 0}
    result = compress(settings(place, out, image_size=None, **options))
    assert (out / "layers.json").exists()
    assert result.report["cost"]["params"]["after"] <= 3000
    assert result.report["budget"]["params"] == pytest.approx(3000 / 5395)
    assert [row["stage"] for row in result.report["accuracy"]][-2:] == ["dense", "compressed"]
    assert "fine-tuned" not in [row["stage"] for row in result.report["accuracy"]]
    values = {}
    exec(result.report["loading"], values)
    assert values["logits"].shape == (1, 3)


def test_a_budget_of_time_that_cannot_be_met_is_refused_before_the_analysis(place, tmp_path, monkeypatch):
    monkeypatch.setattr(compressing, "sensitivity", None)
    with pytest.raises(InfeasibleBudget, match=r"the smallest that can be met is \d.* of the milliseconds"):
        compress(settings(place, tmp_path / "out", budget={"milliseconds": 0.001}))


def test_one_analysis_serves_several_budgets(made, place, tmp_path, monkeypatch):
    """And one of something else is refused, and not kept."""
    known = str(made[0].folder / "sensitivity.jsonl")
    monkeypatch.setattr("basis.search.measures.oneshot", None)
    monkeypatch.setattr(compressing, "repair", None)
    with pytest.raises(TypeError):  # of repair: the analysis is done
        compress(settings(place, tmp_path / "out", budget={"params": 0.9}, table=known))
    torch.save({name: value + 1 for name, value in tiny.network().state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"the table {re.escape(known)} was measured with another weights"):
        compress(settings(place, tmp_path / "new", weights=str(tmp_path / "other.pt"), table=known))
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        ValueError, match=rf"the table {re.escape(known)} cannot be gone on from: it was measured with other data"
    ):
        compress(settings(place, tmp_path / "seed", seed=2, table=known))
    assert not (tmp_path / "seed" / "sensitivity.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="there is no sensitivity table at nowhere"):
        compress(settings(place, tmp_path / "other", table="nowhere"))


def test_what_cannot_be_exported_is_said_and_the_rest_is_kept(place, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Sequential cannot be exported to ONNX: no such operator")

    monkeypatch.setattr(compressing, "export_onnx", broken)
    said = []
    result = compress(settings(place, tmp_path / "out", epochs=0), say=said.append)
    assert result.report["left_out"] == {"ONNX": "Sequential cannot be exported to ONNX: no such operator"}
    assert "Left out: ONNX" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "model.pt2").exists()
    assert "onnxruntime" not in result.report["loading"]


def test_files_for_a_fixed_batch_are_loaded_as_the_report_says(place, tmp_path, monkeypatch):
    def fixed(export):
        def write(model, path, size, *, batch, **options):
            if batch == "dynamic":
                raise RuntimeError("this network has a fixed batch")
            return export(model, path, size, batch=batch, **options)

        return write

    for name in ("export_onnx", "export_program"):
        monkeypatch.setattr(compressing, name, fixed(getattr(compressing, name)))
    result = compress(settings(place, tmp_path / "out", epochs=0))
    assert result.report["loading"].count(".repeat(16, 1, 1, 1)") == 2
    monkeypatch.chdir(ROOT)
    values = {}
    exec(result.report["loading"], values)
    assert values["logits"].shape == (1, 3)
    np.testing.assert_allclose(values["logits"], values["model"](values["x"]).detach().numpy(), atol=1e-4)


def test_without_onnx_it_is_said_at_the_start(place, tmp_path, monkeypatch):
    monkeypatch.setattr("basis.compression.job._installed", lambda name: name != "onnxscript")
    said = []
    job = prepare(settings(place, tmp_path / "out"), say=said.append)
    assert said[-1] == "left out: ONNX, since onnxscript is not installed (pip install onnx onnxscript onnxruntime)"
    assert set(job.left_out) == {"ONNX"}


def test_budgets_are_read():
    assert parse_budget(["params=0.5", "macs=1.5G", "milliseconds=80%"]) == {
        "params": 0.5, "macs": 1.5e9, "milliseconds": 0.8,
    }  # fmt: skip


def test_a_percentage_is_the_same_number_as_its_fraction():
    for percent in range(1, 101):
        assert parse_budget([f"params={percent}%"]) == parse_budget([f"params={percent / 100}"])
    with pytest.raises(ValueError, match=r"'milliseconds=150%', but no more than 100%"):
        parse_budget(["milliseconds=150%"])


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["params", "params=", "params=-1", "params=0", "weight=0.5", "params=half", "0.5", ""])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=r"the budget is .*, but a budget is UNIT=X"):
        parse_budget([text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tests.tiny:fails"}, "cannot be called"),
        ({"model": "torch.nn:Flatten"}, "do not fit the network"),
        ({"weights": "nowhere.pt"}, "there is no file of weights at nowhere.pt"),
        ({"data": "nowhere"}, "there are no data at nowhere"),
        ({"budget": {}}, "there is no budget"),
        ({"budget": {"params": -1}}, "the budget has params=-1"),
        ({"budget": {"weight": 0.5}}, "the budget has weight=0.5"),
        ({"epochs": -1}, "epochs is -1, but it must be at least 0"),
        ({"lr": 0.0}, "lr is 0.0, but it must be positive and finite"),
        ({"lr": float("nan")}, "lr is nan, but"),
        ({"seed": -1}, "seed is -1, but it must be at least 0"),
        ({"seed": 2**64}, "below 2^63"),
        ({"model": "tests.tiny:changes_its_input"}, "the network changes its input in place"),
        ({"model": "tests.tiny:squeezed"}, "returns a tensor of shape (3,) for one image"),
        ({"model": "tests.tiny:locked"}, "the network cannot be copied, as replacing its layers needs"),
        ({"model": "tests.tiny:lazy"}, "the network has parameters without a shape yet"),
        ({"model": "tests.tiny:exits"}, "cannot be called: SystemExit: usage: train.py"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"validation_images": 1000}, "1000 of the 72 training images are to be held out"),
        ({"measure": "guess"}, "the measure is 'guess', but it must be one of spectrum"),
        ({"measure": "full_training"}, "the measure is 'full_training', but"),
        ({"ratios": (1.5,)}, "ratio"),
        ({"exclude": ("layer9.*",)}, "exclude has 'layer9.*', but no convolution has such a name"),
        ({"exclude": ("*",)}, "no convolution of the model has a"),
        ({"device": "cuda:99"}, "'cuda:99' is no device of this machine"),
        ({"device": "meta"}, "the device is 'meta', but times are taken on cpu and cuda only"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(place, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compress(settings(place, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epochs", [0, 1])
def test_batches_of_one_image_are_refused_where_normalisation_needs_more(place, tmp_path, epochs):
    torch.save(tiny.on_one_pixel().state_dict(), tmp_path / "w.pt")
    changes = {"model": "tests.tiny:on_one_pixel", "weights": str(tmp_path / "w.pt"), "epochs": epochs}
    changes["budget"] = {"params": 0.99}
    with pytest.raises(ValueError, match="needs batches of 2 images or more, but batch_size is 1"):
        prepare(settings(place, tmp_path / "out", batch_size=1, **changes))
    prepare(settings(place, tmp_path / "out", batch_size=2, **changes))
    prepare(settings(place, tmp_path / "out", batch_size=1, epochs=epochs))


def test_a_convolution_that_is_never_called_is_no_candidate(place, tmp_path):
    job = prepare(settings(place, tmp_path / "out", model="tests.tiny:not_called", budget={"params": 1.0}))
    assert [layer.name for layer in job.candidates.layers] == ["0"]
    assert job.candidates.skipped["5"] == "never called by the forward pass"


def test_a_budget_that_cannot_be_met_is_refused_at_once(place, tmp_path):
    with pytest.raises(InfeasibleBudget, match=r"the smallest that can be met is 0.\d+ of the params .*smaller ratios"):
        compress(settings(place, tmp_path / "out", budget={"params": 0.05}))
    assert not (tmp_path / "out").exists()


def test_a_network_with_other_outputs_than_there_are_classes(place, tmp_path):
    torch.save(tiny.four().state_dict(), tmp_path / "four.pt")
    with pytest.raises(ValueError, match=r"has 4 outputs, but the data have 3 classes \(ant, bee, cat\)"):
        prepare(settings(place, tmp_path / "out", model="tests.tiny:four", weights=str(tmp_path / "four.pt")))


def test_what_cannot_be_trained_is_refused_before_the_analysis(place, tmp_path):
    for model, message in [
        (
            "tests.tiny:with_auxiliary_output",
            "in training mode the network returns a tuple, so it cannot be fine-tuned",
        ),
        ("tests.tiny:frozen", "no parameter of the network requires a gradient, so it cannot be fine-tuned; give 0 ep"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(settings(place, tmp_path / "out", model=model))
        prepare(settings(place, tmp_path / "out", model=model, epochs=0))


def test_unreadable_images_are_named_before_anything_is_written(place, tmp_path):
    tiny.image_folder(tmp_path / "data", train=24, val=12)
    (tmp_path / "data" / "train" / "cat" / "003.png").write_text("no image")
    with pytest.raises(ValueError, match=r"one image cannot be read: .*cat/003.png"):
        compress(settings(place, tmp_path / "out", data=str(tmp_path / "data")))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_folder_with_another_run_is_kept(made, place, tmp_path):
    before = files(made[0].folder)
    asked = settings(place, made[0].folder)
    torch.save(tiny.network().state_dict(), tmp_path / "other.pt")
    for changes, message in [
        ({"budget": {"params": 0.6}}, r"another run.*budget is {'params': 0.7} there and {'params': 0.6} here"),
        ({"seed": 2, "epochs": 3}, "epochs is 1 there and 3 here; seed is 1 there and 2 here"),
        ({"weights": str(tmp_path / "other.pt")}, "the contents of weights are others"),
        ({"resume": False}, "holds a run of the same settings"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(replace(asked, **changes))
    assert files(made[0].folder) == before


def test_places_that_cannot_be_filled(place, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    for name, message in [
        ("mine", r"holds other things \(thesis.tex\) and nothing is overwritten"),
        ("file", "is a file, but must be a folder"),
        ("file/out", "nothing can be written to the folder"),
        ("damaged", "run.json is damaged"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(settings(place, tmp_path / name))
    (tmp_path / "killed").mkdir()  # while run.json was written
    (tmp_path / "killed" / "run.json.y58uk1mm.tmp").write_text("{")
    prepare(settings(place, tmp_path / "killed"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"MB left, but about 1\d MB are needed"):
        compress(settings(place, tmp_path / "out"))


def test_the_command_says_one_sentence(place, tmp_path, capsys):
    arguments = command_line(place)
    assert main([*arguments, "--budget", "params=0.01", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("basis: no plan of the rule 'optimal' meets a budget of 0.01 of the params")
    assert captured.err.count("\n") == 1


def test_the_report_says_what_the_numbers_beside_it_say(made):
    folder, report = made[0].folder, json.loads((made[0].folder / "report.json").read_text())
    assert report == made[0].report
    seen = check_page((folder / "report.html").read_text(), report)
    text = " ".join(seen.text)
    assert "depthwise: one filter per group" in text
    assert report["apart"] < 1e-4
    assert {"model.onnx", "model.pt2"} <= {file["name"] for file in report["files"]}
    assert "basis compress ..." in (folder / "report.html").read_text()
