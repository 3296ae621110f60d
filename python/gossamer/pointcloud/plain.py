"""Coordinate sets and kernel maps in plain torch: what the native ones mean, on any device.

Every function takes and returns coordinates as int32 [N, 1 + D], batch first. A 64-bit key counts
the cells of the box that the coordinates span, the last axis fastest, from -2**63.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]
Box = tuple[Size, Size]  # the least and the greatest of each column


def bounds(coords: Tensor) -> Box:
    """The box that holds the coordinates; of none at all, one cell at 0."""
    if len(coords) == 0:
        zero = (0,) * coords.shape[1]
        return zero, zero
    low, high = torch.stack(coords.aminmax(dim=0)).tolist()  # a GPU is waited for once
    return tuple(low), tuple(high)


def check_keys_fit(box: Box) -> None:
    """Raise where the cells of the box cannot be numbered in 64 bits."""
    extent = [high - low + 1 for low, high in zip(*box, strict=True)]
    if prod(extent) >= 2**64:
        raise ValueError(
            f"pointcloud: coordinates span {extent} values (batch first), {prod(extent):.3g} cells "
            f"with the kernel's reach, and 64-bit keys number at most {2**64:.3g}"
        )


def keys(coords: Tensor, box: Box) -> Tensor:
    """int64 [N]: ascending where the coordinates, all of them in the box, do lexicographically."""
    key = torch.full((len(coords),), -(2**63), dtype=torch.int64, device=coords.device)
    cells = 1
    for axis in reversed(range(coords.shape[1])):
        key += (coords[:, axis].long() - box[0][axis]) * cells
        cells *= box[1][axis] - box[0][axis] + 1
        if cells >= 2**63:  # only where it is of no use any more: the axes before have one value
            cells = 0
    return key


def sort(coords: Tensor, box: Box) -> tuple[Tensor | None, int, int]:
    """The rows in ascending order, None if they are already; the repeated rows, the first of them.

    A row is repeated if an earlier one has its coordinates.
    """
    check_keys_fit(box)
    if len(coords) < 2:
        return None, 0, 0
    key, order = keys(coords, box).sort(stable=True)
    repeats = key[1:] == key[:-1]
    first = order[1:].where(repeats, len(coords)).amin()
    ascending = (order[1:] > order[:-1]).all()
    # A GPU is waited for once.
    found = torch.stack([repeats.sum(), first, ascending.long()]).tolist()
    if found[0]:
        return None, found[0], found[1]
    return (None if found[2] else order.int()), 0, 0


def _taps(kernel_size: Size, dilation: Size) -> Iterator[Size]:
    for tap in product(*map(range, kernel_size)):
        yield tuple(t * d for t, d in zip(tap, dilation, strict=True))


def _shift(coords: Tensor, scale: Size, offset: list[int]) -> Tensor:
    """int64: each spatial coordinate by its scale, plus its offset."""
    factor = torch.tensor([1, *scale], device=coords.device)
    return coords.long() * factor + torch.tensor([0, *offset], device=coords.device)


def match(
    walkers: Tensor,
    targets: Tensor,
    box: Box,
    kernel_size: Size,
    stride: Size,
    padding: Size,
    dilation: Size,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs with target = walker * stride - padding + tap * dilation, both sides sorted.

    Returns the walkers and the targets of the pairs, int32 [P] tap-major, and where each tap
    begins, int64 [T + 1] on the CPU. ``box`` is that of the targets.
    """
    low, high = (torch.tensor(side, device=walkers.device) for side in box)
    target_keys = keys(targets, box)
    walker_of, target_of, ends = [], [], [0]
    for tap in _taps(kernel_size, dilation):
        wanted = _shift(walkers, stride, [t - p for t, p in zip(tap, padding, strict=True)])
        inside = ((wanted >= low) & (wanted <= high)).all(1).nonzero().squeeze(1)
        wanted_keys = keys(wanted[inside], box)
        at = torch.searchsorted(target_keys, wanted_keys)
        found = at < len(targets)
        found[found.clone()] = target_keys[at[found]] == wanted_keys[found]
        walker_of.append(inside[found].int())
        target_of.append(at[found].int())
        ends.append(ends[-1] + len(walker_of[-1]))
    return torch.cat(walker_of), torch.cat(target_of), torch.tensor(ends, device="cpu")


def _unique(coords: Tensor, shape: Size | None) -> Tensor:
    """Sorted, once each, and inside of the shape."""
    if shape is not None:
        spatial = coords[:, 1:]
        inside = (spatial >= 0) & (spatial < torch.tensor(shape, device=coords.device))
        coords = coords[inside.all(1)]
    if len(coords) and not -(2**31) <= int(coords.min()) <= int(coords.max()) < 2**31:
        raise ValueError(
            f"pointcloud: output coordinates from {int(coords.min())} to {int(coords.max())} "
            "leave the range of int32"
        )
    coords = coords.int()
    box = bounds(coords)
    check_keys_fit(box)
    key, order = keys(coords, box).sort()
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return coords[order[first]]


def outputs(
    coords: Tensor,
    kernel_size: Size,
    stride: Size,
    padding: Size,
    dilation: Size,
    rule: str,
    shape: Size | None,
) -> Tensor:
    """What a layer makes of its inputs, sorted, and inside of the shape.

    "reached": every output with input = output * stride - padding + tap * dilation for some tap;
    "spread": every input * stride - padding + tap * dilation, a transposed convolution's;
    "floored": every floor(input / stride).
    """
    step = torch.tensor([1, *stride], device=coords.device)
    if rule == "floored":
        return _unique(coords.long().div(step, rounding_mode="floor"), shape)
    made, ones = [], (1,) * len(stride)
    for tap in _taps(kernel_size, dilation):
        ahead = [t - p for t, p in zip(tap, padding, strict=True)]
        if rule == "spread":
            made.append(_shift(coords, stride, ahead))
        else:
            scaled = _shift(coords, ones, [-a for a in ahead])
            scaled = scaled[(scaled % step == 0).all(1)]
            made.append(scaled.div(step, rounding_mode="floor"))
    return _unique(torch.cat(made), shape)


def refuse_point(points: Tensor, row: int) -> NoReturn:
    raise ValueError(
        f"voxelize: point {row}, {points[row].tolist()}, is not finite or lies in no voxel "
        "that int32 numbers"
    )


def voxels(
    points: Tensor, batch: Tensor | None, sizes: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates of the voxels, each point's voxel, the points by voxel, where each begins."""
    cells = (
        points.double() / torch.tensor(sizes, dtype=torch.float64, device=points.device)
    ).floor()
    refused = ~((cells >= -(2**31)) & (cells < 2**31)).all(1)
    if bool(refused.any()):
        refuse_point(points, int(refused.nonzero()[0]))
    sample = points.new_zeros(len(points)) if batch is None else batch
    rows = torch.cat([sample.unsqueeze(1).int(), cells.int()], 1)
    coords, of_point = torch.unique(rows, dim=0, return_inverse=True)
    begins = torch.bincount(of_point, minlength=len(coords)).cumsum(0)
    order = of_point.argsort(stable=True).int()
    return coords, of_point, order, torch.cat([begins.new_zeros(1), begins])


def reduce(features: Tensor, of_point: Tensor, voxels: int, how: str) -> Tensor:
    """[voxels, C]: the mean, the first or the maximum over each voxel's points."""
    at = of_point.unsqueeze(1).expand_as(features)
    exact = features.double()
    out = exact.new_zeros(voxels, features.shape[1])
    if how == "first":
        rows = torch.arange(len(at), device=at.device)
        first = rows.new_zeros(voxels).scatter_reduce_(
            0, of_point, rows, "amin", include_self=False
        )
        return features[first]
    if how == "max" or voxels == 0:
        return out.scatter_reduce_(0, at, exact, "amax", include_self=False).to(features.dtype)
    # Each voxel's points in their order, unlike what scatter_reduce_ sums on a GPU.
    of_point, order = of_point.sort(stable=True)
    bags = torch.searchsorted(of_point, torch.arange(voxels, device=order.device))
    return F.embedding_bag(order, exact, bags, mode="mean").to(features.dtype)
