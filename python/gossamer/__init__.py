"""Sparse neural-network kernels for PyTorch, with layers that swap in for dense ones."""

# First of all: its OpenMP runtime must be the one that the native module binds to.
import torch  # noqa: F401  # isort: skip

from importlib.metadata import version as _version

from . import formats, interchange, nn, ops, prune, sparsify
from .calibrate import calibrate_thresholds
from .convert import convert
from .fold import fold_batchnorm
from .formats import Block, Unstructured
from .fuse import fuse_activations
from .info import info
from .ops import (
    actsparse_linear,
    actsparse_outputs,
    blocksparse_conv,
    blocksparse_linear,
    csr_linear,
    grouped_linear,
    pack_spikes,
    relu2_24_linear,
    sparse24_linear,
    sparse24_linear_quantized,
    spike_linear,
    topk_decode,
    topk_encode,
)
from .quantize import quantize

__version__ = _version("gossamer")
__all__ = [
    "Block",
    "Unstructured",
    "__version__",
    "actsparse_linear",
    "actsparse_outputs",
    "blocksparse_conv",
    "blocksparse_linear",
    "calibrate_thresholds",
    "convert",
    "csr_linear",
    "fold_batchnorm",
    "formats",
    "fuse_activations",
    "grouped_linear",
    "info",
    "interchange",
    "nn",
    "ops",
    "pack_spikes",
    "prune",
    "quantize",
    "relu2_24_linear",
    "sparse24_linear",
    "sparse24_linear_quantized",
    "sparsify",
    "spike_linear",
    "topk_decode",
    "topk_encode",
]
