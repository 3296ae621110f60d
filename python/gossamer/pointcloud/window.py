"""What places a window over voxels, for convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..ops.conv_geometry import Sizes, per_axis
from .coordinates import Coordinates
from .kernel_map import KernelMap
from .tensor import SparseTensor, check_sparse

Target = SparseTensor | Coordinates


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
    check_sparse(name, x)
    if x.dims != len(layer.kernel_size):
        raise ValueError(
            f"{name}: x has {x.dims} spatial axes, the kernel {len(layer.kernel_size)}"
        )


def target_coordinates(layer: nn.Module, target: Target | None) -> Coordinates | None:
    """The voxels of a target; TypeError where it is something else."""
    if target is not None and not isinstance(target, Target):
        raise TypeError(
            f"{type(layer).__name__}: target is {type(target).__name__}, expected SparseTensor or "
            "Coordinates"
        )
    return target.coordinates if isinstance(target, SparseTensor) else target


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
