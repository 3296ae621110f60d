"""Convolutions over the voxels of a sparse tensor, equal to torch's dense ones at those voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.conv_geometry import Sizes, per_axis
from ..ops.pointcloud import pointcloud_conv
from .coordinates import Coordinates
from .kernel_map import KernelMap
from .tensor import SparseTensor

_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DENSE_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Target = SparseTensor | Coordinates


class Convolution(nn.Module):
    """What all of them share: a weight for each tap, a bias, and the product over a kernel map.

    Attributes
    ----------
    weight : Parameter
        [*kernel_size, C_in / groups, C_out]; drawn, as the bias, as torch's convolutions are.
    bias : Parameter or None
        [C_out], added to every voxel of the result.
    """

    axes: ClassVar[int | None] = None
    transposed: ClassVar[bool] = False
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        groups: int,
        bias: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        axes = axes_of(self, kernel_size)
        if (
            min(groups, in_channels, out_channels) < 1
            or in_channels % groups
            or out_channels % groups
        ):
            raise ValueError(
                f"{name}: in_channels {in_channels} and out_channels {out_channels} in {groups} "
                "groups: all at least 1, and groups divide both"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, axes, 1)
        self.groups = groups
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.weight = nn.Parameter(torch.empty(shape, **made))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_channels, **made)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias uniformly within 1 / sqrt(what an output sums), as torch does."""
        bound = 1 / math.sqrt(math.prod(self.kernel_size) * self.in_channels / self.groups)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: SparseTensor, target: Target | None = None) -> SparseTensor:
        """``x`` with C_in channels -> the voxels of the layer's rule, or of ``target``.

        Raises
        ------
        TypeError
            If ``x`` is no `SparseTensor`, or dtypes differ.
        ValueError
            If its dimensions or channels are not the layer's, or as `Coordinates` says.
        """
        check_input(self, x)
        if x.channels != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: x has {x.channels} channels, the weight expects "
                f"{self.in_channels}"
            )
        given = target.coordinates if isinstance(target, SparseTensor) else target
        coordinates, kernel_map = self._outputs(x.coordinates, given)
        taps = self.weight.flatten(0, len(self.kernel_size) - 1)
        feats = pointcloud_conv(x.feats, taps, self.bias, kernel_map, self.groups)
        return SparseTensor(coordinates, feats)

    def _outputs(
        self, coordinates: Coordinates, target: Coordinates | None
    ) -> tuple[Coordinates, KernelMap]:
        raise NotImplementedError

    def _dense(self, **geometry: Any) -> nn.Module:
        """Torch's layer of this geometry, with a copy of the weight and bias."""
        axes = len(self.kernel_size)
        if axes > 3:
            raise TypeError(f"{type(self).__name__}.to_dense: torch has no {axes}-D convolution")
        kind = (_DENSE_TRANSPOSED if self.transposed else _DENSE)[axes - 1]
        conv = kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            groups=self.groups,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
            **geometry,
        )
        with torch.no_grad():
            conv.weight.copy_(to_torch(self.weight, self.groups, self.transposed))
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    @classmethod
    def _from(cls, conv: Any, **arguments: Any) -> Any:
        """A layer of this class with a copy of the weight and bias of torch's."""
        kinds = _DENSE_TRANSPOSED if cls.transposed else _DENSE
        allowed = kinds if cls.axes is None else kinds[cls.axes - 1 : cls.axes]
        if not isinstance(conv, allowed):
            expected = " or ".join(kind.__name__ for kind in allowed) or "none, in this dimension"
            raise TypeError(
                f"{cls.__name__}.from_dense: {type(conv).__name__}, expected torch.nn.{expected}"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"{cls.__name__}.from_dense: padding_mode {conv.padding_mode!r}, expected 'zeros'"
            )
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **arguments,
        )
        with torch.no_grad():
            layer.weight.copy_(from_torch(conv.weight, conv.groups, cls.transposed))
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        usual = {"padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "outputs": "dense"}
        for name, value in {"stride": None, **usual}.items():
            held = getattr(self, name, value)
            if held not in (value, (value,) * len(self.kernel_size)):
                parts.append(f"{name}={held!r}")
        return ", ".join([*parts, f"bias={self.bias is not None}"])


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
        result is that of torch's layer wherever the latter is not just the bias (spconv,
        TorchSparse). "floor": ``floor(voxel / stride)`` of each input, whatever the kernel
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


def axes_of(layer: nn.Module, kernel_size: Sizes) -> int:
    """The spatial axes that the class says, or the kernel."""
    axes: int | None = layer.axes  # type: ignore[assignment]
    if axes is not None:
        return axes
    if not isinstance(kernel_size, Sequence) or not 1 <= len(kernel_size) <= 4:
        name = type(layer).__name__
        raise ValueError(
            f"{name}: kernel_size {kernel_size!r}, expected a number an axis, or take {name}2d, "
            f"{name}3d or {name}4d"
        )
    return len(kernel_size)


def check_input(layer: Any, x: SparseTensor) -> None:
    """Raise where x is no sparse tensor of the layer's dimension."""
    name = type(layer).__name__
    if not isinstance(x, SparseTensor):
        raise TypeError(f"{name}: x is {type(x).__name__}, expected SparseTensor")
    if x.dims != len(layer.kernel_size):
        raise ValueError(
            f"{name}: x has {x.dims} spatial axes, the kernel {len(layer.kernel_size)}"
        )


def set_window(
    layer: Any, stride: Sizes, padding: Sizes, dilation: Sizes, outputs: str = "dense"
) -> None:
    """What places a window over voxels, checked."""
    name, axes = type(layer).__name__, len(layer.kernel_size)
    if outputs not in ("dense", "floor"):
        raise ValueError(f"{name}: outputs {outputs!r}, expected 'dense' or 'floor'")
    layer.stride = per_axis(name, "stride", stride, axes, 1)
    layer.padding = per_axis(name, "padding", padding, axes, 0)
    layer.dilation = per_axis(name, "dilation", dilation, axes, 1)
    layer.outputs = outputs


def window_outputs(
    layer: Any, coordinates: Coordinates, target: Coordinates | None
) -> tuple[Coordinates, KernelMap]:
    """The outputs of a window that moves over voxels."""
    rule = layer.outputs if target is None else "given"
    window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return coordinates.strided(*window, rule=rule, target=target)


def _submanifold_padding(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((k - 1) // 2 * d for k, d in zip(kernel, dilation, strict=True))


def to_torch(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[*kernel, C_in / groups, C_out] -> torch's [C_out, C_in / groups, *kernel].

    Torch has that of a transposed convolution as [C_in, C_out / groups, *kernel].
    """
    kernel, (inputs, outputs) = weight.shape[:-2], weight.shape[-2:]
    axes = range(len(kernel))
    if not transposed:
        return weight.permute(-1, -2, *axes)
    split = weight.unflatten(-1, (groups, outputs // groups))  # [*kernel, C_in / g, g, C_out / g]
    return split.permute(-2, -3, -1, *axes).reshape(groups * inputs, outputs // groups, *kernel)


def from_torch(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The inverse of ``to_torch``."""
    axes = range(2, weight.dim())
    if not transposed:
        return weight.permute(*axes, 1, 0)
    split = weight.unflatten(0, (groups, -1))  # [g, C_in / g, C_out / g, *kernel]
    return split.permute(*(axis + 1 for axis in axes), 1, 0, 2).flatten(-2)
