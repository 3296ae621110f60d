"""sparse24_linear_quantized: the linear layer with an 8-bit or 4-bit 2:4 weight W [N, K].

``sparse24_linear_quantized_tensors`` applies autocast and settles the result's dtype; ``_native``
or ``_native_cuda`` quantises x where the weight asks for it, allocates the result and crosses into
C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import calls_cpu_kernel, is_recorded, library
from ..formats import Sparse24Quantized, Sparse24QuantizedPanels
from .cuda_workspace import aligned_rows, workspace
from .operands import (
    activation_of,
    as_rows,
    autocast_dtype,
    check_bias,
    check_devices,
    check_features,
)
from .quantize_rows import FLOAT_DTYPES, ROW_DTYPES, inference_only

_OP = "sparse24_linear_quantized"


def sparse24_linear_quantized(
    x: Tensor,
    weight: Sparse24Quantized | Sparse24QuantizedPanels,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Linear layer with a quantised 2:4 weight: ``act(x @ W.T + bias)``, for inference.

    A weight of int8 or float8_e4m3fn is multiplied in that type. A floating-point ``x`` is
    quantised first, row by row (``gossamer.ops.quantize_rows``), which changes the answer; a row
    with a NaN or an infinity gives a row of NaN. Products of int8 are summed exactly, those of
    float8_e4m3fn in float32; the sum is then scaled in float32 by ``x_scale[m]`` and the weight's
    scale of the row, in this order: where the first product leaves float32's range the result is
    infinite (x from about 1e35 on).

    A weight of int4 is widened instead: ``x`` stays as it is, and sums run in float32 over the
    stored slots only.

    Kernels read ``Sparse24QuantizedPanels`` of their device; a portable weight is turned into them
    at each call, which takes longer than the product of a few rows. On a CPU int8 products run in
    int8 (with VNNI where the processor has it), the others in float32; 2^18 columns of int8 and
    more go by the serial kernel. A GPU needs compute capability 8.0, for float8_e4m3fn 8.9, 9.0 or
    12.x, of whose sums tensor cores may keep as few as 14 bits; int4 wants x in bfloat16 or float16
    there and groups of a multiple of 32 columns, int8 at most 2^18 columns.

    Parameters
    ----------
    x : Tensor
        [..., K] float32, bfloat16 or float16, of any strides; leading dimensions may be empty. Or
        for a weight of int8 or float8_e4m3fn, in that type already and with ``x_scale``.
    weight : Sparse24Quantized or Sparse24QuantizedPanels
        The [N, K] weight, on the device of x.
    bias : Tensor, optional
        [N] in the dtype of the result.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.
    x_scale : Tensor, optional
        [...] float32: what each row of a quantised ``x`` is to be multiplied by.
    out_dtype : torch.dtype, optional
        float32, bfloat16 or float16. By default the dtype of ``x``; a quantised ``x`` has no such
        default, so that nothing is rounded further than was asked for.

    Returns
    -------
    Tensor
        [..., N] in ``out_dtype``, contiguous. Under autocast a floating-point x is cast to
        autocast's dtype first, and bias to the result's.

    Raises
    ------
    TypeError
        If ``weight`` is neither of the formats, or dtypes do not go together.
    ValueError
        If shapes or devices do not match, the activation is unknown, or the GPU has no such
        product.
    RuntimeError
        If a gradient is wanted of x, bias or scales: there is none.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378);
    Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), for scales by row.
    """
    if isinstance(weight, Sparse24Quantized):
        stored, indices, value_dtype = weight.values, weight.indices, weight.values.dtype
    elif isinstance(weight, Sparse24QuantizedPanels):
        stored, indices, value_dtype = weight.panels, None, weight.storage
    else:
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected Sparse24Quantized or "
            "Sparse24QuantizedPanels (gossamer.formats.Sparse24Quantized.from_sparse24 makes one)"
        )
    tensors = (stored, indices, weight.scales, value_dtype)
    activation = "none" if activation is None else activation
    return sparse24_linear_quantized_tensors(
        x, *tensors, bias, weight.shape, weight.group, activation, x_scale, out_dtype
    )


def sparse24_linear_quantized_tensors(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    shape: tuple[int, int],
    group: int,
    activation: str = "none",
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``sparse24_linear_quantized`` on a format's tensors: values and indices, or panels and None.

    ``value_dtype`` is that of the values; uint8 holds pairs of int4.
    """
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype in FLOAT_DTYPES:
        x = x.to(autocast)
    if out_dtype is None:
        if x.dtype in ROW_DTYPES and x.dtype == value_dtype:
            raise TypeError(
                f"{_OP}: x is {x.dtype}, so out_dtype has to say what comes out: float32, "
                "bfloat16 or float16"
            )
        out_dtype = x.dtype
    if autocast is not None and bias is not None and bias.dtype in FLOAT_DTYPES:
        bias = bias.to(out_dtype)
    out_features, in_features = shape
    weight, sizes = (stored, indices, scales, value_dtype), (in_features, out_features, group)
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _linear if is_recorded() else _autograd
    y: Tensor = call(x, x_scale, *weight, bias, *sizes, activation, out_dtype)
    return y


# x is quantised inside the op, so that a kernel for another device may do that on its way.
library.define(
    f"{_OP}(Tensor x, Tensor? x_scale, Tensor values, Tensor? indices, Tensor scales, "
    "ScalarType value_dtype, Tensor? bias, SymInt in_features, SymInt out_features, SymInt group, "
    "str activation, ScalarType out_dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_linear = torch.ops.gossamer.sparse24_linear_quantized.default
_quantize_rows = torch.ops.gossamer.quantize_rows.default
_to_panels = torch.ops.gossamer.sparse24_to_panels.default


def check_operands(
    x: Tensor,
    x_scale: Tensor | None,
    values: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    """Raise on what a user can get wrong, with or without content; the border checks the rest."""
    check_features(_OP, x, x.dim(), in_features)
    is_float = x.dtype in FLOAT_DTYPES
    if not is_float and (value_dtype == torch.uint8 or x.dtype != value_dtype):
        also = "" if value_dtype == torch.uint8 else f" or {value_dtype}, as the weight"
        raise TypeError(f"{_OP}: x is {x.dtype}, expected float32, bfloat16, float16{also}")
    if (x_scale is None) != is_float:
        given = "no x_scale" if x_scale is None else "an x_scale"
        raise ValueError(
            f"{_OP}: x is {x.dtype} with {given}; a quantised x has one, any other x has none"
        )
    if x_scale is not None and x_scale.dtype != torch.float32:
        raise TypeError(f"{_OP}: x_scale is {x_scale.dtype}, expected float32")
    if x_scale is not None and x_scale.shape != x.shape[:-1]:
        raise ValueError(
            f"{_OP}: x_scale has shape {list(x_scale.shape)}, expected {list(x.shape[:-1])}"
        )
    if out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{_OP}: out_dtype is {out_dtype}, expected float32, bfloat16 or float16")
    if bias is not None and bias.dtype != out_dtype:
        raise TypeError(f"{_OP}: bias is {bias.dtype}, the result {out_dtype}")
    check_bias(_OP, bias, out_features)
    activation_of(_OP, activation)
    check_devices(_OP, x, x_scale=x_scale, weight=values, indices=indices, scales=scales, bias=bias)


def _native(
    x: Tensor,
    x_scale: Tensor | None,
    values: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    weight, sizes = (values, indices, scales, value_dtype), (in_features, out_features)
    check_operands(x, x_scale, *weight, bias, *sizes, activation, out_dtype)
    dims = x.dim()
    rows = as_rows(x, dims)
    if rows.stride(1) != 1:
        # contiguous() gives an empty x back as it is.
        rows = rows.clone(memory_format=torch.contiguous_format)
    out = x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)
    _C.sparse24_linear_quantized(
        as_rows(out, dims),
        rows,
        None if x_scale is None else x_scale.reshape(-1).contiguous(),
        values.contiguous(),
        None if indices is None else indices.contiguous(),
        str(value_dtype),
        scales.contiguous(),
        None if bias is None else bias.contiguous(),
        group,
        activation,
        torch.get_num_threads(),
    )
    return out


def _native_cuda(
    x: Tensor,
    x_scale: Tensor | None,
    values: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    weight, sizes = (values, indices, scales, value_dtype), (in_features, out_features)
    check_operands(x, x_scale, *weight, bias, *sizes, activation, out_dtype)
    if indices is not None:
        # One pass over the weight, for which a product of many rows has time.
        values = _to_panels(values, indices, in_features)
    rows = x.reshape(-1, in_features)
    row_scales = None if x_scale is None else x_scale.reshape(-1).contiguous()
    if row_scales is None and value_dtype != torch.uint8:
        rows, row_scales = _quantize_rows(rows, value_dtype)
    rows = aligned_rows(rows)
    out = x.new_empty((rows.shape[0], out_features), dtype=out_dtype)
    _C.sparse24_linear_quantized_cuda(
        out,
        rows,
        row_scales,
        values.contiguous(),
        str(value_dtype),
        scales.contiguous(),
        None if bias is None else bias.contiguous(),
        group,
        activation,
        *workspace(rows, out_features, in_features, value_dtype),
    )
    return out.view(*x.shape[:-1], out_features)


def _fake(
    x: Tensor,
    x_scale: Tensor | None,
    values: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    weight, sizes = (values, indices, scales, value_dtype), (in_features, out_features)
    check_operands(x, x_scale, *weight, bias, *sizes, activation, out_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


def _autograd(
    x: Tensor,
    x_scale: Tensor | None,
    values: Tensor,
    indices: Tensor | None,
    scales: Tensor,
    value_dtype: torch.dtype,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    inference_only(_OP, x=x, x_scale=x_scale, values=values, scales=scales, bias=bias)
    if calls_cpu_kernel(x, x_scale, values, indices, scales, bias):
        return _native(x, x_scale, values, indices, scales, value_dtype, bias, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = _linear(x, x_scale, values, indices, scales, value_dtype, bias, *rest)
    return y


library.impl(_OP, _native, "CPU")
library.impl(_OP, on_cuda(_OP, _native_cuda), "CUDA")
library.impl(_OP, _autograd, "Autograd")
torch.library.register_fake(f"gossamer::{_OP}", _fake, lib=library)
