"""Terms that a recipe adds for single layers: decay of the product, scaled decay, decorrelation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from basis.costs import count_parameters
from basis.layers.conv import BasisConv2d
from basis.layers.structured import StructuredConv2d
from basis.training.skipping import Parts

EPSILON = 1e-8  # on squared norms of centred filters: a filter of zero variance correlates with none


def product_norm(basis: Tensor, matrix: Tensor, groups: int = 1) -> Tensor:
    """The squared Frobenius norm of ``W = [B; A B]`` without building W: tr(G) + tr(A G A^T) with G = B B^T.

    Half of it times the weight decay is Frobenius decay (Khodak et al., "Initialization and Regularization of
    Factorized Neural Layers", ICLR 2021): what plain decay does to a dense layer.

    ``basis`` is B, (k, C_in/groups, kh, kw), and ``matrix`` A, (C_out - k, k/groups), the groups' blocks stacked.
    """
    b = basis.reshape(groups, len(basis) // groups, -1)
    a = matrix.reshape(groups, -1, b.shape[1])
    return b.square().sum() + (a @ (b @ b.mT) * a).sum()


def decorrelation(basis: Tensor, groups: int = 1) -> Tensor:
    """The sum of ``|corr(B) - I|`` over pairs of basis filters (k, C_in/groups, kh, kw) of the same group.

    The penalty of LinearConv (Kahatapitiya and Rodrigo, WACV 2021); corr is Pearson's correlation.
    """
    b = basis.reshape(groups, len(basis) // groups, -1)
    centred = b - b.mean(2, keepdim=True)
    unit = centred * (centred.square().sum(2, keepdim=True) + EPSILON).rsqrt()
    pairs = ~torch.eye(b.shape[1], dtype=torch.bool, device=b.device)
    return ((unit @ unit.mT) * pairs).abs().sum()


def compression(model: nn.Module) -> float:
    """Stored trainable parameters, as a fraction of those of the same network with dense convolutions.

    The factor of the "compression ratio scaled" weight decay of Gray, Crowley and Storkey (2019, arXiv 1906.00859).
    """
    layers = {id(m.basis): m for m in model.modules() if isinstance(m, BasisConv2d)}.values()
    structured = [m for m in model.modules() if isinstance(m, StructuredConv2d)]
    inside = {id(p) for layer in layers for p in (layer.basis, *layer.coefficients.parameters())}
    inside |= {id(p) for layer in structured for name, p in layer.named_parameters() if name != "bias"}
    others = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    dense = sum(layer.out_channels * math.prod(layer.filter_shape) for layer in (*layers, *structured))
    return count_parameters(model) / (others + dense)


def parameter_groups(model: nn.Module, *, weight_decay: float, decay: str | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer (``part``): all other parameters, B, A, and the ``factors`` of structured layers.

    ``decay``, see :class:`basis.Recipe`, says what ``weight_decay`` means for the last three.
    """
    parts = Parts(model)
    factors = {id(p) for m in model.modules() if isinstance(m, StructuredConv2d) for p in m.factors}
    scaled = weight_decay * (compression(model) if decay == "scaled" else 1.0)
    inner = 0.0 if decay == "product" else scaled
    groups = {
        "others": ([p for p in parts.others if id(p) not in factors], weight_decay),
        "basis": (parts.basis, inner),
        "coefficients": (parts.coefficients, inner),
        "factors": ([p for p in parts.others if id(p) in factors], scaled),
    }
    return [{"params": p, "weight_decay": value, "part": part} for part, (p, value) in groups.items() if p]
