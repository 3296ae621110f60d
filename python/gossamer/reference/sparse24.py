"""2:4 weights, of floats and of a few bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._wide import wide
from .activation import activate


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
    by_column = F.pad(rows, (0, 4 * ((in_features + 3) // 4) - in_features)).t()
    y = rows.new_empty(rows.shape[0], values.shape[0])
    # As many outputs at once as see 32 MiB of float64.
    together = max((1 << 22) // max(columns.shape[1] * rows.shape[0], 1), 1)
    for first in range(0, values.shape[0], together):
        some = slice(first, first + together)
        y[:, some] = torch.einsum("ns,nsm->mn", kept[some], by_column[columns[some]])
    if bias is not None:
        y = y + bias
    return activate(y, activation).view(*x.shape[:-1], values.shape[0])


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
    return x.to(wide(x.dtype))


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
