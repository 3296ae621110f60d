"""Weights of other sparse-convolution libraries in the layout of these layers.

A convolution's weight is [*kernel, C_in, C_out] here. There, with K the number of taps:

=========== ===================== ==========================================================
library     stored as             order of the taps
=========== ===================== ==========================================================
spconv      [C_out, *kernel, C_in] the last axis fastest; a kernel of one tap is stored like that
                                  but read as [C_in, C_out]
Minkowski   [K, C_in, C_out]      the first axis fastest; one tap at stride 1: [C_in, C_out]
TorchSparse [K, C_in, C_out]      the first axis fastest if K is odd, else the last; one tap at
                                  stride 1: [C_in, C_out]
=========== ===================== ==========================================================

None needs a tap reversed. Where kernels stand against their voxel is a matter of the layers, not of
the weights: MinkowskiEngine centres odd kernels and starts even ones at their voxel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .convolution_base import Convolution

State = Mapping[str, Tensor]
Kernel = tuple[int, ...]
_NORM = r"\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)$"


def load_spconv(state_dict: State, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of spconv 2 layers, for a model of these layers.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of any dtype; nothing is copied that needs no copy.
    model : torch.nn.Module, optional
        The model it is for, with equal names: its convolutions say which entries are theirs and of
        what shape they must be, everything else is passed on. Without it, every entry named
        ``weight`` with 3 to 6 dimensions is taken for a convolution's.

    Returns
    -------
    dict of str to Tensor
        What ``model.load_state_dict`` takes.

    Raises
    ------
    ValueError
        If a weight has not the shape that its layer expects, or the layer has groups.

    Examples
    --------
    >>> import torch, gossamer.pointcloud as pc
    >>> model = torch.nn.Sequential(pc.SubmanifoldConv3d(4, 8, 3, bias=False), pc.BatchNorm(8))
    >>> theirs = {"0.weight": torch.randn(8, 3, 3, 3, 4), "1.weight": torch.ones(8)}
    >>> pc.load_spconv(theirs, model)["0.weight"].shape
    torch.Size([3, 3, 3, 4, 8])
    """

    def convert(name: str, weight: Tensor, kernel: Kernel | None) -> Tensor:
        if kernel is None:
            kernel = tuple(weight.shape[1:-1])
        if weight.dim() != len(kernel) + 2 or tuple(weight.shape[1:-1]) != kernel:
            raise ValueError(
                f"load_spconv: {name} has shape {list(weight.shape)}, expected "
                f"[C_out, {', '.join(map(str, kernel))}, C_in]"
            )
        if math.prod(kernel) == 1:
            return weight.reshape(*kernel, weight.shape[-1], weight.shape[0])
        return weight.permute(*range(1, weight.dim()), 0)

    return _converted("load_spconv", state_dict, model, "weight", range(3, 7), convert)


def load_minkowski(
    state_dict: State, model: nn.Module | None = None, dims: int = 3
) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of MinkowskiEngine layers, for a model of these layers.

    ``kernel`` becomes ``weight``, a bias [1, C] loses its first axis, and ``bn.`` in the names of
    MinkowskiBatchNorm's entries goes.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of any dtype; nothing is copied that needs no copy.
    model : torch.nn.Module, optional
        The model it is for, with equal names otherwise, whose convolutions say what kernels they
        have. Without it kernels are taken for cubes.
    dims : int
        Spatial axes, where there is no model.

    Returns
    -------
    dict of str to Tensor
        What ``model.load_state_dict`` takes.

    Raises
    ------
    ValueError
        If a weight has not the shape that its layer expects, is of no cube, or the layer has
        groups.
    """
    return _from_taps("load_minkowski", state_dict, model, dims, lambda taps: True)


def load_torchsparse(
    state_dict: State, model: nn.Module | None = None, dims: int = 3
) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of TorchSparse layers, for a model of these layers.

    As `load_minkowski`, but for the order of an even number of taps.
    """
    return _from_taps("load_torchsparse", state_dict, model, dims, lambda taps: taps % 2 == 1)


def _from_taps(
    op: str,
    state_dict: State,
    model: nn.Module | None,
    dims: int,
    first_fastest: Callable[[int], bool],
) -> dict[str, Tensor]:
    def convert(name: str, weight: Tensor, kernel: Kernel | None) -> Tensor:
        if weight.dim() == 2:
            weight = weight.unsqueeze(0)
        taps = weight.shape[0]
        if kernel is None:
            kernel = (round(taps ** (1 / dims)),) * dims
        if weight.dim() != 3 or math.prod(kernel) != taps:
            raise ValueError(
                f"{op}: {name} has shape {list(weight.shape)}, expected "
                f"[{math.prod(kernel)}, C_in, C_out] for a kernel {kernel}"
                + ("; a model says which others there are" if model is None else "")
            )
        if not first_fastest(taps):
            return weight.unflatten(0, kernel)
        axes = range(len(kernel) - 1, -1, -1)
        return weight.unflatten(0, kernel[::-1]).permute(*axes, -2, -1)

    names = None if model is None else {name for name, _ in model.named_modules()}
    renamed = {}
    for name, tensor in state_dict.items():
        norm = re.search(_NORM, name)
        if norm and (names is None or name[: norm.start() + 3] not in names):
            name = f"{name[: norm.start()]}.{norm[1]}"
        if name.endswith(".bias") or name == "bias":
            tensor = tensor.squeeze(0) if tensor.dim() == 2 else tensor
        renamed[name] = tensor
    return _converted(op, renamed, model, "kernel", (2, 3), convert)


def _converted(
    op: str,
    state_dict: State,
    model: nn.Module | None,
    stored: str,
    dimensions: range | tuple[int, ...],
    convert: Callable[[str, Tensor, Kernel | None], Tensor],
) -> dict[str, Tensor]:
    layers = None
    if model is not None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Convolution)}
    result = {}
    for name, tensor in state_dict.items():
        owner, _, last = name.rpartition(".")
        ours = f"{owner}.weight" if owner else "weight"
        if last != stored or (layers is None and tensor.dim() not in dimensions):
            result[name] = tensor
        elif layers is None:
            result[ours] = convert(name, tensor, None)
        elif owner not in layers:
            result[name] = tensor
        else:
            result[ours] = _fitting(op, name, tensor, layers[owner], convert)
    return result


def _fitting(
    op: str,
    name: str,
    tensor: Tensor,
    layer: Convolution,
    convert: Callable[[str, Tensor, Kernel | None], Tensor],
) -> Tensor:
    if layer.groups != 1:
        raise ValueError(f"{op}: {name} is for {layer}, and weights in groups cannot be read")
    weight = convert(name, tensor, layer.kernel_size)
    if weight.shape != layer.weight.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, with {weight.shape[-2]} input and "
            f"{weight.shape[-1]} output channels; {layer} expects {layer.in_channels} and "
            f"{layer.out_channels}"
        )
    return weight
