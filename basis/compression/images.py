"""A user's images: a folder of them by class, or an npz."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from basis.text import few, first_line
from basis.vision import import_torchvision

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class ImageData:
    """Pairs (PIL image, label): ``train`` to choose layers and to train on, ``test`` for the final numbers alone."""

    train: Any
    test: Any
    classes: tuple[str, ...]  # in the order of the network's outputs
    digest: str  # SHA-256 of the names and sizes of the files, or of the npz
    files: tuple[str, ...] = ()
    side: int | None = None  # of the images of an npz, in pixels


@dataclass(frozen=True, eq=False)
class Part(Dataset):
    """Some images of ``source`` (None: all), each through ``transform``."""

    source: Any
    index: Sequence[int] | None
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.source if self.index is None else self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.source[i if self.index is None else self.index[i]]
        return self.transform(image), label


def open_images(path: str | os.PathLike) -> ImageData:
    """The images of a folder (train/CLASS/*, val/CLASS/*), not decoded yet, or of an npz; ``ValueError`` for others."""
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise ValueError(f"data is {path}, but must be a folder with train/CLASS/* and val/CLASS/*, or an npz file")
    try:
        return _from_folder(path) if path.is_dir() else _from_npz(path)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data in {path} cannot be used: {first_line(error)}") from error


def _from_folder(path: Path) -> ImageData:
    folder = import_torchvision().datasets.ImageFolder
    train, test = folder(path / "train"), folder(path / "val")
    if train.classes != test.classes:
        raise ValueError(f"train and val differ in {few(sorted(set(train.classes) ^ set(test.classes)))}")
    files = tuple(file for file, _ in (*train.samples, *test.samples))
    sizes = "".join(f"{os.path.relpath(file, path)} {os.path.getsize(file)}\n" for file in files)
    return ImageData(train, test, tuple(train.classes), hashlib.sha256(sizes.encode()).hexdigest(), files)


def _from_npz(path: Path) -> ImageData:
    with np.load(path, allow_pickle=False) as file:
        x_train, y_train, x_test, y_test = (file[name] for name in ARRAYS)
        names = file["classes"] if "classes" in file.files else range(int(y_train.max()) + 1)
    for x, y in ((x_train, y_train), (x_test, y_test)):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or x.shape[1:] != x_train.shape[1:]:
            raise ValueError(f"images are {x.dtype} {x.shape}, but must be uint8 (N, H, W, 1 or 3)")
        if y.shape != (len(x),) or not set(y.tolist()) <= set(range(len(names))):
            raise ValueError(f"labels must be {len(x)} whole numbers from 0 to {len(names) - 1}")
    images = [[Image.fromarray(one.squeeze(-1) if one.shape[2] == 1 else one) for one in x] for x in (x_train, x_test)]
    train, test = (list(zip(x, y.tolist(), strict=True)) for x, y in zip(images, (y_train, y_test), strict=True))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageData(train, test, tuple(map(str, names)), digest, side=x_train.shape[1])


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
