"""sparse24_conv: a convolution with a 2:4 weight, y = act(W * x + b + residual)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import gpu_of, obstacle, on_cuda
from ..formats import Sparse24Conv, Sparse24ConvPanels
from .conv_geometry import Sizes, per_axis, prepare
from .conv_operands import Geometry, empty_result, is_channels_last, without_content
from .operands import all_autocast_to, autocast_dtype, autocast_to, check_dtypes
from .sparse24_conv_product import SPARSE24_CONV as _OP
from .sparse24_conv_product import Way, asked_of_cuda, by_way, choose, product


def sparse24_conv(
    x: Tensor,
    weight: Sparse24Conv | Sparse24ConvPanels,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution with a 2:4 weight, of as many axes as its kernel has: 1, 2 or 3.

    Sums run over the stored slots only: a NaN or an infinity in ``x`` goes through every stored
    position, explicit zeros included, and never through a pruned one. That is so of our kernels;
    where torch's convolution with the dense weight is chosen, because it is faster (bfloat16 on
    CPUs that multiply it, few channels a group, a weight that is not packed and meets few pixels or
    lies on a GPU, float32 on a GPU), it makes a NaN of either.

    Parameters
    ----------
    x : Tensor
        [batch, C_in, *extents] in the weight's dtype, of any strides; or without batch. The batch
        may be empty.
    weight : Sparse24Conv or Sparse24ConvPanels
        The [C_out, C_in / groups, *kernel size] weight; the groups are its own. Gradients flow to
        ``Sparse24Conv.values``, and to nothing in the panels.
    bias, stride, padding, dilation, padding_mode, activation, residual
        As for ``blocksparse_conv``; to torch's convolution, where that is chosen, torch adds the
        residual, too.

    Returns
    -------
    Tensor
        [batch, C_out, *extents] in the dtype and the memory format (contiguous or channels-last)
        of ``x``. Under autocast x, weight, bias and residual are cast to autocast's dtype first;
        panels are read in their own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is neither of the two formats, or dtypes differ.
    ValueError
        As ``blocksparse_conv``.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    if isinstance(weight, Sparse24Conv):
        stored, indices = weight.values, weight.indices
    elif isinstance(weight, Sparse24ConvPanels):
        stored, indices = weight.panels, None
    else:
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected Sparse24Conv or Sparse24ConvPanels"
        )
    return sparse24_conv_tensors(
        x,
        stored,
        indices,
        bias,
        weight.shape,
        weight.groups,
        weight.dtype,
        stride,
        padding,
        dilation,
        padding_mode,
        activation or "none",
        residual,
    )


def sparse24_conv_tensors(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``sparse24_conv`` on a format's tensors: values and indices, or panels and None."""
    conv = prepare(_OP, x, shape, groups, stride, padding, dilation, padding_mode)
    x, residual, autocast = conv.x, conv.batch_of(residual), autocast_dtype(x)
    if autocast is not None:
        if indices is not None:
            stored = autocast_to(stored, autocast)
            dtype = stored.dtype
        x, bias, residual = all_autocast_to(dtype, x, bias, residual)
    # Panels are words: past this line nothing knows the dtype of what they hold.
    check_dtypes(_OP, dtype, x=x, bias=bias, residual=residual)
    steps = (conv.stride, conv.padding, conv.dilation)
    rest = (tuple(shape), groups, *steps, activation)
    y = product(x, stored, indices, bias, residual, *rest)
    return conv.result(y if autocast is None else autocast_to(y, autocast))


def sparse24_conv_choice(
    x_shape: Sequence[int],
    weight: Sparse24Conv | Sparse24ConvPanels,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
    device: torch.device | dict[str, int] | None = None,
) -> dict[str, Any]:
    """What a 2:4 convolution does with an x of this shape, in the weight's dtype.

    Parameters
    ----------
    x_shape : sequence of int
        [batch, C_in, *extents].
    weight : Sparse24Conv or Sparse24ConvPanels
        Only its sizes and which of the two it is matter, and its device where none is given.
    stride, padding, dilation, padding_mode
        The convolution's.
    channels_last : bool
        Of x, where its dimensions have that memory format.
    device : torch.device or dict, optional
        The CPU, a GPU that is here, or what describes any other: ``capability`` (10 * major +
        minor), ``multiprocessors``, ``shared_bytes`` of a thread block, ``l2_bytes``.

    Returns
    -------
    dict
        ``target``, ``kernel`` and ``why``. On the CPU ``kernel`` is "pairs", "serial", or "dense"
        for torch's convolution, ``threads`` are how many work, and of "pairs" there is how it cuts
        the outputs up. On a GPU, of a packed weight: "dense", or a kernel of 2:4 GEMMs, with how it
        cuts up the product of the weight and the pixels, and whether by arithmetic it ``pays``.

    Raises
    ------
    TypeError, ValueError
        As the product itself.
    """
    packed = isinstance(weight, Sparse24ConvPanels)
    where = weight.device if device is None else device
    rest = (stride, padding, dilation, padding_mode, channels_last)
    return _choice(x_shape, weight, packed, where, *rest)


def pays_to_pack(
    weight: Sparse24Conv, stride: Sizes = 1, padding: Sizes | str = 0, dilation: Sizes = 1
) -> bool:
    """Whether a kernel reads panels of it that is faster than torch with the dense weight."""
    device = weight.device
    kernel, axes = weight.shape[2:], len(weight.shape) - 2
    steps = per_axis(_OP, "dilation", dilation, axes, 1)
    windows = (step * (size - 1) + 1 for step, size in zip(steps, kernel, strict=True))
    many = (2**20, weight.shape[1] * weight.groups, *windows)
    geometry = (stride, padding, dilation)
    if gpu_of(device) is None:
        on_cpu = device.type == "cpu"
        return on_cpu and _choice(many, weight, False, device, *geometry)["kernel"] == "pairs"
    if obstacle(device) is not None:
        return False
    return bool(_choice(many, weight, True, device, *geometry).get("pays", False))


def _choice(
    x_shape: Sequence[int],
    weight: Sparse24Conv | Sparse24ConvPanels,
    packed: bool,
    device: torch.device | dict[str, int],
    *geometry: Any,
) -> dict[str, Any]:
    x, y, of = without_content(_OP, x_shape, weight, *geometry)
    gpu = gpu_of(device)
    if gpu is None:
        return choose(x, y, of, packed, is_channels_last(x))
    if not packed:
        return {"target": "torch", "kernel": "dense", "why": "a weight in training"}
    return _ask(_C.sparse24_conv_choose_cuda, x, y, of, gpu)


def sparse24_conv_ways(
    x_shape: Sequence[int],
    weight: Sparse24ConvPanels,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    device: torch.device | dict[str, int] | None = None,
) -> list[Way]:
    """Every way in which a GPU's kernels gather pixels, none on the CPU.

    As ``sparse24_conv_choice`` otherwise.
    """
    x, y, of = without_content(_OP, x_shape, weight, stride, padding, dilation, padding_mode)
    gpu = gpu_of(weight.device if device is None else device)
    ways: list[Way] = [] if gpu is None else _ask(_C.sparse24_conv_ways_cuda, x, y, of, gpu)
    return ways


def sparse24_conv_by_way(
    way: Way,
    x: Tensor,
    weight: Sparse24ConvPanels,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The convolution by one of ``sparse24_conv_ways``, without a gradient."""
    kind = (weight.shape, weight.groups)
    conv = prepare(_OP, x, *kind, stride, padding, dilation, padding_mode)
    geometry = Geometry(*kind, conv.stride, conv.padding, conv.dilation)
    y = empty_result(_OP, conv.x, None, geometry)
    by_way(conv.x, y, weight.panels, None, geometry, "none", _C.cuda_most_workspace_bytes, way)
    return conv.result(y)


def _ask(
    ask: Callable[..., Any], x: Tensor, y: Tensor, geometry: Geometry, gpu: int | dict[str, int]
) -> Any:
    ask = on_cuda(_OP, ask) if isinstance(gpu, int) else ask
    return ask(*asked_of_cuda(x, y, geometry), gpu)
