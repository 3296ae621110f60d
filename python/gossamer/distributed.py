"""Tensor parallelism of 2:4 linear layers, and data parallelism of weights without structure.

Of the first, each rank holds, and multiplies, a part of the weight. The two styles go into the plan
of ``torch.distributed.tensor.parallel.parallelize_module``, as torch's own do for dense layers::

    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(mlp, mesh, {"up": Colwise(), "down": Rowwise()})

What the layers hold are ``DTensor``s, so that a ``state_dict`` goes through
``torch.distributed.checkpoint`` and comes back on any number of ranks. (DistributedDataParallel and
``fully_shard`` need nothing of this: sparse layers go through them as they are, but for
unstructured ones, which ``data_parallel`` wraps.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from .nn import SparseLinear
from .nn.trainable import TrainableModule
from .ops.conv_operands import finish
from .ops.csr_pattern import forget
from .ops.sparse24 import sparse24_linear_tensors


def data_parallel(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, **options: Any
) -> nn.parallel.DistributedDataParallel:
    """``torch.nn.parallel.DistributedDataParallel`` of a model with sparse layers of any pattern.

    torch would send where weights live with each pass, and cannot send the 16-bit column numbers of
    unstructured ones ("Invalid scalar type"). Here all ranks take over the places of the first rank
    once, with its values; nothing of that kind is sent afterwards. Recipes that move places
    (``gossamer.sparsify.SET.stored``) move the same ones on all ranks.

    Parameters
    ----------
    module : nn.Module
    process_group : ProcessGroup, optional
        All ranks by default.
    **options
        Of DistributedDataParallel; without ``init_sync`` places are not sent, as values are not.

    Raises
    ------
    ValueError
        If a layer is packed.
    RuntimeError
        From torch, if the ranks' weights have different numbers of live places.
    """
    indices = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, TrainableModule):
            continue
        if layer.packed:
            raise ValueError(f"data_parallel: {name} is packed, and cannot be trained; unpack()")
        for held in layer._pattern.index_names:
            indices[f"{name}.{held}" if name else held] = getattr(layer, held)
    wrapped = nn.parallel.DistributedDataParallel
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    wrapped._set_params_and_buffers_to_ignore_for_model(module, [*ignored, *indices])
    parallel = wrapped(module, process_group=process_group, **options)
    group = parallel.process_group
    for tensor in indices.values():
        if tensor.numel() > 0 and options.get("init_sync", True):
            dist.broadcast(tensor.view(torch.uint8), dist.get_global_rank(group, 0), group)
            forget(tensor)  # what was made of it: a broadcast makes no new version
    return parallel


class Colwise(ParallelStyle):
    """Each rank has a part of the outputs: x [..., K] on all, y [..., N / ranks] on each.

    The gradient of x is summed over the ranks. N has to be a multiple of the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        layer = _checked("Colwise", module)
        if layer.out_features % ranks != 0:
            raise ValueError(f"Colwise: {layer.out_features} outputs on {ranks} ranks")
        _distribute(layer, device_mesh, Shard(0), Shard(0))
        layer.forward = _Forward(layer, device_mesh, False)  # type: ignore[method-assign]
        return layer


class Rowwise(ParallelStyle):
    """Each rank has a part of the inputs: x [..., K / ranks] on each, y [..., N] on all.

    The products are summed over the ranks, then the bias is added. K has to be a multiple of 8
    times the ranks, of whole bytes of the indices.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        layer = _checked("Rowwise", module)
        if layer.in_features % (8 * ranks) != 0:
            raise ValueError(
                f"Rowwise: {layer.in_features} inputs on {ranks} ranks, expected a multiple of "
                f"{8 * ranks}"
            )
        _distribute(layer, device_mesh, Shard(1), Replicate())
        layer.forward = _Forward(layer, device_mesh, True)  # type: ignore[method-assign]
        return layer


def _checked(op: str, module: nn.Module) -> SparseLinear:
    if not isinstance(module, SparseLinear):
        raise TypeError(f"{op}: {type(module).__name__}, expected a gossamer.nn.SparseLinear")
    if module.packed or module.pattern != "2:4":
        raise ValueError(
            f"{op}: expected a 2:4 layer that is not packed (unpack()), got {module.extra_repr()}"
        )
    return module


def _distribute(layer: SparseLinear, mesh: DeviceMesh, weight: Placement, bias: Placement) -> None:
    assert layer.values is not None
    assert isinstance(layer.indices, Tensor)
    trained = layer.values.requires_grad
    values = distribute_tensor(layer.values.detach(), mesh, [weight])
    layer.values = nn.Parameter(values, requires_grad=trained)
    layer.indices = distribute_tensor(layer.indices, mesh, [weight])
    if layer.bias is not None:
        trained = layer.bias.requires_grad
        part = distribute_tensor(layer.bias.detach(), mesh, [bias])
        layer.bias = nn.Parameter(part, requires_grad=trained)


class _Forward:
    """The forward pass of a layer whose weight is distributed."""

    def __init__(self, layer: SparseLinear, mesh: DeviceMesh, rowwise: bool) -> None:
        self.layer, self.mesh, self.rowwise = layer, mesh, rowwise

    def __call__(self, input: Tensor) -> Tensor:
        x = input  # as the layer's own forward names it
        layer: Any = self.layer
        ranks = self.mesh.size()
        values, indices = layer.values.to_local(), layer.indices.to_local()
        bias = None if layer.bias is None else layer.bias.to_local()
        n, k, activation = layer.out_features, layer.in_features, layer.activation or "none"
        if not self.rowwise:
            # What comes back for x on each rank is a part of its gradient.
            on_all = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
            x = on_all.to_local(grad_placements=[Partial()])
            shape = (n // ranks, k)
            return sparse24_linear_tensors(
                x, values, indices, bias, shape, values.dtype, activation
            )
        shape = (n, k // ranks)
        part = sparse24_linear_tensors(x, values, indices, None, shape, values.dtype)
        parts = DTensor.from_local(part, self.mesh, [Partial()], run_check=False)
        y: Tensor = parts.redistribute(placements=[Replicate()]).to_local()
        y = y if bias is None else y + bias
        return finish("Rowwise", y, None, activation)
