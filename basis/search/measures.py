"""The measures of sensitivity that need no training: from the weights alone to one evaluation per candidate.

Each takes a network in eval mode that nothing else uses and the candidates (layer -> numbers of basis channels k, or
texts of structured layers), and returns what it found about the dense network (its ``loss``) and the cells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basis.batches import Batch, Loss, losses_of
from basis.inputs import Inputs, picked, run, samples_in, tensors_in
from basis.layers.moments import Moments, directions, lost_mean, output_moments, taking_means, untied
from basis.layers.structured import Structure
from basis.modules import hooked, tracking_norms, training_norms
from basis.search.table import Cell
from basis.statistics import Estimate, mean_estimate
from basis.substitution import Size
from basis.text import first_line

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
            began, conv = time.perf_counter(), _conv(model, name)
            blocks = _blocks(conv)
            energies = torch.linalg.svdvals(blocks).square()
            for size in sizes:
                if isinstance(size, str):
                    lost = (structured_weight(size, conv).double() - conv.weight.double()).square()
                else:
                    lost = energies[:, size // len(blocks) :]
                value = _relative(lost, energies)
                yield Cell(layer=name, basis_channels=size, value=value, seconds=time.perf_counter() - began)
                began = time.perf_counter()

    return {}, cells()


def activation(model: nn.Module, candidates: Mapping[str, Sequence[int]], batches: Sequence[Batch]) -> Measured:
    """Relative error of the layer's output, projected on its k principal components, in one forward pass.

    sqrt(tail / total) of the eigenvalues of the centred covariance of the output channels, over all samples and
    pixels (X. Zhang et al. 2016, arXiv 1505.06798, section 2.1). An output that never varies has error 0.
    """
    began = time.perf_counter()
    values: dict[tuple[str, Size], Any] = {}
    moments = output_moments(model, list(candidates), (x for x, _ in batches))
    for name, ks in candidates.items():
        own = moments[name]
        if own.n and own.finite:
            energies = torch.linalg.eigvalsh(own.scatter).clamp_min(0).flip(-1)
            values |= {(name, k): _relative(energies[:, k // len(energies) :], energies) for k in ks}
        else:  # not finite, or not called
            values |= dict.fromkeys(((name, k) for k in ks), math.nan if own.n else 0.0)
    return {}, _cells(values, began, forward=sum(samples_in(x) for x, _ in batches))


def gradients(
    model: nn.Module, candidates: Mapping[str, Sequence[int]], batches: Sequence[Batch], *, squared: bool,
    fit: Sequence[Inputs] = (), loss: Loss | None = None,
) -> Measured:  # fmt: skip
    """Taylor and Fisher scores of every k of every layer, from one forward and one backward pass.

    With W = U S V^T, y the layer's output without bias, p = U^T y and g = U^T dL/dy, truncation to rank k changes the
    loss of sample n to first order by delta_n = - sum_{i>k} sum_pixels p_i g_i. The score is its mean (Molchanov et
    al. 2019, arXiv 1906.10771, with components in place of filters) or, ``squared``, half the mean of delta_n^2 (the
    empirical Fisher matrix; Theis et al. 2018, arXiv 1801.05787). With ``fit``, inputs, the components are those of the
    outputs on them (:mod:`basis.layers.moments`). A layer that runs without gradients scores NaN, and so do all where
    the loss has none.

    Raises ``ValueError`` where a layer sees other images than the batch's, or the model cannot be differentiated.
    """
    began, losses = time.perf_counter(), []
    model.requires_grad_(False)  # nobody needs gradients of parameters here
    fitted = _fitted(model, candidates, fit)
    products: dict[str, list[Tensor]] = {name: [] for name in candidates}  # p_i g_i of each batch, (N, components)
    hooks = {name: _catching(model, name, fitted, held) for name, held in products.items()}
    with hooked(model, hooks), torch.enable_grad():
        for x, y in _parts(batches):
            for name, held in products.items():
                conv = _conv(model, name)
                width = conv.out_channels // conv.groups
                held.append(conv.weight.new_zeros((samples_in(x), width), dtype=torch.float64))
            values = losses_of(loss, run(model, x), y, samples=samples_in(x))
            try:
                if values.requires_grad:
                    values.sum().backward()
            except RuntimeError as error:
                raise ValueError(f"the model cannot be differentiated ({first_line(error)}); use oneshot") from error
            for held in () if values.requires_grad else products.values():
                held[-1].fill_(math.nan)
            losses.append(values.detach().double())
    scores: dict[tuple[str, Size], Any] = {}
    for name, ks in candidates.items():
        product, groups = torch.cat(products[name]), _conv(model, name).groups
        for k in ks:
            delta = -product[:, k // groups :].sum(1)
            scores[name, k] = _estimate(delta.square() / 2 if squared else delta)
    images = sum(samples_in(x) for x, _ in batches)
    cells = _cells(scores, began, forward=images + sum(map(samples_in, fit)), backward=images)
    return {"loss": torch.cat(losses).mean().item()}, cells


def _catching(model: nn.Module, name: str, fitted: Fitted, products: list[Tensor]) -> Callable:
    """A forward hook that adds a layer's p_i g_i to the last of ``products`` in the backward pass."""
    u, mean = _components(model, name, fitted)
    groups, width, _ = u.shape
    filters, bias = u.mT.reshape(groups * width, width, 1, 1), _conv(model, name).bias
    offset = u.new_zeros(groups * width) if mean is None else mean.flatten()
    offset = (offset if bias is None else offset + bias.detach())[:, None, None]

    def project(y: Tensor) -> Tensor:
        y = y if y.dtype == torch.float64 else y.float()
        return F.conv2d(y, filters.to(y.dtype), groups=groups)

    def hook(module: Any, args: tuple, y: Tensor) -> Tensor | None:
        product = products[-1]
        if y.dim() != 4 or len(y) != len(product):
            raise ValueError(f"{name} sees {len(y)} images where the batch holds {len(product)}; use oneshot here")
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
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


def _parts(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches in parts of at most ``PART`` numbers; whole where targets are more than one entry per sample."""
    for x, y in batches:
        n, numbers = samples_in(x), sum(tensor.numel() for tensor in tensors_in(x))
        size = max(1, PART * n // max(1, numbers)) if isinstance(y, Tensor) and y.dim() and len(y) == n else n
        for i in range(0, n, size):
            yield picked((x, y), slice(i, i + size))  # type: ignore[misc]


def oneshot(
    model: nn.Module, candidates: Candidates, batches: Sequence[Batch], *, calibration: Sequence[Inputs] = (),
    fit: Sequence[Inputs] = (), loss: Loss | None = None,
) -> Measured:  # fmt: skip
    """Replace the weight of one layer by its approximation of rank k, or by a structured layer's, and evaluate.

    The value is the mean loss minus the dense network's, its interval over samples (paired); ``kl`` the mean
    divergence of the predictions, where they are logits (N, classes) and the loss is cross-entropy.

    Args:
        calibration: inputs on which the statistics of batch normalisation are measured anew before each evaluation,
            also of the dense network (EagleEye: Li et al. 2020, arXiv 2007.02491, section 3.2).
        fit: inputs; the layers of rank k are those nearest to the outputs on them.
        loss: of one's own, from outputs and targets to (N,); cross-entropy unless given.
    """
    began = time.perf_counter()
    fitted = _fitted(model, candidates, fit)
    losses, dense = _evaluate(model, batches, calibration, loss)
    images, count = len(losses) + sum(map(samples_in, calibration)), sum(map(len, candidates.values()))
    forward = images + (images + sum(map(samples_in, fit))) / count
    common = (time.perf_counter() - began) / count

    def cells() -> Iterator[Cell]:
        for name, sizes in candidates.items():
            began = time.perf_counter()
            for k in _replacing(model, name, sizes, fitted):
                new, logits = _evaluate(model, batches, calibration, loss)
                found, kl = _estimate(new - losses), _divergence(dense, logits)
                seconds = time.perf_counter() - began + common
                yield Cell(layer=name, basis_channels=k, **vars(found), kl=kl, forward=forward, seconds=seconds)
                began = time.perf_counter()

    return {"loss": losses.mean().item()}, cells()


def growth(
    dense: nn.Module, changed: nn.Module, batches: Sequence[Batch], *, calibration: Sequence[Inputs] = (),
    loss: Loss | None = None,
) -> Estimate:  # fmt: skip
    """How much larger the mean loss of ``changed`` is than that of ``dense``, paired over samples."""
    (before, _), (after, _) = (_evaluate(one, batches, calibration, loss) for one in (dense, changed))
    return _estimate(after - before)


@torch.no_grad()
def _evaluate(
    model: nn.Module, batches: Sequence[Batch], calibration: Sequence[Inputs], loss: Loss | None
) -> tuple[Tensor, list[Tensor]]:
    """Losses of all samples (float64, on the CPU), and the logits, where they are (N, classes)."""
    with training_norms(tracking_norms(model) if len(calibration) else []):
        for x in calibration:
            run(model, x)
    losses, logits = [], []
    for x, y in batches:
        output = run(model, x)
        losses.append(losses_of(loss, output, y, samples=samples_in(x)).double())
        if loss is None and output.dim() == 2:
            logits.append(output)
    return torch.cat(losses).cpu(), logits


def _fitted(model: nn.Module, candidates: Candidates, fit: Sequence[Inputs]) -> Fitted:
    if not len(fit):
        return {}, {}
    return output_moments(model, untied(model, candidates), iter(fit)), taking_means(model, fit[0])


def _components(model: nn.Module, name: str, fitted: Fitted) -> tuple[Tensor, Tensor | None]:
    """The components of a layer's outputs, (g, width, width), and their mean (g, width, 1) less the bias.

    The mean is None where nothing is fitted to outputs, or nothing would hold it.
    """
    conv, own = _conv(model, name), fitted[0].get(name)
    blocks = _blocks(conv)
    if own is None or not own.n:
        return directions(blocks @ blocks.mT, blocks), None
    if not own.finite:
        return torch.full_like(own.scatter, math.nan), None
    holds = conv.bias is not None or name in fitted[1]
    bias = 0 if conv.bias is None else conv.bias.detach().double().view(own.mean.shape)
    return directions(own.second(about_mean=holds), blocks), own.mean - bias if holds else None


def _replacing(model: nn.Module, name: str, sizes: Sequence[Size], fitted: Fitted) -> Iterator[Size]:
    """Each size, while the layer has the weight of what it would be replaced by.

    As in substitution, the mean that a fit to the outputs loses goes into the bias, or the norm behind.
    """
    conv, (u, mean) = _conv(model, name), _components(model, name, fitted)
    blocks, dense, norm = _blocks(conv), conv.weight.data, fitted[1].get(name)
    place: Any = conv.bias if norm is None else model.get_submodule(norm).running_mean
    held = None if mean is None else place.detach().clone()
    for size in sizes:
        weight = torch.empty_like(dense)
        if isinstance(size, str):
            weight.copy_(structured_weight(size, conv))
        else:
            kept = u[..., : size // len(blocks)]
            weight.copy_((kept @ (kept.mT @ blocks)).reshape(weight.shape))
            if mean is not None:
                lost = lost_mean(kept, mean).flatten()
                place.data.copy_(held.double() + (lost if norm is None else -lost))  # type: ignore[union-attr]
        try:
            conv.weight.data = weight
            yield size
        finally:
            conv.weight.data = dense
            if held is not None:
                place.data.copy_(held)


def structured_weight(text: str, conv: nn.Conv2d) -> Tensor:
    """The weight of the structured layer nearest to ``conv``."""
    torch.manual_seed(0)  # fitting may begin at random: the same for every order of the candidates
    layer: Any = Structure.parse(text).make([conv], fitted=True)[0]
    return layer.weight.detach()


@torch.no_grad()
def singular_energies(weight: Tensor) -> Tensor:
    """Squared singular values of a weight as a matrix of C_out rows, the largest first, in float64.

    Of the smaller Gram matrix: a hundred times as fast as singular values, and equal to 1e-12 of the largest.
    """
    rows = weight.detach().double().flatten(1)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)


def _conv(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _blocks(conv: Any) -> Tensor:
    """The weight as one matrix for each group, (g, C_out/g, F), float64."""
    return conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1)


def _relative(part: Tensor, total: Tensor) -> float:
    """sqrt(sum of part / sum of total), 0 for 0 / 0."""
    whole = total.sum().item()
    return math.sqrt(part.sum().item() / whole) if whole != 0 else 0.0


def _cells(values: Mapping[tuple[str, Size], Any], began: float, **passes: float) -> Iterator[Cell]:
    """Cells of values or estimates that were all found together, which share passes and seconds evenly."""
    passes["seconds"] = time.perf_counter() - began
    costs: Any = {key: cost / len(values) for key, cost in passes.items()}
    for (name, k), value in values.items():
        found: dict[str, Any] = vars(value) if isinstance(value, Estimate) else {"value": value}
        yield Cell(layer=name, basis_channels=k, **found, **costs)


def _estimate(values: Tensor) -> Estimate:
    """The mean over samples with its interval; NaN if it is not finite."""
    found = mean_estimate(values.tolist())
    return found if math.isfinite(found.value) else Estimate(math.nan, math.nan, math.nan, 0)


def _divergence(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean of KL(first || second) over the rows of logits (N, classes), in nats; NaN where there are none."""
    if not first or len(first) != len(second) or first[0].shape[1] < 2:
        return math.nan
    log_p, log_q = (torch.cat(list(logits)).double().log_softmax(1) for logits in (first, second))
    total = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
    return total if math.isfinite(total) else math.nan
