"""quantize_rows: the 8-bit numbers and the scale of each row that stand for an x at run time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C, reference
from .._library import library

ROW_DTYPES = (torch.int8, torch.float8_e4m3fn)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Quantise along the last dimension, by its largest magnitude: ``x`` is about q * scale.

    The scale is that magnitude over the largest number of the type (127 or 448), in float32 and
    at least its smallest normal number; x / scale is rounded to nearest even. So an entry is off
    by at most half a scale (int8), or by the larger of 2^-4 of itself and 2^-10 scales
    (float8_e4m3fn). A row of zeros has scale 1. A row with a NaN or an infinity has the numbers 0
    and the scale NaN, so whatever is computed from it is NaN.

    Parameters
    ----------
    x : Tensor
        [..., K] float32, bfloat16 or float16.
    dtype : torch.dtype
        int8 or float8_e4m3fn.

    Returns
    -------
    q : Tensor
        [..., K] of ``dtype``.
    scale : Tensor
        [...] float32.

    Raises
    ------
    TypeError
        If a dtype is not one of those.
    ValueError
        If ``x`` has no last dimension or it is empty.
    RuntimeError
        If a gradient is wanted: rounding has none.
    """
    q, scale = torch.ops.gossamer.quantize_rows(x, dtype)
    return q, scale


library.define(
    "quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if dtype not in ROW_DTYPES:
        raise TypeError(f"quantize_rows: dtype {dtype}, expected int8 or float8_e4m3fn")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"quantize_rows: x is {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"quantize_rows: x has shape {list(x.shape)}, its last dimension has to hold something"
        )


def _native(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    numbers, scales = _fake(x, dtype)
    features = x.shape[-1]
    _C.quantize_rows(
        x.contiguous().view(-1, features),
        numbers.view(-1, features),
        scales.view(-1),
        torch.get_num_threads(),
    )
    return numbers, scales


def _native_cuda(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(x, dtype)
    return reference.quantize_rows(x.contiguous(), dtype)


def _fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(x, dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def inference_only(op: str, **operands: Tensor | None) -> None:
    """Raise where ``op``, which has no gradient, would drop one that is wanted."""
    for name, operand in operands.items():
        if operand is not None and _gradient_wanted(operand):
            raise RuntimeError(
                f"{op}: a gradient is wanted of {name}, but quantised products are for inference "
                "only: run under torch.no_grad(), or train with gossamer.sparse24_linear"
            )


def _gradient_wanted(operand: Tensor) -> bool:
    if torch.is_grad_enabled() and operand.requires_grad:
        return True
    # Forward-mode derivatives exist without requires_grad.
    forward = forward_ad._current_level >= 0 and operand.is_floating_point()
    return forward and forward_ad.unpack_dual(operand).tangent is not None


def _autograd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inference_only("quantize_rows", x=x)
    with torch._C._AutoDispatchBelowAutograd():
        q, scale = torch.ops.gossamer.quantize_rows(x, dtype)
        return q, scale


library.impl("quantize_rows", _native, "CPU")
library.impl("quantize_rows", _native_cuda, "CUDA")
library.impl("quantize_rows", _autograd, "Autograd")
torch.library.register_fake("gossamer::quantize_rows", _fake, lib=library)
