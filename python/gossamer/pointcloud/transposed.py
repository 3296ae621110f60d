"""Transposed convolutions over the voxels of a sparse tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.conv_geometry import Sizes, per_axis
from .convolution_base import Convolution
from .coordinates import Coordinates
from .kernel_map import KernelMap
from .window import set_window


class ConvTranspose(Convolution):
    """The transposed convolution: every input spreads over the voxels that the kernel reaches.

    The result is that of torch's layer wherever the latter is not just the bias; with ``target``,
    at those voxels alone. `InverseConv` finds the target by itself.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
        As for ``torch.nn.ConvTranspose3d``.
    device, dtype
        As for ``torch.nn.ConvTranspose3d``.
    """

    transposed = True
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups, bias, device, dtype)
        set_window(self, stride, padding, dilation)
        axes = len(self.kernel_size)
        name = type(self).__name__
        self.output_padding = per_axis(name, "output_padding", output_padding, axes, 0)
        allowed = map(max, self.stride, self.dilation)
        if any(p >= a for p, a in zip(self.output_padding, allowed, strict=True)):
            raise ValueError(
                f"{name}: output_padding {self.output_padding}, expected less than the stride "
                f"{self.stride} or the dilation {self.dilation}"
            )

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        return coordinates.transposed(
            self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation, target
        )

    def to_dense(self) -> nn.Module:
        """Torch's transposed convolution with the same weights and bias."""
        names = ("stride", "padding", "output_padding", "dilation")
        return self._dense(**{name: getattr(self, name) for name in names})

    @classmethod
    def from_dense(cls, conv: Any) -> ConvTranspose:
        """A layer with the weight, bias and geometry of torch's transposed convolution.

        Raises
        ------
        TypeError
            If ``conv`` is none of this dimension.
        """
        names = ("stride", "padding", "output_padding", "dilation")
        layer: ConvTranspose = cls._from(conv, **{n: getattr(conv, n, 1) for n in names})
        return layer


class InverseConv(Convolution):
    """Back to the voxels that a strided convolution came from, over the same pairs reversed.

    A tensor remembers which layers made its coordinates, and those it was made of; not one whose
    ``target`` came from elsewhere (``Coordinates.strided``). Of those with this kernel size (and,
    where given, stride) the latest counts, and its stride, padding and dilation hold. At the voxels
    of the result the answer of torch's transposed convolution with that geometry.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, groups, bias, device, dtype
        As for ``torch.nn.ConvTranspose3d``.
    stride : int or tuple of int, optional
        Which layer is meant, where several have this kernel size.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, groups, bias, device, dtype)
        axes = len(self.kernel_size)
        name = type(self).__name__
        self.stride = None if stride is None else per_axis(name, "stride", stride, axes, 1)

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        if target is not None:
            raise ValueError(
                f"{type(self).__name__}: a target, but its outputs are remembered; "
                "ConvTranspose takes one"
            )
        return coordinates.inverse(self.kernel_size, self.stride)

    def to_dense(
        self,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        dilation: Sizes = 1,
    ) -> nn.Module:
        """Torch's transposed convolution with the same weights and bias, of this geometry."""
        return self._dense(
            stride=stride, padding=padding, output_padding=output_padding, dilation=dilation
        )

    @classmethod
    def from_dense(cls, conv: Any) -> InverseConv:
        """A layer with the weight and bias of torch's; its partner must have that geometry.

        Raises
        ------
        TypeError
            If ``conv`` is no transposed convolution of this dimension.
        """
        layer: InverseConv = cls._from(conv, stride=getattr(conv, "stride", None))
        return layer


class GenerativeConvTranspose(ConvTranspose):
    """A transposed convolution that makes voxels around its inputs, in a grid without border.

    Each input ``c`` makes ``c * stride + offset`` for every tap's offset: those of an odd kernel
    of size k lie from ``-(k - 1) / 2`` to ``(k - 1) / 2``, those of an even one from 0 to
    ``k - 1``, times the dilation. The result has no spatial shape and may have negative
    coordinates; `Prune` is what usually follows.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype
        As for ``torch.nn.ConvTranspose3d``.

    References
    ----------
    Gwak, Choy and Savarese, "Generative Sparse Detection Networks for 3D Single-shot Object
    Detection", 2020 (arXiv:2006.12356).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            groups=groups,
            bias=bias,
            dilation=dilation,
            device=device,
            dtype=dtype,
        )
        self.padding = generative_padding(self.kernel_size, self.dilation)

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        return coordinates.transposed(
            self.kernel_size,
            self.stride,
            self.padding,
            0,
            self.dilation,
            target,
            bounded=False,
        )

    @classmethod
    def from_dense(cls, conv: Any) -> GenerativeConvTranspose:
        """A layer with the weight and bias of torch's transposed convolution.

        Raises
        ------
        TypeError
            If ``conv`` is none of this dimension.
        ValueError
            If its padding is not the one that its kernel has here.
        """
        names = ("stride", "dilation")
        layer: GenerativeConvTranspose = cls._from(conv, **{n: getattr(conv, n, 1) for n in names})
        if conv.padding != layer.padding:
            raise ValueError(
                f"{cls.__name__}.from_dense: padding {conv.padding}, expected {layer.padding}"
            )
        return layer


def generative_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """How far a generative kernel reaches back: half of an odd one, an even one not at all."""
    return tuple((k - 1) // 2 * d if k % 2 else 0 for k, d in zip(kernel, dilation, strict=True))
