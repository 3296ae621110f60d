"""Layers that change features and leave voxels alone, and one that leaves voxels out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from . import functional
from .tensor import SparseTensor, check_sparse


class BatchNorm(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over the voxels of a whole batch; none at all change nothing."""

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """``x`` with ``num_features`` channels, normalised."""
        check_sparse("BatchNorm", x)
        if x.channels != self.num_features:
            raise ValueError(
                f"BatchNorm: x has {x.channels} channels, the layer normalises {self.num_features}"
            )
        return x.replace_feats(super().forward(x.feats)) if len(x) else x


class ReLU(nn.ReLU):
    """``torch.nn.ReLU`` of the features."""

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """``x``, its features below zero set to zero."""
        check_sparse("ReLU", x)
        return x.replace_feats(super().forward(x.feats))


class Prune(nn.Module):
    """Keep the voxels where a mask is set; the rows' order stays (`functional.prune`).

    Parameters
    ----------
    mask : Tensor or callable
        bool [N], or what makes it of the tensor, as ``lambda x: x.feats[:, 0] > 0`` does.
    """

    def __init__(self, mask: Tensor | Callable[[SparseTensor], Tensor]) -> None:
        super().__init__()
        self.mask: Tensor | Callable[[SparseTensor], Tensor]
        if isinstance(mask, Tensor):
            self.register_buffer("mask", mask, persistent=False)  # goes where the module goes
        else:
            self.mask = mask

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The voxels of ``x`` under the mask, all of its samples, even those left without any."""
        mask = self.mask if isinstance(self.mask, Tensor) else self.mask(x)
        return functional.prune(x, mask)
