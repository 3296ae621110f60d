"""Convolutions over voxels for the kernels of a GPU: operands, and what should come out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import integers
from emulator import CSRC, HERE, Emulator, KernelLibrary
from fragment_gemm import ACTIVATION_CODES, DTYPE_CODES
from gossamer import reference
from gossamer.ops.pointcloud_layout import OutputTable
from gossamer.pointcloud import KernelMap
from pointcloud_cases import PointcloudCase, tensors_of
from torch import Tensor
from voxel_layouts import plain_segments, plain_table

POINTCLOUD = HERE / "kernels" / "pointcloud.cu"
UNITS = ("conv_fma", "conv_grouped", "layout", "maps", "pool", "voxelize", "weight_grad")
TILES = ((128, 128), (128, 64), (64, 32))  # rows and outputs of kConvTiles, in its order
MARGIN = 8  # elements around x, dy and the weights: 16 bytes of the smallest


def build(emulator: Emulator) -> KernelLibrary:
    more = (CSRC / "pointcloud" / f"{name}.cu" for name in UNITS)
    return emulator.build(POINTCLOUD, *more)


@dataclass
class VoxelConv:
    """A convolution with its operands, of whole numbers, so that every sum is exact."""

    map: KernelMap
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    activation: str | None = None
    groups: int = 1

    @classmethod
    def of(cls, case: PointcloudCase, dtype: torch.dtype, bias: bool = True) -> VoxelConv:
        map = case.map()

        def numbers(*shape: int) -> Tensor:
            return integers(*shape, limit=3, dtype=dtype)

        weight = numbers(map.taps, case.c_in // case.groups, case.c_out)
        given = numbers(case.c_out) if bias else None
        x, dy = numbers(map.n_in, case.c_in), numbers(map.n_out, case.c_out)
        return cls(map, x, weight, given, dy, groups=case.groups)

    def table(self) -> OutputTable:
        return plain_table(self.map)

    def expected(self) -> Tensor:
        """In float64."""
        bias = None if self.bias is None else self.bias.double()
        rest = (*tensors_of(self.map), self.map.n_out, self.groups, self.activation)
        return reference.pointcloud_conv(self.x.double(), self.weight.double(), bias, *rest)

    def expected_gradient(self) -> Tensor:
        rest = (*tensors_of(self.map), self.groups)
        return reference.pointcloud_conv_weight_grad(self.dy.double(), self.x.double(), *rest)

    def run(
        self,
        library: KernelLibrary,
        tile: int = -1,
        margin: int = MARGIN,
        table: OutputTable | None = None,
    ) -> Tensor:
        """The kernel's result. Around rows of x lie NaNs, around y something that must stay."""
        table = self.table() if table is None else table
        groups = len(table.begins) - 1
        taps, group_in, c_out = self.weight.shape
        rows, stride = _among_nans(margin, self.x)
        sizes = [taps, self.map.n_in, self.map.n_out, groups, len(table.visited)]
        out, y = _result(margin, self.map.n_out, c_out, dtype=self.x.dtype)
        library.call(
            "conv",
            *(
                DTYPE_CODES[self.x.dtype],
                [*sizes, group_in * self.groups, c_out, stride, self.groups],
                *table,
            ),
            *(rows, _after(margin, self.weight), 0 if self.bias is None else self.bias),
            *(ACTIVATION_CODES[self.activation], y, tile),
        )
        return _whole(margin, out, y)

    def gradient(self, library: KernelLibrary, margin: int = MARGIN) -> Tensor:
        """The same of the gradient of the weights."""
        taps, group_in, c_out = self.weight.shape
        segments = plain_segments(self.map)
        (x, x_stride), (dy, dy_stride) = _among_nans(margin, self.x), _among_nans(margin, self.dy)
        sizes = [taps, self.map.n_in, self.map.n_out, self.map.pairs, len(segments.begins) - 1]
        partial = torch.full((sizes[-1], group_in, c_out), torch.nan)
        out, dw = _result(margin, taps, group_in, c_out, dtype=self.x.dtype)
        sizes += [group_in * self.groups, c_out, x_stride, dy_stride, self.groups]
        library.call("weight_grad", DTYPE_CODES[x.dtype], sizes, *segments, x, dy, partial, dw)
        return _whole(margin, out, dw)


def _after(margin: int, t: Tensor) -> Tensor:
    """The same elements in memory that ends with them, and has NaNs before."""
    memory = torch.full((margin + t.numel(),), torch.nan).to(t.dtype)
    memory[margin:] = t.flatten()
    return memory[margin:]


def _among_nans(margin: int, t: Tensor) -> tuple[Tensor, int]:
    """The same rows, further apart, and by how many elements."""
    memory = torch.full((len(t), t.shape[1] + margin), torch.nan).to(t.dtype)
    memory[:, margin:] = t
    return memory.flatten()[margin:], memory.shape[1]


def _result(margin: int, *shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.full((torch.Size(shape).numel() + 2 * margin,), 77.0, dtype=dtype)
    return out, out[margin : len(out) - margin].view(shape)


def _whole(margin: int, out: Tensor, result: Tensor) -> Tensor:
    assert bool((out[:margin] == 77).all())
    assert bool((out[len(out) - margin :] == 77).all())
    return result
