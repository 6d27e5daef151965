"""A whole run on a tiny network and few images, resumed, refused, and loaded again."""

import errno
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import basis
from basis.cli import main
from basis.compression import compress as module
from basis.compression.compress import Settings, compress, prepare
from basis.saving import plain
from tests import tiny
from tests.training.common import at

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and weights."""
    folder = tmp_path_factory.mktemp("own")
    tiny.image_folder(folder / "data", train=24, val=12)
    torch.save({"state_dict": tiny.network().state_dict()}, folder / "weights.pt")
    return folder


def settings(place, out, **changes):
    usual = {"model": "tests.tiny:network", "weights": str(place / "weights.pt"), "data": str(place / "data")}
    usual |= {"budget": {"params": 0.7}, "out": str(out), "image_size": 16, "batch_size": 16, "seed": 1}
    return Settings(**(usual | {"export": ("program",), "anyway": True} | changes))


@pytest.fixture(scope="module")
def made(place):
    """A finished run's report."""
    said = []
    report = compress(settings(place, place / "made"), say=said.append, command="typed")
    assert [line.partition(":")[0] for line in said if not line.startswith("warning")] == [
        "images",
        *(stage.__name__.replace("_", " ") for stage in module.STAGES),
    ]
    return report


@pytest.fixture
def first_stage(monkeypatch):
    """Runs end after the first stage, without a report."""
    monkeypatch.setattr(module, "STAGES", module.STAGES[:1])
    monkeypatch.setattr(module, "_report", lambda job, done, command: done)


def words(place, out, data=None):
    """A run as a command."""
    line = ["compress", "tests.tiny:network", "--weights", str(place / "weights.pt"), "--budget", "params=0.7"]
    line += ["--data", str(data or place / "data"), "--out", str(out), "--image-size", "16", "--epochs", "0"]
    return [*line, "--export", "program", "--anyway"]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop(*arguments, **options):
    raise KeyboardInterrupt


# -- a whole run ------------------------------------------------------------------------------------


def test_the_folder_holds_a_network_within_the_budget_and_its_exports(made, place):
    report, folder = made, place / "made"
    small = basis.load(tiny.network(), folder).eval()
    assert report["cost"]["params"][1] == basis.count_parameters(small) <= 0.7 * basis.count_parameters(tiny.network())
    plan = basis.Plan.load(folder / "plan.json")
    assert plan.skipped["3"] == "depthwise: one filter per group"
    assert plan.layers == report["stages"]["replace_layers"]["layers"]
    x = torch.randn(5, 3, 16, 16)
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(x), small(x), atol=1e-4, rtol=1e-4)
    assert report["stages"]["export"]["files"].keys() == {"model.pt2"}
    assert not (folder / "stages" / "finetuning.pt").exists()


def test_the_report_says_how_to_load_the_network(made, place):
    assert json.loads((place / "made" / "report.json").read_text()) == made
    page = (place / "made" / "report.html").read_text()
    [code] = re.findall(r"<pre><code>(from basis.*?)</code>", page, re.DOTALL)
    train, _ = module.open_images(place / "data").train[0]
    values = {"image": train}
    exec(html.unescape(code), values)
    assert values["logits"].shape == (1, 3)


def test_the_test_images_are_used_for_the_last_numbers_only(place, tmp_path, monkeypatch):
    """With other test images all else comes out the same."""
    tiny.image_folder(tmp_path / "data", train=24, val=12)
    for file in (tmp_path / "data" / "val").rglob("*.png"):
        file.write_bytes((tmp_path / "data" / "val" / "ant" / "000.png").read_bytes())
    monkeypatch.setattr(module, "STAGES", module.STAGES[:5])
    monkeypatch.setattr(module, "_report", lambda job, done, command: done)
    first, second = (
        compress(settings(place, tmp_path / name, data=str(data)))
        for name, data in (("one", place / "data"), ("two", tmp_path / "data"))
    )
    for stage in first:
        del first[stage]["seconds"], second[stage]["seconds"]
    assert first == second
    assert first["fine_tune"]["accuracy"]


def test_a_budget_in_milliseconds_and_no_fine_tuning(place, tmp_path, monkeypatch):
    times = {"0": {16: 16.0, 8: 8.0}, "5": {32: 32.0, 16: 16.0, 8: 8.0}}
    monkeypatch.setattr(module.BenchReport, "latencies", lambda report, step: times)
    budget = {"milliseconds": 0.7, "params": 0.9}
    options = {"budget": budget, "epochs": 0}
    report = compress(settings(place, tmp_path / "out", **options))
    assert report["input_size"] == [3, 16, 16]
    assert report["stages"]["time_layers"]["dense_ms"] == 48
    layers = report["stages"]["replace_layers"]["layers"]
    assert sum({"0": 16, "5": 32, **layers}.values()) <= 0.7 * 48
    assert "accuracy" not in report["stages"]["fine_tune"]
    with pytest.raises(ValueError, match="budget milliseconds cannot be met"):
        compress(settings(place, tmp_path / "less", **options | {"budget": {"milliseconds": 0.3}}))


def test_worker_processes_read_the_same_images(place, monkeypatch, tmp_path):
    job = prepare(settings(place, tmp_path / "out"))
    alone = list(job.batches("train"))
    monkeypatch.setattr(module, "MANY", 1)
    loader = job.batches("train")
    assert loader.num_workers > 0
    for (_, labels), (x, again) in zip(alone, loader, strict=True):
        assert torch.equal(labels, again)
        assert x.shape == (16, 3, 16, 16)


def test_what_cannot_be_exported_is_said_and_the_rest_is_kept(place, tmp_path, monkeypatch):
    def fixed(model, path, size, *, batch, **options):
        if batch == "dynamic":
            raise RuntimeError("fixed")
        return basis.export.export_program(model, path, size, batch=batch, **options)

    def broken(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(module, "EXPORTS", {"onnx": ("model.onnx", broken), "program": ("model.pt2", fixed)})
    report = compress(settings(place, tmp_path / "out", epochs=0, export=("onnx", "program")))
    found = report["stages"]["export"]["files"]
    assert found["model.onnx"] == {"failed": "no such operator"}
    assert found["model.pt2"]["batch"] == 16
    assert "Left out: model.onnx" in (tmp_path / "out" / "report.html").read_text()


def test_what_differs_from_the_network_that_was_scored_is_not_exported(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fold", lambda model, **_: tiny.network().eval())
    with pytest.raises(ValueError, match=r"differs by .* from what was scored"):
        compress(settings(place, tmp_path / "out", epochs=0))
    assert not {"model.pt2", "stages/export.json", "report.json"} & files(tmp_path / "out").keys()


def test_a_network_that_a_tracer_takes_for_another_is_exported_as_it_was_scored(place, tmp_path):
    out, x = tmp_path / "out", torch.randn(3, 3, 16, 16)
    compress(settings(place, out, model="tests.tiny:branching", epochs=0))
    small = basis.load(tiny.branching(), out).eval()
    torch.testing.assert_close(torch.export.load(out / "model.pt2").module()(x), small(x), atol=1e-3, rtol=1e-3)


def test_images_that_exif_would_turn_are_told_in_one_line(place, tmp_path, first_stage):
    tiny.image_folder(tmp_path / "data", train=24, val=12)
    exif, said = Image.Exif(), []
    exif[274] = 6
    Image.new("RGB", (24, 20)).save(tmp_path / "data" / "train" / "ant" / "turned.jpg", exif=exif)
    for _ in range(2):
        compress(settings(place, tmp_path / "out", data=str(tmp_path / "data")), say=said.append)
    told = [line for line in said if "EXIF" in line]
    assert len(told) == 2
    assert "1 training images carry a rotation" in told[0]


def test_numbers_of_numpy_and_paths_will_do(place, tmp_path):
    given = {"budget": {"params": np.float32(0.7)}, "ratios": np.array([0.5, 0.25]), "seed": np.int64(1)}
    asked = settings(place, tmp_path / "out", **given)
    asked = replace(asked, weights=place / "weights.pt", data=place / "data", out=tmp_path / "out")
    job = prepare(asked)
    assert json.loads(json.dumps(job.identity)) == job.identity
    json.dumps(plain(asdict(asked)))


# -- resuming ---------------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(made, place, monkeypatch):
    before = files(place / "made")
    for name in ("sensitivity", "finetune", "recalibrate", "fold", "check_images", "export_program"):
        monkeypatch.setattr(module, name, None)
    assert compress(settings(place, place / "made"), command="typed") == made
    assert files(place / "made") == before


def test_fine_tuning_resumes_with_the_numbers_that_it_would_have_had(place, tmp_path, monkeypatch):
    real, found = module.finetune, []
    monkeypatch.setattr(module, "STAGES", module.STAGES[:5])
    monkeypatch.setattr(module, "_report", lambda job, done, command: job.small().state_dict())
    for name in ("whole", "parts"):
        asked = settings(place, tmp_path / name, epochs=2)
        if name == "parts":
            with monkeypatch.context() as patch:
                patch.setattr(module, "finetune", lambda *a, **o: real(*a, **o, should_stop=at(4)))
                with pytest.raises(RuntimeError, match="stopped after epoch 1 of 2"):
                    compress(asked)
            monkeypatch.setattr(module, "sensitivity", None)  # what came before is not done again
        found.append(compress(asked))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.weekly
def test_a_run_killed_at_random_moments_ends_with_the_same_network(place, tmp_path):
    budget = ["--budget", "params=0.7", "--image-size", "16", "--batch-size", "16", "--epochs", "40", "--anyway"]
    command = [sys.executable, "-m", "basis.cli", "compress", "tests.tiny:network", "--device", "cpu", *budget]
    command += ["--weights", str(place / "weights.pt"), "--data", str(place / "data"), "--out"]
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **options)
    for seconds in np.random.default_rng(0).uniform(3, 12, 8):
        child = subprocess.Popen([*command, str(tmp_path / "parts")], **options)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run([*command, str(tmp_path / "parts")], check=True, **options)
    networks = [basis.load(tiny.network(), tmp_path / name).state_dict() for name in ("whole", "parts")]
    torch.testing.assert_close(*networks, rtol=0, atol=0)


# -- wrong input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tests.tiny:fails"}, "makes no network"), ({"model": "resnet-18"}, "near it are .*resnet18"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"), ({"data": "nowhere"}, "data is nowhere"),
        ({"budget": {"weight": 0.5}}, "budget"), ({"budget": {"params": 0.05}}, "budget params .* at least 0"),
        ({"lr": float("nan")}, "lr"), ({"validation": 1000}, "validation"), ({"measure": "guess"}, "measure"),
        ({"export": ("pickle",)}, "export"), ({"mean": (0.5, 0.5, 0.5)}, "std"),
        ({"mean": (0.5,) * 4, "std": (0.5,) * 4}, "std"), ({"crop": 1.5}, "crop"), ({"crop": 0}, "crop"),
        ({"ratios": (1.5,)}, "ratio"),
        ({"classes": 2}, "does not fit|classes"), ({"device": "cuda:99"}, "CUDA|cuda|NVIDIA"),
        ({"model": "tests.tiny:squeezed"}, "logits"), ({"model": "tests.tiny:four"}, r"\[3, 32\]"),
        ({"model": "tests.tiny:frozen"}, "epochs must be 0"),
        ({"model": "tests.tiny:with_auxiliary_output"}, "epochs must be 0"), ({"weights": "."}, "no file of weights"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_written(place, tmp_path, monkeypatch, changes, message):
    with pytest.raises(ValueError, match=message):
        compress(settings(place, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    if message == "epochs must be 0":
        prepare(settings(place, tmp_path / "out", epochs=0, **changes))


def test_images_of_one_size_stay_as_they_are_for_a_network_of_ones_own(place, tmp_path, monkeypatch, first_stage):
    said = []
    compress(settings(place, tmp_path / "out", image_size=None), say=said.append)
    assert said[0].startswith("images: neither resized nor cropped")
    monkeypatch.setattr(module, "check_images", None)  # a run that goes on does not look at them again
    assert prepare(settings(place, tmp_path / "out", image_size=None)).input_size == (3, 20, 24)


def test_a_network_that_only_guesses_stops_before_the_search(place, tmp_path, first_stage):
    said = []
    for size in (16, 24):  # the folder stays free for the next try
        with pytest.raises(ValueError, match=r"7 held-out .*guessing .*33.3%.*--mean.*--anyway"):
            compress(settings(place, tmp_path / "out", anyway=False, image_size=size))
    compress(settings(place, tmp_path / "out"), say=said.append)
    assert "--mean" in said[-1]
    compress(settings(place, tmp_path / "out", anyway=False))  # what was done is not judged again


def test_unreadable_images_are_named_before_anything_is_written(place, tmp_path):
    tiny.image_folder(tmp_path / "data", train=24, val=12)
    (tmp_path / "data" / "train" / "cat" / "003.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cat/003.png"):
        compress(settings(place, tmp_path / "out", data=str(tmp_path / "data")))
    assert not (tmp_path / "out").exists()


def test_a_run_belongs_to_the_network_that_its_factory_made(place, tmp_path, monkeypatch, first_stage):
    monkeypatch.syspath_prepend(tmp_path)
    for slope, name in ((0.1, "first"), (0.2, "second")):
        text = "import torch\nfrom tests.tiny import network\n"
        text += f"def make():\n    model = network()\n    model[2] = torch.nn.LeakyReLU({slope})\n    return model\n"
        (tmp_path / f"{name}.py").write_text(text)
    compress(settings(place, tmp_path / "out", model="first:make"))
    with pytest.raises(ValueError, match="a run with other model, network;"):
        compress(settings(place, tmp_path / "out", model="second:make"))


def test_damaged_files_of_a_run_are_named(place, tmp_path, first_stage):
    compress(settings(place, tmp_path / "out"))
    for name in ("stages/evaluate_dense.json", "run.json"):
        for content in ("", "{", "[1]", "null"):
            (tmp_path / "out" / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                compress(settings(place, tmp_path / "out"))


def test_missing_packages_are_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_installed", lambda name: name != "onnxscript")
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        prepare(settings(place, tmp_path / "out", export=("onnx",)))

    def missing():
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr("basis.compression.images.import_torchvision", missing)
    with pytest.raises(ValueError, match="No module named 'torchvision'"):
        prepare(settings(place, tmp_path / "out"))


def test_folders_of_others_are_kept(made, place, tmp_path):
    before, asked = files(place / "made"), settings(place, place / "made")
    torch.save(tiny.network(3).half().state_dict(), tmp_path / "other.pt")
    for changes, key in (
        ({"budget": {"params": 0.6}}, "budget"), ({"seed": 2, "epochs": 3}, "epochs, seed"),
        ({"weights": str(tmp_path / "other.pt")}, "weights"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"a run with other {key};"):
            compress(replace(asked, **changes))
    assert files(place / "made") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for name in ("mine", "mine/thesis.tex"):
        with pytest.raises(ValueError, match="name another folder"):
            compress(settings(place, tmp_path / name))
    (tmp_path / "killed").mkdir()  # while run.json was written
    (tmp_path / "killed" / "run.json.y58uk1mm.tmp").write_text("{")
    prepare(settings(place, tmp_path / "killed"))


def test_the_command_says_one_sentence(place, tmp_path, capsys):
    assert main([*words(place, tmp_path / "out"), "--budget", "params=0.01"]) == 2
    assert re.fullmatch(r"basis: budget params cannot be met.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_cannot_be_printed_lose_nothing(place, tmp_path, monkeypatch, encoding):
    """A Japanese folder and names that are not UTF-8, on a terminal that knows neither."""
    data, out = tmp_path / "\u5199\u771f", tmp_path / os.fsdecode("\u7d50\u679c".encode() + b"\xe9")
    tiny.image_folder(data, train=24, val=12)
    for part in ("train", "val"):
        (data / part / "ant").rename(data / part / os.fsdecode(b"\xe9t\xe9"))
    told = io.BytesIO()
    terminal = io.TextIOWrapper(told, encoding=encoding, write_through=True)
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, terminal)
        assert main(words(place, out, data)) == 0, told.getvalue()
        assert main([*words(place, out, data), "--seed", "9"]) == 2
    assert b"\\u7d50" in told.getvalue()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert Path(report["folder"]) == out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "\u7d50\u679c" in page
    assert "\\udce9t\\udce9" in page


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, None])
def test_what_the_system_refuses_is_one_sentence(place, tmp_path, monkeypatch, capsys, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "there")

    if code:
        monkeypatch.setattr(module, "open_images", refuse)
    for out in (tmp_path / ("n" * 300), place / "weights.pt" / "out"):
        assert main(words(place, out)) == 2
        said = rf".*{os.strerror(code)}: there" if code else ""
        assert re.fullmatch(rf"basis: {said}.*\n", capsys.readouterr().err)
