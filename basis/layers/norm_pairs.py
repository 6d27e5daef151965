"""Which convolution is directly followed by which batch normalisation, read from the graph of :mod:`torch.fx`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from basis.layers.base import ConvLike
from basis.modules import keeping
from basis.text import first_line


@dataclass(frozen=True)
class Pairs:
    """Which convolutions have a batch normalisation of their own; all by name."""

    norms: Mapping[str, str]  # convolution -> the batch normalisation that directly follows it
    alone: Mapping[str, str]  # other convolution -> why it has none
    hidden: Mapping[str, str] = field(default_factory=dict)  # layer within one that cannot be traced -> that, in words


class _Tracer(fx.Tracer):
    """Takes the ``opaque`` modules as they are, and tells the innermost ``culprit`` in which tracing failed."""

    proxy_buffer_attributes = True  # so that running statistics that are read show in the graph

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque
        self.culprit: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (ConvLike, nn.Conv2d, nn.BatchNorm2d)) or m in self.opaque
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise


def norm_pairs(model: nn.Module, *, both_modes: bool = False) -> Pairs:
    """The pairs of a convolution (dense, basis or structured) and the ``nn.BatchNorm2d`` that directly follows it.

    In a pair, the output of the convolution goes into the batch normalisation and nowhere else, and both are called
    once: in the mode in which ``model`` is, or with ``both_modes`` in training and in evaluation (or in one of the two
    where the other calls neither). Raises ``ValueError`` where the model itself cannot be traced.
    """
    follows: defaultdict[nn.Module, set[nn.Module | None]] = defaultdict(set)
    precedes: defaultdict[nn.Module, set[nn.Module | None]] = defaultdict(set)
    calls: Counter[nn.Module] = Counter()
    read: set[nn.Module] = set()
    graphs, opaque = _graphs(model, (True, False) if both_modes else (None,))
    for graph in graphs:
        modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
        calls |= Counter(modules.values())  # in the graph that calls it most
        read |= {model.get_submodule(str(n.target).rpartition(".")[0]) for n in graph.nodes if n.op == "get_attr"}
        for node, module in modules.items():
            users, inputs = ([modules.get(other) for other in nodes] for nodes in (node.users, node.all_input_nodes))
            follows[module].add(users[0] if len(users) == 1 else None)
            precedes[module].add(inputs[0] if len(inputs) == 1 else None)
    name_of = {module: name for name, module in model.named_modules()}
    hidden = {m: f"it is within {name_of[o]}, which cannot be traced by torch.fx" for o in opaque for m in o.modules()}
    norms: dict[str, str] = {}
    alone: dict[str, str] = {}
    for module, name in name_of.items():
        if not isinstance(module, (ConvLike, nn.Conv2d)):
            continue
        norm = next(iter(follows[module])) if len(follows[module]) == 1 else None
        if module in hidden:
            alone[name] = hidden[module]
        elif not follows[module]:
            alone[name] = "it is never called"
        elif norm is None or afterwards(norm) is None:
            alone[name] = "its output does not go into one nn.BatchNorm2d and nowhere else"
        elif module in read or norm in read or norm in hidden:
            alone[name] = "its parameters, or those of its batch normalisation, are used elsewhere too"
        elif calls[module] > 1 or calls[norm] > 1 or precedes[norm] != {module}:
            alone[name] = "it or its batch normalisation is called more than once"
        else:
            norms[name] = name_of[norm]
    return Pairs(norms, alone, {name_of[module]: why for module, why in hidden.items()})


def afterwards(norm: nn.Module) -> tuple[nn.Module, ...] | None:
    """What a batch normalisation does with its result, as timm's ``BatchNormAct2d``; None where that is not known."""
    kind = type(norm)
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return (norm.drop, norm.act)  # type: ignore[return-value]
    return () if isinstance(norm, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward else None


def _graphs(model: nn.Module, modes: Sequence[bool | None]) -> tuple[list[fx.Graph], set[nn.Module]]:
    """What ``model`` computes in training (True), evaluation (False) or as it is (None), and the layers left opaque."""
    opaque: set[nn.Module] = set()
    graphs: list[fx.Graph] = []
    while len(graphs) < len(modes):
        tracer, mode = _Tracer(opaque), modes[len(graphs)]
        with keeping(model.modules(), "training"):
            if mode is not None:
                for module in model.modules():
                    module.training = mode
            try:
                graphs.append(tracer.trace(model))
            except Exception as error:  # tracing runs the model's own code, which may raise anything
                if tracer.culprit is None or tracer.culprit in opaque:
                    why = f"{type(model).__name__} cannot be traced by torch.fx ({first_line(error)})"
                    raise ValueError(why) from error
                opaque.add(tracer.culprit)  # and try again
    return graphs, opaque
