"""What the buffers of a ``SparseTrainingLinear`` have to be in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..formats import Sparse24


def has_mask(indices: Any) -> TypeGuard[Tensor]:
    """Whether they are of a mask: zeros until one was searched for, and on meta nothing."""
    return isinstance(indices, Tensor) and not indices.is_meta and bool(indices.any())


def check_buffers(state_dict: Mapping[str, Any], prefix: str, shape: tuple[int, int]) -> None:
    """Raise ValueError where those of a weight of this shape could not be used."""
    age, scale, indices = (state_dict.get(prefix + name) for name in ("age", "scale", "indices"))
    if isinstance(age, Tensor) and age.numel() == 1 and not age.is_meta and int(age) < 0:
        raise ValueError(f"{prefix}age: {int(age)} steps, expected a number from 0 on")
    if isinstance(scale, Tensor) and not scale.is_meta and not bool(scale.isfinite().all()):
        raise ValueError(f"{prefix}scale: {float(scale)} is not finite")
    groups = (shape[1] + 3) // 4
    # Of another shape they are torch's to refuse.
    if has_mask(indices) and indices.shape == (shape[0], (groups + 1) // 2):
        values = torch.zeros(shape[0], 2 * groups, device=indices.device)
        try:
            Sparse24(values, indices, shape).validate()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{prefix}indices: {error}") from None
