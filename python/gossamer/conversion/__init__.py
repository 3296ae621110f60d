"""The parts of ``gossamer.convert``: which layers, what is in their way, what is gained, report."""

from .report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport"]
