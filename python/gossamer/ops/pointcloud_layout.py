"""What a GPU's kernels read of a kernel map: made once, and kept with the map.

The CPU's kernels walk over the pairs of a tap. A GPU computes many outputs side by side, and reads
a table of the rows of x that each of them meets (csrc/pointcloud/cuda.h).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _C

if TYPE_CHECKING:
    from ..pointcloud.kernel_map import KernelMap

GROUP, QUARTER = _C.pointcloud_group_rows, _C.pointcloud_quarter_rows
# Pairs of a segment, of which the gradient of the weights sums each by itself: a multiple of what
# it takes at once, and as long as leaves enough of them to fill a GPU.
_LEAST_SEGMENT, _SEGMENTS = 512, 256

# The tensors of a map, in the schemas of the ops.
MAP = "Tensor in_index, Tensor out_index, Tensor tap_offsets, Tensor? in_order, Tensor? out_order"


class Pairs(NamedTuple):
    """The tensors of a kernel map, in the order in which the ops take them."""

    in_index: Tensor
    out_index: Tensor
    tap_offsets: Tensor
    in_order: Tensor | None
    out_order: Tensor | None

    def transposed(self) -> Pairs:
        return Pairs(self.out_index, self.in_index, self.tap_offsets, self.out_order, self.in_order)


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


class PoolLists(NamedTuple):
    """The rows that each output reduces, as ``_C.pointcloud_pool_cuda`` takes them."""

    rows: Tensor  # int32 [P], by output and tap
    begins: Tensor  # int64 [n_out + 1], by rank


def output_table(pairs: tuple[Any, ...], n_in: int, n_out: int) -> OutputTable:
    """Of the map's tensors in the order of the ops; made at the first call."""
    table: OutputTable = _kept("table", pairs, n_in, n_out, _make_table)
    return table


def pair_segments(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PairSegments:
    """The same."""
    segments: PairSegments = _kept("segments", pairs, n_in, n_out, _make_segments)
    return segments


def pool_lists(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PoolLists:
    """The same; a capture of a map that is met first has its own."""
    lists: PoolLists = _kept("lists", pairs, n_in, n_out, _make_lists, captured=True)
    return lists


def vouch(map: KernelMap) -> None:
    """Say that a map is right, as one is that gossamer made; others are looked at, once."""
    _kept("checked", map.tensors, map.n_in, map.n_out, lambda *_: True)


class _Kept(NamedTuple):
    of: list[weakref.ref[Tensor]]
    layout: Any
    made: torch.cuda.Event | None  # on a GPU
    stream: torch.cuda.Stream | None


# By the tensors themselves, which are those of the map wherever an op is called from: eager code,
# the backward pass, a compiled graph.
_layouts: dict[tuple[Any, ...], _Kept] = {}


def _kept(
    kind: str,
    pairs: tuple[Any, ...],
    n_in: int,
    n_out: int,
    make: Callable[..., Any] | None,
    captured: bool = False,
) -> Any:
    """What was made of the map, now if not before; None where that is not wanted."""
    tensors = [t for t in pairs if t is not None]
    key = (kind, *map(id, pairs), *map(_version, tensors), n_in, n_out)
    found = _layouts.get(key)
    if found is not None and all(ref() is t for ref, t in zip(found.of, tensors, strict=True)):
        if found.made is not None and found.stream is not None:
            _lend(found, found.made, found.stream, tensors)
        return found.layout
    if make is None:
        return None
    device = pairs[0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and not captured:
        raise RuntimeError(
            "pointcloud_conv: the first call with a kernel map cannot be captured in a CUDA graph: "
            "it makes a table of the map, which is kept; make one call before"
        )
    with torch.no_grad():
        layout = make(pairs, n_in, n_out)
    if capturing:  # made at each replay, in memory of the graph
        return layout
    made = stream = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        made = stream.record_event()
    # Freed with the first of them.
    forget = [weakref.ref(t, lambda _: _layouts.pop(key, None)) for t in tensors]
    _layouts[key] = _Kept(forget, layout, made, stream)
    return layout


def _lend(
    found: _Kept, made: torch.cuda.Event, by: torch.cuda.Stream, tensors: list[Tensor]
) -> None:
    """Where this call is on another stream than the first one was, have the GPU wait for that,
    and the memory be kept until this stream is done with it, too."""
    stream = torch.cuda.current_stream(by.device)
    if stream == by:
        return
    # A capture may not depend on what comes before it, and begins when the GPU is idle.
    if not torch.cuda.is_current_stream_capturing():
        stream.wait_event(made)
    layout = found.layout if isinstance(found.layout, tuple) else ()
    for t in (*tensors, *layout):
        if t.is_cuda:  # not the offsets
            t.record_stream(stream)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _check(pairs: tuple[Any, ...], n_in: int, n_out: int, repeats: bool = False) -> bool:
    """As the CPU's border does, for a map can be made by hand: waits for the GPU.

    A pool may have several pairs of a row in a tap (``repeats``).
    """
    op = "pointcloud_pool" if repeats else "pointcloud_conv"
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
    if not _is_wrong(pairs, tap, n_in, n_out, repeats):
        return True
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
        wrong = (tap[1:] == tap[:-1]) & _descends(t, repeats)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0]) + 1
            raise ValueError(
                f"{op}: {name}[{at}] is {int(t[at])}, not above {int(t[at - 1])}, the one before "
                "it in its tap"
            )
    if out_order is not None and len(out_order.unique()) != n_out:
        raise ValueError(f"{op}: out_order names a row twice")
    return True


def _descends(t: Tensor, repeats: bool) -> Tensor:
    return t[1:] < t[:-1] if repeats else t[1:] <= t[:-1]


def _is_wrong(pairs: tuple[Any, ...], tap: Tensor, n_in: int, n_out: int, repeats: bool) -> bool:
    """Whether there is anything to say of the tensors' numbers; waits for a GPU once."""
    in_index, out_index, _, in_order, out_order = pairs
    wrong = []
    for t, rows in (in_index, n_in), (out_index, n_out), (in_order, n_in), (out_order, n_out):
        if t is not None and len(t):
            least, most = t.aminmax()
            wrong.append((least < 0) | (most >= rows))
    for t in (in_index, out_index):
        wrong.append(((tap[1:] == tap[:-1]) & _descends(t, repeats)).any())
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


# Outputs are sorted by a bit for each tap; of more taps than bits, several share one.
_NARROW = 31


def _make_table(pairs: tuple[Any, ...], n_in: int, n_out: int) -> OutputTable:
    """Outputs of the same taps follow each other, those that lie near each other within them.

    Groups with many taps come first, so that the last thread blocks to start are short ones.
    Nothing waits for the GPU.
    """
    _kept("checked", pairs, n_in, n_out, _check)
    new, taps, groups = pairs[0].new_empty, len(pairs[2]) - 1, -(-n_out // GROUP)
    of = (_contiguous(pairs), _to_gpu(pairs[2], pairs[0].device), n_in, n_out)
    masks = new(n_out, dtype=torch.int32 if taps <= _NARROW else torch.int64)
    _C.pointcloud_mask_taps_cuda(masks, *of)
    order = masks.sort(stable=True).indices
    places, bits = new(n_out), new(groups * (taps + 1))
    _C.pointcloud_group_outputs_cuda(places, bits, order, *of)
    visits, heavy = bits[groups * taps :].sort(descending=True, stable=True)

    begins = visits.new_zeros(groups + 1)
    torch.cumsum(visits, 0, dtype=begins.dtype, out=begins[1:])
    neighbours, rows = visits.new_full((taps, groups * GROUP), -1), new(groups * GROUP)
    visited = new(groups * taps)  # of which the last are not read: how many there are is not known
    made = OutputTable(neighbours, rows, begins, visited)
    _C.pointcloud_fill_table_cuda(*made, heavy, places, bits, order, *of)
    return made


def _make_segments(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PairSegments:
    _kept("checked", pairs, n_in, n_out, _check)
    in_index, device, ends = pairs[0], pairs[0].device, pairs[2].tolist()
    length = max(_LEAST_SEGMENT, -(-ends[-1] // (_SEGMENTS * 32)) * 32)
    begins: list[int] = []
    of_tap = [0]
    for begin, end in pairwise(ends):
        begins += range(begin, end, length)
        of_tap.append(len(begins))
    in_rows, out_rows = in_index.new_empty(ends[-1]), in_index.new_empty(ends[-1])
    offsets = _to_gpu(pairs[2], device)
    _C.pointcloud_pair_rows_cuda(in_rows, out_rows, _contiguous(pairs), offsets, n_in, n_out)
    numbers = torch.tensor([*begins, ends[-1], *of_tap], dtype=torch.int64, device="cpu")
    begins_of, first_of = _to_gpu(numbers, device).split([len(begins) + 1, len(of_tap)])
    return PairSegments(in_rows, out_rows, begins_of, first_of)


def _make_lists(pairs: tuple[Any, ...], n_in: int, n_out: int) -> PoolLists:
    """Each output has its pairs in the order of the map."""
    if not _kept("checked", pairs, n_in, n_out, None):
        _kept("checked for pools", pairs, n_in, n_out, partial(_check, repeats=True))
    in_index, ranks, tap_offsets, in_order, _ = _contiguous(pairs)
    places = None
    if len(tap_offsets) > 2:  # the pairs of one tap ascend
        ranks, places = ranks.sort(stable=True)
    rows = in_index.new_empty(len(in_index))
    begins = in_index.new_empty(n_out + 1, dtype=torch.int64)
    _C.pointcloud_list_pairs_cuda(rows, begins, ranks, places, in_index, in_order, n_in)
    return PoolLists(rows, begins)


def _to_gpu(numbers: Tensor, device: torch.device) -> Tensor:
    """Without a wait as far as torch is asked; a copy of many numbers may wait for the stream."""
    return numbers.to(device, non_blocking=True)


def _contiguous(pairs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in pairs)
