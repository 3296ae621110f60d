"""Tensors whose parts lie on several machines."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor: of a sharded one every rank has to ask for it."""
    # A torch.distributed.tensor.DTensor, whose import takes a second.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
