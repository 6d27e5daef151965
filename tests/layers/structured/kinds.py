"""Structured layers by their texts, for the tests of this folder."""

import torch
from torch import nn

from basis.layers.structured import Structure

# Every kind but basis convolutions; both ways in which some are executed.
TEXTS = (
    "sep", "generic:0.25", "tensor_train:0.4", "tucker:0.5", "shuffle:2", "acdc:3", "hashed:0.2", "lfb:0.5", "lfb:1,2",
)  # fmt: skip


def conv_of(c_in=8, c_out=16, kernel_size=3, dtype=torch.float64, **options):
    return nn.Conv2d(c_in, c_out, kernel_size, dtype=dtype, **options)


def make(text, conv, *, fitted=False):
    """The layer in evaluation mode."""
    return Structure.parse(text).make([conv], fitted=fitted)[0].eval()


def fitted_to(text, weight, **options):
    conv = conv_of(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), weight.dtype, **options)
    conv.weight.data = weight.detach().clone()
    return make(text, conv, fitted=True)


def error(layer, weight):
    return float(((layer.weight - weight).norm() / weight.norm()).detach())
