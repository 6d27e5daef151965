"""Images of a user's: folders by class."""

import os

import numpy as np
import pytest
from PIL import Image

from basis.compression.images import check_images, open_images, subset
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.image_folder(tmp_path / "data", train=6, val=4)
    return tmp_path / "data"


def test_a_folder_has_its_classes_in_alphabetical_order(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / "bee" / "more").mkdir()
    (folder / "train" / "bee" / "000.png").rename(folder / "train" / "bee" / "more" / "x.PNG")
    data = open_images(folder)
    assert data.classes == tiny.CLASSES
    assert (len(data.train), len(data.test), len(data.files)) == (18, 12, 30)
    image, label = data.train[17]
    assert (image.size, image.mode, label) == ((24, 20), "RGB", 2)
    (folder / "val" / "cat" / "000.png").rename(folder / "val" / "cat" / "new.png")
    assert open_images(folder).digest != data.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "val").rename(f / "validation"), "val"),
        (lambda f: (f / "train" / "new").mkdir(), "new"),
        (lambda f: (f / "val" / "cat").rename(f / "val" / "dog"), "cat, dog"),
        (lambda f: [(f / "val" / name).rename(f / name) for name in tiny.CLASSES], "val"),
        (lambda f: (f / "val" / "cat" / "link.png").symlink_to("nowhere.png"), "No such file.*link.png"),
        (lambda f: [file.unlink() for file in (f / "val" / "cat").iterdir()], "cat"),
        (lambda f: (f / "train").rename(f / "moved") or (f / "train").symlink_to("nowhere"), "train"),
    ],
)
def test_folders_that_are_no_data(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        open_images(folder)


def test_unreadable_images_are_named(folder):
    check_images(open_images(folder).files)
    (folder / "train" / "bee" / "002.png").write_text("no image at all")
    cut = folder / "val" / "ant" / "001.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)).save(folder / "train" / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"3 images cannot be read: .*bee/002.png.*cat/a.png.*8 bits.*ant/001.png"):
        check_images(open_images(folder).files)


def test_images_that_exif_would_turn_are_counted_and_used_as_they_are_stored(folder):
    exif = Image.Exif()
    for orientation, name in ((1, "a.jpg"), (6, "b.jpg"), (3, "c.png")):
        exif[274] = orientation
        Image.new("RGB", (24, 20)).save(folder / "train" / "ant" / name, exif=exif)
    Image.new("RGB", (24, 20)).save(folder / "train" / "ant" / "d.jpg", exif=b"Exif\0\0damaged")
    data = open_images(folder)
    turned = [file for file, (_, one) in zip(data.files, check_images(data.files), strict=True) if one]
    assert [file[-5:] for file in turned] == ["b.jpg", "c.png"]
    assert {image.size for image, _ in data.train} == {(24, 20)}


def test_names_may_be_of_any_bytes(folder):
    digest = open_images(folder).digest
    odd = os.fsdecode(b"caf\xe9.png")
    (folder / "train" / "ant" / "000.png").rename(folder / "train" / "ant" / odd)
    data = open_images(folder)
    assert data.digest != digest
    assert check_images(data.files) == [((24, 20), False)] * 30
    (folder / "train" / "ant" / odd).write_text("no image")
    with pytest.raises(ValueError, match=r"1 images cannot be read: .*caf"):
        check_images(data.files)


def test_a_part_has_some_of_the_images(folder):
    data = open_images(folder)
    part = subset(data.train, [5, 6], lambda image: image.size)
    assert list(part[i] for i in range(len(part))) == [((24, 20), 0), ((24, 20), 1)]
    assert data.train[5][0].size == (24, 20)  # is left alone


def test_a_file_is_no_folder(tmp_path):
    for path in (tmp_path / "gone", __file__):
        with pytest.raises(ValueError, match="data is"):
            open_images(path)
