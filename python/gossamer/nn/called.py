"""Layers that torch's own modules must not pass by."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_called(layer: nn.Module) -> RemovableHandle:
    """Let ``nn.TransformerEncoderLayer`` call a layer in inference, too.

    Its fast path would hand ``layer.weight`` to a native function, though that is not what the
    layer multiplies by. It is not taken where a module in it has a hook, which this gives it.
    """
    return layer.register_forward_pre_hook(_nothing)


def _nothing(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook; a function of a module, so that layers can be pickled."""
