"""Kernel maps of sets of coordinates."""

from __future__ import annotations

import torch

from ..ops.pointcloud_layout import vouch
from . import native
from .coordinate_set import CoordinateSet, outliving
from .kernel_map import KernelMap
from .native import Window


def map_between(
    inputs: CoordinateSet, outputs: CoordinateSet, window: Window, transposed: bool
) -> KernelMap:
    """Of a window that moves over the inputs; or, transposed, over the outputs."""
    walkers, targets = (inputs, outputs) if transposed else (outputs, inputs)
    with outliving():
        walker_of, target_of, ends = native.match(
            walkers.coords, walkers.order, targets.coords, targets.order, targets.bounds, window
        )
    in_index, out_index = (walker_of, target_of) if transposed else (target_of, walker_of)
    made = KernelMap(
        in_index=in_index,
        out_index=out_index,
        tap_offsets=ends,
        in_order=inputs.order,
        out_order=outputs.order,
        n_in=len(inputs),
        n_out=len(outputs),
        kernel_size=window[0],
    )
    if native.on_gpu(inputs.coords):  # which would be waited for to see that the map is right
        for way in (made, made.transposed()):
            vouch(way)
    return made


def map_to_samples(voxels: CoordinateSet) -> KernelMap:
    """One tap that pairs every voxel, in sorted order, with its sample."""
    with outliving():
        in_index = torch.arange(len(voxels), dtype=torch.int32, device=voxels.device)
        out_index = voxels.sorted()[:, 0].clone()
        tap_offsets = torch.tensor([0, len(voxels)], device="cpu")
    made = KernelMap(
        in_index=in_index,
        out_index=out_index,
        tap_offsets=tap_offsets,
        in_order=voxels.order,
        out_order=None,
        n_in=len(voxels),
        n_out=voxels.batch_size,
        kernel_size=(1,) * voxels.dims,
        repeats=True,
    )
    if native.on_gpu(voxels.coords):
        vouch(made)
    return made
