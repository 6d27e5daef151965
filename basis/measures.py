"""The measures of sensitivity that need no training: from the weights alone to one evaluation per candidate.

Each function takes a network in eval mode that nothing else uses (the statistics of its batch normalisation
may change), the candidates (layer name -> numbers of basis channels) and what else it needs, and returns what
it found about the dense network (its ``loss``) and the cells, one after the other.

With groups, each group is a matrix of its own, and k / groups is its rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from basis.conv import BasisConv2d
from basis.statistics import mean_estimate
from basis.table import Cell

Candidates = Mapping[str, Sequence[int]]
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]
Measured = tuple[dict[str, float], Iterator[Cell]]

CACHE_BYTES = 2 * 2**30
TRIED = 32  # samples on which keeping values is tried


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample in nats, (N,): logits (N, classes, ...) and labels, or class probabilities."""
    losses = F.cross_entropy(outputs.float(), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def sample_losses(loss: Loss, outputs: Any, targets: Tensor) -> tuple[Tensor, bool]:
    """The loss of each sample, (N,), and whether ``loss`` tells them apart; else each is the batch's mean."""
    values = loss(outputs, targets)
    if not isinstance(values, Tensor) or tuple(values.shape) not in ((), (len(targets),)):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"the loss returned {found}, but it must return a tensor: one value for each of the {len(targets)} "
            "samples of the batch, or their mean"
        )
    return (values, True) if values.dim() else (values.expand(len(targets)), False)


# -- from the weights alone ---------------------------------------------------------------------


def spectrum(model: nn.Module, candidates: Candidates) -> Measured:
    """Relative Frobenius error ||W - W_k|| / ||W|| of the best approximation of rank k (Eckart and Young).

    In float64, from the singular values. A weight that is all zero has error 0.
    """

    def cells() -> Iterator[Cell]:
        for name, ks in candidates.items():
            began = time.perf_counter()
            blocks = _blocks(model.get_submodule(name))
            finite = bool(blocks.isfinite().all())
            energies = torch.linalg.svdvals(blocks).square().cpu() if finite else blocks.new_full((1, 1), math.nan)
            seconds = (time.perf_counter() - began) / len(ks)
            for k in ks:
                value = _tail(energies, k // len(blocks)) if finite else math.nan
                yield Cell(layer=name, basis_channels=k, value=value, seconds=seconds)

    return {}, cells()


def truncated(conv: nn.Module, ks: Sequence[int]) -> dict[int, Tensor]:
    """k -> the best approximation of rank k of the weight, in its shape, dtype and memory format."""
    weight: Any = conv.weight
    blocks = _blocks(conv)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    result = {}
    for k in ks:
        r = k // len(blocks)
        flat = (u[..., :r] * s[:, None, :r]) @ vh[:, :r]
        result[k] = torch.empty_like(weight, requires_grad=False).copy_(flat.reshape(weight.shape))
    return result


def _blocks(conv: Any) -> Tensor:
    """The weight as one matrix for each group, (g, C_out/g, F), float64."""
    return conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1)


def _tail(energies: Tensor, rank: int) -> float:
    """sqrt(what is beyond the ``rank`` largest / all) of (g, m) energies in descending order; 0 for 0 / 0."""
    total = energies.sum().item()
    return math.sqrt(energies[:, rank:].sum().item() / total) if total != 0 else 0.0


# -- from one pass of the data ------------------------------------------------------------------


@torch.no_grad()
def activation(model: nn.Module, candidates: Candidates, batches: Sequence[Batch]) -> Measured:
    """Relative error of the layer's output, projected on its k principal components, in one forward pass.

    sqrt(tail / total) of the eigenvalues of the centred covariance of the output channels, over all
    samples and pixels (X. Zhang et al. 2016, arXiv 1411.4229, section 2.1). An output that never varies
    has error 0.
    """
    began = time.perf_counter()
    moments: dict[str, _Moments] = {name: _Moments() for name in candidates}

    def watch(name: str) -> Callable:
        def hook(module: Any, args: tuple, y: Tensor) -> None:
            y = y.movedim(-3, 0)  # channels first
            moments[name].add(y.reshape(module.groups, module.out_channels // module.groups, -1))

        return hook

    with _hooks(model, {name: watch(name) for name in candidates}):
        for x, _ in batches:
            model(x.clone())
    values = {}
    for name, ks in candidates.items():
        scatter = moments[name].scatter
        finite = bool(scatter.isfinite().all())
        energies = torch.linalg.eigvalsh(scatter).clamp_min(0).flip(-1).cpu() if finite and scatter.dim() else None
        for k in ks:
            rank = k // (len(scatter) if scatter.dim() else 1)
            values[name, k] = (0.0 if finite else math.nan) if energies is None else _tail(energies, rank)
    share = 1 / len(values)
    images, seconds = sum(len(x) for x, _ in batches), time.perf_counter() - began
    cells = [
        Cell(layer=name, basis_channels=k, value=value, forward=images * share, seconds=seconds * share)
        for (name, k), value in values.items()
    ]
    return {}, iter(cells)


class _Moments:
    """Mean and scatter matrix of rows that come in pieces, merged as Chan, Golub and LeVeque (1979) do."""

    def __init__(self) -> None:
        self.n, self.mean, self.scatter = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """``rows``: (g, width, n), a column for each observation."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        n, mean = rows.shape[-1], rows.mean(-1, keepdim=True)
        centred = rows - mean
        scatter, mean = (centred @ centred.mT).double(), mean.double()
        if self.n:
            apart = mean - self.mean
            scatter = self.scatter + scatter + apart @ apart.mT * (self.n * n / (self.n + n))
            mean = self.mean + apart * (n / (self.n + n))
        self.n, self.mean, self.scatter = self.n + n, mean, scatter


def gradients(
    model: nn.Module, candidates: Candidates, batches: Sequence[Batch], loss: Loss, *, squared: bool
) -> Measured:
    """Taylor and Fisher scores of every k of every layer, from one forward and one backward pass.

    With W = U S V^T, y the layer's output without bias, p = U^T y and g = U^T dL/dy, truncation to rank k
    changes y by - sum_{i>k} u_i p_i, and the loss of sample n to first order by
    delta_n = - sum_{i>k} sum_pixels p_i g_i. The score is the mean of delta_n (Taylor: the signed change;
    Molchanov et al. 2019, arXiv 1906.10771, with components in place of filters) or, ``squared``, half the
    mean of delta_n^2 (the quadratic form of the empirical Fisher matrix; Theis et al. 2018,
    arXiv 1801.05787). Intervals are over samples.

    A layer that runs where the model itself switches gradients off scores NaN.

    Raises:
        ValueError: where a layer sees another number of images than the batch holds, or where the model
            cannot be differentiated.
    """
    began = time.perf_counter()
    lowest = {name: min(ks) // model.get_submodule(name).groups for name, ks in candidates.items()}  # type: ignore[operator]
    left = {name: torch.linalg.svd(_blocks(model.get_submodule(name)), full_matrices=False)[0] for name in candidates}
    products: dict[str, list[Tensor]] = {name: [] for name in candidates}  # of each batch: (N, components)
    blind: set[str] = set()
    samples = 0

    def watch(name: str) -> Callable:
        tails = left[name][..., lowest[name] :]  # (g, width, t)
        groups, _, t = tails.shape

        def project(y: Tensor) -> Tensor:
            y = y if y.dtype == torch.float64 else y.float()
            return F.conv2d(y, filters.to(y.dtype), groups=groups)

        filters = tails.mT.reshape(groups * t, -1, 1, 1)

        def hook(module: Any, args: tuple, y: Tensor) -> Tensor | None:
            if y.dim() != 4 or len(y) != samples:
                raise ValueError(
                    f"{name} sees {len(y)} images where the batch holds {samples}; taylor and fisher need one image "
                    "for each sample, so use oneshot here"
                )
            if not torch.is_grad_enabled():
                blind.add(name)
                return None
            # Where nothing before needs a gradient, it starts here (a clone, which may be changed in place).
            fresh = None if y.requires_grad else y.detach().requires_grad_().clone()
            y = y if fresh is None else fresh
            plain = y.detach() if module.bias is None else y.detach() - module.bias.detach()[:, None, None]
            p = project(plain) if t else None

            def receive(grad: Tensor) -> None:
                if p is not None:
                    product = (p * project(grad)).sum((2, 3)).view(samples, groups, t).sum(1)
                    products[name][-1] += product.double()

            y.register_hook(receive)
            return fresh

        return hook

    losses, apart = [], True
    with _hooks(model, {name: watch(name) for name in candidates}), _frozen(model), torch.enable_grad():
        for x, y in batches:
            samples = len(y)
            for name, basis in left.items():
                width = max(0, basis.shape[2] - lowest[name])
                products[name].append(torch.zeros((samples, width), dtype=torch.float64, device=basis.device))
            values, apart = sample_losses(loss, model(x.clone()), y)
            if values.requires_grad:
                _backward(values.sum())
            losses.append(values.detach().double())
    scores: dict[tuple[str, int], tuple[float, float, float, int]] = {}
    for name, ks in candidates.items():
        product = torch.cat(products[name])
        for k in ks:
            delta = -product[:, k // model.get_submodule(name).groups - lowest[name] :].sum(1)  # type: ignore[operator]
            delta = delta * math.nan if name in blind else delta
            scores[name, k] = _estimate(delta.square() / 2 if squared else delta, apart)
    share, images, seconds = 1 / len(scores), sum(len(y) for _, y in batches), time.perf_counter() - began
    passes = {"forward": images * share, "backward": images * share, "seconds": seconds * share}
    cells = [
        Cell(layer=name, basis_channels=k, value=value, low=low, high=high, n=n, **passes)
        for (name, k), (value, low, high, n) in scores.items()
    ]
    return {"loss": torch.cat(losses).mean().item()}, iter(cells)


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        raise ValueError(
            f"the model cannot be differentiated ({error}); use oneshot, which needs no gradients"
        ) from error


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, which nobody needs here."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _estimate(values: Tensor, apart: bool) -> tuple[float, float, float, int]:
    """Mean, its interval and n over samples; no interval where the loss does not tell them apart."""
    mean = mean_estimate(values.tolist())
    if not math.isfinite(mean.value):
        return math.nan, math.nan, math.nan, 0
    return (mean.value, mean.low, mean.high, mean.n) if apart else (mean.value, math.nan, math.nan, 0)


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Callable]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- from one evaluation per candidate ----------------------------------------------------------


def oneshot(
    model: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    calibration: Sequence[Tensor] = (),
    macs: Mapping[str, int] | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Measured:
    """Replace the weight of one layer by its approximation of rank k, and evaluate.

    The value is the mean loss minus the dense network's, its interval over samples (paired); ``kl`` the
    mean divergence of the predictions, where the outputs are logits (N, classes).

    With ``calibration`` inputs the statistics of batch normalisation are measured anew before each
    evaluation, also of the dense network: the plain average over the batches (EagleEye: Li et al. 2020,
    arXiv 2007.02491, section 3.2).

    What lies before a layer does not change, so its values are computed once and kept, as long as they
    take at most ``cache_bytes``; 0 runs the whole network every time, with the same result.

    Args:
        macs: of each module, by name; what a part of the network counts as in ``forward``.
    """
    began = time.perf_counter()
    network = _Network(model, [x for x, _ in batches], calibration, macs or {})
    losses, apart, dense = network.evaluate(batches, loss)
    if cache_bytes:
        network.plan_cuts([model.get_submodule(name) for name in candidates], cache_bytes)
    share = 1 / sum(map(len, candidates.values()))
    common, common_seconds = network.spent * share, (time.perf_counter() - began) * share

    def cells() -> Iterator[Cell]:
        position = {name: network.first_use(model.get_submodule(name)) for name in candidates}
        for name in sorted(candidates, key=lambda name: position[name]):
            began, network.spent = time.perf_counter(), 0.0
            network.advance(position[name])
            conv = model.get_submodule(name)
            for k, weight in truncated(conv, candidates[name]).items():
                with _weight(conv, weight), network.recalibrated():
                    new, _, logits = network.evaluate(batches, loss)
                value, low, high, n = _estimate(new - losses, apart)
                kl = _divergence(dense, logits)
                yield Cell(
                    layer=name, basis_channels=k, value=value, low=low, high=high, n=n, kl=kl,
                    forward=network.spent + common, seconds=time.perf_counter() - began + common_seconds,
                )  # fmt: skip
                began, network.spent = time.perf_counter(), 0.0

    return {"loss": losses.mean().item()}, cells()


@contextmanager
def _weight(conv: Any, weight: Tensor) -> Iterator[None]:
    dense, conv.weight.data = conv.weight.data, weight
    try:
        yield
    finally:
        conv.weight.data = dense


def _divergence(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean of KL(first || second) over the rows of logits (N, classes), in nats; NaN where there are none."""
    if not first or len(first) != len(second):
        return math.nan
    log_p, log_q = (torch.cat(list(logits)).double().log_softmax(1) for logits in (first, second))
    total = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    return total if math.isfinite(total) else math.nan


class _Network:
    """A network whose every run may begin at values that were kept before some node of its graph.

    Attributes:
        spent: passes through the whole network so far, in images; a part counts for its share of MACs.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Tensor], calibration: Sequence[Tensor], macs: Mapping[str, int]
    ) -> None:
        self.model, self.spent = model, 0.0
        self.scored, self.calibrated = _Kept(inputs), _Kept(calibration)
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.norms = self.norms if calibration else []
        for norm in self.norms:
            norm.momentum = None  # the plain average over batches
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
        with torch.no_grad(), _training(norms, afresh=True):
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
            with _training(self.norms):
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
            with torch.no_grad(), _training(norms):
                for i, x in enumerate(kept.inputs):
                    kept.values[i] = self.walk.piece(x.clone(), kept.values[i], self.at, cut)
                    self.spent += len(x) * share
        self._restore()
        self.at = cut


class _Kept:
    """Batches of inputs, each with the values that are alive at the cut."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.values: list[dict[fx.Node, Any]] = [{} for _ in inputs]


class _Tracer(fx.Tracer):
    """Convolutions and batch normalisation stay whole, also those that are not PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, BasisConv2d, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


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


@contextmanager
def _training(norms: Sequence[_BatchNorm], *, afresh: bool = False) -> Iterator[None]:
    """These modules in training mode, with their statistics at zero where ``afresh``."""
    for norm in norms:
        norm.train()
        if afresh:
            norm.reset_running_stats()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()


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
