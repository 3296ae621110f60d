"""Layers that take the place of torch's own."""

from .linear import SparseLinear

__all__ = ["SparseLinear"]
