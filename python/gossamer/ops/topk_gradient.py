"""The two products that gradients of k-sparse codes are made of, as registered ops.

Of codes (values v, indices i) [B, k] and dy [B, d]:

    topk_values  g [B, k], g[t, j] = dy[t] . W[i[t, j]]
    topk_weight  G [width, d], G[r] = sum of v[t, j] dy[t] over all (t, j) with i[t, j] = r

Both and ``topk_decode`` are bilinear, and the derivatives of each are the two others, so any order
of derivative exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._cuda_module import has_kernels
from .._library import library
from .._wide import wide_matmul
from .operands import row_major
from .topk_dense import dense_values, dense_values_cuda, dense_weight, dense_wins, some_tokens

_GATHERED_BYTES = 64 << 20  # of the rows that are copied together


def check_codes(op: str, values: Tensor, indices: Tensor) -> None:
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(
            f"{op}: values have shape {list(values.shape)} and indices {list(indices.shape)}, "
            "expected both [B, k]"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices are {indices.dtype}, expected int32 or int64")


def has_cuda_kernel(t: Tensor) -> bool:
    """Or torch's operations compute it on a GPU: in float64, or without the CUDA module."""
    return t.is_cuda and t.dtype != torch.float64 and has_kernels(t.device)


def named_rows(weight: Tensor, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens at a time, with the rows of W that their codes name: [tokens, k, d]."""
    token_bytes = indices.shape[1] * weight.shape[1] * weight.itemsize
    for some in some_tokens(len(indices), token_bytes, _GATHERED_BYTES):
        yield some, weight[indices[some].long()]


def _values_native(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if dense_wins("values", dy.dtype, indices.shape, weight.shape[0], _C.target()):
        return dense_values(dy, indices, weight)
    values = _values_fake(dy, indices, weight)
    _C.topk_values(
        values, row_major(dy), indices.contiguous(), row_major(weight), torch.get_num_threads()
    )
    return values


def _values_cuda(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if dense_wins("values", dy.dtype, indices.shape, weight.shape[0], "cuda"):
        return dense_values_cuda(dy, indices, weight)
    values = _values_fake(dy, indices, weight)
    if has_cuda_kernel(weight):
        _C.topk_values_cuda(values, row_major(dy), indices.contiguous(), row_major(weight))
        return values
    for some, rows in named_rows(weight, indices):
        values[some] = wide_matmul(rows, dy[some].unsqueeze(2)).squeeze(2)
    return values


def _values_fake(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return dy.new_empty(indices.shape)


def _weight_native(values: Tensor, indices: Tensor, dy: Tensor, width: int) -> Tensor:
    if dense_wins("weight", dy.dtype, indices.shape, width, _C.target()):
        dense = dense_weight(values, indices, dy, width)
        if dense is not None:
            return dense
    weight = _weight_fake(values, indices, dy, width)
    _C.topk_weight(
        weight, values.contiguous(), indices.contiguous(), row_major(dy), torch.get_num_threads()
    )
    return weight


def _weight_cuda(values: Tensor, indices: Tensor, dy: Tensor, width: int) -> Tensor:
    weight = _weight_fake(values, indices, dy, width)
    if indices.numel() == 0:
        return weight.zero_()
    # A row of G is a bag of those of dy, in the order of the tokens: summed in float32, in one
    # order, and rounded once. Sorting 32 bits takes half the passes that 64 do.
    within = indices if indices.dtype == torch.int32 else indices.clamp(-1, width).int()
    rows, order = within.flatten().sort(stable=True)
    bounds = torch.arange(width + 1, dtype=rows.dtype, device=rows.device)
    begins = torch.searchsorted(rows, bounds)
    if has_cuda_kernel(dy):
        codes = (values.contiguous(), indices.contiguous())
        _C.topk_weight_cuda(weight, *codes, row_major(dy), begins, order)
        return weight
    tokens, share = order // indices.shape[1], values.flatten()[order]
    share = torch.where(rows < width, share, 0)  # the last bag ends where all pairs do
    return F.embedding_bag(tokens, dy, begins[:-1], mode="sum", per_sample_weights=share)


def _weight_fake(values: Tensor, indices: Tensor, dy: Tensor, width: int) -> Tensor:
    return dy.new_empty((width, dy.shape[1]))


library.define(
    "topk_values(Tensor dy, Tensor indices, Tensor weight) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "topk_weight(Tensor values, Tensor indices, Tensor dy, SymInt width) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _name, _native, _cuda, _fake in (
    ("topk_values", _values_native, _values_cuda, _values_fake),
    ("topk_weight", _weight_native, _weight_cuda, _weight_fake),
):
    library.impl(_name, _native, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"gossamer::{_name}", _fake, lib=library)

_values = torch.ops.gossamer.topk_values.default
_weight = torch.ops.gossamer.topk_weight.default


def _decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    from .topk import _decode_autograd  # which is made of these

    y: Tensor = _decode_autograd(values, indices, weight, None)
    return y


class Values(torch.autograd.Function):
    """g = dy at the rows of W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _values(dy, indices, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, indices, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _decode(grad, indices, weight) if wanted[0] else None,
            None,
            Weight.apply(grad, indices, dy, weight.shape[0]) if wanted[2] else None,
        )


class Weight(torch.autograd.Function):
    """G = v dy, summed by row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, indices: Tensor, dy: Tensor, width: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _weight(values, indices, dy, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, dy = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            Values.apply(dy, indices, grad) if wanted[0] else None,
            None,
            _decode(values, indices, grad) if wanted[2] else None,
            None,
        )


library.impl("topk_values", Values.apply, "Autograd")
library.impl("topk_weight", Weight.apply, "Autograd")
