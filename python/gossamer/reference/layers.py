"""Experts, unstructured weights, zero inputs and k-sparse codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activate


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y[t] = act(x[t] W[e]ᵀ + b[e]), the tokens of expert e ending at ``offsets[e]``."""
    ends = offsets.tolist()
    groups = x.split([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
    parts = [
        F.linear(group, weights[e], None if bias is None else bias[e])
        for e, group in enumerate(groups)
    ]
    return activate(torch.cat(parts), activation)


def csr_linear(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y[m, i] = act(sum_j values[j] x[m, col[j]] + b[i]), crow[i] <= j < crow[i + 1]."""
    rows = torch.arange(len(crow_indices) - 1, device=x.device)
    rows = rows.repeat_interleave(crow_indices.long().diff())
    terms = x[:, col_indices.long()] * values
    y = x.new_zeros(len(x), len(crow_indices) - 1).index_add(1, rows, terms)
    return activate(y if bias is None else y + bias, activation)


def actsparse_linear(
    x: Tensor,
    weight_kn: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """y[m] = act(sum of x[m, k] W[k] over the k with not |x[m, k]| <= threshold, + b)."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_zeros(rows.shape[0], weight_kn.shape[1])
    for m, row in enumerate(rows):
        active = ~(row.abs() <= threshold)
        y[m] = row[active] @ weight_kn[active]
    y = y.view(*x.shape[:-1], weight_kn.shape[1])
    return activate(y if bias is None else y + bias, activation)


def actsparse_outputs(
    x: Tensor,
    weight: Tensor,
    wanted: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y[m, n] = act(x[m] W[n] + b[n]) where ``wanted`` [..., N] is True, and 0 elsewhere."""
    y = activate(F.linear(x, weight, bias), activation)
    return torch.where(wanted, y, torch.zeros_like(y))


def topk_decode(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y[t] = sum_j values[t, j] W[indices[t, j]] + b."""
    y = torch.einsum("tj,tjd->td", values, weight[indices.long()])
    return y if bias is None else y + bias


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of x Wᵀ + b, the lower index first among equal ones."""
    dense = F.linear(x, weight, bias)
    values, indices = dense.sort(dim=-1, descending=True, stable=True)
    return (F.relu(values) if relu else values)[:, :k], indices[:, :k]
