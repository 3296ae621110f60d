"""Weights that are zero in whole blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.block import Block
from .activation import activate

if TYPE_CHECKING:
    from ..formats import BlockSparse


def to_blocks(weight: Tensor, block: Block, groups: int = 1) -> Tensor:
    """A weight cut into blocks, padded with zeros: [block rows, block columns, rows, cols]."""
    shape, rows, cols = weight.shape, block.rows, block.cols
    dense = weight.reshape(groups, shape[0] // groups, shape[1], -1).transpose(2, 3)
    padding = (0, -shape[1] % cols, 0, 0, 0, -dense.shape[1] % rows)
    cut = F.pad(dense, padding).unflatten(3, (-1, cols)).unflatten(1, (-1, rows))
    # [group, row of blocks, row, tap, column of blocks, column]
    return cut.permute(0, 1, 3, 4, 2, 5).flatten(2, 3).flatten(0, 1)


def from_blocks(blocks: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The inverse of ``to_blocks``."""
    group_out, taps = shape[0] // groups, math.prod(shape[2:])
    cut = blocks.unflatten(0, (groups, -1)).unflatten(2, (taps, -1)).permute(0, 1, 4, 2, 3, 5)
    dense = cut.flatten(4, 5).flatten(1, 2)[:, :group_out, :, : shape[1]]
    return dense.transpose(2, 3).reshape(shape)


def block_cover(mask: Tensor, shape: tuple[int, ...], block: Block, groups: int = 1) -> Tensor:
    """Which entries of a weight lie in the blocks of a mask."""
    blocks = mask[:, :, None, None].expand(-1, -1, block.rows, block.cols)
    return from_blocks(blocks, shape, groups)


def blocksparse_mask(crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> Tensor:
    """The bool mask of live blocks of block compressed rows."""
    counts = crow_indices.diff().long()
    mask = torch.zeros(len(counts), block_columns, dtype=torch.bool, device=counts.device)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    mask[rows, col_indices.long()] = True
    return mask


def blocksparse_to_dense(
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    shape: tuple[int, ...],
    groups: int = 1,
) -> Tensor:
    """The weight of ``shape``: each block at its place, zeros elsewhere."""
    _, rows, cols = values.shape
    grid = Block(rows, cols).grid(shape, groups)
    blocks = values.new_zeros(*grid, rows, cols)
    blocks[blocksparse_mask(crow_indices, col_indices, grid[1])] = values
    return from_blocks(blocks, shape, groups)


def blocksparse_gather(
    dense: Tensor, crow_indices: Tensor, col_indices: Tensor, block: Block, groups: int = 1
) -> Tensor:
    """The live blocks of a dense weight: [nnz, rows, cols], padded with zeros."""
    blocks = to_blocks(dense, block, groups)
    return blocks[blocksparse_mask(crow_indices, col_indices, blocks.shape[1])]


def blocksparse_linear(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b + residual), over the live blocks alone: the convolution of no axes."""
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, weight.shape[0])
    y = blocksparse_conv(rows, weight, bias, (), (), (), activation=activation, residual=added)
    return y.view(*x.shape[:-1], weight.shape[0])


def blocksparse_conv(
    x: Tensor,
    weight: BlockSparse,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = act(W * x + b + residual) of x [batch, C_in, *extents], over the live blocks alone.

    ``padding`` is what goes before and after x along each axis. Sums, bias and residual are added
    in float32 (or the dtype, if that is wider), and what the activation makes of them is rounded
    once; ``sparse24_conv`` takes a residual the same way. (Where a gradient is wanted, on a GPU and
    where torch's convolution is chosen, torch adds it to the rounded sum.) A NaN or an infinity in
    x goes through every position of a live block, zeros included, and never through the others.
    """
    around = [size for both in reversed(padding) for size in both]
    if around:
        x = F.pad(x, around, mode="constant" if padding_mode == "zeros" else padding_mode)
    axes = list(zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True))
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]
    y = x.new_zeros(x.shape[0], weight.shape[0], *out)
    group_out, group_in = weight.shape[0] // weight.groups, weight.shape[1]
    rows, cols = weight.block.rows, weight.block.cols
    row_blocks, col_blocks = -(-group_out // rows), -(-group_in // cols)
    live = blocksparse_mask(weight.crow_indices, weight.col_indices, weight.grid[1]).nonzero()
    for (block_row, block_column), padded in zip(live.tolist(), weight.values, strict=True):
        group, row = divmod(block_row, row_blocks)
        tap, column = divmod(block_column, col_blocks)
        values = padded[: group_out - row * rows, : group_in - column * cols]
        # The channels that this block sees, under its tap, from each position of y.
        channel = group * group_in + column * cols
        seen = [slice(None), slice(channel, channel + values.shape[1])]
        for axis, (_, k, s, d) in enumerate(axes):
            begin = tap // math.prod(weight.shape[3 + axis :]) % k * d
            seen.append(slice(begin, begin + s * (out[axis] - 1) + 1, s))
        first = group * group_out + row * rows
        product = torch.einsum("rc,bc...->br...", values, x[tuple(seen)])
        y[:, first : first + values.shape[0]] += product
    if bias is not None:
        y = y + bias.view(-1, *(1,) * len(out))
    if residual is not None:
        y = y + residual
    return activate(y, activation)
