"""Cases of products that skip zero activations, by what a kernel has to get right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import SumOracle, one_thread
from gossamer import reference
from torch import Tensor

ACTIVE = ("some", "few", "none", "one", "all", "whole columns")


@dataclass(frozen=True)
class ActiveCase:
    m: int
    n: int
    k: int
    active: str  # of ACTIVE

    def __str__(self) -> str:
        return f"{self.m}-{self.n}-{self.k}-{self.active.replace(' ', '-')}"

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight_kn and bias; of the zeros of x some are negative."""
        x, weight = torch.randn(self.m, self.k), torch.randn(self.k, self.n)
        x[self._zeros()] = 0.0
        x[(x == 0) & (torch.rand_like(x) < 0.3)] = -0.0
        return x.to(dtype), weight.to(dtype), torch.randn(self.n).to(dtype)

    def _zeros(self) -> Tensor:
        drawn = torch.rand(self.m, self.k)
        if self.active == "whole columns":
            return drawn[:1].expand(self.m, -1) < 0.5
        if self.active == "one" and self.m:
            kept = torch.ones_like(drawn, dtype=torch.bool)
            kept[self.m // 2, self.k - 1] = False
            return kept
        return drawn < {"some": 0.5, "few": 0.9, "none": 2.0, "all": 0.0, "one": 2.0}[self.active]


def draw_cases(count: int) -> list[ActiveCase]:
    """M from 0 to 70, N and K mostly odd, of every kind of zeros: the same at every call."""
    generator = torch.Generator().manual_seed(6)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    tokens = [0, 1, 1, 2, 63, 64, 65, 70]
    return [
        ActiveCase(
            tokens[i] if i < len(tokens) else draw(16),
            draw(90) if i % 3 else draw(400),
            draw(150) if i % 4 else draw(600),
            ACTIVE[i % len(ACTIVE)],
        )
        for i in range(count)
    ]


# By mechanism: lines, strips of one token and of several, batches of rows, parallel search.
CASES = (
    ActiveCase(1, 1, 1, "all"),
    ActiveCase(1, 64, 8, "all"),  # whole lines, one group of rows exactly
    ActiveCase(1, 1031, 1100, "some"),  # several strips, more than one chunk of the search
    ActiveCase(3, 515, 77, "few"),
    ActiveCase(9, 256, 32, "all"),  # one strip of several tokens, one batch
    ActiveCase(8, 700, 2100, "few"),  # the search is shared out
    ActiveCase(64, 2100, 40, "few"),  # more sums than are kept at once
    *draw_cases(24),
)


class LinearOracle(SumOracle):
    """``reference.actsparse_linear`` in float64, and how far a kernel may be from it."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        threshold: float = 0.0,
        activation: str | None = None,
    ) -> None:
        threshold = float(torch.tensor(threshold, dtype=x.dtype))
        exact = [None if t is None else t.detach().double() for t in (x, weight, bias)]
        # What is not finite only meets zeros where the result is finite.
        sizes = [None if t is None else t.abs().nan_to_num(nan=0.0, posinf=0.0) for t in exact]
        with one_thread():
            y = reference.actsparse_linear(exact[0], exact[1], exact[2], threshold, activation)
            size = reference.actsparse_linear(sizes[0], sizes[1], sizes[2], threshold)
        super().__init__(y, size, x.shape[-1], x.dtype)


class OutputsOracle(SumOracle):
    """The same of ``reference.actsparse_outputs``, for a weight [N, K]."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        wanted: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        exact = [None if t is None else t.detach().double() for t in (x, weight, bias)]
        sizes = [None if t is None else t.abs() for t in exact]
        with one_thread():
            y = reference.actsparse_outputs(exact[0], exact[1], wanted, exact[2], activation)
            size = reference.actsparse_outputs(sizes[0], sizes[1], wanted, sizes[2])
        super().__init__(y, size, x.shape[-1], x.dtype)
