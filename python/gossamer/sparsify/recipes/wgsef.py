"""WGSEF: a penalty of groups whose proximal step leaves at most k of them, in the limit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...formats import Block
from ..patterns import Filters, Pattern
from ..schedules import OneShot
from ..scores import Magnitude
from ..sparsifier import Sparsifier


def wgsef_prox(norms: Tensor, keep: int, strength: float, weights: Tensor | None = None) -> Tensor:
    """By what the proximal step of the sparse envelope of at most k groups multiplies each group.

    The envelope is the biconjugate of 0.5 sum_j d_j |w_j|^2 + (0 if at most k groups are not 0,
    else infinity), which is min over theta in [0, 1]^n, sum theta <= k, of
    0.5 sum_j d_j |w_j|^2 / theta_j. Its step with strength c multiplies group j by
    theta_j / (theta_j + c d_j), theta_j = min(1, max(0, mu sqrt(d_j) |z_j| - c d_j)), mu such that
    the sum of theta is k.

    Parameters
    ----------
    norms : Tensor
        [n], |z_j|.
    keep : int
        k.
    strength : float
        c, the learning rate times the penalty's weight.
    weights : Tensor, optional
        [n], d_j, above 0; 1 by default.

    Returns
    -------
    Tensor
        [n] float64 in [0, 1].

    Raises
    ------
    ValueError
        If ``keep`` is not between 1 and n, or ``strength`` is negative.

    References
    ----------
    Beck, Refael, "Sparse regularization via bidualization", Journal of Global Optimization 2022,
    for the envelope; WGSEF for groups and weights. Derived here (mu by bisection, not their
    linear-time search).
    """
    if not 1 <= keep <= norms.numel() or strength < 0:
        raise ValueError(f"wgsef_prox: {keep} of {norms.numel()} groups, strength {strength}")
    z = norms.double()
    d = torch.ones_like(z) if weights is None else weights.double()
    if strength == 0:
        return torch.ones_like(z)
    slope, offset = d.sqrt() * z, strength * d
    if int((slope > 0).sum()) <= keep:
        theta = (slope > 0).double()
        return theta / (theta + offset)

    def theta_of(mu: float) -> Tensor:
        return (mu * slope - offset).clamp(0, 1)

    low, high = 0.0, 1.0
    while float(theta_of(high).sum()) < keep:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if float(theta_of(middle).sum()) < keep:
            low = middle
        else:
            high = middle
    theta = theta_of(high)
    return theta / (theta + offset)


class WGSEF(Sparsifier):
    """After each step W <- prox(W) of the weighted group sparse envelope; at the end k groups stay.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    optimizer : torch.optim.Optimizer
        Whose learning rate the strength is multiplied by.
    sparsity : float
        1 - k / the number of groups, of each layer.
    end : int
        The step after which all but k groups are dropped for good.
    strength : float
        The penalty's weight lambda. Not known from the paper: ours.
    pattern : Pattern, Block or str
        Whose units are the groups: filters by default.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``strength`` is negative, or the units of ``pattern`` do not
        all compete.

    References
    ----------
    WGSEF (structured sparsity by the weighted group sparse envelope function); see ``wgsef_prox``.
    """

    one_lane_only = True
    schedule: OneShot

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        end: int,
        strength: float = 1e-2,
        pattern: Pattern | Block | str | None = None,
        **options: Any,
    ) -> None:
        if strength < 0:
            raise ValueError(f"WGSEF: strength {strength}, expected at least 0")
        self.strength = strength
        pattern = Filters() if pattern is None else pattern
        schedule = OneShot(sparsity, at=end)
        super().__init__(model, pattern, Magnitude(), schedule, optimizer=optimizer, **options)

    @torch.no_grad()
    def step(self) -> None:
        assert self.optimizer is not None
        rates = {p: g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        if self.steps < self.schedule.at:
            for layer in self.layers:
                norms = self.scored(layer, self.score)
                c = self.strength * float(rates[layer.weight])
                factor = wgsef_prox(norms.flatten(), layer.keep(self.schedule.sparsity), c)
                spread = self.pattern.spread(factor.view_as(norms), layer.shape, layer.groups)
                layer.weight.mul_(spread.to(layer.weight.dtype))
        super().step()
