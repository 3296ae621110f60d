"""pointcloud_pool: sums, means and maxima of voxels over the pairs of a kernel map.

``pointcloud_pool`` is for people, over three registered ops: ``pointcloud_sum_pool`` (means too),
``pointcloud_max_pool`` and the gradient of the latter. That of a sum is a sum over the same pairs
the other way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C, reference
from .._cuda_module import has_kernels
from .._library import TAGS_NOT_CAPTURED, is_recorded, library
from .operands import apply_function, gradient_wanted, row_major
from .pointcloud_layout import MAP, Pairs, PoolLists, pool_lists

if TYPE_CHECKING:
    from ..pointcloud.kernel_map import KernelMap

_OP = "pointcloud_pool"


def pointcloud_pool(feats: Tensor, kernel_map: KernelMap, reduce: str = "max") -> Tensor:
    """Reduce over the input voxels that a kernel map pairs with each output voxel.

    Only voxels that exist take part, and an output that is paired with none is 0. The result is
    the same to the bit for any number of threads.

    Parameters
    ----------
    feats : Tensor
        [n_in, C] float32, bfloat16, float16 or float64, of any strides, in the rows' own order.
    kernel_map : KernelMap
        Which input meets which output; its taps all count alike.
    reduce : {"max", "mean", "sum"}
        "mean" divides by the number of pairs of the output. Of equal maxima the first tap's gets
        the gradient; a NaN is the maximum of whatever holds it.

    Returns
    -------
    Tensor
        [n_out, C] in the dtype of ``feats``, contiguous. Sums are taken in float64.

    Raises
    ------
    TypeError
        If there is no kernel for the dtype.
    ValueError
        If shapes, devices or the map do not match, or ``reduce`` is unknown.
    """
    if reduce not in ("max", "mean", "sum"):
        raise ValueError(f"{_OP}: reduce {reduce!r}, expected 'max', 'mean' or 'sum'")
    if feats.dim() != 2 or feats.shape[0] != kernel_map.n_in:
        raise ValueError(
            f"{_OP}: feats have shape {list(feats.shape)}, expected [{kernel_map.n_in}, C], a row "
            "for each input voxel of the map"
        )
    pairs = (*kernel_map.tensors, kernel_map.n_out)
    # Functorch works on a Function, and not on one that the dispatcher calls.
    taken, summed = (_max, _sum) if is_recorded() else (_max_autograd, _sum_autograd)
    if reduce == "max":
        best: Tensor = taken(feats, *pairs, kernel_map.repeats)[0]
        return best
    reduced: Tensor = summed(feats, *pairs, reduce == "mean")
    return reduced


library.define(
    f"pointcloud_sum_pool(Tensor feats, {MAP}, SymInt n_out, bool mean) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
library.define(
    f"pointcloud_max_pool(Tensor feats, {MAP}, SymInt n_out, bool repeats) -> (Tensor, Tensor)",
    tags=TAGS_NOT_CAPTURED,
)
library.define(
    f"pointcloud_max_pool_grad(Tensor dy, Tensor winner, {MAP}, SymInt n_out) -> Tensor",
    tags=TAGS_NOT_CAPTURED,
)
_sum = torch.ops.gossamer.pointcloud_sum_pool.default
_max = torch.ops.gossamer.pointcloud_max_pool.default
_max_grad = torch.ops.gossamer.pointcloud_max_pool_grad.default


def _by_lists(t: Tensor) -> bool:
    return t.device.type == "cuda" and has_kernels(t.device)


def _sum_native(feats: Tensor, *pairs_mean: Any) -> Tensor:
    *pairs, n_out, mean = pairs_mean
    out = feats.new_empty((n_out, feats.shape[1]))
    operands = (row_major(feats), *pairs, mean, torch.get_num_threads())
    _C.pointcloud_sum_pool(out, *operands)
    return out


def _max_native(feats: Tensor, *pairs_n: Any) -> tuple[Tensor, Tensor]:
    *pairs, n_out, _ = pairs_n
    out = feats.new_empty((n_out, feats.shape[1]))
    winner = torch.empty_like(out, dtype=torch.int32)
    operands = (winner, row_major(feats), *pairs, torch.get_num_threads())
    _C.pointcloud_max_pool(out, *operands)
    return out, winner


def _max_grad_native(dy: Tensor, winner: Tensor, *pairs_n: Any) -> Tensor:
    *pairs, n_out = pairs_n
    out = dy.new_empty((n_out, dy.shape[1]))
    operands = (row_major(dy), winner.contiguous(), *pairs, torch.get_num_threads())
    _C.pointcloud_max_pool_grad(out, *operands)
    return out


def reduce_lists(
    out: Tensor,
    feats: Tensor,
    lists: PoolLists,
    reduce: str,
    out_order: Tensor | None = None,
    winner: Tensor | None = None,
) -> None:
    """By the kernels of a GPU; long lists in parts, of which there are more than of outputs."""
    parts = max(1, min(256, len(lists.rows) // (512 * max(len(out), 1))))
    partial = took = None
    if parts > 1:
        partial = out.new_empty(parts * out.numel(), dtype=torch.float64)
        took = torch.empty_like(partial, dtype=torch.int32) if reduce == "max" else None
    operands = (winner, *lists, out_order, reduce, parts, partial, took)
    _C.pointcloud_pool_cuda(out, row_major(feats), *operands)


def _sum_cuda(feats: Tensor, *pairs_mean: Any) -> Tensor:
    *pairs, n_out, mean = pairs_mean
    if not has_kernels(feats.device):
        return reference.pointcloud_sum_pool(feats, *pairs_mean)
    out = feats.new_empty((n_out, feats.shape[1]))
    lists = pool_lists(tuple(pairs), feats.shape[0], n_out)
    reduce_lists(out, feats, lists, "mean" if mean else "sum", pairs[-1])
    return out


def _max_cuda(feats: Tensor, *pairs_n: Any) -> tuple[Tensor, Tensor]:
    *pairs, n_out, _ = pairs_n
    if not has_kernels(feats.device):
        return reference.pointcloud_max_pool(feats, *pairs_n)
    out = feats.new_empty((n_out, feats.shape[1]))
    winner = torch.empty_like(out, dtype=torch.int32)
    lists = pool_lists(tuple(pairs), feats.shape[0], n_out)
    reduce_lists(out, feats, lists, "max", pairs[-1], winner)
    return out, winner


def _max_grad_cuda(dy: Tensor, winner: Tensor, *pairs_n: Any) -> Tensor:
    *pairs, n_out = pairs_n
    if not has_kernels(dy.device):
        return reference.pointcloud_max_pool_grad(dy, winner, *pairs_n)
    out = dy.new_empty((n_out, dy.shape[1]))
    lists = pool_lists(tuple(pairs), dy.shape[0], n_out)
    reduce_lists(out, dy, lists, "winners", pairs[-1], winner.contiguous())
    return out


def _sum_fake(feats: Tensor, *pairs_mean: Any) -> Tensor:
    return feats.new_empty((pairs_mean[-2], feats.shape[1]))


def _max_fake(feats: Tensor, *pairs_n: Any) -> tuple[Tensor, Tensor]:
    out = feats.new_empty((pairs_n[-2], feats.shape[1]))
    return out, torch.empty_like(out, dtype=torch.int32)


def _max_grad_fake(dy: Tensor, winner: Tensor, *pairs_n: Any) -> Tensor:
    return dy.new_empty((pairs_n[-1], dy.shape[1]))


def _partners(pairs: Pairs, n_in: int, n_out: int) -> Tensor:
    """int64 [n_out, 1]: how many pairs an output has, 1 where none."""
    if _by_lists(pairs.out_index):  # bincount waits for the GPU
        counts = pool_lists(pairs, n_in, n_out).begins.diff().clamp_(min=1)
    else:
        counts = torch.bincount(pairs.out_index, minlength=n_out).clamp_(min=1)
    if pairs.out_order is not None:
        counts = torch.empty_like(counts).index_copy_(0, pairs.out_order.long(), counts)
    return counts.unsqueeze(1)


def _sum_autograd(feats: Tensor, *pairs_mean: Any) -> Tensor:
    if gradient_wanted(feats):
        return _apply_sum(feats, *pairs_mean)
    with torch._C._AutoDispatchBelowAutograd():
        return _sum(feats, *pairs_mean)


def _max_autograd(feats: Tensor, *pairs_n: Any) -> tuple[Tensor, Tensor]:
    if gradient_wanted(feats):
        return _apply_max(feats, *pairs_n)
    with torch._C._AutoDispatchBelowAutograd():
        return _max(feats, *pairs_n)


def _max_grad_autograd(dy: Tensor, winner: Tensor, *pairs_n: Any) -> Tensor:
    if gradient_wanted(dy):
        return _apply_max_grad(dy, winner, *pairs_n)
    with torch._C._AutoDispatchBelowAutograd():
        return _max_grad(dy, winner, *pairs_n)


class _Sum(torch.autograd.Function):
    """Linear in feats: its gradient is the sum over the reversed pairs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(feats: Tensor, *pairs_mean: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _sum(feats, *pairs_mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        feats, *pairs, ctx.n_out, ctx.mean = inputs
        ctx.n_in = feats.shape[0]
        ctx.save_for_backward(*pairs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        pairs = Pairs(*ctx.saved_tensors)
        if ctx.mean:
            dy = dy / _partners(pairs, ctx.n_in, ctx.n_out)
        return _sum_autograd(dy, *pairs.transposed(), ctx.n_in, False), *(None,) * 7


class _Max(torch.autograd.Function):
    """The winner of each output gets its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(feats: Tensor, *pairs_n: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _max(feats, *pairs_n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        feats, *pairs, _, _ = inputs
        ctx.n_in = feats.shape[0]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *pairs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        winner, *pairs = ctx.saved_tensors
        reverse = Pairs(*pairs).transposed()
        return _max_grad_autograd(dy, winner, *reverse, ctx.n_in), *(None,) * 7


class _MaxGrad(torch.autograd.Function):
    """Linear in dy: each output takes back what its winner was given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, winner: Tensor, *pairs_n: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _max_grad(dy, winner, *pairs_n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        (winner,) = ctx.saved_tensors
        return reference.take_winners(ddx, winner), *(None,) * 7


_apply_sum = apply_function(_Sum)
_apply_max = apply_function(_Max)
_apply_max_grad = apply_function(_MaxGrad)

for _name, _kernel, _cuda, _fake, _autograd in (
    ("sum_pool", _sum_native, _sum_cuda, _sum_fake, _sum_autograd),
    ("max_pool", _max_native, _max_cuda, _max_fake, _max_autograd),
    ("max_pool_grad", _max_grad_native, _max_grad_cuda, _max_grad_fake, _max_grad_autograd),
):
    library.impl(f"pointcloud_{_name}", _kernel, "CPU")
    library.impl(f"pointcloud_{_name}", _cuda, "CUDA")
    library.impl(f"pointcloud_{_name}", _autograd, "Autograd")
    torch.library.register_fake(f"gossamer::pointcloud_{_name}", _fake, lib=library)
