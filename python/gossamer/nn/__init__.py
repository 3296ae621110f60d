"""Layers that take the place of torch's own."""

from .activation import (
    ClippedShiftedReLU,
    ClippedSoftThreshold,
    edge_of_chaos,
    edge_of_chaos_,
)
from .activation_sparse import ActSparseLinear, SparseMLP
from .conv import SparseConv, SparseConv1d, SparseConv2d, SparseConv3d
from .grouped import GroupedLinear
from .linear import SparseLinear
from .linear_quantized import SparseLinearQuantized
from .topk_autoencoder import TopKAutoencoder

__all__ = [
    "ActSparseLinear",
    "ClippedShiftedReLU",
    "ClippedSoftThreshold",
    "GroupedLinear",
    "SparseConv",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "SparseLinearQuantized",
    "SparseMLP",
    "TopKAutoencoder",
    "edge_of_chaos",
    "edge_of_chaos_",
]
