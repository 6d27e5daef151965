"""Small networks that take or give something else than images and logits, each with inputs as it takes them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class Pitch(nn.Module):
    """Frames of sound (N, 1024), as maps of one column: the pitch tracker CREPE (arXiv 1802.06182) in small."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, (512, 1), (4, 1), (254, 0)), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 8, (63, 1), padding="same"), nn.BatchNorm2d(8)
        self.classify = nn.Linear(8, 5)

    def forward(self, frames):
        x = F.max_pool2d(self.norm1(F.relu(self.conv1(frames[:, None, :, None]))), (8, 1))
        return self.classify(self.norm2(F.relu(self.conv2(x))).mean((2, 3)))


class Two(nn.Module):
    """An image and a caption of tokens, which meet; several outputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 16, 3), nn.Embedding(11, 16)

    def forward(self, image, tokens):
        pixels, words = self.conv(image).flatten(2), self.embed(tokens)
        return {"match": words @ pixels, "image": pixels.mean(2), "words": words.sum(1)}


class Drifts(nn.Module):
    """Changes its input in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.conv(x.sub_(0.5).div_(0.25)).mean((2, 3))


class Clips(nn.Module):
    """Clips (N, frames, 3, H, W), all of whose frames are one batch of the convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, clips):
        return self.conv(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean((1, 3, 4))


def made(kind):
    """A network, and two samples as it takes them."""
    torch.manual_seed(0)
    image, tokens = torch.randn(2, 3, 9, 8), torch.arange(10).reshape(2, 5)
    inputs = {
        Pitch: torch.randn(2, 1024), Two: (image, tokens), Drifts: image, Clips: torch.randn(2, 4, 3, 9, 8),
    }  # fmt: skip
    return kind().eval(), inputs[kind]


UNUSUAL = (Pitch, Two, Drifts, Clips)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple = ()


HEADS = {  # what a network gives, and how a loss finds the logits in it
    "dict": (lambda logits: {"out": logits}, lambda outputs: outputs["out"]),
    "dataclass": (Output, lambda outputs: outputs.logits),
    "tuple": (lambda logits: (logits, None), lambda outputs: outputs[0]),
}


class Scaled(nn.Module):
    """An image and a number to logits, or to whatever ``head`` makes of them."""

    def __init__(self, head=lambda logits: logits, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.fc, self.head = nn.Linear(8, 5), head

    def forward(self, image, scale):
        return self.head(self.fc(self.inner(image).mean((2, 3)) * scale[:, None]))


class Joined(Scaled):
    """The same network with one tensor for an input."""

    def forward(self, x):
        return super().forward(x[..., :8], x[:, 0, 0, 8])


class Changing(Scaled):
    """As many networks do, it normalises its input in place."""

    def forward(self, image, scale):
        return super().forward(image.sub_(0.5).div_(0.25), scale.mul_(2))


class Keeping(Scaled):
    def forward(self, image, scale):
        return super().forward((image - 0.5) / 0.25, scale * 2)


class Of(nn.Module):
    """What ``function`` makes of the module itself, with these parts, and the inputs."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **options):
        return self.function(self, *args, **options)


class Free(Of):
    """Convolutions and batch normalisations, with which ``way`` may do anything."""

    def __init__(self, way, conv=None, norm=nn.BatchNorm2d):
        torch.manual_seed(0)
        conv, own = conv or nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        super().__init__(way, conv=conv, other=nn.Conv2d(3, 3, 1), bn=norm(conv.out_channels), own=own, kept=[])


def plain(m, x):
    return m.bn(m.conv(x))


def of_two(m, a, b):
    return m.bn(m.conv(a)) * b


def of_any_kind(m, x):
    """Traced by proxies, it leaves one step out."""
    y = m.conv(x)
    return m.bn(2 * y if isinstance(y, torch.Tensor) else y)


def in_bfloat16(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.bn(m.conv(x))


def changing(m, x):
    return {"y": [Output(0), m.bn(m.conv(x.sub_(0.5).div_(0.25)))]}


def changing_loss(outputs, targets):
    found = F.cross_entropy(outputs, targets.clone(), reduction="none")
    targets.zero_()
    return found


def draw(kind=tuple, sizes=(6, 6, 2)):
    """Batches for ``Scaled`` by position, by name (``dict``), or in one tensor for ``Joined`` (``torch.cat``)."""
    torch.manual_seed(1)
    found = [(torch.randn(n, 3, 8, 8), torch.rand(n) + 0.5, torch.randint(0, 5, (n,))) for n in sizes]
    if kind is dict:
        return [({"scale": s, "image": x}, y) for x, s, y in found]
    if kind is torch.cat:
        return [(torch.cat([x, s[:, None, None, None].expand(len(x), 3, 8, 1)], 3), y) for x, s, y in found]
    return [((x, s), y) for x, s, y in found]


class Stuck(nn.BatchNorm2d):
    """Stays in evaluation mode whatever is said."""

    def train(self, mode=True):
        return super().train(False)


class Fixed(nn.BatchNorm2d):
    """Says that it trains, but uses and keeps its statistics."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
