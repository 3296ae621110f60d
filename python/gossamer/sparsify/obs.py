"""Second-order pruning with an update of what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..prune import largest
from .layers import Layer
from .patterns import NM, Unstructured
from .scores import damped_inverse


def sparsegpt_weight(
    weight: Tensor,
    hessian: Tensor,
    layer: Layer,
    sparsity: float,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune column by column; each error is made up for by the columns to the right of it.

    With C the upper Cholesky factor of the inverse of H = XᵀX (damped), column j's entries are
    worth w_j^2 / C_jj^2. Where they are dropped, e = w_j / C_jj, and the columns k > j become
    w_k - e C_jk. Unstructured and N:M masks are chosen as the columns come: for ``block`` columns
    at a time, or for each M. Masks of other patterns are chosen once, by all columns.

    Parameters
    ----------
    weight : Tensor
        [N, K] or a convolution's.
    hessian : Tensor
        [K, K], XᵀX of the inputs.
    layer : Layer
        Its pattern, which says what is chosen among what.
    sparsity : float
    damping : float
        Added to the diagonal of H, as a share of its mean.
    block : int
        Columns whose updates are applied to the rest together.

    Returns
    -------
    weight : Tensor
        In the shape and dtype of the one given.
    mask : Tensor
        Bool.

    Raises
    ------
    ValueError
        If ``block`` is below 1, an N:M pattern meets a convolution, the pattern cannot have the
        sparsity, or the products are not finite.

    References
    ----------
    Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    ICML 2023.
    """
    pattern = layer.pattern
    if block < 1:
        raise ValueError(f"sparsegpt: blocks of {block} columns, expected at least 1")
    if isinstance(pattern, NM) and weight.dim() != 2:
        raise ValueError(
            f"sparsegpt: {layer.name}: {pattern} along channels is not in column order"
        )
    if isinstance(pattern, NM):
        block = max(pattern.m, block // pattern.m * pattern.m)
    rest = weight.detach().flatten(1).double().clone()
    dead = hessian.diagonal() == 0
    rest[:, dead] = 0
    inverse = damped_inverse(hessian, damping)
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = factor.diagonal()
    whole, keep = None, layer.keep(sparsity)
    if not isinstance(pattern, (NM, Unstructured)):
        worth = (rest / scale).square().view(weight.shape)
        whole = pattern.select(layer.units(worth, "sum"), keep)
        whole = pattern.cover(whole, layer.shape, layer.groups).flatten(1)
    result, kept = torch.zeros_like(rest), torch.ones_like(rest, dtype=torch.bool)
    columns = rest.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        part, errors = rest[:, begin:end].clone(), torch.zeros_like(rest[:, begin:end])
        local = factor[begin:end, begin:end]
        mask = torch.ones_like(part, dtype=torch.bool) if whole is None else whole[:, begin:end]
        if isinstance(pattern, Unstructured):
            here = keep * end // columns - keep * begin // columns
            worth = (part / scale[begin:end]).square()
            mask = largest(worth.flatten(), here).view_as(mask)
        for j in range(end - begin):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, min(j + pattern.m, end - begin))
                worth = (part[:, group] / scale[begin:end][group]).square()
                mask[:, group] = largest(worth, min(pattern.n, worth.shape[1]))
            column = part[:, j]
            value = column * mask[:, j]
            error = (column - value) / local[j, j]
            part[:, j:] -= error[:, None] * local[j, j:]
            part[:, j], errors[:, j] = value, error
        result[:, begin:end], kept[:, begin:end] = part, mask
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return result.view(weight.shape).to(weight.dtype), kept.view(weight.shape)
