"""Sparse convolution over the active voxels of 1-D to 4-D grids: point clouds and the like."""

from .coordinates import Coordinates
from .kernel_map import KernelMap
from .points import voxelize
from .tensor import SparseTensor, cat, collate

__all__ = ["Coordinates", "KernelMap", "SparseTensor", "cat", "collate", "voxelize"]
