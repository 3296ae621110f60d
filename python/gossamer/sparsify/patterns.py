"""Patterns: which entries of a weight live and die together, and among whom they compete."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import formats, reference
from ..formats import Block
from ..prune import count_kept, l2_norms, largest

Shape = tuple[int, ...]
Kernels = str | Block | formats.Unstructured


@dataclass(frozen=True)
class Pattern:
    """A weight cut into *units*, which are kept or dropped whole, in *lanes* of equal rights.

    Units of one lane compete with each other; every lane keeps the same number. A pattern of one
    lane may also compete with other layers.
    """

    def check(self, shape: Shape, groups: int) -> None:
        """Raise ValueError if a weight of this shape cannot have the pattern."""

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        """The scores of units.

        Parameters
        ----------
        score : Tensor
            Of each entry, in the shape of the weight.
        groups : int
            The convolution's.
        norm : {"l2", "sum", "abs_sum"}
            How a unit of several entries adds up; the score of a single one is its magnitude.

        Returns
        -------
        Tensor
            [lanes, units] float32 or float64, none below 0; -inf where a lane is padded.
        """
        raise NotImplementedError

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        """The bool mask of a weight whose units [lanes, units] are kept."""
        raise NotImplementedError

    def spread(self, numbers: Tensor, shape: Shape, groups: int) -> Tensor:
        """A number for each unit [lanes, units] -> the same for each entry of the weight."""
        return self.cover(numbers, shape, groups)

    def keep(self, units: Shape, shape: Shape, sparsity: float) -> int:
        """How many of [lanes, units] are kept at a sparsity: the nearest number, at least one."""
        return units[0] * count_kept(units[1], 1 - sparsity)

    def select(self, units: Tensor, keep: int) -> Tensor:
        """The bool mask of the ``keep`` units of largest score, as many in each lane."""
        return largest(units, keep // units.shape[0])

    def by_magnitude(self, groups: int, keep: int, weight: Tensor) -> Tensor:
        """The bool mask of the ``keep`` units of largest L2 norm of a weight."""
        units = self.units(weight.detach().abs(), groups, "l2")
        return self.cover(self.select(units, keep), tuple(weight.shape), groups)

    @property
    def one_lane(self) -> bool:
        """Whether all units of a layer compete, so that those of other layers may, too."""
        return True

    @property
    def kernels(self) -> Kernels | None:
        """What ``gossamer.convert`` calls the pattern, or None where no kernel runs it."""
        return None


def _single(score: Tensor) -> Tensor:
    """The score of units of one entry."""
    return (score if score.dtype == torch.float64 else score.float()).abs()


def _reduce(entries: Tensor, norm: str) -> Tensor:
    """The score of units whose entries lie along the last dimension."""
    entries = entries.double()
    if norm == "sum":
        return entries.sum(-1)
    if norm == "abs_sum":
        return entries.sum(-1).abs()
    return l2_norms(entries, (-1,))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entries of a layer."""

    @property
    def kernels(self) -> Kernels | None:
        return formats.Unstructured()

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        return _single(score).reshape(1, -1)

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        return kept.reshape(shape)


@dataclass(frozen=True)
class NM(Pattern):
    """At most N of every M consecutive inputs (input channels of a convolution).

    Below the pattern's own sparsity, which a schedule passes through, only the weakest of the
    entries that the pattern would drop are dropped.

    Parameters
    ----------
    n, m : int
        1 <= n < m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"NM: {self.n}:{self.m}, expected 1 <= n < m")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def one_lane(self) -> bool:
        return False

    @property
    def kernels(self) -> Kernels | None:
        return "2:4" if self.n <= 2 and self.m % 4 == 0 else None

    def check(self, shape: Shape, groups: int) -> None:
        if shape[1] < self.m:
            raise ValueError(f"{self} needs at least {self.m} inputs, there are {shape[1]}")

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        rows = _single(score).movedim(1, -1)
        return F.pad(rows, (0, -rows.shape[-1] % self.m), value=-torch.inf).reshape(-1, self.m)

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        lanes = (shape[0], *shape[2:], -1)
        return kept.reshape(lanes)[..., : shape[1]].movedim(-1, 1)

    def keep(self, units: Shape, shape: Shape, sparsity: float) -> int:
        if sparsity > 1 - self.n / self.m + 1e-9:
            raise ValueError(f"sparsity {sparsity}: {self} has {1 - self.n / self.m}")
        least = self._least(shape)
        if sparsity >= 1 - self.n / self.m - 1e-9:
            return least
        return max(least, count_kept(math.prod(shape), 1 - sparsity))

    def _least(self, shape: Shape) -> int:
        """n of every m, and at most n of the last ones of a row."""
        per_row = shape[1] // self.m * self.n + min(shape[1] % self.m, self.n)
        return per_row * math.prod(shape) // shape[1]

    def by_magnitude(self, groups: int, keep: int, weight: Tensor) -> Tensor:
        shape = tuple(weight.shape)
        if keep > self._least(shape):
            return super().by_magnitude(groups, keep, weight)
        units = self.units(weight.detach().abs(), groups, "l2")
        # Without counting, which no graph could record.
        return self.cover(self._best(units) & (units > -torch.inf), shape, groups)

    def select(self, units: Tensor, keep: int) -> Tensor:
        kept = self._best(units) & (units > -torch.inf)
        more = keep - int(kept.sum())
        if more > 0:
            rest = units.masked_fill(kept, -torch.inf)
            kept |= largest(rest.reshape(1, -1), more).view_as(kept)
        return kept

    def _best(self, units: Tensor) -> Tensor:
        """``largest`` of n: for few entries faster by comparing all of them."""
        if self.m > 8:
            return largest(units, self.n)
        numbers = units.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).unbind(-1)
        kept = []
        for i, own in enumerate(numbers):
            better = [x >= own if j < i else x > own for j, x in enumerate(numbers) if j != i]
            kept.append(torch.stack(better).sum(0) < self.n)
        return torch.stack(kept, -1)


@dataclass(frozen=True)
class RowBalanced(Pattern):
    """The same number of entries in every row (filter), and in each bank of it.

    Parameters
    ----------
    banks : int
        Parts of equal size that each row falls into.

    References
    ----------
    Yao et al., "Balanced Sparsity for Efficient DNN Inference on GPU", AAAI 2019.
    """

    banks: int = 1

    def __post_init__(self) -> None:
        if self.banks < 1:
            raise ValueError(f"RowBalanced: {self.banks} banks, expected at least 1")

    @property
    def one_lane(self) -> bool:
        return False

    @property
    def kernels(self) -> Kernels | None:
        return formats.Unstructured()

    def check(self, shape: Shape, groups: int) -> None:
        if math.prod(shape[1:]) % self.banks != 0:
            raise ValueError(f"rows of {math.prod(shape[1:])} entries in {self.banks} equal banks")

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        return _single(score).reshape(score.shape[0] * self.banks, -1)

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        return kept.reshape(shape)


@dataclass(frozen=True)
class ConstantFanIn(RowBalanced):
    """The same number of inputs to every output: ``RowBalanced`` of one bank.

    References
    ----------
    Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.
    """


@dataclass(frozen=True)
class Blocks(Pattern):
    """Whole blocks, which ``gossamer.Block`` lays over a weight.

    Parameters
    ----------
    block : Block
        Their size.
    """

    block: Block

    def __str__(self) -> str:
        return f"block {self.block}"

    @property
    def kernels(self) -> Kernels | None:
        return self.block

    def check(self, shape: Shape, groups: int) -> None:
        self.block.grid(shape, groups)

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        return _reduce(reference.to_blocks(score, self.block, groups).flatten(2), norm).view(1, -1)

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        mask = kept.view(self.block.grid(shape, groups))
        return reference.block_cover(mask, shape, self.block, groups)


@dataclass(frozen=True)
class Filters(Pattern):
    """Whole outputs (filters, neurons), or whole inputs (channels).

    Parameters
    ----------
    dim : {0, 1}
        0 for outputs, 1 for inputs.
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise ValueError(f"Filters: dim {self.dim}, expected 0 (outputs) or 1 (inputs)")

    def check(self, shape: Shape, groups: int) -> None:
        if shape[self.dim] < 2:
            raise ValueError(f"a single {'output' if self.dim == 0 else 'input'} cannot be dropped")
        if self.dim == 1 and groups != 1:
            raise ValueError(f"the inputs of {groups} groups are not those of all outputs")

    def units(self, score: Tensor, groups: int, norm: str) -> Tensor:
        return _reduce(score.movedim(self.dim, 0).flatten(1), norm)[None]

    def cover(self, kept: Tensor, shape: Shape, groups: int) -> Tensor:
        across = [1] * len(shape)
        across[self.dim] = -1
        return kept.view(across).expand(shape).contiguous()


def as_pattern(pattern: Kernels | Pattern) -> Pattern:
    """A pattern by what a user calls it: itself, what ``gossamer`` calls it, or "N:M".

    Raises
    ------
    TypeError, ValueError
        If there is no such pattern.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, Block):
        return Blocks(pattern)
    if isinstance(pattern, formats.Unstructured):
        if pattern.density is not None:
            raise ValueError(
                f"pattern {pattern!r}: the sparsity is the schedule's; gossamer.Unstructured()"
            )
        return Unstructured()
    if not isinstance(pattern, str):
        raise TypeError(f"pattern {pattern!r}: expected a Pattern, a gossamer.Block or 'N:M'")
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()):
        raise ValueError(f"pattern {pattern!r}: expected a Pattern, a gossamer.Block or 'N:M'")
    return NM(int(n), int(m))


def over_layers(
    pattern: Kernels | Pattern | None, options: dict[str, Any], distribution: str
) -> Pattern:
    """A recipe's pattern, and its distribution in the options where layers may differ."""
    made = Unstructured() if pattern is None else as_pattern(pattern)
    if made.one_lane:
        options.setdefault("distribution", distribution)
    return made


def check_sparsity(sparsity: float) -> float:
    """Raise ValueError unless a sparsity lies in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}, expected at least 0 and below 1")
    return sparsity
