"""The sparse weight formats: frozen dataclasses of tensors that validate themselves.

``Sparse24``, ``Sparse24Conv``, ``BlockSparse`` and ``SparseCsr`` are the open formats: what a
state_dict, a pickle and an optimizer see; ``Sparse24Quantized`` is the same for 8-bit and 4-bit
weights. ``Sparse24Panels``, ``Sparse24ConvPanels`` and ``BlockSparsePanels`` are the layouts that
the kernels read fastest, ``Sparse24QuantizedPanels`` that of quantised weights on a GPU; none is
ever saved.
"""

from .block import Block
from .blocksparse import BlockSparse
from .blocksparse_panels import BlockSparsePanels
from .csr import SparseCsr, Unstructured
from .csr_update import random_places, update_pattern
from .sparse24 import (
    PANEL_DTYPES,
    Sparse24,
    Sparse24Panels,
    sparse24_panels_shape,
    sparse24_shapes,
)
from .sparse24_conv import Sparse24Conv
from .sparse24_conv_panels import Sparse24ConvPanels
from .sparse24_quantized import Sparse24Quantized
from .sparse24_quantized_panels import Sparse24QuantizedPanels
from .stored import VALUE_DTYPES

__all__ = [
    "PANEL_DTYPES",
    "VALUE_DTYPES",
    "Block",
    "BlockSparse",
    "BlockSparsePanels",
    "Sparse24",
    "Sparse24Conv",
    "Sparse24ConvPanels",
    "Sparse24Panels",
    "Sparse24Quantized",
    "Sparse24QuantizedPanels",
    "SparseCsr",
    "Unstructured",
    "random_places",
    "sparse24_panels_shape",
    "sparse24_shapes",
    "update_pattern",
]
