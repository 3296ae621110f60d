"""MaskSparsity: the scales of batch norms that are to go are driven to zero, and only these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import select_globally
from ..hooks import before_update
from ..layers import unwrapped
from ..patterns import check_sparsity
from ..states import check_keys, check_masks

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class MaskSparsity:
    """g_gamma += s sign(gamma): on all scales until step ``select``, then on the masked ones alone.

    At that step the channels of smallest |gamma| are masked. ``finalize()`` makes scale and shift
    of the masked channels 0: what follows a batch norm then gets nothing from them.

    Parameters
    ----------
    model : nn.Module
        With batch norms, which are all taken.
    optimizer : torch.optim.Optimizer
        Before whose step the term is added to the gradients.
    select : int
        Steps of the first phase.
    sparsity : float, optional
        The share of all channels that is masked, exactly; each layer keeps one.
    threshold : float
        Without a sparsity, channels with |gamma| below it are.
    strength : float
        s.

    Raises
    ------
    ValueError
        If there is no batch norm with trainable scales, or a number out of its range.

    References
    ----------
    Jiang et al., "Pruning with sparsity regularization only on the channels that are to be
    pruned" (MaskSparsity), whose code has these defaults.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        select: int,
        sparsity: float | None = None,
        threshold: float = 0.01,
        strength: float = 5e-4,
    ) -> None:
        if sparsity is not None:
            check_sparsity(sparsity)
        if select < 1 or threshold <= 0 or strength < 0:
            raise ValueError(
                f"MaskSparsity: select {select}, threshold {threshold}, strength {strength}: "
                "expected at least 1, above 0, at least 0"
            )
        self.norms = {
            name: module
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, _NORMS) and module.affine and module.weight.requires_grad
        }
        if not self.norms:
            raise ValueError("MaskSparsity: the model has no batch norm with trainable scales")
        self.select, self.sparsity, self.threshold = select, sparsity, threshold
        self.strength, self.steps = strength, 0
        self.masks = {n: torch.zeros_like(m.weight).bool() for n, m in self.norms.items()}
        self._hook = before_update(optimizer, self._add_term)

    @torch.no_grad()
    def _add_term(self) -> None:
        for name, norm in self.norms.items():
            if norm.weight.grad is not None:
                term = self.strength * norm.weight.sign()
                if self.steps >= self.select:
                    term *= self.masks[name]
                norm.weight.grad.add_(term)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer; call it after that."""
        self.steps += 1
        if self.steps != self.select:
            return
        scales = [norm.weight.detach().abs() for norm in self.norms.values()]
        if self.sparsity is None:
            kept = [scale >= self.threshold for scale in scales]
        else:
            kept = select_globally(scales, self.sparsity)
        self.masks = {name: ~k for name, k in zip(self.norms, kept, strict=True)}

    @torch.no_grad()
    def finalize(self) -> dict[str, Tensor]:
        """Zero what is masked, and give the bool masks of the channels that are gone."""
        for name, norm in self.norms.items():
            norm.weight.masked_fill_(self.masks[name], 0)
            norm.bias.masked_fill_(self.masks[name], 0)
        self._hook.remove()
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "masks": {n: m.clone() for n, m in self.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ValueError if it is of another model."""
        check_keys("MaskSparsity", state, ("steps", "masks"))
        check_masks("MaskSparsity", self.masks, state["masks"])
        self.steps = state["steps"]
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}
