"""k-sparse codes: of each token k values and the rows of a dictionary that they belong to.

``topk_decode`` sums the rows, ``topk_encode`` finds the codes. Each applies autocast, then its
autograd function picks the gradient or goes below it, and ``_native`` crosses into C++. The
gradients are made of two more registered ops (``topk_gradient``).
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
    apply_function,
    as_rows,
    autocast_dtype,
    autocast_to,
    check_bias,
    check_devices,
    check_dtypes,
    check_features,
    gradient_wanted,
)
from .topk_dense import dense_decode, dense_wins
from .topk_gradient import Values, Weight, check_codes, has_cuda_kernel, named_rows, rows_of

_DECODE, _ENCODE = "topk_decode", "topk_encode"
# Of the pre-activations that exist at once. A GPU's product of fewer tokens would take longer to
# read the weight than to multiply.
_DENSE_BYTES, _DENSE_BYTES_CUDA = 32 << 20, 256 << 20


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
        values, weight = autocast_to(values, autocast), autocast_to(weight, autocast)
        bias = None if bias is None else autocast_to(bias, autocast)
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


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token: ``topk(x @ weight.T + b, k)``, then ReLU.

    The pre-activations are torch's dense product, of some tokens at a time: at most 32 MiB of them
    exist at once (256 MiB on a GPU). One pass over each token's finds its k largest (two on a GPU).

    Parameters
    ----------
    x : Tensor
        [..., d] in the dtype of ``weight``.
    weight : Tensor
        [width, d]: float32, bfloat16, float16 or float64, as ``nn.Linear(d, width)`` holds it.
    bias : Tensor, optional
        [width] in the dtype of ``weight``.
    k : int
        From 1 to width.
    relu : bool
        Whether negative values among the k become 0; their indices stay.

    Returns
    -------
    values : Tensor
        [..., k] in the dtype of ``weight``, largest first; NaN counts as the largest.
    indices : Tensor
        [..., k] int64. Of equal pre-activations the lower index comes first, so that the same
        pre-activations always have the same code.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel.
    ValueError
        If shapes or devices do not match, or k is below 1 or above width.

    Notes
    -----
    Gradients flow through the k kept entries only, and to x, weight and bias by sums of k rows a
    token. The selection is deterministic; the pre-activations are so as far as torch's product is.
    On a GPU codes of more than 1024 entries are found by a stable sort of all pre-activations.

    References
    ----------
    Makhzani and Frey, "k-Sparse Autoencoders", 2013 (arXiv:1312.5663). Gao et al., "Scaling and
    evaluating sparse autoencoders", 2024 (arXiv:2406.04093).

    Examples
    --------
    >>> import torch, gossamer
    >>> encoder = torch.nn.Linear(64, 1024)
    >>> x = torch.randn(8, 64)
    >>> values, indices = gossamer.topk_encode(x, encoder.weight, encoder.bias, k=32)
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, weight = autocast_to(x, autocast), autocast_to(weight, autocast)
        bias = None if bias is None else autocast_to(bias, autocast)
    check_dtypes(_ENCODE, weight.dtype, x=x, bias=bias)
    dims, shape = x.dim(), x.shape[:-1]
    if weight.dim() != 2:
        raise ValueError(f"{_ENCODE}: weight has shape {list(weight.shape)}, expected [width, d]")
    check_features(_ENCODE, x, dims, weight.shape[1])
    call = _encode if is_recorded() else _encode_autograd
    values, indices = call(as_rows(x, dims), weight, bias, k, relu)
    return values.view(*shape, k), indices.view(*shape, k)


library.define(
    "topk_decode(Tensor values, Tensor indices, Tensor weight, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, int k, bool relu) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_decode = torch.ops.gossamer.topk_decode.default
_encode = torch.ops.gossamer.topk_encode.default


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
        rows_of(weight),
        None if bias is None else bias.contiguous(),
        torch.get_num_threads(),
    )
    return y


def _decode_cuda(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _decode_fake(values, indices, weight, bias)
    if has_cuda_kernel(weight):
        operands = (values.contiguous(), indices.contiguous(), rows_of(weight))
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


class _Decode(torch.autograd.Function):
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
            values if weight.requires_grad else None,
            indices,
            weight if values.requires_grad else None,
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


_apply_decode = apply_function(_Decode)


def _encode_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    values, indices = _encode_empty(x, weight, bias, k)
    tokens, width = x.shape[0], weight.shape[0]
    together = min(max(_DENSE_BYTES // (width * weight.itemsize), 1), tokens)
    dense = weight.new_empty((together, width))
    for first in range(0, tokens, max(together, 1)):
        some = slice(first, first + together)
        part = dense[: min(together, tokens - first)]
        if bias is None:
            torch.mm(x[some], weight.t(), out=part)
        else:
            torch.addmm(bias, x[some], weight.t(), out=part)
        _C.topk_select(values[some], indices[some], part, relu, torch.get_num_threads())
    return values, indices


def _encode_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    codes = values, indices = _encode_fake(x, weight, bias, k, relu)
    if has_cuda_kernel(weight) and k <= _C.topk_most_selected:
        together = max(_DENSE_BYTES_CUDA // (weight.shape[0] * weight.itemsize), 1)
        for first in range(0, x.shape[0], together):
            some = slice(first, first + together)
            # torch may give back a transposed product.
            dense = F.linear(x[some], weight, bias).contiguous()
            _C.topk_select_cuda(values[some], indices[some], dense, relu)
            del dense  # before those of the next tokens exist
        return codes
    dense = F.linear(x, weight, bias)
    values, indices = dense.sort(dim=-1, descending=True, stable=True)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    return (values.relu() if relu else values), indices


def _encode_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    check_devices(_ENCODE, x, weight=weight, bias=bias)
    return _encode_empty(x, weight, bias, k)


def _encode_empty(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    width = weight.shape[0]
    if not 1 <= k <= width:
        raise ValueError(f"{_ENCODE}: k is {k}, expected 1 to {width}, the rows of the weight")
    check_bias(_ENCODE, bias, width)
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


def _encode_autograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    if gradient_wanted(x, weight, bias):
        code: tuple[Tensor, Tensor] = _apply_encode(x, weight, bias, k, relu)
        return code
    if calls_cpu_kernel(x, weight, bias):
        return _encode_native(x, weight, bias, k, relu)
    with torch._C._AutoDispatchBelowAutograd():
        return _encode(x, weight, bias, k, relu)


class _Encode(torch.autograd.Function):
    """With dz = dv where the entry is not cut off: dx = decode(dz, W), dW = dz x by row."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _encode(x, weight, bias, k, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, _, relu = inputs
        values, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.width = weight.shape[0]
        ctx.save_for_backward(
            x if weight.requires_grad else None,
            weight if x.requires_grad else None,
            indices,
            values if relu else None,
        )

    @staticmethod
    def backward(ctx: Any, dz: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices, values = ctx.saved_tensors
        if values is not None:
            dz = dz.masked_fill(values.detach() <= 0, 0)
        dx = dweight = db = None
        if ctx.needs_input_grad[0]:
            dx = _Decode.apply(dz, indices, weight, None)
        if ctx.needs_input_grad[1]:
            dweight = Weight.apply(dz, indices, x, ctx.width)
        if ctx.needs_input_grad[2]:
            ones = dz.new_ones((dz.shape[0], 1))
            db = Weight.apply(dz, indices, ones, ctx.width).squeeze(-1)
        return dx, dweight, db, None, None


_apply_encode = apply_function(_Encode)

library.impl(_DECODE, _decode_native, "CPU")
library.impl(_DECODE, _decode_cuda, "CUDA")
library.impl(_DECODE, _decode_autograd, "Autograd")
torch.library.register_fake("gossamer::topk_decode", _decode_fake, lib=library)
library.impl(_ENCODE, _encode_native, "CPU")
library.impl(_ENCODE, _encode_cuda, "CUDA")
library.impl(_ENCODE, _encode_autograd, "Autograd")
torch.library.register_fake("gossamer::topk_encode", _encode_fake, lib=library)
