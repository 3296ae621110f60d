"""Layers that take the place of torch's own."""

from .activation import (
    ClippedShiftedReLU,
    ClippedSoftThreshold,
    edge_of_chaos,
    edge_of_chaos_,
)
from .activation_sparse import ActSparseLinear, SparseMLP
from .conv import SparseConv, SparseConv1d, SparseConv2d, SparseConv3d
from .delta import DeltaConv2d, DeltaLinear
from .grouped import GroupedLinear
from .linear import SparseLinear
from .linear_quantized import SparseLinearQuantized
from .position_masked import PositionMaskedConv2d, PositionMaskScheduler
from .sparse_training import SparseTrainingLinear
from .topk_autoencoder import TopKAutoencoder

__all__ = [
    "ActSparseLinear",
    "ClippedShiftedReLU",
    "ClippedSoftThreshold",
    "DeltaConv2d",
    "DeltaLinear",
    "GroupedLinear",
    "PositionMaskScheduler",
    "PositionMaskedConv2d",
    "SparseConv",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLinear",
    "SparseLinearQuantized",
    "SparseMLP",
    "SparseTrainingLinear",
    "TopKAutoencoder",
    "edge_of_chaos",
    "edge_of_chaos_",
]
