"""A set of coordinates: checked, and sorted once.

Tensors that descend from one another share a family: the list of every set of coordinates made so
far. Sets and the maps between them refer to each other by number in it and not by reference, so
that nothing here is a cycle, and all of it is freed with the last tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native, plain
from .checks import check_inside, checked_batch_size, int32_coords, sizes
from .kernel_map import KernelMap
from .plain import Size

if TYPE_CHECKING:
    from typing_extensions import Self

Key = tuple[Any, ...]
# Of each set on the way to a tensor's the sets it was made of, and by which maps, the latest last.
# It is the tensor's own: what other layers make of the same voxels is no part of it.
History = dict[int, tuple[tuple[int, Key], ...]]


def merged(*histories: History) -> History:
    """What any of them tells, the latest last."""
    result: History = {}
    for history in histories:
        for member, parents in history.items():
            older = (one for one in result.get(member, ()) if one not in parents)
            result[member] = (*older, *parents)
    return result


@contextmanager
def outliving() -> Iterator[None]:
    """For tensors that later calls read, too.

    No backward could save those of inference mode, and those of a functorch transform have no
    memory of their own.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def unwrapped(t: Any) -> Any:
    """A tensor for ``outliving``: the content of one that functorch differentiates."""
    while isinstance(t, Tensor) and torch._C._functorch.is_gradtrackingtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


@dataclass(eq=False)
class VoxelSet:
    """One set of coordinates: what ``Coordinates`` shows of it, and what was made from it."""

    coords: Tensor
    order: Tensor | None
    box: plain.Box
    batch_size: int
    spatial_shape: Size | None
    stride: Size
    maps: dict[Key, KernelMap] = field(default_factory=dict)
    children: dict[Key, int] = field(default_factory=dict)  # by what made them, as maps

    @classmethod
    def checked(
        cls,
        coords: Tensor,
        box: plain.Box,
        batch_size: int | None,
        spatial_shape: Sequence[int] | None,
        stride: int | Sequence[int] = 1,
    ) -> VoxelSet:
        """Inside of batch and shape; as if the rows ascended."""
        dims = coords.shape[1] - 1
        shape = None if spatial_shape is None else sizes("spatial_shape", spatial_shape, dims, 1)
        batch_size = checked_batch_size(coords, box, batch_size)
        if shape is not None:
            check_inside(coords, box, shape)
        return cls(coords, None, box, batch_size, shape, sizes("stride", stride, dims, 1))


class CoordinateSet:
    """What `Coordinates` are before there are kernel maps."""

    __slots__ = ("__weakref__", "_family", "_history", "_set")

    def __init__(
        self,
        coords: Tensor,
        batch_size: int | None = None,
        spatial_shape: Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
    ) -> None:
        with outliving():
            given = unwrapped(coords)
            coords = int32_coords(given)
            # Maps outlive what the caller writes into theirs.
            if coords.is_inference() or coords.data_ptr() == given.data_ptr():
                coords = coords.clone()
            box = native.bounds(coords)
            one = VoxelSet.checked(coords, box, batch_size, spatial_shape, stride)
            one.order, repeated, row = native.sort(coords, box)
        if repeated:
            raise ValueError(
                f"pointcloud: {repeated} of {len(coords)} coordinates repeat an earlier row, the "
                f"first in row {row}: {coords[row].tolist()}; voxelize() merges points of a voxel"
            )
        self._family, self._set = [one], one
        self._history: History = {}

    @classmethod
    def of_sorted(
        cls,
        coords: Tensor,
        box: plain.Box,
        batch_size: int | None = None,
        spatial_shape: Sequence[int] | None = None,
    ) -> Self:
        """Of ascending int32 rows of which none repeats, as `voxelize` makes them, in their box."""
        return cls._member([VoxelSet.checked(coords, box, batch_size, spatial_shape)], 0)

    @classmethod
    def _member(cls, family: list[VoxelSet], member: int, history: History | None = None) -> Self:
        self = object.__new__(cls)
        self._family, self._set, self._history = family, family[member], history or {}
        return self

    @property
    def coords(self) -> Tensor:
        return self._set.coords

    @property
    def order(self) -> Tensor | None:
        return self._set.order

    @property
    def batch_size(self) -> int:
        return self._set.batch_size

    @property
    def spatial_shape(self) -> Size | None:
        return self._set.spatial_shape

    @property
    def stride(self) -> Size:
        return self._set.stride

    @property
    def dims(self) -> int:
        """D, the spatial axes."""
        return self._set.coords.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self._set.coords.device

    @property
    def bounds(self) -> plain.Box:
        """The least and the greatest of each column, the batch index first."""
        return self._set.box

    def __len__(self) -> int:
        return len(self._set.coords)

    def __repr__(self) -> str:
        shape = (
            "unbounded" if self.spatial_shape is None else "x".join(map(str, self.spatial_shape))
        )
        return (
            f"Coordinates({len(self)} voxels, {self.dims}-D, batch {self.batch_size}, {shape}, "
            f"stride {self.stride})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Checked again where it arrives, and without the maps, which are quickly made again.
        return type(self), (self.coords, self.batch_size, self.spatial_shape, self.stride)

    def to(self, device: torch.device | str) -> Self:
        """The same voxels on another device, without the maps; itself if it is there."""
        one = self._set
        with outliving():
            coords = one.coords.to(device)
            order = None if one.order is None else one.order.to(device)
        if coords is one.coords:
            return self
        moved = VoxelSet(coords, order, one.box, one.batch_size, one.spatial_shape, one.stride)
        return type(self)._member([moved], 0)

    def joined(self, other: Self) -> Self:
        """These voxels, made in the ways of another tensor, too."""
        if other._family is not self._family or other._history == self._history:
            return self
        history = merged(other._history, self._history)
        return self._member(self._family, self._family.index(self._set), history)

    def sorted(self) -> Tensor:
        """int32 [N, 1 + D], the rows in lexicographic order."""
        return self.coords if self.order is None else self.coords[self.order.long()]

    def is_same(self, other: CoordinateSet) -> bool:
        """Whether the rows of both are the same voxels of the same grid, in the same order."""
        return self._set is other._set or (
            self.batch_size == other.batch_size
            and self.spatial_shape == other.spatial_shape
            and self.stride == other.stride
            and self.device == other.device
            and torch.equal(self.coords, other.coords)
        )
