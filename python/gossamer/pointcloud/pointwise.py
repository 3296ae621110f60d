"""Layers that change features and leave voxels alone, and one that leaves voxels out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


class SyncBatchNorm(nn.SyncBatchNorm):
    """`BatchNorm` over the voxels of all processes of a group: ``torch.nn.SyncBatchNorm``.

    Trained on several processes it needs a GPU in each, as torch's does.
    """

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """``x`` with ``num_features`` channels, normalised; it may be empty in some processes."""
        check_sparse("SyncBatchNorm", x)
        grouped = distributed.is_available() and distributed.is_initialized()
        if grouped and self.training and distributed.get_world_size(self.process_group) > 1:
            return x.replace_feats(super().forward(x.feats))
        return x.replace_feats(_BatchNorm.forward(self, x.feats)) if len(x) else x

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """A model with its BatchNorms, those of dense layers too, replaced by synchronised ones.

        Torch's function of this name makes layers for dense tensors of those for sparse ones.

        Parameters
        ----------
        module : torch.nn.Module
            Changed in place, unless it is itself a BatchNorm.
        process_group : optional
            As for ``torch.nn.SyncBatchNorm``.

        Returns
        -------
        torch.nn.Module
            ``module``, or what it became. Parameters and buffers are the same tensors.
        """
        done: dict[nn.Module, nn.Module] = {}  # a layer may stand in several places

        def convert(layer: nn.Module) -> nn.Module:
            if layer in done:
                return done[layer]
            done[layer] = made = layer
            if isinstance(layer, _BatchNorm):
                made = nn.SyncBatchNorm.convert_sync_batchnorm(layer, process_group)
                if isinstance(layer, (BatchNorm, cls)):
                    made.__class__ = cls
                done[layer] = made
            else:
                for name, child in layer._modules.items():
                    if child is not None:
                        layer._modules[name] = convert(child)
            return made

        return convert(module)


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
