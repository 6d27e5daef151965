import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from basis.compression.images import Loader, check_images, hold_out, open_pictures, preparation_for, prepared, some
from basis.compression.networks import IMAGENET
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    tiny.image_folder(tmp_path / "data", train=6, val=4)
    return tmp_path / "data"


def arrays(tmp_path, **changes):
    rng = np.random.default_rng(0)
    content = {
        "x_train": rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), "y_test": np.arange(6) % 3,
    }  # fmt: skip
    content |= changes
    np.savez(tmp_path / "data.npz", **{name: value for name, value in content.items() if value is not None})
    return tmp_path / "data.npz"


def loader(split, preparation=None, **options):
    preparation = preparation or IMAGENET
    return Loader(split, preparation, **{"batch_size": 4, "device": CPU, **options})


def test_a_folder_has_its_classes_in_alphabetical_order(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / "ant" / ".hidden.png").write_text("not an image")
    pictures = open_pictures(folder)
    assert pictures.classes == tiny.CLASSES
    assert (len(pictures.train), len(pictures.test)) == (18, 12)
    assert pictures.notes == ("1 files that are no images by their names were left aside",)
    for file, label in zip(pictures.train.files, pictures.train.labels, strict=True):
        assert file.parent.name == tiny.CLASSES[label]


def test_images_of_a_nested_class_belong_to_it(folder):
    (folder / "train" / "bee" / "more").mkdir()
    (folder / "train" / "bee" / "000.png").rename(folder / "train" / "bee" / "more" / "x.PNG")
    assert (open_pictures(folder).train.labels == 1).sum() == 6


def test_links_to_folders_are_followed_and_those_in_a_circle_once(folder, tmp_path):
    store = tmp_path / "store"
    (folder / "train" / "bee").rename(store)
    (folder / "train" / "bee").symlink_to(store)
    (folder / "train" / "ant" / "more").symlink_to(store)
    (store / "again").symlink_to(folder / "train" / "ant")
    train = open_pictures(folder).train
    found = [[file.relative_to(folder / "train").as_posix() for file in train.files if f"/{name}/" in str(file)]
             for name in ("ant", "bee")]  # fmt: skip
    images = [f"00{i}.png" for i in range(6)]
    assert found[0] == [f"{place}{name}" for place in ("ant/", "ant/more/") for name in images]
    assert found[1] == [f"{place}{name}" for place in ("bee/", "bee/again/") for name in images]
    assert len(train) == 30


def test_the_digest_of_a_folder_is_of_its_sorted_files(folder):
    for name in ("deep/a-b/x.png", "deep/a/y.png", "deep/a.png", ".hidden/z.png"):
        path = folder / "train" / "bee" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    files = [path for part in ("train", "val") for path in sorted((folder / part).rglob("*")) if path.is_file()]
    said = "".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n" for path in files)
    assert open_pictures(folder).digest == hashlib.sha256(said.encode()).hexdigest()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "val").rename(f / "validation"),
            r"has only train, validation, but it must have train/ and val/",
        ),
        (lambda f: (f / "train" / "new").mkdir(), r"train/new has no images in it"),
        (lambda f: (f / "val" / "cat").rename(f / "val" / "dog"), "cat is not in val, dog is not in train"),
        (lambda f: [(f / "val" / c).rename(f / c) for c in tiny.CLASSES], "val has no folder of a class in it"),
    ],
)
def test_folders_that_are_no_data(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_pictures(folder)


def test_images_without_folders_of_classes(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / part / "a.png")
    with pytest.raises(ValueError, match="train has images, but no folder for each class in it"):
        open_pictures(tmp_path)


def test_unreadable_images_are_named(folder):
    pictures = open_pictures(folder)
    check_images([pictures.train, pictures.test])
    (folder / "train" / "bee" / "002.png").write_text("no image at all")
    cut = folder / "val" / "ant" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"2 images cannot be read: .*bee/002.png \(no image\); .*ant/001.png \(.+\)"):
        check_images([pictures.train, pictures.test])


def test_a_jpeg_that_was_cut_short_is_named(folder):
    path = folder / "train" / "bee" / "long.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(path)
    check_images([open_pictures(folder).train])
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"one image cannot be read: .*long.jpg \(image file is truncated"):
        check_images([open_pictures(folder).train])


@pytest.mark.parametrize(
    ("dtype", "name", "mode"),
    [("uint16", "a.png", "I;16"), ("uint16", "a.tif", "I;16"), ("int32", "a.tif", "I"), ("float32", "a.tif", "F")],
)
def test_images_that_would_be_cut_off_at_8_bits_are_named(folder, dtype, name, mode):
    path = folder / "train" / "bee" / name
    Image.fromarray(np.full((8, 8), 3000).astype(dtype)).save(path)
    mode = Image.open(path).mode if mode == "I;16" else mode  # older Pillow says I
    pictures = open_pictures(folder)
    said = rf"{name} \(its mode is {mode}, but only 8 bits a channel are read\)"
    with pytest.raises(ValueError, match=f"one image cannot be read: .*{said}"):
        check_images([pictures.train])
    for use in (lambda: prepared(path, IMAGENET), lambda: list(loader(pictures.train))):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: its mode is {mode}, but only 8 bits"):
            use()


def test_an_npz_is_read(tmp_path):
    pictures = open_pictures(arrays(tmp_path, classes=np.array(["a", "b", "c", "d"])))
    assert pictures.classes == ("a", "b", "c", "d")
    assert open_pictures(arrays(tmp_path)).classes == ("0", "1", "2")
    assert len(pictures.train) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((12, 3, 8, 8), np.uint8)}, r"x_train in .* must be uint8 \(N, H, W, 1 or 3\)"),
        ({"x_test": np.zeros((6, 8, 8, 3), np.float32)}, "x_test in .* is float32"),
        ({"x_test": np.zeros((6, 9, 9, 3), np.uint8)}, r"but x_test of \(9, 9, 3\)"),
        ({"y_train": np.arange(5)}, "but must be 12 whole numbers"),
        ({"y_test": np.arange(6)}, "y_test in .* holds the label 5, but there are 3 classes"),
        ({"y_train": np.arange(12) - 1}, "holds the label -1"),
    ],
)
def test_arrays_that_are_no_data(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_pictures(arrays(tmp_path, **changes))


def test_what_is_no_data_at_all(tmp_path):
    (tmp_path / "x.txt").write_text("no data")
    for path, message in [(tmp_path / "gone", "there are no data"), (tmp_path / "x.txt", "neither a folder of images")]:
        with pytest.raises(ValueError, match=message):
            open_pictures(path)


def test_held_out_images_are_apart_from_the_others_and_the_same_for_a_seed(folder):
    pictures = open_pictures(folder)
    first, again, other = (hold_out(pictures, 5, seed=seed) for seed in (0, 0, 1))
    assert set(first.train.files) | set(first.validation.files) == set(pictures.train.files)
    assert not set(first.train.files) & set(first.validation.files)
    assert first.validation.files == again.validation.files != other.validation.files
    assert len(some(first.train, 4, seed=0)) == 4
    for number in (0, 18):
        with pytest.raises(ValueError, match="at least one must be, and one must be left"):
            hold_out(pictures, number, seed=0)


def test_the_middle_of_an_image_is_what_torchvision_takes(folder):
    """Resize the shorter side, cut the middle: against a straightforward one by Pillow."""
    pictures = open_pictures(folder)
    preparation = preparation_for(pictures, None, size=16)
    batches = list(loader(pictures.test, preparation))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 16, 16)] * 3
    image = Image.open(pictures.test.files[5]).resize((22, 18), Image.Resampling.BILINEAR)  # 24 x 20, to 16 / 0.875
    wanted = np.asarray(image.crop((3, 1, 19, 17))) / 255
    wanted = (wanted - IMAGENET.mean) / IMAGENET.std
    torch.testing.assert_close(batches[1][0][1].double(), torch.from_numpy(wanted).permute(2, 0, 1), atol=1e-5, rtol=0)
    assert batches[1][1].tolist() == pictures.test.labels[4:8].tolist()
    torch.testing.assert_close(prepared(pictures.test.files[5], preparation)[0], batches[1][0][1])


def test_images_for_training_are_drawn_anew_each_time_and_can_be_drawn_again(folder):
    pictures = open_pictures(folder)
    images = loader(pictures.train, preparation_for(pictures, None, size=16), augment=True, seed=3)
    first = list(images)
    assert len(images) == len(first) == 4  # of 18 images two are left out
    state = images.generator.get_state()
    second = list(images)
    images.generator.set_state(state)
    for (x, y), (again, labels) in zip(second, images, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    assert not torch.equal(first[0][0], second[0][0])


def test_small_images_of_the_right_size_are_only_shifted_and_mirrored(tmp_path):
    pictures = open_pictures(arrays(tmp_path))
    preparation = preparation_for(pictures, None)
    assert (preparation.size, preparation.crop) == (8, 1.0)
    x, _ = next(iter(loader(pictures.train, preparation, batch_size=12)))
    back = x.permute(0, 2, 3, 1) * torch.tensor(IMAGENET.std) + torch.tensor(IMAGENET.mean)
    assert (back * 255).round().byte().numpy().tolist() == pictures.train.array.tolist()
    drawn, _ = next(iter(loader(pictures.train, preparation, batch_size=12, augment=True)))
    for image in drawn:
        values = set(image.flatten().tolist())
        assert any(values <= set(own.flatten().tolist()) for own in x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least 1 pixel"),
        ({"mean": (0.5, 0.5, 0.5)}, "give both or neither"),
        ({"mean": (0.5,), "std": (0.5,)}, "must be 3 numbers"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, r"std is .* must be 3 numbers"),
    ],
)
def test_preparations_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        preparation_for(open_pictures(arrays(tmp_path)), None, **options)


def test_grey_images_need_a_mean_and_std_of_their_own(tmp_path):
    grey = {f"x_{part}": np.zeros((n, 8, 8, 1), np.uint8) for part, n in (("train", 12), ("test", 6))}
    pictures = open_pictures(arrays(tmp_path, **grey))
    with pytest.raises(ValueError, match="have 1 channels, but the usual mean and std have 3; give both"):
        preparation_for(pictures, None)
    preparation = preparation_for(pictures, None, size=12, mean=(0.5,), std=(0.25,))
    x, _ = next(iter(loader(pictures.train, preparation, augment=True)))
    assert tuple(x.shape) == (4, 1, 12, 12)
    assert torch.all(x == -2)
