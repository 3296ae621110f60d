"""Convolutions and pools over pairs of voxels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._wide import wide, wide_matmul
from .activation import activate


def _tap_rows(
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Of each tap the rows of its pairs' inputs and outputs."""
    sizes = tap_offsets.diff().tolist()
    rows_in, rows_out = _rows(in_index, in_order), _rows(out_index, out_order)
    return list(zip(rows_in.split(sizes), rows_out.split(sizes), strict=True))


def _rows(ranks: Tensor, order: Tensor | None) -> Tensor:
    return ranks.long() if order is None else order[ranks.long()].long()


def pointcloud_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
    n_out: int,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """y[j] = act(b + sum of x[i] W[t] over the pairs (i, j) of each tap t), a tap at a time.

    An output has one pair of a tap at most, so the order of the sum is that of the taps.
    """
    y = feats.new_zeros(n_out, weight.shape[2], dtype=wide(feats.dtype))
    taps = _tap_rows(in_index, out_index, tap_offsets, in_order, out_order)
    for (rows_in, rows_out), tap in zip(taps, weight, strict=True):
        product = wide_matmul(_by_group(feats[rows_in], groups), _by_group(tap, groups))
        y.index_add_(0, rows_out, product.transpose(0, 1).flatten(1))
    return activate(y if bias is None else y + bias, activation).to(feats.dtype)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """[groups, N, C / groups] of [N, C]."""
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).transpose(0, 1)


def pointcloud_conv_weight_grad(
    dy: Tensor,
    feats: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
    groups: int = 1,
) -> Tensor:
    """dW[t] = sum of x[i]ᵀ dy[j] over the pairs (i, j) of tap t, each group with its own."""
    taps = []
    for rows_in, rows_out in _tap_rows(in_index, out_index, tap_offsets, in_order, out_order):
        x, g = _by_group(feats[rows_in], groups), _by_group(dy[rows_out], groups)
        taps.append(wide_matmul(x.mT, g).transpose(0, 1).flatten(1).to(feats.dtype))
    return torch.stack(taps)


def pointcloud_sum_pool(
    feats: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
    n_out: int,
    mean: bool,
) -> Tensor:
    """out[j] = Σ feats[i] over the pairs (i, j) of a kernel map, in float64; or their mean.

    In the order of the pairs: each output is a bag of inputs.
    """
    if len(in_index) == 0:
        return feats.new_zeros((n_out, feats.shape[1]))
    rows_out, order = _rows(out_index, out_order).sort(stable=True)
    rows_in = _rows(in_index, in_order)[order]
    bags = torch.searchsorted(rows_out, torch.arange(n_out, device=feats.device))
    how = "mean" if mean else "sum"
    return F.embedding_bag(rows_in, feats.double(), bags, mode=how).to(feats.dtype)


def pointcloud_max_pool(
    feats: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
    n_out: int,
    repeats: bool = False,
) -> tuple[Tensor, Tensor]:
    """out[j] = max feats[i] over the pairs (i, j), 0 of none, and the i it was taken from, or -1.

    Of equal ones that of the first pair; NaN counts as the greatest, and of several the last.
    ``repeats``: whether pairs of a tap may share an output, as those with a sample do.
    """
    best = feats.new_zeros((n_out, feats.shape[1]))
    winner = torch.full_like(best, -1, dtype=torch.int32)
    for i, j in _tap_rows(in_index, out_index, tap_offsets, in_order, out_order):
        if repeats:
            x, row = _best_of_each(feats, i, j, n_out)
            j = torch.arange(n_out, device=j.device)
        else:
            x, row = feats[i], i.int().unsqueeze(1).expand(-1, feats.shape[1])
        so_far, took = best[j], winner[j]
        better = (row >= 0) & ((took < 0) | (x > so_far) | x.isnan())
        best[j] = torch.where(better, x, so_far)
        winner[j] = torch.where(better, row, took)
    return best, winner


def _best_of_each(feats: Tensor, i: Tensor, j: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """Of a tap's pairs that share an output the maximum and its row; where there are none, -1.

    Nothing here depends on values that a GPU would have to be waited for.
    """
    x = feats[i]
    at = j.unsqueeze(1).expand_as(x)
    number = torch.arange(len(j), device=j.device).unsqueeze(1).expand_as(x)
    none = number.new_full((n_out, x.shape[1]), len(j))
    top = x.new_full(none.shape, -torch.inf).scatter_reduce_(0, at, x, "amax")
    equal = torch.where(x == top.gather(0, at), number, len(j))
    first = none.scatter_reduce(0, at, equal, "amin")
    nan = torch.full_like(none, -1).scatter_reduce_(
        0, at, torch.where(x.isnan(), number, -1), "amax"
    )
    taken = torch.where(nan < 0, first, nan)
    x, i = F.pad(x, (0, 0, 0, 1)), F.pad(i.int(), (0, 1), value=-1)
    return x.gather(0, taken), i[taken]


def pointcloud_max_pool_grad(
    dy: Tensor,
    winner: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    tap_offsets: Tensor,
    in_order: Tensor | None,
    out_order: Tensor | None,
    n_out: int,
) -> Tensor:
    """dx[i, c] = Σ dy[j, c] over the pairs (j, i) for which the winner of j is i, in float64."""
    dx = dy.new_zeros((n_out, dy.shape[1]), dtype=torch.float64)
    for j, i in _tap_rows(in_index, out_index, tap_offsets, in_order, out_order):
        dx.index_add_(0, i, torch.where(winner[j] == i.unsqueeze(1), dy[j].double(), 0.0))
    return dx.to(dy.dtype)


def take_winners(x: Tensor, winner: Tensor) -> Tensor:
    """y[j, c] = x[winner[j, c], c], 0 where there is none."""
    if len(x) == 0:
        return x.new_zeros(winner.shape)
    return x.gather(0, winner.clamp(min=0).long()) * (winner >= 0)
