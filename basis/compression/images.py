"""A user's images: a folder of them by class."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from basis.text import few, first_line
from basis.vision import import_torchvision


@dataclass(frozen=True)
class ImageData:
    """Pairs (PIL image, label): ``train`` to choose layers and to train on, ``test`` for the final numbers alone."""

    train: Any
    test: Any
    classes: tuple[str, ...]  # in the order of the network's outputs
    digest: str  # SHA-256 of the names and sizes of the files
    files: tuple[str, ...]


def subset(images: Any, index: Sequence[int], transform: Callable[[Any], Tensor]) -> Subset:
    """Some of the images of a folder, each through ``transform``."""
    images = copy.copy(images)
    images.transform = transform
    return Subset(images, index)


def open_images(path: str | os.PathLike) -> ImageData:
    """The images of a folder (train/CLASS/*, val/CLASS/*), not decoded yet; ``ValueError`` where it holds others."""
    path, folder = Path(path), import_torchvision().datasets.ImageFolder
    try:
        train, test = folder(path / "train"), folder(path / "val")
    except OSError as error:
        raise ValueError(f"data is {path}, but must hold train/CLASS/* and val/CLASS/* ({error})") from error
    if train.classes != test.classes:
        differing = few(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"data in {path} cannot be used: train and val differ in {differing}")
    files = tuple(file for file, _ in (*train.samples, *test.samples))
    sizes = "".join(f"{os.path.relpath(file, path)} {os.path.getsize(file)}\n" for file in files)
    return ImageData(train, test, tuple(train.classes), hashlib.sha256(sizes.encode()).hexdigest(), files)


def check_images(files: Sequence[str]) -> None:
    """Decode every file once, small; ``ValueError`` names those that cannot be, or have more than 8 bits a channel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = [f"{file} ({why})" for file, why in zip(files, pool.map(_problem, files), strict=True) if why]
    if problems:
        raise ValueError(f"{len(problems)} images cannot be read: {few(problems, '; ')}")


def _problem(file: str) -> str | None:
    try:
        with Image.open(file) as image:
            image.draft("RGB", (32, 32))  # a JPEG is decoded at an eighth of its size
            image.load()
            return "more than 8 bits a channel" if image.mode.startswith(("I", "F")) else None
    except Exception as error:  # Pillow's decoders raise many kinds
        return first_line(error)
