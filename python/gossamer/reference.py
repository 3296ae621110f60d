"""What every op means, in plain torch: any dtype, any device, no cleverness.

The tests hold the kernels against these functions, run in float64. Formats are described in
``gossamer.formats``; names follow the formula y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ._wide import wide, wide_matmul
from .formats.block import Block

if TYPE_CHECKING:
    from .formats import BlockSparse


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation by its name: ``None``, "relu", "gelu" (exact, by erf) or "silu"."""
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "silu":
        return F.silu(y)
    return y


def sparse24_columns(indices: Tensor, in_features: int) -> Tensor:
    """The column of W of every stored slot, [N, 2G] int64; it may lie past ``in_features``."""
    groups = (in_features + 3) // 4
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(1)[:, :groups].long()
    within_group = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    return (within_group + 4 * torch.arange(groups, device=indices.device).view(-1, 1)).flatten(1)


def sparse24_from_dense(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, indices) of a [N, K] matrix that is 2:4; -0.0 counts as zero."""
    out_features, in_features = weight.shape
    groups = (in_features + 3) // 4
    padded = F.pad(weight, (0, 4 * groups - in_features)).view(out_features, groups, 4)
    # A stable sort puts the non-zeros of a group first and leaves both kinds in column order, so
    # the first two are the non-zeros, filled up with the lowest free columns.
    slots = torch.argsort((padded == 0).to(torch.uint8), dim=-1, stable=True)[..., :2]
    slots = slots.sort(dim=-1).values
    values = padded.gather(-1, slots)
    values = torch.where(values == 0, torch.zeros_like(values), values)
    nibbles = F.pad(slots[..., 0] | slots[..., 1] << 2, (0, groups % 2))
    indices = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return values.flatten(1), indices.to(torch.uint8)


def sparse24_to_dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """W [N, K]: each stored value at its column, zeros elsewhere."""
    columns = sparse24_columns(indices, in_features)
    dense = values.new_zeros(values.shape[0], 4 * ((in_features + 3) // 4))
    return dense.scatter(1, columns, values)[:, :in_features]


def sparse24_gather(dense: Tensor, indices: Tensor) -> Tensor:
    """The entries of a [N, K] matrix at the kept columns: [N, 2G]; 0 where a column is past K."""
    columns = sparse24_columns(indices, dense.shape[1])
    padded = F.pad(dense, (0, 4 * ((dense.shape[1] + 3) // 4) - dense.shape[1]))
    return padded.gather(1, columns)


def sparse24_to_panels(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The panels of ``gossamer.formats.Sparse24Panels``, from the portable form."""
    rows, records = values.shape[0], (in_features + 31) // 32
    blocks = (rows + 15) // 16
    value_words = 16 * values.element_size() // 4

    def words(part: Tensor, words_per_record: int) -> Tensor:
        raw = part.contiguous().view(torch.uint8)
        padding = (0, 4 * words_per_record * records - raw.shape[1], 0, 16 * blocks - rows)
        as_words = F.pad(raw, padding).contiguous().view(torch.int32)
        return as_words.view(blocks, 16, records, words_per_record).permute(0, 2, 3, 1)

    return torch.cat([words(indices, 1), words(values, value_words)], dim=2).contiguous()


def sparse24_from_panels(
    panels: Tensor, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(values, indices) from the panels: the inverse of ``sparse24_to_panels``."""
    groups = (in_features + 3) // 4

    def rows(words: Tensor, row_bytes: int) -> Tensor:
        by_row = words.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        raw = by_row.view(panels.shape[0] * 16, -1).view(torch.uint8)
        return raw[:out_features, :row_bytes].clone(memory_format=torch.contiguous_format)

    values = rows(panels[:, :, 1:], 2 * groups * dtype.itemsize).view(dtype)
    return values, rows(panels[:, :, :1], (groups + 1) // 2)


def sparse24_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    in_features: int,
    activation: str | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b), summed over the stored slots alone.

    A NaN or an infinity in x therefore goes through every stored position, explicit zeros
    included, and never through a pruned one; slots past the last column have no x at all.
    """
    columns = sparse24_columns(indices, in_features)
    kept = values.where(columns < in_features, 0)
    rows = x.reshape(-1, x.shape[-1])
    by_column = F.pad(rows.t(), (0, 0, 0, 4 * ((in_features + 3) // 4) - in_features))
    y = rows.new_empty(rows.shape[0], values.shape[0])
    # As many outputs at once as see 32 MiB of float64.
    together = max((1 << 22) // max(columns.shape[1] * rows.shape[0], 1), 1)
    for first in range(0, values.shape[0], together):
        some = slice(first, first + together)
        y[:, some] = torch.einsum("ns,nsm->mn", kept[some], by_column[columns[some]])
    if bias is not None:
        y = y + bias
    return activate(y, activation).view(*x.shape[:-1], values.shape[0])


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


def absmax_scales(x: Tensor, largest: float) -> Tensor:
    """By what to divide the last dimension for its largest magnitude to become ``largest``.

    float32. 1 where all entries are 0, at least the smallest normal float32, and NaN where an
    entry is not finite.
    """
    absmax = _for_division(x).abs().amax(-1)
    # By a tensor: where a GPU divides by a number, torch multiplies with its rounded reciprocal.
    scales = (
        (absmax / absmax.new_full((), largest)).float().clamp(min=torch.finfo(torch.float32).tiny)
    )
    scales = torch.where(absmax == 0, 1.0, scales)
    return torch.where(absmax.isfinite() & scales.isfinite(), scales, torch.nan)


def round_scaled(x: Tensor, scales: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """x / scales in ``dtype``, to nearest even and clamped to +-``largest``; 0 where it is NaN.

    With ``absmax_scales`` an entry is off by at most half a scale (whole numbers), or by the
    larger of 2^-4 of itself and 2^-10 scales (float8_e4m3fn), and a few roundings of float32.
    """
    scaled = (_for_division(x) / scales.unsqueeze(-1)).nan_to_num(nan=0.0)
    scaled = scaled if dtype.is_floating_point else scaled.round()
    return scaled.clamp(-largest, largest).to(dtype)


def _for_division(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 or float8_e4m3fn numbers and their float32 scales [...], by absmax."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scales = absmax_scales(x, largest)
    return round_scaled(x, scales, largest, dtype), scales


def pack_int4(numbers: Tensor) -> Tensor:
    """int8 [N, 2G] of -7 to 7 -> uint8 [N, G]: slot 0 of a pair in the low four bits."""
    nibbles = numbers.view(torch.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_int4(pairs: Tensor) -> Tensor:
    """The inverse of ``pack_int4``: the four bits are a number in two's complement."""
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    return (nibbles ^ 8).to(torch.int8) - 8


def sparse24_slot_scales(scales: Tensor, slots: int, group: int) -> Tensor:
    """The scale of every stored slot, [N, 2G], where one serves ``group`` columns of W."""
    columns = 4 * (torch.arange(slots, device=scales.device) // 2)
    return scales[:, columns // group]


def sparse24_linear_quantized(
    x: Tensor,
    x_scale: Tensor | None,
    numbers: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
    group: int,
    activation: str | None = None,
) -> Tensor:
    """y = act(x_scale * (x Wᵀ) + b) with W = numbers * scales, in the dtype of ``scales``.

    ``numbers`` [N, 2G] are the stored values, one a slot; x may be quantised itself.
    """
    weight = numbers.to(scales.dtype) * sparse24_slot_scales(scales, numbers.shape[1], group)
    y = sparse24_linear(x.to(scales.dtype), weight, indices, None, in_features)
    if x_scale is not None:
        y = y * x_scale.to(y.dtype).unsqueeze(-1)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return activate(y, activation)


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
