"""The measures of sensitivity that need no training: from the weights alone to one evaluation per candidate.

Each function takes a network in eval mode that nothing else uses (the statistics of its batch normalisation
may change), the candidates (layer name -> numbers of basis channels, or texts of structured layers) and what
else it needs, and returns what it found about the dense network (its ``loss``) and the cells, one after the other.

With groups, each group is a matrix of its own, and k / groups is its rank. A structured layer stands for the
weight that its ``from_conv`` finds, the same one every time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.batches import Batch, Loss, cross_entropy, sample_losses
from basis.layers.moments import Moments, directions, lost_mean, output_moments, taking_means, untied
from basis.layers.structured import Structure
from basis.modules import hooked
from basis.search.replay import Network
from basis.search.table import Cell
from basis.statistics import Estimate, mean_estimate
from basis.substitution import Size

Candidates = Mapping[str, Sequence[Size]]
Measured = tuple[dict[str, float], Iterator[Cell]]

CACHE_BYTES = 2 * 2**30
PART = 2**21  # numbers of an input that a backward pass takes at once: 13 images of 224 x 224


# -- from the weights alone ---------------------------------------------------------------------


def spectrum(model: nn.Module, candidates: Candidates) -> Measured:
    """Relative Frobenius error ||W - W_k|| / ||W|| of the best approximation of rank k (Eckart and Young).

    In float64, from the singular values. A weight that is all zero has error 0. Of a structured layer it is the
    same error of its weight.
    """

    def cells() -> Iterator[Cell]:
        for name, sizes in candidates.items():
            began = time.perf_counter()
            conv: Any = model.get_submodule(name)
            blocks, ks = _blocks(conv), _ks(sizes)
            finite = bool(blocks.isfinite().all())
            if ks:
                energies = torch.linalg.svdvals(blocks).square().cpu() if finite else blocks.new_full((1, 1), math.nan)
                seconds = (time.perf_counter() - began) / len(ks)
            for k in ks:
                value = _tail(energies, k // len(blocks)) if finite else math.nan
                yield Cell(layer=name, basis_channels=k, value=value, seconds=seconds)
            for text in _texts(sizes):
                began, value = time.perf_counter(), math.nan
                if finite:
                    apart = _as(text, conv).double() - conv.weight.double()
                    value = _share(apart.square().sum(), blocks.square().sum())
                yield Cell(layer=name, basis_channels=text, value=value, seconds=time.perf_counter() - began)

    return {}, cells()


def approximations(
    conv: Any, sizes: Sequence[Size], moments: Moments | None = None, *, holds_mean: bool = False
) -> Iterator[tuple[Size, Tensor, Tensor | None]]:
    """Each size with its weight, in the shape, dtype and memory format of that of ``conv``, and the mean it loses.

    Of k it is the best approximation of rank k, of a text that of the structured layer. With ``moments`` that of
    k is the one :meth:`basis.BasisConv2d.from_conv` makes of them, and the mean of the outputs that it loses is
    (C_out,), where there is a place that ``holds_mean``; else None.
    """
    if ks := _ks(sizes):
        blocks = _blocks(conv)
        if moments is None or not moments.n:
            u = directions(blocks @ blocks.mT, blocks)  # the left singular vectors, much sooner than by an SVD
        else:
            u = directions(moments.second(about_mean=holds_mean), blocks)
            mean = moments.mean.flatten() - (0 if conv.bias is None else conv.bias.detach().double())
        for k in ks:
            r, lost = k // len(blocks), None
            flat = u[..., :r] @ (u[..., :r].mT @ blocks)
            if moments is not None and moments.n:
                lost = lost_mean(u[..., :r], mean.view(len(blocks), -1, 1)).flatten() if holds_mean else None
            yield k, torch.empty_like(conv.weight, requires_grad=False).copy_(flat.reshape(conv.weight.shape)), lost
    for text in _texts(sizes):
        yield text, torch.empty_like(conv.weight, requires_grad=False).copy_(_as(text, conv)), None


def _as(text: str, conv: Any) -> Tensor:
    """The weight of the structured layer nearest to ``conv``; NaN where its own is not finite, which nothing fits.

    A normalisation within the layer is the identity that fitting makes it.
    """
    if not conv.weight.isfinite().all():
        return torch.full_like(conv.weight, math.nan)
    torch.manual_seed(0)  # fitting may begin at random: the same for every order of the candidates
    layer: Any = Structure.parse(text).make([conv], fitted=True)[0]
    return layer.weight.detach()


def _ks(sizes: Sequence[Size]) -> list[int]:
    return [size for size in sizes if not isinstance(size, str)]


def _texts(sizes: Sequence[Size]) -> list[str]:
    return [size for size in sizes if isinstance(size, str)]


def _blocks(conv: Any) -> Tensor:
    """The weight as one matrix for each group, (g, C_out/g, F), float64."""
    return conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1)


def _tail(energies: Tensor, rank: int) -> float:
    """sqrt(what is beyond the ``rank`` largest / all) of (g, m) energies in descending order; 0 for 0 / 0."""
    return _share(energies[:, rank:].sum(), energies.sum())


def _share(part: Tensor, total: Tensor) -> float:
    """sqrt(part / total), 0 for 0 / 0."""
    return math.sqrt(part.item() / total.item()) if total.item() != 0 else 0.0


# -- from one pass of the data ------------------------------------------------------------------


@torch.no_grad()
def activation(model: nn.Module, candidates: Candidates, batches: Sequence[Batch]) -> Measured:
    """Relative error of the layer's output, projected on its k principal components, in one forward pass.

    sqrt(tail / total) of the eigenvalues of the centred covariance of the output channels, over all
    samples and pixels (X. Zhang et al. 2016, arXiv 1411.4229, section 2.1). An output that never varies
    has error 0.

    A structured layer is compared on the same inputs: the square root of the variance of what it does to the
    output (its own minus the dense one) / the variance of the output, each summed over channels. Its weight is
    fitted to the weight, not to the outputs, and a constant added to a channel does not count, as above.
    """
    began = time.perf_counter()
    moments: dict[str, Moments] = {name: Moments() for name in candidates}
    pairs = [(name, text) for name, sizes in candidates.items() for text in _texts(sizes)]
    apart: dict[tuple[str, Size], Moments] = {pair: Moments() for pair in pairs}

    def watch(name: str) -> Callable:
        conv: Any = model.get_submodule(name)
        changes = {text: _as(text, conv) - conv.weight for text in _texts(candidates[name])}

        def hook(module: Any, args: tuple, y: Tensor) -> None:
            for text, change in changes.items():
                apart[name, text].add_maps(module._conv_forward(args[0], change, None), module.out_channels)
            moments[name].add_maps(y, module.groups)

        return hook

    with hooked(model, {name: watch(name) for name in candidates}):
        for x, _ in batches:
            model(x.clone())
    values: dict[tuple[str, Size], float] = {}
    for name, sizes in candidates.items():
        scatter, finite = moments[name].scatter, moments[name].finite
        seen = finite and moments[name].n > 0  # else the layer has never been called
        energies = torch.linalg.eigvalsh(scatter).clamp_min(0).flip(-1).cpu() if seen else scatter
        for k in sizes:
            if not seen:
                values[name, k] = 0.0 if finite else math.nan
            elif isinstance(k, str):
                values[name, k] = _share(apart[name, k].scatter.sum(), scatter.diagonal(dim1=1, dim2=2).sum())
            else:
                values[name, k] = _tail(energies, k // len(scatter))
    share = 1 / len(values)
    images, seconds = sum(len(x) for x, _ in batches), time.perf_counter() - began
    cells = [
        Cell(layer=name, basis_channels=k, value=value, forward=images * share, seconds=seconds * share)
        for (name, k), value in values.items()
    ]
    return {}, iter(cells)


def gradients(
    model: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    squared: bool,
    fit: Sequence[Tensor] | None = None,
) -> Measured:
    """Taylor and Fisher scores of every k of every layer, from one forward and one backward pass.

    With W = U S V^T, y the layer's output without bias, p = U^T y and g = U^T dL/dy, truncation to rank k
    changes y by - sum_{i>k} u_i p_i, and the loss of sample n to first order by
    delta_n = - sum_{i>k} sum_pixels p_i g_i. The score is the mean of delta_n (Taylor: the signed change;
    Molchanov et al. 2019, arXiv 1906.10771, with components in place of filters) or, ``squared``, half the
    mean of delta_n^2 (the quadratic form of the empirical Fisher matrix; Theis et al. 2018,
    arXiv 1801.05787). Intervals are over samples.

    With ``fit``, inputs, the components are those of the outputs on them instead (U of :mod:`basis.layers.moments`),
    and p is what varies: its mean is not lost where the layer has a place for it.

    A batch is taken in parts of at most ``PART`` input numbers, for the memory that the backward pass needs.
    A layer that runs where the model itself switches gradients off scores NaN.

    Raises:
        ValueError: where a layer sees another number of images than the batch holds, or where the model
            cannot be differentiated.
    """
    began = time.perf_counter()
    lowest: dict[str, int] = {
        name: min(_ks(ks)) // model.get_submodule(name).groups  # type: ignore[operator, misc]
        for name, ks in candidates.items()
    }
    left, kept = _components(model, list(candidates), fit)
    products: dict[str, list[Tensor]] = {name: [] for name in candidates}  # of each batch: (N, components)
    blind: set[str] = set()
    samples = 0

    def watch(name: str) -> Callable:
        tails = left[name][..., lowest[name] :]  # (g, width, t)
        groups, width, t = tails.shape

        def project(y: Tensor) -> Tensor:
            y = y if y.dtype == torch.float64 else y.float()
            return F.conv2d(y, filters.to(y.dtype), groups=groups)

        filters = tails.mT.reshape(groups * t, width, 1, 1)

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
            plain = y.detach() if kept[name] is None else y.detach() - kept[name][:, None, None].to(y.dtype)
            p = project(plain) if t else None

            def receive(grad: Tensor) -> None:
                if p is not None:
                    product = (p * project(grad)).sum((2, 3)).view(samples, groups, t).sum(1)
                    products[name][-1] += product.double()

            y.register_hook(receive)
            return fresh

        return hook

    losses, apart = [], True
    with hooked(model, {name: watch(name) for name in candidates}), _frozen(model), torch.enable_grad():
        for x, y in _parts(batches, loss):
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
        for k in _ks(ks):
            delta = -product[:, k // model.get_submodule(name).groups - lowest[name] :].sum(1)  # type: ignore[operator]
            delta = delta * math.nan if name in blind else delta
            scores[name, k] = _estimate(delta.square() / 2 if squared else delta, apart)
    share, images, seconds = 1 / len(scores), sum(len(y) for _, y in batches), time.perf_counter() - began
    before = sum(map(len, fit or ()))
    passes = {"forward": (before + images) * share, "backward": images * share, "seconds": seconds * share}
    cells = [
        Cell(layer=name, basis_channels=k, value=value, low=low, high=high, n=n, **passes)
        for (name, k), (value, low, high, n) in scores.items()
    ]
    return {"loss": torch.cat(losses).mean().item()}, iter(cells)


def _components(
    model: nn.Module, names: Sequence[str], fit: Sequence[Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The components of each layer's outputs (g, width, n), and what is taken from the outputs before, or None."""
    moments = {} if fit is None else output_moments(model, untied(model, names), iter(fit))
    norms = {} if fit is None else taking_means(model)
    left: dict[str, Tensor] = {}
    kept: dict[str, Tensor | None] = {}
    for name in names:
        conv: Any = model.get_submodule(name)
        own = moments.get(name)
        kept[name] = None if conv.bias is None else conv.bias.detach()
        if own is None or not own.n:
            blocks = _blocks(conv)
            left[name] = directions(blocks @ blocks.mT, blocks)
            continue
        holds = conv.bias is not None or name in norms
        if own.finite:
            left[name] = directions(own.second(about_mean=holds), _blocks(conv))
        else:
            left[name] = torch.full_like(own.scatter, math.nan)
        kept[name] = own.mean.flatten() if holds else kept[name]
    return left, kept


def _parts(batches: Sequence[Batch], loss: Loss) -> Iterator[Batch]:
    """The batches in parts of at most ``PART`` numbers, where the loss is cross-entropy, which takes samples alone."""
    for x, y in batches:
        size = max(1, PART // max(1, x[:1].numel())) if loss is cross_entropy else len(x)
        yield from zip(x.split(size), y.split(size), strict=True)


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
    fit: Sequence[Tensor] | None = None,
) -> Measured:
    """Replace the weight of one layer by its approximation of rank k, or by a structured layer's, and evaluate.

    The value is the mean loss minus the dense network's, its interval over samples (paired); ``kl`` the
    mean divergence of the predictions, where the loss is cross-entropy of logits (N, classes).

    With ``calibration`` inputs the statistics of batch normalisation are measured anew before each
    evaluation, also of the dense network: the plain average over the batches (EagleEye: Li et al. 2020,
    arXiv 2007.02491, section 3.2).

    What lies before a layer does not change, so its values are computed once and kept, as long as they
    take at most ``cache_bytes``; 0 runs the whole network every time, with the same result.

    Args:
        macs: of each module, by name; what a part of the network counts as in ``forward``.
        fit: inputs on whose outputs the approximations of rank k are fitted, see :func:`approximations`.
    """
    began = time.perf_counter()
    moments: dict[str, Moments] = {}
    if fit is not None:
        moments = output_moments(model, untied(model, candidates), iter(fit))
    norms = taking_means(model) if fit is not None else {}
    network = Network(model, [x for x, _ in batches], calibration, macs or {})
    losses, apart, dense = network.evaluate(batches, loss)
    if cache_bytes:
        network.plan_cuts([model.get_submodule(name) for name in candidates], cache_bytes)
    share = 1 / sum(map(len, candidates.values()))
    network.spent += sum(map(len, fit or ()))
    common, common_seconds = network.spent * share, (time.perf_counter() - began) * share

    def cells() -> Iterator[Cell]:
        position = {name: network.first_use(model.get_submodule(name)) for name in candidates}
        for name in sorted(candidates, key=lambda name: position[name]):
            began, network.spent = time.perf_counter(), 0.0
            network.advance(position[name])
            conv: Any = model.get_submodule(name)
            norm = model.get_submodule(norms[name]) if name in norms else None
            holds = conv.bias is not None or norm is not None
            for k, weight, lost in _finite(conv, candidates[name], moments.get(name), holds):
                with _replaced(conv, norm, weight, lost), network.recalibrated():
                    new, _, logits = network.evaluate(batches, loss)
                value, low, high, n = _estimate(new - losses, apart)
                kl = _divergence(dense, logits) if loss is cross_entropy else math.nan
                yield Cell(
                    layer=name, basis_channels=k, value=value, low=low, high=high, n=n, kl=kl,
                    forward=network.spent + common, seconds=time.perf_counter() - began + common_seconds,
                )  # fmt: skip
                began, network.spent = time.perf_counter(), 0.0

    return {"loss": losses.mean().item()}, cells()


def growth(
    dense: nn.Module, changed: nn.Module, batches: Sequence[Batch], loss: Loss, *, calibration: Sequence[Tensor] = ()
) -> Estimate:
    """How much larger the mean loss of ``changed`` is than that of ``dense``, paired over samples."""
    inputs = [x for x, _ in batches]
    (before, apart, _), (after, _, _) = (
        Network(model, inputs, calibration, {}).evaluate(batches, loss) for model in (dense, changed)
    )
    return Estimate(*_estimate(after - before, apart))


def _finite(
    conv: Any, sizes: Sequence[Size], moments: Moments | None, holds_mean: bool
) -> Iterator[tuple[Size, Tensor, Tensor | None]]:
    """:func:`approximations`; those of outputs that are not finite are NaN."""
    if moments is None or moments.finite:
        yield from approximations(conv, sizes, moments, holds_mean=holds_mean)
    else:
        yield from ((k, torch.full_like(conv.weight, math.nan, requires_grad=False), None) for k in sizes)


@contextmanager
def _replaced(conv: Any, norm: Any, weight: Tensor, lost: Tensor | None) -> Iterator[None]:
    """With another weight; the mean that is ``lost`` goes where substitution puts it."""
    place, sign = (norm.running_mean, -1) if conv.bias is None and norm is not None else (conv.bias, 1)
    held = None if place is None or lost is None else place.detach().clone()
    dense, conv.weight.data = conv.weight.data, weight
    try:
        if held is not None and lost is not None:
            place.data.copy_(held.double() + sign * lost)
        yield
    finally:
        conv.weight.data = dense
        if held is not None:
            place.data.copy_(held)


def _divergence(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean of KL(first || second) over the rows of logits (N, classes), in nats; NaN where there are none."""
    if not first or len(first) != len(second) or first[0].shape[1] < 2:
        return math.nan
    log_p, log_q = (torch.cat(list(logits)).double().log_softmax(1) for logits in (first, second))
    total = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    return total if math.isfinite(total) else math.nan
