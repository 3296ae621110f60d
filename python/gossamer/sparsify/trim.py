"""Net-Trim: the sparsest weight that gives a layer nearly the outputs it had."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Layer


def nettrim_weight(
    weight: Tensor,
    inputs: Tensor,
    layer: Layer,
    sparsity: float,
    tolerance: float = 0.05,
    rho: float = 1.0,
    iterations: int = 100,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """min |U|_1 subject to |(X U - Y) on {Y > 0}|_F <= eps and X U <= V elsewhere, then a mask.

    By ADMM on W1 = X W3 and W2 = W3, with U1 and U2 their scaled multipliers:
    W1 is the projection of X W3 - U1 onto the constraints: Y + min(1, eps / |d|) d on {Y > 0}, d
    what it is off there, and at most V elsewhere; W2 = soft(W3 - U2, 1 / rho);
    (XᵀX + I) W3 = Xᵀ(W1 + U1) + W2 + U2. Then the pattern keeps the largest of W2 (of those that
    are 0 there, of W3), with their values in W3, so that the sparsity is the one asked for.

    Parameters
    ----------
    weight : Tensor
        [N, K] or a convolution's; U of the equations is its transpose.
    inputs : Tensor
        X [rows, K].
    layer : Layer
        Its pattern, and its bias b: the layer's output without it is Y, and positive where
        Y + b is; V = -b.
    sparsity : float
    tolerance : float
        eps, as a share of the norm of Y on {Y > 0}. Not known from the paper's code: ours.
    rho : float
        Of the data divided by |X|_F / sqrt(rows). Not known from the paper's code: ours.
    iterations : int
    relu : bool
        Whether a ReLU follows; without one, every output counts as positive.

    Returns
    -------
    weight : Tensor
        In the shape and dtype of the one given.
    mask : Tensor
        Bool.

    Raises
    ------
    ValueError
        If a number is out of its range, or the pattern cannot have the sparsity.

    References
    ----------
    Aghasi et al., "Net-Trim: Convex Pruning of Deep Neural Networks with Performance Guarantee",
    NeurIPS 2017. Its linear systems are solved by a Cholesky factor here, not by conjugate
    gradients.
    """
    if tolerance < 0 or rho <= 0 or iterations < 1:
        raise ValueError(
            f"nettrim: tolerance {tolerance}, rho {rho}, iterations {iterations}: expected not "
            "below 0, above 0, at least 1"
        )
    x = inputs.double()
    scale = float(x.norm()) / len(x) ** 0.5 or 1.0
    x = x / scale
    w0 = weight.detach().flatten(1).double().t()
    y = x @ w0
    bias = getattr(layer.module, "bias", None)
    level = torch.zeros(y.shape[1], dtype=y.dtype, device=y.device)
    if bias is not None:
        level = -bias.detach().double() / scale
    positive = y > level if relu else torch.ones_like(y, dtype=torch.bool)
    epsilon = tolerance * float(y[positive].norm())
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(x.t() @ x + eye)
    w3, w2 = w0.clone(), w0.clone()
    u1, u2 = torch.zeros_like(y), torch.zeros_like(w0)
    for _ in range(iterations):
        given = x @ w3 - u1
        off = (given - y) * positive
        size = float(off.norm())
        inside = y + (min(1.0, epsilon / size) if size > 0 else 1.0) * off
        w1 = torch.where(positive, inside, torch.minimum(given, level))
        w2 = torch.nn.functional.softshrink(w3 - u2, 1 / rho)
        w3 = torch.cholesky_solve(x.t() @ (w1 + u1) + w2 + u2, factor)
        u1 += w1 - x @ w3
        u2 += w2 - w3
    score = _in_order(w2.t(), w3.t()).view(weight.shape)
    kept = layer.pattern.select(layer.units(score, "sum"), layer.keep(sparsity))
    mask = layer.pattern.cover(kept, layer.shape, layer.groups)
    return (w3.t().reshape(weight.shape) * mask).to(weight.dtype), mask


def _in_order(first: Tensor, second: Tensor) -> Tensor:
    """Numbers that are in the order of |first|, and by |second| where that is 0."""
    top = second.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    least = first.abs()[first != 0].min() if (first != 0).any() else top
    return torch.where(first != 0, first.abs(), 0.5 * least * second.abs() / top)
