"""The activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation by its name: ``None``, "relu", "gelu" (exact, by erf) or "silu"."""
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "silu":
        return F.silu(y)
    return y
