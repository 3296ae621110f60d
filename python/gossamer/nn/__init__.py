"""Layers that take the place of torch's own."""

from .linear import SparseLinear
from .linear_quantized import SparseLinearQuantized

__all__ = ["SparseLinear", "SparseLinearQuantized"]
