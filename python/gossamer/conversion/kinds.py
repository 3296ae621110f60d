"""The kinds of layers that ``convert`` swaps: linear ones and convolutions."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..nn import ActSparseLinear, SparseConv, SparseLinear
from ..nn.patterns import Pattern, PatternName, pattern_of

SparseLayer = SparseLinear | SparseConv
ACTIVATION = "activation"  # not a pattern of the weight: zeros are looked for in x
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch's that the layer is one of, or None of a foreign one."""
    return next((c for c in (nn.Linear, *_CONVS) if isinstance(layer, c)), None)


def is_candidate(layer: nn.Module) -> bool:
    """Whether a report lists the layer.

    Sparse, quantised and third-party layers are, so that the report can say why they stay.
    """
    if dense_class(layer) is not None or is_sparse(layer):
        return True
    name = type(layer).__name__
    linear = linear_shape(layer) is not None
    sizes = ("in_channels", "out_channels", "kernel_size", "groups")
    conv = all(hasattr(layer, size) for size in sizes)
    named = bool(re.search(r"(Linear|^Conv1D)$", name))
    return (linear and named) or (conv and bool(re.search(r"Conv\dd$", name)))


def linear_shape(layer: Any) -> tuple[Any, Any] | None:
    """Outputs and inputs of a linear layer, as it has them; ``nf``, ``nx`` of transformers' own."""
    for rows, columns in (("out_features", "in_features"), ("nf", "nx")):
        if hasattr(layer, rows) and hasattr(layer, columns):
            return getattr(layer, rows), getattr(layer, columns)
    return None


def replaced(layer: nn.Module, method: str) -> bool:
    """Whether an instance has another method than its class."""
    held = vars(layer).get(method)
    if held is None:
        return False
    own = getattr(held, "__self__", None) is layer
    return not own or getattr(held, "__func__", None) is not getattr(type(layer), method)


def is_sparse(layer: nn.Module) -> bool:
    return isinstance(layer, (SparseLinear, SparseConv, ActSparseLinear))


def is_conv(layer: nn.Module) -> bool:
    return hasattr(layer, "kernel_size")


def unit_dims(layer: nn.Module) -> int:
    """The dimensions of a row of x: 1, or those of an image without its batch."""
    return 1 if not is_conv(layer) else 1 + len(layer.kernel_size)  # type: ignore[arg-type]


def layer_pattern(layer: nn.Module, pattern: PatternName) -> Pattern:
    """The pattern of a dense layer's weight."""
    groups = layer.groups if is_conv(layer) else 1
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return pattern_of("convert", pattern, tuple(weight.shape), groups)  # type: ignore[arg-type]


def make_sparse(
    layer: nn.Module, pattern: PatternName, prune: str | None, density: float | None
) -> SparseLayer:
    """The trainable sparse layer of a dense one; ValueError where its weight does not fit."""
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_dense(layer, pattern, prune, density)
    assert isinstance(layer, _CONVS)
    return SparseConv.from_dense(layer, pattern, prune, density)
