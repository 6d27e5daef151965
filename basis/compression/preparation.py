"""What is done to a user's images before the network sees them: as in its training, as far as that is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import Tensor, nn

from basis.vision import import_timm, import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How an image is resized, cropped to its middle, and normalised.

    ``resize``: pixels of the shorter side, or (H, W); ``crop``: (H, W); None leaves the image as it is. ``mean`` and
    ``std``: per channel, in units of full scale.
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
        if self.crop:
            image = make.functional.center_crop(image, self.crop)
        return make.functional.normalize(make.functional.to_tensor(image), self.mean, self.std)

    def __str__(self) -> str:
        said = [f"resized to {self.resize} ({self.interpolation})"] if self.resize else []
        said += [f"cropped to the middle {self.crop}"] if self.crop else []
        mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        known = " (ImageNet's)" if (*self.mean, *self.std) == MEAN + STD else ""
        return f"{', '.join(said) or 'neither resized nor cropped'}, normalised by mean {mean} and std {std}{known}"


def preparation_for(
    name: str, model: nn.Module, sizes: Sequence[tuple[int, int]], *, image_size: int | None = None,
    crop: float | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Preparation:  # fmt: skip
    """What the network's library does to images, or what is given; images that fit stay as they are.

    ``sizes``: (width, height) of each image. ``image_size``: pixels, of the whole image unless ``crop`` is given, the
    share of the side that stays. Raises ``ValueError`` where training hardly saw images so: those that are much smaller
    than the network takes, or all of one much larger size; and where its size is unknown and they differ.
    """
    usual = _usual(name, model)
    usual = replace(usual, mean=mean or usual.mean, std=std or usual.std)
    one, side = len(set(sizes)) == 1, round(median(map(min, sizes)))
    target = [image_size, image_size] if image_size else usual.crop
    if not target:
        if crop or not one:
            why = "crop needs a size" if crop else f"the images differ in size (median of the shorter side: {side})"
            raise ValueError(f"{why}, and {name} does not say which it takes: give --image-size N, as in its training")
        return usual
    if one and [*sizes[0]] == [*target][::-1] and crop is None:
        return replace(usual, resize=None, crop=None)
    if not image_size and (side < min(target) * 2 / 3 or (one and side > min(target) * 4)):
        images = "{} x {} pixels".format(*sizes[0]) if one else f"{side} pixels on their shorter side (median)"
        raise ValueError(
            f"the images have {images}, but {name} usually takes {target[1]} x {target[0]}: give --image-size {side} "
            f"if it was trained on images of that size, or --image-size {target[0]} if they were resized to it then"
        )
    if not image_size and crop is None:
        return usual
    edge = math.floor(max(target) / (crop or 1))
    return replace(usual, crop=target, resize=edge if isinstance(usual.resize, int | None) else [edge, edge])


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
