"""The product by a weight's projection, whose gradient the weight is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._wide import matmul
from ..formats import PANEL_DTYPES, Sparse24, Sparse24Panels
from ..ops.operands import without_autocast
from ..ops.sparse24 import sparse24_linear_tensors
from ..projection24 import mvue_24

# From so many rows on the product gains more from panels than they take to be made.
_ROWS_WORTH_PANELS = 256


def _product(x: Tensor, weight: Sparse24, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, by panels where there are rows enough to pay for them."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows >= _ROWS_WORTH_PANELS and weight.dtype in PANEL_DTYPES:
        panels = Sparse24Panels.from_sparse24(weight)
        return sparse24_linear_tensors(x, panels.panels, None, bias, panels.shape, panels.dtype)
    return sparse24_linear_tensors(
        x, weight.values, weight.indices, bias, weight.shape, weight.dtype
    )


class StraightProduct(torch.autograd.Function):
    """dx = dy P(W); dW = dyᵀ x, of P(W) and given to W; db = the sum of dy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dense: Tensor,
        values: Tensor,
        indices: Tensor,
        both: bool,
        mvue: bool,
    ) -> Tensor:
        ctx.both, ctx.mvue = both, mvue
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, dense if wants_x else None)
        shape = (dense.shape[0], dense.shape[1])
        with without_autocast(x):
            return _product(x, Sparse24(values, indices, shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dense = ctx.saved_tensors
        dx = dweight = db = None
        with without_autocast(dy):
            if ctx.needs_input_grad[0]:
                if ctx.both:
                    dx = _product(dy, Sparse24.from_dense(dense.t().contiguous()), None)
                else:
                    dx = matmul(dy, dense)
            if ctx.needs_input_grad[1]:
                rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
                if ctx.mvue and len(rows) > 0:
                    estimate = Sparse24.from_dense(mvue_24(rows.t().contiguous()))
                    dweight = _product(inputs.t().contiguous(), estimate, None).t()
                else:
                    dweight = matmul(rows.t(), inputs)
            if ctx.needs_input_grad[2]:
                db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dweight, db, None, None, None, None, None
