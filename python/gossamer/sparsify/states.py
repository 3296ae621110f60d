"""Checks of the states that recipes are loaded from, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_keys(op: str, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError unless all are there, with a number of steps that can be one."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"{op}: the state has no {', '.join(map(repr, missing))}")
    steps = state["steps"]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{op}: the state is of {steps!r} steps, expected a number from 0 on")


def check_masks(op: str, own: Mapping[str, Tensor], given: Any) -> None:
    """Raise ValueError unless these are bool masks of the same layers and shapes."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{op}: masks are a {type(given).__name__}, expected a dict")
    for name, mask in given.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{op}: the mask of {name} is {what}, expected torch.bool")
    shapes = {name: tuple(mask.shape) for name, mask in own.items()}
    found = {name: tuple(mask.shape) for name, mask in given.items()}
    wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{op}: masks of another model: {first} has units {shapes.get(first)} here and "
            f"{found.get(first)} there ({len(wrong)} layers differ)"
        )
