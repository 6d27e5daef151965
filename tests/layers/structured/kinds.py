"""Structured layers by their texts, for the tests of this folder."""

import torch
from torch import nn

from basis.layers.structured import Structure

# Every kind but basis convolutions; both ways in which some are executed.
TEXTS = (
    "sep", "generic:0.25", "tied:1/4", "sep_hashed:0.2", "hashed:0.2", "tensor_train:0.4", "tucker:0.5", "shuffle:2",
    "acdc:3", "tridiagonal:1,1,9", "lfb:0.5", "lfb:1,2", "dsfb:1/4,1/8", "basisconv:0.4", "basisconv:0.7", "dcf:3",
    "debut:0.4", "pemn:1/3", "dsf:0.6",
)  # fmt: skip


def conv_of(c_in=8, c_out=16, kernel_size=3, dtype=torch.float64, **options):
    return nn.Conv2d(c_in, c_out, kernel_size, dtype=dtype, **options)


def make(text, conv, *, fitted=False):
    """The layer in evaluation mode; the running statistics of a normalisation are not those of a new one."""
    layer = Structure.parse(text).make([conv], fitted=fitted)[0].eval()
    if hasattr(layer, "norm") and not fitted:
        nn.init.normal_(layer.norm.running_mean)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer


def fitted_to(text, weight, **options):
    conv = conv_of(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), weight.dtype, **options)
    conv.weight.data = weight.detach().clone()
    return make(text, conv, fitted=True)


def error(layer, weight):
    return float(((layer.weight - weight).norm() / weight.norm()).detach())
