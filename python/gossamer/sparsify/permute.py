"""A better order of the inputs for N:M: large weights are kept apart from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import NM


def channel_permutation(weight: Tensor, pattern: NM | None = None, rounds: int = 100) -> Tensor:
    """An order of the inputs under which N:M keeps more magnitude.

    Greedy: from the order that deals inputs out by their norm, the swap of two inputs between two
    groups that gains most is done, until none gains or after so many.

    Parameters
    ----------
    weight : Tensor
        [N, K]; K a multiple of M.
    pattern : NM
        2:4 by default.
    rounds : int
        Swaps of inputs at most.

    Returns
    -------
    Tensor
        int64 [K]: ``weight[:, order]`` is to be pruned. The layer before it puts out its channels
        in that order (its rows and bias by ``order``), or x is indexed by it.

    Raises
    ------
    ValueError
        If the weight is no matrix, or K no multiple of M.

    References
    ----------
    Pool, Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, whose search this is a short
    form of.
    """
    pattern = pattern or NM(2, 4)
    n, m = pattern.n, pattern.m
    if weight.dim() != 2 or weight.shape[1] % m != 0:
        raise ValueError(
            f"channel_permutation: a weight of shape {list(weight.shape)}, expected [N, K], K a "
            f"multiple of {m}"
        )
    magnitude = weight.detach().abs().float()
    columns = weight.shape[1]
    groups = columns // m
    identity = torch.arange(columns, device=weight.device)
    dealt = magnitude.norm(dim=0).argsort(descending=True, stable=True).view(m, groups).t()
    order = max(identity, dealt.flatten(), key=lambda o: float(_kept(magnitude[:, o], n, m).sum()))
    order = order.clone()
    for _ in range(rounds if groups > 1 else 0):
        now = _kept(magnitude[:, order], n, m)
        gain, swap = _best_swap(magnitude, order.view(groups, m), now, n)
        if gain <= 1e-6 * float(now.sum()):
            break
        (a, b) = swap
        order[[a, b]] = order[[b, a]]
    return order


def _kept(magnitude: Tensor, n: int, m: int) -> Tensor:
    """What each group keeps: [groups]."""
    return magnitude.unflatten(1, (-1, m)).topk(n, -1).values.sum((0, 2))


def _best_swap(
    magnitude: Tensor, order: Tensor, now: Tensor, n: int
) -> tuple[float, tuple[int, int]]:
    """The swap of two inputs that gains most, with the group that keeps the least by its size."""
    groups, m = order.shape
    total = magnitude[:, order.flatten()].sum(0).view(groups, m).sum(1)
    worst = int((total - now).argmax())
    best, swap = 0.0, (0, 0)
    mine = order[worst]
    for i in range(m):
        without = mine[[k for k in range(m) if k != i]]
        others = order.flatten()
        # What the worst group would keep with each other input in place of its own i.
        fixed = magnitude[:, without]
        candidate = magnitude[:, others]
        stacked = torch.cat([fixed[:, None].expand(-1, len(others), -1), candidate[..., None]], -1)
        here = stacked.topk(n, -1).values.sum((0, 2))
        for j in range(m):
            rest = order[:, [k for k in range(m) if k != j]]
            there = torch.cat(
                [magnitude[:, rest], magnitude[:, mine[i]][:, None, None].expand(-1, groups, 1)], -1
            )
            gain = here.view(groups, m)[:, j] + there.topk(n, -1).values.sum((0, 2))
            gain = gain - now - now[worst]
            gain[worst] = -torch.inf
            top = int(gain.argmax())
            if float(gain[top]) > best:
                best, swap = float(gain[top]), (worst * m + i, top * m + j)
    return best, swap
