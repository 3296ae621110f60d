"""Penalties that make activations sparse, for what then skips zeros."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("l1", "positions", "kl")


class ActivationPenalty:
    """A term of the loss for the outputs of chosen modules, channels in dimension 1.

    "l1" is mean |a|; "positions" the largest over positions of mean |a| over the channels there,
    averaged over the batch, for the l_0,inf norm of convolutional sparse coding, which counts the
    non-zeros at the fullest position; "kl" is the mean over channels of the Kullback-Leibler
    divergence of a Bernoulli variable of the channel's mean activation from one of ``target``, of
    activations in [0, 1]::

        made = ActivationPenalty(model, "decoder.*relu", strength=1e-3)
        (loss(model(x)) + made.penalty()).backward()
        print(made.zeros)

    What is zero then need not be multiplied: ``gossamer.convert(model, "activation")``.

    Parameters
    ----------
    model : nn.Module
    include : str or iterable of str
        fnmatch patterns of names of modules.
    kind : {"l1", "positions", "kl"}
    strength : float
        Not known from the papers: ours.
    target : float
        Of "kl", in (0, 1).

    Raises
    ------
    ValueError
        If a pattern names no module, or an argument is none of those above.

    References
    ----------
    Image generation via sparse modelling, for penalties on a generator's activations; Ng, "Sparse
    autoencoder", 2011, for "kl". From memory.
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Iterable[str],
        kind: str = "l1",
        strength: float = 1e-4,
        target: float = 0.05,
    ) -> None:
        if kind not in KINDS or strength < 0 or not 0 < target < 1:
            raise ValueError(
                f"ActivationPenalty: kind {kind!r}, strength {strength}, target {target}: expected "
                f"one of {KINDS}, at least 0, in (0, 1)"
            )
        self.kind, self.strength, self.target = kind, strength, target
        self.zeros: dict[str, float] = {}
        self._terms: list[Tensor] = []
        named = dict(model.named_modules())
        self._hooks = []
        for pattern in [include] if isinstance(include, str) else list(include):
            chosen = [name for name in named if fnmatchcase(name, pattern)]
            if not chosen:
                self.detach()
                raise ValueError(f"ActivationPenalty: {pattern!r} names no module of the model")
            for name in chosen:
                self._hooks.append(named[name].register_forward_hook(self._seen(name)))

    def _seen(self, name: str) -> Any:
        def see(module: nn.Module, args: Any, a: Tensor) -> None:
            self.zeros[name] = float((a.detach() == 0).float().mean())
            if torch.is_grad_enabled():
                self._terms.append(self.of(a))

        return see

    def of(self, a: Tensor) -> Tensor:
        """The term of one activation, without the strength."""
        if self.kind == "l1":
            return a.abs().mean()
        if self.kind == "positions":
            return a.abs().mean(1).flatten(1).amax(1).mean() if a.dim() > 2 else a.abs().mean()
        mean = a.transpose(0, 1).flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
        return (
            self.target * (self.target / mean).log()
            + (1 - self.target) * ((1 - self.target) / (1 - mean)).log()
        ).mean()

    def penalty(self) -> Tensor:
        """The sum over the passes since it was last asked for, times the strength."""
        if not self._terms:
            raise RuntimeError("ActivationPenalty: no pass with gradients since the last penalty()")
        total = torch.stack(self._terms).sum()
        self._terms.clear()
        return self.strength * total

    def detach(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
