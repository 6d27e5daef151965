"""ResNets for small images (CIFAR): 18/34/50 as widely trained there, 20/32/44/56/110 of the paper, and wide ones.

All are of one plan: a 3x3 stem without max-pooling, stages of residual blocks of which
each but the first halves the image and doubles the width, global average pooling, one linear layer.

- ``resnet18``, ``resnet34``, ``resnet50``: the four-stage networks of He et al. 2016
  (arXiv 1512.03385, table 1) with the CIFAR stem (github.com/kuangliu/pytorch-cifar) and projection
  shortcuts.
- ``resnet20`` ... ``resnet110``: the three-stage networks of section 4.2 of the same paper, whose
  shortcuts have no parameters (option A).
- ``wrn-28-10``, ``wrn-16-4``, ... (depth, widening factor): the wide networks of Zagoruyko and Komodakis
  2016 (arXiv 1605.07146, table 1), of three stages whose blocks normalise and activate first.

Weights are initialised the way PyTorch initialises each layer. Parameter counts below are those at
10 classes and the default width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.batchnorm import activate


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every ``stride``-th pixel, with zero channels added on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = out_channels - in_channels
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _shortcut(in_channels: int, out_channels: int, stride: int, projection: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if not projection:
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ``width`` channels come out."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, *, projection: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, self.conv1(x))
        return activate(self.bn2, self.conv2(out), self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; 4 ``width`` channels come out."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, *, projection: bool = True) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, self.conv1(x))
        out = activate(self.bn2, self.conv2(out))
        return activate(self.bn3, self.conv3(out), self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: (N, 3, H, W) to logits (N, num_classes).

    Layers are named ``conv1``, ``bn1``, ``layer1.0.conv1`` ..., ``fc``; the shortcut of a block is
    ``layer2.0.shortcut``.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks in each stage; there are ``len(depths)`` stages.
        width: channels of the stem and of the first stage's blocks, which every further stage doubles; or the
            channels of each stage, the first of them also the stem's.
        num_classes: number of logits.
        projection: shortcuts that change shape are 1x1 convolutions with batch normalisation; else
            they have no parameters (:class:`PaddedShortcut`).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        width: int | Sequence[int],
        num_classes: int,
        projection: bool = True,
    ) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))] if isinstance(width, int) else list(width)
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (stage, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, widths[i], stride, projection=projection))
                channels = widths[i] * block.expansion
            self.add_module(stage, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = activate(self.bn1, self.conv1(x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(x.mean(dim=(2, 3)))


class PreactivatedBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride > 1 or in_channels != width
        self.shortcut = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(activate(self.bn2, self.conv1(out))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-widening: (N, 3, H, W) to logits (N, num_classes), without dropout.

    Layers are named ``conv1``, ``layer1.0.conv1`` ..., ``layer2.0.shortcut``, ``bn``, ``fc``.

    Args:
        depth: 6 n + 4, with n blocks in each of the three stages.
        widening: how many times as wide as the stem the first stage is; each other stage doubles it.
        width: channels of the stem.
        num_classes: number of logits.

    Raises:
        ValueError: for a depth that is not 6 n + 4, or a widening factor below 1.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, widening: int, *, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widening < 1:
            raise ValueError(
                f"WRN-{depth}-{widening} is no wide ResNet: the depth must be 6 n + 4 (10, 16, 22, 28, 34, 40, ...) "
                "and the widening factor at least 1"
            )
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels = width
        for i, stage in enumerate(self.stages):
            blocks = []
            for j in range((depth - 4) // 6):
                blocks.append(PreactivatedBlock(channels, width * widening * 2**i, 2 if i > 0 and j == 0 else 1))
                channels = width * widening * 2**i
            self.add_module(stage, nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.conv1(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(activate(self.bn, x).mean(dim=(2, 3)))


def resnet18(num_classes: int = 10, width: int | Sequence[int] = 64) -> ResNet:
    """ResNet-18 with the CIFAR stem; 11,173,962 parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width=width, num_classes=num_classes)


def resnet34(num_classes: int = 10, width: int | Sequence[int] = 64) -> ResNet:
    """ResNet-34 with the CIFAR stem; 21,282,122 parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), width=width, num_classes=num_classes)


def resnet50(num_classes: int = 10, width: int | Sequence[int] = 64) -> ResNet:
    """ResNet-50 with the CIFAR stem; 23,520,842 parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width=width, num_classes=num_classes)


def _thin(depth: int, num_classes: int, width: int | Sequence[int]) -> ResNet:
    n = (depth - 2) // 6  # blocks in each of the three stages
    return ResNet(BasicBlock, (n, n, n), width=width, num_classes=num_classes, projection=False)


def resnet20(num_classes: int = 10, width: int | Sequence[int] = 16) -> ResNet:
    """ResNet-20 of section 4.2; 269,722 parameters (0.27 M in the paper)."""
    return _thin(20, num_classes, width)


def resnet32(num_classes: int = 10, width: int | Sequence[int] = 16) -> ResNet:
    """ResNet-32 of section 4.2; 464,154 parameters (0.46 M in the paper)."""
    return _thin(32, num_classes, width)


def resnet44(num_classes: int = 10, width: int | Sequence[int] = 16) -> ResNet:
    """ResNet-44 of section 4.2; 658,586 parameters (0.66 M in the paper)."""
    return _thin(44, num_classes, width)


def resnet56(num_classes: int = 10, width: int | Sequence[int] = 16) -> ResNet:
    """ResNet-56 of section 4.2; 853,018 parameters (0.85 M in the paper)."""
    return _thin(56, num_classes, width)


def resnet110(num_classes: int = 10, width: int | Sequence[int] = 16) -> ResNet:
    """ResNet-110 of section 4.2; 1,727,962 parameters (1.7 M in the paper)."""
    return _thin(110, num_classes, width)


_ALL = (resnet18, resnet34, resnet50, resnet20, resnet32, resnet44, resnet56, resnet110)
MODELS: dict[str, Callable[..., ResNet]] = {make.__name__: make for make in _ALL}


def build(name: str, *, num_classes: int = 10, width: int | Sequence[int] | None = None) -> ResNet | WideResNet:
    """The network called ``name``: one of :data:`MODELS`, or ``wrn-DEPTH-WIDENING`` such as ``wrn-28-10``.

    ``width``, of the stem, is that of the paper unless given; a sequence holds the width of each stage.

    Raises:
        ValueError: for an unknown name, a width or number of classes below 1, or widths of another number of stages.
    """
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if name not in MODELS and not wide:
        known = f"{', '.join(MODELS)}, wrn-DEPTH-WIDENING (wrn-28-10)"
        raise ValueError(f"model is {name!r}, but the known ones are {known}")
    each = () if width is None else (width,) if isinstance(width, int) else tuple(width)
    for what, value in (("num_classes", num_classes), *(("width", one) for one in each)):
        if value < 1:
            raise ValueError(f"{what} is {value}, but it must be at least 1")
    if width is not None and not isinstance(width, int):
        stages = 0 if wide else 4 if name in ("resnet18", "resnet34", "resnet50") else 3
        if len(each) != stages:
            takes = f"a sequence of {stages}" if stages else "one number"
            raise ValueError(f"width is {width}, but {name} takes {takes}")
    sizes: dict[str, Any] = {"num_classes": num_classes} | ({} if width is None else {"width": width})
    if wide:
        return WideResNet(int(wide[1]), int(wide[2]), **sizes)
    return MODELS[name](**sizes)
