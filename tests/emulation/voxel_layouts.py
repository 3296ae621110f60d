"""What a GPU reads of a kernel map, in plain torch: the layouts' meaning, for tests."""

from __future__ import annotations

from itertools import pairwise

import torch
from gossamer.ops.pointcloud_layout import GROUP, QUARTER, OutputTable, PairSegments
from gossamer.pointcloud import KernelMap
from torch import Tensor


def _taps(map: KernelMap) -> Tensor:
    """int64 [P], the tap of each pair."""
    return torch.arange(map.taps).repeat_interleave(map.tap_offsets.diff())


def _rows(ranks: Tensor, order: Tensor | None) -> Tensor:
    return ranks if order is None else order[ranks.long()]


def plain_table(map: KernelMap) -> OutputTable:
    taps, n_out = map.taps, map.n_out
    groups = -(-n_out // GROUP)
    tap, output = _taps(map), map.out_index.long()

    # Outputs of the same taps follow each other. Of more taps than bits, several share one, and
    # their sum is still a number that outputs of the same taps have in common.
    mask = torch.zeros(n_out, dtype=torch.int64)
    mask.index_add_(0, output, torch.ones_like(tap) << tap % 62)
    order = mask.argsort(stable=True)

    # Groups with many taps first.
    place = torch.empty_like(order)
    place[order] = torch.arange(n_out)
    present = torch.zeros((groups, taps, GROUP // QUARTER), dtype=torch.bool)
    at = place[output]
    present[at // GROUP, tap, at % GROUP // QUARTER] = True
    heavy = present.any(2).sum(1).argsort(descending=True, stable=True)
    present = present[heavy]
    place_of_group = torch.empty_like(heavy)
    place_of_group[heavy] = torch.arange(groups)
    place = place_of_group[place // GROUP] * GROUP + place % GROUP

    neighbours = torch.full((taps, groups * GROUP), -1, dtype=torch.int32)
    neighbours[tap, place[output]] = _rows(map.in_index, map.in_order)
    rows = torch.full((groups * GROUP,), -1, dtype=torch.int32)
    rows[place] = _rows(torch.arange(n_out, dtype=torch.int32), map.out_order)

    bits = (present << torch.arange(GROUP // QUARTER)).sum(2)
    group, visited = bits.nonzero(as_tuple=True)
    begins = torch.zeros(groups + 1, dtype=torch.int32)
    begins[1:] = (bits > 0).sum(1).cumsum(0)
    entries = visited << GROUP // QUARTER | bits[group, visited]
    return OutputTable(neighbours, rows, begins, entries.int())


def plain_segments(map: KernelMap) -> PairSegments:
    """Of 512 pairs, or a multiple of 32 that is a 256th of all."""
    length = max(512, -(-map.pairs // (256 * 32)) * 32)
    begins, of_tap = [], [0]
    for begin, end in pairwise(map.tap_offsets.tolist()):
        begins += range(begin, end, length)
        of_tap.append(len(begins))
    in_rows, out_rows = _rows(map.in_index, map.in_order), _rows(map.out_index, map.out_order)
    return PairSegments(in_rows, out_rows, torch.tensor([*begins, map.pairs]), torch.tensor(of_tap))
