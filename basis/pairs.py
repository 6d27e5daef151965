"""Which convolution is directly followed by which batch normalisation.

Read from the traced graph of the model (:mod:`torch.fx`), so it holds for every input. A pair is a
convolution whose output goes into one ``nn.BatchNorm2d`` and nowhere else, both of them called once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from basis.convlike import ConvLike


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
        leaf = isinstance(m, (ConvLike, nn.Conv2d, nn.BatchNorm2d))
        return leaf or super().is_leaf_module(m, module_qualified_name)


def norm_pairs(model: nn.Module, *, both_modes: bool = False) -> Pairs:
    """The pairs of a convolution (dense, basis or structured) and the ``nn.BatchNorm2d`` that directly follows it.

    Both are named as in ``model.named_modules()``. A subclass of ``nn.BatchNorm2d`` with a forward pass of
    its own makes no pair, but for the one that :func:`afterwards` knows.

    Args:
        both_modes: name those that are pairs in training and in evaluation, or in one of the two where the
            other calls neither; else the mode in which ``model`` is decides.

    Raises:
        ValueError: where the model cannot be traced, because what it computes depends on values.
    """
    follows: dict[nn.Module, set[nn.Module | None]] = {}
    precedes: dict[nn.Module, set[nn.Module | None]] = {}
    calls: Counter[nn.Module] = Counter()
    read: set[nn.Module] = set()
    for graph in _graphs(model, (True, False) if both_modes else (None,)):
        modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
        calls |= Counter(modules.values())  # in the graph that calls it most
        read |= {model.get_submodule(str(n.target).rpartition(".")[0]) for n in graph.nodes if n.op == "get_attr"}
        for node, module in modules.items():
            users, inputs = ([modules.get(other) for other in nodes] for nodes in (node.users, node.all_input_nodes))
            follows.setdefault(module, set()).add(users[0] if len(users) == 1 else None)
            precedes.setdefault(module, set()).add(inputs[0] if len(inputs) == 1 else None)
    norms: dict[str, str] = {}
    alone: dict[str, str] = {}
    name_of = {module: name for name, module in model.named_modules()}
    for module, name in name_of.items():
        if not isinstance(module, (ConvLike, nn.Conv2d)):
            continue
        after = follows.get(module, set())
        norm = next(iter(after)) if len(after) == 1 else None
        if not after:
            alone[name] = "it is never called"
        elif norm is None or afterwards(norm) is None:
            alone[name] = "its output does not go into one nn.BatchNorm2d and nowhere else"
        elif module in read or norm in read:
            alone[name] = "its parameters, or those of its batch normalisation, are used elsewhere too"
        elif calls[module] > 1 or calls[norm] > 1 or precedes[norm] != {module}:
            alone[name] = "it or its batch normalisation is called more than once"
        else:
            norms[name] = name_of[norm]
    return Pairs(norms, alone)


def afterwards(norm: nn.Module) -> tuple[nn.Module, ...] | None:
    """What a batch normalisation does with its result: nothing, or, as timm's ``BatchNormAct2d``, drop and act.

    None where it is none, or has a forward pass that is not known here.
    """
    kind = type(norm)
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if kind.forward is nn.BatchNorm2d.forward:
        return ()
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return (norm.drop, norm.act)  # type: ignore[return-value]
    return None


def _graphs(model: nn.Module, modes: Iterable[bool | None]) -> list[fx.Graph]:
    """What ``model`` computes in training (True), in evaluation (False) or as it is (None)."""
    flags = {module: module.training for module in model.modules()}
    try:
        graphs = []
        for mode in modes:
            for module, flag in flags.items():
                module.training = flag if mode is None else mode
            graphs.append(_Tracer().trace(model))
        return graphs
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx ({first}), "
            "so what follows its convolutions is unknown"
        ) from error
    finally:
        for module, flag in flags.items():
            module.training = flag
