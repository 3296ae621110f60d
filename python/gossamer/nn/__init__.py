"""Layers that take the place of torch's own."""

from .activation_sparse import ActSparseLinear, SparseMLP
from .conv import SparseConv, SparseConv1d, SparseConv2d, SparseConv3d
from .grouped import GroupedLinear
from .linear import SparseLinear
from .linear_quantized import SparseLinearQuantized
from .sparse_training import SparseTrainingLinear

__all__ = [
    "ActSparseLinear",
    "GroupedLinear",
    "SparseConv",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "SparseLinearQuantized",
    "SparseMLP",
    "SparseTrainingLinear",
]
