"""Which kernel a linear layer or a convolution with a block-sparse weight runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _C
from .._cuda_module import gpu_of, on_cuda
from ..formats import BlockSparse, BlockSparsePanels
from .blocksparse_product import reads_channels
from .conv_geometry import Sizes, prepare
from .conv_operands import LAST, Geometry, as_5d, empty_result, is_channels_last

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
    product = _product(x_shape, weight, *rest, gpu is not None)
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
    found: list[Way] = ways(*_product(x_shape, weight, *rest, True), 0 if gpu is None else gpu)
    return found


def _product(
    x_shape: Sequence[int],
    weight: BlockSparse | BlockSparsePanels,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    padding_mode: str,
    channels_last: bool,
    on_gpu: bool,
) -> tuple[Any, ...]:
    """What ``_C`` is told of it."""
    x = torch.empty(x_shape, device="meta", dtype=weight.dtype)
    if channels_last and x.dim() in LAST:
        x = x.to(memory_format=LAST[x.dim()])
    conv = prepare(_OP, x, weight.shape, weight.groups, stride, padding, dilation, padding_mode)
    geometry = Geometry(weight.shape, weight.groups, conv.stride, conv.padding, conv.dilation)
    last = is_channels_last(conv.x)
    if on_gpu and not last:  # where the product turns x over first
        last = reads_channels(weight.dtype, weight.shape[1], weight.block.cols)
    return (
        tuple(as_5d(conv.x, last).shape),
        tuple(as_5d(empty_result(_OP, conv.x, None, geometry), last).shape),
        str(weight.dtype).removeprefix("torch."),
        weight.block.rows,
        weight.block.cols,
        weight.col_indices.shape[0],
        weight.groups,
        *geometry.in_3d(),
        last,
    )
