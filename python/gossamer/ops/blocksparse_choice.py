"""Which kernel a linear layer or a convolution with a block-sparse weight runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _C
from .._cuda_module import gpu_of, on_cuda
from ..formats import BlockSparse, BlockSparsePanels
from .blocksparse_product import reads_channels
from .conv_geometry import Sizes
from .conv_operands import as_5d, is_channels_last, without_content

_OP = "blocksparse_choice"


def blocksparse_choice(
    x_shape: Sequence[int],
    weight: BlockSparse | BlockSparsePanels,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
    device: torch.device | dict[str, int] | None = None,
) -> dict[str, Any]:
    """What a product does with an x of this shape, in the weight's dtype.

    Parameters
    ----------
    x_shape : sequence of int
        Of a linear layer [rows, K], of a convolution [batch, C_in, *extents].
    weight : BlockSparse or BlockSparsePanels
        Only its sizes and the number of its blocks matter, and its device where none is given.
    stride, padding, dilation, padding_mode
        The convolution's.
    channels_last : bool
        Of x, where its dimensions have that memory format.
    device : torch.device or dict, optional
        The CPU, a GPU that is here, or what describes any other: ``capability`` (10 * major +
        minor), ``multiprocessors``, ``shared_bytes`` of a thread block, ``l2_bytes``.

    Returns
    -------
    dict
        ``target``, ``kernel`` and ``why``; on a CPU ``threads``, on a GPU ``blocks``; how the
        outputs are cut up.

    Raises
    ------
    TypeError, ValueError
        As the product itself.
    """
    gpu = gpu_of(weight.device if device is None else device)
    choose: Callable[..., Any] = _C.blocksparse_choose
    if isinstance(gpu, int):
        choose = on_cuda(_OP, choose)
    rest = (stride, padding, dilation, padding_mode, channels_last)
    product = _product(x_shape, weight, gpu is not None, *rest)
    chosen: dict[str, Any] = choose(*product, torch.get_num_threads(), gpu)
    return chosen


Way = tuple[str, int, int, int]  # kernel, pixels and outputs of a tile, blocks of a cluster


def blocksparse_ways(
    x_shape: Sequence[int],
    weight: BlockSparse | BlockSparsePanels,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
    channels_last: bool = False,
    device: torch.device | dict[str, int] | None = None,
) -> list[Way]:
    """Every way in which a GPU's kernels compute a product; as ``blocksparse_choice`` otherwise."""
    gpu = gpu_of(weight.device if device is None else device)
    ways: Callable[..., Any] = _C.blocksparse_ways
    if isinstance(gpu, int):
        ways = on_cuda(_OP, ways)
    rest = (stride, padding, dilation, padding_mode, channels_last)
    found: list[Way] = ways(*_product(x_shape, weight, True, *rest), 0 if gpu is None else gpu)
    return found


def _product(
    x_shape: Sequence[int],
    weight: BlockSparse | BlockSparsePanels,
    on_gpu: bool,
    *rest: Any,
) -> tuple[Any, ...]:
    """What ``_C`` is told of it."""
    x, y, geometry = without_content(_OP, x_shape, weight, *rest)
    last = is_channels_last(x)
    if on_gpu and not last:  # where the product turns x over first
        last = reads_channels(weight.dtype, weight.shape[1], weight.block.cols)
    return (
        tuple(as_5d(x, last).shape),
        tuple(as_5d(y, last).shape),
        str(weight.dtype).removeprefix("torch."),
        weight.block.rows,
        weight.block.cols,
        weight.col_indices.shape[0],
        weight.groups,
        *geometry.in_3d(),
        last,
    )
