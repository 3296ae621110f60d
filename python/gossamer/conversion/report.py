"""What ``convert`` did to each layer, as a table and as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or convolution of a converted model.

    Attributes
    ----------
    name : str
        Its name in the model; ``""`` where the model itself is the layer.
    aliases : tuple of str
        Further names of the same layer.
    shape : tuple of int
        Of the dense weight: (out_features, in_features), or (out_channels, in_channels / groups,
        *kernel size).
    dtype : str
        Of the weight, for example ``"float32"``.
    swapped, pruned : bool
        Whether it is a sparse layer now, and whether its weight was pruned.
    kernel : str or None
        The kernel of a swapped layer, as ``target/kernel``.
    reason : str
        Why it was swapped or why it stays dense.
    bytes_before, bytes_after : int
        Of weight and bias.
    rows : int or None
        Rows of x, or images of a convolution, that one call of the layer had with the sample (the
        commonest, if they differ).
    dense_seconds, sparse_seconds : float or None
        Medians measured at the sample's rows, summed over the calls of one run of the sample.
        Layers that differ in nothing share one measurement.
    speedup : float or None
        dense_seconds / sparse_seconds.
    error_max, error_mean : float or None
        Absolute difference between the outputs of the sparse layer and of the dense layer with the
        same (pruned) weight, on inputs from the sample (on normal noise, where there is none).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    bytes_before: int
    bytes_after: int
    aliases: tuple[str, ...] = ()
    swapped: bool = False
    pruned: bool = False
    kernel: str | None = None
    rows: int | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None
    speedup: float | None = None
    error_max: float | None = None
    error_mean: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """Printed, a table; iterated, its ``LayerReport`` rows.

    Attributes
    ----------
    model : nn.Module
        The converted model: the one given, or its replacement where that is itself such a layer.
    layers : tuple of LayerReport
        Every linear layer and convolution of the model, in the model's order.
    """

    model: nn.Module = field(repr=False)
    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The row of a layer, by any of its names."""
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(name)

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.swapped)

    def rows(self) -> list[dict[str, Any]]:
        """The table for machines: one dict a layer, of what JSON can hold."""
        return [
            {**asdict(layer), "shape": list(layer.shape), "aliases": list(layer.aliases)}
            for layer in self.layers
        ]

    def __str__(self) -> str:
        table = [_HEADINGS, *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(_align, row, widths, _RIGHT)).rstrip() for row in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        before = sum(layer.bytes_before for layer in self.layers)
        after = sum(layer.bytes_after for layer in self.layers)
        text = (
            f"{len(self.swapped)} of {len(self.layers)} layers swapped; "
            f"{_bytes(before)} -> {_bytes(after)}"
        )
        timed = [layer for layer in self.layers if layer.dense_seconds and layer.sparse_seconds]
        if timed:
            dense = sum(layer.dense_seconds or 0.0 for layer in timed)
            now = sum(
                (layer.sparse_seconds if layer.swapped else layer.dense_seconds) or 0.0
                for layer in timed
            )
            text += f"; measured layers {dense / now:.2f}x as fast"
        return text


_HEADINGS = (
    "layer",
    "weight",
    "bytes",
    "rows",
    "dense us",
    "sparse us",
    "speed-up",
    "max error",
    "mean error",
    "kernel, or why dense",
)
_RIGHT = (False, True, True, True, True, True, True, True, True, False)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    verdict = f"{layer.kernel} ({layer.reason})" if layer.swapped else f"dense: {layer.reason}"
    return (
        " = ".join((layer.name or "(the model)", *layer.aliases)),
        "x".join(map(str, layer.shape)) + f" {layer.dtype}" + " pruned" * layer.pruned,
        _bytes(layer.bytes_before)
        + (f" -> {_bytes(layer.bytes_after)}" if layer.bytes_after != layer.bytes_before else ""),
        _number(layer.rows, "d"),
        _number(layer.dense_seconds, ".1f", 1e6),
        _number(layer.sparse_seconds, ".1f", 1e6),
        _number(layer.speedup, ".2f") + ("x" if layer.speedup is not None else ""),
        _number(layer.error_max, ".1e"),
        _number(layer.error_mean, ".1e"),
        verdict,
    )


def _number(value: float | None, spec: str, scale: int | float = 1) -> str:
    return "" if value is None else format(value * scale, spec)


def _align(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
