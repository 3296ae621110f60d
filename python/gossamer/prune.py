"""The explicit pruners: what makes a dense weight fit a pattern, on request only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .formats import Block
from .formats.stored import check_dense


def magnitude_24(weight: Tensor, dim: int = -1) -> Tensor:
    """Keep the two entries of largest magnitude in every four along a dimension.

    Parameters
    ----------
    weight : Tensor
        [..., K] float32, bfloat16, float16 or float64; K need not be a multiple of 4.
    dim : int
        The dimension along which the four lie: the last of a linear layer's weight, 1 (the input
        channels) of a convolution's.

    Returns
    -------
    Tensor
        The same shape, dtype and device, with the other entries 0. A tie keeps the lower index,
        and a NaN counts as the largest magnitude. Gradients flow to the kept entries.

    Raises
    ------
    TypeError
        If ``weight`` is not a tensor of those dtypes.
    ValueError
        If ``weight`` has no such dimension.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    check_dense("magnitude_24", weight)
    if weight.dim() == 0:
        raise ValueError("magnitude_24: weight is 0-d, it needs at least one dimension")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"magnitude_24: dim {dim} of a weight of shape {list(weight.shape)}")
    if dim not in (-1, weight.dim() - 1):
        return magnitude_24(weight.movedim(dim, -1)).movedim(-1, dim).contiguous()
    in_features = weight.shape[-1]
    magnitude = weight.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    padded = F.pad(magnitude, (0, -in_features % 4))
    a, b, c, d = padded.unflatten(-1, (-1, 4)).unbind(-1)
    # Of each pair the earlier wins a tie; the four wins of a group are then all different, and the
    # two largest are those that win at least twice.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = torch.stack(
        [
            (ab & ac) | (ab & ad) | (ac & ad),
            (~ab & bc) | (~ab & bd) | (bc & bd),
            (~ac & ~bc) | (~ac & cd) | (~bc & cd),
            (~ad & ~bd) | (~ad & ~cd) | (~bd & ~cd),
        ],
        dim=-1,
    )
    return torch.where(kept.flatten(-2)[..., :in_features], weight, 0)


def magnitude_blocks(
    weight: Tensor | Sequence[Tensor],
    block: Block,
    density: float,
    groups: int | Sequence[int] = 1,
    scope: str = "layer",
) -> Tensor | list[Tensor]:
    """Keep the blocks of largest L2 norm, and make the others 0.

    Parameters
    ----------
    weight : Tensor or sequence of Tensor
        [N, K] or [C_out, C_in / groups, *kernel size], in float32, bfloat16, float16 or float64.
    block : Block
        The size of the blocks; at the edges of groups and taps a block is the smaller.
    density : float
        The share of blocks to keep, in (0, 1]: rounded to the nearest number, at least one.
    groups : int or sequence of int
        The convolution's; for several weights one number for all, or one each.
    scope : {"layer", "global"}
        Whether each of several weights keeps that share, or all of them together, which then lose
        the blocks that are smallest anywhere.

    Returns
    -------
    Tensor or list of Tensor
        The same shapes, dtypes and devices, with the other entries 0. Norms are compared in
        float64; a tie keeps the block that comes first, row by row of blocks and weight by weight,
        and a NaN counts as the largest. Gradients flow to the kept entries.

    Raises
    ------
    TypeError
        If a weight is not a tensor of those dtypes, or ``block`` no ``Block``.
    ValueError
        If the density is not in (0, 1], the scope is unknown or a shape does not fit.

    References
    ----------
    Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017 (arXiv:1711.02782).
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    each = [groups] * len(weights) if isinstance(groups, int) else list(groups)
    if len(each) != len(weights):
        raise ValueError(f"magnitude_blocks: {len(each)} groups for {len(weights)} weights")
    if not isinstance(block, Block):
        raise TypeError(f"magnitude_blocks: block is {block!r}, expected gossamer.Block")
    check_density("magnitude_blocks", density)
    if scope not in ("layer", "global"):
        raise ValueError(f"magnitude_blocks: scope {scope!r}, expected 'layer' or 'global'")
    norms = [_block_norms(w, block, g) for w, g in zip(weights, each, strict=True)]
    if scope == "layer" or not norms:
        masks = [_largest_share(norm, density) for norm in norms]
    else:
        where = norms[0].device
        together = torch.cat([norm.flatten().to(where) for norm in norms])
        together = _largest_share(together, density)
        parts = together.split([norm.numel() for norm in norms])
        masks = [part.view_as(norm) for part, norm in zip(parts, norms, strict=True)]
    pruned = [
        torch.where(reference.block_cover(mask.to(w.device), tuple(w.shape), block, g), w, 0)
        for w, mask, g in zip(weights, masks, each, strict=True)
    ]
    return pruned[0] if isinstance(weight, Tensor) else pruned


def magnitude_unstructured(weight: Tensor, density: float) -> Tensor:
    """Keep the entries of largest magnitude, anywhere.

    Parameters
    ----------
    weight : Tensor
        Of any shape and a floating-point dtype.
    density : float
        The share of entries to keep, in (0, 1]: rounded to the nearest number, at least one.

    Returns
    -------
    Tensor
        The same shape, dtype and device, with the other entries 0. A tie keeps the entry that
        comes first, and a NaN counts as the largest. Gradients flow to the kept entries.

    Raises
    ------
    TypeError
        If ``weight`` is not a floating-point tensor.
    ValueError
        If the density is not in (0, 1].

    References
    ----------
    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015
    (arXiv:1506.02626).
    """
    return torch.where(largest_places(weight, density), weight, 0)


def largest_places(weight: Tensor, density: float) -> Tensor:
    """The bool mask of the entries that ``magnitude_unstructured`` keeps."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"magnitude_unstructured: weight is {what}, it must be a floating-point tensor"
        )
    check_density("magnitude_unstructured", density)
    return _largest_share(weight.detach().abs(), density)


def check_density(op: str, density: float) -> None:
    if not isinstance(density, (Real, Tensor)):
        raise TypeError(f"{op}: density {density!r}, expected a number")
    if not 0 < density <= 1:
        raise ValueError(f"{op}: density {density}, expected above 0 and at most 1")


def _block_norms(weight: Tensor, block: Block, groups: int) -> Tensor:
    check_dense("magnitude_blocks", weight)
    block.grid(tuple(weight.shape), groups)  # or there is no such weight
    return l2_norms(reference.to_blocks(weight.detach().double(), block, groups), (2, 3))


def largest_blocks(weight: Tensor, block: Block, density: float, groups: int = 1) -> Tensor:
    """The bool mask of the blocks that ``magnitude_blocks`` keeps of one weight."""
    return _largest_share(_block_norms(weight, block, groups), density)


def count_kept(count: int, density: float) -> int:
    """How many of so many blocks or entries are kept: the nearest number, at least one."""
    return max(1, math.floor(density * count + 0.5))


def largest(units: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest of each row; a tie keeps the lower index, and NaN is the largest."""
    if not 0 < keep < units.shape[-1]:
        return torch.full_like(units, keep > 0, dtype=torch.bool)
    units = units.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if units.is_cuda:  # where selecting is one thread block's, and of no fixed order in torch 2.9
        least = units.sort(dim=-1).values[..., -keep, None]
    else:
        least = units.kthvalue(units.shape[-1] - keep + 1, dim=-1, keepdim=True).values
    above, level = units > least, units == least
    wide = torch.int32 if units.shape[-1] < 2**31 else torch.int64  # the narrower is faster
    missing = keep - above.sum(-1, keepdim=True, dtype=wide)
    return above | (level & (level.cumsum(-1, dtype=wide) <= missing))


def _largest_share(units: Tensor, density: float) -> Tensor:
    """The mask of the largest of all."""
    return largest(units.flatten(), count_kept(units.numel(), density)).view_as(units)


def l2_norms(entries: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Over some dimensions of float64."""
    # Divided by the largest entry, no square leaves float64's range.
    top = entries.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (entries / top).square().sum(dims).sqrt() * top.squeeze(dims)
