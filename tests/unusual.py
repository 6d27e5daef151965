"""Small networks that take or give something else than images and logits, each with inputs as it takes them."""

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
