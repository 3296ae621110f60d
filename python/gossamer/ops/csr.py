"""csr_linear: y = act(x Wᵀ + b) with a weight of which single places are stored, anywhere.

``csr_linear`` applies autocast, ``_autograd`` picks the gradient or goes below it, ``_native`` or
``_native_cuda`` allocates the result and crosses into C++ or torch. The gradient is made of two
more registered ops (``csr_gradient``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, is_recorded, library
from .._wide import wide_matmul
from ..formats import SparseCsr
from .csr_gradient import Input, Values, dense_of
from .csr_pattern import checked_pattern
from .operands import (
    activation_of,
    all_autocast_to,
    apply_function,
    as_rows,
    autocast_dtype,
    check_bias,
    check_devices,
    check_dtypes,
    check_features,
    gradient_wanted,
    row_major,
    saved_for,
)

_OP = "csr_linear"


def csr_linear(
    x: Tensor,
    weight: SparseCsr,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Linear layer with an unstructured sparse weight: ``act(x @ W.T + bias)``.

    Sums run over the live places only: a NaN or an infinity in ``x`` goes through every live
    place of its column, stored zeros included, and never through the others. A result does not
    depend, to the bit, on the number of threads.

    Parameters
    ----------
    x : Tensor
        [..., K] in the weight's dtype, of any strides; leading dimensions may be empty.
    weight : SparseCsr
        The [N, K] weight. Gradients flow to its values, of live places only, and never by way of
        a dense matrix.
    bias : Tensor, optional
        [N] in the weight's dtype.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.

    Returns
    -------
    Tensor
        [..., N] in the dtype of ``x``, contiguous. Under autocast x, values and bias are cast to
        autocast's dtype first, as ``torch.nn.functional.linear`` does.

    Raises
    ------
    TypeError
        If ``weight`` is no ``SparseCsr``, or dtypes differ.
    ValueError
        If shapes or devices do not match, the indices are not valid, or the activation is unknown.

    Notes
    -----
    There is no kernel for GPUs: there the product is torch's, with the dense weight, which is
    written at every call, as are the gradients; its order of sums is that of cuBLAS. A weight on
    a GPU thus saves memory between calls, and no time.

    References
    ----------
    Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020 (arXiv:2006.10901), for the
    products (SpMM, SDDMM) that a sparse layer is trained with.

    Examples
    --------
    >>> import torch, gossamer
    >>> dense = torch.randn(64, 32).relu()
    >>> weight = gossamer.formats.SparseCsr.from_dense(dense)
    >>> y = gossamer.csr_linear(torch.randn(8, 32), weight)
    """
    if not isinstance(weight, SparseCsr):
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}, expected SparseCsr "
            "(gossamer.formats.SparseCsr.from_dense makes one of a dense weight)"
        )
    tensors = (weight.values, weight.crow_indices, weight.col_indices)
    return csr_linear_tensors(x, *tensors, bias, weight.shape, activation or "none")


def csr_linear_tensors(
    x: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    activation: str = "none",
) -> Tensor:
    """``csr_linear`` on the weight's tensors."""
    autocast, dims = autocast_dtype(x), x.dim()
    check_features(_OP, x, dims, shape[1])
    if autocast is not None:
        x, values, bias = all_autocast_to(autocast, x, values, bias)
    check_dtypes(_OP, values.dtype, x=x, bias=bias)
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    rows = as_rows(x, dims)
    y: Tensor = call(rows, values, crow_indices, col_indices, bias, shape[0], activation)
    return y if dims == 2 else y.view(*x.shape[:-1], shape[0])


library.define(
    "csr_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, "
    "SymInt outputs, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.csr_linear.default


def _native(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    y = _empty_result(x, values, crow, col, bias, outputs)
    checked_pattern(_OP, crow, col, (outputs, x.shape[1]))
    _C.csr_linear(
        y,
        row_major(x),
        values.contiguous(),
        crow.contiguous(),
        col.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
        torch.get_num_threads(),
    )
    return y


def _native_cuda(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    activate = activation_of(_OP, activation)
    check_devices(_OP, x, values=values, crow_indices=crow, col_indices=col, bias=bias)
    y = _empty_result(x, values, crow, col, bias, outputs)
    sums = wide_matmul(x, dense_of(values, crow, col, (outputs, x.shape[1])).t())
    sums = sums if bias is None else sums + bias
    return y.copy_(sums if activate is None else activate(sums))  # rounded here


def _fake(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    activation_of(_OP, activation)
    check_devices(_OP, x, values=values, crow_indices=crow, col_indices=col, bias=bias)
    return _empty_result(x, values, crow, col, bias, outputs)


def _empty_result(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"{_OP}: x has shape {list(x.shape)}, expected [rows, K]")
    if crow.dim() != 1 or crow.shape[0] != outputs + 1:
        raise ValueError(
            f"{_OP}: crow_indices have shape {list(crow.shape)}, expected [{outputs + 1}]"
        )
    torch._check_value(
        values.dim() == 1 and col.dim() == 1 and values.shape[0] == col.shape[0],
        lambda: (
            f"{_OP}: values have shape {list(values.shape)} and col_indices {list(col.shape)}, "
            "expected [nnz] of both"
        ),
    )
    check_bias(_OP, bias, outputs)
    return x.new_empty((x.shape[0], outputs))


def _autograd(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    if gradient_wanted(x, values, bias):
        y: Tensor = _apply_linear(x, values, crow, col, bias, outputs)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        return y if activate is None else activate(y)
    if calls_cpu_kernel(x, values, crow, col, bias):
        return _native(x, values, crow, col, bias, outputs, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, values, crow, col, bias, outputs, activation)


library.impl("csr_linear", _native, "CPU")
library.impl("csr_linear", _native_cuda, "CUDA")
library.impl("csr_linear", _autograd, "Autograd")
torch.library.register_fake("gossamer::csr_linear", _fake, lib=library)


class _Linear(torch.autograd.Function):
    """dx = dy W, dvalues = dyᵀ x at the live places, db = dyᵀ 1."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(
        x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, outputs: int
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(x, values, crow, col, bias, outputs, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, crow, col, _, _ = inputs
        ctx.inputs = x.shape[1]
        # x serves dvalues alone, and the values dx alone.
        ctx.save_for_backward(saved_for(values, x), saved_for(x, values), crow, col)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, crow, col = ctx.saved_tensors
        dx = dvalues = db = None
        if values is not None and ctx.needs_input_grad[0]:
            dx = Input.apply(dy, values, crow, col, ctx.inputs)
        if x is not None and ctx.needs_input_grad[1]:
            dvalues = Values.apply(dy, x, crow, col)
        if ctx.needs_input_grad[4]:
            db = dy.sum(0)
        return dx, dvalues, None, None, db, None


_apply_linear = apply_function(_Linear)
