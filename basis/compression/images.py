"""Images of a user's: a folder of them by class, or an npz, split, checked, and given out in batches.

Images of a folder are decoded when a batch needs them, by threads, so that a large folder needs no more memory than a
small one. What is drawn at random for an image depends on the epoch and the image alone, and not on threads.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from basis.compression.networks import IMAGENET, Preparation
from basis.text import few

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Split:
    """Images with labels: either files, or one array (N, H, W, C) of uint8."""

    labels: np.ndarray
    files: tuple[Path, ...] = ()
    array: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        """The images at these positions."""
        if self.array is not None:
            return Split(self.labels[index], array=self.array[index])
        return Split(self.labels[index], files=tuple(self.files[i] for i in index))

    def image(self, i: int) -> Image.Image | np.ndarray:
        """One image: a decoded file in RGB, or an entry of the array."""
        if self.array is not None:
            return self.array[i]
        return _decoded(self.files[i])


@dataclass(frozen=True)
class Pictures:
    """A user's data: training images, from which layers are chosen, and others that are only for the final numbers.

    Attributes:
        source: the folder or file.
        classes: their names, in the order of the network's outputs.
        train, test: of ``test`` is nothing used before the network is done.
        validation: held out from ``train`` by :func:`hold_out`.
        channels: of every image.
        digest: of the names and sizes of all files, or of the npz file.
        notes: what was left aside, in words.
    """

    source: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    channels: int
    digest: str
    notes: tuple[str, ...] = ()
    validation: Split | None = None


def open_pictures(path: str | os.PathLike) -> Pictures:
    """The images in a folder (train/CLASS/* and val/CLASS/*), or in an npz (``ARRAYS``, uint8, channels last).

    No image of a folder is decoded yet: see :func:`check_images`. Classes are in alphabetical order, as torchvision
    has them; those of an npz are its labels, or the strings in its array "classes".

    Raises:
        ValueError: where there are no such data; for a folder without classes or a class without images; for other
            classes in val/ than in train/; for arrays of another type, shape or labels.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_npz(path)
    raise ValueError(f"there are no data at {path}")


def hold_out(pictures: Pictures, validation: int, *, seed: int) -> Pictures:
    """Move ``validation`` training images, drawn by ``seed``, into ``validation``.

    Raises:
        ValueError: where less than one image would be left to train on, or none were held out.
    """
    total = len(pictures.train)
    if not 1 <= validation < total:
        raise ValueError(
            f"{validation} of the {total} training images are to be held out for choosing layers, but at least one "
            "must be, and one must be left"
        )
    order = np.random.default_rng(seed).permutation(total)
    held, kept = np.sort(order[:validation]), np.sort(order[validation:])
    return replace(pictures, train=pictures.train.take(kept), validation=pictures.train.take(held))


def some(split: Split, number: int, *, seed: int) -> Split:
    """At most ``number`` of the images, drawn by ``seed``."""
    if number >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng((seed, 1)).permutation(len(split))[:number]))


# -- folders ----------------------------------------------------------------------------------------


def _from_folder(path: Path) -> Pictures:
    there = [entry.name for entry in sorted(path.iterdir()) if entry.is_dir()]
    for name in ("train", "val"):
        if not (path / name).is_dir():
            found = f"only {few(there)}" if there else "no folders at all"
            raise ValueError(
                f"{path} has {found}, but it must have train/ and val/, with a folder for each class in them"
            )
    classes, files, labels, ignored = _classes(path / "train")
    others, test_files, test_labels, also_ignored = _classes(path / "val")
    if classes != others:
        gone = few([f"{name} is not in val" for name in classes if name not in others]
                   + [f"{name} is not in train" for name in others if name not in classes])  # fmt: skip
        raise ValueError(f"{path / 'train'} and {path / 'val'} have other classes: {gone}")
    ignored += also_ignored
    notes = (f"{ignored} files that are no images by their names were left aside",) if ignored else ()
    digest = hashlib.sha256()
    for file in (*files, *test_files):
        digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    train, test = Split(np.array(labels), files), Split(np.array(test_labels), test_files)
    return Pictures(path, classes, train, test, 3, digest.hexdigest(), notes)


def _classes(folder: Path) -> tuple[tuple[str, ...], tuple[Path, ...], list[int], int]:
    """The classes in a folder, their images, these images' labels, and how many other files there are."""
    classes = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        loose = any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
        what = "images, but no folder for each class" if loose else "no folder of a class"
        raise ValueError(f"{folder} has {what} in it; images of a class cat go into {folder / 'cat'}")
    files: list[Path] = []
    labels: list[int] = []
    ignored = 0
    for label, place in enumerate(classes):
        every = [file for file in sorted(_below(place)) if not file.name.startswith(".")]
        own = [file for file in every if file.suffix.lower() in SUFFIXES]
        if not own:
            raise ValueError(
                f"the folder {place} has no images in it ({', '.join(SUFFIXES)}), but is taken for a class"
            )
        ignored += len(every) - len(own)
        files += own
        labels += [label] * len(own)
    return tuple(place.name for place in classes), tuple(files), labels, ignored


def _below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file below a folder. Links are followed, but not one that leads back to a folder ``above`` it."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _below(entry, above | {real})
        elif entry.is_file():
            yield entry


def check_images(splits: Iterable[Split], *, progress: Any = None) -> None:
    """Decode every file of the splits once, small, and name those that cannot be, or have more than 8 bits a channel.

    Args:
        progress: wraps an iterable of files, as ``tqdm`` does.

    Raises:
        ValueError: with the files that cannot be decoded, or only with a loss.
    """
    files = [file for split in splits for file in split.files]
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(_problem, files, chunksize=16)
        problems = [text for text in (progress(found, total=len(files)) if progress else found) if text]
    if problems:
        number = f"{len(problems)} images" if len(problems) > 1 else "one image"
        raise ValueError(f"{number} cannot be read: {few(problems, '; ')}")


def _problem(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            _check_depth(image)
            image.draft("RGB", (32, 32))  # a JPEG is decoded at an eighth of its size, all of its bytes
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds
        text = "no image" if type(error).__name__ == "UnidentifiedImageError" else str(error) or type(error).__name__
        return f"{file} ({text})"
    return None


def _check_depth(image: Image.Image) -> None:
    """Raise ``ValueError`` for modes of 16 or 32 bits a channel, which Pillow would cut off at 255."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, but only 8 bits a channel are read")


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


# -- npz --------------------------------------------------------------------------------------------


def _from_npz(path: Path) -> Pictures:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder of images nor an npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            if missing:
                raise ValueError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(ARRAYS)}")
            arrays = {name: file[name] for name in ARRAYS}
            names = [str(name) for name in file["classes"]] if "classes" in file.files else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an npz file: {error}") from error
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3) or not len(x):
            raise ValueError(f"x_{part} in {path} is {x.dtype} {x.shape}, but must be uint8 (N, H, W, 1 or 3)")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise ValueError(f"y_{part} in {path} is {y.dtype} {y.shape}, but must be {len(x)} whole numbers")
        if y.min() < 0:
            raise ValueError(f"y_{part} in {path} holds the label {y.min()}, but labels run from 0")
    shapes = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if shapes[0] != shapes[1]:
        raise ValueError(f"x_train in {path} has images of {shapes[0]}, but x_test of {shapes[1]}")
    highest = {part: int(arrays[f"y_{part}"].max()) for part in ("train", "test")}
    names = names or [str(label) for label in range(highest["train"] + 1)]
    for part, label in highest.items():
        if label >= len(names):
            raise ValueError(f"y_{part} in {path} holds the label {label}, but there are {len(names)} classes")
    train, test = (Split(arrays[f"y_{part}"].astype(np.int64), array=arrays[f"x_{part}"]) for part in ("train", "test"))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return Pictures(path, tuple(names), train, test, int(shapes[0][2]), digest.hexdigest())


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


# -- batches ----------------------------------------------------------------------------------------


def preparation_for(
    pictures: Pictures,
    known: Preparation | None,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preparation:
    """How the images of these data are prepared: as told, else as the network's own are, else as usual for ImageNet.

    Images of an npz that are square and have the size already are used as they are.

    Raises:
        ValueError: for a size, mean or std that makes no sense or does not fit the channels.
    """
    base = known or IMAGENET
    if size is not None and size < 1:
        raise ValueError(f"the image size is {size}, but it must be at least 1 pixel")
    array = pictures.train.array
    own = None if array is None or array.shape[1] != array.shape[2] else int(array.shape[1])
    chosen = size or own or base.size
    whole = 1.0 if own is not None else base.crop
    source = base.source
    if mean is not None or std is not None:
        if mean is None or std is None:
            raise ValueError("mean and std go together: give both or neither")
        for what, values in (("mean", mean), ("std", std)):
            good = all(np.isfinite(values)) and (what == "mean" or min(values) > 0)
            if len(values) != pictures.channels or not good:
                raise ValueError(
                    f"{what} is {tuple(values)}, but it must be {pictures.channels} numbers in units of full scale"
                )
        base, source = replace(base, mean=tuple(mean), std=tuple(std)), "as told"
    elif pictures.channels != len(base.mean):
        raise ValueError(
            f"the images have {pictures.channels} channels, but the usual mean and std have {len(base.mean)}; give both"
        )
    return replace(base, size=chosen, crop=whole, source=source)


class Loader:
    """Batches (inputs, labels) of a split, again and again; one pass is an epoch.

    Args:
        split: the images.
        preparation: how they become inputs: float32 (N, C, size, size).
        batch_size: images in a batch; the last one may be smaller.
        device: where the batches go.
        augment: draw a part of each image and mirror half of them, in random order, without an incomplete last
            batch (where there is a complete one).
        seed: of the randomness.

    Attributes:
        generator: gives each pass its random numbers; who keeps its state can go on with the same images.
    """

    def __init__(
        self, split: Split, preparation: Preparation, *, batch_size: int, device: torch.device, augment: bool = False,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.split, self.preparation, self.batch_size, self.device = split, preparation, batch_size, device
        self.augment, self.generator = augment, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.augment and full else full + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order: np.ndarray = np.arange(len(self.split))
        epoch = 0
        if self.augment:
            epoch = int(torch.randint(2**62, (), generator=self.generator))
            order = order[np.random.default_rng(epoch).permutation(len(order))]
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        with ThreadPoolExecutor(_threads()) as pool:
            waiting = [pool.map(lambda i: self._one(int(i), epoch), chunk) for chunk in chunks[:1]]
            for number, chunk in enumerate(chunks):
                if number + 1 < len(chunks):  # decoded while this one is worked on
                    waiting.append(pool.map(lambda i: self._one(int(i), epoch), chunks[number + 1]))
                images = np.stack(list(waiting.pop(0)))
                yield (
                    _normalised(images, self.preparation, self.device),
                    torch.from_numpy(self.split.labels[chunk]).to(self.device),
                )

    def _one(self, i: int, epoch: int) -> np.ndarray:
        image = self.split.image(i)
        if not self.augment:
            return _centre(image, self.preparation)
        return _drawn(image, self.preparation, np.random.default_rng((epoch, i)))


def prepared(image: str | os.PathLike | Image.Image | np.ndarray, preparation: Preparation) -> Tensor:
    """One image, (1, C, size, size) in float32, as a network of this preparation takes it.

    ``image`` is a file, an image of Pillow (RGB), or an array (H, W, C) of uint8.

    Raises:
        ValueError: for a file with more than 8 bits a channel.
    """
    if isinstance(image, (str, os.PathLike)):
        return prepared(_decoded(image), preparation)
    return _normalised(np.array(_centre(image, preparation)[None]), preparation, torch.device("cpu"))


def _decoded(path: str | os.PathLike) -> Image.Image:
    with Image.open(path) as file:
        try:
            _check_depth(file)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} cannot be read: {error}") from None
        # By way of RGBA, since Pillow warns of palettes with transparent colours otherwise.
        return (file.convert("RGBA") if file.mode == "P" else file).convert("RGB")


def _normalised(images: np.ndarray, preparation: Preparation, device: torch.device) -> Tensor:
    """(N, H, W, C) uint8 to float32 (N, C, H, W)."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in (preparation.mean, preparation.std))
    return x.sub_(mean).div_(std).contiguous()


def _centre(image: Image.Image | np.ndarray, preparation: Preparation) -> np.ndarray:
    """The middle of the image, resized so that its shorter side is the size / crop."""
    size = preparation.size
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        return image
    image = _as_image(image)
    shorter = round(size / preparation.crop)
    scale = shorter / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), _RESAMPLE[preparation.interpolation])
    left, top = (width - size) // 2, (height - size) // 2
    return _as_array(resized.crop((left, top, left + size, top + size)))


def _drawn(image: Image.Image | np.ndarray, preparation: Preparation, draw: np.random.Generator) -> np.ndarray:
    """A random part of the image, mirrored or not.

    Small images that have the size already are shifted by up to an eighth of it, the border filled by reflection;
    of others a part of 35 to 100 % of the area is resized (as Szegedy et al. 2015, arXiv 1409.4842, but mildly, for
    a network that is trained already).
    """
    size = preparation.size
    if isinstance(image, np.ndarray) and image.shape[:2] == (size, size):
        most = max(1, size // 8) if size > 1 else 0
        padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="reflect" if most < size else "edge")
        top, left = draw.integers(0, 2 * most + 1, 2)
        found: np.ndarray = padded[top : top + size, left : left + size]
    else:
        whole = _as_image(image)
        area = whole.width * whole.height * draw.uniform(0.35, 1)
        shape = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(whole.width, max(1, round(np.sqrt(area * shape))))
        height = min(whole.height, max(1, round(np.sqrt(area / shape))))
        left, top = draw.integers(0, whole.width - width + 1), draw.integers(0, whole.height - height + 1)
        box = (int(left), int(top), int(left + width), int(top + height))
        found = _as_array(whole.resize((size, size), _RESAMPLE[preparation.interpolation], box=box))
    return np.ascontiguousarray(found[:, ::-1]) if draw.random() < 0.5 else np.ascontiguousarray(found)


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _as_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array
