"""Which kernel a linear layer or a convolution with a block-sparse weight runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _C
from ..formats import BlockSparse
from .blocksparse import Geometry
from .conv_geometry import Sizes, output_sizes, prepare

_OP = "blocksparse_choice"


def blocksparse_choice(
    x_shape: Sequence[int],
    weight: BlockSparse,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
) -> dict[str, Any]:
    """What a product on the CPU does with an x of this shape, in the weight's dtype.

    Parameters
    ----------
    x_shape : sequence of int
        Of a linear layer [rows, K], of a convolution [batch, C_in, *extents].
    weight : BlockSparse
        Of any device; only its sizes and the number of its blocks matter.
    stride, padding, dilation, padding_mode
        The convolution's.

    Returns
    -------
    dict
        ``target``, ``kernel``, ``why`` and ``threads``; of the vector kernel also how it cuts the
        outputs up.

    Raises
    ------
    TypeError, ValueError
        As the product itself.
    """
    x = torch.empty(x_shape, device="meta", dtype=weight.values.dtype)
    conv = prepare(_OP, x, weight.shape, weight.groups, stride, padding, dilation, padding_mode)
    steps = (conv.stride, conv.padding, conv.dilation)
    sizes = output_sizes(_OP, conv.x, weight.shape[2:], *steps)
    absent = (1,) * (5 - conv.x.dim())
    batch, channels, *extents = conv.x.shape
    chosen: dict[str, Any] = _C.blocksparse_choose(
        (batch, *absent, *extents, channels),
        (batch, *absent, *sizes, weight.shape[0]),
        str(weight.values.dtype).removeprefix("torch."),
        weight.block.rows,
        weight.block.cols,
        weight.values.shape[0],
        weight.groups,
        *Geometry(weight.shape, weight.groups, *steps).in_3d(),
        torch.get_num_threads(),
    )
    return chosen
