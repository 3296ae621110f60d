"""Weights of other sparse-convolution libraries in the layout of these layers.

A convolution's weight is [*kernel, C_in, C_out] here. There, with K the number of taps:

=========== ===================== ==========================================================
library     stored as             order of the taps
=========== ===================== ==========================================================
spconv 2    [C_out, *kernel, C_in] the last axis fastest; a kernel of one tap at stride 1 is stored
                                  like that but read as [C_in, C_out]
spconv 1    [*kernel, C_in, C_out] the last axis fastest
Minkowski   [K, C_in, C_out]      the first axis fastest; one tap at stride 1: [C_in, C_out];
                                  channelwise: [K, C]
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
Convert = Callable[[str, Tensor, Convolution | None], Tensor]
_COUNTED = "_max_num_voxels_during_training"
_NORM = r"\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)$"


def load_spconv(
    state_dict: State, model: nn.Module | None = None, layout: str = "KRSC"
) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of spconv layers, for a model of these layers.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of any floating dtype; nothing is copied that needs no copy. Names that all begin with
        ``module.``, where the model's do not, lose it.
    model : torch.nn.Module, optional
        The model it is for, with equal names: its convolutions say which entries are theirs and of
        what shape they must be, everything else is passed on. Without it, every entry named
        ``weight`` with 3 to 6 dimensions is taken for a convolution's, one of a single tap for that
        of a layer of stride 1.
    layout : {"KRSC", "RSKC", "RSCK"}
        How the weights are stored, in spconv's words: K for C_out, RS for the kernel, C for C_in.
        The first is that of spconv 2.2 and newer, the last that of spconv 1.

    Returns
    -------
    dict of str to Tensor
        What ``model.load_state_dict`` takes.

    Raises
    ------
    TypeError
        If a weight is no floating tensor.
    ValueError
        If a weight has not the shape that its layer expects, the layer has groups, no entry at all
        is for a convolution of the model, or the layout is unknown.

    Examples
    --------
    >>> import torch, gossamer.pointcloud as pc
    >>> model = torch.nn.Sequential(pc.SubmanifoldConv3d(4, 8, 3, bias=False), pc.BatchNorm(8))
    >>> theirs = {"0.weight": torch.randn(8, 3, 3, 3, 4), "1.weight": torch.ones(8)}
    >>> pc.load_spconv(theirs, model)["0.weight"].shape
    torch.Size([3, 3, 3, 4, 8])
    """
    if layout not in ("KRSC", "RSKC", "RSCK"):
        raise ValueError(f"load_spconv: layout is {layout!r}, expected KRSC, RSKC or RSCK")

    # What spconv counts in training is nothing that a layer here has.
    state_dict = {n: t for n, t in state_dict.items() if not n.endswith(_COUNTED)}

    def convert(name: str, weight: Tensor, layer: Convolution | None) -> Tensor:
        last = weight.dim() - 1
        places = {"KRSC": (last, 0), "RSKC": (last, last - 1), "RSCK": (last - 1, last)}
        channels = places[layout]
        axes = [axis for axis in range(last + 1) if axis not in channels]
        found = tuple(weight.shape[axis] for axis in axes)
        kernel = found if layer is None else layer.kernel_size
        if len(axes) != last - 1 or found != kernel:
            inner = ", ".join(map(str, kernel))
            expected = {
                "KRSC": f"[C_out, {inner}, C_in]",
                "RSKC": f"[{inner}, C_out, C_in]",
                "RSCK": f"[{inner}, C_in, C_out]",
            }[layout]
            raise ValueError(
                f"load_spconv: {name} has shape {list(weight.shape)}, expected {expected} "
                f"(layout {layout!r})"
            )
        steps = getattr(layer, "stride", None) or (1,)
        if math.prod(kernel) == 1 and max(steps) == 1 and layout != "RSCK":
            return weight.reshape(*kernel, *(weight.shape[axis] for axis in channels))
        return weight.permute(*axes, *channels)

    return _converted(
        "load_spconv", _named_as(state_dict, model), model, "weight", range(3, 7), convert
    )


def load_minkowski(
    state_dict: State, model: nn.Module | None = None, dims: int = 3
) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of MinkowskiEngine layers, for a model of these layers.

    ``kernel`` becomes ``weight``, a bias [1, C] loses its first axis, and ``bn.`` in the names of
    MinkowskiBatchNorm's entries goes.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of any floating dtype; nothing is copied that needs no copy. Names that all begin with
        ``module.``, where the model's do not, lose it.
    model : torch.nn.Module, optional
        The model it is for, with equal names otherwise, whose convolutions say what kernels they
        have. Without it kernels are taken for cubes. A depthwise layer takes the weight of a
        MinkowskiChannelwiseConvolution.
    dims : int
        Spatial axes, from 1 to 4, where there is no model.

    Returns
    -------
    dict of str to Tensor
        What ``model.load_state_dict`` takes.

    Raises
    ------
    TypeError
        If a weight is no floating tensor.
    ValueError
        If a weight has not the shape that its layer expects, is of no cube, the layer has groups
        and is not depthwise, or no entry at all is for a convolution of the model.
    """
    return _from_taps("load_minkowski", state_dict, model, dims, lambda taps: True)


def load_torchsparse(
    state_dict: State, model: nn.Module | None = None, dims: int = 3
) -> dict[str, Tensor]:
    """The ``state_dict`` of a model of TorchSparse layers, for a model of these layers.

    As `load_minkowski`, but for the order of an even number of taps.

    Notes
    -----
    A layer of stride 1 keeps its voxels there, whatever its kernel: that is a `SubmanifoldConv`
    here (an even kernel other than 2 begins at its voxel there, as `Conv` with
    ``outputs="floor"`` and no padding). A strided one has no outputs beyond the greatest
    coordinate or before 0: that is a `Conv` on voxels whose spatial shape is the greatest
    coordinate + 1.
    """
    return _from_taps("load_torchsparse", state_dict, model, dims, lambda taps: taps % 2 == 1)


def _from_taps(
    op: str,
    state_dict: State,
    model: nn.Module | None,
    dims: int,
    first_fastest: Callable[[int], bool],
) -> dict[str, Tensor]:
    if not 1 <= dims <= 4:
        raise ValueError(f"{op}: dims is {dims}, expected 1 to 4")

    def convert(name: str, weight: Tensor, layer: Convolution | None) -> Tensor:
        stored = list(weight.shape)
        if weight.dim() == 2:
            weight = weight.unsqueeze(1 if _is_depthwise(layer) else 0)
        taps = len(weight) if weight.dim() else 0
        kernel = (round(taps ** (1 / dims)),) * dims if layer is None else layer.kernel_size
        if weight.dim() != 3 or taps < 1 or math.prod(kernel) != taps:
            raise ValueError(
                f"{op}: {name} has shape {stored}, expected [{math.prod(kernel)}, C_in, C_out] for "
                f"a kernel {kernel}"
                + ("; a model says which others there are" if model is None else "")
            )
        if not first_fastest(taps):
            return weight.unflatten(0, kernel)
        axes = range(len(kernel) - 1, -1, -1)
        return weight.unflatten(0, kernel[::-1]).permute(*axes, -2, -1)

    modules = {} if model is None else dict(model.named_modules())
    names = None if model is None else modules.keys()
    convs = {name for name, module in modules.items() if isinstance(module, Convolution)}
    renamed = {}
    for name, tensor in _named_as(state_dict, model).items():
        norm = re.search(_NORM, name)
        if norm and (names is None or name[: norm.start() + 3] not in names):
            name = f"{name[: norm.start()]}.{norm[1]}"
        owner, _, last = name.rpartition(".")
        bias = last == "bias" and isinstance(tensor, Tensor) and (owner in convs or model is None)
        renamed[name] = tensor.squeeze(0) if bias and tensor.dim() == 2 else tensor
    return _converted(op, renamed, model, "kernel", (2, 3), convert)


def _is_depthwise(layer: Convolution | None) -> bool:
    return layer is not None and 1 < layer.groups == layer.in_channels == layer.out_channels


def _named_as(state_dict: State, model: nn.Module | None) -> State:
    """Without the ``module.`` that data-parallel training puts before the names of a model."""
    prefix = "module."
    ours = model is None or "module" in dict(model.named_children())
    if ours or not all(name.startswith(prefix) for name in state_dict):
        return state_dict
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def _converted(
    op: str,
    state_dict: State,
    model: nn.Module | None,
    stored: str,
    dimensions: range | tuple[int, ...],
    convert: Convert,
) -> dict[str, Tensor]:
    layers = None
    if model is not None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Convolution)}
    result, converted = {}, 0
    for name, tensor in state_dict.items():
        owner, _, last = name.rpartition(".")
        layer = None if layers is None else layers.get(owner)
        no_weight = not isinstance(tensor, Tensor) or tensor.dim() not in dimensions
        if last != stored or (no_weight if layers is None else layer is None):
            result[name] = tensor
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} is {kind}, expected a floating tensor")
        weight = convert(name, tensor, layer)
        if layer is not None:
            _check_fit(op, name, tensor, weight, layer)
        result[f"{owner}.weight" if owner else "weight"] = weight
        converted += 1
    if layers and not converted:
        wanted = ", ".join([f"{n}.{stored}" if n else stored for n in layers][:3])
        raise ValueError(
            f"{op}: none of the {len(state_dict)} entries is for a convolution of the model; it "
            f"has {wanted}, the state_dict {', '.join(map(str, list(state_dict)[:3]))}"
        )
    return result


def _check_fit(op: str, name: str, tensor: Tensor, weight: Tensor, layer: Convolution) -> None:
    if layer.groups != 1 and not (_is_depthwise(layer) and tensor.dim() == 2):
        raise ValueError(f"{op}: {name} is for {layer}, and weights in groups cannot be read")
    if weight.shape != layer.weight.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(tensor.shape)}, with {weight.shape[-2]} input and "
            f"{weight.shape[-1]} output channels; {layer} expects {layer.in_channels} and "
            f"{layer.out_channels}"
        )
