"""Networks for voxels in plain layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .combine import cat
from .convolution import Conv, SubmanifoldConv
from .pointwise import BatchNorm, ReLU
from .tensor import SparseTensor
from .transposed import InverseConv


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions, and the input added to their result."""

    def __init__(self, in_channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normalised(SubmanifoldConv(in_channels, out_channels, (3,) * dims, bias=False)),
            ReLU(),
            *_normalised(SubmanifoldConv(out_channels, out_channels, (3,) * dims, bias=False)),
        )
        self.skip = nn.Sequential()
        if in_channels != out_channels:
            point = SubmanifoldConv(in_channels, out_channels, (1,) * dims, bias=False)
            self.skip = nn.Sequential(*_normalised(point))
        self.relu = ReLU()

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.relu(self.body(x) + self.skip(x))


class MinkUNet(nn.Module):
    """A U-Net of residual blocks over voxels, for a class a voxel.

    Four strided convolutions halve the resolution, and four inverse ones return to the voxels that
    each came from, where the encoder's features join. The layers are those of MinkowskiEngine's
    MinkUNet14, 18 and 34 in the variant with planes 32, 64, 128, 256, 256, 128, 96, 96.

    Parameters
    ----------
    in_channels, out_channels : int
        Features of a voxel, and classes.
    blocks : sequence of 8 int
        Residual blocks at each resolution, of the encoder and of the decoder.
    planes : sequence of 8 int
        Their channels.
    stem : int
        Channels at full resolution.
    dims : int
        Spatial axes, from 1 to 4.

    References
    ----------
    Choy, Gwak and Savarese, "4D Spatio-Temporal ConvNets: Minkowski Convolutional Neural Networks",
    2019 (arXiv:1904.08755).
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2, 2, 2, 2, 2)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: Sequence[int] | None = None,
        planes: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        stem: int = 32,
        dims: int = 3,
    ) -> None:
        super().__init__()
        depths = tuple(self.blocks if blocks is None else blocks)
        if len(depths) != 8 or len(planes) != 8:
            raise ValueError(
                f"MinkUNet: blocks {depths} and planes {tuple(planes)}, expected 8 of each"
            )
        first = SubmanifoldConv(in_channels, stem, (5,) * dims, bias=False)
        self.stem = nn.Sequential(*_normalised(first), ReLU())
        self.down, self.up, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels, widths = stem, [stem]
        for width, depth in zip(planes[:4], depths[:4], strict=True):
            half = Conv(channels, channels, (2,) * dims, 2, bias=False, outputs="floor")
            stage = _stage(channels, width, depth, dims)
            self.down.append(nn.Sequential(*_normalised(half), ReLU(), *stage))
            channels = width
            widths.append(width)
        for width, depth, skipped in zip(planes[4:], depths[4:], widths[-2::-1], strict=True):
            double = InverseConv(channels, width, (2,) * dims, 2, bias=False)
            self.up.append(nn.Sequential(*_normalised(double), ReLU()))
            self.join.append(nn.Sequential(*_stage(width + skipped, width, depth, dims)))
            channels = width
        self.head = SubmanifoldConv(channels, out_channels, (1,) * dims)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """``x`` with ``in_channels`` -> ``out_channels`` at the same voxels, in the same order."""
        x = self.stem(x)
        skipped = []
        for down in self.down:
            skipped.append(x)
            x = down(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(cat([up(x), skipped.pop()]))
        return self.head(x)


class MinkUNet14(MinkUNet):
    """`MinkUNet` with one block at each resolution."""

    blocks = (1, 1, 1, 1, 1, 1, 1, 1)


class MinkUNet18(MinkUNet):
    """`MinkUNet` with two blocks at each resolution."""


class MinkUNet34(MinkUNet):
    """`MinkUNet` with 2, 3, 4, 6 and 2, 2, 2, 2 blocks."""

    blocks = (2, 3, 4, 6, 2, 2, 2, 2)


def _normalised(conv: Conv | SubmanifoldConv | InverseConv) -> tuple[nn.Module, BatchNorm]:
    return conv, BatchNorm(conv.out_channels)


def _stage(in_channels: int, width: int, depth: int, dims: int) -> list[ResidualBlock]:
    inputs = [in_channels] + [width] * (depth - 1)
    return [ResidualBlock(channels, width, dims) for channels in inputs]
