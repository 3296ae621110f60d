"""What the tests of convert() share: a small model, a sample for it, a fixed measurement."""

from __future__ import annotations

import copy

import pytest
import torch
from gossamer.conversion import plan
from gossamer.conversion.timing import Speed
from gossamer.prune import magnitude_24
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, width: int = 64, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, dtype=dtype)
        self.up = nn.Linear(width, 4 * width, dtype=dtype)
        self.down = nn.Linear(4 * width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x)))) * scale


def small_mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


def small_sample() -> Tensor:
    return torch.randn(10, 64, generator=torch.Generator().manual_seed(1))


def fix_speedup(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Replaces the measurement, which no test can foresee, by a fixed outcome."""
    monkeypatch.setattr(plan, "measure_speed", lambda *_: Speed(ratio * 1e-5, 1e-5))


def pruned_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(magnitude_24(module.weight.detach()))
    return twin
