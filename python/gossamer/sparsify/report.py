"""What sparsifying has made of a model: a table, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layers import Layer


@dataclass(frozen=True)
class MaskChange:
    """One change of the masks, by layer.

    Attributes
    ----------
    step : int
    sparsity : dict
        The share of entries that is masked since.
    changed : dict
        The share of entries whose mask changed: the SAD of SR-STE by the size of the weight.
    energy : dict
        The share of the sum of squares that the mask kept of the weight as it was.
    """

    step: int
    sparsity: dict[str, float]
    changed: dict[str, float]
    energy: dict[str, float]

    @classmethod
    def of(cls, step: int, layers: Sequence[Layer], changed: Mapping[str, int]) -> MaskChange:
        energy = {}
        for layer in layers:
            squares = layer.weight.detach().double().square()
            whole = float(squares.sum())
            energy[layer.name] = float(squares[layer.mask].sum()) / whole if whole else 1.0
        return cls(
            step,
            {layer.name: layer.sparsity for layer in layers},
            {layer.name: changed[layer.name] / layer.mask.numel() for layer in layers},
            energy,
        )

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> MaskChange:
        return cls(**state)


@dataclass(frozen=True)
class SparsityRow:
    """One layer, as it is now."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    energy: float  # that the last change kept
    changed: float  # by the last change


@dataclass(frozen=True)
class SparsityReport:
    """The layers of a sparsifier; a table when printed."""

    pattern: str
    layers: tuple[SparsityRow, ...]
    history: tuple[MaskChange, ...]

    @classmethod
    def of(
        cls, pattern: str, layers: Sequence[Layer], history: Sequence[MaskChange]
    ) -> SparsityReport:
        last = history[-1] if history else None
        rows = tuple(
            SparsityRow(
                layer.name,
                layer.shape,
                layer.sparsity,
                last.energy[layer.name] if last else 1.0,
                last.changed[layer.name] if last else 0.0,
            )
            for layer in layers
        )
        return cls(pattern, rows, tuple(history))

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a layer."""
        return [dict(vars(row)) for row in self.layers]

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.layers)
        lines = [f"{'layer':{width}}  sparsity  energy kept  mask changed  shape ({self.pattern})"]
        lines += [
            f"{row.name:{width}}  {row.sparsity:8.2%}  {row.energy:11.2%}  {row.changed:12.2%}  "
            + "x".join(map(str, row.shape))
            for row in self.layers
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw sparsity, change of the masks and energy kept over the steps, into a PNG file.

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        steps = [change.step for change in self.history]
        titles = {
            "sparsity": "sparsity",
            "changed": "share of the mask that changed",
            "energy": "energy kept",
        }
        for axes, (quantity, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for row in self.layers:
                values = [getattr(change, quantity)[row.name] for change in self.history]
                axes.plot(steps, values, marker=".", linewidth=1, label=row.name)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylim(-0.03, 1.03)
        if len(self.layers) <= 12:
            axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)
