"""The fragments of csrc/sparse24/cuda.h, element by element from what common/ptx.cuh says of the
operands of mma.sp: the oracle for the kernels that write and read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gossamer.formats import Sparse24
from torch import Tensor

ROWS, COLUMNS = 16, 256  # of a record
GROUPS = COLUMNS // 4
LANES = torch.arange(32)
G, T = LANES // 4, LANES % 4


def fragments(weight: Sparse24) -> Tensor:
    """[tiles, records, words] int32 of a weight with 16-bit values."""
    return fragments_of(weight.values, weight.indices, weight.in_features)


def fragments_of(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The same of its parts, for values of 1 or 2 bytes of any dtype."""
    rows, records = values.shape[0], -(-in_features // COLUMNS)
    tiles = -(-rows // ROWS)
    raw = {1: torch.int8, 2: torch.int16}[values.itemsize]
    stored = values.contiguous().view(raw)
    padding = (0, records * 2 * GROUPS - stored.shape[1], 0, tiles * ROWS - rows)
    stored = F.pad(stored, padding).view(tiles, ROWS, records, 2 * GROUPS)
    return torch.cat(
        [
            _registers(stored).flatten(2).view(torch.int32),
            _metadata(_nibbles(indices, in_features, tiles, records), values.itemsize),
        ],
        dim=2,
    )


def fragments_of_int4(pairs: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The same of 4-bit values in pairs, [N, G] uint8."""
    rows, records = pairs.shape[0], -(-in_features // COLUMNS)
    tiles = -(-rows // ROWS)
    numbers = torch.stack([pairs << 4, pairs], dim=-1).flatten(1).view(torch.int8) >> 4
    padding = (0, records * 2 * GROUPS - numbers.shape[1], 0, tiles * ROWS - rows)
    numbers = F.pad(numbers, padding).view(tiles, ROWS, records, 2 * GROUPS)
    # The registers of 16-bit values hold the same elements.
    registers = _registers(numbers.to(torch.int16)).long() + 8
    words = torch.zeros(tiles, records, 8, 32, dtype=torch.int64)  # by step and lane
    for i in range(4):
        for e in range(2):
            # "Its nibble i holds the first element of A register i, nibble 4 + i the second"
            words |= registers[..., i, e] << 4 * (i + 4 * e)
    # "word j of half h: step 4h + j"
    words = words.view(tiles, records, 2, 4, 32).transpose(3, 4).flatten(2)
    metadata = _metadata(_nibbles(indices, in_features, tiles, records), 2)
    return torch.cat([words.to(torch.uint32).view(torch.int32), metadata], dim=2)


def _registers(stored: Tensor) -> Tensor:
    """[tiles, records, steps, lanes, registers, elements] of [tiles, rows, records, slots]."""
    elements = 4 // stored.itemsize  # E
    steps = 4 * stored.itemsize
    step = torch.arange(steps).view(-1, 1, 1, 1)
    g, t = G.view(-1, 1, 1), T.view(-1, 1, 1)
    i = torch.arange(4).view(-1, 1)
    e = torch.arange(elements)
    # "register i, element e: row g + 8 (i mod 2), column E t + 4E (i / 2) + e"
    row = g + 8 * (i % 2)
    column = 8 * elements * step + elements * t + 4 * elements * (i // 2) + e
    row, column = torch.broadcast_tensors(row, column)
    return stored.transpose(1, 2)[:, :, row, column].contiguous()


def _nibbles(indices: Tensor, in_features: int, tiles: int, records: int) -> Tensor:
    """[tiles, rows, records, groups] int64; padding, and what is not legal, is the pair 0, 1."""
    groups = (in_features + 3) // 4
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(1)[:, :groups].long()
    nibbles = torch.where((nibbles & 3) < (nibbles >> 2), nibbles, 4)
    padding = (0, records * GROUPS - groups, 0, tiles * ROWS - indices.shape[0])
    return F.pad(nibbles, padding, value=4).view(tiles, ROWS, records, GROUPS)


def _metadata(nibbles: Tensor, itemsize: int) -> Tensor:
    """[tiles, records, 32 lanes x 4 words] int32."""
    tiles, _, records, _ = nibbles.shape
    words = torch.zeros(tiles, records, 32, 4, dtype=torch.int64)
    by_row = nibbles.transpose(1, 2)  # [tiles, records, rows, groups]
    if itemsize == 2:
        # Step s reads word s / 2 with selector s mod 2. "lanes 4g + 2F and 4g + 2F + 1 hold columns
        # 0-15 and 16-31, row g in the low half of the register and row g + 8 in the high half"
        g = torch.arange(8)
        for step in range(8):
            for half in range(2):
                lanes = 4 * g + 2 * (step % 2) + half
                for q in range(4):
                    for high in range(2):
                        nibble = by_row[:, :, g + 8 * high, 8 * step + 4 * half + q]
                        words[:, :, lanes, step // 2] |= nibble << (16 * high + 4 * q)
    else:
        # "lane 4g + t holds 32 columns of row g + 8 (t mod 2), from column 32 (t / 2) on"
        for step in range(4):
            for q in range(8):
                nibble = by_row[:, :, G + 8 * (T % 2), 16 * step + 8 * (T // 2) + q]
                words[:, :, LANES, step] |= nibble << (4 * q)
    return words.flatten(2).to(torch.uint32).view(torch.int32)
