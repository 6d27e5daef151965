"""A network that can be run again from the middle, after a change of one layer.

What lies before the changed layer gives the same values every time. They are computed once and kept, and every
further run begins there: :class:`Network` follows the graph that ``torch.fx`` traces, and where a model cannot
be traced it runs the whole model, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basis.batches import Batch, Loss, sample_losses
from basis.layers.base import ConvLike
from basis.modules import tracking_norms, training_norms

TRIED = 32  # samples on which keeping values is tried


class Network:
    """A network whose every run may begin at values that were kept before some node of its graph.

    Attributes:
        spent: passes through the whole network so far, in images; a part counts for its share of MACs.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Tensor], calibration: Sequence[Tensor], macs: Mapping[str, int]
    ) -> None:
        self.model, self.spent = model, 0.0
        self.scored, self.calibrated = _Kept(inputs), _Kept(calibration)
        self.norms = tracking_norms(model) if calibration else []
        self.at, self.cuts = 0, {0: False}  # node of the graph -> whether what follows changes its values
        self.walk: _Walk | None = None
        self.macs = {m: macs.get(name, 0) for name, m in model.named_modules()}
        self._recalibrate()
        self.statistics = [{name: b.clone() for name, b in norm.named_buffers()} for norm in self.norms]

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], loss: Loss) -> tuple[Tensor, bool, list[Tensor]]:
        """Losses of all samples (float64, on the CPU), whether they are told apart, and the logits, if any."""
        losses, logits, apart = [], [], True
        for i, (_, y) in enumerate(batches):
            output = self._run(self.scored, i)
            values, apart = sample_losses(loss, output, y)
            losses.append(values.double())
            if isinstance(output, Tensor) and output.shape == (len(y), *output.shape[1:2]):
                logits.append(output)
        return torch.cat(losses).cpu(), apart, logits

    @contextmanager
    def recalibrated(self) -> Iterator[None]:
        """With the statistics of the network as it is now; those of the dense one come back."""
        self._recalibrate()
        try:
            yield
        finally:
            self._restore()

    def _recalibrate(self) -> None:
        """Measure the statistics of all that follows the cut anew; what precedes it keeps its own."""
        norms = [norm for norm in self.norms if not self.at or self.first_use(norm) >= self.at]
        with torch.no_grad(), training_norms(norms, afresh=True):
            for i in range(len(self.calibrated.inputs) if norms else 0):
                self._run(self.calibrated, i)

    @torch.no_grad()
    def _restore(self) -> None:
        for norm, statistics in zip(self.norms, self.statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(statistics[name])

    def _run(self, kept: _Kept, i: int) -> Any:
        """The output for batch ``i``."""
        x = kept.inputs[i]
        if self.walk is None or not self.at:
            self.spent += len(x)
            return self.model(x.clone())
        self.spent += len(x) * self.walk.share[self.at]
        values = _clone(kept.values[i]) if self.cuts[self.at] else kept.values[i]
        return self.walk.piece(x, values, self.at, len(self.walk.nodes))[self.walk.nodes[-1]]

    # -- keeping values -------------------------------------------------------------------------

    @torch.no_grad()
    def plan_cuts(self, layers: Sequence[nn.Module], cache_bytes: int) -> None:
        """Find before which layers values can be kept: it gives the same outputs, and they are not too many.

        Tried on a few samples. Leaves all as it is where the model cannot be traced, or where its graph
        gives other outputs.
        """
        walk = _Walk.of(self.model, self.macs)
        if walk is None or any(len(walk.uses(norm)) != 1 for norm in self.norms) or not self._agrees(walk):
            return
        x = self.scored.inputs[0][:TRIED]
        images = sum(map(len, (*self.scored.inputs, *self.calibrated.inputs)))
        dense = walk.whole(x.clone())
        values: dict[fx.Node, Any] = {}
        at = 0
        for cut in sorted({walk.uses(layer)[0] for layer in layers if walk.uses(layer)}):
            values, at = walk.piece(x.clone(), values, at, cut), cut
            if _bytes(values) / len(x) * images > cache_bytes:
                continue
            copies = _clone(values)
            versions = [tensor._version for tensor in _tensors(copies)]
            output = walk.piece(x, copies, cut, len(walk.nodes))[walk.nodes[-1]]
            self.spent += len(x) * walk.share[cut]
            if _same(output, dense):  # else values share memory in a way that copies do not
                self.cuts[cut] = versions != [tensor._version for tensor in _tensors(copies)]
        self.walk = walk

    def _agrees(self, walk: _Walk) -> bool:
        """Whether the graph does what the model does: on a few samples, also in training mode."""

        def both(x: Tensor) -> bool:
            self.spent += 2 * len(x)
            return _same(walk.whole(x.clone()), self.model(x.clone()))

        try:
            agrees = all(both(self.scored.inputs[i][:TRIED]) for i in (0, -1))
            with training_norms(self.norms):
                return agrees and all(both(self.calibrated.inputs[i][:TRIED]) for i in (0, -1) if self.norms)
        except Exception:  # whatever a graph cannot do, the model itself does
            return False
        finally:
            self._restore()

    def first_use(self, module: nn.Module) -> int:
        """The node of the graph at which ``module`` is first used; 0 where there is no graph or no use."""
        return next(iter(self.walk.uses(module)), 0) if self.walk else 0

    def advance(self, node: int) -> None:
        """Keep the values before ``node``, or before the last node ahead of it where that is possible."""
        cut = max(cut for cut in self.cuts if cut <= node)
        if self.walk is None or cut <= self.at:
            return
        share = self.walk.share[self.at] - self.walk.share[cut]
        for kept, norms in ((self.scored, []), (self.calibrated, self.norms)):
            with torch.no_grad(), training_norms(norms):
                for i, x in enumerate(kept.inputs):
                    kept.values[i] = self.walk.piece(x.clone(), kept.values[i], self.at, cut)
                    self.spent += len(x) * share
        self.at = cut


class _Kept:
    """Batches of inputs, each with the values that are alive at the cut."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.values: list[dict[fx.Node, Any]] = [{} for _ in inputs]


class _Tracer(fx.Tracer):
    """Convolutions and batch normalisation stay whole, also those that are not PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, ConvLike, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


class _Walk(fx.Interpreter):
    """Runs a piece of a model's graph. ``share[i]``: what the nodes from ``i`` on have of all MACs."""

    def __init__(self, model: nn.Module, graph: fx.Graph, macs: Mapping[nn.Module, int]) -> None:
        super().__init__(model, graph=graph)
        self.nodes = list(graph.nodes)
        self._modules_of = [self._used(model, node) for node in self.nodes]
        calls: dict[nn.Module, int] = {}
        for modules in self._modules_of:
            calls |= {module: calls.get(module, 0) + 1 for module in modules}
        work = [sum(macs.get(m, 0) / calls[m] for m in modules) for modules in self._modules_of]
        total = sum(work)
        self.share = [sum(work[i:]) / total if total else 1.0 for i in range(len(work))]

    @classmethod
    def of(cls, model: nn.Module, macs: Mapping[nn.Module, int]) -> _Walk | None:
        """None where the model cannot be traced."""
        try:
            return cls(model, _Tracer().trace(model), macs)
        except Exception:  # torch.fx refuses in many ways, and runs the model's own code
            return None

    @staticmethod
    def _used(model: nn.Module, node: fx.Node) -> set[nn.Module]:
        if node.op == "call_module":
            return set(model.get_submodule(str(node.target)).modules())
        if node.op == "get_attr":
            return {model.get_submodule(str(node.target).rpartition(".")[0])}
        return set()

    def uses(self, module: nn.Module) -> list[int]:
        """The nodes at which ``module`` is called, or one of its tensors read."""
        return [i for i, modules in enumerate(self._modules_of) if module in modules]

    def whole(self, x: Tensor) -> Any:
        """The output for ``x``."""
        return self.piece(x, {}, 0, len(self.nodes))[self.nodes[-1]]

    def piece(self, x: Tensor, values: Mapping[fx.Node, Any], start: int, stop: int) -> dict[fx.Node, Any]:
        """Run the nodes from ``start`` up to ``stop``; all values that are alive then, or the output."""
        self.env, self.args_iter = dict(values), iter((x,))
        for node in self.nodes[start:stop]:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
        later, env = set(self.nodes[stop:]), self.env
        self.env = {}
        return {node: value for node, value in env.items() if node is self.nodes[-1] or later & set(node.users)}


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _clone(values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Copies of all tensors; one that is there twice stays one."""
    memo: dict[int, Any] = {id(tensor): tensor.clone() for tensor in _tensors(values)}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return memo[id(value)]
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return copy(values)


def _bytes(values: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(values)}
    return sum(storages.values())


def _same(first: Any, second: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    pairs = list(zip(_tensors(first), _tensors(second), strict=False))
    return len(pairs) == len(_tensors(second)) > 0 and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5 * float(b.abs().max() or 1))
        for a, b in pairs
    )
