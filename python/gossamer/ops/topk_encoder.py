"""topk_encode: the k largest pre-activations of each token, as a k-sparse code.

The function applies autocast, ``_encode_autograd`` picks the gradient or goes below it, and
``_encode_native`` multiplies by torch and crosses into C++ for the selection.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, is_recorded, library
from .._wide import FEW_ROWS, has_loops_only
from ..formats.geometry import whole_number
from .operands import (
    all_autocast_to,
    apply_function,
    as_rows,
    autocast_dtype,
    check_bias,
    check_devices,
    check_dtypes,
    check_features,
    gradient_wanted,
    saved_for,
)
from .topk import Decode
from .topk_dense import DENSE_BYTES, some_tokens
from .topk_gradient import Weight, has_cuda_kernel

_ENCODE = "topk_encode"
# Of the pre-activations that exist at once. On a GPU it is DENSE_BYTES: a product of fewer tokens
# would take longer to read the weight than to multiply.
_CPU_BYTES = 32 << 20


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    k: int | None = None,
    *,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each token: ``topk(x @ weight.T + b, k)``, then ReLU.

    The pre-activations are torch's dense product, of some tokens at a time: at most 32 MiB of them
    exist at once (256 MiB on a GPU). One pass over each token's finds its k largest (two on a GPU).
    On a CPU for which torch has only loops over a 16-bit type, from 16 tokens on x and the weight
    are multiplied in float32, of which there are copies meanwhile.

    Parameters
    ----------
    x : Tensor
        [..., d] in the dtype of ``weight``.
    weight : Tensor
        [width, d]: float32, bfloat16, float16 or float64, as ``nn.Linear(d, width)`` holds it.
    bias : Tensor, optional
        [width] in the dtype of ``weight``.
    k : int
        From 1 to width; has to be given.
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
        x, weight, bias = all_autocast_to(autocast, x, weight, bias)
    check_dtypes(_ENCODE, weight.dtype, x=x, bias=bias)
    try:
        k = whole_number(k)
    except TypeError as wrong:
        raise TypeError(f"{_ENCODE}: k is {wrong}") from None
    dims, shape = x.dim(), x.shape[:-1]
    if weight.dim() != 2:
        raise ValueError(f"{_ENCODE}: weight has shape {list(weight.shape)}, expected [width, d]")
    check_features(_ENCODE, x, dims, weight.shape[1])
    call = _encode if is_recorded() else _encode_autograd
    values, indices = call(as_rows(x, dims), weight, bias, k, relu)
    return values.view(*shape, k), indices.view(*shape, k)


library.define(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, int k, bool relu) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_encode = torch.ops.gossamer.topk_encode.default


def _encode_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    values, indices = _encode_empty(x, weight, bias, k)
    x = x.contiguous()  # or oneDNN multiplies what lies between rows of bfloat16, by 0
    tokens, width = x.shape[0], weight.shape[0]
    if has_loops_only(x) and tokens >= FEW_ROWS:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    each = weight.itemsize if weight.dtype == values.dtype else weight.itemsize + values.itemsize
    together = min(max(_CPU_BYTES // (width * each), 1), tokens)
    dense = weight.new_empty((together, width))
    for first in range(0, tokens, max(together, 1)):
        some = slice(first, first + together)
        part = dense[: min(together, tokens - first)]
        if bias is None:
            torch.mm(x[some], weight.t(), out=part)
        else:
            torch.addmm(bias, x[some], weight.t(), out=part)
        part = part.to(values.dtype)
        _C.topk_select(values[some], indices[some], part, relu, torch.get_num_threads())
    return values, indices


def _encode_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, relu: bool
) -> tuple[Tensor, Tensor]:
    codes = values, indices = _encode_fake(x, weight, bias, k, relu)
    if has_cuda_kernel(weight) and k <= _C.topk_most_selected:
        for some in some_tokens(len(x), weight.shape[0] * weight.itemsize, DENSE_BYTES):
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

    generate_vmap_rule = True

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
            saved_for(weight, x),
            saved_for(x, weight),
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
            dx = Decode.apply(dz, indices, weight, None)
        if ctx.needs_input_grad[1]:
            dweight = Weight.apply(dz, indices, x, ctx.width)
        if ctx.needs_input_grad[2]:
            ones = dz.new_ones((dz.shape[0], 1))
            db = Weight.apply(dz, indices, ones, ctx.width).squeeze(-1)
        return dx, dweight, db, None, None


_apply_encode = apply_function(_Encode)

library.impl(_ENCODE, _encode_native, "CPU")
library.impl(_ENCODE, _encode_cuda, "CUDA")
library.impl(_ENCODE, _encode_autograd, "Autograd")
torch.library.register_fake("gossamer::topk_encode", _encode_fake, lib=library)
