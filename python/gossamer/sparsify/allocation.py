"""How a sparsity of the whole is shared out over layers, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..prune import count_kept, largest
from .layers import Layer

DISTRIBUTIONS = ("uniform", "erk", "global")


def allocate(layers: Sequence[Layer], sparsity: float, distribution: str) -> list[int]:
    """How many units each layer keeps.

    "erk" gives a layer the density e * (sum of its sizes) / (product of its sizes), at most 1, with
    e such that the whole has the sparsity (Evci et al., ICML 2020); "global" begins like it.
    """
    if distribution == "uniform":
        return [layer.keep(sparsity) for layer in layers]
    sizes = [layer.kept.numel() for layer in layers]
    wanted = max(len(layers), count_kept(sum(sizes), 1 - sparsity))
    raw = [
        (sum(layer.fans) + sum(layer.shape[2:])) / (layer.fans[0] * layer.fans[1] * layer.taps)
        for layer in layers
    ]
    return share_out([r * n for r, n in zip(raw, sizes, strict=True)], sizes, wanted)


def share_out(
    shares: Sequence[float], room: Sequence[int], total: int, least: int = 1
) -> list[int]:
    """Whole numbers in proportion to shares, from least to the room of each, of a given sum."""
    full: set[int] = set()
    while True:
        free = [i for i in range(len(room)) if i not in full]
        scale = (total - sum(room[i] for i in full)) / max(
            sum(shares[i] for i in free), torch.finfo(torch.float64).tiny
        )
        over = {i for i in free if shares[i] * scale >= room[i]}
        if not over or not free:
            break
        full |= over
    exact = [float(room[i]) if i in full else shares[i] * scale for i in range(len(room))]
    counts = [min(r, max(least, int(x))) for x, r in zip(exact, room, strict=True)]
    # The largest remainders are rounded up, the lower index first.
    order = sorted(range(len(room)), key=lambda i: counts[i] - exact[i])
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [i for i in order if least <= counts[i] + step <= room[i]]
        if not movable:
            break
        for i in movable[: abs(missing)] if step > 0 else movable[::-1][: abs(missing)]:
            counts[i] += step
    return counts


def select_globally(units: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """The best units of all layers together, the best of each layer among them."""
    where = units[0].device
    together = torch.cat([u.double().flatten().to(where) for u in units])
    first = torch.cat([largest(u.flatten(), 1).to(where) for u in units])
    keep = max(len(units), count_kept(together.numel(), 1 - sparsity))
    kept = largest(together.nan_to_num(nan=torch.inf).masked_fill(first, torch.inf), keep)
    parts = kept.split([u.numel() for u in units])
    return [part.view_as(u).to(u.device) for part, u in zip(parts, units, strict=True)]
