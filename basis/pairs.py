"""Which convolution is directly followed by which batch normalisation.

Read from the traced graph of the model (:mod:`torch.fx`), so it holds for every input. A pair is a
convolution whose output goes into one ``nn.BatchNorm2d`` and nowhere else, both of them called once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from basis.conv import BasisConv2d


@dataclass(frozen=True)
class Pairs:
    """What :func:`norm_pairs` found.

    Attributes:
        norms: name of a convolution -> name of the batch normalisation that directly follows it.
        alone: name of every other convolution -> why it is in no pair.
    """

    norms: Mapping[str, str]
    alone: Mapping[str, str]


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that running statistics that are read show in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (BasisConv2d, nn.Conv2d, nn.BatchNorm2d))
        return leaf or super().is_leaf_module(m, module_qualified_name)


def norm_pairs(model: nn.Module) -> Pairs:
    """The pairs of a convolution (dense or basis) and the ``nn.BatchNorm2d`` that directly follows it.

    Both are named as in ``model.named_modules()``. A subclass of ``nn.BatchNorm2d`` with a forward pass of
    its own makes no pair.

    Raises:
        ValueError: where the model cannot be traced, because what it computes depends on values.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx ({first}), "
            "so what follows its convolutions is unknown"
        ) from error
    name_of = {module: name for name, module in model.named_modules()}
    modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(modules.values())
    read = {model.get_submodule(str(node.target).rpartition(".")[0]) for node in graph.nodes if node.op == "get_attr"}
    norms: dict[str, str] = {}
    alone: dict[str, str] = {}
    for node, module in modules.items():
        if isinstance(module, (BasisConv2d, nn.Conv2d)):
            users = [modules.get(user) for user in node.users]
            norm = users[0] if len(users) == 1 else None
            if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
                alone[name_of[module]] = "its output does not go into one nn.BatchNorm2d and nowhere else"
            elif module in read or norm in read:
                alone[name_of[module]] = "its parameters, or those of its batch normalisation, are used elsewhere too"
            elif calls[module] > 1 or calls[norm] > 1:
                alone[name_of[module]] = "it or its batch normalisation is called more than once"
            else:
                norms[name_of[module]] = name_of[norm]
    for name, module in model.named_modules():
        if isinstance(module, (BasisConv2d, nn.Conv2d)) and name not in norms:
            alone.setdefault(name, "it is never called")
    return Pairs(norms, alone)
