"""When the GPU's kernels that read single rows of a weight are the ones, and what they need."""

from __future__ import annotations

from torch import Tensor

from .. import _C
from .._cuda_module import has_kernels
from .cuda_workspace import workspace_of


def has_rows_kernel(tokens: int, weight_kn: Tensor) -> bool:
    """Whether so many tokens are multiplied by it; otherwise the product is torch's."""
    if not has_kernels(weight_kn.device):
        return False
    most: int = _C.actsparse_cuda_rows(weight_kn)  # 0 where the weight has no kernel
    return most > 0 and tokens <= most


def has_outputs_kernel(rows: Tensor, weight: Tensor) -> bool:
    """The same of wanted outputs, whose kernel reads rows of the other layout of the weight."""
    if not has_kernels(weight.device):
        return False
    most: int = _C.actsparse_outputs_cuda_rows(rows, weight)
    return most > 0 and len(rows) <= most


def rows_workspace(tokens: int, weight_kn: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(workspace, counters) for the device's current stream."""
    return workspace_of(weight_kn, _C.actsparse_workspace_bytes(tokens, weight_kn))
