"""The data: loading and refusing files, holding out, augmentation in one pass, the synthetic stand-in."""

import numpy as np
import pytest
import torch

from basis.data import (
    MEAN,
    SHAPES,
    DataError,
    Images,
    augment,
    first_images,
    hold_out,
    load_cifar10,
    normalise,
    synthetic,
)
from basis.vision import import_torchvision


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 10 if name.startswith("y") else 256, shape, dtype=np.uint8)
        for name, shape in SHAPES.items()
    }


def test_a_good_file_is_read_as_it_is(arrays, tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10.npz", **arrays)
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
        (lambda a: a | {"x_test": a["x_test"].transpose(0, 3, 1, 2)}, r"x_test .* uint8 \(10000, 3, 32, 32\)"),
        (lambda a: {k: v for k, v in a.items() if k != "y_test"}, "y_test"),
        (lambda a: a | {"y_test": a["y_test"] + np.uint8(100)}, "labels from 0 to 9"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(arrays, tmp_path, spoil, says):
    np.savez(tmp_path / "cifar10.npz", **spoil(arrays))
    with pytest.raises(DataError, match=says):
        load_cifar10(tmp_path)


def test_a_truncated_file_is_refused(arrays, tmp_path):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"cifar10.npz cannot be read .* delete it"):
        load_cifar10(tmp_path)


def test_without_a_file_the_message_says_how_to_bring_it(tmp_path):
    with pytest.raises(DataError, match=rf"not in {tmp_path}; bring cifar10.npz"):
        load_cifar10(tmp_path, download=False)


def test_without_a_network_every_address_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("basis.data.MIRRORS", ("http://127.0.0.1:9/a", "http://127.0.0.1:10/b"))
    with pytest.raises(DataError, match=r":9/.*:10/"):
        load_cifar10(tmp_path)


def test_what_torchvision_reads_comes_as_arrays(arrays, tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import CIFAR10

    def read(self, root, train, download):
        part = "train" if train else "test"
        self.data, self.targets = arrays[f"x_{part}"].copy(order="F"), arrays[f"y_{part}"].tolist()

    monkeypatch.setattr(CIFAR10, "__init__", read)
    data = load_cifar10(tmp_path)
    assert torch.equal(data.train.x, torch.from_numpy(arrays["x_train"]))
    assert data.train.x.is_contiguous()
    assert torch.equal(data.test.y, torch.from_numpy(arrays["y_test"]).long())


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


def _numbered(n=64):
    """Images whose pixel values tell their row, column and number."""
    x = torch.zeros((n, 32, 32, 3), dtype=torch.uint8)
    x[..., 0] = torch.arange(32)[:, None] + 100
    x[..., 1] = torch.arange(32) + 100
    x[..., 2] = torch.arange(n)[:, None, None]
    return x


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


def test_normalised_batches_are_centred_channels_last_floats():
    x = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    y = normalise(x)
    assert y.shape == (8, 3, 32, 32)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = (x[2, 5, 7, 1] / 255 - 0.4822) / 0.2435
    assert y[2, 1, 5, 7].item() == pytest.approx(expected.item(), abs=1e-5)
    assert len(Images(x, torch.zeros(8, dtype=torch.long)).take(torch.tensor([1, 2]))) == 2
