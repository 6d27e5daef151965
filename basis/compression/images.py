"""A user's images: a folder of them by class, and what is done to them before the network sees them."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.utils.data import Subset

from basis.digests import digest
from basis.text import few, first_line
from basis.vision import import_timm, import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


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


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How an image is resized, cropped to its middle and normalised, by ``mean`` and ``std`` in units of full scale.

    ``resize``: pixels of the shorter side, or (H, W); ``crop``: (H, W); None leaves the image as it is.
    """

    resize: int | Sequence[int] | None = None
    crop: Sequence[int] | None = None
    interpolation: str = "bilinear"
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __call__(self, image: Any) -> Tensor:
        """From a PIL image to float32 (C, H, W)."""
        make = import_torchvision().transforms
        if self.resize:
            image = make.functional.resize(image, self.resize, make.InterpolationMode(self.interpolation))
        image = make.functional.center_crop(image, self.crop) if self.crop else image
        return make.functional.normalize(make.functional.to_tensor(image), self.mean, self.std)

    def __str__(self) -> str:
        said = [f"resized to {self.resize} ({self.interpolation})"] if self.resize else []
        said += [f"cropped to the middle {self.crop}"] if self.crop else []
        known = " (ImageNet's, unless --mean and --std say others)" if (*self.mean, *self.std) == MEAN + STD else ""
        return f"{', '.join(said) or 'neither resized nor cropped'}, mean {self.mean} and std {self.std}{known}"


def preparation_for(
    name: str, model: nn.Module, sizes: Sequence[tuple[int, int]], *, image_size: int | None = None,
    crop: float | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Preparation:  # fmt: skip
    """As the network's library does it, or as given; images that have one size and the network's stay as they are.

    ``sizes``: (width, height) of each image. ``image_size``: pixels, of the whole image unless ``crop`` is given, the
    share of the side that is kept. Raises ``ValueError`` where training hardly saw images so: those much smaller than
    the network takes, or all of one much larger size; and where images differ and nobody says which size it takes.
    """
    usual = replace(own := _usual(name, model), mean=mean or own.mean, std=std or own.std)
    one, side = [*sizes[0]][::-1] if len(set(sizes)) == 1 else None, round(median(map(min, sizes)))
    target = [image_size, image_size] if image_size else usual.crop or one  # (H, W)
    images = f"the images have {side} pixels on their shorter side" + " (median)" * (one is None)
    if not target:
        raise ValueError(f"{images}, and {name} does not say which size it takes: give --image-size N, as in training")
    if one == [*target] and crop is None:
        return replace(usual, resize=None, crop=None)
    if not image_size and (side < min(target) * 2 / 3 or (one and side > min(target) * 4)):
        choice = f"--image-size {side} to leave them so, or --image-size {target[0]} to resize them, as training did"
        raise ValueError(f"{images}, but {name} usually takes {target[1]} x {target[0]}: give {choice}")
    edge = math.floor(max(target) / (crop or 1))
    resize = edge if isinstance(usual.resize, int | None) else [edge, edge]
    return replace(usual, crop=target, resize=resize) if image_size or crop else usual


def _usual(name: str, model: nn.Module) -> Preparation:
    """What the network's library does to images; of a network of the user's own only normalisation is guessed."""
    if getattr(model, "pretrained_cfg", None):
        known = import_timm().data.resolve_data_config({}, model=model)
        crop, same = known["input_size"][1:], {key: known[key] for key in ("interpolation", "mean", "std")}
        edge = math.floor(max(crop) / known["crop_pct"])
        return Preparation(resize=[edge, edge] if known["crop_mode"] == "squash" else edge, crop=crop, **same)
    if ":" in name:
        return Preparation()
    own = import_torchvision().models.get_model_weights(name.rpartition("/")[2]).DEFAULT.transforms()
    return Preparation(resize=own.resize_size[0], crop=own.crop_size * 2, interpolation=own.interpolation.value,
                       mean=own.mean, std=own.std)  # fmt: skip
