"""One layer of every kind that is trainable: what is held, and an x for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gossamer import Block, Unstructured
from gossamer.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear
from torch import Tensor, nn

Layer = SparseLinear | SparseConv1d | SparseConv2d | SparseConv3d
BLOCKS = {"pattern": Block(4, 2), "density": 0.5}

# name -> how it is made, and the shape of an x. Tails, groups, and every argument of a convolution.
KINDS: dict[str, tuple[Callable[..., Layer], tuple[int, ...]]] = {
    "linear, blocks": (lambda **kw: SparseLinear(10, 6, **BLOCKS, **kw), (3, 10)),
    "linear, places": (
        lambda **kw: SparseLinear(10, 6, pattern=Unstructured(0.4), **kw),
        (3, 10),
    ),
    "conv1d, blocks": (
        lambda **kw: SparseConv1d(5, 6, 3, padding="same", **BLOCKS, **kw),
        (3, 5, 8),
    ),
    "conv2d, blocks": (
        lambda **kw: SparseConv2d(
            6, 10, (3, 2), (1, 2), (1, 0), (2, 1), 2, padding_mode="circular", **BLOCKS, **kw
        ),
        (3, 6, 7, 8),
    ),
    "conv3d, blocks": (lambda **kw: SparseConv3d(3, 5, 2, **BLOCKS, **kw), (3, 3, 4, 3, 3)),
    "conv1d, 2:4": (lambda **kw: SparseConv1d(8, 6, 3, **kw), (3, 8, 7)),
    "conv2d, 2:4": (
        lambda **kw: SparseConv2d(10, 6, 3, 2, 1, groups=2, padding_mode="reflect", **kw),
        (3, 10, 7, 6),
    ),
    "conv3d, 2:4": (lambda **kw: SparseConv3d(3, 4, (1, 2, 3), **kw), (3, 3, 4, 3, 4)),
}


def make(kind: str, **kwargs: Any) -> Layer:
    return KINDS[kind][0](**kwargs)


def x_for(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(KINDS[kind][1]).to(dtype)


def dense_twin(kind: str, **kwargs: Any) -> nn.Module:
    """A fresh dense layer of the same sizes, its weight drawn anew."""
    dense = make(kind, **kwargs).to_dense()
    with torch.no_grad():
        dense.weight.normal_()
    return dense
