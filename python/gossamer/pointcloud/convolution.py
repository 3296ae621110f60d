"""Convolutions over the voxels of a sparse tensor, equal to torch's dense ones at those voxels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.conv_geometry import Sizes, per_axis
from .convolution_base import Convolution
from .coordinates import Coordinates
from .kernel_map import KernelMap
from .window import set_window, window_outputs


class SubmanifoldConv(Convolution):
    """A convolution whose outputs are the voxels of its input, so that these never spread.

    At every voxel the answer of torch's convolution with stride 1 and zero padding that keeps the
    size. An odd kernel is centred; an even one of size k reaches from ``-((k - 1) // 2)`` to
    ``k // 2`` voxels, times the dilation.

    Parameters
    ----------
    in_channels, out_channels : int
        Any numbers from 1 on that ``groups`` divides.
    kernel_size : int or tuple of int
        As many axes as the tensor; of `SubmanifoldConv1d` to `4d` one number stands for all.
    dilation, groups, bias, device, dtype
        As for ``torch.nn.Conv3d``; float32, bfloat16, float16 or float64.

    References
    ----------
    Graham, Engelcke and van der Maaten, "3D Semantic Segmentation with Submanifold Sparse
    Convolutional Networks", 2018 (arXiv:1711.10275).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups, bias, device, dtype)
        self.dilation = per_axis(
            type(self).__name__, "dilation", dilation, len(self.kernel_size), 1
        )

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        if target is not None:
            raise ValueError(f"{type(self).__name__}: a target, but its outputs are its inputs")
        return coordinates, coordinates.submanifold(self.kernel_size, self.dilation)

    def to_dense(self) -> nn.Module:
        """Torch's convolution with the same weights and bias.

        Raises
        ------
        TypeError
            If there is none of this dimension.
        ValueError
            If the kernel is even and the dilation too: torch cannot pad as this layer does.
        """
        before = _submanifold_padding(self.kernel_size, self.dilation)
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(b != total // 2 for b, total in zip(before, totals, strict=True)):
            raise ValueError(
                f"{type(self).__name__}.to_dense: kernel_size {self.kernel_size} with dilation "
                f"{self.dilation} reaches {before} voxels back, torch's padding 'same' does not"
            )
        odd = all(total % 2 == 0 for total in totals)
        return self._dense(padding=before if odd else "same", dilation=self.dilation)

    @classmethod
    def from_dense(cls, conv: Any) -> SubmanifoldConv:
        """A layer with the weight, bias and dilation of torch's, which must keep the size.

        Raises
        ------
        TypeError
            If ``conv`` is no convolution of this dimension.
        ValueError
            If its stride is not 1 or its padding not the one that keeps the size.
        """
        layer: SubmanifoldConv = cls._from(conv, dilation=getattr(conv, "dilation", 1))
        before = _submanifold_padding(layer.kernel_size, layer.dilation)
        if any(step != 1 for step in conv.stride) or conv.padding not in (before, "same"):
            raise ValueError(
                f"{cls.__name__}.from_dense: stride {conv.stride} and padding {conv.padding}, "
                f"expected stride 1 and padding {before}"
            )
        layer.to_dense()  # or it is an error
        return layer


class Conv(Convolution):
    """A convolution with outputs of its own: strided, or one that lets the active region grow.

    Parameters
    ----------
    in_channels, out_channels : int
        Any numbers from 1 on that ``groups`` divides.
    kernel_size, stride, padding, dilation, groups, bias, device, dtype
        As for ``torch.nn.Conv3d``, padding in numbers.
    outputs : {"dense", "floor"}
        Which voxels the result has. "dense": every one whose window holds an input, so that the
        result is that of torch's layer wherever the latter is not just the bias (spconv).
        "floor": ``floor(voxel / stride)`` of each input, whatever the kernel
        reaches, so that there are never more than inputs (MinkowskiEngine, with padding
        ``(k - 1) // 2`` for odd kernels and 0 for even ones). A call with ``target`` takes those
        voxels instead, whatever the rule.

    Notes
    -----
    With a spatial shape, outputs are those of torch's layer on that shape. Without one the grid has
    no border: outputs may get negative coordinates.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    outputs: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        outputs: str = "dense",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups, bias, device, dtype)
        set_window(self, stride, padding, dilation, outputs)

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        return window_outputs(self, coordinates, target)

    def to_dense(self) -> nn.Module:
        """Torch's convolution with the same weights and bias; TypeError where it has none."""
        return self._dense(stride=self.stride, padding=self.padding, dilation=self.dilation)

    @classmethod
    def from_dense(cls, conv: Any, outputs: str = "dense") -> Conv:
        """A layer with the weight, bias and geometry of torch's.

        Raises
        ------
        TypeError
            If ``conv`` is no convolution of this dimension.
        ValueError
            If it pads by "same" an odd number of voxels, or with anything but zeros.
        """
        geometry = {n: getattr(conv, n, 1) for n in ("stride", "padding", "dilation")}
        if geometry["padding"] == "valid":
            geometry["padding"] = 0
        elif geometry["padding"] == "same":
            totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            if any(total % 2 for total in totals):
                raise ValueError(
                    f"{cls.__name__}.from_dense: padding 'same' of kernel_size {conv.kernel_size} "
                    f"with dilation {conv.dilation} is not the same on both sides"
                )
            geometry["padding"] = tuple(total // 2 for total in totals)
        layer: Conv = cls._from(conv, **geometry, outputs=outputs)
        return layer


def _submanifold_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((k - 1) // 2 * d for k, d in zip(kernel, dilation, strict=True))
