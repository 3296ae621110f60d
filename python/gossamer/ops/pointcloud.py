"""pointcloud_conv: y[j] = act(b + sum of x[i] W[t]) over the pairs (i, j) of a kernel map's taps t.

``pointcloud_conv`` applies autocast, ``_autograd`` picks the gradient or goes below it, ``_native``
allocates the result and crosses into C++. The op and its weight's gradient, an op too, are linear
in two operands each, and the derivatives of each are the two again: any order of them exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C, reference
from .._cuda_module import has_kernels
from .._library import TAGS_NOT_CAPTURED, calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .operands import (
    activation_of,
    all_autocast_to,
    apply_function,
    autocast_dtype,
    check_bias,
    check_devices,
    check_dtypes,
    gradient_wanted,
    row_major,
    saved_for,
)
from .pointcloud_layout import MAP, Pairs, output_table, pair_segments

if TYPE_CHECKING:
    from ..pointcloud import KernelMap

_OP = "pointcloud_conv"


def pointcloud_conv(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    map: KernelMap,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Convolution over the active voxels of a sparse grid, by a kernel map.

    Output voxel j gets ``act(bias + sum of feats[i] @ weight[t])`` over the pairs (i, j) of every
    tap t, which is what a dense convolution makes of a grid that is zero elsewhere. Features are
    gathered, multiplied and summed tile by tile of outputs: nothing of the pairs' size is stored.
    The result is the same, bit for bit, for any number of threads. A NaN or an infinity in one
    voxel's features reaches the outputs that have a pair with it and no others.

    Parameters
    ----------
    feats : Tensor
        [n_in, C_in], a row a voxel in the order of its owner, of any strides; n_in may be 0.
    weight : Tensor
        [T, C_in / groups, C_out] in the dtype of ``feats``: float32, bfloat16, float16, or float64
        (serial kernel). T is the product of the map's ``kernel_size``, the last axis fastest.
        Other strides than a contiguous tensor's cost a copy at every call.
    bias : Tensor, optional
        [C_out] in the dtype of ``feats``.
    map : KernelMap
        The pairs, tap by tap.
    groups : int
        Group g takes the g-th equal part of the channels of ``feats`` to the g-th equal part of
        those of the result; C_in = C_out = groups is a depthwise convolution.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.

    Returns
    -------
    Tensor
        [n_out, C_out] in the dtype of ``feats``, contiguous, a row an output voxel in the order of
        its owner. Under autocast feats, weight and bias are cast to autocast's dtype first, as
        ``torch.nn.functional.conv3d`` does.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel.
    ValueError
        If shapes, groups or devices do not match, the map names a voxel that is not there, its
        ranks do not ascend within a tap, or the activation is unknown.

    Notes
    -----
    16-bit types are summed in float32. The gradient of ``feats`` is the convolution by the
    transposed map, and that of ``weight`` a sum over fixed segments of pairs: both are the same for
    any number of threads, too.

    On a GPU the first call with a map makes a table of it for the kernels, and waits for the GPU if
    the map was made by hand; the table is kept as long as the map, and later calls can be captured
    in a CUDA graph. Weights that are not finite may reach outputs that lack their tap there.
    Groups, depthwise ones too, are summed in float32 without tensor cores. In float64 a tap at a
    time is gathered, multiplied and added by torch, in the order of the taps.

    References
    ----------
    Graham, Engelcke and van der Maaten, "3D Semantic Segmentation with Submanifold Sparse
    Convolutional Networks", 2018 (arXiv:1711.10275). Choy, Gwak and Savarese, "4D Spatio-Temporal
    ConvNets: Minkowski Convolutional Neural Networks", 2019 (arXiv:1904.08755).
    """
    autocast = autocast_dtype(feats)
    if autocast is not None:
        feats, weight, bias = all_autocast_to(autocast, feats, weight, bias)
    check_dtypes(_OP, weight.dtype, feats=feats, bias=bias)
    if feats.dim() == 2 and feats.shape[0] != map.n_in:
        raise ValueError(f"{_OP}: feats have {feats.shape[0]} rows, the map {map.n_in} inputs")
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    rest = (*map.tensors, map.n_out, groups, activation or "none")
    y: Tensor = call(feats, weight, bias, *rest)
    return y


library.define(
    f"pointcloud_conv(Tensor feats, Tensor weight, Tensor? bias, {MAP}, SymInt n_out, int groups, "
    "str activation) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
library.define(
    f"pointcloud_conv_weight_grad(Tensor dy, Tensor feats, {MAP}, int groups) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
_op = torch.ops.gossamer.pointcloud_conv.default
_weight_op = torch.ops.gossamer.pointcloud_conv_weight_grad.default


def _native(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *pairs, n_out, groups, activation = rest
    y = _empty_result(feats, weight, bias, n_out, groups)
    dense = (None if t is None else t.contiguous() for t in (weight, bias, *pairs))
    rest = (*dense, groups, activation, torch.get_num_threads())
    _C.pointcloud_conv(y, row_major(feats), *rest)
    return y


def _native_cuda(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *pairs, n_out, groups, activation = rest
    y = _empty_result(feats, weight, bias, n_out, groups)
    if not _has_cuda_kernel(feats):
        name = None if activation == "none" else activation
        operands: tuple[Any, ...] = (*pairs, n_out, groups, name)
        # cuBLAS sums in an order for each layout.
        return reference.pointcloud_conv(feats.contiguous(), weight.contiguous(), bias, *operands)
    table = output_table(tuple(pairs), feats.shape[0], n_out)
    dense = (weight.contiguous(), None if bias is None else bias.contiguous())
    _C.pointcloud_conv_cuda(y, row_major(feats), *dense, *table, groups, activation)
    return y


def _has_cuda_kernel(feats: Tensor) -> bool:
    """Or torch computes tap by tap, on a GPU: in float64."""
    return feats.dtype != torch.float64 and has_kernels(feats.device)


def _fake(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *_, n_out, groups, activation = rest
    activation_of(_OP, activation)
    check_devices(_OP, feats, weight=weight, bias=bias)
    return _empty_result(feats, weight, bias, n_out, groups)


def _empty_result(
    feats: Tensor, weight: Tensor, bias: Tensor | None, n_out: int, groups: int
) -> Tensor:
    if feats.dim() != 2 or weight.dim() != 3:
        raise ValueError(
            f"{_OP}: feats have shape {list(feats.shape)} and weight {list(weight.shape)}, "
            "expected [n_in, C_in] and [T, C_in / groups, C_out]"
        )
    if groups < 1 or weight.shape[2] % groups != 0:
        raise ValueError(f"{_OP}: {groups} groups do not divide {weight.shape[2]} outputs")
    if feats.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"{_OP}: feats have {feats.shape[1]} channels, the weight expects "
            f"{groups * weight.shape[1]}"
        )
    check_bias(_OP, bias, weight.shape[2])
    return feats.new_empty((n_out, weight.shape[2]))


def _autograd(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *pairs, n_out, groups, activation = rest
    if gradient_wanted(feats, weight, bias):
        y: Tensor = _conv(feats, weight, bias, *pairs, n_out, groups)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        return y if activate is None else activate(y)
    if calls_cpu_kernel(feats, weight, bias, *pairs):
        return _native(feats, weight, bias, *rest)
    if calls_cuda_kernel(feats, weight, bias):
        return _native_cuda(feats, weight, bias, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(feats, weight, bias, *rest)


class _Conv(torch.autograd.Function):
    """dx by the transposed map, dW by the sum of outer products, db = dyᵀ 1."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(feats: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(feats, weight, bias, *rest, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        feats, weight, _, *pairs, _, ctx.groups = inputs
        ctx.n_in = feats.shape[0]
        # feats serve dW alone, and the weight dx alone.
        ctx.save_for_backward(saved_for(weight, feats), saved_for(feats, weight), *pairs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight, *tensors = ctx.saved_tensors
        pairs, groups, wanted = Pairs(*tensors), ctx.groups, ctx.needs_input_grad
        dx = dw = db = None
        if wanted[0]:
            dx = feats_gradient(dy, weight, pairs, ctx.n_in, groups)
        if wanted[1]:
            dw = weight_gradient(dy, feats, *pairs, groups)
        if wanted[2]:
            db = dy.sum(0)
        return dx, dw, db, *(None,) * 7


class _WeightGradient(torch.autograd.Function):
    """dW [T, C_in / groups, C_out] of dy and feats."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, feats: Tensor, *rest: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _weight_op(dy, feats, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, feats, *pairs, ctx.groups = inputs
        ctx.save_for_backward(dy, feats, *pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, feats, *tensors = ctx.saved_tensors
        pairs, groups, wanted = Pairs(*tensors), ctx.groups, ctx.needs_input_grad
        ddy = _conv(feats, grad, None, *pairs, dy.shape[0], groups) if wanted[0] else None
        dx = feats_gradient(dy, grad, pairs, feats.shape[0], groups) if wanted[1] else None
        return ddy, dx, *(None,) * 6


_conv = apply_function(_Conv)
weight_gradient = apply_function(_WeightGradient)


def feats_gradient(dy: Tensor, weight: Tensor, pairs: Pairs, n_in: int, groups: int) -> Tensor:
    taps, group_in, outputs = weight.shape
    by_group = weight.view(taps, group_in, groups, outputs // groups).transpose(1, 3)
    transposed = by_group.reshape(taps, outputs // groups, groups * group_in)
    dx: Tensor = _conv(dy, transposed, None, *pairs.transposed(), n_in, groups)
    return dx


def _weight_native(dy: Tensor, feats: Tensor, *rest: Any) -> Tensor:
    *pairs, groups = rest
    dw = _weight_fake(dy, feats, *rest)
    dense = (None if t is None else t.contiguous() for t in pairs)
    rest = (*dense, groups, torch.get_num_threads())
    _C.pointcloud_conv_weight_grad(dw, row_major(dy), row_major(feats), *rest)
    return dw


def _weight_native_cuda(dy: Tensor, feats: Tensor, *rest: Any) -> Tensor:
    *pairs, groups = rest
    if not _has_cuda_kernel(feats):
        return reference.pointcloud_conv_weight_grad(dy.contiguous(), feats.contiguous(), *rest)
    dw = _weight_fake(dy, feats, *rest)
    segments = pair_segments(tuple(pairs), feats.shape[0], dy.shape[0])
    sums = (len(segments.begins) - 1) * dw[0].numel()
    partial = dw.new_empty(sums, dtype=torch.float32)
    _C.pointcloud_conv_weight_grad_cuda(
        dw, row_major(dy), row_major(feats), *segments, groups, partial
    )
    return dw


def _weight_fake(dy: Tensor, feats: Tensor, *rest: Any) -> Tensor:
    _, _, tap_offsets, _, _, groups = rest
    return dy.new_empty((tap_offsets.shape[0] - 1, feats.shape[1] // groups, dy.shape[1]))


library.impl("pointcloud_conv", _native, "CPU")
library.impl("pointcloud_conv", _native_cuda, "CUDA")
library.impl("pointcloud_conv", _autograd, "Autograd")
library.impl("pointcloud_conv_weight_grad", _weight_native, "CPU")
library.impl("pointcloud_conv_weight_grad", _weight_native_cuda, "CUDA")
library.impl("pointcloud_conv_weight_grad", weight_gradient, "Autograd")
torch.library.register_fake("gossamer::pointcloud_conv", _fake, lib=library)
torch.library.register_fake("gossamer::pointcloud_conv_weight_grad", _weight_fake, lib=library)
