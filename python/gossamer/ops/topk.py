"""topk_decode: sums of the rows of a dictionary that k-sparse codes name.

A code has, of each token, k values and the rows that they belong to. ``topk_decode`` applies
autocast, ``_decode_autograd`` picks the gradient or goes below it, and ``_decode_native`` crosses
into C++. The gradients are made of two more registered ops (``topk_gradient``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .._wide import wide_matmul
from .operands import (
    all_autocast_to,
    apply_function,
    as_rows,
    autocast_dtype,
    check_bias,
    check_devices,
    check_dtypes,
    gradient_wanted,
    row_major,
    saved_for,
)
from .topk_dense import dense_decode, dense_wins
from .topk_gradient import Values, Weight, check_codes, has_cuda_kernel, named_rows

_DECODE = "topk_decode"


def topk_decode(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Sums of k rows of a dictionary: ``y = sum_j values[..., j] * weight[indices[..., j]] + b``.

    What a sparse autoencoder's decoder computes of its k active latents, without the zeros of all
    others; ``torch.nn.functional.embedding_bag(mode="sum", per_sample_weights=values)`` with a
    bias, any floating dtype and deterministic gradients. Where a batch names the rows of a large
    dictionary several times each, the rows are copied to the caches in tiles and summed there.

    Parameters
    ----------
    values : Tensor
        [..., k] in the dtype of ``weight``; k may be 0.
    indices : Tensor
        [..., k] int32 or int64, from 0 to width - 1, in any order. A row named twice counts twice.
    weight : Tensor
        [width, d]: float32, bfloat16, float16, or float64 (serial kernel). Other strides than
        contiguous columns cost a copy at every call. ``nn.Linear(width, d)`` holds the transpose.
    bias : Tensor, optional
        [d] in the dtype of ``weight``.

    Returns
    -------
    Tensor
        [..., d] in the dtype of ``weight``, contiguous, summed in float32 (float64). Under
        autocast values, weight and bias are cast to autocast's dtype first. Bit-identical for any
        number of threads where k is below a tenth of the width.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel, or ``indices`` are neither int32 nor int64.
    ValueError
        If shapes or devices do not match, or an index is outside 0 to width - 1, which is found
        before any row is read. On a GPU, which would have to wait to say so, what such an index
        takes part in is NaN (in float64, which has no kernels there, torch's device assertion).

    Notes
    -----
    The gradient to ``weight`` is dense; each of its rows is summed by one thread in the order of
    the tokens. Where k is a tenth of the width or more and the tokens are many, torch's dense
    product may be faster and is taken, for the result and for each gradient by itself; its order of
    sums is torch's. A row with an infinity or a NaN reaches the tokens that name it, and no others,
    either way. On a GPU no sum is made by atomics, and the calls can be captured in a CUDA graph.

    References
    ----------
    Gao et al., "Scaling and evaluating sparse autoencoders", 2024 (arXiv:2406.04093).

    Examples
    --------
    >>> import torch, gossamer
    >>> x, dictionary = torch.randn(8, 64), torch.randn(1024, 64) / 8
    >>> values, indices = gossamer.topk_encode(x, dictionary, k=32)
    >>> y = gossamer.topk_decode(values, indices, dictionary)
    """
    autocast = autocast_dtype(weight)
    if autocast is not None:
        values, weight, bias = all_autocast_to(autocast, values, weight, bias)
    check_dtypes(_DECODE, weight.dtype, values=values, bias=bias)
    if values.shape != indices.shape or values.dim() == 0:
        raise ValueError(
            f"{_DECODE}: values have shape {list(values.shape)} and indices "
            f"{list(indices.shape)}, expected both [..., k]"
        )
    dims, shape = values.dim(), values.shape[:-1]
    rows = values if dims == 2 else as_rows(values, dims)
    call = _decode if is_recorded() else _decode_autograd
    y: Tensor = call(rows, indices if dims == 2 else as_rows(indices, dims), weight, bias)
    return y if dims == 2 else y.view(*shape, y.shape[1])


library.define(
    "topk_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_decode = torch.ops.gossamer.topk_decode.default


def _decode_native(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _decode_empty(values, indices, weight, bias)
    if dense_wins("decode", weight.dtype, indices.shape, weight.shape[0], _C.target()):
        dense = dense_decode(values, indices, weight, bias)
        if dense is not None:
            return dense
    _C.topk_decode(
        y,
        values.contiguous(),
        indices.contiguous(),
        row_major(weight),
        None if bias is None else bias.contiguous(),
        torch.get_num_threads(),
    )
    return y


def _decode_cuda(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _decode_fake(values, indices, weight, bias)
    if has_cuda_kernel(weight):
        operands = (values.contiguous(), indices.contiguous(), row_major(weight))
        _C.topk_decode_cuda(y, *operands, None if bias is None else bias.contiguous())
        return y
    if weight.itemsize > 2 or bias is None:
        if indices.numel() == 0:
            y.zero_()
        else:  # summed in float32 and rounded
            y = F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)
        return y if bias is None else y + bias
    for some, rows in named_rows(weight, indices):
        y[some] = wide_matmul(values[some].unsqueeze(1), rows).squeeze(1) + bias
    return y


def _decode_fake(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_devices(_DECODE, weight, values=values, indices=indices, bias=bias)
    return _decode_empty(values, indices, weight, bias)


def _decode_empty(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_codes(_DECODE, values, indices)
    if weight.dim() != 2:
        raise ValueError(f"{_DECODE}: weight has shape {list(weight.shape)}, expected [width, d]")
    check_bias(_DECODE, bias, weight.shape[1])
    return weight.new_empty((indices.shape[0], weight.shape[1]))


def _decode_autograd(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if gradient_wanted(values, weight, bias):
        y: Tensor = _apply_decode(values, indices, weight, bias)
        return y
    if calls_cpu_kernel(values, indices, weight, bias):
        return _decode_native(values, indices, weight, bias)
    if calls_cuda_kernel(values, indices, weight, bias):
        return _decode_cuda(values, indices, weight, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _decode(values, indices, weight, bias)


class Decode(torch.autograd.Function):
    """dv = dy at the rows of W, dW = v dy summed by row, db = dyᵀ 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _decode(values, indices, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, indices, weight, _ = inputs
        ctx.width = weight.shape[0]
        ctx.save_for_backward(
            saved_for(weight, values),
            indices,
            saved_for(values, weight),
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            Values.apply(dy, indices, weight) if wanted[0] else None,
            None,
            Weight.apply(values, indices, dy, ctx.width) if wanted[2] else None,
            dy.sum(0) if wanted[3] else None,
        )


_apply_decode = apply_function(Decode)


library.impl(_DECODE, _decode_native, "CPU")
library.impl(_DECODE, _decode_cuda, "CUDA")
library.impl(_DECODE, _decode_autograd, "Autograd")
torch.library.register_fake("gossamer::topk_decode", _decode_fake, lib=library)
