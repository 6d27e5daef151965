"""A training that turns from dense layers to smaller ones on its way: what is carried over.

Pufferfish (Wang et al., MLSys 2021, arXiv 2103.03936) and Cuttlefish (Wang et al., MLSys 2023, arXiv 2305.02538) train
dense for some epochs, factorise, and go on. :class:`basis.Switch` decides by a sensitivity search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Momentum = Literal["projected", "restarted"]


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every ``nn.Conv2d`` by its name."""
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def weight_of(layer: Any) -> Any:
    """The dense weight (C_out, C_in/groups, kh, kw) that a layer, or a pair of convolutions in a row, amounts to."""
    if not isinstance(layer, nn.Sequential):
        return layer.weight
    pair: list[Any] = list(layer)
    first, second = (convolution.weight for convolution in pair)
    return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])


def carry_momentum(
    old: torch.optim.Optimizer, new: torch.optim.Optimizer, model: nn.Module, weights: Mapping[str, Tensor],
    *, momentum: Momentum,
) -> None:  # fmt: skip
    """Give ``new`` the momentum that ``old`` has of parameters that both train, and of replaced ``weights``.

    Projected: with V the momentum of a weight W(p), the factors p get dW/dp^T V, which is what they would have
    gathered at their present values; for W = [B; A B] that is [I; A]^T V for B, and V's derived rows times B^T for A.
    """
    trained = {p for group in new.param_groups for p in group["params"]}
    new.state.update({p: state for p, state in old.state.items() if p in trained})
    for name, weight in weights.items() if momentum == "projected" else ():
        gathered = old.state.get(weight, {}).get("momentum_buffer")
        layer = model.get_submodule(name)
        factors = [p for p in layer.parameters() if p in trained]
        if gathered is not None and factors and weight not in trained:
            with torch.enable_grad():
                found = torch.autograd.grad((weight_of(layer) * gathered).sum(), factors, allow_unused=True)
            new.state.update({p: {"momentum_buffer": g} for p, g in zip(factors, found, strict=True) if g is not None})
