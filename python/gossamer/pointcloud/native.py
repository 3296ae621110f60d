"""Coordinate sets and kernel maps by the native module on the CPU, by plain torch elsewhere; on a
GPU outputs and pairs by kernels of its own.

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
from . import plain
from .plain import Box, Size

Window = tuple[Size, Size, Size, Size]  # kernel size, stride, padding, dilation


def bounds(coords: Tensor) -> Box:
    if coords.device.type != "cpu":
        return plain.bounds(coords)
    box: Box = _C.pointcloud_bounds(coords, torch.get_num_threads())
    return box


def sort(coords: Tensor, box: Box) -> tuple[Tensor | None, int, int]:
    if coords.device.type != "cpu":
        return plain.sort(coords, box)
    order = torch.empty(len(coords), dtype=torch.int32, device="cpu")
    ascending, repeated, row = _C.pointcloud_sort(coords, box, order, torch.get_num_threads())
    return (None if ascending else order), repeated, row


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
    of_point: Tensor  # int64 [N]
    order: Tensor | None  # int32 [N], the points by voxel, then by row; None if they are so
    begins: Tensor  # int64 [M + 1], where each voxel's points begin in the order


def voxels(points: Tensor, batch: Tensor | None, sizes: tuple[float, ...]) -> Voxels:
    """float32 or float64 points in cells of these sizes."""
    if points.device.type != "cpu":
        return Voxels(*plain.voxels(points, batch, sizes))
    threads = torch.get_num_threads()
    cells = torch.empty((len(points), points.shape[1] + 1), dtype=torch.int32, device="cpu")
    _C.pointcloud_quantize(points, batch, sizes, cells, threads)
    order, _, _ = sort(cells, bounds(cells))
    found = _C.PointcloudVoxels(cells, order, threads)
    coords = torch.empty((len(found), cells.shape[1]), dtype=torch.int32, device="cpu")
    of_point = torch.empty(len(points), dtype=torch.int64, device="cpu")
    begins = torch.empty(len(found) + 1, dtype=torch.int64, device="cpu")
    found.write(coords, of_point, begins)
    return Voxels(coords, of_point, order, begins)


def reduce(features: Tensor, of: Voxels, how: str) -> Tensor:
    """[M, C]: a voxel's "mean", "first" or "max" of its points' features."""
    if features.device.type != "cpu":
        return plain.reduce(features, of.of_point, len(of.coords), how)
    out = features.new_empty((len(of.coords), features.shape[1]))
    _C.pointcloud_reduce(features, of.order, of.begins, how, out, torch.get_num_threads())
    return out
