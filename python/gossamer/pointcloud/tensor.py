"""SparseTensor: features at the active voxels of a grid."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .coordinates import Coordinates
from .plain import Size


class SparseTensor:
    """Features at the active voxels of a batch of sparse 1-D to 4-D grids.

    Rows keep the order they are given in, so labels and masks stay aligned.

    Parameters
    ----------
    coords : Tensor
        [N, 1 + D] int32, or int64 within its range, D from 1 to 4: batch index first, no row
        twice; see `Coordinates`.
    feats : Tensor
        [N, C], on the same device. A gradient flows through it.
    stride : int or tuple of int
        How many of the scene's cells one cell of this grid is wide. Coordinates are in units of
        it: those of a layer of stride 2 are half as large as its input's.
    spatial_shape : tuple of int, optional
        The grid's size. Without it the grid has no border and coordinates may be negative.
    batch_size : int, optional
        By default the greatest batch index + 1; to be given if the last samples have no voxel.

    Attributes
    ----------
    coordinates : Coordinates
        The voxels with their kernel maps, shared by all tensors at the same voxels.
    feats : Tensor

    Raises
    ------
    TypeError
        If ``coords`` or ``feats`` are no tensors, or coordinates neither int32 nor int64.
    ValueError
        If the numbers of rows differ, rows repeat, or lie outside of the batch or the shape.

    Examples
    --------
    >>> import torch, gossamer.pointcloud as pc
    >>> coords = torch.tensor([[0, 4, 1, 7], [0, 2, 1, 0], [1, 0, 0, 0]], dtype=torch.int32)
    >>> x = pc.SparseTensor(coords, torch.randn(3, 16), spatial_shape=(8, 8, 8))
    >>> (x + 2 * x.replace_feats(x.feats.relu())).dense().shape
    torch.Size([2, 16, 8, 8, 8])
    """

    __slots__ = ("__weakref__", "coordinates", "feats")

    coordinates: Coordinates
    feats: Tensor

    def __init__(
        self,
        coords: Tensor | Coordinates,
        feats: Tensor,
        stride: int | Sequence[int] = 1,
        spatial_shape: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(feats, Tensor):
            raise TypeError(f"SparseTensor: feats are {type(feats).__name__}, expected a Tensor")
        if not isinstance(coords, Coordinates):
            coords = Coordinates(coords, batch_size, spatial_shape, stride)
        elif spatial_shape is not None or batch_size is not None or stride != 1:
            raise ValueError(
                "SparseTensor: Coordinates have a stride, shape and batch size already"
            )
        if feats.dim() != 2 or len(feats) != len(coords):
            raise ValueError(
                f"SparseTensor: feats have shape {list(feats.shape)} and coords "
                f"{list(coords.coords.shape)}, expected [N, C] and [N, 1 + D]"
            )
        if feats.device != coords.device:
            raise ValueError(f"SparseTensor: feats on {feats.device}, coords on {coords.device}")
        self.coordinates = coords
        self.feats = feats

    @classmethod
    def from_dense(cls, x: Tensor, mask: Tensor | None = None) -> SparseTensor:
        """The voxels of a dense tensor at which any channel is not zero.

        Parameters
        ----------
        x : Tensor
            [B, C, *spatial], 1 to 4 spatial axes. A gradient flows through it.
        mask : Tensor, optional
            bool [B, *spatial], the voxels to take instead.
        """
        if not 3 <= x.dim() <= 6:
            raise ValueError(
                f"from_dense: x has shape {list(x.shape)}, expected [B, C, *spatial] with 1 to 4 "
                "spatial axes"
            )
        if mask is None:
            mask = (x != 0).any(1)
        elif mask.dtype != torch.bool or mask.shape != x[:, 0].shape:
            raise ValueError(
                f"from_dense: mask is {mask.dtype} {list(mask.shape)}, expected torch.bool "
                f"{list(x[:, 0].shape)}"
            )
        coords = mask.nonzero().int()
        feats = x.movedim(1, -1)[mask]
        return cls(coords, feats, spatial_shape=tuple(x.shape[2:]), batch_size=len(x))

    @property
    def coords(self) -> Tensor:
        """int32 [N, 1 + D], batch index first."""
        return self.coordinates.coords

    @property
    def stride(self) -> Size:
        return self.coordinates.stride

    @property
    def spatial_shape(self) -> Size | None:
        return self.coordinates.spatial_shape

    @property
    def batch_size(self) -> int:
        return self.coordinates.batch_size

    @property
    def dims(self) -> int:
        """D, the spatial axes."""
        return self.coordinates.dims

    @property
    def channels(self) -> int:
        return self.feats.shape[1]

    @property
    def device(self) -> torch.device:
        return self.feats.device

    @property
    def dtype(self) -> torch.dtype:
        return self.feats.dtype

    def __len__(self) -> int:
        return len(self.feats)

    def replace_feats(self, feats: Tensor) -> SparseTensor:
        """Other features, [N, any C], at the same voxels; shares the coordinates and their maps."""
        return SparseTensor(self.coordinates, feats)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SparseTensor:
        """On another device, or with features of another dtype. Maps stay behind on a device."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        coordinates = self.coordinates if device is None else self.coordinates.to(device)
        return SparseTensor(coordinates, self.feats.to(device=device, dtype=dtype))

    def detach(self) -> SparseTensor:
        """Without the features' history."""
        return self.replace_feats(self.feats.detach())

    def dense(self, spatial_shape: Sequence[int] | None = None) -> Tensor:
        """[B, C, *spatial]: the features, zero elsewhere. A gradient flows through it.

        Parameters
        ----------
        spatial_shape : tuple of int, optional
            By default the tensor's own, or without one the greatest coordinate + 1.

        Raises
        ------
        ValueError
            If a voxel lies outside of the shape.
        """
        low, high = (side[1:] for side in self.coordinates.bounds)
        own = self.spatial_shape or tuple(max(h + 1, 1) for h in high)
        shape = own if spatial_shape is None else tuple(spatial_shape)
        if len(shape) != self.dims:
            raise ValueError(f"dense: spatial_shape is {shape}, the tensor is {self.dims}-D")
        if len(self) and (min(low) < 0 or any(h >= n for h, n in zip(high, shape, strict=True))):
            raise ValueError(
                f"dense: coordinates from {list(low)} to {list(high)} do not fit the shape "
                f"{list(shape)}"
            )
        cells = self.feats.new_zeros((self.batch_size, *shape, self.channels))
        at = tuple(self.coords.long().unbind(1))
        return cells.index_put(at, self.feats).movedim(-1, 1).contiguous()

    def _combined(
        self, other: Any, operation: Callable[[Any, Any], Tensor], name: str
    ) -> SparseTensor:
        coordinates = self.coordinates
        if isinstance(other, SparseTensor):
            coordinates = coordinates.joined(other.coordinates)
            other = aligned_feats(self, other, name)
        feats = operation(self.feats, other)
        if feats.dim() != 2 or len(feats) != len(self):
            raise ValueError(
                f"SparseTensor {name}: feats {list(self.feats.shape)} with {list(other.shape)} "
                f"give {list(feats.shape)}, expected [{len(self)}, C]"
            )
        return SparseTensor(coordinates, feats)

    def __add__(self, other: Any) -> SparseTensor:
        return self._combined(other, operator.add, "+")

    def __sub__(self, other: Any) -> SparseTensor:
        return self._combined(other, operator.sub, "-")

    def __mul__(self, other: Any) -> SparseTensor:
        return self._combined(other, operator.mul, "*")

    def __truediv__(self, other: Any) -> SparseTensor:
        return self._combined(other, operator.truediv, "/")

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> SparseTensor:
        return self._combined(other, lambda mine, theirs: theirs - mine, "-")

    def __rtruediv__(self, other: Any) -> SparseTensor:
        return self._combined(other, lambda mine, theirs: theirs / mine, "/")

    def __neg__(self) -> SparseTensor:
        return self.replace_feats(-self.feats)

    def __repr__(self) -> str:
        shape = None if self.spatial_shape is None else list(self.spatial_shape)
        return (
            f"SparseTensor({len(self)} voxels, {self.channels} channels, {self.dims}-D, batch_size="
            f"{self.batch_size}, spatial_shape={shape}, stride={list(self.stride)}, "
            f"dtype={self.dtype}, device={self.device})"
        )


def check_sparse(op: str, x: Any) -> None:
    """Raise where x is something else."""
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{op}: x is {type(x).__name__}, expected SparseTensor")


def aligned_feats(first: SparseTensor, other: SparseTensor, name: str) -> Tensor:
    """The features of ``other`` in the order of the rows of ``first``, at the same voxels."""
    a, b = first.coordinates, other.coordinates
    if a.is_same(b):
        return other.feats
    if (a.stride, len(a), a.device) == (b.stride, len(b), b.device) and torch.equal(
        a.sorted(), b.sorted()
    ):
        rows = torch.arange(len(a), device=a.device)
        a_rows, b_rows = (rows if c.order is None else c.order.long() for c in (a, b))
        return other.feats[torch.empty_like(rows).scatter_(0, a_rows, b_rows)]
    raise ValueError(
        f"SparseTensor {name}: the coordinates differ: {len(a)} voxels of stride {list(a.stride)} "
        f"on {a.device}, {len(b)} of stride {list(b.stride)} on {b.device}"
    )
