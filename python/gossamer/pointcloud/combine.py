"""Several sparse tensors as one: side by side, or scene after scene."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tensor import SparseTensor, aligned_feats, check_sparse


def cat(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """The channels of tensors at the same voxels side by side, in the rows' order of the first.

    Raises
    ------
    ValueError
        If there is no tensor, or the voxels differ.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("cat: no tensors")
    for tensor in tensors:
        check_sparse("cat", tensor)
    first = tensors[0]
    feats = [first.feats, *(aligned_feats(first, other, "cat") for other in tensors[1:])]
    coordinates = first.coordinates
    for other in tensors[1:]:
        coordinates = coordinates.joined(other.coordinates)
    return SparseTensor(coordinates, torch.cat(feats, 1))


def collate(samples: Sequence[SparseTensor | tuple[Tensor, Tensor]]) -> SparseTensor:
    """One batch of several scenes, row after row.

    Parameters
    ----------
    samples : sequence
        Each a `SparseTensor` of any batch size, or a pair of coordinates [N, D] without batch
        index and features [N, C], tensors or NumPy arrays; a scene may be empty. Strides and
        numbers of channels agree.

    Returns
    -------
    SparseTensor
        The spatial shape is the largest along each axis, if every sample has one.

    Raises
    ------
    TypeError
        If a sample is something else.
    ValueError
        If there is no sample, or dimensions, strides, channels or devices differ.
    """
    scenes = [s if isinstance(s, SparseTensor) else _scene(i, s) for i, s in enumerate(samples)]
    if not scenes:
        raise ValueError("collate: no samples")
    first = scenes[0]
    expected = (first.dims, first.stride, first.channels, first.device, first.dtype)
    coords, shapes, before = [], [], 0
    for i, scene in enumerate(scenes):
        found = (scene.dims, scene.stride, scene.channels, scene.device, scene.dtype)
        if found != expected:
            raise ValueError(
                f"collate: dimensions, stride, channels, device and dtype are {found} in sample "
                f"{i}, {expected} in sample 0"
            )
        shift = scene.coords.new_tensor([before] + [0] * scene.dims)
        coords.append(scene.coords + shift)
        shapes.append(scene.spatial_shape)
        before += scene.batch_size
    bounded = [shape for shape in shapes if shape is not None]
    return SparseTensor(
        torch.cat(coords),
        torch.cat([scene.feats for scene in scenes]),
        stride=first.stride,
        spatial_shape=tuple(map(max, *bounded, bounded[0]))
        if len(bounded) == len(shapes)
        else None,
        batch_size=before,
    )


def _scene(i: int, sample: tuple[Tensor, Tensor]) -> SparseTensor:
    try:
        coords, feats = map(torch.as_tensor, sample)
    except (TypeError, ValueError):
        raise TypeError(
            f"collate: sample {i} is {_kinds(sample)}, expected a SparseTensor or a pair of "
            "coordinates and features"
        ) from None
    if coords.dim() != 2:
        raise ValueError(
            f"collate: coordinates of sample {i} have shape {list(coords.shape)}, expected [N, D]"
        )
    batch = coords.new_zeros((len(coords), 1))
    return SparseTensor(torch.cat([batch, coords], 1), feats, batch_size=1)


def _kinds(sample: object) -> str:
    if isinstance(sample, (tuple, list)):
        return f"{type(sample).__name__} of {', '.join(type(each).__name__ for each in sample)}"
    return type(sample).__name__
