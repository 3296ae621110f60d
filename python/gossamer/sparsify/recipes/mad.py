"""MAD: weights that adversarial examples find salient stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...prune import largest
from ..allocation import select_globally
from ..layers import Layer
from ..patterns import Unstructured
from ..schedules import OneShot
from ..scores import InputScore, input_rows
from ..sparsifier import Sparsifier


def pgd_attack(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float = 0.03,
    steps: int = 10,
    step_size: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """x + d, |d| <= eps, that projected gradient ascent on the loss finds from a random d.

    Parameters
    ----------
    model : nn.Module
        As it is, in training or in evaluation mode; no gradient is left in its parameters.
    loss : callable
        (model(x), y) -> scalar tensor.
    x, y : Tensor
    eps : float
    steps : int
        10: the PGD-10 of the paper.
    step_size : float, optional
        2.5 eps / steps by default.
    low, high : float
        The range of inputs.

    References
    ----------
    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018.
    """
    step = 2.5 * eps / steps if step_size is None else step_size
    moved = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(low, high)
    for _ in range(steps):
        moved.requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(model(moved), y), moved)
        nearby = moved.detach() + step * slope.sign()
        moved = nearby.clamp(x - eps, x + eps).clamp(low, high)
    return moved.detach()


class KroneckerSaliency(InputScore):
    """The rise of the loss without a weight, by a block-diagonal Kronecker-factored curvature.

    With A = E[a a^T] of inputs a and G = E[g g^T] of gradients g of outputs, the curvature of a
    layer is about G (x) A; of that, blocks of ``block`` inputs of one output are kept. The rise
    0.5 dw^T H dw of a block, dw = -w, is 0.5 G_nn sum_k w_nk sum_j A_kj w_nj, and the term of k is
    the score of w_nk, 0 where it is negative.
    """

    sees_gradients = True
    masked_gradients = "none"

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self._last: dict[str, tuple[Tensor, int]] = {}

    def attach(self, layers: Sequence[Layer]) -> None:
        super().attach(layers)
        for layer in layers:
            await_gradient = functools.partial(self._await_gradient, layer)
            self._hooks.append(layer.module.register_forward_hook(await_gradient))

    def _await_gradient(self, layer: Layer, module: nn.Module, args: Any, y: Tensor) -> None:
        def see(g: Tensor) -> None:
            rows = g.movedim(1, -1) if len(layer.shape) > 2 else g
            rows = rows.reshape(-1, layer.shape[0]).float()
            self._last["G " + layer.name] = (rows.square().sum(0), len(rows))

        if y.requires_grad:
            y.register_hook(see)

    def see(self, layer: Layer, x: Tensor) -> None:
        rows = input_rows(layer.module, x).float()
        blocks = F.pad(rows, (0, -rows.shape[1] % self.block)).view(len(rows), -1, self.block)
        images = len(x) if len(layer.shape) > 2 else len(rows)
        total = torch.einsum("rbi,rbj->bij", blocks, blocks)
        self._last["A " + layer.name] = (total, images)

    def observe(self, layers: Sequence[Layer]) -> None:
        """Add what the last pass saw: those before it were the attack's."""
        for key, (total, count) in self._last.items():
            self.rows[key] = self.rows.get(key, 0) + count
            self.sums[key] = self.sums[key] + total if key in self.sums else total
        self._last.clear()

    def __call__(self, layer: Layer) -> Tensor:
        if "G " + layer.name not in self.sums:
            raise RuntimeError(f"MAD: {layer.name}: no gradients were seen yet")
        a, g = (self.sums[k + layer.name] / max(1, self.rows[k + layer.name]) for k in ("A ", "G "))
        w = layer.weight.detach().float().flatten(1)
        blocks = F.pad(w, (0, -w.shape[1] % self.block)).view(len(w), -1, self.block)
        rise = 0.5 * g[:, None, None] * blocks * torch.einsum("nbi,bij->nbj", blocks, a)
        return rise.flatten(1)[:, : w.shape[1]].reshape(layer.shape).clamp(min=0)


class MAD(Sparsifier):
    """What adversarial examples find least salient is pruned, to second order.

    For the first ``samples`` calls of ``step()`` the loop computes gradients at adversarial inputs,
    one batch each, and leaves ``optimizer.step()`` out; then the model is pruned, convolutions by
    one order over all of them, of linear layers each row alike, and the loop trains what is left,
    adversarially::

        x = pgd_attack(model, loss, x, y)
        loss(model(x), y).backward()

    The score is 0.5 dw^T H dw by blocks of inputs of an output, H = G_nn A, A the second moments of
    the inputs in the block, G_nn that of the output's gradient.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    sparsity : float
    samples : int
        Batches before it prunes.
    block : int
        Inputs in a block. Ours, and how a block's rise is shared out over its weights.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if ``samples`` or ``block`` is below 1.

    References
    ----------
    Lee et al., "Masking Adversarial Damage: Finding Adversarial Saliency for Robust and Sparse
    Network", CVPR 2022. Its learned mask, by which dw = (m - 1) w, is left out: m = 0.
    """

    schedule: OneShot

    def __init__(
        self, model: nn.Module, sparsity: float, samples: int = 32, block: int = 64, **options: Any
    ) -> None:
        if samples < 1 or block < 1:
            raise ValueError(f"MAD: samples {samples}, block {block}, expected at least 1 each")
        schedule = OneShot(sparsity, at=samples)
        super().__init__(model, Unstructured(), KroneckerSaliency(block), schedule, **options)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        if self.steps == self.schedule.at:
            self.detach()

    def _selected(self, sparsity: float) -> list[Tensor]:
        convs = [layer for layer in self.layers if len(layer.shape) > 2]
        chosen = {}
        if convs:
            kept = select_globally([self.scored(layer, self.score) for layer in convs], sparsity)
            chosen = {layer.name: k for layer, k in zip(convs, kept, strict=True)}
        for layer in self.layers:
            if layer.name not in chosen:
                rows = self.score(layer)
                keep = max(1, int((1 - sparsity) * rows.shape[1] + 0.5))
                chosen[layer.name] = largest(rows, keep).view(1, -1)
        return [chosen[layer.name] for layer in self.layers]

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.score.detach()
        if self.steps < self.schedule.at:
            self.score.attach(self.layers)
