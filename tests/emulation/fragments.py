"""The layout that the tensor-core kernels read (csrc/sparse24/cuda.h), element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gossamer.formats import Sparse24
from torch import Tensor

ROWS, COLUMNS = 16, 256  # of a record
LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4


def fragments(weight: Sparse24) -> Tensor:
    """[tiles of 16 rows, records of 256 columns, words] int32."""
    return pack_fragments(weight.values, weight.indices, weight.in_features)


def pack_fragments(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The same for values of any 16-bit or 8-bit dtype: [N, 2G] and [N, ceil(G / 2)] uint8."""
    rows, groups = values.shape[0], (in_features + 3) // 4
    tiles, records = -(-rows // ROWS), -(-in_features // COLUMNS)
    missing = (0, records * COLUMNS // 4 - groups, 0, tiles * ROWS - rows)
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(1)[:, :groups].long()
    nibbles = F.pad(nibbles, missing, value=0 | 1 << 2)
    nibbles = nibbles.view(tiles, ROWS, records, COLUMNS // 4).transpose(1, 2)
    bits = values.view({1: torch.uint8, 2: torch.int16}[values.element_size()])
    bits = F.pad(bits, (0, 2 * missing[1], *missing[2:]))
    bits = bits.view(tiles, ROWS, records, COLUMNS // 2).transpose(1, 2)
    elements = [_elements(bits, step) for step in range(4 * values.element_size())]
    words = torch.cat([part.contiguous().view(torch.int32).flatten(2) for part in elements], dim=2)
    metadata = _metadata(nibbles, values.element_size()).to(torch.int32).flatten(2)
    return torch.cat([words, metadata], dim=2).contiguous()


def _elements(bits: Tensor, step: int) -> Tensor:
    """The A registers of a step: [tiles, records, lane, register, element]."""
    per_register = 4 // bits.element_size()
    i = torch.arange(4).view(1, 4, 1)
    e = torch.arange(per_register).view(1, 1, per_register)
    row = (G.view(32, 1, 1) + 8 * (i % 2)).expand(32, 4, per_register)
    column = per_register * T.view(32, 1, 1) + 4 * per_register * (i // 2) + e
    return bits[:, :, row, column.expand(32, 4, per_register) + 8 * per_register * step]


def _metadata(nibbles: Tensor, element_size: int) -> Tensor:
    """Four words a lane: [tiles, records, lane, word] int64, bits 31 as the sign."""

    def gathered(row: Tensor, group: Tensor, count: int) -> Tensor:
        fields = [nibbles[:, :, row, group + i] << 4 * i for i in range(count)]
        return torch.stack(fields).sum(0)

    words = []
    for j in range(4):
        if element_size == 2:  # 16 columns of two rows, of the step that the selector picks
            group = 8 * (2 * j + T // 2) + 4 * (T % 2)
            word = gathered(G, group, 4) | gathered(G + 8, group, 4) << 16
        else:  # 32 columns of one row
            word = gathered(G + 8 * (T % 2), 16 * j + 8 * (T // 2), 8)
        words.append(torch.where(word >= 1 << 31, word - (1 << 32), word))
    return torch.stack(words, dim=-1)
