"""actsparse_outputs: y[m, n] = act(x[m] · W[n] + b[n]) where (m, n) is wanted, and 0 elsewhere.

The transpose of ``actsparse_linear``, and the gradient of each is made of the other: there a zero
of x saves a row of the weight, here one of y does. The rows are those of torch.nn.Linear.weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from .._library import calls_cpu_kernel, calls_cuda_kernel, is_recorded, library
from .._wide import linear
from .actsparse_cuda import has_outputs_kernel
from .actsparse_gradient import Outputs, active, check_threshold
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

_OP = "actsparse_outputs"


def actsparse_outputs(
    x: Tensor,
    weight: Tensor,
    wanted: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """The wanted outputs of a linear layer, without reading the weights of the others.

    Parameters
    ----------
    x : Tensor
        [..., K], of any strides; leading dimensions may be empty.
    weight : Tensor
        [N, K] in the dtype of ``x``, as ``torch.nn.Linear.weight``: float32, bfloat16, float16, or
        float64 (serial kernel).
    wanted : Tensor
        Which outputs each token wants, in one of three forms:

        - bool [..., N]: those that are True;
        - a gate [..., N] in the dtype of ``x``: those with ``|gate| > threshold``, and NaN;
        - int32 or int64 [..., S] or [S], the same for all tokens: those of these indices. The
          result is [..., S] then, in their order.
    bias : Tensor, optional
        [N] in the dtype of ``x``.
    threshold : float
        0 or more, for a gate; rounded to its dtype first.
    activation : {None, "relu", "gelu", "silu"}
        Applied to the wanted outputs; "gelu" is the exact one, by erf.

    Returns
    -------
    Tensor
        [..., N] in the dtype of ``x``, 0 where not wanted, or [..., S] for indices. Autocast casts
        as in ``actsparse_linear``.

    Raises
    ------
    TypeError
        If dtypes differ or have no kernel.
    ValueError
        If shapes or devices do not match, an index is out of range, the activation is unknown, the
        threshold of a gate is negative or not finite in its dtype, or one is given without a gate.

    Notes
    -----
    The sums are computed row by row of the weight, each for the tokens that want it. Where a dense
    product takes less time, because there are several tokens that want much, that is computed and
    masked instead. On a GPU that is so above 8 tokens (above one, where rows of x and the weight do
    not begin at multiples of 16 bytes), and of float64. No gradient flows to ``wanted``.

    Examples
    --------
    >>> import torch, gossamer
    >>> x, gate = torch.randn(1, 16), torch.randn(1, 64).relu()
    >>> up = gossamer.actsparse_outputs(x, torch.randn(64, 16), gate)
    """
    autocast = autocast_dtype(x)
    if autocast is not None:
        x, weight, bias = all_autocast_to(autocast, x, weight, bias)
    check_dtypes(_OP, weight.dtype, x=x, bias=bias)
    indices = None
    if wanted.is_floating_point():
        check_threshold(_OP, threshold, wanted.dtype)
        wanted = active(wanted.detach(), threshold)
    elif threshold != 0:
        raise ValueError(
            f"{_OP}: threshold is {threshold}, which is for a gate; wanted is {wanted.dtype}"
        )
    elif wanted.dtype != torch.bool:
        indices = _indices_of(x, weight, wanted)
        wanted = indices.new_zeros((*x.shape[:-1], weight.shape[0]), dtype=torch.bool)
        wanted = wanted.scatter(-1, indices, True)
    call = _op if is_recorded() else _autograd
    y: Tensor = call(x, weight, wanted, bias, activation or "none")
    return y if indices is None else y.gather(-1, indices)


def _indices_of(x: Tensor, weight: Tensor, wanted: Tensor) -> Tensor:
    """As int64 [..., S] for every token, inside the weight."""
    if wanted.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{_OP}: wanted is {wanted.dtype}, expected bool, int32, int64 or a floating gate"
        )
    outputs = weight.shape[0]
    if not torch.compiler.is_compiling() and wanted.numel() > 0:
        low, high = (int(t) for t in wanted.aminmax())
        if low < 0 or high >= outputs:
            raise ValueError(
                f"{_OP}: wanted names outputs {low} to {high}, the weight has {outputs}"
            )
    shape = (*x.shape[:-1], wanted.shape[-1] if wanted.dim() else 1)
    if wanted.dim() != 1 and wanted.shape != shape:
        raise ValueError(
            f"{_OP}: wanted has shape {list(wanted.shape)}, x {list(x.shape)}; expected indices "
            f"[S] or [..., S] with the leading dimensions of x"
        )
    return wanted.long().expand(shape)


library.define(
    "actsparse_outputs(Tensor x, Tensor weight, Tensor wanted, Tensor? bias, str activation) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.gossamer.actsparse_outputs.default


def _native(
    x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    out = _empty_result(x, weight, wanted, bias)
    rows = as_rows(x, x.dim())
    computed = _C.actsparse_outputs(
        as_rows(out, out.dim()),
        row_major(rows),
        row_major(weight),
        as_rows(wanted, wanted.dim()).contiguous().view(torch.uint8),
        None if bias is None else bias.contiguous(),
        activation,
        torch.get_num_threads(),
    )
    return out if computed else _dense(x, weight, wanted, bias, activation)


def _native_cuda(
    x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    out = _fake(x, weight, wanted, bias, activation)
    rows = as_rows(x, x.dim())
    rows = row_major(rows)
    if not has_outputs_kernel(rows, weight):
        return _dense(x, weight, wanted, bias, activation)
    _C.actsparse_outputs_cuda(
        as_rows(out, out.dim()),
        rows,
        weight,
        as_rows(wanted, wanted.dim()).contiguous().view(torch.uint8),
        None if bias is None else bias.contiguous(),
        activation,
    )
    return out


def _dense(
    x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    # As in actsparse_linear.
    y = linear(x.contiguous(), weight, bias, activation_of(_OP, activation))
    return torch.where(wanted.contiguous(), y, 0)


def _fake(
    x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    activation_of(_OP, activation)
    check_devices(_OP, x, weight=weight, wanted=wanted, bias=bias)
    return _empty_result(x, weight, wanted, bias)


def _empty_result(x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight has shape {list(weight.shape)}, expected [N, K]")
    check_features(_OP, x, x.dim(), weight.shape[1])
    check_bias(_OP, bias, weight.shape[0])
    shape = (*x.shape[:-1], weight.shape[0])
    if wanted.shape != shape or wanted.dtype != torch.bool:
        raise ValueError(
            f"{_OP}: wanted has shape {list(wanted.shape)}, expected outputs of every token: "
            f"{list(shape)}"
        )
    return x.new_empty(shape)


def _autograd(
    x: Tensor, weight: Tensor, wanted: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    if gradient_wanted(x, weight, bias):
        y: Tensor = _apply_outputs(x, weight, wanted, bias)
        activate = activation_of(_OP, activation)  # outside, for torch to differentiate
        # All of them are 0 at 0, where nothing was wanted.
        return y if activate is None else activate(y)
    if calls_cpu_kernel(x, weight, wanted, bias):
        return _native(x, weight, wanted, bias, activation)
    if calls_cuda_kernel(x, weight, wanted, bias):
        return _native_cuda(x, weight, wanted, bias, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weight, wanted, bias, activation)


library.impl("actsparse_outputs", _native, "CPU")
library.impl("actsparse_outputs", _native_cuda, "CUDA")
library.impl("actsparse_outputs", _autograd, "Autograd")
torch.library.register_fake("gossamer::actsparse_outputs", _fake, lib=library)


_apply_outputs = apply_function(Outputs)
