"""The sparse weight formats: frozen dataclasses of tensors that validate themselves.

``Sparse24`` is the open format: what a state_dict, a pickle and an optimizer see, and
``Sparse24Quantized`` the same for 8-bit and 4-bit weights.
``Sparse24Panels`` is the layout that the kernels read fastest; it is never saved.
"""

from .sparse24 import (
    PANEL_DTYPES,
    VALUE_DTYPES,
    Sparse24,
    Sparse24Panels,
    sparse24_panels_shape,
    sparse24_shapes,
)
from .sparse24_quantized import Sparse24Quantized

__all__ = [
    "PANEL_DTYPES",
    "VALUE_DTYPES",
    "Sparse24",
    "Sparse24Panels",
    "Sparse24Quantized",
    "sparse24_panels_shape",
    "sparse24_shapes",
]
