"""The data: loading and refusing files, holding out, augmentation in one pass, the synthetic stand-in."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from basis.data import (
    ARCHIVE,
    MEAN,
    SHAPES,
    DataError,
    Images,
    augment,
    fetch_archive,
    first_images,
    hold_out,
    load_cifar10,
    normalise,
    read_archive,
    save_arrays,
    synthetic,
)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 10 if name.startswith("y") else 256, shape, dtype=np.uint8)
        for name, shape in SHAPES.items()
    }


def test_a_good_file_is_read_as_it_is(arrays, tmp_path, monkeypatch):
    save_arrays(tmp_path / "cifar10.npz", arrays)
    monkeypatch.setenv("BASIS_DATA", str(tmp_path))
    data = load_cifar10()
    assert data.train.x.shape == (50000, 32, 32, 3)
    assert data.train.x.dtype == torch.uint8
    assert data.test.y.dtype == torch.int64
    assert torch.equal(data.test.x, torch.from_numpy(arrays["x_test"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10.npz"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a: a | {"x_test": a["x_test"].transpose(0, 3, 1, 2)}, r"x_test .* uint8 \(10000, 3, 32, 32\), but"),
        (lambda a: a | {"x_test": a["x_test"].astype(np.float32)}, r"x_test .* float32"),
        (lambda a: {k: v for k, v in a.items() if k != "y_test"}, "lacks y_test"),
        (lambda a: a | {"y_test": a["y_test"] + np.uint8(100)}, "labels run from 0 to 9"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(arrays, tmp_path, spoil, says):
    save_arrays(tmp_path / "cifar10.npz", spoil(arrays))
    with pytest.raises(DataError, match=says):
        load_cifar10(tmp_path)


def test_a_truncated_file_is_refused(arrays, tmp_path):
    path = tmp_path / "cifar10.npz"
    save_arrays(path, arrays)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"cifar10.npz is not an npz file, or only a part of one; delete it"):
        load_cifar10(tmp_path)


def test_a_file_damaged_inside_is_refused(arrays, tmp_path):
    path = tmp_path / "cifar10.npz"
    save_arrays(path, arrays)
    content = bytearray(path.read_bytes())
    content[1000:5000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10.npz cannot be read .* delete it"):
        load_cifar10(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_a_batch_is_made_without_waiting_for_the_device():
    data, generator = synthetic(train=200).to("cuda"), torch.Generator("cuda").manual_seed(0)
    index = torch.arange(100, device="cuda")
    normalise(augment(data.train.x, index, generator))
    torch.cuda.set_sync_debug_mode("error")
    try:
        normalise(augment(data.train.x, index, generator))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_a_file_the_message_says_how_to_bring_it(tmp_path):
    with pytest.raises(DataError, match=rf"bring {ARCHIVE} .* put it into {tmp_path}"):
        load_cifar10(tmp_path, download=False)


def test_without_a_network_every_address_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("basis.data.ARCHIVE_URLS", (f"http://127.0.0.1:9/{ARCHIVE}", f"http://127.0.0.1:10/{ARCHIVE}"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"could not be downloaded; bring .*:9/.*:10/"):
        fetch_archive(tmp_path, progress=False)


def _archive(path):
    """An archive laid out as the original, with ten images in each batch."""
    rng = np.random.default_rng(1)
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            batch = {b"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), b"labels": list(range(10))}
            content = pickle.dumps(batch)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_an_archive_brought_by_hand_is_converted(tmp_path):
    _archive(tmp_path / ARCHIVE)
    arrays = read_archive(tmp_path / ARCHIVE)
    assert arrays["x_train"].shape == (50, 32, 32, 3)
    with tarfile.open(tmp_path / ARCHIVE) as tar:
        first = pickle.load(tar.extractfile("cifar-10-batches-py/data_batch_1"), encoding="bytes")
    # channel 2, row 5, column 7 of the first image stands at 2 * 1024 + 5 * 32 + 7 of its line
    assert arrays["x_train"][0, 5, 7, 2] == first[b"data"][0, 2 * 1024 + 5 * 32 + 7]


def test_an_archive_with_another_checksum_is_not_unpacked(tmp_path, monkeypatch):
    _archive(tmp_path / ARCHIVE)
    monkeypatch.setattr("basis.data.ARCHIVE_URLS", (f"http://127.0.0.1:9/{ARCHIVE}",))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch_archive(tmp_path, progress=False)


def test_held_out_images_leave_the_training_set_and_depend_on_the_seed_alone():
    data = synthetic(train=100)
    first, second, other = hold_out(data, 20), hold_out(data, 20), hold_out(data, 20, seed=1)
    assert (len(first.train), len(first.validation)) == (80, 20)
    assert torch.equal(first.validation.x, second.validation.x)
    assert not torch.equal(first.validation.x, other.validation.x)
    both = torch.cat([first.train.x, first.validation.x]).flatten(1).float().sum(1).sort().values
    assert torch.equal(both, data.train.x.flatten(1).float().sum(1).sort().values)
    with pytest.raises(ValueError, match="validation is 100"):
        hold_out(data, 100)
    with pytest.raises(ValueError, match="train is 101"):
        first_images(data, 101)


def test_the_stand_in_is_deterministic_and_balanced():
    assert torch.equal(synthetic(train=50).train.x, synthetic(train=50).train.x)
    assert synthetic(train=50).train.y.bincount().tolist() == [5] * 10


def _numbered(n=64):
    """Images whose pixel values tell their row, column and number."""
    x = torch.zeros((n, 32, 32, 3), dtype=torch.uint8)
    x[..., 0] = torch.arange(32)[:, None] + 100
    x[..., 1] = torch.arange(32) + 100
    x[..., 2] = torch.arange(n)[:, None, None]
    return x


def test_without_options_augmentation_only_gathers():
    x, index = _numbered(), torch.tensor([5, 3, 3])
    batch = augment(x, index, torch.Generator().manual_seed(0), flip=False, translate=0, cutout=0)
    assert torch.equal(batch, x[index])


def test_flips_mirror_about_half_of_the_images():
    x = _numbered(1)
    batch = augment(x, torch.zeros(1000, dtype=torch.long), torch.Generator().manual_seed(0), translate=0, cutout=0)
    mirrored = (batch == x.flip(2)).flatten(1).all(1)
    assert (mirrored | (batch == x).flatten(1).all(1)).all()
    assert 440 < mirrored.sum() < 560


def test_shifts_reach_their_bound_and_reflect_the_border():
    x = _numbered(1)
    generator = torch.Generator().manual_seed(0)
    batch = augment(x, torch.zeros(500, dtype=torch.long), generator, flip=False, translate=4, cutout=0)
    shifts = batch[:, 16, 16, 0].long() - 116
    assert set(shifts.tolist()) == set(range(-4, 5))
    up = batch[shifts == -4][0, :, 0, 0].tolist()
    assert up[:6] == [104, 103, 102, 101, 100, 101]
    down = batch[shifts == 4][0, :, 0, 0].tolist()
    assert down[-6:] == [130, 131, 130, 129, 128, 127]


def test_cutout_greys_one_whole_square():
    x = torch.full((200, 32, 32, 3), 255, dtype=torch.uint8)
    batch = augment(x, torch.arange(200), torch.Generator().manual_seed(0), flip=False, translate=0, cutout=12)
    grey = (batch != 255).all(3)
    assert (grey.flatten(1).sum(1) == 144).all()
    assert (grey.any(1).sum(1) == 12).all()
    assert batch[grey].float().mean(0).tolist() == [round(255 * m) for m in MEAN]


def test_the_generator_decides_alone():
    x, index = _numbered(), torch.arange(64)
    first, again, other = (augment(x, index, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_normalised_batches_are_centred_channels_last_floats():
    x = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    y = normalise(x)
    assert y.shape == (8, 3, 32, 32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = (x[2, 5, 7, 1] / 255 - 0.4822) / 0.2435
    assert y[2, 1, 5, 7].item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(Images(x, torch.zeros(8, dtype=torch.long)).take(torch.tensor([1, 2]))) == 2
