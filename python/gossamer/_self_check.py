"""Whether a GPU's kernels give the right results: a small product of each kind, asked once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .formats import (
    PANEL_DTYPES,
    Block,
    BlockSparse,
    Sparse24,
    Sparse24Conv,
    Sparse24ConvPanels,
    Sparse24Panels,
)
from .ops.actsparse import actsparse_linear
from .ops.blocksparse import blocksparse_by_way, blocksparse_conv
from .ops.blocksparse_choice import blocksparse_ways
from .ops.cuda_workspace import aligned_rows, chosen_config
from .ops.grouped import grouped_linear
from .ops.pointcloud import pointcloud_conv
from .ops.sparse24 import sparse24_linear
from .ops.sparse24_conv import sparse24_conv, sparse24_conv_by_way, sparse24_conv_ways
from .ops.topk import topk_decode
from .ops.topk_encoder import topk_encode
from .pointcloud import Coordinates
from .prune import magnitude_24, magnitude_blocks

Integers = Callable[..., Tensor]  # of a size: small whole numbers, float32 on the CPU
# What is computed, the answers to it, and the right one, on the CPU.
Answers = Iterator[tuple[str, Sequence[Tensor], Tensor]]


def _linear_24(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    dense = magnitude_24(integers(48, 300))
    weight = Sparse24.from_dense(dense.to(device, dtype))
    panels = Sparse24Panels.from_sparse24(weight)
    for rows in (3, 40, 300):
        x = integers(rows, 300)
        given = x.to(device, dtype)
        found = [sparse24_linear(given, layout) for layout in (weight, panels)]
        # As it would be with a matrix larger than this GPU, too.
        large = chosen_config(8192, 8192, 8192, dtype, max(given.get_device(), 0))
        if large[0] != "float32":
            found.append(given.new_empty(rows, 48))
            operands = (found[-1], aligned_rows(given), panels.panels, None, "none")
            _C.sparse24_linear_cuda(*operands, None, None, large)
        yield f"{rows} rows", found, (x @ dense.t()).to(dtype)


def _conv_blocks(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    kernel = magnitude_blocks(integers(40, 32, 3, 3), Block(16, 16), 0.5)
    assert isinstance(kernel, Tensor)
    blocks = BlockSparse.from_dense(kernel.to(device, dtype), Block(16, 16))
    x = integers(2, 32, 9, 7)
    expected = F.conv2d(x, kernel, padding=1).to(dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.to(device, dtype).contiguous(memory_format=memory_format)
        found = [blocksparse_conv(given, blocks, padding=1)]
        last = memory_format == torch.channels_last
        for way in blocksparse_ways(x.shape, blocks, padding=1, channels_last=last):
            found.append(blocksparse_by_way(way, given, blocks, padding=1))
        yield f"blocks, {memory_format}", found, expected


def _conv_24(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    """By TMA, where that gathers, and without it."""
    if dtype == torch.float32:
        return
    kernel = magnitude_24(integers(48, 64, 3, 3), dim=1)
    panels = Sparse24ConvPanels.from_sparse24(Sparse24Conv.from_dense(kernel.to(device, dtype)))
    x = integers(2, 64, 9, 7)
    given = x.to(device, dtype)
    found = [sparse24_conv(given, panels, padding=1)]
    for way in sparse24_conv_ways(x.shape, panels, padding=1):
        found.append(sparse24_conv_by_way(way, given, panels, padding=1))
    yield "2:4 convolutions", found, F.conv2d(x, kernel, padding=1).to(dtype)


def _linear_blocks(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    """Where a pixel sees itself, x comes another way."""
    matrix = magnitude_blocks(integers(80, 72), Block(32, 32), 0.5)
    assert isinstance(matrix, Tensor)
    blocks = BlockSparse.from_dense(matrix.to(device, dtype), Block(32, 32))
    x = integers(300, 72)
    given = x.to(device, dtype)
    ways = blocksparse_ways(x.shape, blocks)
    found = [blocksparse_by_way(way, given, blocks) for way in ways]
    yield "blocks, linear", found, (x @ matrix.t()).to(dtype)


def _zero_inputs(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    matrix = integers(300, 48)
    for rows in (1, 4, 16):
        x = integers(rows, 300)
        x[integers(rows, 300) > 0] = 0
        y = actsparse_linear(x.to(device, dtype), matrix.to(device, dtype))
        yield f"zero inputs, {rows} rows", [y], (x @ matrix).to(dtype)


def _voxels(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    x, kernel = integers(1, 24, 7, 6, 5), integers(40, 24, 3, 3, 3)
    expected = F.conv3d(x, kernel, padding=1).to(dtype)
    voxels = torch.ones_like(x[:, 0]).nonzero().int()  # all of them, so as dense as can be
    map = Coordinates(voxels.to(device)).submanifold(3)
    feats = x[0].flatten(1).t().to(device, dtype)
    taps = kernel.flatten(2).permute(2, 1, 0).to(device, dtype)
    yield "voxels", [pointcloud_conv(feats, taps, None, map)], expected[0].flatten(1).t()


def _codes(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    x, dictionary = integers(9, 24), integers(300, 24)
    dense, order = (x @ dictionary.t()).sort(dim=-1, descending=True, stable=True)
    largest, order = dense[:, :40].to(dtype).float(), order[:, :40]
    given = dictionary.to(device, dtype)
    values, indices = topk_encode(x.to(device, dtype), given, k=40, relu=False)
    yield "k-sparse codes", [indices], order
    codes = torch.zeros_like(dense).scatter_(1, order, largest)
    y = topk_decode(values, indices, given)
    yield "k-sparse codes", [y], (codes @ dictionary).to(dtype)


def _experts(dtype: torch.dtype, device: torch.device, integers: Integers) -> Answers:
    """Of 9, 0 and 61 tokens."""
    x, dy, experts = integers(70, 40), integers(70, 24), integers(3, 24, 40)
    ends = torch.tensor([9, 9, 70], device=device)
    each = [(x[:9], dy[:9], experts[0]), (x[9:], dy[9:], experts[2])]
    sums = [
        torch.cat([a @ w.t() for a, _, w in each]),
        torch.cat([b @ w for _, b, w in each]),
        torch.stack([b.t() @ a for a, b, _ in each]),
    ]
    a, b, w = (t.to(device, dtype) for t in (x, dy, experts))
    found = [
        grouped_linear(a, w, ends),
        torch.ops.gossamer.grouped_input(b, w, ends),
        torch.ops.gossamer.grouped_weight(b, a, ends)[::2],
    ]
    for y, expected in zip(found, sums, strict=True):
        yield "experts", [y], expected.to(dtype)


_KINDS = (
    *(_linear_24, _conv_blocks, _conv_24, _linear_blocks),
    *(_zero_inputs, _voxels, _codes, _experts),
)


@cache
def wrong_results(device: torch.device) -> str | None:
    """Which kernels answer a small product wrongly on this device, if any.

    Nobody has every GPU, and wrong numbers are worse than none: so the floating-point kernels of
    each feature's forward pass are asked once, in whole numbers whose sums are exact.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def integers(*size: int) -> Tensor:
        # On the CPU whatever torch.set_default_device says.
        return torch.randint(-4, 5, size, generator=generator, device="cpu").float()

    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        wrong = [
            f"{dtype} of {name}"
            for dtype in PANEL_DTYPES
            for kind in _KINDS
            for name, found, expected in kind(dtype, device, integers)
            if not all(torch.equal(y.cpu(), expected) for y in found)
        ]
    named = ", ".join(dict.fromkeys(wrong))
    return f"the kernels give wrong results on it ({named})" if wrong else None
