"""What training 2:4 weights needs beside pruning: projections, masks both ways, an estimate."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from ._library import calls_cpu_kernel
from ._wide import wide
from .formats import Sparse24
from .prune import magnitude_24


def hard_threshold_24(weight: Tensor) -> tuple[Tensor, Sparse24]:
    """What ``magnitude_24`` keeps of a matrix [N, K], dense and packed; without gradients.

    On the CPU both are made in one pass.
    """
    weight = weight.detach()
    if weight.device.type == "cpu":
        return _projected(weight, soft=False, scale=1.0)
    dense = magnitude_24(weight)
    return dense, Sparse24.from_dense(dense)


def soft_threshold_24(weight: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Sparse24]:
    """scale S(w), S(w) = sign(w) max(|w| - t, 0), t the second smallest magnitude of each four.

    At most two of four are left, and S is continuous in the weight, where keeping the two largest
    is not.

    Parameters
    ----------
    weight : Tensor
        [N, K] of a floating-point dtype; K need not be a multiple of 4: what is missing counts as
        zeros.
    scale : float or Tensor
        0-d, of a compiled graph.

    Returns
    -------
    dense : Tensor
        The same shape and dtype, without gradients.
    sparse : Sparse24
        The same, packed.

    References
    ----------
    Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training",
    NeurIPS 2024.
    """
    weight = weight.detach()
    if weight.device.type == "cpu":
        return _projected(weight, soft=True, scale=scale)
    # A NaN is the largest, as on the CPU.
    magnitude = weight.abs().nan_to_num(nan=math.inf, posinf=math.inf)
    magnitude = F.pad(magnitude, (0, -weight.shape[1] % 4)).unflatten(-1, (-1, 4))
    a, b, c, d = magnitude.unbind(-1)
    least = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    least = torch.minimum(least, torch.maximum(torch.minimum(a, b), torch.minimum(c, d)))
    left = (magnitude - least[..., None]).relu_().mul_(scale).flatten(-2)[:, : weight.shape[1]]
    dense = torch.copysign(left, weight)
    return dense, Sparse24.from_dense(dense)


def _projected(weight: Tensor, soft: bool, scale: float | Tensor) -> tuple[Tensor, Sparse24]:
    scale = torch.as_tensor(scale, dtype=torch.float64, device=weight.device)
    dense, values, indices = torch.ops.gossamer.sparse24_project(weight, soft, scale)
    return dense, Sparse24(values, indices, (weight.shape[0], weight.shape[1]))


def add_dropped_24(gradient: Tensor, weight: Tensor, kept: Tensor, factor: float) -> None:
    """gradient += factor (weight - kept), in place: a decay of what a projection did not keep."""
    like = (weight.shape, weight.dtype, weight.device)
    tensors = (gradient, weight.detach(), kept)
    if calls_cpu_kernel(*tensors) and all(
        (t.shape, t.dtype, t.device) == like and t.is_contiguous() for t in tensors
    ):
        _C.sparse24_add_dropped(*tensors, factor, torch.get_num_threads())
    else:
        gradient.add_(weight - kept, alpha=factor)


def scale_24(weight: Tensor) -> float:
    """<W, S(W)> / <S(W), S(W)>: what S(W) is multiplied by to be nearest to W; 1 of zeros.

    1.483 of independent normal weights, 1.751 of uniform ones.
    """
    soft = soft_threshold_24(weight)[0].double()
    square = float(soft.square().sum())
    return float((weight.detach().double() * soft).sum()) / square if square > 0 else 1.0


def mvue_24(gradient: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random 2:4 tensor whose mean is the one given: the unbiased one of least variance.

    An entry of magnitude a is kept with the probability p = min(1, 2 a / S), S the sum of the
    four (if one has p = 1, the others share the second place in proportion), and divided by p.

    Parameters
    ----------
    gradient : Tensor
        [..., M] of a floating-point dtype, finite.
    generator : torch.Generator, optional

    Returns
    -------
    Tensor
        The same shape and dtype.

    References
    ----------
    Chmiel et al., "Optimal Fine-Grained N:M sparsity for Activations and Neural Gradients", 2022
    (arXiv:2203.10991). Pairs are drawn by systematic sampling here, with one random number a four:
    each entry has the probability it has there, so mean and variance are the same.
    """
    columns = gradient.shape[-1]
    padded = F.pad(gradient.detach(), (0, -columns % 4)).unflatten(-1, (-1, 4))
    magnitude = padded.abs().to(wide(gradient.dtype))
    # As shares of the largest no sum leaves the range of numbers.
    magnitude = magnitude / magnitude.amax(-1, keepdim=True)
    total = magnitude.sum(-1, keepdim=True)
    largest, where = magnitude.max(-1, keepdim=True)
    # Summed up without it: a difference would lose what is small beside it.
    rest = magnitude.scatter(-1, where, 0.0).sum(-1, keepdim=True)
    alone = largest > rest
    scale = torch.where(alone, 1 / rest, 2 / total)
    p = (magnitude * scale).nan_to_num(nan=0.0, posinf=0.0)
    p = torch.where(alone, p.scatter(-1, where, 1.0), p)
    # The numbers u and u + 1 lie each in one of the intervals that the p leave side by side.
    if generator is None:
        u = torch.rand(total.shape, device=total.device)
    else:
        u = torch.rand(total.shape, generator=generator, device=generator.device)
    ends = (p.cumsum(-1) - (1 - u).clamp(1e-6).to(p)).floor()
    chosen = ends > F.pad(ends, (1, 0), value=-1.0)[..., :-1]
    estimate = torch.where(chosen, padded / p, 0).to(gradient.dtype)
    return estimate.flatten(-2)[..., :columns].contiguous()


@functools.cache
def _both_ways() -> Tensor:
    """The 90 masks of 4x4 entries with two in each row and column: [90, 16]."""
    pairs = [[float(i in pair) for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = [
        [entry for row in rows for entry in row]
        for rows in itertools.product(pairs, repeat=4)
        if all(sum(column) == 2 for column in zip(*rows, strict=True))
    ]
    return torch.tensor(masks)


def transposable_mask_24(weight: Tensor) -> Tensor:
    """The mask that is 2:4 along rows and along columns and keeps most magnitude.

    Parameters
    ----------
    weight : Tensor
        [N, K] of a floating-point dtype; zeros stand for what is missing of whole 4x4 blocks.

    Returns
    -------
    Tensor
        Bool [N, K]. Of equally good masks of a block one is taken, always the same. Infinite
        entries and NaN are the greatest.

    References
    ----------
    Hubara et al., "Accelerated Sparse Neural Training", NeurIPS 2021; Hu et al., "Accelerating
    Transformer Pre-training with 2:4 Sparsity", ICML 2024, who look at all 90 masks of a block.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.detach().abs().to(wide(weight.dtype)), (0, -columns % 4, 0, -rows % 4))
    blocks = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
    # Over the power of two below the largest, which rounds nothing, no sum leaves the range of
    # numbers. A mask keeps 8 entries below 2: one that is infinite, or NaN, counts more than those.
    infinite = ~(blocks < torch.inf)
    largest = blocks.masked_fill_(infinite, 0).amax(-1, keepdim=True)
    power = (largest / (2 * largest.frexp().mantissa)).where(largest > 0, 1)
    scaled = blocks.div_(power).masked_fill_(infinite, 16)
    masks = _both_ways().to(scaled)
    best = (scaled @ masks.t()).argmax(-1)
    mask = masks[best].bool().unflatten(-1, (4, 4)).transpose(1, 2).flatten(2).flatten(0, 1)
    return mask[:rows, :columns].contiguous()
