"""sparse24_linear: y[m, n] = act(sum_k x[m, k] W[n, k] + b[n]) for a 2:4 weight W [N, K].

``sparse24_linear_tensors`` applies autocast, ``_linear_autograd`` picks the gradient or goes below
it, ``_linear_native`` or ``_linear_native_cuda`` allocates the result and crosses into C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._cuda_module import on_cuda
from .._library import calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .._wide import matmul
from ..formats import Sparse24, Sparse24Panels
from .cuda_workspace import aligned_rows, workspace
from .operands import (
    activation_of,
    all_autocast_to,
    apply_function,
    as_rows,
    autocast_dtype,
    autocast_to,
    check_bias,
    check_devices,
    check_features,
    gradient_wanted,
    saved_for,
)
from .sparse24_layout import Gather, ToDense

_OP = "sparse24_linear"


def sparse24_linear(
    x: Tensor,
    weight: Sparse24 | Sparse24Panels,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Linear layer with a 2:4 weight: ``act(x @ W.T + bias)``.

    Sums run over the stored slots only: a NaN or an infinity in ``x`` goes through every stored
    position, explicit zeros included, and never through a pruned one.

    Parameters
    ----------
    x : Tensor
        [..., K] in the weight's dtype, of any strides; leading dimensions may be empty.
    weight : Sparse24 or Sparse24Panels
        The [N, K] weight. Gradients flow to ``Sparse24.values``, and to nothing in the panels.
    bias : Tensor, optional
        [N] in the weight's dtype.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.

    Returns
    -------
    Tensor
        [..., N] in the dtype of ``x``, contiguous. Under autocast x, weight and bias are cast to
        autocast's dtype first, as ``torch.nn.functional.linear`` does; panels are read in their
        own dtype and the result is returned in autocast's.

    Raises
    ------
    TypeError
        If ``weight`` is not one of the two formats, or dtypes differ.
    ValueError
        If shapes or devices do not match, or the activation is unknown.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    if activation is None:
        activation = "none"
    if isinstance(weight, Sparse24):
        stored, indices = weight.values, weight.indices
    elif isinstance(weight, Sparse24Panels):
        stored, indices = weight.panels, None
    else:
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected Sparse24 or "
            "Sparse24Panels (gossamer.formats.Sparse24.from_dense makes one of a dense weight)"
        )
    return sparse24_linear_tensors(x, stored, indices, bias, weight.shape, weight.dtype, activation)


def sparse24_linear_tensors(
    x: Tensor,
    stored: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """``sparse24_linear`` on a format's tensors: values and indices, or panels and None."""
    autocast = autocast_dtype(x)
    if autocast is not None:
        if indices is not None:
            stored = autocast_to(stored, autocast)
            dtype = stored.dtype
        # Panels keep their dtype: rewriting them at every call would cost more than the product.
        x, bias = all_autocast_to(dtype, x, bias)
    # Panels are words: past this line nothing knows the dtype of what they hold.
    if x.dtype != dtype:
        raise TypeError(f"{_OP}: x is {x.dtype}, the weight {dtype}")
    out_features, in_features = shape
    # Eager code skips the dispatcher's Python call of the autograd kernel, 2 us of overhead.
    call = _linear if is_recorded() else _linear_autograd
    y: Tensor = call(x, stored, indices, bias, in_features, out_features, activation)
    return y if autocast is None else autocast_to(y, autocast)


library.define(
    "sparse24_linear(Tensor x, Tensor values, Tensor? indices, Tensor? bias, "
    "SymInt in_features, SymInt out_features, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_linear = torch.ops.gossamer.sparse24_linear.default
_from_panels = torch.ops.gossamer.sparse24_from_panels.default
_to_panels = torch.ops.gossamer.sparse24_to_panels.default


def _linear_native(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    dims = x.dim()
    check_features(_OP, x, dims, in_features)
    rows = as_rows(x, dims)
    if rows.stride(1) != 1:  # each task of the kernels would gather its columns anew
        rows = rows.contiguous()
    # In its final shape: a view made here could not be written to where gradients are recorded.
    out = x.new_empty((*x.shape[:-1], out_features))
    _C.sparse24_linear(
        as_rows(out, dims),
        rows,
        values.contiguous(),
        None if indices is None else indices.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
        torch.get_num_threads(),
    )
    return out


def _linear_native_cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    if x.device != values.device:  # one of them may be on the CPU
        raise ValueError(f"{_OP}: x is on {x.device}, the weight on {values.device}")
    dims = x.dim()
    check_features(_OP, x, dims, in_features)
    rows = aligned_rows(as_rows(x, dims))
    if indices is not None:
        if x.dtype == torch.float64:
            raise TypeError(f"{_OP}: float64 has a kernel on the CPU only")
        # One pass over the weight, for which a product of many rows has time.
        values = _to_panels(values.detach(), indices, in_features)
    out = x.new_empty((*x.shape[:-1], out_features))
    _C.sparse24_linear_cuda(
        as_rows(out, dims),
        rows,
        values.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
        *workspace(rows, out_features, in_features, x.dtype),
    )
    return out


def _linear_fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    check_features(_OP, x, x.dim(), in_features)
    activation_of(_OP, activation)
    check_devices(_OP, x, weight=values, indices=indices, bias=bias)
    check_bias(_OP, bias, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_autograd(
    x: Tensor,
    values: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
) -> Tensor:
    if gradient_wanted(x, values, bias):
        y: Tensor = _apply_linear(x, values, indices, bias, in_features, out_features)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        return y if activate is None else activate(y)
    if calls_cpu_kernel(x, values, indices, bias):
        return _linear_native(x, values, indices, bias, in_features, out_features, activation)
    if calls_cuda_kernel(x, values, indices, bias):
        return _linear_on_cuda(x, values, indices, bias, in_features, out_features, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, values, indices, bias, in_features, out_features, activation)


_linear_on_cuda = on_cuda("sparse24_linear", _linear_native_cuda)
library.impl("sparse24_linear", _linear_native, "CPU")
library.impl("sparse24_linear", _linear_on_cuda, "CUDA")
library.impl("sparse24_linear", _linear_autograd, "Autograd")
torch.library.register_fake("gossamer::sparse24_linear", _linear_fake, lib=library)


class _Linear(torch.autograd.Function):
    """The gradient: dx = dy W, dvalues = dyᵀ x at the kept positions, db = the sum of dy."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        indices: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _linear(x, values, indices, bias, in_features, out_features, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, indices, _, ctx.in_features, ctx.out_features = inputs
        ctx.dtype = x.dtype
        # x serves dvalues alone, and the values dx alone.
        ctx.save_for_backward(saved_for(values, x), saved_for(x, values), indices)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        dx = dvalues = db = None
        if ctx.needs_input_grad[0]:
            if indices is None:
                values, indices = _from_panels(values, ctx.in_features, ctx.out_features, ctx.dtype)
            dx = matmul(dy, ToDense.apply(values, indices, ctx.in_features))
        if ctx.needs_input_grad[1]:
            rows = dy.reshape(-1, ctx.out_features)
            dweight = matmul(rows.t(), x.reshape(-1, ctx.in_features))
            dvalues = Gather.apply(dweight, indices)
        if ctx.needs_input_grad[3]:
            db = dy.reshape(-1, ctx.out_features).sum(0)
        return dx, dvalues, None, db, None, None


_apply_linear = apply_function(_Linear)
