"""FedTiny: the clients of federated learning choose a mask by batch norms, then move it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...prune import count_kept, largest
from ..allocation import share_out
from ..dynamic import DropGrow
from ..layers import Layer, Names, find_layers
from ..patterns import Unstructured
from ..schedules import DropAndGrow
from ..scores import Magnitude, Score
from ..sparsifier import Sparsifier

Masks = dict[str, Tensor]
Report = dict[str, tuple[Tensor, Tensor]]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Client = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def candidate_masks(
    model: nn.Module,
    sparsity: float,
    count: int,
    noise: float = 0.5,
    seed: int = 0,
    include: Names | None = None,
    exclude: Names | None = None,
) -> list[Masks]:
    """Masks by magnitude, of one sparsity of the whole and of different ones of the layers.

    Each layer's share of what lives is in proportion to its size times 1 + noise u, u uniform in
    [-1, 1).

    Parameters
    ----------
    model : nn.Module
        Not changed.
    sparsity : float
    count : int
    noise : float
        In [0, 1). How candidates are drawn was not recovered from the paper: ours.
    seed : int
    include, exclude : str or iterable of str, optional
        As for ``gossamer.convert``.

    Raises
    ------
    TypeError, ValueError
        A number out of its range, a layer that ``Sparsifier`` would not take, or an unknown name.
    """
    if not 0 <= noise < 1 or not 0 <= sparsity < 1 or count < 1:
        raise ValueError(
            f"candidate_masks: {count} of sparsity {sparsity}, noise {noise}: expected at least 1, "
            "in [0, 1) both"
        )
    layers = find_layers("candidate_masks", model, Unstructured(), include, exclude)
    generator = torch.Generator("cpu").manual_seed(seed)
    sizes = [layer.mask.numel() for layer in layers]
    keep = max(len(layers), count_kept(sum(sizes), 1 - sparsity))
    made = []
    for _ in range(count):
        u = 2 * torch.rand(len(layers), generator=generator, dtype=torch.float64) - 1
        shares = [n * (1 + noise * float(x)) for n, x in zip(sizes, u, strict=True)]
        keeps = share_out(shares, sizes, keep)
        made.append(
            {
                layer.name: largest(layer.weight.abs().flatten(), k).view(layer.shape)
                for layer, k in zip(layers, keeps, strict=True)
            }
        )
    return made


@torch.no_grad()
def select_mask(
    model: nn.Module,
    candidates: Sequence[Masks],
    clients: Sequence[Client],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> int:
    """Which candidate has the least loss with the batch-norm statistics of the clients.

    For each candidate every client runs its batches in training mode and gives mean and variance of
    each batch norm (of a momentum of None: averages over batches); the server takes the mean of the
    clients', and each client gives its loss with these. The lower of equal ones is taken.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    candidates : sequence of dict
        Of name of a layer to bool mask.
    clients : sequence of sequence of (x, y)
        The batches of each.
    loss : callable
        (model(x), y) -> scalar tensor.

    Raises
    ------
    ValueError
        If there are no candidates or no clients.

    References
    ----------
    Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning"
    (FedTiny), ICDCS 2023. From memory.
    """
    if not candidates or not clients:
        raise ValueError(f"select_mask: {len(candidates)} candidates, {len(clients)} clients")
    found = []
    for masks in candidates:
        pruned = copy.deepcopy(model)
        for name, mask in masks.items():
            weight = pruned.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.masked_fill_(~mask, 0)
        norms: list[Any] = [m for m in pruned.modules() if isinstance(m, _NORMS)]
        norms = [norm for norm in norms if norm.track_running_stats]
        buffers = [(norm.running_mean, norm.running_var) for norm in norms]
        sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in buffers]
        for batches in clients:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            pruned.train()
            for x, _ in batches:
                pruned(x)
            for of_client, total in zip(buffers, sums, strict=True):
                for statistic, added in zip(of_client, total, strict=True):
                    added.add_(statistic / len(clients))
        for of_client, total in zip(buffers, sums, strict=True):
            for statistic, mean in zip(of_client, total, strict=True):
                statistic.copy_(mean)
        pruned.eval()
        losses = [
            sum(float(loss(pruned(x), y)) for x, y in batches) / len(batches) for batches in clients
        ]
        found.append(sum(losses) / len(losses))
    # A loss that is no number is no least one.
    ranked = [x if x == x else float("inf") for x in found]
    return ranked.index(min(ranked))


class TopGradients(Score):
    """|mean over clients of the gradients that they report|, 0 where none is reported."""

    sees_gradients = True
    masked_gradients = "due"

    def __init__(self) -> None:
        self.received: Report = {}

    def __call__(self, layer: Layer) -> Tensor:
        score = torch.zeros_like(layer.weight).flatten()
        if layer.name in self.received:
            where, values = self.received[layer.name]
            score.index_add_(0, where, values.to(score))
        return score.abs_().view(layer.shape)


class FedTiny(DropGrow):
    """Progressive pruning: the masks of one block of layers at a time drop and grow.

    Every so many steps it is the turn of the next block, from the last to the first. Of each of its
    layers a share of what lives is dropped by |w|, alpha / 2 (1 + cos(pi t / end)), and as many of
    the largest gradients of what was masked are grown, from 0. Clients send no more of these than
    can grow: ``reported()`` on each, ``receive`` on all, before the step of the change. With
    nothing received the gradients at hand count as those of a single client.

    Parameters
    ----------
    model, **options
        As for ``Sparsifier``.
    masks : dict of str to Tensor
        Which to begin with: a candidate that ``select_mask`` found.
    end : int
        The step from which masks stay.
    every : int
        Steps between changes.
    alpha : float
    blocks : sequence of sequence of str, optional
        Names of layers; each layer is a block by default.

    Raises
    ------
    TypeError, ValueError
        As ``Sparsifier`` says, or if masks or blocks are not those of the layers.

    References
    ----------
    Huang et al., "Distributed Pruning Towards Tiny Neural Networks in Federated Learning"
    (FedTiny), ICDCS 2023. From memory.
    """

    schedule: _Given

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        end: int,
        every: int = 10,
        alpha: float = 0.3,
        blocks: Sequence[Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        self._received = TopGradients()
        whole = sum(mask.numel() for mask in masks.values())
        sparsity = 1 - sum(int(mask.sum()) for mask in masks.values()) / max(1, whole)
        schedule = _Given(masks, sparsity, end, every, alpha)
        super().__init__(model, Unstructured(), Magnitude(), self._received, schedule, **options)
        names = [layer.name for layer in self.layers]
        self.blocks = [[n] for n in names] if blocks is None else [list(b) for b in blocks]
        if sorted(n for block in self.blocks for n in block) != sorted(names):
            raise ValueError(f"FedTiny: blocks {self.blocks}, expected each of {names} once")

    def _turn(self, step: int) -> list[str]:
        """The block whose masks change after a step, or next."""
        return self.blocks[-1 - (-(-step // self.schedule.every) - 1) % len(self.blocks)]

    @torch.no_grad()
    def reported(self) -> Report:
        """Of the gradients at hand the largest that may grow next: where (flattened), which."""
        due = -(-(self.steps + 1) // self.schedule.every) * self.schedule.every
        return self._largest(due)

    def _largest(self, step: int) -> Report:
        found, block = {}, self._turn(step)
        for layer in self.layers:
            if layer.name in block:
                live = int(layer.mask.sum())
                count = int(self.schedule.at(step) * live)
                count = min(count, layer.mask.numel() - live)
                masked = layer.gradient.abs().masked_fill(layer.mask, -torch.inf).flatten()
                where = largest(masked, count).nonzero().flatten()
                found[layer.name] = (where, layer.gradient.flatten()[where])
        return found

    @torch.no_grad()
    def receive(self, reports: Sequence[Report], shares: Sequence[float] | None = None) -> None:
        """Take the reports of all clients, with the share that each has of the data."""
        if shares is None:
            shares = [1 / len(reports)] * len(reports)
        for name in reports[0]:
            where = torch.cat([report[name][0] for report in reports])
            values = [s * report[name][1] for s, report in zip(shares, reports, strict=True)]
            self._received.received[name] = (where, torch.cat(values))

    def share(self, layer: Layer, fraction: float) -> float:
        return fraction if layer.name in self._turn(self.steps) else 0.0

    @torch.no_grad()
    def drop_and_grow(self, fraction: float) -> None:
        if not self._received.received:
            self.receive([self._largest(self.steps)])
        super().drop_and_grow(fraction)
        self._received.received = {}


class _Given(DropAndGrow):
    """Drop and grow that begins with given masks."""

    def __init__(
        self, masks: Mapping[str, Tensor], sparsity: float, end: int, every: int, alpha: float
    ) -> None:
        super().__init__(sparsity, end, every, alpha)
        self.masks = masks

    def start(self, sparsifier: Sparsifier) -> None:
        names = [layer.name for layer in sparsifier.layers]
        if set(names) != set(self.masks):
            raise ValueError(f"FedTiny: masks of {sorted(self.masks)}, the layers are {names}")
        for layer in sparsifier.layers:
            if tuple(self.masks[layer.name].shape) != layer.shape:
                raise ValueError(
                    f"FedTiny: {layer.name}: a mask {list(self.masks[layer.name].shape)} of a "
                    f"weight {list(layer.shape)}"
                )
        sparsifier._take([self.masks[layer.name].reshape(1, -1) for layer in sparsifier.layers])
        sparsifier.apply()
