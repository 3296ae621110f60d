"""Sparse neural dynamics: neurons that need no ReLU become linear or go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...prune import largest
from ..layers import unwrapped
from ..schedules import check_steps

RELU, IDENTITY, ZERO = 0, 1, 2


class GatedReLU(nn.Module):
    """y = p_0 max(x, 0) + p_1 x (+ p_2 0) for each feature, p = softmax((a + noise) / temperature).

    A feature that is decided has a p of 0 and 1 alone.

    Parameters
    ----------
    features : int
        Of the last dimension.
    temperature : float
    """

    noise: Tensor
    decided: Tensor

    def __init__(self, features: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        begin = torch.zeros(features, 3)
        begin[:, RELU] = 2.0
        self.logits = nn.Parameter(begin)
        self.register_buffer("noise", torch.zeros(features, 3))
        self.register_buffer("decided", torch.full((features,), -1))

    def shares(self, noisy: bool = False) -> Tensor:
        """p: [features, 3]."""
        logits = self.logits + self.noise if noisy else self.logits
        share = (logits / self.temperature).softmax(-1)
        chosen = nn.functional.one_hot(self.decided.clamp(min=0), 3).to(share)
        return torch.where(self.decided[:, None] >= 0, chosen, share)

    def forward(self, x: Tensor) -> Tensor:
        share = self.shares(self.training).to(x.dtype)
        return share[:, RELU] * x.relu() + share[:, IDENTITY] * x

    def extra_repr(self) -> str:
        return f"{len(self.decided)} features, {int((self.decided == RELU).sum())} ReLU for good"


class PartialReLU(nn.Module):
    """max(x, 0) of some features, x of the others."""

    rectified: Tensor

    def __init__(self, rectified: Tensor) -> None:
        super().__init__()
        self.register_buffer("rectified", rectified)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.rectified, x.relu(), x)


class SparseNeuralDynamics:
    """ReLUs of a network are made linear or zero step by step, until a budget of them is left.

    Each neuron is a relaxed categorical variable over {ReLU, identity, zero} (``GatedReLU``), with
    Gumbel noise drawn anew in each step. The budget falls from all to ``relus`` by a cubic
    schedule; at each of its steps the neurons with the smallest p of ReLU are decided, to what of
    identity and zero has the larger p. ``penalty()`` draws the expected number of ReLUs to
    ``relus``. What few ReLUs are left makes optimisation over the network's inputs tractable, by
    branch and bound, say; ``finalize()`` cuts out what is zero.

    Parameters
    ----------
    model : nn.Module
        With ``nn.Linear, nn.ReLU, nn.Linear`` in a row in ``nn.Sequential``s; changed in place.
    relus : int
        How many are left, from 0.
    begin, end, every : int
        Steps of the schedule.
    strength : float
        Of the penalty. Ours, as are the schedule, the temperature and where logits begin.
    temperature : float
    seed : int

    Raises
    ------
    ValueError
        If there is no such row, or not so many ReLUs.

    References
    ----------
    Liu et al., "Model-Based Control with Sparse Neural Dynamics", NeurIPS 2023. From memory.
    """

    def __init__(
        self,
        model: nn.Module,
        relus: int,
        begin: int,
        end: int,
        every: int = 100,
        strength: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_steps("SparseNeuralDynamics", begin, end, every)
        if strength < 0 or temperature <= 0:
            raise ValueError(
                f"SparseNeuralDynamics: strength {strength}, temperature {temperature}"
            )
        self._rows: list[tuple[Any, int]] = [
            (sequence, i)
            for sequence in unwrapped(model).modules()
            if isinstance(sequence, nn.Sequential)
            for i in range(1, len(sequence) - 1)
            if type(sequence[i]) is nn.ReLU
            and type(sequence[i - 1]) is nn.Linear
            and type(sequence[i + 1]) is nn.Linear
        ]
        self.total = sum(sequence[i - 1].out_features for sequence, i in self._rows)
        if not 0 <= relus < self.total:
            raise ValueError(
                f"SparseNeuralDynamics: {relus} of the {self.total} ReLUs between linear layers of "
                "a Sequential are to be left, expected fewer and at least 0"
            )
        self.relus, self.strength, self.steps = relus, strength, 0
        self.begin, self.end, self.every = begin, end, every
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.gates: list[GatedReLU] = []
        for sequence, i in self._rows:
            weight = sequence[i - 1].weight
            gate = GatedReLU(len(weight), temperature).to(weight.device)
            sequence[i] = gate.train(sequence.training)
            self.gates.append(gate)
        self._draw()

    def budget(self, step: int) -> int:
        """How many ReLUs there may be after a step."""
        left = 1 - min(max(step - self.begin, 0) / max(1, self.end - self.begin), 1)
        return round(self.relus + (self.total - self.relus) * left**3)

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        expected = torch.stack([gate.shares()[:, RELU].sum() for gate in self.gates]).sum()
        return self.strength * (expected - self.relus).clamp(min=0) / self.total

    def _draw(self) -> None:
        for gate in self.gates:
            uniform = torch.rand(gate.noise.shape, generator=self.generator, dtype=torch.float64)
            gate.noise.copy_(-(-uniform.clamp(1e-20, 1 - 1e-12).log()).log())

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer; call it after that."""
        self.steps += 1
        due = self.begin <= self.steps <= self.end
        if due and ((self.steps - self.begin) % self.every == 0 or self.steps == self.end):
            self._decide(self.budget(self.steps))
        self._draw()

    def _decide(self, budget: int) -> None:
        shares = torch.cat([gate.shares() for gate in self.gates])
        decided = torch.cat([gate.decided for gate in self.gates])
        worth = shares[:, RELU].masked_fill(decided >= 0, -1.0)
        kept = largest(worth, budget)
        lesser = torch.where(shares[:, IDENTITY] >= shares[:, ZERO], IDENTITY, ZERO)
        decided = torch.where((decided < 0) & ~kept, lesser, decided)
        if self.steps == self.end:
            decided = torch.where(decided < 0, RELU, decided)
        for gate, part in zip(
            self.gates, decided.split([len(g.decided) for g in self.gates]), strict=True
        ):
            gate.decided.copy_(part)

    @torch.no_grad()
    def finalize(self) -> None:
        """Cut zero neurons out of the linear layers, and make the others ReLU or nothing.

        Where all neurons of a layer are zero one of them stays, as zero.

        Raises
        ------
        RuntimeError
            Before the step ``end``.
        """
        if self.steps < self.end:
            raise RuntimeError(f"SparseNeuralDynamics: step {self.steps} of {self.end}")
        for (sequence, i), gate in zip(self._rows, self.gates, strict=True):
            before, after = sequence[i - 1], sequence[i + 1]
            alive = gate.decided != ZERO
            if not bool(alive.any()):
                before.weight[0] = 0
                if before.bias is not None:
                    before.bias[0] = 0
                alive[0] = True
            for linear, dim in ((before, 0), (after, 1)):
                weight = linear.weight.index_select(dim, alive.nonzero().flatten())
                linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
            if before.bias is not None:
                before.bias = nn.Parameter(before.bias[alive], before.bias.requires_grad)
            before.out_features = after.in_features = int(alive.sum())
            sequence[i] = PartialReLU((gate.decided == RELU)[alive])

    def state_dict(self) -> dict[str, Any]:
        """How far it is; logits and decisions are in the model's."""
        return {"steps": self.steps, "total": self.total, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ValueError if it is of another model."""
        if state["total"] != self.total:
            raise ValueError(
                f"SparseNeuralDynamics: a state of {state['total']} ReLUs, not {self.total}"
            )
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])
