"""From dense weights to basis filters and coefficients: ``[I; A] B`` of rank k in a row order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from basis.layers.coefficients import Coefficients
from basis.layers.moments import Moments, directions


def factorize(
    matrix: Tensor, k: int, *, pivot: bool = True, left: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the best rank-k approximation of ``matrix`` (C_out x F) as ``[I; A] B`` in a row order, in float64.

    Returns B (k x F), A ((C_out - k) x k) and ``p`` (C_out,): row ``p[i]`` of the approximation is row i of [B; A B].
    With ``pivot`` the rows that keep A small come first. With ``left`` (C_out x C_out, orthonormal columns) it is the
    projection on its first k columns. Where the rank of ``matrix`` is below k, the pseudo-inverse gives the rest.
    """
    rows, dtype = matrix.shape[0], matrix.dtype
    identity = torch.arange(rows, device=matrix.device)
    if k >= rows:
        return matrix, matrix.new_empty((0, k)), identity
    if left is None:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        rank = min(k, s.shape[0])
        left, right = u[:, :rank], s[:rank, None] * vh[:rank]
    else:
        rank, left = k, left[:, :k].double()
        right = left.mT @ matrix.double()
    order = _pivots(left) if pivot else identity[:k]
    if len(order) < k:  # fewer singular vectors than basis filters: F < k, the matrix is already exact
        order = torch.cat([order, identity[~torch.isin(identity, order)][: k - rank]])
    rest = identity[~torch.isin(identity, order)]
    coefficients = left[rest] @ torch.linalg.pinv(left[order])
    return (left @ right)[order].to(dtype), coefficients.to(dtype), torch.cat([order, rest])


def _pivots(left: Tensor) -> Tensor:
    """Indices of the rows of ``left`` (C x k, orthonormal columns) that pivoted QR of its transpose picks."""
    import scipy.linalg

    _, pivots = scipy.linalg.qr(left.T.cpu().numpy(), mode="r", pivoting=True)
    return torch.from_numpy(pivots[: left.shape[1]].astype("int64")).to(left.device)


@torch.no_grad()
def principal_directions(
    convs: Sequence[nn.Conv2d], weights: Sequence[Tensor], moments: Sequence[Moments | None]
) -> Tensor:
    """The directions that keep most of the outputs of layers that share A: (mixing groups, width, width).

    ``weights``: of each layer, (mixing groups, width, F); ``moments``: None where the inputs count as white. Raises
    ``ValueError`` for moments of another layer, or of outputs that were not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    for conv, weight, own in zip(convs, weights, moments, strict=True):
        shape = (conv.groups, conv.out_channels // conv.groups)
        if own is None:
            second = weight.double() @ weight.double().mT
        elif tuple(own.mean.shape[:2]) != shape:
            raise ValueError(f"moments are those of outputs (groups, width) = {tuple(own.mean.shape[:2])}, not {shape}")
        elif not own.finite:
            raise ValueError("the outputs on the calibration data are not finite, so they have no principal components")
        else:
            second = own.second(about_mean=conv.bias is not None, groups=len(weight)).to(weight.device)
        trace = second.diagonal(dim1=1, dim2=2).sum()
        total = total.to(second.device) + second / (trace if trace > 0 else 1)
    return directions(total, torch.cat(list(weights), dim=2))


def fit(weight: Tensor, a: Coefficients, *, given: bool, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit ``a``, unless it is ``given`` or cannot be chosen, to a weight (mixing groups, C_out / groups, F).

    A form of A that cannot hold every matrix is fitted to the dense A of the pivoted rows, or to that of the first k
    rows as B where that halves the squared error, as it does for a weight that had this form. ``left``: the directions
    to keep, else those of the SVD. Returns B (mixing groups, columns, F) and ``order`` (C_out,).
    """
    groups, width, _ = weight.shape
    if given or not a.fits:
        order = torch.arange(groups * width, device=weight.device)
        return _least_squares_basis(weight, a, order[:width].expand(groups, width)), order
    if a.free:
        return _fit_from(weight, a, pivot=True, left=left)

    @torch.no_grad()
    def error(pivot: bool) -> Tensor:
        basis, order = _fit_from(weight, a, pivot=pivot, left=left)
        rows = torch.cat([basis, a.blocks().double() @ basis], dim=1).flatten(0, 1)
        return (rows[order] - weight.double().flatten(0, 1)).square().sum()

    rounding = 1e-12 * weight.double().square().sum()
    return _fit_from(weight, a, pivot=bool(error(True) <= 2 * error(False) + rounding), left=left)


@torch.no_grad()
def _fit_from(weight: Tensor, a: Coefficients, *, pivot: bool, left: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`fit` for A that is learned, from one dense factorization."""
    factors = [
        factorize(block.double(), a.columns, pivot=pivot, left=None if left is None else left[i])
        for i, block in enumerate(weight)
    ]
    basis, dense, order = (torch.stack(parts) for parts in zip(*factors, strict=True))
    a.fit(dense, basis)
    if not a.free:
        basis = _least_squares_basis(weight, a, order)
    start = torch.arange(len(weight), device=weight.device)[:, None] * weight.shape[1]
    return basis, (start + torch.argsort(order)).flatten()


@torch.no_grad()
def _least_squares_basis(weight: Tensor, a: Coefficients, order: Tensor) -> Tensor:
    """B nearest to ``weight`` for this A, where row i of [B; A B] is row ``order[i]`` of its group, in float64."""
    blocks = a.blocks().double()
    eye = torch.eye(a.columns, dtype=blocks.dtype, device=blocks.device).expand(a.groups, -1, -1)
    rows = weight.double().gather(1, order[:, :, None].expand(weight.shape))
    return torch.linalg.lstsq(torch.cat([eye, blocks], dim=1), rows).solution
