"""Small networks and image folders for tests of what a user brings."""

import threading

import numpy as np
import torch
from PIL import Image
from torch import nn

from basis.data import synthetic

CLASSES = ("ant", "bee", "cat")


def network(num_classes: int = 3) -> nn.Module:
    """Three convolutions, one of them depthwise, on images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
    )  # fmt: skip


def no_network():
    return "a network"


def needs_an_argument(width):
    return network(width)


def fails():
    raise RuntimeError("no such width")


def image_folder(folder, *, train: int = 40, val: int = 20, size: int = 20, seed: int = 0) -> None:
    """train/ and val/ with ``CLASSES``, whose images can be told apart by their colours."""
    data = synthetic(train=10 * train, test=10 * val, size=size, seed=seed)
    for part, images, number in (("train", data.train, train), ("val", data.test, val)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i, x in enumerate(images.x[images.y == label][:number]):
                array = np.pad(x.numpy(), ((0, 0), (2, 2), (0, 0)), mode="edge")  # wider than high
                Image.fromarray(array).save(folder / part / name / f"{i:03}.png")


def four() -> nn.Module:
    return network(4)


class _Auxiliary(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return (y, y) if self.training else y


def with_auxiliary_output() -> nn.Module:
    """As GoogLeNet does, it returns more in training mode."""
    return _Auxiliary(*network())


def frozen() -> nn.Module:
    return network().requires_grad_(False)


class _Changed(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(-1))


def changes_its_input() -> nn.Module:
    return _Changed(*network())


class _Squeezed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).squeeze()


def squeezed() -> nn.Module:
    return _Squeezed(*network())


class _Direct(nn.Sequential):
    """The last convolution's weight is used, but the convolution is never called."""

    def forward(self, x):
        for place, layer in enumerate(self):
            x = nn.functional.conv2d(x, layer.weight, stride=2, padding=1) if place == 5 else layer(x)
        return x


class _Branching(nn.Sequential):
    """A tracer that passes something else than tensors leaves one step out."""

    def forward(self, x):
        y = super().forward(x)
        return 3 * y if isinstance(y, torch.Tensor) else y


def branching() -> nn.Module:
    return _Branching(*network())


def not_called() -> nn.Module:
    return _Direct(*network())


def locked() -> nn.Module:
    model = network()
    model.lock = threading.Lock()
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(16, 3), nn.Flatten(), nn.LazyLinear(3))


def exits():
    raise SystemExit("usage: train.py [-h]")


def on_one_pixel() -> nn.Module:
    """Batch normalisation of one value per channel and image."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 32, 1),
        nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
