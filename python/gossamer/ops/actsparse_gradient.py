"""The gradients of the products that skip zero activations, each made of the other product.

A wanted output of ``actsparse_outputs`` reads a row of the weight that an active input of
``actsparse_linear`` adds: they are each other's transposes, so any order of derivative exists.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .._wide import matmul
from .operands import saved_for


def check_given(op: str, threshold: float | None) -> None:
    if threshold is None:
        raise TypeError(f"{op}: threshold is None, expected a number")


def check_threshold(op: str, threshold: float, dtype: torch.dtype) -> None:
    check_given(op, threshold)
    if not 0 <= threshold <= torch.finfo(dtype).max:
        raise ValueError(
            f"{op}: threshold is {threshold}, expected 0 or more, and finite in {dtype}"
        )


def active(x: Tensor, threshold: float) -> Tensor:
    """Where ``|x| > threshold``, rounded to the dtype of x, or x is NaN."""
    return ~(x.abs() <= threshold)


def masked(x: Tensor, threshold: float) -> Tensor:
    """x, with zeros for its inactive entries."""
    return x if threshold == 0 else torch.where(active(x, threshold), x, 0)


def _rows(t: Tensor) -> Tensor:
    """As a matrix: ``as_rows`` flattens, for which there are no batched gradients."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


class Linear(torch.autograd.Function):
    """The gradient: dx = dy Wᵀ where x is active, dW = xᵀ dy of the masked x, db = dyᵀ 1."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gossamer.actsparse_linear.default(
                x, weight_kn, bias, threshold, "none"
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight_kn, _, ctx.threshold = inputs
        # Without a threshold x serves dW alone; the weight serves dx alone.
        ctx.save_for_backward(
            x if ctx.threshold > 0 else saved_for(weight_kn, x), saved_for(x, weight_kn)
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_kn = ctx.saved_tensors
        dx = dweight = db = None
        if ctx.needs_input_grad[0] and ctx.threshold == 0:
            dx = matmul(dy, weight_kn.t())
        elif ctx.needs_input_grad[0]:
            wanted = active(x, ctx.threshold)
            dx = Outputs.apply(dy, weight_kn, wanted, None)
        if ctx.needs_input_grad[1]:
            dweight = matmul(_rows(masked(x, ctx.threshold)).t(), _rows(dy))
        if ctx.needs_input_grad[2]:
            db = _rows(dy).sum(0)
        return dx, dweight, db, None


class Outputs(torch.autograd.Function):
    """The gradient, of dy where it is wanted: dx = dy W, dW = dyᵀ x, db = dyᵀ 1."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gossamer.actsparse_outputs.default(x, weight, wanted, bias, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, wanted, _ = inputs
        ctx.save_for_backward(saved_for(weight, x), saved_for(x, weight), wanted)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, wanted = ctx.saved_tensors
        dx = dweight = db = None
        dy = torch.where(wanted, dy, 0)
        if ctx.needs_input_grad[0]:
            dx = Linear.apply(dy, weight, None, 0.0)
        rows = _rows(dy)
        if ctx.needs_input_grad[1]:
            dweight = matmul(rows.t(), _rows(x))
        if ctx.needs_input_grad[3]:
            db = rows.sum(0)
        return dx, dweight, None, db
