"""Coordinate sets and kernel maps by the native module, for a CPU and for a GPU with kernels of its
own, and by plain torch elsewhere.

The functions of ``plain``, which say what each of them means.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._cuda_module import has_kernels
from ..ops.pointcloud_layout import PoolLists
from ..ops.pointcloud_pool import reduce_lists
from . import plain
from .plain import Box, Size

Window = tuple[Size, Size, Size, Size]  # kernel size, stride, padding, dilation


def bounds(coords: Tensor) -> Box:
    if coords.device.type != "cpu":
        return plain.bounds(coords)
    box: Box = _C.pointcloud_bounds(coords, torch.get_num_threads())
    return box


def sort(coords: Tensor, box: Box) -> tuple[Tensor | None, int, int]:
    if on_gpu(coords) and len(coords) > 1:
        return _sort_cuda(coords, box)
    if coords.device.type != "cpu":
        return plain.sort(coords, box)
    order = torch.empty(len(coords), dtype=torch.int32, device="cpu")
    ascending, repeated, row = _C.pointcloud_sort(coords, box, order, torch.get_num_threads())
    return (None if ascending else order), repeated, row


def _by_keys(coords: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """int64, the rows' keys in ascending order and the row of each; equal ones by their row."""
    keys = coords.new_empty((len(coords),), dtype=torch.int64)
    _C.pointcloud_keys_cuda(keys, coords, box)
    return keys.sort(stable=True)


def _sort_cuda(coords: Tensor, box: Box) -> tuple[Tensor | None, int, int]:
    """Waits for the GPU once."""
    keys, order = _by_keys(coords, box)
    rows, found = coords.new_empty((len(coords),)), keys.new_empty((3,))
    _C.pointcloud_inspect_cuda(rows, found, keys, order)
    repeated, least, descents = found.tolist()
    if repeated:
        return None, repeated, len(coords) - least
    return (rows if descents else None), 0, 0


def match(
    walkers: Tensor,
    walker_order: Tensor | None,
    targets: Tensor,
    target_order: Tensor | None,
    box: Box,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``plain.match`` of the rows in their orders."""
    if on_gpu(walkers):
        return _match_cuda((walkers, walker_order, targets, target_order), box, window)
    if walkers.device.type != "cpu":
        sides = _sorted(walkers, walker_order), _sorted(targets, target_order)
        return plain.match(*sides, box, *window)
    threads = torch.get_num_threads()
    pairs = _C.PointcloudPairs(walkers, walker_order, targets, target_order, box, window, threads)
    walker_of, target_of = (
        torch.empty(len(pairs), dtype=torch.int32, device="cpu") for _ in range(2)
    )
    tap_offsets = torch.empty(prod(window[0]) + 1, dtype=torch.int64, device="cpu")
    pairs.write(walker_of, target_of, tap_offsets, threads)
    return walker_of, target_of, tap_offsets


def on_gpu(coords: Tensor) -> bool:
    return coords.device.type == "cuda" and has_kernels(coords.device)


def _match_cuda(
    sides: tuple[Tensor, Tensor | None, Tensor, Tensor | None], box: Box, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Waits for the GPU once: for how many pairs each tap has."""
    walkers, _, targets, _ = sides
    taps, chunks = prod(window[0]), -(-len(walkers) // _C.pointcloud_search_walkers)
    keys = tuple(t.new_empty((len(t),), dtype=torch.int64) for t in (walkers, targets))
    counts = walkers.new_empty((taps * chunks,))
    _C.pointcloud_count_pairs_cuda(counts, keys[0], keys[1], *sides, box, window)
    ends = counts.cumsum(0)
    of_tap = ends.view(taps, chunks)[:, -1] if chunks else ends.new_zeros(taps)
    tap_offsets = F.pad(of_tap.cpu(), (1, 0))
    walker_of, target_of = (walkers.new_empty((int(tap_offsets[-1]),)) for _ in range(2))
    _C.pointcloud_write_pairs_cuda(walker_of, target_of, ends, keys[0], keys[1], box, window)
    return walker_of, target_of, tap_offsets


def outputs(
    coords: Tensor, order: Tensor | None, box: Box, window: Window, rule: str, shape: Size | None
) -> Tensor:
    """int32 [M, 1 + D], sorted: the outputs "reached", "floored" or "spread" as in ``plain``."""
    if on_gpu(coords):
        return _outputs_cuda(coords, box, window, rule, shape)
    if coords.device.type != "cpu":
        return plain.outputs(coords, *window, rule, shape)
    made = _C.PointcloudOutputs(coords, order, box, window, rule, shape, torch.get_num_threads())
    out = torch.empty((len(made), coords.shape[1]), dtype=torch.int32, device="cpu")
    made.write(out)
    return out


# Cells that an input may cost to mark: clearing and reading their bytes is less work than sorting
# the input's outputs. torch lists the marks of fewer than 2**31.
_MOST_CELLS, _ALL_CELLS = 256, 2**31 - 1


def _outputs_cuda(
    coords: Tensor, box: Box, window: Window, rule: str, shape: Size | None
) -> Tensor:
    """Waits for the GPU once, for how many there are; twice where keys are sorted."""
    layer = (box, window, rule, shape)
    cells = _C.pointcloud_count_cells(*layer)
    if len(coords) == 0 or cells == 0:
        return coords.new_empty((0, coords.shape[1]))
    if cells >= 2**63:  # torch sorts signed numbers
        return plain.outputs(coords, *window, rule, shape)
    if cells <= min(_MOST_CELLS * len(coords), _ALL_CELLS):
        found = torch.zeros(cells, dtype=torch.uint8, device=coords.device)
        _C.pointcloud_find_outputs_cuda(found, coords, *layer)
        keys = found.nonzero().squeeze(1)
    else:
        taps = 1 if rule == "floored" else prod(window[0])
        found = coords.new_empty((taps * len(coords),), dtype=torch.int64)
        _C.pointcloud_find_outputs_cuda(found, coords, *layer)
        keys = found.unique()
        keys = keys[int(keys[0] < 0) :]  # what makes no output
    out = coords.new_empty((len(keys), coords.shape[1]))
    _C.pointcloud_cells_cuda(out, keys.contiguous(), *layer)
    return out


def _sorted(coords: Tensor, order: Tensor | None) -> Tensor:
    return coords if order is None else coords[order.long()]


@dataclass(frozen=True, eq=False)
class Voxels:
    """Points by the voxel they lie in."""

    coords: Tensor  # int32 [M, 1 + D], ascending
    box: Box  # that holds them
    of_point: Tensor  # int64 [N]
    order: Tensor | None  # int32 [N], the points by voxel, then by row; None if they are so
    begins: Tensor  # int64 [M + 1], where each voxel's points begin in the order


def voxels(points: Tensor, batch: Tensor | None, sizes: tuple[float, ...]) -> Voxels:
    """float32 or float64 points in cells of these sizes."""
    if on_gpu(points):
        return _voxels_cuda(points, batch, sizes)
    if points.device.type != "cpu":
        coords, *rest = plain.voxels(points, batch, sizes)
        return Voxels(coords, bounds(coords), *rest)
    threads = torch.get_num_threads()
    cells = torch.empty((len(points), points.shape[1] + 1), dtype=torch.int32, device="cpu")
    _C.pointcloud_quantize(points, batch, sizes, cells, threads)
    box = bounds(cells)
    order, _, _ = sort(cells, box)
    found = _C.PointcloudVoxels(cells, order, threads)
    coords = torch.empty((len(found), cells.shape[1]), dtype=torch.int32, device="cpu")
    of_point = torch.empty(len(points), dtype=torch.int64, device="cpu")
    begins = torch.empty(len(found) + 1, dtype=torch.int64, device="cpu")
    found.write(coords, of_point, begins)
    return Voxels(coords, box, of_point, order, begins)


def _voxels_cuda(points: Tensor, batch: Tensor | None, sizes: tuple[float, ...]) -> Voxels:
    """Waits for the GPU twice: for the box of the cells, and for how many of them there are."""
    count, columns = len(points), points.shape[1] + 1
    cells = points.new_empty((count, columns), dtype=torch.int32)
    if count == 0:
        none = points.new_zeros(1, dtype=torch.int64)
        return Voxels(cells, bounds(cells), none[:0], None, none)
    refused = points.new_empty(1, dtype=torch.int64)
    _C.pointcloud_quantize_cuda(cells, refused, points, batch, sizes)
    found = torch.cat([refused, *cells.aminmax(dim=0)]).tolist()
    if found[0]:
        plain.refuse_point(points, count - found[0])
    box = tuple(found[1 : 1 + columns]), tuple(found[1 + columns :])
    keys, order = _by_keys(cells, box)
    voxels_to = F.pad((keys[1:] != keys[:-1]).cumsum(0), (1, 0))
    voxels, new = int(voxels_to[-1]) + 1, points.new_empty
    coords, rows = cells.new_empty((voxels, columns)), cells.new_empty(count)
    of_point, begins = (new(n, dtype=torch.int64) for n in (count, voxels + 1))
    _C.pointcloud_voxels_cuda(coords, of_point, rows, begins, cells, order, voxels_to)
    return Voxels(coords, box, of_point, rows, begins)


def reduce(features: Tensor, of: Voxels, how: str) -> Tensor:
    """[M, C]: a voxel's "mean", "first" or "max" of its points' features."""
    if on_gpu(features):
        return _reduce_cuda(features, of, how)
    if features.device.type != "cpu":
        return plain.reduce(features, of.of_point, len(of.coords), how)
    out = features.new_empty((len(of.coords), features.shape[1]))
    _C.pointcloud_reduce(features, of.order, of.begins, how, out, torch.get_num_threads())
    return out


def _reduce_cuda(features: Tensor, of: Voxels, how: str) -> Tensor:
    out = features.new_empty((len(of.coords), features.shape[1]))
    if len(out) == 0 or of.order is None:
        return out
    if how == "first":
        return features[of.order[of.begins[:-1]]]
    winner = torch.empty_like(out, dtype=torch.int32) if how == "max" else None
    reduce_lists(out, features, PoolLists(of.order, of.begins), how, winner=winner)
    return out
