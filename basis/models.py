"""ResNets for small images (CIFAR): a 3x3 stem without max-pooling, residual stages, global pooling, one linear layer.

- ``resnet18``, ``resnet34``, ``resnet50``: the four-stage networks of He et al. 2016 (arXiv 1512.03385, table 1) with
  the CIFAR stem (github.com/kuangliu/pytorch-cifar) and projection shortcuts.
- ``resnet20`` ... ``resnet110``: the three-stage networks of its section 4.2, with parameter-free shortcuts (option A).
- ``wrn-28-10`` ... (depth, widening factor): the wide networks of Zagoruyko and Komodakis 2016 (arXiv 1605.07146,
  table 1), of three stages whose blocks normalise and activate first, without dropout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from basis.layers.batchnorm import activate


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every ``stride``-th pixel, with zero channels added on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, missing = stride, out_channels - in_channels
        self.padding = (0, 0, 0, 0, missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class Projection(nn.Sequential):
    """Option B of He et al. 2016: a 1x1 convolution and batch normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        *before, norm = self
        for module in before:
            x = module(x)
        return activate(norm, x, relu=False)


def _conv(in_channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int, projection: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if not projection:
        return PaddedShortcut(in_channels, out_channels, stride)
    return Projection(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ``width`` channels come out."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, projection: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, width, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width), nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, self.conv1(x))
        return activate(self.bn2, self.conv2(out), self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; 4 ``width`` channels come out."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, projection: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, stride=stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(in_channels, 4 * width, stride, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, self.conv1(x))
        out = activate(self.bn2, self.conv2(out))
        return activate(self.bn3, self.conv3(out), self.shortcut(x))


class PreactivatedBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, beside a shortcut; ``width`` channels come out."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, projection: bool = True) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), _conv(in_channels, width, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width)
        changes = stride > 1 or in_channels != width
        self.shortcut = _conv(in_channels, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        out = activate(self.bn1, x)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(activate(self.bn2, self.conv1(out))) + shortcut


Block = type[BasicBlock] | type[Bottleneck] | type[PreactivatedBlock]


class ResNet(nn.Module):
    """A residual network for small images: (N, 3, H, W) to logits (N, num_classes).

    Args:
        block, depths: the kind of block, and how many there are in each stage; networks of preactivated blocks
            normalise after the last stage, all others after the stem.
        width: channels of the first stage's blocks, which every further stage doubles; or the channels of each stage.
        stem: channels of the first convolution; None: those of the first stage.
        projection: shortcuts that change shape are 1x1 convolutions, not :class:`PaddedShortcut`.
    """

    def __init__(
        self, block: Block, depths: Sequence[int], *, width: int | Sequence[int], num_classes: int,
        projection: bool = True, stem: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [width * 2**i for i in range(len(depths))] if isinstance(width, int) else list(width)
        channels = stem or widths[0]
        late = block is PreactivatedBlock
        self.conv1 = _conv(3, channels)
        self.bn1 = None if late else nn.BatchNorm2d(channels)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (stage, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                blocks.append(block(channels, widths[i], 2 if i > 0 and j == 0 else 1, projection))
                channels = widths[i] * block.expansion
            self.add_module(stage, nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels) if late else None
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.conv1(x)
        if self.bn1 is not None:
            x = activate(self.bn1, x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        if self.bn is not None:
            x = activate(self.bn, x)
        return self.fc(x.mean(dim=(2, 3)))


NETWORKS: dict[str, tuple[Block, tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    **{f"resnet{depth}": (BasicBlock, ((depth - 2) // 6,) * 3) for depth in (20, 32, 44, 56, 110)},
}
MODELS = tuple(NETWORKS)


def build(name: str, *, num_classes: int = 10, width: int | Sequence[int] | None = None) -> ResNet:
    """The network called ``name``: one of :data:`MODELS`, or ``wrn-DEPTH-WIDENING`` such as ``wrn-28-10``.

    ``width``, of the stem, is that of the paper unless given; for a ResNet a sequence holds the width of each stage.
    Raises ``ValueError`` for an unknown name, numbers below 1, or widths of another number of stages.
    """
    wide = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if wide:
        depth, widening = map(int, wide.groups())
        if depth < 10 or (depth - 4) % 6 or widening < 1:
            raise ValueError(f"WRN-{depth}-{widening}: the depth must be 6 n + 4 and the widening factor at least 1")
    elif name not in NETWORKS:
        raise ValueError(f"model is {name!r}, but must be one of {', '.join(MODELS)}, wrn-DEPTH-WIDENING")
    block, depths = (PreactivatedBlock, ((depth - 4) // 6,) * 3) if wide else NETWORKS[name]
    if width is None:
        width = 64 if len(depths) == 4 else 16
    each = [width] if isinstance(width, int) else list(width)
    if min(num_classes, *each) < 1:
        raise ValueError(f"num_classes is {num_classes} and width is {width}, but both must be at least 1")
    if not isinstance(width, int) and (wide or len(each) != len(depths)):
        raise ValueError(f"width is {width}, but {name} takes a number" + f" or one for each of {len(depths)} stages")
    if wide:
        return ResNet(block, depths, width=each[0] * widening, num_classes=num_classes, stem=each[0])
    return ResNet(block, depths, width=width, num_classes=num_classes, projection=len(depths) == 4)
