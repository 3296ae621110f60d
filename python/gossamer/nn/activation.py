"""Activations that make zeros on purpose, and weights under which they neither fade nor explode."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

_NORMAL = NormalDist()


class _Clipped(nn.Module):
    """Zero up to ``tau``, then x - tau up to ``m``; with two sides odd in x."""

    sides = 1  # above tau alone, or 2: below -tau too

    def __init__(self, tau: float, m: float = math.inf) -> None:
        super().__init__()
        name = type(self).__name__
        if not math.isfinite(tau) or (self.sides == 2 and tau < 0):
            raise ValueError(
                f"{name}: tau is {tau}, expected a number{' from 0 on' * (self.sides - 1)}"
            )
        if not m > 0:
            raise ValueError(f"{name}: m is {m}, expected above 0")
        self.tau, self.m = float(tau), float(m)

    @classmethod
    def for_sparsity(cls, sparsity: float, m: float = math.inf, q: float = 1.0) -> Self:
        """With the threshold that makes this share of normal inputs of variance ``q`` zero.

        Raises
        ------
        ValueError
            If ``sparsity`` is not between 0 and 1, ``q`` not above 0 or infinite, or ``m`` not
            above 0.
        """
        if not 0 < sparsity < 1:
            raise ValueError(f"{cls.__name__}: sparsity is {sparsity}, expected between 0 and 1")
        _check_variance(cls.__name__, q)
        share = (cls.sides - 1 + sparsity) / cls.sides  # of the inputs below tau
        return cls(math.sqrt(q) * _NORMAL.inv_cdf(share), m)

    def moments(self, q: float = 1.0) -> tuple[float, float, float]:
        """E[φ'²], E[φ²] and d E[φ²] / dq over inputs of variance q, in closed form."""
        sigma = math.sqrt(q)
        low, high = self.tau / sigma, (self.tau + self.m) / sigma
        inside = _NORMAL.cdf(high) - _NORMAL.cdf(low)
        at_low, at_high = _NORMAL.pdf(low), _NORMAL.pdf(high)
        clipped = math.isfinite(self.m)  # otherwise what is multiplied by 0 below may be infinite
        square = q * (inside + low * at_low) - 2 * self.tau * sigma * (at_low - at_high)
        square += self.tau**2 * inside
        slope = inside
        if clipped:
            square += self.m**2 * (1 - _NORMAL.cdf(high)) - q * high * at_high
            slope -= self.m * at_high / sigma
        return self.sides * inside, self.sides * square, self.sides * slope

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, m={self.m:g}"


class ClippedShiftedReLU(_Clipped):
    """``min(max(x - tau, 0), m)``: zero up to a threshold, and bounded.

    Parameters
    ----------
    tau : float
        The threshold.
    m : float
        The largest output, above 0; infinite by default.

    Raises
    ------
    ValueError
        If ``tau`` is not finite or ``m`` not above 0.

    References
    ----------
    Price, Daultry and Tanner, "Deep Neural Network Initialization with Sparsity Inducing
    Activations", 2024 (arXiv:2402.16184).

    Examples
    --------
    >>> import torch, gossamer
    >>> activation = gossamer.nn.ClippedShiftedReLU.for_sparsity(0.85, m=1.2)
    >>> zeros = (activation(torch.randn(1000)) == 0).float().mean()  # about 0.85
    """

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.tau).clamp(0, self.m)


class ClippedSoftThreshold(_Clipped):
    """``sign(x) min(max(|x| - tau, 0), m)``: zero around 0, and bounded on both sides.

    Parameters
    ----------
    tau : float
        The threshold, from 0 on.
    m : float
        The largest magnitude of an output, above 0; infinite by default.

    Raises
    ------
    ValueError
        If ``tau`` is negative or not finite, or ``m`` not above 0.

    References
    ----------
    Price, Daultry and Tanner, "Deep Neural Network Initialization with Sparsity Inducing
    Activations", 2024 (arXiv:2402.16184).
    """

    sides = 2

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.clamp(-self.tau, self.tau)).clamp(-self.m, self.m)  # NaN stays


class EdgeOfChaos(NamedTuple):
    """Variances under which depth keeps both the size of activations and that of gradients.

    ``weight`` is the variance of a weight times the number of inputs, ``bias`` that of a bias.
    ``slope`` is V'(q), how much of a deviation of the pre-activations' variance from q is left
    after a layer: well below 1 the network is stable, at 1 (without clipping) it is not.
    """

    weight: float
    bias: float
    slope: float


def edge_of_chaos(
    activation: ClippedShiftedReLU | ClippedSoftThreshold, q: float = 1.0
) -> EdgeOfChaos:
    """The initialisation of a deep network with this activation, in closed form.

    Parameters
    ----------
    activation : ClippedShiftedReLU or ClippedSoftThreshold
        After every layer.
    q : float
        The variance that pre-activations have and keep. A larger one is more stable.

    Returns
    -------
    EdgeOfChaos
        ``weight = 1 / E[φ'(x)²]`` and ``bias = q - weight E[φ(x)²]`` over normal x of variance q.

    Raises
    ------
    TypeError
        If ``activation`` is neither of the two.
    ValueError
        If no variance of the bias keeps q: activations then grow by the weights alone.

    References
    ----------
    Price, Daultry and Tanner, "Deep Neural Network Initialization with Sparsity Inducing
    Activations", 2024 (arXiv:2402.16184).
    """
    if not isinstance(activation, _Clipped):
        raise TypeError(
            f"edge_of_chaos: activation is {type(activation).__name__}, expected "
            "ClippedShiftedReLU or ClippedSoftThreshold"
        )
    _check_variance("edge_of_chaos", q)
    gain, square, slope = activation.moments(q)
    if gain <= 0:
        raise ValueError(f"edge_of_chaos: {activation} passes no inputs of variance {q}")
    weight = 1 / gain
    bias = q - weight * square
    if bias < 0:
        raise ValueError(
            f"edge_of_chaos: with {activation} at variance {q} the bias would need a variance of "
            f"{bias:.4g}; a larger tau or a smaller m makes room for it"
        )
    return EdgeOfChaos(weight, bias, weight * slope)


@torch.no_grad()
def edge_of_chaos_(
    module: nn.Module,
    activation: ClippedShiftedReLU | ClippedSoftThreshold,
    q: float = 1.0,
    generator: torch.Generator | None = None,
) -> EdgeOfChaos:
    """Draw the weights and biases of all linear layers and convolutions of a module by it.

    Parameters
    ----------
    module : torch.nn.Module
        Whose ``nn.Linear`` and ``nn.Conv1d``, ``2d``, ``3d`` have this activation behind them.
    activation, q
        As for ``edge_of_chaos``.
    generator : torch.Generator, optional
        Of the random numbers.

    Returns
    -------
    EdgeOfChaos
        The variances that were used.

    Raises
    ------
    TypeError, ValueError
        As ``edge_of_chaos`` says.
    """
    found = edge_of_chaos(activation, q)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            inputs = layer.weight[0].numel()
            layer.weight.normal_(0, math.sqrt(found.weight / inputs), generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, math.sqrt(found.bias), generator=generator)
    return found


def _check_variance(op: str, q: float) -> None:
    if not (q > 0 and math.isfinite(q)):
        raise ValueError(f"{op}: q is {q}, expected a variance above 0")
