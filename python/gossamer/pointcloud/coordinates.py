"""The coordinates of a sparse tensor, and the kernel maps made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native
from .checks import check_output_shape, sizes
from .coordinate_set import CoordinateSet, History, Key, VoxelSet, merged, outliving
from .kernel_map import KernelMap
from .make_maps import map_between, map_to_samples
from .native import Window
from .plain import Size

RULES = ("dense", "floor", "given")


class Coordinates(CoordinateSet):
    """The voxels of a sparse tensor, in the rows' order, and the kernel maps made of them.

    Parameters
    ----------
    coords : Tensor
        [N, 1 + D] int32, or int64 within its range, D from 1 to 4: the batch index, then the
        spatial coordinates, in any order of the rows. No two rows may be equal.
    batch_size : int, optional
        Samples in the batch, some of which may have no voxel; by default the greatest batch
        index + 1.
    spatial_shape : tuple of int, optional
        The size of the grid. With it coordinates lie in [0, size), and outputs of a convolution
        that the dense one does not have are left out; without it the grid has no border and
        coordinates may be negative.
    stride : int or tuple of int
        How many of the scene's cells one cell of this grid is wide.

    Attributes
    ----------
    coords : Tensor
        int32 [N, 1 + D], contiguous, the rows as given.
    order : Tensor or None
        int32 [N], the row at each rank of the lexicographic order; None if they are sorted.

    Raises
    ------
    TypeError
        If ``coords`` are neither int32 nor int64.
    ValueError
        If rows repeat, lie outside of the batch, of the spatial shape or of int32, or the box
        around them has more cells than 64 bits number.
    """

    __slots__ = ()

    def submanifold(
        self, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
    ) -> KernelMap:
        """The map of a convolution whose outputs are these voxels, cached.

        Odd kernels are centred; an even kernel of size k reaches from -(k - 1) // 2 to k // 2 cells
        (times the dilation).
        """
        kernel = sizes("kernel_size", kernel_size, self.dims, 1)
        dilated = sizes("dilation", dilation, self.dims, 1)
        key = ("submanifold", kernel, dilated)
        if key not in self._set.maps:
            padding = tuple((k - 1) // 2 * d for k, d in zip(kernel, dilated, strict=True))
            ones = (1,) * self.dims
            self._set.maps[key] = map_between(self, self, (kernel, ones, padding, dilated), False)
        return self._set.maps[key]

    def strided(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        rule: str = "dense",
        target: Coordinates | None = None,
    ) -> tuple[Coordinates, KernelMap]:
        """Outputs and map of a strided convolution, cached.

        With a ``target`` that no layer made of the same tensor's voxels as these, the map is made
        in each call, and ``inverse`` does not know of it.

        Input and output of a pair obey ``input = output * stride - padding + tap * dilation``.

        Parameters
        ----------
        rule : {"dense", "floor", "given"}
            Which outputs there are. "dense": every one that the dense convolution computes from
            at least one voxel, so that the active region grows (spconv). "floor":
            ``floor(input / stride)`` of the voxels, whatever the kernel reaches, so that it
            doesn't (MinkowskiEngine). "given": those of ``target``.
        target : Coordinates, optional
            With "given" alone.

        Returns
        -------
        Coordinates
            Sorted, in units of the new stride; the voxels of ``target`` where it was given.
        KernelMap

        Raises
        ------
        TypeError, ValueError
            If a size is no whole number, out of its range or leaves no spatial shape, the rule is
            unknown or does not fit ``target``, or ``target`` has another dimension, batch size or
            device.
        """
        if rule not in RULES:
            raise ValueError(f"pointcloud: rule is {rule!r}, expected one of {', '.join(RULES)}")
        if (target is not None) != (rule == "given"):
            raise ValueError(
                f"pointcloud: rule {rule!r} "
                + ("needs a target" if target is None else "takes no target")
            )
        window = self._window(kernel_size, stride, padding, dilation)
        if target is not None:
            return self._given(target, ("strided", *window), window, transposed=False)
        shape = self._strided_shape(*window, rule)

        width = tuple(a * b for a, b in zip(self.stride, window[1], strict=True))
        made = "floored" if rule == "floor" else "reached"
        return self._child(("strided", *window, rule), made, shape, width, window)

    def transposed(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        target: Coordinates | None = None,
        bounded: bool = True,
    ) -> tuple[Coordinates, KernelMap]:
        """Outputs and map of a transposed convolution, cached.

        Every output that the dense transposed convolution computes from at least one voxel,
        ``output = input * stride - padding + tap * dilation``, or those of ``target`` (as in
        ``strided``).

        Parameters
        ----------
        output_padding : int or tuple of int
            Matters with a spatial shape only: it adds cells at the far border.
        target : Coordinates, optional
            The outputs instead of all that are reached.
        bounded : bool
            Whether outputs outside of the dense convolution's are left out, where this set has a
            spatial shape. False generates all of them, negative ones too, without a shape.
        """
        window = self._window(kernel_size, stride, padding, dilation)
        if target is not None:
            return self._given(target, ("transposed", *window), window, transposed=True)
        extra = sizes("output_padding", output_padding, self.dims, 0)
        shape = None
        if bounded and self.spatial_shape is not None:
            shape = tuple(
                (n - 1) * s - 2 * p + d * (k - 1) + e + 1
                for n, k, s, p, d, e in zip(self.spatial_shape, *window, extra, strict=True)
            )
            check_output_shape(shape, self.spatial_shape, window)
        width = tuple(max(a // b, 1) for a, b in zip(self.stride, window[1], strict=True))

        key = ("transposed", *window, extra, bounded)
        return self._child(key, "spread", shape, width, window)

    def inverse(
        self, kernel_size: int | Sequence[int], stride: int | Sequence[int] | None = None
    ) -> tuple[Coordinates, KernelMap]:
        """Back to the voxels that a convolution made these of, by the same pairs.

        Of several such convolutions the latest with this kernel size, and stride if given, counts.

        Raises
        ------
        ValueError
            If none made these coordinates; what did is said.
        """
        kernel = sizes("kernel_size", kernel_size, self.dims, 1)
        step = None if stride is None else sizes("stride", stride, self.dims, 1)
        member = self._family.index(self._set)
        parents = self._history.get(member, ())
        for parent, key in reversed(parents):
            if key[1] == kernel and step in (None, key[2]):
                return (
                    Coordinates._member(self._family, parent, self._history),
                    self._family[parent].maps[key].transposed(),
                )
        made = [f"{k[0]} with kernel {k[1]}, stride {k[2]}" for _, k in parents]
        raise ValueError(
            f"pointcloud: no convolution with kernel {kernel}"
            + ("" if step is None else f" and stride {step}")
            + f" made these {len(self)} voxels; "
            + (f"known: {'; '.join(made)}" if made else "none is known")
        )

    def samples(self) -> KernelMap:
        """One tap that pairs every voxel, in sorted order, with its sample; cached."""
        found = self._set.maps.get(("samples",))
        if found is not None:
            return found
        made = map_to_samples(self)
        # Of a captured graph the memory is its own, and holds nothing before it is replayed.
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._set.maps["samples",] = made
        return made

    def _window(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
    ) -> Window:
        return (
            sizes("kernel_size", kernel_size, self.dims, 1),
            sizes("stride", stride, self.dims, 1),
            sizes("padding", padding, self.dims, 0),
            sizes("dilation", dilation, self.dims, 1),
        )

    def _strided_shape(
        self, kernel: Size, step: Size, pad: Size, dilated: Size, rule: str
    ) -> Size | None:
        if self.spatial_shape is None:
            return None
        if rule == "floor":
            return tuple(-(-n // s) for n, s in zip(self.spatial_shape, step, strict=True))
        window = (kernel, step, pad, dilated)
        shape = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.spatial_shape, *window, strict=True)
        )
        check_output_shape(shape, self.spatial_shape, window)
        return shape

    def _child(
        self,
        key: Key,
        made: str,
        shape: Size | None,
        width: Size,
        window: Window,
    ) -> tuple[Coordinates, KernelMap]:
        one = self._set
        if key not in one.children:
            with outliving():
                coords = native.outputs(self.coords, one.order, one.box, window, made, shape)
            child = VoxelSet(coords, None, native.bounds(coords), one.batch_size, shape, width)
            self._family.append(child)
            member = self._family.index(child)  # another thread may have added one, too
            outputs = Coordinates._member(self._family, member)
            one.maps[key] = map_between(self, outputs, window, made == "spread")
            one.children[key] = member
        member = one.children[key]
        return self._made(member, key, {}), one.maps[key]

    def _given(
        self,
        target: Coordinates,
        key: Key,
        window: Window,
        transposed: bool,
    ) -> tuple[Coordinates, KernelMap]:
        if (target.dims, target.batch_size, target.device) != (
            self.dims,
            self.batch_size,
            self.device,
        ):
            raise ValueError(
                f"pointcloud: the target is {target.dims}-D, batch {target.batch_size} on "
                f"{target.device}; the input {self.dims}-D, batch {self.batch_size} on "
                f"{self.device}"
            )
        if target._family is not self._family:  # its numbers mean nothing here
            return target, map_between(self, target, window, transposed)
        member = self._family.index(target._set)
        key = (*key, "given", member)
        if key not in self._set.maps:
            self._set.maps[key] = map_between(self, target, window, transposed)
        return self._made(member, key, target._history), self._set.maps[key]

    def _made(self, member: int, key: Key, before: History) -> Coordinates:
        """The set that ``key`` makes of this one, where it is a target with what made that."""
        latest: History = {member: ((self._family.index(self._set), key),)}
        return Coordinates._member(self._family, member, merged(before, self._history, latest))
