"""What is asked of torch's dense layers by those that are made of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_layer(op: str, layer: Any, *kinds: type[nn.Module], name: str = "the layer") -> None:
    """Raise TypeError unless it is a layer of one of these kinds."""
    if not isinstance(layer, kinds):
        expected = " or ".join(f"torch.nn.{kind.__name__}" for kind in kinds)
        raise TypeError(f"{op}: {name} is {type(layer).__name__}, expected {expected}")


def arguments_of(conv: nn.Module) -> dict[str, Any]:
    """What a convolution, dense or sparse, is constructed with."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    arguments = {name: getattr(conv, name) for name in (*names, "groups", "padding_mode")}
    return {**arguments, "bias": conv.bias is not None}
