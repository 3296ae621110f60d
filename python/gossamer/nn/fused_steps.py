"""Torch's fused optimizers do not count what they write as a change of the parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .sparse_training import SparseTrainingLinear

_layers: WeakValueDictionary[int, SparseTrainingLinear] = WeakValueDictionary()


def follow_fused_steps(layer: SparseTrainingLinear) -> None:
    """Have the layer compare its weight after each step of an optimizer with ``fused=True``."""
    _layers[id(layer)] = layer


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _layers:  # models of other layers pay nothing
        return
    groups = optimizer.param_groups
    written = {id(p) for group in groups if group.get("fused") for p in group["params"]}
    if not written:
        return
    for ref in _layers.valuerefs():
        layer = ref()
        if layer is not None and id(layer._parameters.get("weight")) in written:
            layer.doubt_weight()


register_optimizer_step_post_hook(_after_step)
