"""A basis convolution built row by row from nn.Conv2d: what every mode and form must give, with its gradients."""

import torch
from torch import nn

from basis.layers.coefficients import LowRank, Repeat, Sparse


def shuffled(layer):
    """With the output channels shuffled within their mixing groups."""
    groups = layer.coefficients.groups
    width = layer.out_channels // groups
    order = torch.cat([torch.randperm(width) + i * width for i in range(groups)])
    layer.load_state_dict(layer.state_dict() | {"order": order})
    return layer


def top(values, entries):
    """Where the largest entries of each row are."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    for row, kept in zip(values, mask, strict=True):
        kept[sorted(range(len(row)), key=lambda j: -abs(row[j].item()))[:entries]] = True
    return mask


def explicit_matrix(a, leaves):
    """A, entry by entry, from tensors of the names that the parameters of ``a`` have."""
    per_group = max(1, a.rows // a.groups)
    if isinstance(a, LowRank):
        left, right = leaves["left"], leaves["right"]
        return torch.stack(
            [sum(left[i, q] * right[i // per_group * a.rank + q] for q in range(a.rank)) for i in range(a.rows)]
        )
    if isinstance(a, Repeat):
        return torch.eye(a.columns, dtype=torch.float64)[[i % per_group % a.columns for i in range(a.rows)]]
    return leaves.get("weight", a.weight)


def explicit_weight(layer, basis, matrix):
    """W, row by row: per mixing group the basis filters, then each derived one as a sum of them."""
    groups, k = layer.coefficients.groups, layer.coefficients.columns
    derived = layer.coefficients.rows // groups
    rows = []
    for i in range(groups):
        own = basis[i * k : (i + 1) * k]
        rows += [*own, *(torch.einsum("j,jchw->chw", a, own) for a in matrix[i * derived : (i + 1) * derived])]
    return torch.stack([rows[c] for c in layer.order.tolist()])


def fixed_gradient(y):
    return torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))


def reference(layer, x, trained=None, **arguments):
    """Output and gradients of nn.Conv2d with that weight; a sparse A is a leaf of its own, already masked."""
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {n: p.detach().clone().requires_grad_(trained is None or n in trained) for n, p in leaves.items()}
    if isinstance(layer.coefficients, Sparse):
        values = leaves["coefficients.weight"]
        values.data.mul_(top(values, layer.coefficients.entries))
    parts = {name.removeprefix("coefficients."): leaf for name, leaf in leaves.items()}
    weights = {"weight": explicit_weight(layer, leaves["basis"], explicit_matrix(layer.coefficients, parts))}
    weights |= {"bias": leaves["bias"]} if layer.bias is not None else {}
    channels = (layer.in_channels, layer.out_channels)
    conv = nn.Conv2d(*channels, dtype=torch.float64, **arguments | {"bias": layer.bias is not None})
    y = torch.func.functional_call(conv, weights, leaves["x"])
    if y.requires_grad:
        y.backward(fixed_gradient(y))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def run(layer, x):
    """Output and gradients of the layer."""
    y = layer(x)
    if y.requires_grad:
        y.backward(fixed_gradient(y))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def assert_same(ours, expected, tolerance=1e-10):
    """Of tensors, None, or dictionaries of them."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(ours[name], value, tolerance)
    else:
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
