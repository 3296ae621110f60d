"""Products by torch whose sums nobody has rounded yet: what a GPU runs where it has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_OUT_DTYPE = "dtype" in torch.ops.aten.bmm.overloads()  # from torch 2.8 on, on a GPU


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what a dtype is summed: float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


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
        return a.to(wide(a.dtype)) @ b.to(wide(b.dtype))
