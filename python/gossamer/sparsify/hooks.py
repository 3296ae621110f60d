"""What recipes do to gradients between the backward pass and the optimizer's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def before_update(optimizer: torch.optim.Optimizer, change: Callable[[], None]) -> RemovableHandle:
    """Let gradients be changed right before an optimizer uses them.

    Where its ``step`` is given a closure there are none before that has run, so then ``change``
    comes after each run of it (LBFGS needs several).
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            _unscale(optimizer)
            change()
            return None

        def changed() -> Any:
            loss = closure()
            change()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": changed}
        return (args[0], changed, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(hook)


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Do now what a fused optimizer does with the gradients of a GradScaler as it uses them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
