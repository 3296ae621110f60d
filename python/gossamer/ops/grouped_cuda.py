"""The products of experts on a GPU: which kernel computes one, and the call.

The host never reads the offsets: a product neither waits for the GPU nor needs to be captured
again in a CUDA graph whose offsets change. What they say cannot be checked for that reason.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from .._cuda_module import has_kernels
from .cuda_workspace import aligned_rows
from .operands import row_major

# From so many tokens an expert on, a product is bound by its operations, of which Hopper's wgmma,
# that torch's grouped_mm has, does twice as many a cycle as mma (arithmetic: 2 x 256 of them for
# each byte of a bfloat16 weight, at 1e15 operations and 4.8e12 bytes a second).
_DENSE_TOKENS = 256


def grouped_choice(
    product: str,
    tokens: int,
    weights_shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: int | dict[str, int],
) -> dict[str, Any]:
    """What computes a product on a GPU: ``target``, ``kernel`` and ``why``; how it is cut up.

    ``product`` is "linear", "input" or "weight", ``weights_shape`` [E, N, K], ``device`` the index
    of one that is here, or what describes any other (as for ``blocksparse_choice``).
    """
    experts, n, k = weights_shape
    name = str(dtype).removeprefix("torch.")
    chosen: dict[str, Any] = _C.grouped_choose_cuda(product, name, experts, tokens, n, k, device)
    # Of an expert without a token grouped_mm's gradient of the weights is not documented.
    takes = product != "weight" and dtype == torch.bfloat16 and n % 8 == k % 8 == 0
    many = tokens >= _DENSE_TOKENS * experts
    if chosen.pop("capability") == 90 and takes and many and hasattr(F, "grouped_mm"):
        why = f"wgmma, for {_DENSE_TOKENS} tokens an expert and more"
        return {"target": "torch", "kernel": "grouped_mm", "why": why}
    return chosen


@lru_cache(maxsize=1 << 14)
def _kernel(product: str, tokens: int, shape: tuple[int, int, int], dtype: Any, device: int) -> str:
    kernel: str = grouped_choice(product, tokens, shape, dtype, device)["kernel"]
    return kernel


def has_cuda_kernel(x: Tensor) -> bool:
    """Or torch computes expert by expert: in float64, on a GPU that is too old."""
    return x.dtype != torch.float64 and has_kernels(x.device)


def linear(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None, activation: str, y: Tensor
) -> Tensor:
    """y, or what holds the same instead."""
    weights, offsets = weights.contiguous(), offsets.contiguous()
    # grouped_mm rounds before a bias or an activation.
    if bias is None and activation == "none" and _by_torch("linear", x, weights, offsets):
        return _grouped_mm(x, weights.mT, offsets)
    bias = None if bias is None else bias.contiguous()
    _C.grouped_linear_cuda(y, row_major(x), weights, offsets, bias, activation)
    return y


def input_gradient(dy: Tensor, weights: Tensor, offsets: Tensor, dx: Tensor) -> Tensor:
    """The same of dx."""
    weights, offsets = weights.contiguous(), offsets.contiguous()
    if _by_torch("input", dy, weights, offsets):
        return _grouped_mm(dy, weights, offsets)
    _C.grouped_input_cuda(dx, row_major(dy), weights, offsets)
    return dx


def weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor, dweights: Tensor) -> Tensor:
    _C.grouped_weight_cuda(dweights, row_major(dy), row_major(x), offsets.contiguous())
    return dweights


def _by_torch(product: str, tokens: Tensor, weights: Tensor, offsets: Tensor) -> bool:
    experts, n, k = weights.shape
    if experts == 0 or tokens.shape[0] == 0 or n == 0 or k == 0:
        return False
    kernel = _kernel(product, tokens.shape[0], (experts, n, k), tokens.dtype, tokens.get_device())
    index = offsets.dtype in (torch.int32, torch.int64)
    return kernel == "grouped_mm" and index and weights.data_ptr() % 16 == 0


def _grouped_mm(tokens: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    # In order and within the tensors, which it does not look at.
    ends = offsets.clamp(0, tokens.shape[0]).cummax(0).values.int()
    return F.grouped_mm(aligned_rows(tokens), weights, offs=ends)
