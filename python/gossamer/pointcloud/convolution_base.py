"""What convolutions over voxels share, and torch's layout of their weights."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops.conv_geometry import Sizes, per_axis
from ..ops.pointcloud import pointcloud_conv
from .coordinates import Coordinates
from .kernel_map import KernelMap
from .tensor import SparseTensor
from .window import Target, axes_of, check_input, target_coordinates

_DENSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DENSE_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
        given = target_coordinates(self, target)
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
