"""grouped_linear: y[t] = act(x[t] W[e]ᵀ + b[e]) for tokens sorted by their expert e.

``grouped_linear`` applies autocast, ``_autograd`` picks the gradient or goes below it, ``_native``
or ``_native_cuda`` allocates the result and crosses into C++ (``grouped_cuda``) or torch. The
gradient is made of two more registered ops (``grouped_gradient``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .._wide import wide_matmul
from . import grouped_cuda
from .grouped_gradient import Input, Weight, groups_of
from .operands import (
    activation_of,
    all_autocast_to,
    apply_function,
    autocast_dtype,
    check_devices,
    check_dtypes,
    gradient_wanted,
    row_major,
    saved_for,
)

_OP = "grouped_linear"


def grouped_linear(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One linear layer an expert, over tokens sorted by expert: ``act(x_e @ W_e.T + b_e)``.

    The product is block-diagonal: expert e takes the rows ``offsets[e - 1]`` (0 for the first)
    up to ``offsets[e]`` of x. It reads the weights of each expert that has a token once, shares
    them out over the threads by the work they are, and needs no padding of the groups. A token's
    result depends on that token alone, to the bit: not on how many others its expert has, nor on
    the number of threads (on a GPU as the notes say). So a NaN or an infinity in one token reaches
    no other.

    The same block-diagonal product is a grouped 1x1 convolution with a constant number of channels
    a group (E2GC): G groups of C channels over P pixels are G experts of P tokens, ``x`` being
    [G P, C] and ``offsets`` P, 2 P, ..., G P. Larger kernels, and the choice of C, are not here.

    Parameters
    ----------
    x : Tensor
        [T, K], the tokens, of any strides; T may be 0.
    weights : Tensor
        [E, N, K] in the dtype of ``x``: float32, bfloat16, float16, or float64 (serial kernel on
        the CPU). Other strides than a contiguous tensor's cost a copy at every call.
    offsets : Tensor
        [E] int32 or int64, where each expert's tokens end, as ``offs`` of
        ``torch.nn.functional.grouped_mm``: never decreasing, T last. An expert without a token
        repeats the number before it. ``torch.bincount(expert, minlength=E).cumsum(0)`` makes it
        of each token's expert.
    bias : Tensor, optional
        [E, N] in the dtype of ``x``.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.

    Returns
    -------
    Tensor
        [T, N] in the dtype of ``x``, contiguous. Under autocast x, weights and bias are cast to
        autocast's dtype first, as ``torch.nn.functional.linear`` does.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel, or ``offsets`` are neither int32 nor int64.
    ValueError
        If shapes or devices do not match, the activation is unknown, or, on the CPU, ``offsets``
        decrease, leave 0 to T or do not end at T.

    Notes
    -----
    The gradients are dx and dW as dense layers have them, zero for the weights of an expert without
    a token: on the CPU products of torch, one an expert.

    A GPU's kernels, of all three, read the offsets where they lie: nothing waits for the GPU, and a
    CUDA graph may be replayed with others. So nobody checks what they say, either. Wrong ones never
    reach memory outside the tensors, but rows of y and dx that no expert has, such as those past
    the last offset, hold anything, and if offsets decrease all others may, too. On Hopper
    ``torch.nn.functional.grouped_mm`` computes y and dx where experts have many tokens in bfloat16
    (``gossamer.ops.grouped_cuda.grouped_choice``); there a sum's order, and with it the last bits,
    is torch's. float64 is a loop of torch's products, which waits for the offsets and
    checks them.

    References
    ----------
    Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
    Layer", 2017 (arXiv:1701.06538). Gale et al., "MegaBlocks: Efficient Sparse Training with
    Mixture-of-Experts", 2022 (arXiv:2211.15841).

    Examples
    --------
    >>> import torch, gossamer
    >>> tokens, weights = torch.randn(6, 16), torch.randn(4, 32, 16)
    >>> expert = torch.tensor([2, 0, 2, 3, 0, 2])
    >>> order = expert.argsort(stable=True)
    >>> offsets = torch.bincount(expert, minlength=4).cumsum(0)
    >>> y = torch.empty(6, 32)
    >>> y[order] = gossamer.grouped_linear(tokens[order], weights, offsets, activation="silu")
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, weights, bias = all_autocast_to(autocast, x, weights, bias)
    check_dtypes(_OP, weights.dtype, x=x, bias=bias)
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{_OP}: offsets are {type(offsets).__name__}, expected a torch.Tensor")
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    y: Tensor = call(x, weights, offsets, bias, activation or "none")
    return y


library.define(
    "grouped_linear(Tensor x, Tensor weights, Tensor offsets, Tensor? bias, str activation) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.grouped_linear.default


def _native(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    y = _empty_result(x, weights, offsets, bias)
    _C.grouped_linear(
        y,
        row_major(x),
        weights.contiguous(),
        offsets.contiguous(),
        None if bias is None else bias.contiguous(),
        activation,
        torch.get_num_threads(),
    )
    return y


def _native_cuda(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    activate = activation_of(_OP, activation)
    check_devices(_OP, x, weights=weights, offsets=offsets, bias=bias)
    y = _empty_result(x, weights, offsets, bias)
    if grouped_cuda.has_cuda_kernel(x):
        return grouped_cuda.linear(x, weights, offsets, bias, activation, y)
    x, weights = x.contiguous(), weights.contiguous()  # cuBLAS sums in an order for each layout
    for expert, tokens in groups_of(offsets, len(weights), len(x)):
        sums = wide_matmul(x[tokens], weights[expert].t())
        sums = sums if bias is None else sums + bias[expert]
        y[tokens] = sums if activate is None else activate(sums)  # rounded here
    return y


def _fake(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    activation_of(_OP, activation)
    check_devices(_OP, x, weights=weights, offsets=offsets, bias=bias)
    return _empty_result(x, weights, offsets, bias)


def _empty_result(x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() != 2 or weights.dim() != 3:
        raise ValueError(
            f"{_OP}: x has shape {list(x.shape)} and weights {list(weights.shape)}, expected "
            "[T, K] and [E, N, K]"
        )
    experts, outputs, features = weights.shape
    if x.shape[1] != features:
        raise ValueError(f"{_OP}: x has {x.shape[1]} features, the weights expect {features}")
    # Of a size that a compiler does not know, such as bincount's, checked when it runs.
    torch._check_value(
        offsets.dim() == 1 and offsets.shape[0] == experts,
        lambda: (
            f"{_OP}: offsets have shape {list(offsets.shape)}, expected [{experts}]: where the "
            "tokens of each expert end"
        ),
    )
    if bias is not None and bias.shape != (experts, outputs):
        raise ValueError(
            f"{_OP}: bias has shape {list(bias.shape)}, expected [{experts}, {outputs}]"
        )
    return x.new_empty((x.shape[0], outputs))


def _autograd(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    if gradient_wanted(x, weights, bias):
        y: Tensor = _apply_linear(x, weights, offsets, bias)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        return y if activate is None else activate(y)
    if calls_cpu_kernel(x, weights, offsets, bias):
        return _native(x, weights, offsets, bias, activation)
    if calls_cuda_kernel(x, weights, offsets, bias):
        return _native_cuda(x, weights, offsets, bias, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weights, offsets, bias, activation)


library.impl("grouped_linear", _native, "CPU")
library.impl("grouped_linear", _native_cuda, "CUDA")
library.impl("grouped_linear", _autograd, "Autograd")
torch.library.register_fake("gossamer::grouped_linear", _fake, lib=library)


class _Linear(torch.autograd.Function):
    """The gradient of each expert: dx = dy W, dW = dyᵀ x, db = dyᵀ 1."""

    generate_vmap_rule = True  # for per-sample gradients

    @staticmethod
    def forward(x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _op(x, weights, offsets, bias, "none")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, offsets, _ = inputs
        # x serves dW alone, and the weights dx alone.
        ctx.save_for_backward(saved_for(weights, x), saved_for(x, weights), offsets)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, offsets = ctx.saved_tensors
        dx = dweights = db = None
        if ctx.needs_input_grad[0]:
            dx = Input.apply(dy, weights, offsets)
        if ctx.needs_input_grad[1]:
            dweights = Weight.apply(dy, x, offsets)
        if ctx.needs_input_grad[3]:
            db = Weight.apply(dy, dy.new_ones((dy.shape[0], 1)), offsets).squeeze(-1)
        return dx, dweights, None, db


_apply_linear = apply_function(_Linear)
