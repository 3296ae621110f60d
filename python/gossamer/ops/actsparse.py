"""actsparse_linear: y = act((x · [|x| > t]) W + b), where a zero of x saves its row of W [K, N].

``actsparse_linear`` applies autocast, ``_autograd`` picks the gradient (``actsparse_gradient``) or
goes below it, ``_native`` or ``_native_cuda`` allocates the result and crosses into C++ or torch.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .._wide import linear
from .actsparse_cuda import has_rows_kernel, rows_workspace
from .actsparse_gradient import Linear, active, check_given, check_threshold, masked
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
)

_OP = "actsparse_linear"


@overload
def actsparse_linear(
    x: Tensor,
    weight_kn: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    activation: str | None = None,
    return_fraction: Literal[False] = False,
) -> Tensor: ...
@overload
def actsparse_linear(
    x: Tensor,
    weight_kn: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    activation: str | None = None,
    *,
    return_fraction: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def actsparse_linear(
    x: Tensor,
    weight_kn: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    activation: str | None = None,
    return_fraction: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear layer that skips the zeros of its input: ``act((x * active) @ weight_kn + bias)``.

    An input is active unless ``|x| <= threshold``, so NaN and infinities are. The weight lies
    input-major: what an inactive input would be multiplied with is one row of it, which is not
    read. Several tokens share one reading of the rows that any of them has active, and each adds
    those that it has active itself, so the kernels' work falls with the zeros of all tokens and
    their memory traffic with the inputs that are zero in every token. Where so much is active that
    a dense product of the masked x takes less time (tens of tokens, or thousands), that is computed
    instead.

    In the CPU's kernels a token's result depends on that token alone, to the bit: not on the
    others, nor on the number of threads. (Of bfloat16 where the CPU has dot products of it, as long
    as no number on the way is subnormal: beside other tokens those count as zero.) Weights are
    expected to be finite: the dense product multiplies those of inactive inputs by zero.

    Parameters
    ----------
    x : Tensor
        [..., K], of any strides; leading dimensions may be empty.
    weight_kn : Tensor
        [K, N] in the dtype of ``x``: float32, bfloat16, float16, or float64 (serial kernel). It is
        the transpose of ``torch.nn.Linear.weight``. If its columns do not lie next to each other,
        as in ``linear.weight.t()``, every call copies it (on a GPU it multiplies densely).
    bias : Tensor, optional
        [N] in the dtype of ``x``.
    threshold : float
        0 or more. Rounded to the dtype of ``x`` first, as torch does where it compares.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the sum; "gelu" is the exact one, by erf.
    return_fraction : bool
        Whether to return also which fraction of x was active.

    Returns
    -------
    y : Tensor
        [..., N] in the dtype of ``x``, contiguous. Under autocast x, weight and bias are cast to
        autocast's dtype first, as ``torch.nn.functional.linear`` does.
    fraction : Tensor
        float32, of no dimensions; NaN of an empty x. Only with ``return_fraction``.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel.
    ValueError
        If shapes or devices do not match, the activation is unknown, or the threshold is negative
        or not finite in the dtype of ``x``.

    Notes
    -----
    With a threshold of 0 the function is that of ``torch.nn.Linear``, and so is its gradient, also
    where x is 0. With a larger one it jumps at the threshold; its gradient is 0 for inactive
    inputs.

    On a GPU up to 16 rows (one, where rows of the weight do not begin at multiples of 16 bytes)
    are summed by a kernel of its own. Its sums take an order that depends on which inputs any token
    of the call has active, and are the same in every run. More rows, whose zeros nobody can count
    without waiting for the GPU, and float64 are torch's dense product of the masked x.

    References
    ----------
    Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time", 2023
    (arXiv:2310.17157). Liu et al., "Training-Free Activation Sparsity in Large Language Models",
    2024 (arXiv:2408.14690).

    Examples
    --------
    >>> import torch, gossamer
    >>> x, weight_kn = torch.randn(1, 64).relu(), torch.randn(64, 32)
    >>> y, fraction = gossamer.actsparse_linear(x, weight_kn, return_fraction=True)
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, weight_kn, bias = all_autocast_to(autocast, x, weight_kn, bias)
    check_dtypes(_OP, weight_kn.dtype, x=x, bias=bias)
    check_given(_OP, threshold)
    # Eager code skips the dispatcher's Python call of the autograd kernel.
    call = _op if is_recorded() else _autograd
    y: Tensor = call(x, weight_kn, bias, threshold, activation or "none")
    if not return_fraction:
        return y
    return y, active(x.detach(), threshold).to(torch.float32).mean()


library.define(
    "actsparse_linear(Tensor x, Tensor weight_kn, Tensor? bias, float threshold, str activation) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.actsparse_linear.default


def _native(
    x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float, activation: str
) -> Tensor:
    out = _empty_result(x, weight_kn, bias)
    rows = as_rows(x, x.dim())
    rows = row_major(rows)
    computed = _C.actsparse_linear(
        as_rows(out, out.dim()),
        rows,
        row_major(weight_kn),
        None if bias is None else bias.contiguous(),
        threshold,
        activation,
        torch.get_num_threads(),
    )
    return out if computed else _dense(x, weight_kn, bias, threshold, activation)


def _native_cuda(
    x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float, activation: str
) -> Tensor:
    out = _fake(x, weight_kn, bias, threshold, activation)
    rows = as_rows(x, x.dim())
    if not has_rows_kernel(rows.shape[0], weight_kn):
        return _dense(x, weight_kn, bias, threshold, activation)
    _C.actsparse_linear_cuda(
        as_rows(out, out.dim()),
        row_major(rows),
        weight_kn,
        None if bias is None else bias.contiguous(),
        threshold,
        activation,
        *rows_workspace(rows.shape[0], weight_kn),
    )
    return out


def _dense(
    x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float, activation: str
) -> Tensor:
    # Of bfloat16 rows with gaps oneDNN multiplies what lies in the gaps, by 0.
    x = masked(x, threshold).contiguous()
    return linear(x, weight_kn.t(), bias, activation_of(_OP, activation))


def _fake(
    x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float, activation: str
) -> Tensor:
    activation_of(_OP, activation)
    check_devices(_OP, x, weight_kn=weight_kn, bias=bias)
    check_threshold(_OP, threshold, x.dtype)
    return _empty_result(x, weight_kn, bias)


def _empty_result(x: Tensor, weight_kn: Tensor, bias: Tensor | None) -> Tensor:
    if weight_kn.dim() != 2:
        raise ValueError(f"{_OP}: weight_kn has shape {list(weight_kn.shape)}, expected [K, N]")
    check_features(_OP, x, x.dim(), weight_kn.shape[0])
    check_bias(_OP, bias, weight_kn.shape[1])
    return x.new_empty((*x.shape[:-1], weight_kn.shape[1]))


def _autograd(
    x: Tensor, weight_kn: Tensor, bias: Tensor | None, threshold: float, activation: str
) -> Tensor:
    if gradient_wanted(x, weight_kn, bias):
        y: Tensor = _apply_linear(x, weight_kn, bias, threshold)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        return y if activate is None else activate(y)
    if calls_cpu_kernel(x, weight_kn, bias):
        return _native(x, weight_kn, bias, threshold, activation)
    if calls_cuda_kernel(x, weight_kn, bias):
        return _native_cuda(x, weight_kn, bias, threshold, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weight_kn, bias, threshold, activation)


library.impl("actsparse_linear", _native, "CPU")
library.impl("actsparse_linear", _native_cuda, "CUDA")
library.impl("actsparse_linear", _autograd, "Autograd")
torch.library.register_fake("gossamer::actsparse_linear", _fake, lib=library)


_apply_linear = apply_function(Linear)
