"""Products by torch in a wider type: where sums are rounded later, or torch is slow without."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads()  # from torch 2.8 on, on a GPU


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what a dtype is summed: float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


# Of a matrix in float32, to which memory that was in use before is given again. Of 64 MiB the
# pages were new in every call, and took longer than a product of up to a hundred rows.
_PIECE_BYTES = 16 * 2**20


def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, of matrices or of batches of them, in float32 where theirs is a 16-bit type.

    A 16-bit product of torch is rounded before a bias or an activation, and by default cuBLAS
    rounds the parts of a long sum before they meet. This one is rounded by whoever has made the
    result of it, once.
    """
    narrow = a.dtype.itemsize <= 2
    if narrow and a.is_cuda and _OUT_DTYPE:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    if not narrow and not torch.is_autocast_enabled(a.device.type):
        return a @ b
    # TF32 holds every number of a 16-bit type, so it is as good here wherever it is allowed; but
    # autocast, which stays on within an op, would make 16-bit operands of these again.
    with torch.autocast(a.device.type, enabled=False):
        a = a.to(wide(a.dtype))
        columns = _PIECE_BYTES // (a.itemsize * max(b.shape[-2], 1))
        if not (narrow and a.is_cpu) or torch.compiler.is_compiling() or columns >= b.shape[-1]:
            return a @ b.to(a.dtype)
        return torch.cat([a @ piece.to(a.dtype) for piece in b.split(max(columns, 1), -1)], -1)


# The 16-bit types that oneDNN lacks on this CPU: torch multiplies them number by number. For other
# CPUs than x86 it has kernels of its own.
_X86 = platform.machine() in ("x86_64", "AMD64")
_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_LOOPS = frozenset(
    dtype
    for dtype, has in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if _X86 and not (_ONEDNN is not None and getattr(_ONEDNN, has)())
)
FEW_ROWS = 16  # of a, for which dot products with the rows of a transposed b are fast enough


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, through float32 where torch has only loops for a 16-bit type.

    Measured on two cores of Zen 3, 256 rows and 4096x1024 in bfloat16: with b as it lies 20 ms
    instead of 3.2 s, with a transposed 21 instead of 280, with b transposed 22 instead of 110.
    """
    if has_loops_only(a) and a.dtype == b.dtype:
        rows = a.numel() // max(a.shape[-1], 1)
        if rows >= FEW_ROWS or not b.mT.is_contiguous():
            return wide_matmul(a, b).to(a.dtype)
    return a @ b


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activate: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """``activate(F.linear(x, weight, bias))`` of many rows, through float32 where ``matmul`` is."""
    if not has_loops_only(x):
        y = F.linear(x, weight, bias)
        return y if activate is None else activate(y)
    y = wide_matmul(x, weight.mT)
    y = y if bias is None else y.add_(bias)
    return (y if activate is None else activate(y)).to(x.dtype)


def has_loops_only(t: Tensor) -> bool:
    """Whether oneDNN lacks the dtype on this CPU, and torch multiplies number by number."""
    return t.is_cpu and t.dtype in _LOOPS


def conv_in_float32(
    conv: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """``conv(x, weight, bias, *rest)``, for an x on a CPU of which ``has_loops_only`` is true."""
    wide = (x.float(), weight.float(), None if bias is None else bias.float())
    with torch.autocast("cpu", enabled=False):  # which would undo it
        return conv(*wide, *rest).to(x.dtype)
