"""What turns dense modules and masks into operations on sparse tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tensor import SparseTensor, check_sparse


class Wrapped(nn.Module):
    """A module that works on the features: see `wrap`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The voxels of ``x`` with ``module(x.feats)``."""
        check_sparse(type(self.module).__name__, x)
        return x.replace_feats(self.module(x.feats))


def wrap(module: nn.Module) -> Wrapped:
    """A layer that applies a module to the features [N, C] of a sparse tensor, row by row.

    For whatever treats voxels one by one: activations, ``torch.nn.Linear``, ``Dropout``,
    ``LayerNorm``, ``SyncBatchNorm``.

    Raises
    ------
    ValueError
        When called, if the module's result is no [N, any C].

    Examples
    --------
    >>> import torch, gossamer.pointcloud as pc
    >>> gelu = pc.functional.wrap(torch.nn.GELU())
    >>> layer = torch.nn.Sequential(pc.SubmanifoldConv3d(4, 8, 3), gelu)
    """
    return Wrapped(module)


def prune(x: SparseTensor, mask: Tensor) -> SparseTensor:
    """The voxels of ``x`` where ``mask`` is set, in their order. A gradient flows to those kept.

    Parameters
    ----------
    x : SparseTensor
    mask : Tensor
        bool [N], on the device of ``x``.

    Raises
    ------
    TypeError
        If the mask is not of bools.
    ValueError
        If it has not one entry a voxel.
    """
    check_sparse("prune", x)
    found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
    if found != torch.bool:
        raise TypeError(f"prune: the mask is {found}, expected a Tensor of torch.bool")
    if mask.shape != (len(x),):
        raise ValueError(f"prune: the mask has shape {list(mask.shape)}, expected [{len(x)}]")
    return SparseTensor(
        x.coords[mask], x.feats[mask], x.stride, x.spatial_shape, batch_size=x.batch_size
    )
