"""The explicit pruners: what makes a dense weight fit a pattern, on request only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def magnitude_24(weight: Tensor) -> Tensor:
    """Keep the two entries of largest magnitude in every four along the last dimension.

    Parameters
    ----------
    weight : Tensor
        [..., K] of a floating-point dtype; K need not be a multiple of 4.

    Returns
    -------
    Tensor
        The same shape, dtype and device, with the other entries 0. A tie keeps the lower index,
        and a NaN counts as the largest magnitude. Gradients flow to the kept entries.

    Raises
    ------
    TypeError
        If ``weight`` is not a floating-point tensor.
    ValueError
        If ``weight`` has no dimension.

    References
    ----------
    Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378).
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"magnitude_24: weight is {what}, it must be a floating-point tensor")
    if weight.dim() == 0:
        raise ValueError("magnitude_24: weight is 0-d, it needs at least one dimension")
    in_features = weight.shape[-1]
    magnitude = weight.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    padded = F.pad(magnitude, (0, -in_features % 4))
    a, b, c, d = padded.unflatten(-1, (-1, 4)).unbind(-1)
    # Of each pair the earlier wins a tie; the four wins of a group are then all different, and the
    # two largest are those that win at least twice.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = torch.stack(
        [
            (ab & ac) | (ab & ad) | (ac & ad),
            (~ab & bc) | (~ab & bd) | (bc & bd),
            (~ac & ~bc) | (~ac & cd) | (~bc & cd),
            (~ad & ~bd) | (~ad & ~cd) | (~bd & ~cd),
        ],
        dim=-1,
    )
    return torch.where(kept.flatten(-2)[..., :in_features], weight, 0)
