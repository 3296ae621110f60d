"""Changes of the pattern of an unstructured weight, in memory and time of its live places."""

from __future__ import annotations

import torch
from torch import Tensor

from .csr import SparseCsr, from_keys

_OP = "update_pattern"
_CHUNK = 2**20  # numbers that are drawn at a time


def update_pattern(
    weight: SparseCsr,
    drop: Tensor,
    grow: Tensor,
    values: Tensor | None = None,
) -> tuple[SparseCsr, Tensor]:
    """Drop live places of a weight and let others live, without a matrix of its size.

    Parameters
    ----------
    weight : SparseCsr
        What is there; it stays as it is.
    drop : Tensor
        Which of its values: bool [nnz], or their distinct numbers, int64.
    grow : Tensor
        int64 [2, grown], rows and columns in any order: distinct places that do not live, or that
        are dropped here. As many as are dropped, or not.
    values : Tensor, optional
        [grown] in the weight's dtype: what they begin with; 0 by default.

    Returns
    -------
    (SparseCsr, Tensor)
        The new weight, and int64 [new nnz]: the number that each of its values had before, or -1
        of a grown one. What belongs to values (an optimizer's state) follows by it.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are others, or a place lives already, is named twice, or does not
        exist: with the first such place.
    """
    count, (n, k) = weight.values.shape[0], weight.shape
    if drop.dtype == torch.bool and drop.shape == (count,):
        kept = (~drop).nonzero()[:, 0]
    elif drop.dtype == torch.int64 and drop.dim() == 1:
        lives = torch.ones(count, dtype=torch.bool, device=weight.device)
        if drop.numel() and (int(drop.min()) < 0 or int(drop.max()) >= count):
            raise ValueError(f"{_OP}: drop names {int(drop.min())} to {int(drop.max())} of {count}")
        lives[drop] = False
        kept = lives.nonzero()[:, 0]
        if kept.shape[0] != count - drop.shape[0]:
            raise ValueError(f"{_OP}: drop names a value twice")
    else:
        raise TypeError(
            f"{_OP}: drop is {drop.dtype} of shape {list(drop.shape)}, expected bool [{count}] or "
            "int64"
        )
    if grow.dtype != torch.int64 or grow.dim() != 2 or grow.shape[0] != 2:
        raise TypeError(
            f"{_OP}: grow is {grow.dtype} of shape {list(grow.shape)}, expected int64 [2, grown]"
        )
    outside = ((grow < 0) | (grow >= grow.new_tensor([[n], [k]]))).any(0)
    if bool(outside.any()):
        first = grow[:, outside.nonzero()[0, 0]].tolist()
        raise ValueError(f"{_OP}: grow names {first}, the weight is [{n}, {k}]")
    grown = grow.shape[1]
    if values is None:
        values = weight.values.new_zeros(grown)
    if values.shape != (grown,) or values.dtype != weight.dtype:
        raise ValueError(
            f"{_OP}: values are {values.dtype} of shape {list(values.shape)}, expected "
            f"{weight.dtype} of [{grown}]"
        )
    old = weight.keys()[kept]
    new, order = (grow[0] * k + grow[1]).sort()
    # Both are sorted: each place of one goes behind those of the other that come before it.
    before = torch.searchsorted(old, new)
    taken = torch.zeros_like(new, dtype=torch.bool)
    if old.shape[0]:
        taken = old[before.clamp(max=old.shape[0] - 1)] == new
    taken[1:] |= new[1:] == new[:-1]
    if bool(taken.any()):
        key = int(new[taken.nonzero()[0, 0]])
        raise ValueError(f"{_OP}: grow names [{key // k}, {key % k}], which lives, or twice")
    total = old.shape[0] + grown
    at = before + torch.arange(grown, device=weight.device)
    is_old = torch.ones(total, dtype=torch.bool, device=weight.device)
    is_old[at] = False
    keys, source = old.new_empty(total), old.new_full((total,), -1)
    keys[at], keys[is_old] = new, old
    source[is_old] = kept
    made = weight.values.new_empty(total)
    made[is_old], made[at] = weight.values.detach()[kept], values.detach()[order]
    crow, col = from_keys(keys, weight.shape)
    return SparseCsr(made, crow, col, weight.shape), source


def random_places(
    shape: tuple[int, ...],
    live: Tensor,
    count: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Distinct places that do not live, each set of them as likely as any other.

    Parameters
    ----------
    shape : tuple of int
        (N, K).
    live : Tensor
        int64, row * K + column of what lives, increasing (``SparseCsr.keys``).
    count : int
        How many.
    generator : torch.Generator, optional
        On the CPU; the draw is the same on any device.

    Returns
    -------
    Tensor
        int64 [2, count], rows and columns, on the device of ``live``.

    Raises
    ------
    ValueError
        If there are not so many.
    """
    free = shape[0] * shape[1] - live.shape[0]
    if not 0 <= count <= free:
        raise ValueError(f"random_places: {count} of {free} places that do not live")
    draw = _ranks_by_marks if 8 * count >= free else _ranks_by_sorting
    ranks = draw(free, count, generator).to(live.device)
    # So many free places come before each live one.
    before = live - torch.arange(live.shape[0], device=live.device)
    keys = ranks + torch.searchsorted(before, ranks, right=True)
    return torch.stack([keys // shape[1], keys % shape[1]])


# Never more are drawn than are missing, and what was drawn stays. No place is treated unlike
# another, so the set that is there in the end is as likely as any other of its size.


def _ranks_by_sorting(free: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Increasing numbers below ``free``; memory of those that are drawn."""
    ranks = torch.empty(0, dtype=torch.int64, device="cpu")
    while (missing := count - ranks.shape[0]) > 0:
        drawn = torch.randint(free, (missing,), generator=generator, device="cpu")
        ranks = torch.cat([ranks, drawn]).unique()
    return ranks


def _ranks_by_marks(free: int, count: int, generator: torch.Generator | None) -> Tensor:
    """The same with a byte for each there is: of the smaller part, those drawn or those left."""
    marks = torch.zeros(free, dtype=torch.bool, device="cpu")
    missing = fewer = min(count, free - count)
    while missing > 0:
        for first in range(0, missing, _CHUNK):
            size = (min(_CHUNK, missing - first),)
            marks[torch.randint(free, size, generator=generator, device="cpu")] = True
        missing = fewer - int(marks.count_nonzero())
    if fewer < count:
        marks.logical_not_()
    return marks.nonzero()[:, 0]
