"""What a GPU's kernels read of a kernel map: made once, and kept with the map.

The CPU's kernels walk over the pairs of a tap. A GPU computes many outputs side by side, and reads
a table of the rows of x that each of them meets (csrc/pointcloud/cuda.h).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C

GROUP, QUARTER = _C.pointcloud_group_rows, _C.pointcloud_quarter_rows
# Pairs of a segment, of which the gradient of the weights sums each by itself: a multiple of what
# it takes at once, and as long as leaves enough of them to fill a GPU.
_LEAST_SEGMENT, _SEGMENTS = 512, 256


class OutputTable(NamedTuple):
    """The outputs in groups of like taps, as ``_C.pointcloud_conv_cuda`` takes them."""

    neighbours: Tensor  # int32 [T, groups * GROUP], a row of x, or -1
    rows: Tensor  # int32 [groups * GROUP], the row of y, or -1
    begins: Tensor  # int32 [groups + 1], where each group begins in visited
    visited: Tensor  # int32, its taps: tap << 4 | a bit for each quarter that has it


class PairSegments(NamedTuple):
    """The pairs, cut up, as ``_C.pointcloud_conv_weight_grad_cuda`` takes them."""

    in_rows: Tensor  # int32 [P]
    out_rows: Tensor  # int32 [P]
    begins: Tensor  # int64 [segments + 1]
    of_tap: Tensor  # int64 [T + 1], the first segment of each tap


def output_table(pairs: tuple[Any, ...], n_in: int, n_out: int) -> OutputTable:
    """Of the map's tensors in the order of the ops; made at the first call."""
    table: OutputTable = _kept("table", pairs, n_in, n_out, _make_table)
    return table


def pair_segments(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PairSegments:
    """The same."""
    segments: PairSegments = _kept("segments", pairs, n_in, n_out, _make_segments)
    return segments


# By the tensors themselves, which are those of the map wherever an op is called from: eager code,
# the backward pass, a compiled graph.
_layouts: dict[tuple[Any, ...], tuple[list[weakref.ref[Tensor]], Any]] = {}


def _kept(
    kind: str, pairs: tuple[Any, ...], n_in: int, n_out: int, make: Callable[..., Any]
) -> Any:
    tensors = [t for t in pairs if t is not None]
    key = (kind, *map(id, pairs), *map(_version, tensors), n_in, n_out)
    found = _layouts.get(key)
    if found is not None and all(ref() is t for ref, t in zip(found[0], tensors, strict=True)):
        return found[1]
    device = pairs[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "pointcloud_conv: the first call with a kernel map cannot be captured in a CUDA graph: "
            "it checks the map and makes a table of it; make one call before"
        )
    with torch.no_grad():
        layout = make(pairs, n_in, n_out)
    if device.type == "cuda":  # the next call may be on another stream
        torch.cuda.current_stream(device).synchronize()
    # Freed with the first of them.
    forget = [weakref.ref(t, lambda _: _layouts.pop(key, None)) for t in tensors]
    _layouts[key] = forget, layout
    return layout


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _check(pairs: tuple[Any, ...], n_in: int, n_out: int) -> None:
    """As the CPU's border does: a map can be made by hand, and waiting once is no loss."""
    op = "pointcloud_conv"
    in_index, out_index, tap_offsets, in_order, out_order = pairs
    if tap_offsets.dtype != torch.int64 or tap_offsets.device.type != "cpu":
        raise ValueError(
            f"{op}: tap_offsets are {tap_offsets.dtype} on {tap_offsets.device}, "
            "expected torch.int64 on the CPU"
        )
    ends = tap_offsets.tolist()
    if ends[0] != 0 or any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"{op}: tap_offsets {ends} do not ascend from 0")
    for name, t, length in (
        ("in_index", in_index, ends[-1]),
        ("out_index", out_index, ends[-1]),
        ("in_order", in_order, n_in),
        ("out_order", out_order, n_out),
    ):
        if t is None:
            continue
        if t.dtype != torch.int32 or t.device != in_index.device:
            raise TypeError(
                f"{op}: {name} is {t.dtype} on {t.device}, expected torch.int32 on "
                f"{in_index.device}"
            )
        if t.shape != (length,):
            raise ValueError(f"{op}: {name} has shape {list(t.shape)}, expected [{length}]")
    tap = _tap_of_pair(tap_offsets, in_index.device)
    if not _is_wrong(pairs, tap, n_in, n_out):
        return
    for name, t, rows in (
        ("in_index", in_index, n_in),
        ("out_index", out_index, n_out),
        ("in_order", in_order, n_in),
        ("out_order", out_order, n_out),
    ):
        if t is not None and len(t) and not 0 <= int(t.min()) <= int(t.max()) < rows:
            raise ValueError(
                f"{op}: {name} holds {int(t.min())} to {int(t.max())}, there are {rows} rows"
            )
    for name, t in (("in_index", in_index), ("out_index", out_index)):
        wrong = (tap[1:] == tap[:-1]) & (t[1:] <= t[:-1])
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0]) + 1
            raise ValueError(
                f"{op}: {name}[{at}] is {int(t[at])}, not above {int(t[at - 1])}, the one before "
                "it in its tap"
            )
    if out_order is not None and len(out_order.unique()) != n_out:
        raise ValueError(f"{op}: out_order names a row twice")


def _is_wrong(pairs: tuple[Any, ...], tap: Tensor, n_in: int, n_out: int) -> bool:
    """Whether there is anything to say of the tensors' numbers; waits for a GPU once."""
    in_index, out_index, _, in_order, out_order = pairs
    wrong = []
    for t, rows in (in_index, n_in), (out_index, n_out), (in_order, n_in), (out_order, n_out):
        if t is not None and len(t):
            least, most = t.aminmax()
            wrong.append((least < 0) | (most >= rows))
    for t in (in_index, out_index):
        wrong.append(((tap[1:] == tap[:-1]) & (t[1:] <= t[:-1])).any())
    if out_order is not None and n_out:
        met = torch.zeros(n_out, dtype=torch.bool, device=tap.device)
        met[out_order.clamp(0, n_out - 1).long()] = True
        wrong.append(~met.all())
    return bool(torch.stack(wrong).any())


def _tap_of_pair(tap_offsets: Tensor, device: torch.device) -> Tensor:
    """int64 [P]."""
    taps = torch.arange(len(tap_offsets) - 1, device=device)
    count = int(tap_offsets[-1])
    return taps.repeat_interleave(tap_offsets.diff().to(device), output_size=count)


def _rows(ranks: Tensor, order: Tensor | None) -> Tensor:
    """int32, the rows of the ranks; not the tensor itself, which a layout must not keep alive."""
    return (ranks if order is None else order[ranks.long()]).contiguous().detach()


def _make_table(pairs: tuple[Any, ...], n_in: int, n_out: int) -> OutputTable:
    _check(pairs, n_in, n_out)
    in_index, out_index, tap_offsets, in_order, out_order = pairs
    device, taps = in_index.device, len(tap_offsets) - 1
    groups = -(-n_out // GROUP)
    positions = groups * GROUP
    tap, output = _tap_of_pair(tap_offsets, device), out_index.long()

    # Outputs of the same taps follow each other, those that lie near each other within them: the
    # sort is stable. Of more taps than bits, several share one, and their sum is still a number
    # that outputs of the same taps have in common.
    mask = torch.zeros(n_out, dtype=torch.int64, device=device)
    mask.index_add_(0, output, torch.ones_like(tap) << tap % 62)
    order = mask.argsort(stable=True)

    # Groups with many taps first, so that the last thread blocks to start are short ones.
    place = torch.empty_like(order)
    place[order] = torch.arange(n_out, device=device)
    present = torch.zeros((groups, taps, GROUP // QUARTER), dtype=torch.bool, device=device)
    at = place[output]
    present[at // GROUP, tap, at % GROUP // QUARTER] = True
    heavy = present.any(2).sum(1).argsort(descending=True, stable=True)
    present = present[heavy]
    place_of_group = torch.empty_like(heavy)
    place_of_group[heavy] = torch.arange(groups, device=device)
    place = place_of_group[place // GROUP] * GROUP + place % GROUP

    neighbours = torch.full((taps, positions), -1, dtype=torch.int32, device=device)
    neighbours[tap, place[output]] = _rows(in_index, in_order)
    rows = torch.full((positions,), -1, dtype=torch.int32, device=device)
    ranks = torch.arange(n_out, dtype=torch.int32, device=device)
    rows[place] = ranks if out_order is None else out_order

    bits = (present << torch.arange(GROUP // QUARTER, device=device)).sum(2)
    group, visited = bits.nonzero(as_tuple=True)
    begins = torch.zeros(groups + 1, dtype=torch.int32, device=device)
    begins[1:] = (bits > 0).sum(1).cumsum(0)
    entries = visited << GROUP // QUARTER | bits[group, visited]
    return OutputTable(neighbours, rows, begins, entries.int())


def _make_segments(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PairSegments:
    _check(pairs, n_in, n_out)
    in_index, out_index, tap_offsets, in_order, out_order = pairs
    ends = tap_offsets.tolist()
    length = max(_LEAST_SEGMENT, -(-ends[-1] // (_SEGMENTS * 32)) * 32)
    begins: list[int] = []
    of_tap = [0]
    for begin, end in pairwise(ends):
        begins += range(begin, end, length)
        of_tap.append(len(begins))
    rest = (torch.tensor(t, dtype=torch.int64, device="cpu") for t in ([*begins, ends[-1]], of_tap))
    begins_of, first_of = (t.to(in_index.device) for t in rest)
    in_rows, out_rows = _rows(in_index, in_order), _rows(out_index, out_order)
    return PairSegments(in_rows, out_rows, begins_of, first_of)
