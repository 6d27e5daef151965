"""A user's images: a folder of them by class."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Subset

from basis.digests import digest
from basis.text import few, first_line
from basis.vision import import_torchvision


@dataclass(frozen=True)
class ImageData:
    """Pairs (PIL image, label): ``train`` to choose layers and to train on, ``test`` for the final numbers alone."""

    train: Any
    test: Any
    classes: tuple[str, ...]  # in the order of the network's outputs
    digest: str  # of the names and sizes of the files
    files: tuple[str, ...]


def subset(images: Any, index: Sequence[int], transform: Callable[[Any], Tensor]) -> Subset:
    """Some of the images of a folder, each through ``transform``."""
    images = copy.copy(images)
    images.transform = transform
    return Subset(images, index)


def open_images(path: str | os.PathLike) -> ImageData:
    """The images of a folder (train/CLASS/*, val/CLASS/*), not decoded yet; ``ValueError`` where it holds others.

    They are used as they are stored, without a rotation that EXIF may ask for, as torchvision and timm do in training.
    """
    path, folder = Path(path), import_torchvision().datasets.ImageFolder
    try:
        train, test = folder(path / "train"), folder(path / "val")
        files = tuple(file for file, _ in (*train.samples, *test.samples))
        sizes = "".join(f"{os.path.relpath(file, path)} {os.path.getsize(file)}\n" for file in files)
    except OSError as error:  # also of a link that leads nowhere
        said = f"must hold train/CLASS/* and val/CLASS/*, all of them images ({first_line(error)})"
        raise ValueError(f"data is {path}, but {said}") from error
    if train.classes != test.classes:
        differing = few(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"data in {path} cannot be used: train and val differ in {differing}")
    return ImageData(train, test, tuple(train.classes), digest(sizes), files)


def check_images(files: Sequence[str]) -> list[tuple[tuple[int, int], bool]]:
    """Decode every file once, small; (width, height) of each, and whether EXIF says to turn it before it is shown.

    ``ValueError`` names those that cannot be decoded, or have more than 8 bits a channel.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_look, files))
    if problems := [f"{file} ({why})" for file, (why, *_) in zip(files, found, strict=True) if why]:
        raise ValueError(f"{len(problems)} images cannot be read: {few(problems, '; ')}")
    return [(size, turned) for _, size, turned in found]


def _look(file: str) -> tuple[str | None, tuple[int, int], bool]:
    """What is wrong with an image, its size, and whether EXIF says to turn it."""
    size, turned = (0, 0), False
    try:
        with Image.open(file) as image:
            size = image.size
            image.draft("RGB", (32, 32))  # a JPEG is decoded at an eighth of its size
            image.load()
            with suppress(Exception):  # EXIF that is damaged is not read in training either
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            return "more than 8 bits a channel" if image.mode.startswith(("I", "F")) else None, size, turned
    except Exception as error:  # Pillow's decoders raise many kinds
        return first_line(error), size, turned
