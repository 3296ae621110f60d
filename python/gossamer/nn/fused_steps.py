"""Torch's fused optimizers do not count what they write as a change of the parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

_followed = WeakTensorKeyDictionary()


def count_fused_steps(weight: Tensor) -> None:
    """From here on a step of any optimizer changes the version of this parameter."""
    _followed[weight] = None


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _followed:
        return
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([p for p in group["params"] if p.grad is not None and p in _followed])


register_optimizer_step_post_hook(_count)
