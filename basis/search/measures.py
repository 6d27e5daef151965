"""The measures of sensitivity that need no training: from the weights alone to one evaluation per candidate.

Each takes a network in eval mode that nothing else uses and the candidates (layer -> numbers of basis channels k, or
texts of structured layers), and returns what it found about the dense network (its ``loss``) and the cells.
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
from basis.modules import hooked, tracking_norms, training_norms
from basis.search.table import Cell
from basis.statistics import Estimate, mean_estimate
from basis.substitution import Size

Candidates = Mapping[str, Sequence[Size]]
Measured = tuple[dict[str, float], Iterator[Cell]]
Fitted = tuple[Mapping[str, Moments], Mapping[str, str]]  # moments of outputs, and the norms that take a lost mean

PART = 2**21  # numbers of an input that a backward pass takes at once: 13 images of 224 x 224


def spectrum(model: nn.Module, candidates: Candidates) -> Measured:
    """Relative Frobenius error ||W - W_k|| / ||W|| of the best approximation of rank k (Eckart and Young), in float64.

    Of a structured layer the same error of its weight. A weight that is all zero has error 0.
    """

    def cells() -> Iterator[Cell]:
        for name, sizes in candidates.items():
            began = time.perf_counter()
            conv: Any = model.get_submodule(name)
            blocks = _blocks(conv)
            finite = bool(blocks.isfinite().all())
            energies = torch.linalg.svdvals(blocks).square() if finite else blocks.new_full((1, 1), math.nan)
            for size in sizes:
                if isinstance(size, str):
                    apart = structured_weight(size, conv).double() - conv.weight.double()
                    value = _share(apart.square().sum(), energies.sum())
                else:
                    value = _share(energies[:, size // len(blocks) :].sum(), energies.sum())
                yield Cell(layer=name, basis_channels=size, value=value, seconds=time.perf_counter() - began)
                began = time.perf_counter()

    return {}, cells()


@torch.no_grad()
def activation(model: nn.Module, candidates: Candidates, batches: Sequence[Batch]) -> Measured:
    """Relative error of the layer's output, projected on its k principal components, in one forward pass.

    sqrt(tail / total) of the eigenvalues of the centred covariance of the output channels, over all samples and
    pixels (X. Zhang et al. 2016, arXiv 1411.4229, section 2.1). Of a structured layer: the square root of the variance
    of what it does to the output / the variance of the output. An output that never varies has error 0.
    """
    began = time.perf_counter()
    moments: dict[tuple[str, Size], Moments] = {
        (name, k): Moments() for name, ks in candidates.items() for k in (0, *ks)
    }

    def watch(name: str) -> Callable:
        conv: Any = model.get_submodule(name)
        changes = {k: structured_weight(k, conv) - conv.weight for k in candidates[name] if isinstance(k, str)}

        def hook(module: Any, args: tuple, y: Tensor) -> None:
            moments[name, 0].add_maps(y, module.groups)
            for text, change in changes.items():
                moments[name, text].add_maps(module._conv_forward(args[0], change, None), module.out_channels)

        return hook

    with hooked(model, {name: watch(name) for name in candidates}):
        for x, _ in batches:
            model(x.clone())
    values: dict[tuple[str, Size], float] = {}
    for name, sizes in candidates.items():
        own = moments[name, 0]
        if not own.finite or not own.n:  # not called, or not finite
            values |= {(name, size): math.nan if own.n else 0.0 for size in sizes}
            continue
        energies = torch.linalg.eigvalsh(own.scatter).clamp_min(0).flip(-1)
        for size in sizes:
            tail = moments[name, size].scatter if isinstance(size, str) else energies[:, size // len(energies) :]
            total = own.scatter.diagonal(dim1=1, dim2=2) if isinstance(size, str) else energies
            values[name, size] = _share(tail.sum(), total.sum())
    return {}, _cells(values, began, forward=sum(len(x) for x, _ in batches))


def gradients(
    model: nn.Module, candidates: Mapping[str, Sequence[int]], batches: Sequence[Batch], loss: Loss, *, squared: bool,
    fit: Sequence[Tensor] | None = None,
) -> Measured:  # fmt: skip
    """Taylor and Fisher scores of every k of every layer, from one forward and one backward pass.

    With W = U S V^T, y the layer's output without bias, p = U^T y and g = U^T dL/dy, truncation to rank k changes the
    loss of sample n to first order by delta_n = - sum_{i>k} sum_pixels p_i g_i. The score is its mean (Molchanov et
    al. 2019, arXiv 1906.10771, with components in place of filters) or, ``squared``, half the mean of delta_n^2 (the
    empirical Fisher matrix; Theis et al. 2018, arXiv 1801.05787). With ``fit``, inputs, the components are those of the
    outputs on them (:mod:`basis.layers.moments`). A layer that runs without gradients scores NaN.

    Raises ``ValueError`` where a layer sees other images than the batch's, or the model cannot be differentiated.
    """
    began, losses, apart = time.perf_counter(), [], True
    model.requires_grad_(False)  # nobody needs gradients of parameters here
    fitted = _fitted(model, list(candidates), fit)
    products: dict[str, list[Tensor]] = {name: [] for name in candidates}  # p_i g_i of each batch, (N, components)
    hooks = {name: _catching(model, name, fitted, held) for name, held in products.items()}
    with hooked(model, hooks), torch.enable_grad():
        for x, y in _parts(batches, loss):
            for name, held in products.items():
                conv: Any = model.get_submodule(name)
                held.append(conv.weight.new_zeros((len(y), conv.out_channels // conv.groups), dtype=torch.float64))
            values, apart = sample_losses(loss, model(x.clone()), y)
            try:
                if values.requires_grad:
                    values.sum().backward()
            except RuntimeError as error:
                raise ValueError(f"the model cannot be differentiated ({error}); use oneshot") from error
            losses.append(values.detach().double())
    scores: dict[tuple[str, Size], Estimate] = {}
    for name, ks in candidates.items():
        product, conv = torch.cat(products[name]), model.get_submodule(name)
        for k in ks:
            delta = -product[:, k // conv.groups :].sum(1)
            scores[name, k] = _estimate(delta.square() / 2 if squared else delta, apart)
    images = sum(len(y) for _, y in batches)
    passes = {"forward": images + sum(map(len, fit or ())), "backward": images}
    return {"loss": torch.cat(losses).mean().item()}, _cells(scores, began, **passes)


def _catching(model: nn.Module, name: str, fitted: Fitted, products: list[Tensor]) -> Callable:
    """A forward hook that adds a layer's p_i g_i to the last of ``products`` in the backward pass."""
    u, mean = _components(model, name, fitted)
    groups, width, _ = u.shape
    filters, bias = u.mT.reshape(groups * width, width, 1, 1), model.get_submodule(name).bias
    offset = u.new_zeros(groups * width) if mean is None else mean.flatten()
    offset = (offset if bias is None else offset + bias.detach())[:, None, None]  # type: ignore[operator]

    def project(y: Tensor) -> Tensor:
        y = y if y.dtype == torch.float64 else y.float()
        return F.conv2d(y, filters.to(y.dtype), groups=groups)

    def hook(module: Any, args: tuple, y: Tensor) -> Tensor | None:
        product = products[-1]
        if y.dim() != 4 or len(y) != len(product):
            raise ValueError(f"{name} sees {len(y)} images where the batch holds {len(product)}; use oneshot here")
        if not torch.is_grad_enabled():
            product.fill_(math.nan)
            return None
        # Where nothing before needs a gradient, it starts here (a clone, which may be changed in place).
        fresh = None if y.requires_grad else y.detach().requires_grad_().clone()
        y = y if fresh is None else fresh
        p = project(y.detach() - offset.to(y.dtype))

        def receive(grad: Tensor) -> None:
            product.add_((p * project(grad)).sum((2, 3)).view(-1, groups, width).sum(1))

        y.register_hook(receive)
        return fresh

    return hook


def _parts(batches: Sequence[Batch], loss: Loss) -> Iterator[Batch]:
    """The batches in parts of at most ``PART`` numbers, where the loss is cross-entropy, which takes samples alone."""
    for x, y in batches:
        size = max(1, PART // max(1, x[:1].numel())) if loss is cross_entropy else len(x)
        yield from zip(x.split(size), y.split(size), strict=True)


def oneshot(
    model: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    loss: Loss,
    *,
    calibration: Sequence[Tensor] = (),
    fit: Sequence[Tensor] | None = None,
) -> Measured:
    """Replace the weight of one layer by its approximation of rank k, or by a structured layer's, and evaluate.

    The value is the mean loss minus the dense network's, its interval over samples (paired); ``kl`` the mean
    divergence of the predictions, where the loss is cross-entropy of logits (N, classes).

    Args:
        calibration: inputs on which the statistics of batch normalisation are measured anew before each evaluation,
            also of the dense network (EagleEye: Li et al. 2020, arXiv 2007.02491, section 3.2).
        fit: inputs on whose outputs the approximations of rank k are fitted, see :func:`approximations`.
    """
    began = time.perf_counter()
    fitted = _fitted(model, list(candidates), fit)
    losses, apart, dense = _evaluate(model, batches, loss, calibration)
    images, count = len(losses) + sum(map(len, calibration)), sum(map(len, candidates.values()))
    forward = images + (images + sum(map(len, fit or ()))) / count
    common = (time.perf_counter() - began) / count

    def cells() -> Iterator[Cell]:
        for name, sizes in candidates.items():
            began = time.perf_counter()
            for k, weight, lost in approximations(model, name, sizes, fitted):
                with _replaced(model, name, weight, lost, fitted[1].get(name)):
                    new, _, logits = _evaluate(model, batches, loss, calibration)
                found = _estimate(new - losses, apart)
                kl = _divergence(dense, logits) if loss is cross_entropy else math.nan
                seconds = time.perf_counter() - began + common
                yield Cell(layer=name, basis_channels=k, **vars(found), kl=kl, forward=forward, seconds=seconds)
                began = time.perf_counter()

    return {"loss": losses.mean().item()}, cells()


def growth(
    dense: nn.Module, changed: nn.Module, batches: Sequence[Batch], loss: Loss, *, calibration: Sequence[Tensor] = ()
) -> Estimate:
    """How much larger the mean loss of ``changed`` is than that of ``dense``, paired over samples."""
    before, apart, _ = _evaluate(dense, batches, loss, calibration)
    after, _, _ = _evaluate(changed, batches, loss, calibration)
    return _estimate(after - before, apart)


@torch.no_grad()
def _evaluate(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, calibration: Sequence[Tensor]
) -> tuple[Tensor, bool, list[Tensor]]:
    """Losses of all samples (float64, on the CPU), whether they are told apart, and the logits (N, classes), if any.

    After the statistics of batch normalisation have been measured anew on the ``calibration`` inputs, if any.
    """
    with training_norms(tracking_norms(model) if len(calibration) else [], afresh=True):
        for x in calibration:
            model(x.clone())
    losses, logits, apart = [], [], True
    for x, y in batches:
        output = model(x.clone())
        values, apart = sample_losses(loss, output, y)
        losses.append(values.double())
        if isinstance(output, Tensor) and output.dim() == 2:
            logits.append(output)
    return torch.cat(losses).cpu(), apart, logits


def _fitted(model: nn.Module, names: Sequence[str], fit: Sequence[Tensor] | None) -> Fitted:
    if fit is None:
        return {}, {}
    return output_moments(model, untied(model, names), iter(fit)), taking_means(model)


def _components(model: nn.Module, name: str, fitted: Fitted) -> tuple[Tensor, Tensor | None]:
    """The components of a layer's outputs, (g, width, width), and their mean (g, width, 1) less the bias.

    The mean is None where nothing is fitted to outputs, or nothing would hold it. Outputs that are not finite give NaN.
    """
    conv: Any = model.get_submodule(name)
    blocks, own = _blocks(conv), fitted[0].get(name)
    if own is None or not own.n:
        return directions(blocks @ blocks.mT, blocks), None
    if not own.finite:
        return torch.full_like(own.scatter, math.nan), None
    holds = conv.bias is not None or name in fitted[1]
    bias = 0 if conv.bias is None else conv.bias.detach().double().view(own.mean.shape)
    return directions(own.second(about_mean=holds), blocks), own.mean - bias if holds else None


def approximations(
    model: nn.Module, name: str, sizes: Sequence[Size], fitted: Fitted = ({}, {})
) -> Iterator[tuple[Size, Tensor, Tensor | None]]:
    """Each size with its weight, in the form of that of the layer, and the mean (C_out,) that the outputs lose, if any.

    Of k it is the best approximation of rank k, or the one :meth:`basis.BasisConv2d.from_conv` makes of the moments of
    the outputs; of a text it is the weight of the structured layer.
    """
    conv: Any = model.get_submodule(name)
    blocks, (u, mean) = _blocks(conv), _components(model, name, fitted)
    for size in sizes:
        weight, lost = torch.empty_like(conv.weight, requires_grad=False), None
        if isinstance(size, str):
            weight.copy_(structured_weight(size, conv))
        else:
            kept = u[..., : size // len(blocks)]
            weight.copy_((kept @ (kept.mT @ blocks)).reshape(weight.shape))
            lost = None if mean is None else lost_mean(kept, mean).flatten()
        yield size, weight, lost


@contextmanager
def _replaced(model: nn.Module, name: str, weight: Tensor, lost: Tensor | None, norm: str | None) -> Iterator[None]:
    """With another weight; the mean that is ``lost`` goes where substitution puts it, into the bias or ``norm``."""
    conv: Any = model.get_submodule(name)
    place: Any = conv.bias if norm is None else model.get_submodule(norm).running_mean
    held, dense = None if lost is None else place.detach().clone(), conv.weight.data
    conv.weight.data = weight
    try:
        if held is not None and lost is not None:
            place.data.copy_(held.double() + (lost if norm is None else -lost))
        yield
    finally:
        conv.weight.data = dense
        if held is not None:
            place.data.copy_(held)


def structured_weight(text: str, conv: Any) -> Tensor:
    """The weight of the structured layer nearest to ``conv``; NaN where its own is not finite, which nothing fits."""
    if not conv.weight.isfinite().all():
        return torch.full_like(conv.weight, math.nan)
    torch.manual_seed(0)  # fitting may begin at random: the same for every order of the candidates
    layer: Any = Structure.parse(text).make([conv], fitted=True)[0]
    return layer.weight.detach()


def _blocks(conv: Any) -> Tensor:
    """The weight as one matrix for each group, (g, C_out/g, F), float64."""
    return conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1)


def _share(part: Tensor, total: Tensor) -> float:
    """sqrt(part / total), 0 for 0 / 0."""
    return math.sqrt(part.item() / total.item()) if total.item() != 0 else 0.0


def _cells(values: Mapping[tuple[str, Size], Any], began: float, **passes: float) -> Iterator[Cell]:
    """Cells of values or estimates that were all found together, which share passes and seconds evenly."""
    costs: Any = {key: cost / len(values) for key, cost in {**passes, "seconds": time.perf_counter() - began}.items()}
    for (name, k), value in values.items():
        found: dict[str, Any] = vars(value) if isinstance(value, Estimate) else {"value": value}
        yield Cell(layer=name, basis_channels=k, **found, **costs)


def _estimate(values: Tensor, apart: bool) -> Estimate:
    """The mean over samples with its interval; none where the loss does not tell samples apart, NaN if not finite."""
    found = mean_estimate(values.tolist())
    if not apart or not math.isfinite(found.value):
        return Estimate(found.value if math.isfinite(found.value) else math.nan, math.nan, math.nan, 0)
    return found


def _divergence(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean of KL(first || second) over the rows of logits (N, classes), in nats; NaN where there are none."""
    if not first or len(first) != len(second) or first[0].shape[1] < 2:
        return math.nan
    log_p, log_q = (torch.cat(list(logits)).double().log_softmax(1) for logits in (first, second))
    total = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    return total if math.isfinite(total) else math.nan
