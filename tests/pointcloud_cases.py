"""Kernel maps and channels, by what a convolution over a point cloud has to get right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from cases import SumOracle, one_thread
from gossamer import reference
from gossamer.pointcloud import KernelMap
from torch import Tensor


def drawn_map(
    kernel_size: tuple[int, ...], n_in: int, n_out: int, filled: float, shuffled: bool = True
) -> KernelMap:
    """Each tap pairs a drawn share of the voxels; some taps are empty, one is as full as can be."""
    taps = math.prod(kernel_size)
    parts_in, parts_out, ends = [], [], [0]
    for tap in range(taps):
        share = 1.0 if tap == taps // 2 else 0.0 if tap % 5 == 3 else filled
        pairs = int(share * min(n_in, n_out))
        parts_in.append(torch.randperm(n_in)[:pairs].sort().values.int())
        parts_out.append(torch.randperm(n_out)[:pairs].sort().values.int())
        ends.append(ends[-1] + pairs)
    orders = [torch.randperm(n).int() if shuffled else None for n in (n_in, n_out)]
    return KernelMap(
        torch.cat(parts_in),
        torch.cat(parts_out),
        torch.tensor(ends, device="cpu"),
        orders[0],
        orders[1],
        n_in,
        n_out,
        kernel_size,
    )


def tensors_of(map: KernelMap) -> tuple[Tensor | None, ...]:
    """As the ops take them."""
    return map.in_index, map.out_index, map.tap_offsets, map.in_order, map.out_order


@dataclass(frozen=True)
class PointcloudCase:
    kernel_size: tuple[int, ...]
    n_in: int
    n_out: int
    filled: float
    c_in: int
    c_out: int
    groups: int = 1

    def __str__(self) -> str:
        size = "x".join(map(str, self.kernel_size))
        groups = f"g{self.groups}" if self.groups > 1 else ""
        return f"{size}-{self.n_in}to{self.n_out}-{self.c_in}x{self.c_out}{groups}"

    def map(self, shuffled: bool = True) -> KernelMap:
        return drawn_map(self.kernel_size, self.n_in, self.n_out, self.filled, shuffled)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """feats, weight and bias."""
        taps = math.prod(self.kernel_size)
        feats = torch.randn(self.n_in, self.c_in)
        weight = torch.randn(taps, self.c_in // self.groups, self.c_out)
        return feats.to(dtype), weight.to(dtype), torch.randn(self.c_out).to(dtype)


CASES = (
    PointcloudCase((1,), 1, 1, 1.0, 1, 1),
    PointcloudCase((3, 3), 0, 5, 0.0, 3, 4),  # no input voxel: the bias alone
    PointcloudCase((3, 3), 5, 0, 0.0, 3, 4),
    PointcloudCase((2, 2), 9, 7, 0.4, 3, 17),  # tails of vectors, and of pairs of channels
    PointcloudCase((3,), 40, 40, 0.9, 17, 3),
    PointcloudCase((3, 3, 3), 70, 50, 0.3, 16, 16),
    PointcloudCase((3, 3), 90, 90, 0.7, 33, 32),
    PointcloudCase((3,), 61, 61, 0.8, 48, 48),
    PointcloudCase((3, 3), 130, 130, 0.3, 64, 64),
    PointcloudCase((2, 2), 75, 60, 0.6, 130, 136),  # several blocks of both channels
    PointcloudCase((3,), 20, 30, 0.6, 17, 513),
    PointcloudCase((3, 3), 1500, 1400, 0.2, 5, 6),  # several tiles of outputs
    PointcloudCase((3, 3), 50, 60, 0.5, 12, 18, 3),
    PointcloudCase((3, 3), 50, 60, 0.5, 37, 37, 37),  # depthwise
    PointcloudCase((2, 2), 50, 60, 0.5, 16, 32, 16),  # two outputs a channel
    PointcloudCase((3,), 50, 60, 0.5, 96, 160, 2),
)


class ConvOracle(SumOracle):
    """``reference.pointcloud_conv`` in float64, and how far a kernel may be from it."""

    def __init__(
        self,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        map: KernelMap,
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        rest = (*tensors_of(map), map.n_out, groups)
        exact = [None if t is None else t.detach().double() for t in (feats, weight, bias)]
        # What is not finite only meets zeros where the result is finite.
        sizes = [None if t is None else t.abs().nan_to_num(nan=0.0, posinf=0.0) for t in exact]
        with one_thread():
            y = reference.pointcloud_conv(*exact, *rest, activation)  # type: ignore[arg-type]
            size = reference.pointcloud_conv(*sizes, *rest)  # type: ignore[arg-type]
        super().__init__(y, size, weight.shape[0] * weight.shape[1], feats.dtype)


class WeightGradOracle(SumOracle):
    """The same of ``reference.pointcloud_conv_weight_grad``."""

    def __init__(self, dy: Tensor, feats: Tensor, map: KernelMap, groups: int = 1) -> None:
        exact = (dy.detach().double(), feats.detach().double())
        rest = (*tensors_of(map), groups)
        sizes = [t.abs().nan_to_num(nan=0.0, posinf=0.0) for t in exact]
        with one_thread():
            dw = reference.pointcloud_conv_weight_grad(*exact, *rest)
            size = reference.pointcloud_conv_weight_grad(*sizes, *rest)
        super().__init__(dw, size, max(1, int(map.tap_offsets.diff().max())), feats.dtype)
